"""One clip that cannot be read costs that clip, whatever its reader raises; clips of digital silence are known."""

from pathlib import Path

import numpy as np
import pytest

from asda.data.audio.waves import AudioError, encode_wav
from asda.errors import UserError
from asda.sharding import writer
from asda.sharding.audio_ref import Place
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.verify import tar_problems


def shard_of(folder: Path, *names: str, name: str = "train") -> ShardTask:
    """A shard of clips of noise; those called silence... hold zeros."""
    for number, clip in enumerate(names):
        noise = np.random.default_rng(number).integers(-9000, 9000, 8000).astype(np.int16)
        (folder / f"{clip}.wav").write_bytes(encode_wav(noise * (not clip.startswith("silence"))))
    clips = tuple(ClipTask(clip, Place(str(folder / f"{clip}.wav")), f"{clip}.wav", (), ()) for clip in names)
    return ShardTask(folder / f"{name}-000000.tar.zst", clips, 60.0)


@pytest.mark.parametrize("where", ["read_place", "clip_prints"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero (unexpected; please report it"),
        (IndexError("list index\nout of range"), "IndexError: list index out of range (unexpected"),
        (MemoryError(), "MemoryError: "),
        (OSError(5, "Input/output error"), "Input/output error"),
        (UserError("has no plan"), "has no plan"),
        (AudioError("is too loud"), "is too loud"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_a_clip_raises_is_that_clip_s_failure(
    where: str, error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original, calls = getattr(writer, where), []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return original(*arguments)

    whole = writer.write_shard(shard_of(tmp_path, "a", "c", name="whole"))
    monkeypatch.setattr(writer, where, second_fails)
    shard = writer.write_shard(shard_of(tmp_path, "a", "b", "c"))
    (rejected,) = shard.rejected
    assert rejected[0] == "b.wav"
    assert rejected[1].startswith(reason)
    assert shard.keys == ["a", "c"]
    assert shard.entry
    assert whole.entry
    assert not tar_problems(tmp_path / shard.entry.name)
    assert shard.prints[0] == whole.prints[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_end_of_the_program_is_no_failure_of_a_clip(error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ends(*_):
        raise error

    monkeypatch.setattr(writer, "read_place", ends)
    with pytest.raises(error):
        writer.write_shard(shard_of(tmp_path, "a"))
    assert not list(tmp_path.glob("train*"))


def test_a_full_disk_is_no_failure_of_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.FrameWriter, "append", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        writer.write_shard(shard_of(tmp_path, "a"))


def test_clips_whose_samples_are_all_zero_are_known(tmp_path: Path):
    shard = writer.write_shard(shard_of(tmp_path, "a", "silence", "b", "silence2"))
    assert shard.silent == [["silence", "silence.wav"], ["silence2", "silence2.wav"]]
    assert shard.keys == ["a", "silence", "b", "silence2"]


def test_a_clip_that_cannot_be_read_needs_no_room_and_others_do(tmp_path: Path):
    readable, missing = shard_of(tmp_path, "a", "b").clips
    (tmp_path / "b.wav").unlink()
    assert 8000 < writer._compressed_bytes(readable, 60.0) < 2 * 8000 * writer.LARGEST_RATIO + 4096
    assert writer._compressed_bytes(missing, 60.0) == 0
