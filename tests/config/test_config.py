"""The configuration: one tree, checked once, with errors that name key, value, rule and nearest name."""

import json
from pathlib import Path

import pytest
from fault_table import Count

from asda.config.load import MAX_CONFIG_BYTES
from asda.config.model import PretrainConfig
from asda.config.run import dump_config, load_config, load_stored_config
from asda.errors import UserError

AS2M = Path(__file__).parents[2] / "configs" / "as2m.json"
CONFIGS = sorted(AS2M.parent.glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.json").write_text(dump_config(config))
    assert load_config(tmp_path / "again.json") == config
    assert config.about["what"], "a config tells its story"


def test_the_as2m_config_is_the_published_recipe() -> None:
    # design figures: 12 blocks of 768, 12 heads, 16 students, mask .8/.07/5, lr 5e-4, 800k updates of 48 clips
    config = load_config(AS2M)
    objective = config.objective
    assert isinstance(objective, PretrainConfig)
    assert (config.model.depth, config.model.width, config.model.heads, config.model.mlp_ratio) == (12, 768, 12, 3.5)
    assert (config.model.attention_lambda, config.model.attention_scale) == (0.1, 0.95)
    assert (objective.students, objective.utterance_weight) == (16, 96.0)
    assert (objective.mask.ratio, objective.mask.adjust, objective.mask.block) == (0.8, 0.07, 5)
    assert (objective.ema.decay, objective.ema.end_decay, objective.ema.anneal_steps) == (0.9998, 0.99999, 100_000)
    assert (config.optimizer.steps, config.optimizer.warmup_steps, config.optimizer.batch) == (800_000, 106_666, 48)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (5e-4, (0.9, 0.95), 0.05)


def test_dotted_overrides_replace_values_and_read_json() -> None:
    config = load_config(
        AS2M, ["engine.zero_stage=3", "data.train=elsewhere:train", "data.log_mel.mean=-5", "resume=never"]
    )
    assert (config.engine.zero_stage, config.data.train, config.resume) == (3, "elsewhere:train", "never")
    assert config.data.log_mel.mean == -5  # type: ignore[union-attr]
    assert load_config(AS2M, ['data.train=["a:x", "b:y+z"]']).data.train == ["a:x", "b:y+z"]


def test_the_data_of_a_run_is_one_dataset_or_a_mixture_of_several(tmp_path: Path) -> None:
    def datasets(train: object) -> list[tuple[object, float]]:
        config = load_config(AS2M, [f"data.train={json.dumps(train)}"])
        (tmp_path / "again.json").write_text(dump_config(config))
        assert load_config(tmp_path / "again.json") == config
        return [(part.data, part.share) for part in config.data.datasets]

    assert datasets("a:x") == [("a:x", 1)]
    assert datasets(["a:x", "b:y"]) == [(["a:x", "b:y"], 1)]
    assert datasets([{"data": "a:x", "share": 7}, {"data": ["b:y"], "share": 3}]) == [("a:x", 7), (["b:y"], 3)]
    order = {"mode": "balanced", "draws_per_epoch": 200_000}
    (part,) = load_config(
        AS2M, [f'data.train=[{{"data": "a:x", "share": 1, "order": {json.dumps(order)}}}]']
    ).data.datasets
    assert part.order is not None
    assert (part.order.mode, part.order.draws_per_epoch, part.order.replacement) == ("balanced", 200_000, False)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.trian=x", "unknown key data.trian; did you mean data.train?"),
        ("objective.mask.ratoi=0.5", "did you mean objective.mask.ratio?"),
        ("zero_stage=1", "did you mean engine.zero_stage?"),
        ("data.strides=3", "unknown key data.strides"),  # begins as pydantic's name of a type does
        ("engine.floaty=1", "unknown key engine.floaty"),
        ("model.attention_lambda=much", "should be a valid number, or input should be 'learned' or 'absent'"),
        ("quux=1", "unknown key quux; known here: _about, preset, size, objective"),
        ("optimizer.lr=-1", "optimizer.lr is -1: input should be greater than 0"),
        ("optimizer.lr=NaN", "optimizer.lr is NaN: input should be a finite number"),
        ("optimizer.lr=Infinity", "finite"),
        ('optimizer.lr="fast"', "valid number"),
        ("optimizer.steps=1.5", "optimizer.steps is 1.5: input should be a valid integer"),
        ("optimizer.steps=true", "valid integer"),
        ("optimizer.batch=null", "optimizer.batch is null"),
        ("engine.zero_stage=4", "less than or equal to 3"),
        ("engine.precision=fp8", "'bf16', 'fp16' or 'fp32'"),
        ("objective.kind=cluster", "objective.kind is 'cluster'; it must be one of 'pretrain', 'classify'"),
        ("model.heads=7", "model.width 768 must be a multiple of model.heads 7"),
        ("data.frames=1000", "data.frames 1000 must be a multiple of model.patch 16"),
        ("data.frames=20000", "must fit model.max_time_patches"),
        ("optimizer.warmup_steps=900000", "must not exceed optimizer.steps 800000"),
        ("objective.target_layers=13", "must not exceed model.depth 12"),
        ("objective.decoder.kernel=4", "must be odd"),
        ("model.mlp_ratio=0.001", "model.mlp_ratio 0.001 times model.width 768 must be at least 1, the hidden width"),
        (
            'objective.decoder={"groups": 10, "width": 70}',
            "model.width 768 must be a multiple of objective.decoder.groups 10",
        ),
        ("objective.mask.ratio=0.999", "objective.mask.ratio 0.999 leaves 0 of the 512 patches of a clip visible"),
        ("objective.mask.ratio=1e-17", "objective.mask.ratio 1e-17 leaves 512 of the 512 patches of a clip visible"),
        ('probe={"train": [], "test": "a:x"}', "probe.train is []"),
        ('data.train=[{"data": [], "share": 1}]', "data.train.0.data is []"),
        ("data.valid=shards/x:test", "data.valid"),
        ("data.train=[]", "data.train is []: list should have at least 1 item"),
        ("data.train=3", "data.train is 3: input should be a valid string"),
        ('data.train=[{"data": "a:x", "share": 1}, "b:y"]', 'data.train.1 is "b:y": input should be an object'),
        ('data.train=[{"data": "a:x"}]', "the key data.train.0.share is missing"),
        ('data.train=[{"data": "a:x", "share": 0}]', "data.train.0.share is 0: input should be greater than 0"),
        (
            'data.train=[{"data": "a:x", "share": 1, "shard": 2}]',
            "unknown key data.train.0.shard; did you mean data.train.share?",
        ),
        (
            'data.train=[{"data": "a:x", "share": 1}, {"data": "b:y", "share": 9999}]',
            "data.train: a:x has 0.0001 of all shares, less than 0.001",
        ),
        (
            "data.order.mode=random",
            "data.order.mode is \"random\": input should be 'shuffled', 'balanced' or 'sequential'",
        ),
        ("optimizer.min_lr=1", "optimizer.min_lr 1 must not be above optimizer.lr"),
        ("data.order.mode=balanced", "data.order.draws_per_epoch must be given in mode balanced without replacement"),
        ("data.order.draws_per_epoch=5", "are of mode balanced; in mode shuffled an epoch is every clip once"),
        ("data.order.replacement=true", "are of mode balanced; in mode shuffled an epoch is every clip once"),
        ("nonsense", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("resume.deep=1", "which is a value and not a section"),
    ],
)
def test_a_bad_value_is_one_sentence_with_key_and_rule(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(AS2M, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shares_are_as_exact_here_as_in_the_order_of_clips() -> None:
    # As floats the first share is 0.001 of all, as fractions of integers it is less.
    shares = [{"data": "a:x", "share": 0.14285714285714285}, {"data": "b:y", "share": 142.71428571428572}]
    with pytest.raises(UserError, match=r"a:x has 0\.001 of all shares, less than 0\.001"):
        load_config(AS2M, [f"data.train={json.dumps(shares)}"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "a config is one JSON object"),
        ('{"run": {"folder": "a", "folder": "b"}}', "'folder' is written twice"),
        ("{}", "the key objective is missing"),
        ("[" * 100_000, "is not valid JSON"),
        (json.dumps({"_about": {"x": "y" * MAX_CONFIG_BYTES}}), "a config has at most"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.json") as caught:
        load_config(path)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ('run={"folder": "a", "folder": "b"}', "the key 'folder' is written twice in one object"),
        ('data.train=[{"data": "a:x", "share": 1, "share": 2}]', "the key 'share' is written twice in one object"),
        ("run.folder=runs/a\0b", r"run.folder holds the character '\x00', which is not text"),
        ('run.folder="runs/\\udce9"', r"run.folder holds the character '\udce9', which is not text"),
        ('data.train=[{"data": "a\\u0000:x", "share": 1}]', r"data.train.data holds the character '\x00'"),
        ('_about={"a\\ud800": 1}', r"a key in _about holds the character '\ud800'"),
    ],
)
def test_an_override_that_no_file_could_hold_is_refused(override: str, sentence: str, count_fault: Count) -> None:
    with pytest.raises(UserError) as caught:
        load_config(AS2M, [override])
    assert sentence in str(caught.value)
    count_fault("31", "configuration: an override that no file could hold", 1, 1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no config file"):
        load_config(tmp_path / "nowhere.json")


def test_a_retired_key_is_refused_with_its_replacement_in_a_users_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.workers=2 is no longer a key: .*set data\.threads"):
        load_config(AS2M, ["data.workers=2"])
    tree = json.loads(AS2M.read_text())
    (tmp_path / "run.json").write_text(json.dumps(tree | {"data": tree["data"] | {"workers": 0}}))
    with pytest.raises(UserError, match=r"data\.workers=0 is no longer a key"):
        load_config(tmp_path / "run.json")


def test_a_retired_key_is_dropped_aloud_from_the_config_that_a_run_has_stored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(AS2M)
    tree = json.loads(dump_config(config))
    (tmp_path / "config.json").write_text(json.dumps(tree | {"data": tree["data"] | {"workers": 2}}))
    assert load_stored_config(tmp_path / "config.json") == config
    assert "config.json: ignoring data.workers=2, which an earlier version wrote" in capfd.readouterr().err
