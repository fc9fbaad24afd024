"""Read audio of any format and rate as 16 kHz mono."""

from pathlib import Path

import numpy as np

from asda.data.audio.sndfile import _decode_int16, _decode_mono, _opened
from asda.data.audio.waves import MAX_SECONDS, SAMPLE_RATE_HZ, AudioError, Segment, resample, to_int16


def read_audio(path: Path, max_seconds: float = MAX_SECONDS, segment: Segment | None = None) -> np.ndarray:
    """Read a file, or the segment of a longer one, as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio comes out bit for bit. Anything else is decoded as by read_wave, resampled as by `resample`
    and rounded with saturation. A file that lasts no longer than its segment is taken whole; see part_of. Raises
    AudioError when the file cannot be used.
    """
    if demuxer := demuxer_of(path):
        return to_int16(resample(*_read_compressed(path, demuxer, max_seconds, segment)))
    with _opened(path, max_seconds, segment) as (sound, num_frames):
        exact = (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
        if exact:
            return _decode_int16(sound, num_frames)
        return to_int16(resample(_decode_mono(sound, num_frames), sound.samplerate))


def read_wave(path: Path, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """Read a file as amplitudes at its own rate: float32 [S], full scale 1, the mean of its channels; and that rate.

    At 16 kHz they make 400 samples or more. Memory is that of the result. Raises AudioError when the file cannot be
    used, for the same reasons as read_audio.
    """
    if demuxer := demuxer_of(path):
        return _read_compressed(path, demuxer, max_seconds, None)
    with _opened(path, max_seconds, None) as (sound, num_frames):
        return _decode_mono(sound, num_frames), sound.samplerate


def demuxer_of(path: Path) -> str:
    """Return FFmpeg's name of a file's format where only FFmpeg knows it, else "". Raises AudioError for no file."""
    try:
        if not path.is_file():
            raise AudioError("is not a regular file" if path.exists() else "no such file")
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error
    if not head:
        raise AudioError("the file is empty")
    if head[4:] == b"ftyp":  # MP4, M4A
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML: Matroska, WebM
        return "matroska"
    # ADTS: 12 bits of ones, a bit for the version, two zeros where MPEG audio, MP3 too, has its layer.
    return "aac" if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else ""


def _read_compressed(path: Path, demuxer: str, max_seconds: float, segment: Segment | None) -> tuple[np.ndarray, int]:
    # Imported here because PyAV is an optional extra.
    from asda.data.audio.ffmpeg import read_compressed

    return read_compressed(path, demuxer, max_seconds, segment)
