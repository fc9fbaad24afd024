"""Checkpoints are whole or not there, and damage never passes for health."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from asda import checkpoint
from asda.checkpoint import State
from asda.config import Config, Description, load_config
from asda.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "demo_pretrain.json"


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def config() -> Config:
    return load_config(CONFIG)


def write(run: Path, config: Config, step: int) -> Path:
    state = State(step, ("cat", "dog"), "fingerprint", 1)
    weights = {"model": {"w": torch.full((4, 4), float(step))}}
    return checkpoint.save(run, config, state, weights, lambda folder: _engine_file(folder, step), is_first=True)


def _engine_file(folder: Path, step: int) -> None:
    (folder / "partition.pt").write_bytes(step.to_bytes(4, "little") * 64)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path, config: Config) -> None:
    folder = write(tmp_path, config, 7)
    assert checkpoint.newest(tmp_path) == folder == checkpoint.resolve(tmp_path) == checkpoint.resolve(folder)
    saved_config, state = checkpoint.read_state(folder)
    assert (saved_config, state) == (config, State(7, ("cat", "dog"), "fingerprint", 1))
    assert torch.equal(checkpoint.read_weights(folder, "model")["w"], torch.full((4, 4), 7.0))


def test_only_the_newest_are_kept_and_steps_are_ordered_as_numbers(tmp_path: Path, config: Config) -> None:
    for step in (9, 10, 10_000_000, 99):
        write(tmp_path, config, step)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-0000099", "step-10000000"]


def test_200_flipped_bits_are_all_noticed_and_the_one_before_is_used(tmp_path: Path, config: Config) -> None:
    older, newer = write(tmp_path, config, 1), write(tmp_path, config, 2)
    rng = np.random.default_rng(0)
    files = [path for path in newer.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for _ in range(200):
        path = files[rng.integers(len(files))]
        intact = path.read_bytes()
        broken = bytearray(intact)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        warnings: list[str] = []
        assert checkpoint.newest(tmp_path, warnings.append) == older
        assert path.name in warnings[0]
        path.write_bytes(intact)
    assert checkpoint.newest(tmp_path) == newer


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest"])
def test_missing_and_cut_files_are_noticed(harm: str, tmp_path: Path, config: Config) -> None:
    older, newer = write(tmp_path, config, 1), write(tmp_path, config, 2)
    victim = newer / ("manifest.json" if harm == "manifest" else "engine/partition.pt")
    if harm == "truncate":
        os.truncate(victim, 10)
    elif harm == "remove":
        victim.unlink()
    else:
        victim.write_text("{")
    assert checkpoint.newest(tmp_path, lambda _: None) == older
    with pytest.raises(UserError, match=r"damaged|no checkpoint"):
        checkpoint.resolve(newer)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_afresh(tmp_path: Path, config: Config) -> None:
    (write(tmp_path, config, 1) / "state.json").write_text("")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        checkpoint.newest(tmp_path, lambda _: None)


def test_an_interrupted_save_is_invisible_and_swept_by_the_next(tmp_path: Path, config: Config) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    first = write(tmp_path, config, 1)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, config, State(2, (), "", 1), {}, interrupted, is_first=True)
    assert checkpoint.newest(tmp_path) == first
    write(tmp_path, config, 3)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_states_of_another_format_are_refused(tmp_path: Path, config: Config) -> None:
    folder = write(tmp_path, config, 1)
    fields = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_state(folder)


def test_a_run_in_another_order_of_clips_gives_its_weights_and_is_not_continued(tmp_path: Path, config: Config) -> None:
    folder = write(tmp_path, config, 1)
    fields = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**fields, "order_version": 99}))
    assert checkpoint.read_state(folder)[1].step == 1
    with pytest.raises(UserError, match="data order 99"):
        checkpoint.read_state(folder, to_continue=True)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint.resolve(tmp_path)


@pytest.fixture
def description(config: Config) -> Description:
    data = {"frames": 64, "log_mel": {"mean": -4.0, "std": 4.5}}
    return Description.model_validate({"objective": config.objective, "data": data, "model": config.model})


def test_a_folder_of_weights_gives_back_what_was_written(tmp_path: Path, description: Description) -> None:
    folder = tmp_path / "deep" / "weights"
    checkpoint.write_weights(folder, description, {"model": {"w": torch.ones(2)}, "teacher": {"w": torch.zeros(2)}})
    assert checkpoint.resolve(folder) == folder
    assert checkpoint.read_description(folder) == description
    assert torch.equal(checkpoint.read_weights(folder, "teacher")["w"], torch.zeros(2))


def test_weights_without_a_run_are_no_checkpoint_to_continue_or_evaluate(
    tmp_path: Path, description: Description
) -> None:
    checkpoint.write_weights(tmp_path / "weights", description, {"model": {"a": torch.zeros(2)}})
    with pytest.raises(UserError, match=r"holds weights and no run \(it has no state\.json\)"):
        checkpoint.read_state(tmp_path / "weights")


def test_a_folder_of_weights_is_replaced_only_when_asked_and_only_if_it_holds_nothing_else(
    tmp_path: Path, description: Description
) -> None:
    folder = tmp_path / "weights"
    checkpoint.write_weights(folder, description, {"model": {"w": torch.ones(2)}})
    with pytest.raises(UserError, match="exists"):
        checkpoint.write_weights(folder, description, {"model": {"w": torch.zeros(2)}})
    checkpoint.write_weights(folder, description, {"model": {"w": torch.zeros(2)}}, replace=True)
    assert torch.equal(checkpoint.read_weights(folder, "model")["w"], torch.zeros(2))
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="not a folder of weights alone"):
        checkpoint.write_weights(folder, description, {"model": {"w": torch.ones(2)}}, replace=True)
    assert (folder / "notes.txt").exists()


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path, description: Description) -> None:
    shared_memory = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoint.write_weights(tmp_path / "x", description, {"model": {"a": shared_memory, "b": shared_memory}})
    assert list(tmp_path.iterdir()) == []


def test_a_misfit_names_three_keys_with_shapes_and_counts_the_rest() -> None:
    expected = {name: torch.ones(2, 3) for name in "abcde"}
    assert checkpoint.misfit(expected, expected) is None
    found = {"a": torch.ones(3, 2), "b": torch.ones(2, 3), "z": torch.ones(1)}
    complaint = checkpoint.misfit(expected, found)
    assert complaint == "c [2, 3] is missing, d [2, 3] is missing, e [2, 3] is missing, and 2 more"
    assert checkpoint.misfit({"a": torch.ones(2)}, found) == (
        "b [2, 3] is unexpected, z [1] is unexpected, a [3, 2] should be [2]"
    )
