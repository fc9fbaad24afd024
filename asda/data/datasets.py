"""Open the data that a configuration names."""

from asda.config.data import DataSpecs
from asda.config.model import ClassifyConfig
from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.data.remote.cache import CacheConfig
from asda.errors import UserError


def open_held_out(config: Config, train: ClipDataset) -> tuple[ClipDataset | None, list[str]]:
    """Open data.valid and data.test before the first step, so that mistakes show then, and not after hours.

    Returns:
        data.valid, if there is one, and warnings where a network is judged on clips that it learns.

    Raises:
        UserError: they are not what can be judged on; or they have clips in common.
    """
    opened = {}
    for key, data in (("data.valid", config.data.valid), ("data.test", config.data.test)):
        if data:
            opened[key] = held_out(config, train.vocabulary, data)
            check_labels(config, data, opened[key])
    valid, test = opened.get("data.valid"), opened.get("data.test")
    if valid and test and test.shares_shards_with(valid):
        raise UserError(
            f"data.test {config.data.test} and data.valid {config.data.valid} have shards in common; a test set must "
            "not choose the checkpoint"
        )
    return valid, [
        f"{key} has shards of data.train: its figures are of clips that the network learns, not of held-out ones"
        for key, dataset in opened.items()
        if dataset.shares_shards_with(train)
    ]


def check_labels(config: Config, data: DataSpecs, judged: ClipDataset) -> None:
    """Raise UserError where an accuracy shall choose, and held-out clips have several labels or none."""
    if config.run.keep_best == "accuracy" and (complaint := judged.without_one_label()):
        raise UserError(f"run.keep_best accuracy needs one label a clip. {data}: {complaint}; choose by mAP")


def held_out(config: Config, vocabulary: tuple[str, ...], data: DataSpecs | None = None) -> ClipDataset:
    """The clips that a classifier is judged on: config.data.valid by default.

    Raises:
        UserError: the shards are missing, have no labels, or other classes than the classifier.
    """
    cache = CacheConfig(config.data.cache, config.data.cache_gib)
    data = data or config.data.valid
    dataset = ClipDataset(data, labelled=True, cache=cache)
    if not dataset.num_labels:
        raise UserError(
            f"{data} has no labels on its {len(dataset)} clips, so there is nothing to measure; name a "
            "split of labelled clips"
        )
    if dataset.vocabulary != vocabulary:
        raise UserError(
            f"{data} has {len(dataset.vocabulary)} classes that are not the {len(vocabulary)} the "
            "classifier was trained on; make the shards with the same --labels FILE"
        )
    return dataset


def open_labelled(config: Config, key: str, specs: DataSpecs) -> ClipDataset:
    """Clips with labels; a UserError that begins with `key` if there are none."""
    dataset = ClipDataset(specs, labelled=True, cache=CacheConfig(config.data.cache, config.data.cache_gib))
    if not dataset.num_labels:
        raise UserError(f"{key} {specs} has no labels on its {len(dataset)} clips; name a split of labelled clips")
    return dataset


def _open_data(config: Config) -> ClipDataset:
    """The training shards.

    Raises:
        UserError: they do not have the labels that the objective needs.
    """
    sources = [part.data for part in config.data.datasets]
    cache = CacheConfig(config.data.cache, config.data.cache_gib)
    labelled = isinstance(config.objective, ClassifyConfig)
    dataset = ClipDataset(*sources, labelled=labelled, tolerant=config.data.max_damaged > 0, cache=cache)
    if labelled and not dataset.num_labels:
        raise UserError(
            f"{config.data.train} has no labels on its {len(dataset)} clips; objective.kind classify learns from labels"
        )
    one_label = isinstance(config.objective, ClassifyConfig) and config.objective.loss == "ce"
    if one_label and (complaint := dataset.without_one_label()):
        raise UserError(
            f"{config.data.train}: {complaint}; objective.loss ce wants one label on every clip, use bce for any number"
        )
    return dataset
