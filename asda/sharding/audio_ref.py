"""References to the audio of one clip, and how they are read: from a file, a part of a file, or an HDF5 pack."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from asda.data.audio.read import read_audio
from asda.data.audio.resampling import resample
from asda.data.audio.waves import (
    INT16_SCALE,
    MAX_SECONDS,
    SAMPLE_RATE_HZ,
    AudioError,
    check_format,
    check_length,
    mean_of_channels,
    to_int16,
)
from asda.errors import UserError

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True, slots=True)
class Place:
    """The audio of one clip. Two million of them are held at once, so it is small: `path` is a plain string.

    `start_s` and `stop_s` name a segment of a longer recording. A file that lasts no longer than the segment is read
    whole: somebody cut it before, as most downloads of AudioSet are.
    """

    path: str
    start_s: float = 0.0
    stop_s: float | None = None  # None: all of the file
    entry: str = ""  # data set of an HDF5 pack, such as "waveform"; "" for any other file
    row: int | None = None  # of a data set that holds many clips
    sample_rate_hz: int = 0  # of an entry; other files know their own


def read_place(place: Place, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read one clip as int16 samples [S] at 16 kHz, S >= 400, as read_audio does. Raises AudioError with the reason."""
    if place.entry:
        return _read_entry(place, max_seconds)
    segment = None if place.stop_s is None else (place.start_s, place.stop_s)
    return read_audio(Path(place.path), max_seconds, segment)


def open_pack(path: str) -> "h5py.File":
    """Open a pack for reading. Raises UserError if h5py is missing or the file is not HDF5."""
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{path} is HDF5, which needs h5py: pip install 'asda[hdf5]'")
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be opened as HDF5: {error}") from None


# PANNs' AudioSet has 43 packs, and shuffled clips come from all of them. h5py closes a pack when the cache drops it.
_kept_open = lru_cache(maxsize=64)(open_pack)


def _read_entry(place: Place, max_seconds: float) -> np.ndarray:
    """Read a whole data set, or a row of one: int16, or floats with full scale 1."""
    entry, row, rate_hz = place.entry, place.row, place.sample_rate_hz
    try:
        data: Any = _kept_open(place.path).get(entry)
        if not hasattr(data, "shape"):  # a group has none
            raise AudioError(f"the pack has no data set {entry!r}")
        shape = data.shape if row is None else data.shape[1:]
        if len(shape) != 1:
            raise AudioError(f"{entry} has the shape {data.shape}, which is not one clip of samples")
        if data.dtype != np.int16 and data.dtype.kind != "f":
            raise AudioError(f"{entry} holds {data.dtype}, neither int16 nor floats")
        if row is not None and row >= len(data):
            raise AudioError(f"{entry} has {len(data)} rows, and no row {row}")
        check_format(rate_hz, 1)
        check_length(shape[0], rate_hz, max_seconds)
        samples_S = data[:] if row is None else data[row]
    except (OSError, RuntimeError, UserError) as error:
        raise AudioError(f"HDF5: {error}") from error
    if samples_S.dtype == np.int16 and rate_hz == SAMPLE_RATE_HZ:
        return samples_S
    scale = INT16_SCALE if samples_S.dtype == np.int16 else 1
    wave_S = mean_of_channels(samples_S[None].astype(np.float32) / np.float32(scale))
    return to_int16(resample(wave_S, rate_hz))
