"""Files as the disk has them: written and read past the page cache where it allows that, synced, hashed.

What goes through the page cache costs the processor a page at a time: 1.4 GiB that were saved beside a training took
3.8 seconds of its cores, and 0.1 with O_DIRECT, where the disk fetches the bytes itself.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from errno import EINVAL
from pathlib import Path

import xxhash

BLOCK = 4096  # direct writes begin and end at multiples of it
WRITE_BYTES = 32 << 20  # at once
READ_BYTES = 4 << 20  # at once, to be hashed; hashing holds Python's lock, which other threads wait for


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: memoryview) -> None:
    """Write a file from memory that begins at a page, and wait until it is on the disk. Raises OSError."""
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


def hash_file(path: Path, *, from_disk: bool = False) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal digits.

    Args:
        path: the file.
        from_disk: read past the page cache: what the disk has, without filling memory with it.
    """
    digest = xxhash.xxh3_128()
    with mmap.mmap(-1, READ_BYTES) as buffer, memoryview(buffer) as block:
        for num_bytes in _read(path, block, from_disk):
            digest.update(block[:num_bytes])
    return digest.hexdigest()


def _read(path: Path, block: memoryview, direct: bool) -> Iterator[int]:
    """Read a file into `block` again and again; yields how many bytes came."""
    with path.open("rb", buffering=0) as file:
        direct = direct and _set_direct(file.fileno(), True)
        while True:
            try:
                num_bytes = file.readinto(block)
            except OSError as error:
                if not (direct and error.errno == EINVAL):
                    raise
                direct = _set_direct(file.fileno(), False)
                continue
            if not num_bytes:
                return
            yield num_bytes


def hash_bytes(content: memoryview) -> str:
    """The same of bytes in memory."""
    digest = xxhash.xxh3_128()
    for start in range(0, len(content), READ_BYTES):
        digest.update(content[start : start + READ_BYTES])
    return digest.hexdigest()


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Switch direct access; returns whether it is on, which a file system may refuse."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return direct


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep the memory that clips and tensors give back, for the next ones.

    It would return large pieces to the system at once, and every page that comes back costs a fault: 0.1 ms a clip, and
    on two cores more than a second of a step of ASDA-base that takes two. Where it is not glibc, nothing happens.
    """
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_MAX, 0)
        c_library.mallopt(M_TRIM_THRESHOLD, -1)
