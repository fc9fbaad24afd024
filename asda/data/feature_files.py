"""Files of features: arrays of float32 and metadata, as .npz or .safetensors. Any size: they are copied in pieces.

Both are what the libraries write of whole arrays; reading them needs no code of ours.
"""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open

METADATA = "metadata.json"  # in an .npz, beside the arrays; no clip of a shard has a dot in its key
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip; bytes must not depend on the hour
COPY_BYTES = 4 << 20


class Array(NamedTuple):
    """An array of float32 in a spool."""

    shape: tuple[int, ...]
    start: int  # byte

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return 4 * math.prod(self.shape)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a file of features."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return json.loads(str(arrays[METADATA]))
    with safe_open(path, "np") as tensors:
        return json.loads(tensors.metadata()["metadata"])


def write_npz(file: BinaryIO, spool: IO[bytes], arrays: dict[str, Array], metadata: str) -> None:
    """Write an .npz like np.savez, but with a fixed date, and with any key."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{METADATA}.npy", ZIP_DATE), "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.array(metadata), allow_pickle=False)
        for key, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy", ZIP_DATE), "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                copy(spool, array, member)


def write_safetensors(file: BinaryIO, spool: IO[bytes], arrays: dict[str, Array], metadata: str) -> None:
    """Write a .safetensors; its metadata is one string, because the order of several would be random."""
    header: dict[str, Any] = {"__metadata__": {"metadata": metadata}}
    end = 0
    for key, array in sorted(arrays.items()):  # as the library sorts them
        start, end = end, end + array.num_bytes
        header[key] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in sorted(arrays.items()):
        copy(spool, array, file)


def copy(spool: IO[bytes], array: Array, file: IO[bytes]) -> None:
    """Copy the bytes of an array out of the spool, in pieces."""
    spool.seek(array.start)
    for left in range(array.num_bytes, 0, -COPY_BYTES):
        file.write(spool.read(min(left, COPY_BYTES)))


WRITERS: dict[str, Callable[[BinaryIO, IO[bytes], dict[str, Array], str], None]] = {
    "npz": write_npz,
    "safetensors": write_safetensors,
}
