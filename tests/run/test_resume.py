"""A run resumes as itself or not at all: row 26 of the fault matrix."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fault_table import Count

from asda.config.load import known_keys
from asda.config.run import Config, load_config
from asda.errors import UserError
from asda.run.resume import check_settings, decides, flattened

CONFIGS = Path(__file__).parents[2] / "configs"
CHECKPOINT = Path("runs/x/checkpoints/step-0005000")
RESOLVED = 'data.log_mel={"mean": -4, "std": 4}'


def sections(kind: str) -> Config:
    return load_config(CONFIGS / f"demo_{kind}.json", [RESOLVED, "run.folder=runs/x"])


def another(value: Any) -> Any:
    """Another value than this, of its type."""
    if isinstance(value, bool | None):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value[::-1] + value if value else type(value)("x")


def changed(section: Any, keys: list[str]) -> Any:
    """The same with another value of one key. Values are not checked: any change must be noticed."""
    name = "about" if keys[0] == "_about" else keys[0]
    old = section[name] if isinstance(section, dict) else getattr(section, name)
    new = changed(old, keys[1:]) if keys[1:] else another(old)
    return section | {name: new} if isinstance(section, dict) else section.model_copy(update={name: new})


# Keys, and sections of which every key counts, whose values may differ between a checkpoint and the run that resumes
# from it. Every other key decides the weights.
FREE = {
    "_about", "preset", "size", "data.valid", "data.test", "data.device", "data.workers", "data.threads",
    "data.prefetch", "data.timeout_s", "data.max_damaged", "data.cache", "data.cache_gib", "engine.attention",
    "engine.zero_stage", "engine.micro_batch", "engine.activation_checkpointing", "engine.offload_optimizer",
    "engine.timeout_s", "run.folder", "run.log_every", "run.save_every", "run.eval_every", "run.keep",
    "run.keep_best", "run.on_failed_save", "run.max_bad_steps", "run.check_replicas_every", "run.min_target_spread",
    "run.min_prediction_spread", "run.wandb", "probe", "resume",
}  # fmt: skip
DECIDING = {
    "objective", "model", "optimizer", "data.train", "data.frames", "data.crop", "data.log_mel", "data.pad_log_mel",
    "data.padding", "data.augment", "data.order", "data.group_shards", "engine.precision", "run.seed",
}  # fmt: skip


def test_every_key_decides_or_may_change_as_the_lists_say() -> None:
    known = known_keys(Config)
    leaves = [key for key in known if not any(other.startswith(f"{key}.") for other in known)]
    assert len(leaves) > 100
    for key in leaves:
        parts = key.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        assert bool(prefixes & FREE) != bool(prefixes & DECIDING), f"{key} must be in one of the two lists"
        assert decides(key) == bool(prefixes & DECIDING), key


def test_a_field_that_says_nothing_decides() -> None:
    assert decides("engine.a_new_key")
    assert decides("optimizer.a_new_key")
    assert not decides("probe.a_new_key")


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of values that are not checked
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_changed_value_that_decides_is_refused_and_any_other_is_said(kind: str, count_fault: Count) -> None:
    saved = sections(kind)
    keys = [key for key in flattened(saved) if key != "data.train"]  # which has tests of its own
    deciding = [key for key in keys if decides(key)]
    for key in deciding:
        with pytest.raises(UserError, match=rf" {re.escape(key)} .* -> .*; set them back"):
            check_settings(CHECKPOINT, saved, changed(saved, key.split(".")))
    for key in set(keys) - set(deciding):
        (line,) = check_settings(CHECKPOINT, saved, changed(saved, key.split(".")))
        assert line.startswith(f"changed since step-0005000: {key} ")
    assert 20 < len(deciding) < len(keys) - 20
    count_fault("26", f"a value of the configuration changed on resume ({kind})", len(keys), len(keys))


def test_an_unchanged_run_has_nothing_to_say() -> None:
    assert check_settings(CHECKPOINT, sections("pretrain"), sections("pretrain")) == []


def test_all_deciding_values_are_named_at_once_old_and_new() -> None:
    config = load_config(
        CONFIGS / "demo_pretrain.json", [RESOLVED, "run.folder=runs/x", "run.seed=7", "optimizer.lr=0.01"]
    )
    saved = sections("pretrain")
    with pytest.raises(UserError) as caught:
        check_settings(CHECKPOINT, saved, config)
    assert f"optimizer.lr {saved.optimizer.lr} -> 0.01, run.seed {saved.run.seed} -> 7;" in str(caught.value)
    assert "set them back, or give another run.folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_objective_is_another_run() -> None:
    with pytest.raises(UserError, match=r'objective\.kind "pretrain" -> "classify"'):
        check_settings(CHECKPOINT, sections("pretrain"), sections("finetune"))


def trained_on(train: object) -> Config:
    path = CONFIGS / "demo_pretrain.json"
    return load_config(path, [RESOLVED, "run.folder=runs/x", f"data.train={json.dumps(train)}"])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("shards/x:train", "/mnt/x:train"),
        ("shards/x:train", ["/mnt/x:train"]),
        (
            [{"data": "a:x+y", "share": 7}, {"data": ["b:x"], "share": 3}],
            [{"data": "c:x+y", "share": 7}, {"data": "d:x", "share": 3}],
        ),
    ],
)
def test_shards_may_move(before: object, now: object) -> None:
    lines = check_settings(CHECKPOINT, trained_on(before), trained_on(now))
    assert len(lines) == 1
    assert "data.train" in lines[0]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("shards/x:train", "shards/x:test"),
        ("shards/x:train", ["shards/x:train", "shards/y:train"]),
        (["a:x", "b:x"], [{"data": "a:x", "share": 1}, {"data": "b:x", "share": 1}]),
        (
            [{"data": "a:x", "share": 7}, {"data": "b:x", "share": 3}],
            [{"data": "a:x", "share": 3}, {"data": "b:x", "share": 7}],
        ),
    ],
)
def test_other_splits_and_other_shares_are_another_run(before: object, now: object) -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        check_settings(CHECKPOINT, trained_on(before), trained_on(now))


def test_passwords_of_locations_are_not_shown() -> None:
    before, now = trained_on("shards/x:train"), trained_on("https://me:secret@host/x:train")
    (line,) = check_settings(CHECKPOINT, before, now)
    assert "host/x:train" in line
    assert "secret" not in line


def test_a_value_that_is_equal_after_rounding_of_its_text_is_equal() -> None:
    # A float is written with as many digits as it needs, so a configuration read back from a run folder is the same.
    rate = math.nextafter(5e-4, 1)
    config = load_config(CONFIGS / "demo_pretrain.json", [RESOLVED, f"optimizer.lr={rate!r}"])
    again = Config.model_validate_json(config.model_dump_json(by_alias=True))
    assert check_settings(CHECKPOINT, config, again) == []
