"""What the journal notes of a finished shard is what it reads back."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fault_table import Count

from asda.data.audio.waves import encode_wav
from asda.errors import UserError
from asda.sharding import workers
from asda.sharding.audio_ref import Place
from asda.sharding.journal import LOCK_FILE, Journal, inputs_digest
from asda.sharding.plan import ClipTask, ShardTask
from asda.system import hash_bytes


@pytest.mark.parametrize("readable", [True, False])
def test_a_record_is_read_back_whatever_bytes_the_names_of_files_have(readable: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(workers, "_counts", [0])
    name = "caf\udce9.wav"  # not UTF-8
    if readable:
        (tmp_path / name).write_bytes(encode_wav(np.arange(800, dtype=np.int16)))
    clip = ClipTask("cafe", Place(str(tmp_path / name)), name, (), ())
    task = ShardTask(tmp_path / "train-000000.tar.zst", (clip,), 1.0)
    journal = Journal(tmp_path, "digest")
    journal.folder.mkdir()
    shard = journal.produce(0, task)
    assert (shard.entry is not None, bool(shard.rejected), task.path.exists()) == (readable, not readable, readable)
    assert journal.read(task) == shard
    assert Journal(tmp_path, "another plan").read(task) is None
    journal.record_path(task).write_text("damaged")
    assert journal.read(task) is None


def test_a_record_without_a_list_of_silent_clips_is_read_as_one_that_has_none(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(workers, "_counts", [0])
    (tmp_path / "a.wav").write_bytes(encode_wav(np.arange(800, dtype=np.int16)))
    task = ShardTask(
        tmp_path / "train-000000.tar.zst", (ClipTask("a", Place(str(tmp_path / "a.wav")), "a", (), ()),), 1
    )
    journal = Journal(tmp_path, "digest")
    journal.folder.mkdir()
    shard = journal.produce(0, task)
    content = json.loads(journal.record_path(task).read_text().splitlines()[1])
    del content["silent"]  # as versions before wrote it
    text = json.dumps(content)
    journal.record_path(task).write_text(f"{hash_bytes(text.encode())}\n{text}\n")
    assert journal.read(task) == shard


def task_of(path: Path) -> ShardTask:
    return ShardTask(path.parent / "train-000000.tar.zst", (ClipTask("a", Place(str(path)), "a", (), ()),), 1.0)


@pytest.mark.parametrize("place", [0, 5_000, 9_999])
def test_other_samples_of_the_same_size_and_time_are_other_audio(
    place: int, tmp_path: Path, count_fault: Count
) -> None:
    samples = np.zeros(10_000, np.int16)
    path = tmp_path / "a.wav"
    path.write_bytes(encode_wav(samples))
    before, times = inputs_digest(task_of(path)), path.stat()
    samples[place] = 1
    path.write_bytes(encode_wav(samples))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert inputs_digest(task_of(path)) != before
    count_fault("38", "other audio of the same name, size and time", 1, 1)


def test_the_same_names_in_another_folder_are_other_audio_though_a_link_leads_there(
    tmp_path: Path, count_fault: Count
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.wav").write_bytes(encode_wav(np.zeros(800, np.int16)))
        os.utime(tmp_path / name / "a.wav", ns=(1, 1))
    (link := tmp_path / "link").symlink_to("one")
    before = inputs_digest(task_of(link / "a.wav"))
    assert inputs_digest(task_of(link / "a.wav")) == before
    link.unlink()
    link.symlink_to("two")
    assert inputs_digest(task_of(link / "a.wav")) != before
    count_fault("38", "other audio behind the same link", 1, 1)


@pytest.mark.parametrize("become", ["moved", "removed", "replaced"])
def test_no_shard_is_written_into_a_folder_that_is_no_longer_the_locked_one(
    become: str, tmp_path: Path, count_fault: Count
) -> None:
    out = tmp_path / "out"
    folder = Journal(out, "digest").folder
    folder.mkdir(parents=True)
    with (folder / LOCK_FILE).open("w") as lock:
        status = os.fstat(lock.fileno())
        journal = Journal(out, "digest", (status.st_dev, status.st_ino))
        journal.check_place()
        if become == "removed":
            shutil.rmtree(out)
        else:
            out.rename(tmp_path / "elsewhere")
        if become == "replaced":
            folder.mkdir(parents=True)
            (folder / LOCK_FILE).touch()
        with pytest.raises(UserError, match="was moved, removed or replaced meanwhile, so nothing more is written"):
            journal.check_place()
    count_fault("38", "the output folder of a running `asda shards` is moved, removed, replaced", 1, 1)
