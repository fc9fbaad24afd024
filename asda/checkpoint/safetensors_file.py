"""Build a .safetensors file in memory, so that it is written without another copy.

A save during training takes the training's cores, and the library's writer goes through the page cache, which is slow
(asda/system.py). The library reads these files. The format: huggingface.co/docs/safetensors#format
"""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from asda.checkpoint.manifest import FileEntry
from asda.system import hash_bytes, write_past_cache

DTYPE_NAMES = {  # by safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
HEADER_ALIGNMENT = 8  # of the first tensor


class FileImage:
    """The bytes of a .safetensors file.

    Args:
        tensors: give names, types and shapes; copy_from copies the numbers.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._header = _header(tensors)
        self.num_bytes = len(self._header) + sum(tensor.nbytes for tensor in tensors.values())
        self._bytes = _memory(self.num_bytes, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        self._bytes[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)

    def is_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these tensors have the names, types and shapes of the image."""
        return self._header == _header(tensors)

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the numbers of the tensors; those on a GPU arrive in the order of its current stream."""
        start = len(self._header)
        for tensor in tensors.values():
            place = self._bytes[start : start + tensor.nbytes]
            content = tensor.detach().contiguous().view(-1).view(torch.uint8)
            if tensor.is_cuda:
                place.copy_(content, non_blocking=True)
            else:  # torch's own copy would start a second team of OpenMP threads beside that of the training
                np.copyto(place.numpy(), content.numpy())
            start += tensor.nbytes

    def write(self, path: Path) -> FileEntry:
        """Write the file, and wait until it is on the disk; return its size and hash. Raises OSError."""
        content = memoryview(cast(Any, self._bytes.numpy()))
        write_past_cache(path, content)
        return FileEntry(self.num_bytes, hash_bytes(content))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length of the header, then the header: JSON, and spaces that align the tensors after it."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _memory(num_bytes: int, pinned: bool) -> Tensor:
    """Return memory that begins at a page, uint8 [num_bytes]."""
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
