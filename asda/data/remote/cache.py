"""A bounded folder of copies on the local disk, shared by all processes of a machine.

    0123...cdef         a whole, verified file, named by the hash of its content
    0123...cdef.part    one that is being fetched; its writer holds a lock (flock) on it
    lock                held while room is made, and while a file gets its name

- A verified file gets its name by one rename, so a file with a name is whole. A crash leaves .part files without a
  lock, which the next process removes. After a power failure a file may have lost bytes: the hash of a frame shows it
  on reading, and the file is fetched again.
- A .part has its full length from the beginning: the sum of all lengths is what the cache holds or will hold, and never
  exceeds the bound.
- Room is made by removing the files that were used longest ago. A reader that has opened a removed file still reads all
  of it (POSIX keeps the bytes until it is closed). The next reader fetches it again.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from asda.errors import UserError
from asda.system import FileLock, cache_folder, hash_file

POLL_S = 0.05  # between two looks at what another process does
PART = ".part"
OURS = re.compile(r"[0-9a-f]{32}(\.part)?")  # no other file in the folder is counted, or ever removed


@dataclass(frozen=True)
class StoredFile:
    """One file of a dataset, as its index describes it."""

    name: str
    bytes: int
    hash: str  # xxh3_128:...

    @property
    def digest(self) -> str:
        """The digits of the hash, without its kind."""
        return self.hash.rpartition(":")[2]


@dataclass(frozen=True)
class CacheConfig:
    """How remote files are fetched, and where copies of them are kept."""

    folder: str | Path = ""  # "": asda/shards below system.cache_folder()
    gib: float = 20.0  # bound of the whole folder
    timeout_s: float = 30.0  # a server may be silent this long
    downloads: int = 4  # fetched ahead at a time
    attempts: int = 6  # per file
    give_up_s: float = 120.0  # after which no further attempt is made

    @property
    def path(self) -> Path:
        """The folder in use."""
        return Path(self.folder or cache_folder() / "asda" / "shards")


class Cache:
    """The folder of copies. Any thread of any process may use it at any time."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self.limit_bytes = limit_bytes
        with self._sentences():
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def holds(self, file: StoredFile) -> bool:
        """Return whether there is a copy of the file; counts as a use."""
        _note_use(self.path(file))
        return self.path(file).exists()

    def path(self, file: StoredFile) -> Path:
        """Return the path of a copy."""
        return self.folder / file.digest

    def read(self, file: StoredFile, start: int, stop: int) -> bytes | None:
        """Return the bytes from start to stop, fewer if the copy has lost some; None if there is no copy."""
        with self._sentences(), suppress(FileNotFoundError), self.path(file).open("rb", buffering=0) as copy:
            _note_use(copy.fileno())
            return os.pread(copy.fileno(), stop - start, start)
        return None

    def fill(self, file: StoredFile, download: Callable[[StoredFile, BinaryIO], None]) -> None:
        """Make a copy of a file; if another process is fetching it, wait for that instead.

        `download` writes the whole file, and raises unless it is the right one.

        Raises:
            UserError: it does not fit, or the folder cannot be written.
        """
        path = self.path(file).with_suffix(PART)
        with self._sentences():
            while (part := _open_locked(path)) is None:
                if self.path(file).exists():
                    return
                time.sleep(POLL_S)
            with part:
                if self.path(file).exists():  # another process has made it meanwhile
                    path.unlink(missing_ok=True)
                    return
                try:
                    while not self._reserve(part, file):
                        time.sleep(POLL_S)
                    download(file, part)
                    part.flush()
                    with self._locked():  # or a look at the folder might see neither name
                        os.replace(path, self.path(file))  # not synced: a copy can be fetched again
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise

    def drop_if_damaged(self, file: StoredFile) -> None:
        """Remove the copy, unless the whole of it has the right hash."""
        with self._sentences(), suppress(FileNotFoundError):
            if hash_file(self.path(file)) != file.digest:
                self.path(file).unlink()

    def _reserve(self, part: BinaryIO, file: StoredFile) -> bool:
        """Make room, and give the .part its full length; return False while unfinished files of others take the room.

        Waiting for those cannot last forever: each has its room already, and ends by itself.
        """
        if file.bytes > self.limit_bytes:
            raise UserError(
                f"{file.name} has {file.bytes} bytes and the cache {self.folder} may hold {self.limit_bytes}; "
                "raise data.cache_gib"
            )
        with self._locked():
            self._sweep()
            found = [entry for entry in self._files() if entry[0] != Path(part.name)]
            held = sum(stat.st_size for _, stat in found)
            to_come = sum(max(stat.st_size - stat.st_blocks * 512, 0) for path, stat in found if path.suffix == PART)
            whole = [entry for entry in found if entry[0].suffix != PART]
            for path, stat in sorted(whole, key=lambda entry: entry[1].st_mtime_ns):
                if held + file.bytes <= self.limit_bytes and self._free() >= file.bytes + to_come:
                    break
                path.unlink(missing_ok=True)
                held -= stat.st_size
            if (free := self._free()) < file.bytes + to_come:
                raise UserError(
                    f"the disk of the cache {self.folder} has {free} bytes free, {file.name} needs {file.bytes}"
                    + (f" and unfinished files need {to_come}" if to_come else "")
                    + "; free some space, or give another folder as data.cache"
                )
            fits = held + file.bytes <= self.limit_bytes
            if fits:
                part.truncate(file.bytes)
            return fits

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("wb") as lock:
            FileLock(lock, between_threads=True).take(wait=True)
            yield

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        files = []
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # renamed or removed since the folder was listed
                    files.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        return files

    def _sweep(self) -> None:
        """Remove the .part files that a crash has left."""
        for path, _ in self._files():
            if path.suffix == PART and (part := _open_locked(path, create=False)):
                path.unlink(missing_ok=True)
                part.close()

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot use the cache {self.folder}: {error.strerror}; free some space, or give another folder as "
                "data.cache"
            ) from error


def _open_locked(path: Path, *, create: bool = True) -> BinaryIO | None:
    """Open and lock a .part; return None if another holds it, or has renamed or removed it since it was opened."""
    flags = os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        part = open(path, "r+b", opener=lambda name, mode: os.open(name, mode | flags, 0o666))  # noqa: SIM115
    except FileNotFoundError:
        return None
    lock = FileLock(part, between_threads=True)
    if lock.take() and lock.is_current:
        return part
    part.close()
    return None


def _note_use(copy: Path | int) -> None:
    with suppress(FileNotFoundError, PermissionError):  # removed just now; written by another user
        os.utime(copy)
