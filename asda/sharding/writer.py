"""Write shards, each whole or not at all, if the disk has room for them. The format is specified in shards/README.md.

The bytes depend on the clips alone: not on time, user, machine load, or the number of workers.
"""

import json
import math
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import zstandard
from xxhash import xxh3_64_hexdigest, xxh3_128

from asda.data.audio.waves import SAMPLE_RATE_HZ, encode_wav
from asda.data.shards.index import (
    DATASET_FILE,
    LARGE_FORMAT_VERSION,
    LARGE_SPLIT,
    NO_HASH,
    SHARD_FORMAT_VERSION,
    SHARD_ROW,
    SHARD_SUFFIX,
    SHARDS_SUFFIX,
    TAR_END,
    WEIGHTS_SUFFIX,
    DatasetIndex,
    LogMelMoments,
    ShardEntry,
    ShardIndex,
    ShardTable,
    SideFile,
    SplitIndex,
    class_weight,
    column,
    hash_dataset_file,
    parse,
    parse_dataset,
    tagged_hash,
)
from asda.errors import UserError, failure_of
from asda.sharding.audio_ref import read_place
from asda.sharding.duplicates import clip_prints
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.workers import Workers
from asda.system import sync, whole_file, write_whole_file

ZSTD_LEVEL = 1  # level 3 takes 1.6 times as long for 1.2 % fewer bytes of audio, and is no faster to read
WEIGHT_DIGITS = 6  # significant, of sample_weights
TAR_BLOCK_BYTES = 512
NUM_SAMPLED = 64  # clips; their order is a fixed shuffle, so every n-th is a fair sample
MARGIN = 1.1  # the mean of 64 clips is off by about 5 % if their lengths differ by as much as their mean
INDEX_BYTES = 512  # for each clip in a shard's index, in dataset.json, and in the record of a finished shard
LARGEST_RATIO = 1.02  # bytes of a compressed clip by those of its samples, at worst: noise
MIB, GIB = 1 << 20, 1 << 30


class LogMelSums(NamedTuple):
    """Sums over the log-mel values of a clip or a shard, in float64."""

    num_frames: int
    num_values: int
    total: float
    squares: float


class WrittenClip(NamedTuple):
    """One clip's row in the shard's index, and what the statistics and the search for duplicates need."""

    key: str
    offset: int
    hash: str
    num_samples: int
    labels: tuple[int, ...]
    log_mel: LogMelSums
    prints: bytes  # see asda/sharding/duplicates.py
    is_silent: bool  # every sample is 0


@dataclass(frozen=True)
class WrittenShard:
    """The result of a ShardTask; `entry` is None if no clip could be read, and no file was written."""

    entry: ShardEntry | None
    num_samples: int  # of all clips
    log_mel: LogMelSums  # of all clips
    keys: list[str]
    labels: list[list[int]]  # label ids of every clip
    prints: list[bytes]
    rejected: list[list[str]]  # [source, reason]
    silent: list[list[str]]  # [key, source] of clips whose samples are all 0


def check_space(workers: Workers, out: Path, tasks: Sequence[ShardTask], freed_bytes: int) -> None:
    """Refuse to begin if the shards will not fit; `freed_bytes` will be freed before they are written."""
    clips = [clip for task in tasks for clip in task.clips]
    if not clips:
        return
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    max_seconds = tasks[0].max_seconds
    most = len(clips) * (max_seconds * 2 * SAMPLE_RATE_HZ * LARGEST_RATIO + INDEX_BYTES)
    if most <= free:
        return
    sample = clips[:: -(-len(clips) // NUM_SAMPLED)]
    sizes = list(workers.pool.map(_compressed_bytes, sample, repeat(max_seconds), chunksize=4))
    needed = len(clips) * (MARGIN * sum(sizes) / len(sizes) + INDEX_BYTES)
    if needed > free + freed_bytes:
        freeing = f", and --overwrite frees {_size(freed_bytes)}" if freed_bytes else ""
        has = f"--out {out} has {_size(free)} free{freeing}; free space or choose another --out"
        raise UserError(f"{len(clips)} clips need about {_size(needed)}, and {has}")


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def _compressed_bytes(clip: ClipTask, max_seconds: float) -> int:
    """Return the bytes that a clip takes in a shard; 0 if it cannot be read."""
    try:
        members = clip_members(clip, read_place(clip.place, max_seconds))
    except Exception:  # writing its shard says why
        return 0
    return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(members))


def write_shard(task: ShardTask, report: Callable[[int], None] = lambda num_clips: None) -> WrittenShard:
    """Write the clips of a shard, then its index; call report(n) after the n-th clip. Raises UserError.

    A clip that cannot be read, for whatever reason, is rejected; the others are written.
    """
    clips: list[WrittenClip] = []
    rejected: list[list[str]] = []
    silent: list[list[str]] = []
    with writing(task.path), whole_file(task.path) as file:
        frames = FrameWriter(file)
        for number, clip in enumerate(task.clips, start=1):
            try:
                members, written = _read_clip(clip, task.max_seconds)
            except Exception as error:
                rejected.append([clip.source, failure_of(error)])
            else:
                offset, digest = frames.append(members)
                clips.append(written._replace(offset=offset, hash=digest))
                silent += [[clip.key, clip.source]] if written.is_silent else []
            report(number)
        entry = _finish(frames, task.path, clips) if clips else file.close()
    return WrittenShard(
        entry=entry,
        num_samples=sum(clip.num_samples for clip in clips),
        log_mel=add_up([clip.log_mel for clip in clips]),
        keys=[clip.key for clip in clips],
        labels=[list(clip.labels) for clip in clips],
        prints=[clip.prints for clip in clips],
        rejected=rejected,
        silent=silent,
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --out") from error


class FrameWriter:
    """Appends checksummed zstd frames to a file, and hashes what it writes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.num_bytes = 0
        self.hash = xxh3_128()
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True)

    def append(self, content: bytes) -> tuple[int, str]:
        """Write one frame; return its first byte's position and its xxh3_64."""
        frame = self._compressor.compress(content)
        self.file.write(frame)
        self.hash.update(frame)
        offset, self.num_bytes = self.num_bytes, self.num_bytes + len(frame)
        return offset, xxh3_64_hexdigest(frame)


def _read_clip(clip: ClipTask, max_seconds: float) -> tuple[bytes, WrittenClip]:
    """Return a clip's tar members and its row, whose offset and hash follow when they are written."""
    # Imported here because it brings numba, which takes seconds, and a process that only plans and waits needs none.
    from asda.data.features.fbank import log_mel

    samples_S = read_place(clip.place, max_seconds)
    mel_TM = log_mel(samples_S)
    values = mel_TM.astype(np.float64)
    sums = LogMelSums(len(values), values.size, float(values.sum()), float(np.square(values).sum()))
    prints = clip_prints(samples_S, mel_TM)
    row = WrittenClip(clip.key, 0, "", len(samples_S), clip.label_ids, sums, prints, not samples_S.any())
    return clip_members(clip, samples_S), row


def clip_members(clip: ClipTask, samples_S: np.ndarray) -> bytes:
    """Return the tar members of one clip."""
    described = {"labels": clip.labels, "seconds": len(samples_S) / SAMPLE_RATE_HZ, "source": clip.source}
    wav = tar_member(f"{clip.key}.wav", encode_wav(samples_S))
    return wav + tar_member(f"{clip.key}.json", json.dumps(described).encode())


def tar_member(name: str, content: bytes) -> bytes:
    """Return one file of a tar archive: ustar header without time, user or group, content, padding to blocks."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    padding = bytes(-len(content) % TAR_BLOCK_BYTES)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + padding


def add_up(sums: list[LogMelSums]) -> LogMelSums:
    """Add the sums of several clips; fsum rounds once, whatever their order."""
    return LogMelSums(
        sum(each.num_frames for each in sums),
        sum(each.num_values for each in sums),
        math.fsum(each.total for each in sums),
        math.fsum(each.squares for each in sums),
    )


def _finish(frames: FrameWriter, path: Path, clips: list[WrittenClip]) -> ShardEntry:
    """Close the tar and write the index; the shard gets its name after it."""
    end, _ = frames.append(TAR_END)
    index = ShardIndex(
        format_version=SHARD_FORMAT_VERSION,
        name=path.name,
        bytes=frames.num_bytes,
        hash=f"xxh3_128:{frames.hash.hexdigest()}",
        keys=tuple(clip.key for clip in clips),
        offsets=(*(clip.offset for clip in clips), end),
        hashes=tuple(clip.hash for clip in clips),
        num_samples=tuple(clip.num_samples for clip in clips),
        labels=tuple(clip.labels for clip in clips),
    )
    text = json.dumps(asdict(index), separators=(",", ":")).encode()
    parse(ShardIndex, text, path.with_suffix(".json"))  # a hash proves the bytes, not that they can be read
    entry = ShardEntry(index.name, len(clips), index.bytes, index.hash, len(text), tagged_hash(text))
    frames.file.flush()
    sync(Path(frames.file.name))  # a full disk shows here, while neither file has its name
    write_whole_file(path.with_name(entry.index_name), text)
    return entry


def summarize_split(shards: list[WrittenShard], num_classes: int) -> SplitIndex:
    """Gather the statistics of a split with at least one clip."""
    labels = [ids for shard in shards for ids in shard.labels]
    flat = np.array([label for ids in labels for label in ids], np.int64)
    counts = np.bincount(flat, minlength=num_classes).tolist()
    weights = tuple(class_weight(count) for count in counts)
    # Rounded as dataset.json holds them.
    of_clips = [float(f"{sum(weights[n] for n in ids):.{WEIGHT_DIGITS}g}") for ids in labels] if len(flat) else []
    sums = add_up([shard.log_mel for shard in shards])
    mean = sums.total / sums.num_values
    std = math.sqrt(max(sums.squares / sums.num_values - mean**2, 0.0))
    return SplitIndex(
        clips=len(labels),
        seconds=sum(shard.num_samples for shard in shards) / SAMPLE_RATE_HZ,
        class_counts=tuple(counts),
        log_mel=LogMelMoments(mean, std, sums.num_frames),
        shards=tuple(shard.entry for shard in shards if shard.entry),
        class_weights=weights,
        sample_weights=np.array(of_clips, np.float32),
    )


def write_dataset(dataset: DatasetIndex) -> DatasetIndex:
    """Write dataset.json, which makes the shards of its folder a dataset; return it with its hash.

    Columns of splits with more than LARGE_SPLIT clips are written before it, into files of their own.
    """
    splits = {name: _with_side_files(dataset.folder, name, split) for name, split in dataset.splits.items()}
    if any(split.shards_file for split in splits.values()):
        dataset = replace(dataset, format_version=LARGE_FORMAT_VERSION)
    content = {name: value for name, value in asdict(replace(dataset, splits=splits)).items() if name != "folder"}
    for split in content["splits"].values():
        for unused in [name for name in ("shards_file", "weights_file") if split[name] is None]:
            del split[unused]
    first = {"format_version": dataset.format_version, "hash": NO_HASH.decode()}
    text = (_rendered(first | {name: value for name, value in content.items() if name not in first}) + "\n").encode()
    digest = hash_dataset_file(text)
    text = text.replace(NO_HASH, digest.encode(), 1)
    parse_dataset(text, dataset.folder / DATASET_FILE)  # a hash proves the bytes, not that they can be read
    write_whole_file(dataset.folder / DATASET_FILE, text)
    return replace(dataset, hash=digest)


def _with_side_files(folder: Path, name: str, split: SplitIndex) -> SplitIndex:
    """Write the shards and weights of a large split into files; return the split without them."""
    if split.clips <= LARGE_SPLIT:
        return split
    shards, weights = split.shards, split.sample_weights.astype("<f4")
    weights_file = split.weights_file  # kept where the weights lie in it already
    if len(weights):
        weights_file = _side_file(folder / f"{name}{WEIGHTS_SUFFIX}", weights.tobytes())
    rows = shards.rows if isinstance(shards, ShardTable) else np.array([*map(ShardTable.row, shards)], SHARD_ROW)
    if column(ShardTable(name, rows), "name") != column(shards, "name"):
        raise ValueError(f"a shard of the large split {name} is not named {name}-NNNNNN{SHARD_SUFFIX}")
    return replace(
        split,
        shards=(),
        sample_weights=weights[:0],
        shards_file=_side_file(folder / f"{name}{SHARDS_SUFFIX}", rows.tobytes()),
        weights_file=weights_file,
    )


def _side_file(path: Path, content: bytes) -> SideFile:
    write_whole_file(path, content)
    return SideFile(path.name, len(content), tagged_hash(content))


def _rendered(value: object, indent: str = "") -> str:
    """Return JSON with a line for every field and every shard, but not for every number."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{deeper}{json.dumps(name)}: {_rendered(item, deeper)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(deeper + json.dumps(item) for item in value) + f"\n{indent}]"
    if isinstance(value, np.ndarray):
        return "[" + ",".join(f"{number:.{WEIGHT_DIGITS}g}" for number in value.tolist()) + "]"
    return json.dumps(value)
