"""Open the files of a dataset: in a local folder, or at a location that fsspec opens.

    open_storage("shards/pile")                      LocalFolder    pread
    open_storage("s3://bucket/pile")                 RemoteFolder   a request of just the bytes of each read
    open_storage("s3://bucket/pile", CacheConfig())  CachedFolder   whole files, fetched once and kept (cache.py)

A read returns bytes, or raises one sentence (fetch.py). The readers of shards verify the bytes.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asda.data.remote.cache import Cache, CacheConfig, StoredFile
from asda.data.remote.fetch import PACKAGES, RemoteFolder, without_credentials
from asda.errors import UserError

REPAIR = "restore the file, or make the dataset again with asda shards"
MAX_EVICTIONS = 20  # times that a file is fetched and removed again before it is read


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or one that it has mounted."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        """Return the file's path."""
        return str(self.folder / name)

    def read_unlisted(self, name: str, limit_bytes: int) -> bytes:
        """Return the whole of a file whose length is not known. Raises UserError if it is missing or longer."""
        path = self.folder / name
        try:
            if (num_bytes := path.stat().st_size) > limit_bytes:
                raise UserError(f"{path} has {num_bytes} bytes; at most {limit_bytes} are read")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """Return the bytes from start to stop; fewer if the file is damaged. Raises UserError if it cannot be read."""
        # Opened for each read, which takes 3 us: a dataset has more shards than a process may have open files.
        try:
            descriptor = os.open(f"{self.folder}/{file.name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            where = f"{self.where(file.name)}, bytes {start} to {stop}"
            raise UserError(f"cannot read {where}: {error.strerror}; {REPAIR}") from error

    def read_whole(self, file: StoredFile) -> bytes:
        """Return all bytes of a small file, after a look at its size."""
        path = self.folder / file.name
        _check_size(path, file, path.stat().st_size if path.is_file() else None)
        return self.read(file, 0, file.bytes)

    def mapped(self, file: StoredFile) -> mmap.mmap:
        """Map a file that is not empty into memory, after a look at its size."""
        path = self.folder / file.name
        _check_size(path, file, path.stat().st_size if path.is_file() else None)
        with path.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def read_ahead(self, file: StoredFile) -> None:
        """Let the system read the whole file in one go: disks and network mounts are slow at jumping about."""
        with suppress(OSError), (self.folder / file.name).open("rb", buffering=0) as opened:  # reading it will say so
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def renew(self, file: StoredFile) -> bool:
        """Return False: another read would give the same bytes."""
        return False

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Refuse missing files and wrong sizes, from one listing of the folder. Raises UserError."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        for file in files:
            _check_size(self.folder / file.name, file, sizes.get(file.name))


class CachedFolder(RemoteFolder):
    """A folder elsewhere, whose files are fetched whole when first needed, once for all processes of the machine."""

    def __init__(self, location: str, config: CacheConfig):
        super().__init__(location, config)
        self._cache = Cache(config.path, int(config.gib * (1 << 30)))
        self._slots = threading.BoundedSemaphore(config.downloads)
        self._announced: set[str] = set()  # hashes of files that threads fetch, or will fetch

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """Read the copy, which is fetched if need be."""
        for _ in range(MAX_EVICTIONS):
            if (data := self._cache.read(file, start, stop)) is not None:
                return data
            self._cache.fill(file, self.download)
        raise UserError(
            f"{self.where(file.name)} was pushed out of the cache {self._cache.folder} {MAX_EVICTIONS} times before "
            "it could be read: the cache is too small for the shards in use; raise data.cache_gib"
        )

    def read_ahead(self, file: StoredFile) -> None:
        """Begin to fetch the file, or queue it behind those that are being fetched."""
        if self._cache.holds(file) or file.hash in self._announced:
            return
        self._announced.add(file.hash)
        # A daemon thread: the end of the program does not wait for a file that will not be read.
        threading.Thread(target=self._fetch_ahead, args=(file,), daemon=True, name="asda-download").start()

    def renew(self, file: StoredFile) -> bool:
        """Drop the copy if its hash is wrong, so that the next read fetches another."""
        self._cache.drop_if_damaged(file)
        return True

    def _fetch_ahead(self, file: StoredFile) -> None:
        with suppress(UserError), self._slots:  # the reader of the file will meet the error
            self._cache.fill(file, self.download)
        self._announced.discard(file.hash)


Storage = LocalFolder | RemoteFolder  # any thread may read anything at any time
Location = str | Path | Storage


def open_storage(location: Location, cache: CacheConfig | None = None) -> Storage:
    """Open a place without looking into it.

    Args:
        location: a local folder, or scheme://... with a scheme of asda.data.remote.fetch.PACKAGES.
        cache: where copies of remote files are kept; None keeps nothing, and every read is a request.

    Raises:
        UserError: the scheme is unknown, its package is missing, or the cache cannot be used.
    """
    if isinstance(location, Storage):
        return location
    if isinstance(location, Path) or "://" not in location:
        return LocalFolder(Path(location))
    scheme = location.partition("://")[0].lower()
    if scheme == "file":
        return LocalFolder(Path(unquote(urlsplit(location).path)))
    if scheme not in PACKAGES or "::" in location:
        raise UserError(
            f"cannot open {without_credentials(location)}: a location is a folder or begins with file://, "
            + ", ".join(f"{known}://" for known in PACKAGES)
        )
    return CachedFolder(location, cache) if cache else RemoteFolder(location, CacheConfig())


def _check_size(path: Path, file: StoredFile, found: int | None) -> None:
    if found is None:
        raise UserError(f"{path} is missing ({file.bytes} bytes expected); {REPAIR}")
    if found != file.bytes:
        raise UserError(f"{path} has {found} bytes, not {file.bytes}; {REPAIR}")
