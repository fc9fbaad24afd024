"""Unfinished work in an output folder: what is being made, which shards are done, and who is writing which.

    .unfinished/plan.json                 the plan's digest, the command, and the names of all files that are its own
    .unfinished/train-000000.done.json    all that dataset.json needs to know of a finished shard
    .unfinished/lock                      byte n is locked by the process that writes shard n

A run that finds its own plan here resumes where the last one was stopped. Any number of runs may share the shards. The
folder is removed when dataset.json is written.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from asda.data.shards.index import (
    DATASET_FILE,
    LARGE_SPLIT,
    SHARD_SUFFIX,
    SHARDS_SUFFIX,
    SIDE_FILE,
    WEIGHTS_SUFFIX,
    ShardEntry,
    ShardTable,
)
from asda.errors import UserError
from asda.sharding.plan import Plan, ShardTask
from asda.sharding.workers import report_done
from asda.sharding.writer import LogMelSums, WrittenShard, write_shard, writing
from asda.system import TEMPORARY_SUFFIX, FileLock, hash_bytes, write_whole_file

JOURNAL_FOLDER = ".unfinished"
PLAN_FILE = "plan.json"
LOCK_FILE = "lock"
RECORD_SUFFIX = ".done.json"
DUPLICATES_FILE = "duplicates.csv"
REJECTED_FILE = "rejected.csv"
SILENT_FILE = "silent.csv"
TABLES = (REJECTED_FILE, DUPLICATES_FILE, SILENT_FILE)  # beside dataset.json, if they have rows
SHARD_FILES = re.compile(rf"[A-Za-z0-9_]+-[0-9]{{6}}(\.tar\.zst|\.json)|{SIDE_FILE}", re.ASCII)
SAMPLED_BYTES = 4096  # at three places of an audio file
ALL_SHARDS = range(1 << 40)  # bytes of the lock file
SETUP, MERGE = range(1 << 40, (1 << 40) + 1), range((1 << 40) + 1, (1 << 40) + 2)  # a byte each, behind all shards
DISCARDING = "discarding"  # stands for the plan's digest while old files are removed


@dataclass(frozen=True)
class Journal:
    """The unfinished work on a plan. Small: every worker process gets one."""

    out: Path
    digest: str  # of the plan
    place: tuple[int, int] | None = None  # device and number of the lock file that this run holds

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        return self.out / JOURNAL_FOLDER

    def record_path(self, task: ShardTask) -> Path:
        """Return the path of a shard's record."""
        return self.folder / (task.path.name.removesuffix(SHARD_SUFFIX) + RECORD_SUFFIX)

    def has_record(self, task: ShardTask) -> bool:
        """Return whether a shard was finished, as far as its record's name tells."""
        return self.record_path(task).exists()

    def produce(self, number: int, task: ShardTask) -> WrittenShard:
        """Return what was noted of a finished shard; otherwise write it, and note that. Runs in a worker."""
        inputs, path = inputs_digest(task), self.record_path(task)
        shard = self.read(task, inputs)
        if shard is None:
            self.check_place()
            path.unlink(missing_ok=True)
            shard = write_shard(task, partial(self._report, number))
            content = asdict(shard) | {"plan": self.digest, "inputs": inputs, "prints": [p.hex() for p in shard.prints]}
            text = json.dumps(content, separators=(",", ":"))  # in ASCII: names of files need not be UTF-8
            with writing(path):
                write_whole_file(path, f"{hash_bytes(text.encode())}\n{text}\n")
        return shard

    def _report(self, number: int, num_clips: int) -> None:
        self.check_place()  # after the last clip too, before the shard gets its name
        report_done(number, num_clips)

    def check_place(self) -> None:
        """Raise UserError if the output folder is no longer the one that this run has locked."""
        try:
            lock = os.stat(self.folder / LOCK_FILE)
            same = (lock.st_dev, lock.st_ino) == self.place
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same and self.place is not None:
            raise UserError(
                f"--out {self.out} was moved, removed or replaced meanwhile, so nothing more is written there; put it "
                "back and run the same command, which then continues"
            )

    def read(self, task: ShardTask, inputs: str | None = None) -> WrittenShard | None:
        """Return what was noted of a shard, or None if the shard has to be written (again).

        A record counts if it is whole, of this plan and of these `inputs` (None: of any), and the shard's two files
        have the sizes that it says.
        """
        try:
            digest, text = self.record_path(task).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return None
        if hash_bytes(text.encode()) != digest:
            return None
        content = json.loads(text)
        entry = content["entry"] and ShardEntry(**content["entry"])
        sizes = {entry.name: entry.bytes, entry.index_name: entry.index_bytes} if entry else {}
        paths = {self.out / name: size for name, size in sizes.items()}
        same = content["plan"] == self.digest and inputs in (None, content["inputs"])
        if not same or not all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
            return None
        log_mel, prints = LogMelSums(*content["log_mel"]), list(map(bytes.fromhex, content["prints"]))
        lists = {name: content.get(name, []) for name in ("keys", "labels", "rejected", "silent")}
        return WrittenShard(entry=entry, num_samples=content["num_samples"], log_mel=log_mel, prints=prints, **lists)

    def remove(self) -> None:
        """Remove the folder; plan.json last, so that a run which is stopped in between can be told from others."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == PLAN_FILE):
            path.unlink()
        self.folder.rmdir()


def inputs_digest(task: ShardTask) -> str:
    """Hash what tells a shard's audio files from others, so that a changed file is read again: path, size, time, bytes.

    Times alone do not: archives, rsync and `touch -r` give another file the same one. The bytes are a few at the head,
    in the middle and at the tail.
    """
    files = dict.fromkeys((p.path, p.first_byte, p.num_bytes) for p in (clip.place for clip in task.clips))
    return hash_bytes(repr([_identity(*file) for file in files]).encode())


def _identity(path: str, first_byte: int, num_bytes: int | None) -> tuple | None:
    """Return what tells a file, or a member of an archive, from another one; None if it cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return (path, status.st_mode)
        size = status.st_size if num_bytes is None else num_bytes
        last = max(size - SAMPLED_BYTES, 0)
        with open(path, "rb", buffering=0) as file:
            parts = [os.pread(file.fileno(), SAMPLED_BYTES, first_byte + at) for at in (0, last // 2, last)]
        return (os.path.realpath(path), status.st_size, status.st_mtime_ns, hash_bytes(b"".join(parts)))
    except (OSError, ValueError):
        return None


def refuse_finished(plan: Plan, overwrite: bool) -> None:
    """Refuse an output folder that is a file, holds a dataset, or holds other files with the plan's names."""
    out = plan.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder")
    # Listed before the owners are looked for: another part may begin or finish meanwhile.
    names = set(os.listdir(out)) if out.is_dir() else set()
    if (out / JOURNAL_FOLDER / PLAN_FILE).exists():
        return
    if (out / DATASET_FILE).exists():
        if not overwrite:
            raise UserError(f"--out {out} already holds a dataset; give --overwrite to replace it, or another folder")
    elif strangers := sorted(names & _files_of(plan)):
        what = f"{strangers[0]}, which no {DATASET_FILE} or unfinished work there owns"
        raise UserError(f"--out {out} holds {what}; move it away, or choose another folder")


def _files_of(plan: Plan) -> set[str]:
    """Return the names of all files beside dataset.json that a plan may write."""
    large = [name for name, tasks in plan.splits.items() if sum(len(task.clips) for task in tasks) > LARGE_SPLIT]
    side_files = {name + suffix for name in large for suffix in (SHARDS_SUFFIX, WEIGHTS_SUFFIX)}
    return _with_indexes(task.path.name for task in plan.tasks) | side_files | set(TABLES)


def _with_indexes(shards: Iterable[str]) -> set[str]:
    return {name.removesuffix(SHARD_SUFFIX) + suffix for name in shards for suffix in (SHARD_SUFFIX, ".json")}


def bytes_to_replace(out: Path, digest: str) -> int:
    """Count the bytes of a dataset, or of the unfinished work on another plan, that --overwrite will free."""
    if not out.is_dir() or _planned(out).digest == digest:
        return 0
    return sum(path.stat().st_size for path in _owned(out))


def _owned(out: Path) -> list[Path]:
    """Return the files of dataset.json, or of the unfinished work; everything else there is the user's."""
    names = _planned(out).files
    if (out / DATASET_FILE).exists():
        names |= {*_shards_of_dataset(out), *TABLES}
    return [path for path in out.iterdir() if path.name in names]


def _shards_of_dataset(out: Path) -> set[str]:
    """Return the names of the files that dataset.json lists; none if it cannot be read."""
    try:
        splits = json.loads((out / DATASET_FILE).read_bytes())["splits"]
        names = _with_indexes(shard["name"] for split in splits.values() for shard in split["shards"])
        for name in (name for name, split in splits.items() if "shards_file" in split):
            table = ShardTable(name, (out / f"{name}{SHARDS_SUFFIX}").read_bytes())
            names |= _with_indexes(table.column("name")) | {name + SHARDS_SUFFIX, name + WEIGHTS_SUFFIX}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in names if SHARD_FILES.fullmatch(name)}


@contextmanager
def claimed(plan: Plan, shards: range, command: str, overwrite: bool) -> Iterator[tuple[Journal, FileLock]]:
    """Hold some shards of the output folder: nobody else writes them, and no dataset.json while shards change.

    Keeps what was finished on the same plan. Leaves no temporary files, and no folder in which nothing was finished.
    """
    out, journal = plan.out, Journal(plan.out, plan.digest)
    created = not out.exists()
    lock = _open_lock(journal)
    at = os.fstat(lock.file.fileno())
    journal = replace(journal, place=(at.st_dev, at.st_ino))
    try:
        _prepare(plan, journal, lock, command, overwrite)
        if shards and not lock.take(shards):
            raise UserError(f"another run is writing these shards of {out}; wait for it, or stop it")
        lock.release(SETUP)
        sweep(out, {plan.tasks[number].path.name for number in shards})
        yield journal, lock
    finally:
        if lock.is_current and lock.take(SETUP, wait=True) and lock.take(ALL_SHARDS):  # nobody else is at work
            sweep(out)
            if not (journal.folder / PLAN_FILE).exists() or not _owned(out):
                journal.remove()
                if created and not any(out.iterdir()):
                    out.rmdir()
        lock.file.close()


def _open_lock(journal: Journal) -> FileLock:
    """Open the lock file, and hold its setup byte."""
    while True:
        with writing(journal.folder):
            journal.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock((journal.folder / LOCK_FILE).open("ab"))
            except FileNotFoundError:  # another run has just finished and removed the folder
                continue
        try:
            lock.take(SETUP, wait=True)
        except OSError as error:
            what = f"cannot lock {lock.file.name}: {error.strerror}"
            raise UserError(f"{what}; --out must lie on a file system that has POSIX locks") from error
        if lock.is_current:
            return lock
        lock.file.close()


def _prepare(plan: Plan, journal: Journal, lock: FileLock, command: str, overwrite: bool) -> None:
    """Make the folder one of this plan: resume, begin, or discard what is there and begin."""
    out = journal.out
    found = _planned(out)
    if found.digest == journal.digest:
        return
    if found.digest and not overwrite:
        other = f"`{found.command}`, which has other clips, labels or options than this command"
        repair = "finish that, give --overwrite to discard it, or choose another folder"
        raise UserError(f"--out {out} holds the unfinished work of {other}; {repair}")
    refuse_finished(plan, overwrite)
    if found.digest or (out / DATASET_FILE).exists():
        if not lock.take(ALL_SHARDS):
            raise UserError(f"another run is writing into {out}; wait for it, or stop it")
        old = _owned(out)
        # Named first: a run that is killed while it removes them has removed what else names them.
        _write_plan(journal, Planned(DISCARDING, command, {path.name for path in old}))
        (out / DATASET_FILE).unlink(missing_ok=True)  # first, for it vouches for the rest
        records = [path for path in journal.folder.iterdir() if path.name not in (LOCK_FILE, PLAN_FILE)]
        for path in records + old:
            path.unlink()
        lock.release(ALL_SHARDS)
    _write_plan(journal, Planned(journal.digest, command, _files_of(plan)))


@dataclass(frozen=True)
class Planned:
    """The content of plan.json."""

    digest: str = ""  # of the plan; "" if there is no plan
    command: str = ""
    files: set[str] = field(default_factory=set)  # of --out that are its own, once they are there


def _write_plan(journal: Journal, planned: Planned) -> None:
    with writing(journal.folder / PLAN_FILE):
        content = {"plan": planned.digest, "command": planned.command, "files": sorted(planned.files)}
        write_whole_file(journal.folder / PLAN_FILE, json.dumps(content) + "\n")


def _planned(out: Path) -> Planned:
    """Return the unfinished work in a folder. If plan.json is damaged, the files of finished shards are known."""
    try:
        content = json.loads((out / JOURNAL_FOLDER / PLAN_FILE).read_bytes())
        files = {name for name in content["files"] if SHARD_FILES.fullmatch(name) or name in TABLES}
        return Planned(content["plan"], content["command"], files)
    except FileNotFoundError:
        return Planned()
    except (ValueError, LookupError, TypeError):
        records = (out / JOURNAL_FOLDER).glob(f"*{RECORD_SUFFIX}")
        shards = _with_indexes(path.name.removesuffix(RECORD_SUFFIX) for path in records)
        return Planned("damaged", "unknown", shards | set(TABLES))


def sweep(out: Path, shards: set[str] | None = None) -> None:
    """Remove the temporary files of this run, or of one that was killed, for some shards or for all."""
    for folder in (out, out / JOURNAL_FOLDER):
        for path in folder.glob(f"*{TEMPORARY_SUFFIX}") if folder.is_dir() else ():
            name, _, _ = path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")  # drops the process id
            ours = folder != out or SHARD_FILES.fullmatch(name) or name in (DATASET_FILE, *TABLES)
            shard = name.removesuffix(SHARD_SUFFIX).removesuffix(RECORD_SUFFIX).removesuffix(".json") + SHARD_SUFFIX
            if ours and (shards is None or shard in shards):
                path.unlink(missing_ok=True)
