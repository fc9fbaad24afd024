"""Clips out of HDF5 packs, by h5py, the extra `hdf5`: one data set per clip, or one with a row for each."""

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from asda.data.audio.waves import (
    INT16_SCALE,
    SAMPLE_RATE_HZ,
    AudioError,
    check_format,
    check_length,
    mean_of_channels,
    resample,
    to_int16,
)
from asda.errors import UserError

if TYPE_CHECKING:
    import h5py

OPEN_PACKS = 64  # by a process at once: PANNs' AudioSet has 43, and shuffled clips come from all of them


def open_pack(path: str) -> "h5py.File":
    """Open a pack for reading. Raises UserError without h5py, or where the file is no HDF5."""
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{path} is HDF5, which needs h5py: pip install 'asda[hdf5]'")
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be opened as HDF5: {error}") from None


@lru_cache(maxsize=OPEN_PACKS)
def _kept_open(path: str) -> "h5py.File":
    return open_pack(path)  # h5py closes it when the cache lets it go


def read_entry(path: str, entry: str, row: int | None, sample_rate_hz: int, max_seconds: float) -> np.ndarray:
    """Read one clip of a pack as int16 samples [S] at 16 kHz: a whole data set, or a row of one.

    Its values are int16, or floats with full scale 1. int16 at 16 kHz comes out bit for bit. Raises AudioError.
    """
    try:
        data = _data_set(_kept_open(path), entry)
        shape = data.shape if row is None else data.shape[1:]
        if len(shape) != 1:
            raise AudioError(f"{entry} has the shape {data.shape}, which is not one clip of samples")
        if data.dtype != np.int16 and data.dtype.kind != "f":
            raise AudioError(f"{entry} holds {data.dtype}, neither int16 nor floats")
        if row is not None and row >= len(data):
            raise AudioError(f"{entry} has {len(data)} rows, and no row {row}")
        check_format(sample_rate_hz, 1)
        check_length(shape[0], sample_rate_hz, max_seconds)
        samples_S = data[:] if row is None else data[row]
    except (OSError, RuntimeError, UserError) as error:
        raise AudioError(f"HDF5: {error}") from error
    if samples_S.dtype == np.int16 and sample_rate_hz == SAMPLE_RATE_HZ:
        return samples_S
    scale = INT16_SCALE if samples_S.dtype == np.int16 else 1
    wave_S = mean_of_channels(samples_S[None].astype(np.float32) / np.float32(scale))
    return to_int16(resample(wave_S, sample_rate_hz))


def _data_set(pack: "h5py.File", entry: str) -> Any:
    import h5py

    data = pack.get(entry)
    if not isinstance(data, h5py.Dataset):
        raise AudioError(f"the pack has no data set {entry!r}")
    return data
