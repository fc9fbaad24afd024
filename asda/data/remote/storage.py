"""Where shards lie: a local folder, or a location that fsspec opens.

    open_storage("shards/pile")                      LocalFolder    pread
    open_storage("s3://bucket/pile")                 RemoteFolder   a request of just the bytes of each read
    open_storage("s3://bucket/pile", CacheConfig())  CachedFolder   whole files, fetched once and kept (cache.py)

Every way ends in the bytes that the dataset's indexes promise, or in one sentence (fetch.py).
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asda.data.remote.cache import Cache, CacheConfig, StoredFile
from asda.data.remote.fetch import PACKAGES, Fetcher, without_credentials
from asda.data.shards.index import DATASET_FILE, REPAIR
from asda.errors import UserError

EVICTIONS_BORNE = 20  # times that a file is fetched, and gone again before it could be read


class Storage(ABC):
    """A folder of files, somewhere. Any thread may read anything at any time."""

    @abstractmethod
    def where(self, name: str) -> str:
        """The file's place, for messages."""

    @abstractmethod
    def read_dataset_file(self, limit_bytes: int) -> bytes:
        """The dataset file, the one that no index describes. Raises UserError where it is missing or longer."""

    @abstractmethod
    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """The bytes from start to stop; fewer where the file is damaged. Raises UserError where it cannot be read."""

    def read_whole(self, file: StoredFile) -> bytes:
        """All bytes of a small file."""
        return self.read(file, 0, file.bytes)

    @abstractmethod
    def read_ahead(self, file: StoredFile) -> None:
        """Begin to bring the file near, in the background; reading does not depend on it."""

    @abstractmethod
    def renew(self, file: StoredFile) -> bool:
        """After a read gave wrong bytes: drop a damaged copy, and say whether reading once more may give others."""

    @abstractmethod
    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Raise UserError for missing files and wrong sizes, where looking is cheap; elsewhere fetching finds them."""

    @abstractmethod
    def close(self) -> None:
        """Stop what is under way in the background."""


def open_storage(location: str | Path | Storage, cache: CacheConfig | None = None) -> Storage:
    """Open a place without looking into it.

    Args:
        location: a local folder, or scheme://... with a scheme of asda.data.fetch.PACKAGES.
        cache: where copies of remote files are kept; without it nothing is kept, and every read is a request.

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
    fetcher = Fetcher(location, cache or CacheConfig())
    return CachedFolder(fetcher, cache) if cache else RemoteFolder(fetcher)


@dataclass(frozen=True)
class LocalFolder(Storage):
    """A folder of this machine, or one that it has mounted."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        """The file's path."""
        return str(self.folder / name)

    def read_dataset_file(self, limit_bytes: int) -> bytes:
        """All of it, after a look at its size."""
        path = self.folder / DATASET_FILE
        if not path.is_file():
            raise UserError(f"{self} holds no {DATASET_FILE}; make the dataset with asda shards --out {self}")
        if (num_bytes := path.stat().st_size) > limit_bytes:
            raise UserError(f"{path} has {num_bytes} bytes, more than {limit_bytes}: it is no index")
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """One pread."""
        # Opened for each read, which takes 3 us: a dataset has more shards than a process may have open files.
        try:
            descriptor = os.open(f"{self.folder}/{file.name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"cannot read {self.where(file.name)}, bytes {start} to {stop}: {error.strerror}; {REPAIR}"
            ) from error

    def read_whole(self, file: StoredFile) -> bytes:
        """All bytes, after a look at the size."""
        path = self.folder / file.name
        _check_size(path, file, path.stat().st_size if path.is_file() else None)
        return self.read(file, 0, file.bytes)

    def read_ahead(self, file: StoredFile) -> None:
        """Let the system read the whole file in one go: disks and network mounts are slow at jumping about."""
        try:
            descriptor = os.open(self.folder / file.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # reading it will say so
            return
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def renew(self, file: StoredFile) -> bool:
        """No: there is only this one."""
        return False

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Compare with the folder, listed once."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        for file in files:
            _check_size(self.folder / file.name, file, sizes.get(file.name))

    def close(self) -> None:
        """Nothing is under way but what the system does."""


class RemoteFolder(Storage):
    """A folder elsewhere, of which nothing is kept: for a look at a few clips."""

    def __init__(self, fetcher: Fetcher):
        self._fetcher = fetcher

    def __str__(self) -> str:
        return self.where("").rstrip("/")

    def where(self, name: str) -> str:
        """The file's address, without credentials."""
        return self._fetcher.where(name)

    def read_dataset_file(self, limit_bytes: int) -> bytes:
        """All of it; never kept, since it may change."""
        return self._fetcher.read_up_to(DATASET_FILE, limit_bytes)

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """A request of just these bytes."""
        return self._fetcher.read(file, start, stop)

    def read_ahead(self, file: StoredFile) -> None:
        """Nothing is kept, so nothing is fetched before it is needed."""

    def renew(self, file: StoredFile) -> bool:
        """Bytes may have been damaged on their way."""
        return True

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Asking for each of AudioSet's 16,000 files would take minutes."""

    def close(self) -> None:
        """End all requests."""
        self._fetcher.stopping.set()


class CachedFolder(RemoteFolder):
    """A folder elsewhere, whose files are fetched whole when first needed, once for all processes of the machine."""

    def __init__(self, fetcher: Fetcher, config: CacheConfig):
        super().__init__(fetcher)
        self._cache = Cache(config.path, config.limit_bytes)
        self._slots = threading.BoundedSemaphore(config.downloads)
        self._lock = threading.Lock()  # over the next
        self._downloads: dict[str, Future[None]] = {}  # hash -> one that waits for a slot, or runs

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """One pread of the copy, which is fetched if need be."""
        for _ in range(EVICTIONS_BORNE):
            if (data := self._cache.read(file, start, stop)) is not None:
                return data
            self._obtain(file)
        raise UserError(
            f"{self.where(file.name)} was pushed out of the cache {self._cache.folder} {EVICTIONS_BORNE} times before "
            "it could be read: the cache is too small for the shards in use; raise data.cache_gib"
        )

    def read_ahead(self, file: StoredFile) -> None:
        """Begin to fetch the file, or queue it behind those that are being fetched."""
        if self._cache.holds(file):
            return
        with self._lock:
            if file.hash in self._downloads:
                return
            future = self._downloads[file.hash] = Future()
        # A daemon: at the end of the program nobody waits for what nobody will read.
        threading.Thread(target=self._fetch_in_turn, args=(file, future), daemon=True, name="asda-download").start()

    def renew(self, file: StoredFile) -> bool:
        """Drop the copy if its hash is wrong, so that the next read fetches another."""
        self._cache.drop_if_damaged(file)
        return True

    def close(self) -> None:
        """End all transfers, and begin no other."""
        super().close()
        with self._lock:
            for future in self._downloads.values():
                future.cancel()

    def _obtain(self, file: StoredFile) -> None:
        """Fetch a file now: wait for the transfer that runs, or take the place of one that has not begun."""
        with self._lock:
            future = self._downloads.get(file.hash)
            mine = future is None or future.cancel()
            if future is None or mine:
                future = self._downloads[file.hash] = Future()
        if mine:
            self._fetch(file, future)
        future.result()

    def _fetch_in_turn(self, file: StoredFile, future: Future[None]) -> None:
        with self._slots:
            self._fetch(file, future)

    def _fetch(self, file: StoredFile, future: Future[None]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        error = None
        try:
            self._cache.fill(file, lambda part: self._fetcher.download(file, part), self._fetcher.stopping)
        except BaseException as caught:  # goes to whoever waits for the future
            error = caught
        with self._lock:
            del self._downloads[file.hash]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _check_size(path: Path, file: StoredFile, found: int | None) -> None:
    if found is None:
        raise UserError(f"{path} is missing ({file.bytes} bytes expected); {REPAIR}")
    if found != file.bytes:
        raise UserError(f"{path} has {found} bytes, {DATASET_FILE} says {file.bytes}; {REPAIR}")
