"""Verify a dataset of shards: report every problem, not only the first that a reader would meet."""

import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from tqdm import tqdm

from asda.data.audio.waves import AudioError, decode_wav
from asda.data.remote.cache import CacheConfig
from asda.data.remote.fetch import UnreachableError
from asda.data.remote.storage import LocalFolder, open_storage
from asda.data.shards.index import DATASET_FILE, MAX_SAMPLE_BYTES, REPAIR, SHARD_SUFFIX, TAR_END, ShardEntry
from asda.data.shards.read import BadFrameError, ShardFile, decompress, load_dataset, load_shard_index, load_weights
from asda.errors import UserError, failure_of
from asda.sharding.workers import worker_pool
from asda.system import hash_pieces

BLOCK_BYTES = 512  # of a tar
EXTENDED_HEADERS = b"xgLK"  # pax and GNU members that describe the next member
READ_BYTES = MIB = 1 << 20

open_once = lru_cache(maxsize=1)(open_storage)


@dataclass(frozen=True)
class Checked:
    """The problems of one file."""

    name: str
    problems: list[str]
    keys: tuple[str, ...] = ()


def verify_dataset(
    location: str | Path, num_workers: int, splits: Iterable[str] = (), cache: CacheConfig | None = None
) -> None:
    """Check every file of a dataset in a folder or at a URL; print each problem on stdout, or that all is intact.

    Without `splits` it checks all of them, and in a folder also tars that dataset.json does not list. `cache` keeps
    copies of remote shards. Raises UserError, which says how many shards are damaged.
    """
    splits, entries, vocabulary = list(dict.fromkeys(splits)), [], ()
    index_complaint = ""
    tars = [] if splits else _tars(location)
    try:
        dataset = load_dataset(location, splits or None, cache, tolerant=True)
        entries = [entry for name in splits or dataset.splits for entry in dataset.splits[name].shards]
        vocabulary = dataset.vocabulary
        for name in splits or dataset.splits:
            load_weights(dataset.folder, dataset.splits[name])
    except UserError as error:
        if not tars:
            raise
        index_complaint = str(error)
        print(index_complaint)
    listed = {entry.name for entry in entries}
    unlisted = [path for path in tars if path.name not in listed]
    with worker_pool(num_workers, len(entries) + len(unlisted)) as workers:
        check = partial(_check_listed, location, cache, vocabulary)
        found = workers.run(check, entries, [entry.clips for entry in entries], "clip", _print_problems)
        found += workers.run(_check_unlisted, unlisted, [1] * len(unlisted), "file", _print_problems)
    first: dict[str, str] = {}
    repeated = [
        f"{checked.name}, key {key}: {first[key]} holds it too; a key is unique in its dataset"
        for checked in found
        for key in checked.keys
        if first.setdefault(key, checked.name) != checked.name
    ]
    print(*repeated, sep="\n", end="\n" if repeated else "")
    if num_wrong := sum(bool(checked.problems) for checked in found):
        raise UserError(f"{location}: {num_wrong} of {len(found)} shards are damaged or not listed; {REPAIR}")
    if repeated:
        raise UserError(f"{location}: {len(repeated)} keys are repeated; make the dataset again with asda shards")
    if index_complaint:
        raise UserError(f"{location}: the shards are whole, but a file beside dataset.json is damaged; {REPAIR}")
    num_clips, num_mib = sum(entry.clips for entry in entries), sum(entry.bytes for entry in entries) / MIB
    print(f"{location}: {num_clips:,} clips in {len(entries):,} shards, {num_mib:,.1f} MiB, are right, to the last bit")


def _tars(location: str | Path) -> list[Path]:
    """Return the tars of a local folder."""
    storage = open_storage(location)
    if not isinstance(storage, LocalFolder) or not storage.folder.is_dir():
        return []
    return sorted(path for path in storage.folder.iterdir() if path.name.endswith((".tar", SHARD_SUFFIX)))


def _print_problems(checked: Checked) -> None:
    for problem in checked.problems:
        tqdm.write(problem, file=sys.stdout)


def _check_listed(
    location: str | Path, cache: CacheConfig | None, vocabulary: tuple[str, ...], _: int, entry: ShardEntry
) -> Checked:
    shard = ShardFile(open_once(location, cache), entry)
    problems = shard_problems(shard, vocabulary)
    try:
        return Checked(entry.name, problems, shard.index.keys)
    except Exception:  # about the index, which is among the problems
        return Checked(entry.name, problems)


def _check_unlisted(_: int, path: Path) -> Checked:
    unlisted = f"{path} is not listed in a {DATASET_FILE}, so nothing vouches for it"
    return Checked(path.name, [unlisted, *tar_problems(path)])


@contextmanager
def _adding_to(problems: list[str], where: str, *, raising: type[UserError] | tuple[()] = ()) -> Iterator[None]:
    """Add the exception that ends the block, if any, except those for `raising`; a UserError says where it happened."""
    try:
        yield
    except raising:
        raise
    except UserError as error:
        problems.append(str(error))
    except Exception as error:
        problems.append(f"{where}: {failure_of(error)}")


def shard_problems(shard: ShardFile, vocabulary: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a shard: its index, its size, each clip, its end frame, the hash of the file."""
    problems: list[str] = []
    size = shard.entry.bytes
    where = f"shard {shard.path}"
    with _adding_to(problems, where):
        end = load_shard_index(shard.storage, shard.entry).offsets[-1]
        with _adding_to(problems, where):
            shard.storage.check_sizes([shard.file])
        end_frame = shard.storage.read(shard.file, end, size)  # if this fails, nothing can be read
        for number in range(shard.entry.clips):
            with _adding_to(problems, f"{where}, clip {number}", raising=UnreachableError):
                _check_clip(shard, number, vocabulary)
        with _adding_to(problems, where):
            _check_end(shard, end_frame)
        pieces = ((start, min(start + READ_BYTES, size)) for start in range(0, size, READ_BYTES))
        if (found := hash_pieces(shard.storage.read(shard.file, *piece) for piece in pieces)) != shard.file.digest:
            problems.append(f"shard {shard.path} is damaged: its hash is {found}, not {shard.file.digest}; {REPAIR}")
    return problems


def _check_end(shard: ShardFile, end_frame: bytes) -> None:
    try:
        if decompress(end_frame) != TAR_END:
            raise BadFrameError("it does not hold two zero blocks")
    except (BadFrameError, zstandard.ZstdError) as error:
        where = f"shard {shard.path} is damaged in its end frame ({len(end_frame)} bytes)"
        raise UserError(f"{where}: {error}; {REPAIR}") from None


def _check_clip(shard: ShardFile, number: int, vocabulary: tuple[str, ...]) -> None:
    """Compare the tar members of one clip with its row in the index. Raises UserError."""
    wav, described = read_members(shard, number)
    ids = shard.index.labels[number]
    labels = [vocabulary[label] for label in ids if label < len(vocabulary)]
    found = (len(decode_wav(wav)), described.get("labels"))
    if found != (shard.index.num_samples[number], labels) or len(labels) < len(ids):
        raise UserError(f"{_members(shard, number)} are not what the index says; {REPAIR}")


def read_members(shard: ShardFile, number: int) -> tuple[bytes, dict[str, Any]]:
    """Return the WAV of a clip and what its JSON says. Raises UserError if the frame is damaged."""
    key = shard.index.keys[number]
    frame = shard.read_frame(number)
    try:
        members = list(tar_members(io.BytesIO(frame + TAR_END)))
        names = [name for name, _ in members]
        if names != [f"{key}.wav", f"{key}.json"]:
            raise AudioError(f"they are {', '.join(names) or 'none'}, not {key}.wav and {key}.json")
        (_, wav), (_, text) = members
        decode_wav(wav)
        described = json.loads(text)
        if not isinstance(described, dict):
            raise AudioError("the JSON is not an object")
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{_members(shard, number)} cannot be used: {error}; {REPAIR}") from None
    return wav, described


def _members(shard: ShardFile, number: int) -> str:
    return f"shard {shard.path}, key {shard.index.keys[number]}: its members"


def tar_problems(path: Path) -> list[str]:
    """Check that a tar, plain or through zstd, is a sequence of whole clips: <key>.<audio> and <key>.json together."""
    problems: list[str] = []
    seen: dict[str, set[str]] = {}
    last = ""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_SAMPLE_BYTES)
    try:
        with path.open("rb") as file:
            unpacked = decompressor.stream_reader(file, read_across_frames=True, closefd=False)
            for name, _ in tar_members(unpacked if path.name.endswith(SHARD_SUFFIX) else file):
                key, _, extension = name.partition(".")
                if key != last and key in seen:
                    problems.append(f"{path}, key {key}: it comes again after other clips")
                elif extension in seen.setdefault(key, set()):
                    problems.append(f"{path}, key {key}: {name} is there twice")
                seen[key].add(extension)
                last = key
    except Exception as error:
        reason = error if isinstance(error, (tarfile.TarError, zstandard.ZstdError, OSError)) else failure_of(error)
        problems.append(f"{path} is damaged after key {last or '(none)'}: {reason}")
    for key, extensions in seen.items():
        if "json" not in extensions:
            problems.append(f"{path}, key {key}: half a clip, it has no {key}.json")
        if not extensions - {"json"}:
            problems.append(f"{path}, key {key}: half a clip, it has no audio beside {key}.json")
    return problems


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a tar's files.

    Raises TarError unless every block is in order, up to the end of the stream; Python's tarfile takes damage for it.
    """
    while (header := _read(stream, BLOCK_BYTES)) != bytes(BLOCK_BYTES):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if not 0 <= member.size <= MAX_SAMPLE_BYTES:
            raise tarfile.TarError(f"{member.name} has {member.size} bytes, which is not 0 to {MAX_SAMPLE_BYTES}")
        content = _read(stream, -(-member.size // BLOCK_BYTES) * BLOCK_BYTES)
        if member.type in EXTENDED_HEADERS:
            continue
        if not member.isreg():
            raise tarfile.TarError(f"{member.name} is not a plain file")
        yield member.name, content[: member.size]
    _read(stream, BLOCK_BYTES)
    while rest := stream.read(READ_BYTES):
        if any(rest):
            raise tarfile.TarError("something follows the two zero blocks of its end")


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    """Read exactly so many bytes; a decompressor may return them in pieces."""
    pieces = []
    while num_bytes and (piece := stream.read(num_bytes)):
        pieces.append(piece)
        num_bytes -= len(piece)
    if num_bytes:
        raise tarfile.TarError("it ends without the two zero blocks of a tar's end")
    return b"".join(pieces)
