"""The clips of one or more splits as one numbered sequence, each read, verified and decoded on its own.

Damage is never passed over in silence. Strict, which is the default, the first damaged clip ends the run; with a budget
(data.max_damaged) another clip stands in for it, the damage is named, counted, and kept in the checkpoint.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Lock

import numpy as np
import xxhash

from asda.config.data import DataConfig, DataSpecs, LogMelStats
from asda.data.audio.waves import decode_wav
from asda.data.order import Draw, OrderedDataset
from asda.data.prefetch import Note
from asda.data.remote.cache import CacheConfig
from asda.data.remote.fetch import without_credentials
from asda.data.shards.index import DatasetIndex, LogMelMoments, SplitIndex, class_weight, column
from asda.data.shards.read import ShardFile, load_dataset, load_weights
from asda.errors import UserError, say

SILENT_STD = 1e-3  # of log-mel values; equal ones differ by rounding, and those of any sound by about 1
TAR_HEADER_BYTES, TAR_NAME, TAR_SIZE = 512, slice(0, 100), slice(124, 136)  # of ustar; the size is octal

Part = tuple[DatasetIndex, SplitIndex]  # a dataset, and one of its splits


@dataclass(frozen=True)
class Clip:
    """One visit of one clip, decoded."""

    draw: Draw
    number: int  # of the clip in its dataset; that of the draw, or of the clip that stands in for a damaged one
    key: str
    samples: np.ndarray  # [S] int16 at 16 kHz
    labels: tuple[int, ...]


class _Shards(Sequence[ShardFile]):
    """All shards of several splits; each is made when it is asked for."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts
        self._starts = [0, *accumulate(len(split.shards) for _, split in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> ShardFile:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = bisect_right(self._starts, number) - 1
        index, split = self._parts[part]
        return ShardFile(index.folder, split.shards[number - self._starts[part]])


class ClipDataset:
    """Clips by number: sources, splits and shards in their listed order, clips in the order of the shard.

    Attributes:
        vocabulary: class names, a label's id is its position; empty where labels are not used.
        num_labels: labels of all clips together.
        log_mel: mean and standard deviation of the log-mel values of all clips.
        shards: all shards, in the order that numbers the clips.
        hashes: of the dataset.json of every dataset; empty for format version 1, which has none.
        fingerprint: one hash of all shards; what it stays equal for is the same data in the same order.
    """

    def __init__(self, *sources: DataSpecs, labelled: bool, tolerant: bool = False, cache: CacheConfig | None = None):
        """Open splits of datasets.

        Args:
            sources: each "LOCATION:SPLIT" or "LOCATION:SPLIT+SPLIT", or a list of such; several only for a mixture.
            labelled: whether the labels are used; then all datasets must have the same vocabulary.
            tolerant: whether shards may be missing or of another size; reading their clips raises then.
            cache: keeps copies of remote shards; None: its defaults.

        Raises:
            UserError: a dataset, split or shard is missing or damaged, a source has a shard twice, or the vocabularies
                differ.
        """
        self._sources = [_open_source(specs, tolerant, cache or CacheConfig()) for specs in sources]
        parts = [part for source in self._sources for part in source]
        self.vocabulary = _one_vocabulary([index for index, _ in parts]) if labelled else ()
        self.shards = _Shards(parts)
        self.log_mel = _pooled_stats([split.log_mel for _, split in parts])
        self.num_labels = sum(sum(split.class_counts) for _, split in parts)
        self.hashes = list(dict.fromkeys(index.hash for index, _ in parts))
        of_shards = (digest for _, split in parts for digest in column(split.shards, "hash"))
        self.fingerprint = xxhash.xxh3_128_hexdigest("".join(of_shards).encode())
        self._first_clip = np.cumsum([0, *(n for _, split in parts for n in column(split.shards, "clips"))])

    def __len__(self) -> int:
        return int(self._first_clip[-1])

    def complaint_about_labels(self) -> str | None:
        """Name the first clip that has several labels or none; None if each has one. Reads all indexes."""
        for shard in self.shards:
            try:
                index = shard.index
            except UserError:
                continue  # reading a clip of the shard says so, and whether that may be
            for key, labels in zip(index.keys, index.labels, strict=True):
                if len(labels) != 1:
                    return f"clip {shard.entry.name}:{key} has {len(labels) or 'no'} labels"
        return None if self.num_labels == len(self) else f"its {len(self)} clips have {self.num_labels} labels"

    def shares_shards_with(self, other: "ClipDataset") -> bool:
        """Return whether both contain a shard with the same hash."""
        return not {shard.entry.hash for shard in self.shards}.isdisjoint(shard.entry.hash for shard in other.shards)

    def locate(self, clip: int) -> tuple[ShardFile, int]:
        """Return the shard that holds a clip, and the clip's place in it."""
        number = int(np.searchsorted(self._first_clip, clip, side="right")) - 1
        return self.shards[number], clip - int(self._first_clip[number])

    def ordered(self, config: DataConfig) -> list[OrderedDataset]:
        """Return the inputs of the order: a row for each of `config.datasets`."""
        return [
            OrderedDataset(
                name=str(mixed.data),
                shard_clips=np.concatenate([column(split.shards, "clips") for _, split in parts]),
                order=(order := mixed.order or config.order),
                weights=_sample_weights(parts) if order.mode == "balanced" else None,
                share=mixed.share,
            )
            for mixed, parts in zip(config.datasets, self._sources, strict=True)
        ]


@dataclass
class DamageBudget:
    """How many damaged clips a run may have, and which it has met. Threads share it."""

    num_clips: int = 0  # most; 0 is strict
    met: set[int] = field(default_factory=set)  # clips by number
    _lock: Lock = field(default_factory=Lock, repr=False)

    def spend(self, clip: int, error: UserError) -> None:
        """Count a damaged clip and say so; raises UserError when there are too many."""
        if not self.num_clips:
            raise error
        with self._lock:
            if clip in self.met:
                return
            self.met.add(clip)
            self._check(f"the last: {error}")
        say(f"damaged clip {len(self.met)} of at most {self.num_clips}, another one stands in for it: {error}")

    def add(self, clips: Iterable[int]) -> None:
        """Count what other ranks have met; raises UserError when there are too many."""
        with self._lock:
            self.met.update(clips)
            self._check("their messages stand above")

    def _check(self, details: str) -> None:
        if len(self.met) > self.num_clips:
            raise UserError(f"{len(self.met)} clips are damaged, data.max_damaged allows {self.num_clips}; {details}")


def read_clips(
    dataset: ClipDataset, draws: Iterable[Draw], budget: DamageBudget | None = None, note: Note = lambda doing: None
) -> list[Clip]:
    """Read, verify and decode clips, in the order asked for; `note` is told which. Without a budget, it is strict.

    Raises:
        UserError: a frame is damaged, or holds another clip than the index says; nothing of it is used.
    """
    return [_read_or_stand_in(dataset, draw, budget or DamageBudget(), note) for draw in draws]


def _read_or_stand_in(dataset: ClipDataset, draw: Draw, budget: DamageBudget, note: Note) -> Clip:
    """Read the clip of a draw; if it is damaged, the one 1, 2, 4, 8, ... further on, soon of another shard."""
    for attempt in range(len(dataset).bit_length() + 1):
        clip = (draw.clip + (1 << attempt >> 1)) % len(dataset)
        try:
            return _read_clip(dataset, draw, clip, note)
        except UserError as error:
            budget.spend(clip, error)
    raise UserError(f"found no intact clip to stand in for clip {draw.clip}; check the shards with --verify")


def _read_clip(dataset: ClipDataset, draw: Draw, clip: int, note: Note) -> Clip:
    """Read the clip of that number, for a draw of it or of a damaged one."""
    shard, number = dataset.locate(clip)
    note(f"reads clip {number} of shard {shard.entry.name}")
    index = shard.index
    key = index.keys[number]
    frame = shard.read_frame(number)
    try:
        samples_S = decode_wav(_first_member(frame, f"{key}.wav"))
    except ValueError as error:
        raise UserError(
            f"shard {shard.path}, key {key}: the frame is intact, but its wav member is not what shards/README.md says "
            f"({error}); make the shard again with asda shards"
        ) from None
    return Clip(draw, clip, key, samples_S, index.labels[number])


def _first_member(frame: bytes, name: str) -> memoryview:
    """Return the content of the first file of a row of tar members, which the index knows by name.

    webdataset's own reader finds it too, in 0.1 ms of Python a clip, a tenth of all the work on it.
    """
    found = frame[TAR_NAME].rstrip(b"\0").decode("ascii", "replace")
    if found != name:
        raise ValueError(f"it holds {found!r} instead of {name!r}")
    size = int(frame[TAR_SIZE].rstrip(b"\0 "), 8)
    return memoryview(frame)[TAR_HEADER_BYTES : TAR_HEADER_BYTES + size]


def _open_source(specs: DataSpecs, tolerant: bool, cache: CacheConfig) -> list[Part]:
    """Return the splits of one source. Raises UserError if two hold the same shard, whose clips would count twice."""
    parts: list[Part] = []
    holder: dict[str, str] = {}  # by the hash of a shard
    for spec in [specs] if isinstance(specs, str) else specs:
        location, colon, names = spec.rpartition(":")
        if not colon or not location or not names or "/" in names:  # as a URL without splits has
            raise UserError(
                f"cannot read the data {without_credentials(spec)!r}; write FOLDER:SPLIT or FOLDER:SPLIT+SPLIT, as in "
                "shards/esc:fold1"
            )
        index = load_dataset(location, names.split("+"), cache, tolerant=tolerant)
        for name in names.split("+"):
            where = f"{index.folder}:{name}"
            for shard in set(column(index.splits[name].shards, "hash")):
                if shard in holder:
                    raise UserError(
                        f"{holder[shard]} and {where} hold the same clips, which would count twice; name each split "
                        "once (to see some more often while training, give them a share of their own)"
                    )
                holder[shard] = where
            parts.append((index, index.splits[name]))
    return parts


def _sample_weights(parts: Sequence[Part]) -> np.ndarray:
    """Weights for balanced draws, [clips]: those of dataset.json; of several splits, by all their clips a class."""
    if len(parts) == 1:
        index, split = parts[0]
        return load_weights(index.folder, split)
    _one_vocabulary([index for index, _ in parts])
    counts_C = np.sum([split.class_counts for _, split in parts], axis=0)
    weights_C = np.array([class_weight(count) for count in counts_C])
    shards = (ShardFile(index.folder, entry) for index, split in parts for entry in split.shards)
    return np.array([weights_C[list(some)].sum() for shard in shards for some in shard.index.labels], dtype=np.float32)


def _one_vocabulary(indexes: list[DatasetIndex]) -> tuple[str, ...]:
    first = indexes[0]
    for other in indexes[1:]:
        if other.vocabulary != first.vocabulary:
            raise UserError(
                f"{first.folder} and {other.folder} have different vocabularies ({len(first.vocabulary)} and "
                f"{len(other.vocabulary)} classes); make both with the same --labels FILE"
            )
    return first.vocabulary


def _pooled_stats(stats: list[LogMelMoments]) -> LogMelStats:
    """Return mean and standard deviation over the union of several sets of values."""
    frames = np.array([s.frames for s in stats], dtype=np.float64)
    means = np.array([s.mean for s in stats])
    mean = float(np.average(means, weights=frames))
    variance = np.average(np.array([s.std for s in stats]) ** 2 + (means - mean) ** 2, weights=frames)
    if variance < SILENT_STD**2:
        raise UserError(f"all log-mel values of the clips are {mean:.3f}: all of them are silent; look at the audio")
    return LogMelStats(mean=mean, std=float(np.sqrt(variance)))
