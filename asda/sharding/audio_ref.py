"""References to the audio of one clip, and how they are read: from a file, a part of it, HDF5, tar or parquet."""

import importlib.util
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
    import pyarrow
    import pyarrow.parquet

PARQUET_EXTENSION = ".parquet"
COPIED_AT_ONCE = 1 << 20  # bytes
NUM_OLD_FIELDS, NO_NEW_FIELDS = 6, (False, None, 0, None)  # of a Place, when unfinished work was first resumed


@dataclass(frozen=True, slots=True)
class Place:
    """The audio of one clip. Two million of them are held at once, so it is small: `path` is a plain string.

    `start_s` and `stop_s` name a segment of a longer recording. A file that lasts no longer than the segment is read
    whole, unless `exact`: somebody cut it before, as most downloads of AudioSet are.
    """

    path: str
    start_s: float = 0.0
    stop_s: float | None = None  # None: all of the file
    entry: str = ""  # data set of an HDF5 pack, such as "waveform"; "" for any other file
    row: int | None = None  # of a data set that holds many clips
    sample_rate_hz: int = 0  # of an entry; other files know their own
    exact: bool = False  # the segment is that of the file, whatever its length
    channel: int | None = None  # None: the mean of all
    first_byte: int = 0  # of a file in a tar archive, and its size
    num_bytes: int | None = None

    def cut(self, start_s: float, stop_s: float) -> "Place":
        """Return the part of the file from start to stop, in seconds."""
        return replace(self, start_s=start_s, stop_s=stop_s, exact=True)

    @property
    def in_pack(self) -> bool:
        """Whether it lies in an HDF5 pack."""
        return bool(self.entry) and not self.path.endswith(PARQUET_EXTENSION)

    @property
    def recording(self) -> tuple:
        """Its recording: equal for all segments of one."""
        return self.path, self.entry, self.row, self.first_byte

    @property
    def identity(self) -> tuple:
        """All fields but the path, for the plan's digest; those that were added later only if they are set."""
        old, new = astuple(self)[1:NUM_OLD_FIELDS], astuple(self)[NUM_OLD_FIELDS:]
        return ("", *old, *new) if new != NO_NEW_FIELDS else ("", *old)


def read_place(place: Place, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read one clip as int16 samples [S] at 16 kHz, S >= 400, as read_audio does. Raises AudioError with the reason."""
    if place.in_pack:
        return _read_entry(place, max_seconds)
    segment = None if place.stop_s is None else (place.start_s, place.stop_s, place.exact)
    with audio_file(place) as path:
        return read_audio(path, max_seconds, segment, place.channel)


@contextmanager
def audio_file(place: Place) -> Iterator[Path]:
    """Give the file of a clip; one inside an archive is a temporary copy. Raises AudioError."""
    if place.num_bytes is None and not place.entry:
        yield Path(place.path)
        return
    with tempfile.NamedTemporaryFile() as copy:
        try:
            if place.entry:
                copy.write(_parquet_bytes(place))
            else:
                _copy_member(place, copy)
            copy.flush()
        except OSError as error:
            raise AudioError(f"the archive cannot be read: {error}") from error
        yield Path(copy.name)


def _copy_member(place: Place, copy: IO[bytes]) -> None:
    """Copy a file from a tar archive."""
    left = place.num_bytes or 0
    with open(place.path, "rb") as archive:
        archive.seek(place.first_byte)
        while left and (piece := archive.read(min(left, COPIED_AT_ONCE))):
            copy.write(piece)
            left -= len(piece)
    if left:
        raise AudioError("the archive ends before it")


def _parquet_bytes(place: Place) -> bytes:
    """Return the bytes of an audio file from a parquet file, whose row group is read for it."""
    row = place.row or 0
    try:
        firsts = _first_rows(place.path)
        group = bisect_right(firsts, row) - 1
        content = _row_group(place.path, group, place.entry)[row - firsts[group]].as_py()
    except (ValueError, LookupError, UserError) as error:  # what pyarrow raises are such, or OSErrors
        raise AudioError(f"parquet: {error}") from error
    if content is None:
        raise AudioError("its cell is empty")
    return content


def open_parquet(path: str) -> "pyarrow.parquet.ParquetFile":
    """Open a parquet file. Raises UserError if pyarrow is missing or the file is not parquet."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} is parquet, which needs pyarrow: pip install 'asda[parquet]'")
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be opened as parquet: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=256)
def _first_rows(path: str) -> list[int]:
    """Return the number of the first row of every row group."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=4)  # Hugging Face writes 100 MB or 100 rows a group; shuffled clips come from all of them
def _row_group(path: str, number: int, column: str) -> "pyarrow.ChunkedArray":
    """Read the audio of a row group."""
    with open_parquet(path) as file:
        return struct_bytes(file.read_row_group(number, columns=[f"{column}.bytes"]).column(column))


def struct_bytes(cells: "pyarrow.ChunkedArray") -> "pyarrow.ChunkedArray":
    """Return the field `bytes` of a column of structs."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(cells, "bytes")  # pyright: ignore[reportAttributeAccessIssue]


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
        if place.channel:
            raise AudioError(f"has 1 channel, counted from 0, and no channel {place.channel}")
        check_length(shape[0], rate_hz, max_seconds)
        samples_S = data[:] if row is None else data[row]
    except (OSError, RuntimeError, UserError) as error:
        raise AudioError(f"HDF5: {error}") from error
    if samples_S.dtype == np.int16 and rate_hz == SAMPLE_RATE_HZ:
        return samples_S
    scale = INT16_SCALE if samples_S.dtype == np.int16 else 1
    wave_S = mean_of_channels(samples_S[None].astype(np.float32) / np.float32(scale))
    return to_int16(resample(wave_S, rate_hz))
