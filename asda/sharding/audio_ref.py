"""Where the audio of one clip lies, and how it comes from there: a file, a part of a file, or a row of an HDF5 pack."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asda.data.audio.read import read_audio
from asda.data.audio.waves import MAX_SECONDS


@dataclass(frozen=True, slots=True)
class Place:
    """The audio of one clip. Two million of them are held at once, so it is small: `path` is a plain string.

    `start_s` and `stop_s` name a segment of a longer recording. A file that lasts no longer than the segment is taken
    whole: somebody cut it before, as most downloads of AudioSet are.
    """

    path: str
    start_s: float = 0.0
    stop_s: float | None = None  # None: all of the file
    entry: str = ""  # data set of an HDF5 pack, such as "waveform"; "" for any other file
    row: int | None = None  # of a data set that holds many clips
    sample_rate_hz: int = 0  # of an entry; other files know their own


def read_place(place: Place, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read one clip as int16 samples [S] at 16 kHz, S >= 400. Raises AudioError with the reason.

    16 kHz mono 16-bit audio comes out bit for bit; see read_audio.
    """
    if place.entry:
        # Imported here because h5py is an optional extra.
        from asda.sharding.packs import read_entry

        return read_entry(place.path, place.entry, place.row, place.sample_rate_hz, max_seconds)
    segment = None if place.stop_s is None else (place.start_s, place.stop_s)
    return read_audio(Path(place.path), max_seconds, segment)
