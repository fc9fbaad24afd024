"""Write the features of clips: through a spool on the disk, because those of a day do not fit into memory.

    .npz           like np.savez, an array for each clip and metadata.json
    .safetensors   a tensor for each clip, and the same metadata

Shapes: T time patches, F mel patches, D width.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open

from asda.inference.results import Features, mean_utterance

METADATA = "metadata.json"  # in an .npz, beside the arrays; no clip of a shard has a dot in its key
COPY_BYTES = 4 << 20
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip; bytes must not depend on the hour


class Array(NamedTuple):
    """An array of float32 in a spool."""

    shape: tuple[int, ...]
    start: int  # byte

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return 4 * math.prod(self.shape)


def to_spool(spool: IO[bytes], parts: Iterable[Features], granularity: str) -> tuple[Array, float]:
    """Append the features of a clip, part by part; return where they lie, and the centre of the first in seconds."""
    start, steps, chunks = spool.tell(), [], []
    shape: tuple[int, ...] = ()
    first_s = None
    for part in parts:
        first_s = float(part.times_s[0]) if first_s is None else first_s
        steps.append(len(part.times_s))
        if granularity == "utterance":
            chunks.append(part.utterance)
            continue
        array = (part.frames if granularity == "frame" else part.patches).numpy()
        shape = array.shape[1:]
        spool.write(array.tobytes())
    if granularity == "utterance":
        utterance_D = mean_utterance(chunks, steps).numpy()
        spool.write(utterance_D.tobytes())
        return Array(utterance_D.shape, start), first_s or 0.0
    return Array((sum(steps), *shape), start), first_s or 0.0


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
