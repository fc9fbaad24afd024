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
from asda.config import Config, load_config
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
    (folder / "state.json").write_text(json.dumps({**fields, "order_version": 99}))
    with pytest.raises(UserError, match="data order 99"):
        checkpoint.read_state(folder)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint.resolve(tmp_path)
