"""Read audio of any format and rate as 16 kHz mono."""

from pathlib import Path

import numpy as np

from asda.data.audio.ffmpeg import read_compressed
from asda.data.audio.sndfile import decode_int16, decode_mono, open_at
from asda.data.audio.waves import MAX_SECONDS, SAMPLE_RATE_HZ, AudioError, Segment, resample, to_int16


def read_audio(path: Path, max_seconds: float = MAX_SECONDS, segment: Segment | None = None) -> np.ndarray:
    """Read a file, or the segment of a longer one, as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio is returned bit for bit; any other is averaged, resampled and rounded with
    saturation. A file that lasts no longer than its segment is read whole; see part_of. Raises AudioError.
    """
    if demuxer := demuxer_of(path):
        return to_int16(resample(*read_compressed(path, demuxer, max_seconds, segment)))
    with open_at(path, max_seconds, segment) as (sound, num_frames):
        exact = (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
        if exact:
            return decode_int16(sound, num_frames)
        return to_int16(resample(decode_mono(sound, num_frames), sound.samplerate))


def read_wave(path: Path, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """Read a file as amplitudes at its own rate: float32 [S], full scale 1, the mean of its channels; and that rate.

    S is at least 400 after resampling to 16 kHz. Memory is that of the result. Raises AudioError as read_audio does.
    """
    if demuxer := demuxer_of(path):
        return read_compressed(path, demuxer, max_seconds)
    with open_at(path, max_seconds, None) as (sound, num_frames):
        return decode_mono(sound, num_frames), sound.samplerate


def demuxer_of(path: Path) -> str:
    """Return FFmpeg's name of the format of a file that only FFmpeg reads, else "". Raises AudioError."""
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
