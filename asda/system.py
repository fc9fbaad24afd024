"""Services of the operating system, each used in one way: whole files, locks, hashes, the process's memory.

Large files skip the page cache where the disk allows it. The cache costs the processor a page at a time: 1.4 GiB saved
beside a training took 3.8 seconds of its cores, and 0.1 with O_DIRECT, where the disk fetches the bytes itself.
"""

import ctypes
import fcntl
import getpass
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EINVAL
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import xxhash

TEMPORARY_SUFFIX = ".tmp"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a folder in memory, which every container has)
LONGEST_NAME_BYTES = 120  # of a file whose temporary name begins with it; a disk allows 255, an encrypted one 143
BLOCK = 4096  # direct writes begin and end at multiples of it
WRITE_BYTES = 32 << 20  # at once
READ_BYTES = 4 << 20  # at once, to be hashed; hashing holds Python's lock, which other threads wait for
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def write_whole_file(path: Path, content: bytes | str) -> None:
    """Write a file: after a kill or a power failure it has the old content or the new. Raises OSError."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name at the end of the block, once its bytes are on the disk. Raises OSError.

    Until then it is called NAME.<process id>.tmp, with a hash for a long name. It is removed if the block fails, or
    closes the file.
    """
    name = os.fsencode(path.name)
    beginning = path.name if len(name) <= LONGEST_NAME_BYTES else hash_bytes(name)
    temporary = path.with_name(f"{beginning}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            if file.closed:
                return
        sync(temporary)
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename_durably(old: Path, new: Path) -> None:
    """Rename a file or a folder in one step, and wait until the new name is on the disk."""
    os.replace(old, new)
    sync(new.parent)


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_past_cache(path: Path, content: memoryview) -> None:
    """Write a file from memory that begins at a page, and wait until it is on the disk. Raises OSError.

    It is not whole until this returns: write it into a temporary folder.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        direct = _set_direct(descriptor, True)
        while content:
            if direct and len(content) < BLOCK:
                direct = _set_direct(descriptor, False)
            size = min(WRITE_BYTES, len(content) // BLOCK * BLOCK if direct else len(content))
            try:
                content = content[os.write(descriptor, content[:size]) :]
            except OSError as error:
                if not (direct and error.errno == EINVAL):
                    raise
                direct = _set_direct(descriptor, False)  # this disk takes no direct writes, or none from here
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Switch direct access; return whether it is on, which a file system may refuse."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return direct


def hash_bytes(content: bytes | memoryview) -> str:
    """Return the xxh3_128 of bytes in memory, in hexadecimal digits."""
    view = memoryview(content)
    return hash_pieces(view[start : start + READ_BYTES] for start in range(0, len(view), READ_BYTES))


def hash_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the xxh3_128 of bytes that come in pieces, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path, *, from_disk: bool = False) -> str:
    """Return the xxh3_128 of a file's bytes; `from_disk` reads them past the page cache. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, READ_BYTES) as buffer, memoryview(buffer) as block:
        direct = from_disk and _set_direct(file.fileno(), True)
        while True:
            try:
                num_bytes = file.readinto(block)
            except OSError as error:
                if not (direct and error.errno == EINVAL):
                    raise
                direct = _set_direct(file.fileno(), False)
                continue
            if not num_bytes:
                return digest.hexdigest()
            digest.update(block[:num_bytes])


class FileLock:
    """Locks of a file that is open for writing, or of ranges of its bytes. They end with the process, however it ends.

    POSIX locks also hold on network disks, and a process never takes them from itself. With `between_threads`, the lock
    is of the whole file, and excludes every other opening of it, in this process too.
    """

    def __init__(self, file: IO, *, between_threads: bool = False):
        self.file = file
        self._between_threads = between_threads

    def take(self, where: range = range(0), *, wait: bool = False) -> bool:
        """Lock a range of bytes, by default all; return whether it worked. Raises OSError if the disk has no locks."""
        operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            if self._between_threads:
                fcntl.flock(self.file, operation)
            else:
                fcntl.lockf(self.file, operation, len(where), where.start)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                return False
            raise
        return True

    def release(self, where: range) -> None:
        """Unlock a range of bytes; closing the file unlocks all."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, len(where), where.start)

    @property
    def is_current(self) -> bool:
        """Whether the file still has its name: another process may have removed or renamed it."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.file.name))
        except FileNotFoundError:
            return False


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME or ~/.cache; if it cannot be written, as in a container, a folder of this user in /tmp."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if folder.is_absolute() and os.access(existing, os.W_OK):
        return folder
    return Path(tempfile.gettempdir(), f"asda-{os.getuid()}")


def complete_environment() -> None:
    """Set what libraries ask for and a container may lack: the user's name, a folder for temporary files."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the number has no entry in /etc/passwd
        os.environ["LOGNAME"] = f"user-{os.getuid()}"
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # only mounted folders can be written
        os.environ["TMPDIR"] = SHARED_MEMORY


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of loops by numba when it is first called; it then runs without Python's lock.

    The machine code is kept in a folder where one can be written, as numba chooses; elsewhere each process compiles.
    """
    from numba import njit  # takes half a second

    options = {"nogil": True, "error_model": "numpy"}
    try:
        found: Any = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder, nor NUMBA_CACHE_DIR, nor HOME can be written
        return njit(**options)(function)
    found._cache.save_overload = partial(_unless_the_disk_fails, found._cache.save_overload)
    return found


def _unless_the_disk_fails(save: Callable[..., None], *what: object) -> None:
    with suppress(OSError):  # full, or beyond a quota
        save(*what)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that clips and tensors give back, for the next ones.

    It would return large pieces to the system at once, and every page that comes back costs a fault: 0.1 ms a clip, and
    on two cores more than a second of a step of ASDA-base that takes two. Without glibc, nothing happens.
    """
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)
