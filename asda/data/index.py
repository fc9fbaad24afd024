"""What the index files of a dataset say, field by field. The format is specified in shards/README.md."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from xxhash import xxh3_128

from asda.errors import UserError

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
SHARD_SUFFIX = ".tar.zst"
TAR_END = bytes(1024)  # two zero blocks
MAX_SAMPLE_BYTES = 256 << 20  # of one clip's tar members; more is refused before it is decompressed
MAX_DATASET_FILE_BYTES = 256 << 20  # AudioSet's 2 million clips need 2 MiB
REPAIR = "restore the shard or make it again with tools/make_shards.py"

Count = Annotated[int, Field(ge=0)]
Hash64 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Hash128 = Annotated[str, Field(pattern="^xxh3_128:[0-9a-f]{32}$")]
Key = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,200}$")]
SplitName = Annotated[str, Field(pattern="^[A-Za-z0-9_]+$")]
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+-[0-9]{6}\.tar\.zst$")]  # a name, never a path

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Record = TypeVar("Record")

_validator = lru_cache(TypeAdapter)  # building one takes milliseconds


@dataclass(frozen=True)
class ShardEntry:
    """What dataset.json says about one shard and its index."""

    __pydantic_config__ = STRICT

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


@dataclass(frozen=True)
class LogMelStats:
    """Moments of all log-mel values of a split: every bin of every real frame."""

    __pydantic_config__ = STRICT

    mean: float
    std: float
    frames: Count


@dataclass(frozen=True)
class SplitIndex:
    """One split of a dataset; class_counts[i] clips carry the vocabulary's label i."""

    __pydantic_config__ = STRICT

    clips: Count
    seconds: float
    class_counts: tuple[Count, ...]
    log_mel: LogMelStats
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class DatasetIndex:
    """The contents of dataset.json, and the folder it was found in."""

    __pydantic_config__ = STRICT

    format_version: int
    sample_rate_hz: Literal[16_000]
    vocabulary: tuple[str, ...]  # a label's id is its position
    splits: dict[SplitName, SplitIndex]
    rejected: Count
    folder: Path = Path()  # not in the file

    def __post_init__(self) -> None:
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("a class is listed twice")
        for name, split in self.splits.items():
            if split.clips != sum(shard.clips for shard in split.shards):
                raise ValueError(f"split {name} and its shards count different numbers of clips")
            if len(split.class_counts) != len(self.vocabulary):
                raise ValueError(f"split {name} does not count every class of the vocabulary")


@dataclass(frozen=True)
class ShardIndex:
    """One shard, column by column; row i of every column is clip i."""

    __pydantic_config__ = STRICT

    format_version: int
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
        ends = (*self.offsets[1:], self.bytes)
        if self.offsets[0] != 0 or any(
            not 0 < b - a <= MAX_SAMPLE_BYTES for a, b in zip(self.offsets, ends, strict=True)
        ):
            raise ValueError(f"its offsets do not ascend from 0 in steps of at most {MAX_SAMPLE_BYTES} bytes")


def hash_bytes(data: bytes) -> str:
    """xxh3_128 in the notation of the indexes."""
    return f"xxh3_128:{xxh3_128(data).hexdigest()}"


def parse(record: type[Record], text: bytes, path: Path) -> Record:
    """Check a JSON file against a dataclass. Raises UserError naming the file and the first wrong value."""
    try:
        raw: Any = json.loads(text)
        version = raw["format_version"]
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, this asda reads {FORMAT_VERSION}; update asda")
        return _validator(record).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is malformed at {'.'.join(map(str, first['loc'])) or 'top'}: {first['msg']}; {REPAIR}"
        ) from None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path} is malformed: no JSON object with a format_version ({error}); {REPAIR}") from None
