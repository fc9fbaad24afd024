"""Files are written whole, locked, and hashed; past the page cache they are what the libraries read, on any disk."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from asda import system as disk
from asda.checkpoint.safetensors_file import DTYPE_NAMES, FileImage
from asda.system import BLOCK, FileLock, hash_file, whole_file, write_whole_file

Patch = pytest.MonkeyPatch


def as_usual(patch: Patch) -> None:
    pass


def refused_at_once(patch: Patch) -> None:
    """As a file system without O_DIRECT does."""
    patch.setattr(
        fcntl, "fcntl", refusing(fcntl.fcntl, lambda call: call[1] == fcntl.F_SETFL and call[2] & os.O_DIRECT)
    )


def refused_later(patch: Patch) -> None:
    """As one does that learns of the alignment only when it is to write."""
    patch.setattr(os, "write", refusing(os.write, lambda call: fcntl.fcntl(call[0], fcntl.F_GETFL) & os.O_DIRECT))


def in_small_pieces(patch: Patch) -> None:
    """As a disk may take less than it is given, in places where no direct write may begin."""
    write = os.write
    patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:1000]))
    patch.setattr(disk, "WRITE_BYTES", BLOCK)


def refusing(function: Callable[..., Any], when: Callable[[tuple[Any, ...]], object]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if when(arguments):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return function(*arguments)

    return call


DISKS = [as_usual, refused_at_once, refused_later, in_small_pieces]


@pytest.mark.parametrize("a_disk", DISKS)
@pytest.mark.parametrize("num_values", [0, 1, 900, 5_000, 300_000])
def test_an_image_is_a_file_that_safetensors_reads(a_disk, num_values: int, tmp_path: Path, monkeypatch: Patch):
    tensors = {f"{dtype}": torch.randn(num_values).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(7.0), "turned": torch.randn(3, 5).T, 'a "name" in UTF-8: é': torch.ones(1, 2)}
    a_disk(monkeypatch)
    path = tmp_path / "image.safetensors"
    image = FileImage(tensors)
    image.copy_from(tensors)
    entry = image.write(path)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert entry.bytes == path.stat().st_size == image.num_bytes
    assert entry.xxh3_128 == xxhash.xxh3_128_hexdigest(path.read_bytes())
    with safe_open(path, "pt") as opened:
        assert opened.get_slice("turned").get_shape() == [5, 3]


def test_an_image_takes_new_numbers_and_no_other_shapes(tmp_path: Path):
    tensors = {"a": torch.zeros(1000, 3), "b": torch.zeros(5)}
    image = FileImage(tensors)
    for number in (1.0, 2.0):
        image.copy_from({name: tensor + number for name, tensor in tensors.items()})
        image.write(tmp_path / "image")  # the second time over the first
        assert all((tensor == number).all() for tensor in load_file(tmp_path / "image").values())
    assert image.is_of({name: torch.ones_like(tensor) for name, tensor in tensors.items()})
    assert not image.is_of({"a": torch.zeros(3, 1000), "b": torch.zeros(5)})
    assert not image.is_of({"a": torch.zeros(1000, 3).double(), "b": torch.zeros(5)})
    assert not image.is_of({"b": torch.zeros(5), "a": torch.zeros(1000, 3)})


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("a_disk", [as_usual, refused_at_once])
@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK, BLOCK + 1, disk.READ_BYTES, disk.READ_BYTES + 511])
def test_the_hash_of_a_file_is_that_of_its_bytes(num_bytes: int, a_disk, from_disk: bool, tmp_path, monkeypatch: Patch):
    content = np.random.default_rng(num_bytes).bytes(num_bytes)
    (tmp_path / "file").write_bytes(content)
    a_disk(monkeypatch)
    assert hash_file(tmp_path / "file", from_disk=from_disk) == xxhash.xxh3_128_hexdigest(content)


def test_a_whole_file_has_the_old_content_until_the_new_is_whole(tmp_path: Path):
    path = tmp_path / "file"
    write_whole_file(path, "old")
    with suppress(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("old", 2)
        raise ZeroDivisionError
    with whole_file(path) as file:
        file.write(b"given up")
        file.close()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "old")]
    with whole_file(path) as file:
        file.write(b"new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "new")]


TAKES = "import sys; from asda.system import FileLock; f = open(sys.argv[1], 'a'); print(FileLock(f).take(range(3, 5)))"


@pytest.mark.parametrize("name", ["x" * 255, "鳥" * 85, "\udce9" * 255, "x" * 121, "short"])
def test_any_name_that_the_disk_allows_is_written_whole(name: str, tmp_path: Path):
    with whole_file(tmp_path / name) as file:
        file.write(b"content")
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.endswith(f".{os.getpid()}.tmp")
        assert len(os.fsencode(temporary.name)) < 143  # what an encrypted disk allows
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"content")]


def test_a_range_that_is_locked_is_refused_to_other_processes_alone(tmp_path: Path):
    path = tmp_path / "lock"
    with path.open("a") as file:
        lock = FileLock(file)
        for mine, theirs in ((range(9), "False"), (range(4, 5), "False"), (range(5, 9), "True"), (range(0), "False")):
            assert lock.take(mine)
            assert lock.take(mine)
            assert subprocess.check_output([sys.executable, "-c", TAKES, path], text=True).strip() == theirs
            lock.release(range(0))
        assert lock.is_current
        path.unlink()
        assert not lock.is_current


def test_a_lock_between_threads_excludes_another_opening_of_the_file(tmp_path: Path):
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert FileLock(first, between_threads=True).take()
        assert not FileLock(second, between_threads=True).take()
