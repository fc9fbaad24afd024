"""What is wrong in a folder of shards: everything, not only what a reader would stumble over first."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import zstandard
from xxhash import xxh3_128

from asda.data.audio.waves import AudioError, decode_wav
from asda.data.shards.index import (
    DATASET_FILE,
    MAX_SAMPLE_BYTES,
    REPAIR,
    SHARD_SUFFIX,
    TAR_END,
    DatasetIndex,
    ShardEntry,
)
from asda.data.shards.read import BadFrameError, ShardFile, _decompress, load_dataset, load_shard_index
from asda.errors import UserError
from asda.sharding.workers import report_done, worker_pool

TAR_SUFFIXES = (".tar", SHARD_SUFFIX)
BLOCK_BYTES = 512  # of a tar
EXTENDED_HEADERS = b"xgLK"  # pax and GNU members that describe the next member
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Checked:
    """What was found in one file."""

    name: str
    problems: list[str]
    keys: tuple[str, ...] = ()


def verify_folder(folder: Path, num_workers: int) -> None:
    """Check every file of a dataset; print all that is wrong, shard by shard. Raises UserError if anything is."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    problems: list[str] = []
    listed: list[tuple[DatasetIndex, ShardEntry]] = []
    try:
        dataset = load_dataset(folder, [])
        light = replace(dataset, splits={})  # goes to a worker with every shard
        listed = [(light, shard) for split in dataset.splits.values() for shard in split.shards]
    except UserError as error:
        problems.append(str(error))
    names = {entry.name for _, entry in listed}
    others = sorted(p for p in folder.iterdir() if p.name.endswith(TAR_SUFFIXES) and p.name not in names)
    with worker_pool(num_workers, len(listed) + len(others)) as workers:
        found = workers.run(check_listed, listed, [entry.clips for _, entry in listed], "clip", _lines)
        found += workers.run(check_unlisted, others, [1] * len(others), "file", _lines)
    problems += repeated_keys(found)
    for line in problems:
        print(line, file=sys.stderr)
    num_wrong = sum(bool(checked.problems) for checked in found)
    if problems or num_wrong:
        raise UserError(f"{num_wrong} of {len(found)} shards in {folder} are wrong; all that was found stands above")
    print(f"{len(found)} shards with {sum(len(checked.keys) for checked in found)} clips are right, to the last bit")


def _lines(checked: Checked) -> list[str]:
    return [f"{checked.name}: {problem}" for problem in checked.problems]


def repeated_keys(found: Sequence[Checked]) -> Iterator[str]:
    """A line for every key that an earlier shard holds too."""
    seen: dict[str, str] = {}
    for checked in found:
        for key in checked.keys:
            if seen.setdefault(key, checked.name) != checked.name:
                yield f"{checked.name}, key {key}: {seen[key]} holds it too; a key is unique in its dataset"


def check_listed(number: int, job: tuple[DatasetIndex, ShardEntry]) -> Checked:
    """check_shard in a worker process."""
    checked = check_shard(*job)
    report_done(number, job[1].clips)
    return checked


def check_shard(dataset: DatasetIndex, entry: ShardEntry) -> Checked:
    """Check a shard of dataset.json: its index, its clips one by one, and the file as a whole."""
    shard = ShardFile(dataset.folder, entry)
    try:
        index = load_shard_index(shard.storage, entry)
    except UserError as error:
        return Checked(entry.name, [str(error)])
    problems = []
    try:
        verify_shard(dataset, entry)
    except UserError as error:
        problems = [str(error), *_unreadable_clips(shard, len(index.keys))]
        if isinstance(shard.path, Path):
            problems += tar_problems(shard.path)
    return Checked(entry.name, list(dict.fromkeys(problems)), index.keys)


def _unreadable_clips(shard: ShardFile, num_clips: int) -> Iterator[str]:
    for number in range(num_clips):
        try:
            shard.read_frame(number)
        except UserError as error:
            yield str(error)


def check_unlisted(number: int, path: Path) -> Checked:
    """Check a tar that no dataset.json vouches for, made by whatever program."""
    vouching = f"{path} is not listed in a {DATASET_FILE}, so nothing vouches for it"
    return Checked(path.name, [vouching, *tar_problems(path)])


def tar_problems(path: Path | str) -> list[str]:
    """Check that a tar, plain or through zstd, is a sequence of whole clips: <key>.<audio> and <key>.json together.

    Python's tarfile takes damage for the end of the archive; this walk does not.
    """
    problems: list[str] = []
    seen: dict[str, set[str]] = {}
    last = ""
    try:
        with ExitStack() as stack:
            for name in _member_names(_opened(Path(path), stack)):
                key, _, extension = name.partition(".")
                if key != last and key in seen:
                    problems.append(f"{path}, key {key}: it comes again after other clips")
                elif extension in seen.setdefault(key, set()):
                    problems.append(f"{path}, key {key}: {name} is there twice")
                seen[key].add(extension)
                last = key
    except (tarfile.TarError, zstandard.ZstdError, OSError) as error:
        problems.append(f"{path} is damaged after key {last or '(none)'}: {error}")
    for key, extensions in seen.items():
        if "json" not in extensions:
            problems.append(f"{path}, key {key}: half a clip, it has no {key}.json")
        if not extensions - {"json"}:
            problems.append(f"{path}, key {key}: half a clip, it has no audio beside {key}.json")
    return problems


def _opened(path: Path, stack: ExitStack) -> BinaryIO:
    file = stack.enter_context(path.open("rb"))
    if not path.name.endswith(SHARD_SUFFIX):
        return file
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_SAMPLE_BYTES)
    return stack.enter_context(decompressor.stream_reader(file, read_across_frames=True))  # pyright: ignore


def _member_names(stream: BinaryIO) -> Iterator[str]:
    """Yield the names of a tar's files. Raises TarError unless every block is in order, up to the end of the stream."""
    while (header := _read(stream, BLOCK_BYTES)) != bytes(BLOCK_BYTES):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        _skip(stream, -(-member.size // BLOCK_BYTES) * BLOCK_BYTES)
        if member.type in EXTENDED_HEADERS:
            continue
        if not member.isreg():
            raise tarfile.TarError(f"{member.name} is no plain file")
        yield member.name
    _read(stream, BLOCK_BYTES)
    while rest := stream.read(READ_BYTES):
        if any(rest):
            raise tarfile.TarError("something follows the two zero blocks of its end")


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    for start in range(0, num_bytes, READ_BYTES):
        _read(stream, min(READ_BYTES, num_bytes - start))


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    """Read exactly so many bytes; a decompressor may return them in pieces."""
    pieces = []
    while num_bytes and (piece := stream.read(num_bytes)):
        pieces.append(piece)
        num_bytes -= len(piece)
    if num_bytes:
        raise tarfile.TarError("it ends without the two zero blocks of a tar's end")
    return b"".join(pieces)


def verify_shard(dataset: DatasetIndex, entry: ShardEntry) -> None:
    """Read everything in a shard: index, frames, members, end frame, hash of the whole file. Raises UserError."""
    shard = ShardFile(dataset.folder, entry)
    index = load_shard_index(shard.storage, entry)
    shard.storage.check_sizes([shard.file])
    for number, key in enumerate(index.keys):
        _check_members(shard, number, key, dataset.vocabulary)
    end = index.offsets[-1]
    where = f"shard {shard.path} is damaged in its end frame (bytes {end} to {entry.bytes})"
    try:
        if _decompress(shard.storage.read(shard.file, end, entry.bytes)) != TAR_END:
            raise UserError(f"{where}: it does not hold two zero blocks; {REPAIR}")
    except (BadFrameError, zstandard.ZstdError) as error:
        raise UserError(f"{where}: {error}; {REPAIR}") from error
    if (found := _hash_of(shard)) != entry.hash:
        raise UserError(
            f"shard {shard.path} is damaged: its hash is {found}, {DATASET_FILE} says {entry.hash}; {REPAIR}"
        )


def _check_members(shard: ShardFile, number: int, key: str, vocabulary: tuple[str, ...]) -> None:
    """Compare the tar members of one clip with its row in the index."""
    where = f"shard {shard.path}, key {key}: its members"
    members = io.BytesIO(shard.read_frame(number) + TAR_END)
    try:
        with tarfile.open(fileobj=members) as tar:
            contents = [(member.name, tar.extractfile(member)) for member in tar]
        names = [name for name, _ in contents]
        if names != [f"{key}.wav", f"{key}.json"]:
            raise UserError(f"{where} are {', '.join(names) or 'none'}, not {key}.wav and {key}.json; {REPAIR}")
        wav, text = (file.read() if file else b"" for _, file in contents)
        labels = [vocabulary[label] for label in shard.index.labels[number]]
        found = (len(decode_wav(wav)), json.loads(text)["labels"])
    except (tarfile.TarError, AudioError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({error}); {REPAIR}") from error
    if found != (shard.index.num_samples[number], labels):
        raise UserError(f"{where} are not what the index says; {REPAIR}")


def _hash_of(shard: ShardFile) -> str:
    state, size = xxh3_128(), shard.entry.bytes
    for low in range(0, size, READ_BYTES):
        state.update(shard.storage.read(shard.file, low, min(low + READ_BYTES, size)))
    return f"xxh3_128:{state.hexdigest()}"
