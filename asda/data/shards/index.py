"""The index files of a dataset, field by field. The format is specified in shards/README.md."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from asda.errors import UserError
from asda.system import hash_bytes

FORMAT_VERSION = 2  # of dataset.json; version 1 is read too, and lacks what has a default below
LARGE_FORMAT_VERSION = 3  # of one with a split of more than LARGE_SPLIT clips, whose columns lie in files of their own
LARGE_SPLIT = 1_000_000
SHARD_FORMAT_VERSION = 1  # of a shard and its index
DATASET_FILE = "dataset.json"
SHARD_SUFFIX = ".tar.zst"
TAR_END = bytes(1024)  # two zero blocks
MAX_SAMPLE_BYTES = 256 << 20  # of one clip's tar members; more is refused before it is decompressed
MAX_DATASET_FILE_BYTES = 256 << 20  # a million clips need 10 MiB
REPAIR = "restore the shard or make it again with asda shards"

Count = Annotated[int, Field(ge=0)]
Hash64 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Hash128 = Annotated[str, Field(pattern="^xxh3_128:[0-9a-f]{32}$")]
Key = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,200}$")]
SplitName = Annotated[str, Field(pattern="^[A-Za-z0-9_]+$")]
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+-[0-9]{6}\.tar\.zst$")]  # a name, never a path

SHARDS_SUFFIX, WEIGHTS_SUFFIX = ".shards.bin", ".weights.f32"  # behind the split's name
SIDE_FILE = r"[A-Za-z0-9_]+\.(shards\.bin|weights\.f32)"
# A row of .shards.bin, little-endian; the hashes as their 16 bytes in the order of their digits.
SHARD_ROW = np.dtype(
    [
        ("number", "<u4"),
        ("clips", "<u4"),
        ("bytes", "<u8"),
        ("hash", "V16"),
        ("index_bytes", "<u8"),
        ("index_hash", "V16"),
    ]
)

HASH_DIGITS = re.compile(rb"xxh3_128:[0-9a-f]{32}")  # of dataset.json itself, where it first occurs
NO_HASH = b"xxh3_128:" + b"0" * 32  # stands there while the file is hashed


def _weights(values: object) -> np.ndarray:
    """Check a list of weights as a whole: two million of them, one by one, would take a second."""
    array = np.asarray(values)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iuf"):
        raise ValueError("it is not a list of numbers")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        array = array.astype(np.float32)
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError("a weight is negative or not finite")
    array.flags.writeable = False
    return array


Version = Annotated[int, Field(ge=1, le=LARGE_FORMAT_VERSION)]
Weights = Annotated[np.ndarray, PlainValidator(_weights)]


class Record:
    """Base of a JSON file or of a part of one: nothing is converted, and no key may be unknown."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


AnyRecord = TypeVar("AnyRecord", bound=Record)

_validator = lru_cache(TypeAdapter)  # building one takes milliseconds


@dataclass(frozen=True)
class ShardEntry(Record):
    """The entry of dataset.json about one shard and its index."""

    name: ShardName
    clips: Annotated[int, Field(gt=0)]
    bytes: Count
    hash: Hash128
    index_bytes: Count
    index_hash: Hash128

    @property
    def index_name(self) -> str:
        """Name of the shard's index file."""
        return self.name.removesuffix(SHARD_SUFFIX) + ".json"


class ShardTable(Sequence[ShardEntry]):
    """The shards of a large split, as the rows of a table; an entry is made when it is asked for."""

    def __init__(self, split: str, content: bytes | np.ndarray):
        """Take SHARD_ROWs or their bytes. Raises ValueError if a shard is listed twice, or has no clip."""
        self._split, self.rows = split, np.frombuffer(content, SHARD_ROW)
        if len(np.unique(self.rows["number"])) != len(self.rows):
            raise ValueError("a shard is listed twice")
        if not self.rows["clips"].all():
            raise ValueError("a shard has no clip")

    @staticmethod
    def row(entry: ShardEntry) -> tuple:
        """Return the SHARD_ROW of an entry, which is numbered in its name."""
        number = int(entry.name.removesuffix(SHARD_SUFFIX).rpartition("-")[2])
        digests = (bytes.fromhex(tagged.rpartition(":")[2]) for tagged in (entry.hash, entry.index_hash))
        return number, entry.clips, entry.bytes, next(digests), entry.index_bytes, next(digests)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardTable": ...
    def __getitem__(self, place: int | slice) -> "ShardEntry | ShardTable":
        if isinstance(place, slice):
            return ShardTable(self._split, self.rows[place].copy())
        number, clips, size, digest, index_bytes, index_digest = self.rows[place].item()
        name, tagged, index_tagged = self._name(number), _tagged(digest.hex()), _tagged(index_digest.hex())
        return ShardEntry(name, clips, size, tagged, index_bytes, index_tagged)

    def column(self, field: Literal["name", "clips", "hash"]) -> Any:
        """Return one field of every entry as a list or array, without making the entries."""
        if field == "name":
            return [self._name(number) for number in self.rows["number"].tolist()]
        if field == "hash":
            return [_tagged(digest.hex()) for digest in self.rows["hash"].tolist()]
        return self.rows["clips"].astype(np.int64)

    def _name(self, number: int) -> str:
        return f"{self._split}-{number:06d}{SHARD_SUFFIX}"


def column(shards: Sequence[ShardEntry], field: Literal["name", "clips", "hash"]) -> Any:
    """Return one field of every shard, as a list or array."""
    return shards.column(field) if isinstance(shards, ShardTable) else [getattr(entry, field) for entry in shards]


@dataclass(frozen=True)
class SideFile(Record):
    """A file beside dataset.json that holds a column of a large split."""

    name: Annotated[str, Field(pattern=f"^{SIDE_FILE}$")]
    bytes: Count
    hash: Hash128


@dataclass(frozen=True)
class LogMelMoments(Record):
    """Moments of all log-mel values of a split: every bin of every real frame."""

    mean: float
    std: float
    frames: Count


@dataclass(frozen=True)
class SplitIndex(Record):
    """One split of a dataset; class_counts[i] clips carry the vocabulary's label i."""

    clips: Count
    seconds: float
    class_counts: tuple[Count, ...]
    log_mel: LogMelMoments
    shards: Annotated[Sequence[ShardEntry], AfterValidator(tuple)]
    class_weights: tuple[float, ...] = ()  # class_weight() of each of class_counts; absent in version 1
    # float32 [clips] in the order of the split: the sum of the class weights of a clip's labels. Empty if the split has
    # no labels, and in version 1.
    sample_weights: Weights = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)
    shards_file: SideFile | None = None  # of a large split: SHARD_ROWs, in place of `shards`
    weights_file: SideFile | None = None  # of a large split with labels: little-endian float32, for `sample_weights`


@dataclass(frozen=True)
class Duplicates(Record):
    """How many pairs of duplicates.csv are of each kind, and how many of those lie in two splits."""

    exact: Count = 0
    exact_across_splits: Count = 0
    near: Count = 0
    near_across_splits: Count = 0


@dataclass(frozen=True)
class DatasetIndex(Record):
    """The contents of dataset.json, and the folder it was found in."""

    format_version: Version
    sample_rate_hz: Literal[16_000]
    vocabulary: tuple[str, ...]  # a label's id is its position
    splits: dict[SplitName, SplitIndex]
    rejected: Count
    folder: Any = Path()  # not in the file: a Path, or the Storage of a remote dataset
    duplicates: Duplicates = Duplicates()
    command: str = ""  # what made the dataset
    hash: Annotated[str, Field(pattern="^(xxh3_128:[0-9a-f]{32})?$")] = field(default="", compare=False)

    def __post_init__(self) -> None:
        names = [name for split in self.splits.values() for name in column(split.shards, "name")]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("a class is listed twice")
        for name, split in self.splits.items():
            is_read = bool(split.shards) or split.shards_file is None
            if is_read and split.clips != int(np.sum(column(split.shards, "clips"))):
                raise ValueError(f"split {name} and its shards count different numbers of clips")
            if len(split.class_counts) != len(self.vocabulary):
                raise ValueError(f"split {name} does not count every class of the vocabulary")
            if len(split.class_weights) not in (0, len(self.vocabulary)):
                raise ValueError(f"split {name} does not weigh every class of the vocabulary")
            num_weights = split.weights_file.bytes / 4 if split.weights_file else len(split.sample_weights)
            if num_weights not in (0, split.clips):
                raise ValueError(f"split {name} does not weigh every clip")


@dataclass(frozen=True)
class ShardIndex(Record):
    """One shard, column by column; row i of every column is clip i."""

    format_version: Version
    name: ShardName
    bytes: Count
    hash: Hash128
    keys: tuple[Key, ...]
    offsets: tuple[Count, ...]  # first byte of every frame, and of the end frame
    hashes: tuple[Hash64, ...]  # xxh3_64 of every compressed frame
    num_samples: tuple[Count, ...]
    labels: tuple[tuple[Count, ...], ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("it lists no clip")
        columns = (self.offsets[:-1], self.hashes, self.num_samples, self.labels)
        if any(len(column) != len(self.keys) for column in columns):
            raise ValueError("its columns differ in length")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("a key is listed twice")
        sizes = [stop - start for start, stop in pairwise((*self.offsets, self.bytes))]
        if self.offsets[0] != 0 or not all(0 < size <= MAX_SAMPLE_BYTES for size in sizes):
            raise ValueError(f"its offsets do not ascend from 0 in steps of at most {MAX_SAMPLE_BYTES} bytes")


def tagged_hash(content: bytes) -> str:
    """Return the hash of bytes as the indexes write it: xxh3_128 and 32 hexadecimal digits."""
    return _tagged(hash_bytes(content))


def _tagged(digits: str) -> str:
    return f"xxh3_128:{digits}"


def class_weight(count: int) -> float:
    """Return the weight of a class with so many clips in balanced sampling, as in AudioSet recipes since PANNs."""
    return 1000 / (count + 0.01)


def hash_dataset_file(text: bytes) -> str:
    """Return the xxh3_128 of dataset.json, taken with zeros in place of the digits of this hash."""
    return tagged_hash(HASH_DIGITS.sub(NO_HASH, text, count=1))


def parse_dataset(text: bytes, path: Path | str) -> DatasetIndex:
    """Check dataset.json: field by field, then against its own hash (since version 2). Raises UserError."""
    dataset = parse(DatasetIndex, text, path)
    if dataset.format_version > 1 and (found := hash_dataset_file(text)) != dataset.hash:
        raise UserError(f"{path} is damaged: its hash is {found}, it says {dataset.hash or 'none'}; {REPAIR}")
    return dataset


def parse(record: type[AnyRecord], text: bytes, path: Path | str) -> AnyRecord:
    """Check a JSON file against a dataclass. Raises UserError naming the file and the first wrong value."""
    try:
        return _validator(record).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "top"
    if place == "format_version" and first["type"].endswith("_than_equal"):
        raise UserError(
            f"{path} has format version {first['input']}, this asda reads 1 to {LARGE_FORMAT_VERSION}; update asda"
        )
    raise UserError(f"{path} is malformed at {place}: {first['msg']}; {REPAIR}")
