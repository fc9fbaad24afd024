"""Checkpoints are whole or not there, and damage never passes for health."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_table import Count
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import files_at, save, state_at, tiny_config, try_to_save

from asda.checkpoint.manifest import MANIFEST, damage, entry_of
from asda.checkpoint.read import checkpoints_of, newest_checkpoint, read_description, read_state, resolve_checkpoint
from asda.checkpoint.weights import misfit, read_weights, write_weights
from asda.checkpoint.writer import POINTER, prune
from asda.config.run import Config, Description
from asda.errors import UserError

Harm = Callable[[Path], object]


@pytest.fixture
def config() -> Config:
    return tiny_config()


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path, config: Config) -> None:
    folder = save(tmp_path, config, 7)
    assert newest_checkpoint(tmp_path) == folder == resolve_checkpoint(tmp_path) == resolve_checkpoint(folder)
    assert read_state(folder, to_resume=True) == (config, state_at(7))
    for stem, tensors in files_at(7).items():
        for name, tensor in tensors.items():
            assert torch.equal(read_weights(folder, stem)[name], tensor)


def test_only_the_newest_are_kept_and_steps_are_ordered_as_numbers(tmp_path: Path, config: Config) -> None:
    for step in (9, 10, 10_000_000, 99):
        save(tmp_path, config, step)
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert names == ["step-0000099", "step-10000000"]


def test_200_flipped_bits_are_all_noticed_and_the_one_before_is_used(
    tmp_path: Path, config: Config, count_fault: Count
) -> None:
    older, newer = save(tmp_path, config, 1), save(tmp_path, config, 2)
    rng = np.random.default_rng(0)
    files = sorted(newer.iterdir())
    assert len(files) == 6  # config, state, manifest, students, teacher, optimizer
    detected = recovered = 0
    for trial in range(200):
        path = files[trial % len(files)]
        intact = path.read_bytes()
        broken = bytearray(intact)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        warnings: list[str] = []
        recovered += newest_checkpoint(tmp_path, warnings.append) == older
        detected += path.name in warnings[0]
        path.write_bytes(intact)
    assert newest_checkpoint(tmp_path) == newer
    count_fault("17", "one bit flipped anywhere in a checkpoint", 200, detected, recovered=recovered)


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "no manifest", "of another step"])
def test_missing_and_cut_files_are_noticed(harm: str, tmp_path: Path, config: Config) -> None:
    older, newer = save(tmp_path, config, 1), save(tmp_path, config, 2)
    optimizer = newer / "optimizer-00000-of-00001.safetensors"
    harms: dict[str, Harm] = {
        "truncate": lambda _: os.truncate(optimizer, 10),
        "remove": lambda _: optimizer.unlink(),
        "manifest": lambda folder: (folder / MANIFEST).write_text("{"),
        "no manifest": lambda folder: (folder / MANIFEST).unlink(),
        "of another step": lambda folder: (shutil.rmtree(folder), shutil.copytree(older, folder)),
    }
    harms[harm](newer)
    assert newest_checkpoint(tmp_path, lambda _: None) == older
    with pytest.raises(UserError, match=r"damaged|no checkpoint"):
        resolve_checkpoint(newer)


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_afresh(tmp_path: Path, config: Config) -> None:
    (save(tmp_path, config, 1) / "state.json").write_text("")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path, lambda _: None)


def test_the_folders_say_which_is_the_newest_whatever_became_of_the_pointer(
    tmp_path: Path, config: Config, count_fault: Count
) -> None:
    save(tmp_path, config, 1)
    newest = save(tmp_path, config, 2)
    pointer = tmp_path / "checkpoints" / POINTER
    assert pointer.read_text() == "step-0000002\n"
    harms: list[Harm] = [
        lambda path: path.write_text(""),
        lambda path: path.write_text("step-0000009\n"),
        lambda path: path.write_text("step-0000001\n"),
        lambda path: path.write_bytes(bytes(range(256))),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.symlink_to("step-0000001")),
    ]
    found = recovered = 0
    for harm in harms:
        harm(pointer)
        found += newest_checkpoint(tmp_path) == newest
        newest = save(tmp_path, config, int(newest.name.removeprefix("step-")) + 1)
        recovered += pointer.read_text() == f"{newest.name}\n" and not pointer.is_symlink()
    count_fault("19", "pointer empty, dangling, old, garbage, gone, a link", len(harms), found, recovered=recovered)


def intact(run: Path) -> set[int]:
    folders = [path for path in checkpoints_of(run) if damage(path) is None]
    return {int(path.name.removeprefix("step-")) for path in folders}


SAVES, FAILS, DAMAGES, PRUNES = "save", "failed save", "damage", "prune"


def do(run: Path, kind: str, number: int, step: int, fail: pytest.MonkeyPatch) -> None:
    """One thing that happens to a run's checkpoints; `number` says which or how many."""
    if kind == SAVES:
        save(run, tiny_config(f"run.keep={1 + number % 3}"), step)
    elif kind == FAILS:
        with fail.context() as patch:
            refuse_nth_fsync(patch, number)
            try_to_save(run, tiny_config(f"run.keep={1 + number % 3}"), step)
    elif kind == PRUNES:
        prune(run, keep=1 + number % 3)
    elif found := checkpoints_of(run):
        path = sorted(found[number % len(found)].iterdir())[number % 5]
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def refuse_nth_fsync(patch: pytest.MonkeyPatch, n: int) -> None:
    calls = iter(range(1000))

    def refuse(descriptor: int) -> None:
        if next(calls) == n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", refuse)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([SAVES, SAVES, FAILS, DAMAGES, PRUNES]), st.integers(0, 11)), max_size=12))
def test_retention_never_removes_an_intact_checkpoint_unless_as_many_newer_ones_are_intact(
    happenings: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # durability is not what is tested here
        run = Path(folder)
        for step, (kind, number) in enumerate(happenings, start=1):
            before = intact(run)
            do(run, kind, number, step, patch)
            after = intact(run)
            lost = before - after
            if kind == DAMAGES:
                assert len(lost) <= 1
            keep = 1 + number % 3
            for gone in lost if kind != DAMAGES else ():
                assert len([newer for newer in after if newer > gone]) >= keep
            assert kind != SAVES or step in after
            assert not list((run / "checkpoints").glob(".tmp-step*"))
            if after:
                warnings: list[str] = []
                found = newest_checkpoint(run, warnings.append)
                assert found is not None
                assert found.name == f"step-{max(after):07d}"


def test_row_21_of_the_fault_table(count_fault: Count) -> None:
    """The property above in numbers: 200 saves, of which every third fails somewhere, between damage of older ones."""
    rng, lost, faults = np.random.default_rng(1), 0, 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        run = Path(folder)
        for step in range(1, 201):
            before = intact(run)
            kind = [SAVES, FAILS, DAMAGES][step % 3]
            spared = kind == DAMAGES and len(before) < 2  # else the last one is damaged, and no software can keep it
            do(run, SAVES if spared else kind, int(rng.integers(12)), step, patch)
            faults += kind != SAVES
            lost += bool(before) and not intact(run)
    count_fault("21", "failed saves and damage between prunings", faults, faults, lost=lost)


def test_states_of_another_format_are_refused(tmp_path: Path, config: Config) -> None:
    folder = save(tmp_path, config, 1)
    edit_state(folder, format=99)
    with pytest.raises(UserError, match="format 99"):
        read_state(folder)


def test_a_checkpoint_of_format_1_gives_its_weights_and_is_not_continued(tmp_path: Path, config: Config) -> None:
    folder = save(tmp_path, config, 1)
    edit_state(folder, format=1, applied_steps=None, skipped_steps=None, bad_steps_in_a_row=None)
    (folder / "engine").mkdir()
    (folder / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"a pickle")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST)
    entries = {name: vars(entry_of(path)) for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))
    assert resolve_checkpoint(tmp_path) == folder
    assert read_state(folder)[1].step == 1
    assert torch.equal(read_weights(folder, "model")["w"], files_at(1)["model"]["w"])
    with pytest.raises(UserError, match="has format 1, whose optimizer state is in pickles"):
        read_state(folder, to_resume=True)


def edit_state(folder: Path, **fields: object) -> None:
    """Change state.json; None takes a field away."""
    state = json.loads((folder / "state.json").read_text()) | fields
    (folder / "state.json").write_text(json.dumps({name: value for name, value in state.items() if value is not None}))


def test_a_run_in_another_order_of_clips_gives_its_weights_and_is_not_continued(tmp_path: Path, config: Config) -> None:
    folder = save(tmp_path, config, 1)
    edit_state(folder, order_version=99)
    assert read_state(folder)[1].step == 1
    with pytest.raises(UserError, match="data order 99"):
        read_state(folder, to_resume=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"step": "1"}, "malformed at step"),
        ({"step": None}, "malformed at step"),
        ({"damaged_clips": [1.5]}, "malformed at damaged_clips.0"),
        ({"run": "rm"}, "malformed at run"),
    ],
)
def test_a_state_with_a_wrong_value_is_one_sentence(
    fields: dict[str, object], words: str, tmp_path: Path, config: Config
) -> None:
    folder = save(tmp_path, config, 1)
    edit_state(folder, **fields)
    with pytest.raises(UserError, match=words):
        read_state(folder)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=str(tmp_path)):
        resolve_checkpoint(tmp_path)


@pytest.fixture
def description(config: Config) -> Description:
    data = {"frames": 64, "log_mel": {"mean": -4.0, "std": 4.5}}
    return Description.model_validate({"objective": config.objective, "data": data, "model": config.model})


def test_a_folder_of_weights_gives_back_what_was_written(tmp_path: Path, description: Description) -> None:
    folder = tmp_path / "deep" / "weights"
    write_weights(folder, description, {"model": {"w": torch.ones(2)}, "teacher": {"w": torch.zeros(2)}})
    assert resolve_checkpoint(folder) == folder
    assert read_description(folder) == description
    assert torch.equal(read_weights(folder, "teacher")["w"], torch.zeros(2))


def test_weights_without_a_run_are_no_checkpoint_to_resume_or_evaluate(
    tmp_path: Path, description: Description
) -> None:
    write_weights(tmp_path / "weights", description, {"model": {"a": torch.zeros(2)}})
    with pytest.raises(UserError, match=r"has weights but no run \(state\.json is missing\)"):
        read_state(tmp_path / "weights")


def test_a_folder_of_weights_is_replaced_only_when_asked_and_only_if_it_holds_nothing_else(
    tmp_path: Path, description: Description
) -> None:
    folder = tmp_path / "weights"
    write_weights(folder, description, {"model": {"w": torch.ones(2)}})
    with pytest.raises(UserError, match="exists"):
        write_weights(folder, description, {"model": {"w": torch.zeros(2)}})
    write_weights(folder, description, {"model": {"w": torch.zeros(2)}}, replace=True)
    assert torch.equal(read_weights(folder, "model")["w"], torch.zeros(2))
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match="not a folder of weights alone"):
        write_weights(folder, description, {"model": {"w": torch.ones(2)}}, replace=True)
    assert (folder / "notes.txt").exists()


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path, description: Description) -> None:
    shared_memory = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_weights(tmp_path / "x", description, {"model": {"a": shared_memory, "b": shared_memory}})
    assert list(tmp_path.iterdir()) == []


def test_a_misfit_names_three_keys_with_shapes_and_counts_the_rest() -> None:
    expected = {name: torch.ones(2, 3) for name in "abcde"}
    assert misfit(expected, expected) is None
    found = {"a": torch.ones(3, 2), "b": torch.ones(2, 3), "z": torch.ones(1)}
    complaint = misfit(expected, found)
    assert complaint == "c [2, 3] is missing, d [2, 3] is missing, e [2, 3] is missing, and 2 more"
    assert misfit({"a": torch.ones(2)}, found) == (
        "b [2, 3] is unexpected, z [1] is unexpected, a [3, 2] should be [2]"
    )
