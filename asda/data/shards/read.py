"""Read shards; use nothing before its hash agrees with the index. The format is specified in shards/README.md.

    dataset.json --hash--> train-000000.json --hash of every frame--> train-000000.tar.zst

A shard is a row of zstd frames, one per clip, so any clip is reached by its offset and checked on its own.
asda.data.remote.storage opens the files, wherever they are.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from xxhash import xxh3_64_hexdigest

from asda.data.remote.cache import CacheConfig, StoredFile
from asda.data.remote.storage import LocalFolder, Location, Storage, open_storage
from asda.data.shards.index import (
    DATASET_FILE,
    MAX_DATASET_FILE_BYTES,
    MAX_SAMPLE_BYTES,
    REPAIR,
    DatasetIndex,
    ShardEntry,
    ShardIndex,
    ShardTable,
    SideFile,
    SplitIndex,
    parse,
    parse_dataset,
    tagged_hash,
)
from asda.errors import UserError

INDEXES_KEPT = 512  # shard indexes in memory at a time: about 40 MB with 256 clips a shard

_of_thread = threading.local()  # .decompressor: making one takes 20 us, and threads cannot share one


def load_dataset(
    location: Location, splits: Sequence[str] | None = None, cache: CacheConfig | None = None, *, tolerant: bool = False
) -> DatasetIndex:
    """Open a dataset, and check that all files of the given splits (default: all) have their sizes.

    Remote files are checked when they are fetched: asking for the size of every one takes minutes.

    Args:
        location: a folder, or a URL as open_storage takes it.
        splits: the splits that will be used.
        cache: keeps copies of remote shards; without it every read is a request.
        tolerant: does not look for missing files and wrong sizes; reading them will find those.

    Raises:
        UserError: a file is missing, newer than this code, malformed, or has another size.
    """
    storage = open_storage(location, cache)
    if isinstance(storage, LocalFolder) and not (storage.folder / DATASET_FILE).is_file():
        raise UserError(f"{storage} holds no {DATASET_FILE}; make the dataset with asda shards --out {storage}")
    where = storage.where(DATASET_FILE)
    dataset = parse_dataset(storage.read_unlisted(DATASET_FILE, MAX_DATASET_FILE_BYTES), where)
    folder = storage.folder if isinstance(storage, LocalFolder) else storage
    try:
        with_shards = {name: _with_shards(storage, name, split) for name, split in dataset.splits.items()}
        dataset = replace(dataset, folder=folder, splits=with_shards)
    except ValueError as error:  # of the tables' content, whose hashes agree
        raise UserError(f"{where} is malformed: {error}; {REPAIR}") from None
    names = list(dataset.splits) if splits is None else splits
    for name in names:
        if name not in dataset.splits:
            raise UserError(f"{where} has no split {name!r}; it has {', '.join(dataset.splits)}")
    if names and not tolerant:
        entries = (entry for name in names for entry in dataset.splits[name].shards)
        storage.check_sizes(file for entry in entries for file in _files(entry))
    return dataset


def load_weights(location: Location, split: SplitIndex) -> np.ndarray:
    """Return the sample weights of a split, float32 [clips], or [0] if it has no labels.

    A local file of weights is mapped, so the processes of a machine share its memory. Raises UserError if damaged.
    """
    if split.weights_file is None:
        return split.sample_weights
    storage = open_storage(location)
    read = storage.mapped if isinstance(storage, LocalFolder) else storage.read_whole
    return np.frombuffer(_verified(storage, _side(split.weights_file), read), "<f4")


def _with_shards(storage: Storage, name: str, split: SplitIndex) -> SplitIndex:
    """Read the table of a large split's shards."""
    if split.shards_file is None:
        return split
    return replace(split, shards=ShardTable(name, _verified(storage, _side(split.shards_file), storage.read_whole)))


def _side(file: SideFile) -> StoredFile:
    return StoredFile(file.name, file.bytes, file.hash)


def _verified(storage: Storage, file: StoredFile, read: Callable[[StoredFile], Any], what: str = "") -> Any:
    """Return the content of a file if it has the hash that dataset.json says. Raises UserError."""
    content = read(file)
    if tagged_hash(content) != file.hash and storage.renew(file):
        content = read(file)
    if (found := tagged_hash(content)) != file.hash:
        where = f"{what}{storage.where(file.name)}"
        raise UserError(f"{where} is damaged: its hash is {found}, {DATASET_FILE} says {file.hash}; {REPAIR}")
    return content


def load_shard_index(location: Location, entry: ShardEntry) -> ShardIndex:
    """Read the index of one shard. Raises UserError unless it is the one that dataset.json was written with."""
    storage, (_, file) = open_storage(location), _files(entry)
    where = storage.where(file.name)
    text = _verified(storage, file, storage.read_whole, "shard index ")
    index = parse(ShardIndex, text, where)
    if (index.name, len(index.keys), index.bytes, index.hash) != (entry.name, entry.clips, entry.bytes, entry.hash):
        raise UserError(
            f"shard index {where} and {DATASET_FILE} disagree on the shard's name, clips, bytes or hash; {REPAIR}"
        )
    return index


_kept_shard_index = lru_cache(maxsize=INDEXES_KEPT)(load_shard_index)


class ShardFile:
    """One shard. Reads are independent of each other: any thread may read any clip at any time."""

    def __init__(self, location: Location, entry: ShardEntry):
        self.storage = open_storage(location)
        self.entry = entry
        self.file, self._index_file = _files(entry)

    @cached_property
    def path(self) -> Path | str:
        """The shard's path, or its address on the network."""
        where = self.storage.where(self.entry.name)
        return Path(where) if isinstance(self.storage, LocalFolder) else where

    @property
    def index(self) -> ShardIndex:
        """The shard's index, read and verified when it is first needed."""
        return _kept_shard_index(self.storage, self.entry)

    def prefetch(self) -> None:
        """Begin to fetch the shard in the background: into the cache, or into the system's memory."""
        self.storage.read_ahead(self._index_file)
        self.storage.read_ahead(self.file)

    def read_frame(self, number: int) -> bytes:
        """Return the tar members of clip `number`, without a tar's end.

        Raises UserError naming the key and the bytes unless the hash of the compressed frame, its declared size,
        and zstd's own checksum all agree.
        """
        index = self.index
        start, stop = index.offsets[number : number + 2]
        expected = index.hashes[number]
        frame = self.storage.read(self.file, start, stop)
        if xxh3_64_hexdigest(frame) != expected and self.storage.renew(self.file):
            frame = self.storage.read(self.file, start, stop)
        try:
            if (found := xxh3_64_hexdigest(frame)) != expected:
                raise BadFrameError(f"its hash is {found}, the index says {expected}")
            return decompress(frame)
        except (BadFrameError, zstandard.ZstdError) as error:
            where = f"shard {self.path} is damaged at key {index.keys[number]} (bytes {start} to {stop})"
            raise UserError(f"{where}: {error}; {REPAIR}") from error


class BadFrameError(ValueError):
    """A frame that breaks the rules of the format."""


def decompress(frame: bytes) -> bytes:
    """Decompress exactly one frame. One-shot on purpose: zstandard's streaming readers accept truncated input.

    Nothing is allocated before the sizes that the frame declares are known to be bounded.
    """
    declared = zstandard.get_frame_parameters(frame)
    if declared.content_size > MAX_SAMPLE_BYTES:  # also what a frame without a declared size says
        raise BadFrameError(f"it declares {declared.content_size} bytes, more than {MAX_SAMPLE_BYTES}")
    if declared.window_size > MAX_SAMPLE_BYTES:
        raise BadFrameError(f"it declares a window of {declared.window_size} bytes, more than {MAX_SAMPLE_BYTES}")
    if not declared.has_checksum:
        raise BadFrameError("its frame has no checksum")
    try:
        decompressor = _of_thread.decompressor
    except AttributeError:
        decompressor = _of_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_SAMPLE_BYTES)
    return decompressor.decompress(frame, allow_extra_data=False)


def _files(entry: ShardEntry) -> tuple[StoredFile, StoredFile]:
    """Return the shard and its index."""
    index = StoredFile(entry.index_name, entry.index_bytes, entry.index_hash)
    return StoredFile(entry.name, entry.bytes, entry.hash), index
