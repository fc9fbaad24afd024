"""What the journal notes of a finished shard is what it reads back."""

import json
from pathlib import Path

import numpy as np
import pytest

from asda.data.audio.waves import encode_wav
from asda.sharding import workers
from asda.sharding.audio_ref import Place
from asda.sharding.journal import Journal
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
