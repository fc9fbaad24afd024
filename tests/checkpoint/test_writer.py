"""A save happens beside the training, in an order in which it may be cut off anywhere, and says so when it fails."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import Count
from safetensors.torch import load_file
from tiny_checkpoints import ALONE, files_at, save, state_at, tiny_config, try_to_save

from asda.checkpoint.manifest import MANIFEST, FileEntry, damage
from asda.checkpoint.read import newest_checkpoint
from asda.checkpoint.safetensors_file import FileImage
from asda.checkpoint.writer import POINTER, CheckpointWriter, FolderLostError
from asda.config.run import Config, dump_config

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def config() -> Config:
    return tiny_config()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing before this is set."""
    works, really_write = threading.Event(), FileImage.write

    def write_when_it_works(image: FileImage, path: Path) -> FileEntry:
        works.wait(30)
        return really_write(image, path)

    monkeypatch.setattr(FileImage, "write", write_when_it_works)
    return works


def test_the_tensors_may_change_once_they_are_copied_while_the_disk_still_waits(
    tmp_path: Path, config: Config, disk: threading.Event
) -> None:
    files = files_at(1)
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        writer.save(state_at(1), files)
        writer.wait_until_copied()
        for tensors in files.values():
            for tensor in tensors.values():
                tensor.fill_(99)
        assert writer.poll() is None
        disk.set()
        outcome = writer.finish()
        assert outcome is not None
        assert outcome.failure is None
        assert writer.poll() is writer.finish() is None, "an outcome is told once"
    for stem, tensors in files_at(1).items():
        found = load_file(outcome.folder / f"{stem}.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert outcome.bytes == sum(path.stat().st_size for path in outcome.folder.iterdir() if path.name != MANIFEST)


def test_a_save_waits_for_the_one_before_it_and_both_are_told(
    tmp_path: Path, config: Config, disk: threading.Event
) -> None:
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        writer.save(state_at(1), files_at(1))
        threading.Timer(0.2, disk.set).start()
        writer.save(state_at(2), files_at(2))
        assert newest_checkpoint(tmp_path) is not None, "the first one is there before the second begins"
        outcomes = [writer.poll(), writer.finish()]
    assert [outcome and outcome.step for outcome in outcomes] == [1, 2]


def test_tensors_of_every_kind_are_saved_as_they_are_and_memory_is_kept(tmp_path: Path, config: Config) -> None:
    whole = torch.arange(12, dtype=torch.float32)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).t(),
        "view": whole[3:7],
        "same storage": whole.view(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        images = []
        for step in (1, 2):
            writer.save(state_at(step), {"model": tensors})
            outcome = writer.finish()
            images.append(writer._images["model"])
            whole += 1
            assert outcome is not None
            found = load_file(outcome.folder / "model.safetensors")
            whole -= 1
            for name, tensor in tensors.items():
                assert torch.equal(found[name], tensor), name
                assert found[name].dtype == tensor.dtype
    assert images[0] is images[1]


def test_what_is_no_matter_of_the_disk_is_raised_by_the_next_call(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_peer(image: FileImage, path: Path) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(FileImage, "write", lose_peer)
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        writer.save(state_at(1), files_at(1))
        writer.wait_until_copied()
        with pytest.raises(RuntimeError, match="closed by peer"):
            writer.finish()
    assert newest_checkpoint(tmp_path) is None


def test_an_intact_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(
    tmp_path: Path, config: Config
) -> None:
    folder = save(tmp_path, config, 1)
    first = (folder / "model.safetensors").stat().st_ino
    assert save(tmp_path, config, 1) == folder
    assert (folder / "model.safetensors").stat().st_ino == first
    os.truncate(folder / "model.safetensors", 9)
    assert damage(save(tmp_path, config, 1)) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == [POINTER, folder.name]


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", Path(a).name)), rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(a).name)), replace(a, b))[1])
    folder = save(tmp_path, config, 1)
    named = calls.index(("replace", f".tmp-{folder.name}"))
    synced = [name for call, name in calls[:named] if call == "fsync"]
    assert sorted(synced) == sorted([path.name for path in folder.iterdir()] + [f".tmp-{folder.name}"])
    assert synced[-2:] == [MANIFEST, f".tmp-{folder.name}"]
    pointer = f"latest.{os.getpid()}.tmp"
    assert calls[named + 1 :] == [
        ("fsync", "checkpoints"), ("fsync", tmp_path.name),
        ("fsync", pointer), ("replace", pointer), ("fsync", "checkpoints"),
    ]  # fmt: skip


def test_a_save_killed_before_any_of_its_calls_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, count_fault: Count
) -> None:
    argv = [sys.executable, str(HELPERS / "killed_saves.py"), str(tmp_path)]
    paths = {"PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | paths, check=False)
    assert done.returncode == 0, done.stderr
    trials: list[dict[str, Any]] = json.loads(done.stdout)
    assert trials.pop()["call"] == "", "the last one was not killed"
    named = next(place for place, trial in enumerate(trials) if trial["call"] == "os.rename .tmp-step-0000003") + 1
    expected = [f"step-{2 if place < named else 3:07d}" for place in range(len(trials))]
    detected = sum(t["found"] == name and not t["warnings"] for t, name in zip(trials, expected, strict=True))
    recovered = sum(
        t["newest"] == "step-0000004"
        and t["pointer"] == "step-0000004"
        and t["kept"] == [name, "step-0000004"]
        and not t["leftovers"]
        for t, name in zip(trials, expected, strict=True)
    )
    assert len(trials) > 20
    count_fault("16", "killed before each call of a save", len(trials), detected, recovered=recovered)


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to make files longer, as a quota does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def large_files() -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.zeros(1 << 21)}}  # 8 MiB


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_quota_leaves_the_checkpoints_before_it_and_the_policy_decides(policy: str, tmp_path: Path) -> None:
    config = tiny_config(f"run.on_failed_save={policy}")
    before = save(tmp_path, config, 1)
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        with files_of_at_most(4 << 20):
            writer.save(state_at(2), large_files())
            outcome = writer.finish()
        assert outcome is not None
        assert outcome.failure is not None
        needed = FileImage(large_files()["model"]).num_bytes
        assert f"model.safetensors ({needed:,} bytes): File too large; " in outcome.failure
        assert f"{shutil.disk_usage(tmp_path).free:,}"[:3] in outcome.failure
        assert (writer.failure, writer.num_failed) == (outcome.failure if policy == "stop" else None, 1)
        assert newest_checkpoint(tmp_path) == before
        assert sorted(path.name for path in before.parent.iterdir()) == [POINTER, before.name]
        writer.save(state_at(3), large_files())
        again = writer.finish()
    assert again is not None
    assert again.failure is None
    assert newest_checkpoint(tmp_path) == again.folder


FULL_DISK = """
import json, sys, torch
from pathlib import Path
from tiny_checkpoints import save, tiny_config, try_to_save
from asda.checkpoint.read import newest_checkpoint
run, config = Path(sys.argv[1]), tiny_config("run.keep=9")
saved = [save(run, config, 1)]
while not (outcome := try_to_save(run, config, len(saved) + 1, {"model": {"w": torch.zeros(200_000)}})).failure:
    saved.append(outcome.folder)
leftovers = [path.name for path in saved[0].parent.glob("*.tmp*")]
print(json.dumps([outcome.failure, str(newest_checkpoint(run)) == str(saved[-1]), leftovers, len(saved)]))
"""


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=3m none "$1" && exec "$2" -c "$3" "$1"'
    argv = ["unshare", "-rm", "sh", "-c", shell, "sh", str(tmp_path), sys.executable, FULL_DISK]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    paths = {"PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | paths, check=False)
    assert done.returncode == 0, done.stderr
    failure, newest_is_last_saved, leftovers, num_saved = json.loads(done.stdout)
    assert "No space left on device" in failure
    assert (newest_is_last_saved, leftovers) == (True, [])
    assert num_saved == 4  # 3 of 0.8 MB and one small one fit into 3 MiB


def refusing(name: str, place: int, code: int) -> Callable[..., Any]:
    """A function of os that fails at its call number `place`."""
    really, calls = getattr(os, name), iter(range(1000))

    def refuse(*arguments: Any, **more: Any) -> Any:
        if next(calls) == place:
            raise OSError(code, os.strerror(code))
        return really(*arguments, **more)

    return refuse


def test_a_disk_that_refuses_any_call_of_a_save_leaves_an_intact_checkpoint_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_fault: Count
) -> None:
    config = tiny_config("run.keep=1")
    trials = told = lost = recovered = 0
    calls = {"fsync": range(11), "write": range(3), "rename": range(1), "replace": range(2)}
    calls["mkdir"] = range(1, 2)  # the first finds its folder there
    for name, places in calls.items():
        for place in places:
            run = tmp_path / f"{name}{place}"
            before = save(run, config, 1)
            code = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)[trials % 5]
            with monkeypatch.context() as patch:
                patch.setattr(os, name, refusing(name, place, code))
                outcome = try_to_save(run, config, 2)
            trials += 1
            told += outcome.failure is not None and os.strerror(code) in outcome.failure
            lost += newest_checkpoint(run) not in (before, outcome.folder)
            lost += bool(list(before.parent.glob(".tmp-step*")))
            newest = save(run, config, 3)
            recovered += newest_checkpoint(run) == newest
    count_fault("20", "no space, quota, read error, rights at any call of a save", trials, told, lost, recovered)


def test_a_save_that_reads_back_as_another_run_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_fault: Count
) -> None:
    before = save(tmp_path, tiny_config(), 1)
    monkeypatch.setattr("asda.checkpoint.writer.dump_config", lambda config: dump_config(tiny_config("run.keep=7")))
    assert "reads back as another run than was written" in str(try_to_save(tmp_path, tiny_config(), 2).failure)
    assert newest_checkpoint(tmp_path) == before
    count_fault("34", "a save that reads back as another run", 1, 1)


def test_the_last_failure_is_told_though_failed_saves_are_to_be_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("run.on_failed_save=continue")
    with CheckpointWriter(tmp_path, config, ALONE) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refusing("rename", 0, errno.ENOSPC))
            patch.setattr(os, "replace", refusing("replace", 0, errno.ENOSPC))
            writer.save(state_at(1), files_at(1))
            writer.finish()
        assert writer.failure is None
        assert "begins anew, because there is no checkpoint yet" in str(writer.last_failure)
        writer.save(state_at(2), files_at(2))
        writer.finish()
        assert writer.last_failure is None


def test_a_save_never_makes_the_run_folder(tmp_path: Path, count_fault: Count) -> None:
    run = tmp_path / "run"
    with CheckpointWriter(run, tiny_config(), ALONE) as writer:
        run.rename(tmp_path / "moved")
        writer.save(state_at(1), files_at(1))
        outcome = writer.finish()
    assert outcome is not None
    assert outcome.failure
    assert not run.exists()
    count_fault("36", "the folder is moved before a save", 1, 1)


def test_nothing_is_committed_and_nothing_pruned_in_a_folder_that_is_lost(tmp_path: Path, count_fault: Count) -> None:
    def lost() -> None:
        raise FolderLostError("it was moved")

    kept = [save(tmp_path, tiny_config("run.keep=2"), step) for step in (1, 2)]
    config = tiny_config("run.keep=1", "run.on_failed_save=continue")
    with CheckpointWriter(tmp_path, config, ALONE, lost) as writer:
        writer.save(state_at(3), files_at(3))
        writer.finish()
        assert writer.failure == "it was moved", "whatever run.on_failed_save says"
    assert sorted(path for path in kept[0].parent.glob("step-*")) == kept
    count_fault("36", "nothing is committed or pruned in a folder that is lost", 1, 1)


def test_a_folder_that_is_lost_during_a_save_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"

    def check() -> None:
        if not run.exists():
            raise FolderLostError("it was moved")

    def move(*_: object) -> None:
        run.rename(tmp_path / "moved")

    with CheckpointWriter(run, tiny_config("run.on_failed_save=continue"), ALONE, check) as writer:
        monkeypatch.setattr("asda.checkpoint.writer._refuse_files_elsewhere", move)
        writer.save(state_at(1), files_at(1))
        outcome = writer.finish()
    assert outcome is not None
    assert outcome.failure == "it was moved"
    assert outcome.folder_lost
    assert not run.exists()
