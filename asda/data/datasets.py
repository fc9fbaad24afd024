"""Open the data that a configuration names: every kind here, with the checks that it needs."""

from asda.config.data import DataConfig, DataSpecs
from asda.config.model import ClassifyConfig
from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.data.remote.cache import CacheConfig
from asda.errors import UserError


def open_clips(data: DataConfig, *sources: DataSpecs, labelled: bool = False, tolerant: bool = False) -> ClipDataset:
    """Open any clips, by default those of data.train, through the cache that the configuration names."""
    cache = CacheConfig(data.cache, data.cache_gib)
    sources = sources or tuple(part.data for part in data.datasets)
    return ClipDataset(*sources, labelled=labelled, tolerant=tolerant, cache=cache)


def open_labelled(config: Config, key: str, specs: DataSpecs) -> ClipDataset:
    """Open clips with labels. Raises UserError, which names `key`, as "data.valid", if no clip has a label."""
    dataset = open_clips(config.data, specs, labelled=True)
    _check_labelled(dataset, key, specs)
    return dataset


def open_training_data(config: Config) -> ClipDataset:
    """Open data.train.

    Raises:
        UserError: the shards are missing, or do not have the labels that the objective needs.
    """
    objective, tolerant = config.objective, config.data.max_damaged > 0
    dataset = open_clips(config.data, labelled=isinstance(objective, ClassifyConfig), tolerant=tolerant)
    if isinstance(objective, ClassifyConfig):
        _check_labelled(dataset, "data.train", config.data.train)
        if objective.loss == "ce":
            _check_each_has_one(dataset, f"data.train {config.data.train}", "objective.loss ce", "objective.loss=bce")
    return dataset


def open_held_out(config: Config, train: ClipDataset) -> tuple[ClipDataset | None, list[str]]:
    """Open data.valid and data.test before the first step, so that mistakes show at once.

    Returns:
        data.valid, or None without one; and a warning for each set that shares shards with data.train.

    Raises:
        UserError: a set cannot be evaluated, or data.valid and data.test share shards.
    """
    opened: dict[str, ClipDataset] = {}
    for key, specs in (("data.valid", config.data.valid), ("data.test", config.data.test)):
        if specs:
            opened[key] = open_evaluation_data(config, train.vocabulary, specs, key)
            check_one_label(config, key, specs, opened[key])
    valid, test = opened.get("data.valid"), opened.get("data.test")
    if valid and test and test.shares_shards_with(valid):
        raise UserError(
            f"data.test {config.data.test} and data.valid {config.data.valid} share shards. A test set must not select "
            "the checkpoint; name splits that are apart"
        )
    return valid, [
        f"{key} shares shards with data.train, so its figures are not those of held-out clips"
        for key, dataset in opened.items()
        if dataset.shares_shards_with(train)
    ]


def open_evaluation_data(
    config: Config, vocabulary: tuple[str, ...], specs: DataSpecs, key: str = "evaluation data"
) -> ClipDataset:
    """Open clips to evaluate a classifier on, which has the classes of `vocabulary`.

    Raises:
        UserError: the shards are missing, have no labels, or other classes than the classifier.
    """
    dataset = open_labelled(config, key, specs)
    if dataset.vocabulary != vocabulary:
        raise UserError(
            f"{key} {specs} has {len(dataset.vocabulary)} classes, which differ from the {len(vocabulary)} of the "
            "classifier; make the shards with the same --labels FILE"
        )
    return dataset


def open_probe_data(config: Config) -> tuple[ClipDataset, ClipDataset]:
    """Open probe.train and probe.test.

    Raises:
        UserError: shards are missing or have no labels, the classes differ, the sets share shards, or there are fewer
            clips than neighbours.
    """
    assert config.probe is not None
    specs, neighbours = config.probe, config.probe.neighbours
    train = open_labelled(config, "probe.train", specs.train)
    test = open_labelled(config, "probe.test", specs.test)
    both = f"probe.test {specs.test} and probe.train {specs.train}"
    if train.vocabulary != test.vocabulary:
        raise UserError(f"{both} have different classes; make their shards with the same --labels FILE")
    if test.shares_shards_with(train):
        raise UserError(f"{both} share shards, so a clip would be its own neighbour; name splits that are apart")
    if len(train) < neighbours:
        raise UserError(
            f"probe.neighbours {neighbours} exceeds the {len(train)} clips of probe.train {specs.train}; ask for fewer"
        )
    return train, test


def check_one_label(config: Config, key: str, specs: DataSpecs, dataset: ClipDataset) -> None:
    """Raise UserError if an accuracy selects the best checkpoint, and a held-out clip has several labels or none."""
    if config.run.keep_best == "accuracy":
        _check_each_has_one(dataset, f"{key} {specs}", "run.keep_best=accuracy", "run.keep_best=mAP")


def _check_each_has_one(dataset: ClipDataset, name: str, setting: str, repair: str) -> None:
    if complaint := dataset.complaint_about_labels():
        raise UserError(f"{name}: {complaint}. {setting} needs exactly one label on every clip; use {repair}")


def _check_labelled(dataset: ClipDataset, key: str, specs: object) -> None:
    if not dataset.num_labels:
        raise UserError(f"{key} {specs} has no labels on its {len(dataset)} clips; name a split of labelled clips")
