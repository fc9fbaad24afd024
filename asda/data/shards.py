"""Reading shards: nothing is used before its hash agrees with the index. The format is specified in shards/README.md.

    dataset.json --hash--> train-000000.json --hash of every frame--> train-000000.tar.zst

A shard is a row of zstd frames, one per clip, so any clip is reached by its offset and checked on its own.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import zstandard
from xxhash import xxh3_64_hexdigest, xxh3_128

from asda.data.audio import AudioError, decode_wav
from asda.data.index import (
    DATASET_FILE,
    MAX_DATASET_FILE_BYTES,
    MAX_SAMPLE_BYTES,
    REPAIR,
    TAR_END,
    DatasetIndex,
    ShardEntry,
    ShardIndex,
    hash_bytes,
    parse,
)
from asda.errors import UserError

INDEXES_KEPT = 512  # shard indexes in memory at a time: about 40 MB with 256 clips a shard
READ_BYTES = 1 << 20  # per read while a whole file is hashed


def load_dataset(folder: Path, splits: Sequence[str] | None = None) -> DatasetIndex:
    """Open a folder of shards, and check that all files of the given splits (default: all) have their sizes.

    Raises UserError when something is missing, newer than this code, malformed, or of another size.
    """
    path = folder / DATASET_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {DATASET_FILE}; make the dataset with tools/make_shards.py --out {folder}")
    if path.stat().st_size > MAX_DATASET_FILE_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {MAX_DATASET_FILE_BYTES}: it is no index")
    dataset = replace(parse(DatasetIndex, _read_file(path), path), folder=folder)
    for name in dataset.splits if splits is None else splits:
        if name not in dataset.splits:
            raise UserError(f"{path} has no split {name!r}; it has {', '.join(dataset.splits)}")
        for shard in dataset.splits[name].shards:
            _check_size(folder / shard.name, shard.bytes)
            _check_size(folder / shard.index_name, shard.index_bytes)
    return dataset


def load_shard_index(folder: Path, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard. Raises UserError unless it is the one that dataset.json was written with."""
    path = folder / entry.index_name
    _check_size(path, entry.index_bytes)
    text = _read_file(path)
    if (found := hash_bytes(text)) != entry.index_hash:
        raise UserError(
            f"shard index {path} is damaged: its hash is {found}, {DATASET_FILE} says {entry.index_hash}; {REPAIR}"
        )
    index = parse(ShardIndex, text, path)
    if (index.name, len(index.keys), index.bytes, index.hash) != (entry.name, entry.clips, entry.bytes, entry.hash):
        raise UserError(
            f"shard index {path} and {DATASET_FILE} disagree on the shard's name, clips, bytes or hash; {REPAIR}"
        )
    return index


_kept_shard_index = lru_cache(maxsize=INDEXES_KEPT)(load_shard_index)


class ShardFile:
    """One shard. Reads are independent of each other: any thread may read any clip at any time."""

    def __init__(self, folder: Path, entry: ShardEntry):
        self.path = folder / entry.name
        self.entry = entry
        self._folder = folder

    @property
    def index(self) -> ShardIndex:
        """The shard's index, read and verified when it is first needed."""
        return _kept_shard_index(self._folder, self.entry)

    def read_frame(self, number: int) -> bytes:
        """Return the tar members of clip `number`, without a tar's end.

        Raises UserError naming the key and the bytes unless the hash of the compressed frame, its declared size,
        and zstd's own checksum all agree.
        """
        index = self.index
        start, stop = index.offsets[number : number + 2]
        where = f"shard {self.path} is damaged at key {index.keys[number]} (bytes {start} to {stop})"
        frame = self._read_bytes(start, stop)
        if (found := xxh3_64_hexdigest(frame)) != index.hashes[number]:
            raise UserError(f"{where}: its hash is {found}, the index says {index.hashes[number]}; {REPAIR}")
        return _decompress(frame, where)

    def _read_bytes(self, start: int, stop: int) -> bytes:
        # Opened for each read: a dataset has more shards than a process may have open files.
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                return os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"cannot read shard {self.path}, bytes {start} to {stop}: {error.strerror}; {REPAIR}"
            ) from error


def verify_shard(dataset: DatasetIndex, entry: ShardEntry) -> None:
    """Read everything in a shard: index, frames, members, end frame, hash of the whole file. Raises UserError."""
    index = load_shard_index(dataset.folder, entry)
    shard = ShardFile(dataset.folder, entry)
    _check_size(shard.path, entry.bytes)
    for number, key in enumerate(index.keys):
        _check_members(shard, number, key, dataset.vocabulary)
    end = index.offsets[-1]
    where = f"shard {shard.path} is damaged in its end frame (bytes {end} to {entry.bytes})"
    if _decompress(shard._read_bytes(end, entry.bytes), where) != TAR_END:
        raise UserError(f"{where}: it does not hold two zero blocks; {REPAIR}")
    if (found := _hash_file(shard.path)) != entry.hash:
        raise UserError(
            f"shard {shard.path} is damaged: its hash is {found}, {DATASET_FILE} says {entry.hash}; {REPAIR}"
        )


def _check_members(shard: ShardFile, number: int, key: str, vocabulary: tuple[str, ...]) -> None:
    """Compare the tar members of one clip with its row in the index."""
    members = io.BytesIO(shard.read_frame(number) + TAR_END)
    try:
        with tarfile.open(fileobj=members) as tar:
            contents = [(member.name, tar.extractfile(member)) for member in tar]
        (wav_name, wav), (json_name, text) = [(name, file.read() if file else b"") for name, file in contents]
        samples, described = decode_wav(wav), json.loads(text)
        labels = [vocabulary[label] for label in shard.index.labels[number]]
        found = (wav_name, json_name, len(samples), described["labels"])
    except (tarfile.TarError, AudioError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"shard {shard.path}, key {key}: its members cannot be read ({error}); {REPAIR}") from error
    if found != (f"{key}.wav", f"{key}.json", shard.index.num_samples[number], labels):
        raise UserError(f"shard {shard.path}, key {key}: its members are not what the index says; {REPAIR}")


def _decompress(frame: bytes, where: str) -> bytes:
    """Decompress exactly one frame. One-shot on purpose: zstandard's streaming readers accept truncated input."""
    try:
        declared = zstandard.get_frame_parameters(frame)
        if declared.content_size > MAX_SAMPLE_BYTES:  # also what a frame without a declared size says
            raise UserError(
                f"{where}: it declares {declared.content_size} bytes, more than {MAX_SAMPLE_BYTES}; {REPAIR}"
            )
        if not declared.has_checksum:
            raise UserError(f"{where}: its frame has no checksum; {REPAIR}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_SAMPLE_BYTES)
        return decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UserError(f"{where}: {error}; {REPAIR}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing ({expected} bytes expected); {REPAIR}")
    if (found := path.stat().st_size) != expected:
        raise UserError(f"{path} has {found} bytes, {DATASET_FILE} says {expected}; {REPAIR}")


def _hash_file(path: Path) -> str:
    state = xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            state.update(chunk)
    return f"xxh3_128:{state.hexdigest()}"
