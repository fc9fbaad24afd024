"""Writing shards: each is complete under its name or not there at all. The format is specified in shards/README.md.

Bytes depend on the clips alone: not on time, user, machine load, or the number of workers.
"""

import json
import math
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import zstandard
from xxhash import xxh3_64_hexdigest, xxh3_128

from asda.data.audio import SAMPLE_RATE_HZ, AudioError, encode_wav, read_audio
from asda.data.index import (
    DATASET_FILE,
    FORMAT_VERSION,
    TAR_END,
    DatasetIndex,
    LogMelStats,
    ShardEntry,
    ShardIndex,
    SplitIndex,
    hash_bytes,
)
from asda.data.plan import ClipTask, ShardTask
from asda.errors import UserError

ZSTD_LEVEL = 3  # higher levels cost much time and win under 1 % on audio
TAR_BLOCK_BYTES = 512
TEMPORARY_SUFFIX = ".tmp"


class LogMelSums(NamedTuple):
    """Sums over the log-mel values of one clip, in float64."""

    num_frames: int
    num_values: int
    total: float
    squares: float


class WrittenClip(NamedTuple):
    """One clip's row in the shard's index, and what the split's statistics need."""

    key: str
    offset: int
    hash: str
    num_samples: int
    labels: tuple[int, ...]
    log_mel: LogMelSums


@dataclass(frozen=True)
class WrittenShard:
    """What became of a ShardTask; `entry` is None where no clip could be read, and no file was written then."""

    entry: ShardEntry | None
    clips: list[WrittenClip]
    rejected: list[tuple[str, str]]  # (source, reason)


def start_worker() -> None:
    """Prepare a worker process: Ctrl-C is its parent's to handle, and it never outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    cast(BaseProcess, multiprocessing.parent_process()).join()
    os._exit(1)


def write_shard(task: ShardTask) -> WrittenShard:
    """Read, encode and write the clips of one shard, then its index. Raises UserError where writing fails."""
    clips: list[WrittenClip] = []
    rejected: list[tuple[str, str]] = []
    try:
        with temporary_file(task.path) as file:
            frames = FrameWriter(file)
            for clip in task.clips:
                try:
                    clips.append(_write_clip(frames, clip, task.max_seconds))
                except AudioError as error:
                    rejected.append((clip.source, str(error)))
            entry = _finish(frames, task.path, clips) if clips else None
    except OSError as error:
        raise UserError(f"cannot write {task.path}: {error.strerror}; free space or choose another --out") from error
    return WrittenShard(entry, clips, rejected)


class FrameWriter:
    """Appends checksummed zstd frames to a file, and hashes what it writes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.num_bytes = 0
        self._hash = xxh3_128()
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True)

    def append(self, content: bytes) -> tuple[int, str]:
        """Write one frame; return its first byte's position and its xxh3_64."""
        frame = self._compressor.compress(content)
        self.file.write(frame)
        self._hash.update(frame)
        offset, self.num_bytes = self.num_bytes, self.num_bytes + len(frame)
        return offset, xxh3_64_hexdigest(frame)

    @property
    def hash(self) -> str:
        """The hash of everything written so far."""
        return f"xxh3_128:{self._hash.hexdigest()}"


def _write_clip(frames: FrameWriter, clip: ClipTask, max_seconds: float) -> WrittenClip:
    samples_S = read_audio(clip.path, max_seconds)
    described = {"labels": clip.labels, "seconds": len(samples_S) / SAMPLE_RATE_HZ, "source": clip.source}
    wav = tar_member(f"{clip.key}.wav", encode_wav(samples_S))
    offset, digest = frames.append(wav + tar_member(f"{clip.key}.json", json.dumps(described).encode()))
    return WrittenClip(clip.key, offset, digest, len(samples_S), clip.label_ids, log_mel_sums(samples_S))


def tar_member(name: str, content: bytes) -> bytes:
    """Return one file of a tar archive: ustar header without time, user or group, content, padding to blocks."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    padding = bytes(-len(content) % TAR_BLOCK_BYTES)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + padding


def log_mel_sums(samples_S: np.ndarray) -> LogMelSums:
    """Sum the log-mel values of a clip and their squares."""
    # Imported here because it brings torch, which takes seconds, and a process that only plans and waits needs none.
    from asda.data.fbank import log_mel

    values = log_mel(samples_S).astype(np.float64)  # [frames, mel bins]
    return LogMelSums(len(values), values.size, float(values.sum()), float(np.square(values).sum()))


def _finish(frames: FrameWriter, path: Path, clips: list[WrittenClip]) -> ShardEntry:
    """Close the tar, write the index, and only then let both files have their names."""
    end, _ = frames.append(TAR_END)
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        name=path.name,
        bytes=frames.num_bytes,
        hash=frames.hash,
        keys=tuple(clip.key for clip in clips),
        offsets=(*(clip.offset for clip in clips), end),
        hashes=tuple(clip.hash for clip in clips),
        num_samples=tuple(clip.num_samples for clip in clips),
        labels=tuple(clip.labels for clip in clips),
    )
    text = json.dumps(asdict(index), separators=(",", ":")).encode()
    entry = ShardEntry(index.name, len(clips), index.bytes, index.hash, len(text), hash_bytes(text))
    sync(frames.file)  # a full disk shows here, while neither file has its name
    write_file(path.with_name(entry.index_name), text)
    commit(frames.file, path)
    return entry


def summarize_split(shards: list[WrittenShard], num_classes: int) -> SplitIndex:
    """Gather the statistics of a split, which holds at least one clip."""
    clips = [clip for shard in shards for clip in shard.clips]
    counts = Counter(label for clip in clips for label in clip.labels)
    return SplitIndex(
        clips=len(clips),
        seconds=sum(clip.num_samples for clip in clips) / SAMPLE_RATE_HZ,
        class_counts=tuple(counts[label] for label in range(num_classes)),
        log_mel=pool_log_mel([clip.log_mel for clip in clips]),
        shards=tuple(shard.entry for shard in shards if shard.entry),
    )


def pool_log_mel(sums: list[LogMelSums]) -> LogMelStats:
    """Mean and standard deviation over the values of all clips; fsum makes them independent of the clips' order."""
    num_values = sum(clip.num_values for clip in sums)
    mean = math.fsum(clip.total for clip in sums) / num_values
    variance = math.fsum(clip.squares for clip in sums) / num_values - mean**2
    return LogMelStats(mean, math.sqrt(max(variance, 0.0)), sum(clip.num_frames for clip in sums))


def write_dataset(dataset: DatasetIndex) -> None:
    """Write dataset.json, which makes the shards of its folder a dataset."""
    content = asdict(dataset)
    del content["folder"]
    write_file(dataset.folder / DATASET_FILE, (json.dumps(content, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing."""
    with temporary_file(path) as file:
        file.write(content)
        commit(file, path)


@contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` by commit(), and is removed otherwise."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def commit(file: BinaryIO, path: Path) -> None:
    """Give a temporary file its name once its bytes are on the disk, and the name too."""
    sync(file)
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync(file: BinaryIO) -> None:
    """Wait until the file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())
