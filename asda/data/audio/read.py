"""Read audio of any format and rate as 16 kHz mono: by libsndfile, or by asda.data.audio.ffmpeg what only FFmpeg knows.

Files that hold less than they declare are refused.
"""

import re
from pathlib import Path

import numpy as np
import soundfile

from asda.data.audio.ffmpeg import read_compressed
from asda.data.audio.waves import (
    MAX_SECONDS,
    SAMPLE_RATE_HZ,
    AudioError,
    Segment,
    check_format,
    check_length,
    mean_of_channels,
    part_of,
    resample,
    to_int16,
)

READ_AT_ONCE = 1 << 20  # values of all channels, 4 MiB of float32: only their mean is kept
# libsndfile shortens a truncated file's header to what is there; only its log knows: "data : 900 (should be 600)".
SIZE_CORRECTION = re.compile(r": (\d+) \(should be (\d+)\)")
SIZE_SLACK_BYTES = 8  # writers that forget a pad byte or count the RIFF header itself are off by this much at most
UNKNOWN_SIZE_BYTES = 0x7FFF_0000  # from here on a declared size is a streaming writer's "unknown"


def read_audio(path: Path, max_seconds: float = MAX_SECONDS, segment: Segment | None = None) -> np.ndarray:
    """Read a file, or the segment of a longer one, as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio is returned bit for bit; any other is averaged, resampled and rounded with
    saturation. A file that lasts no longer than its segment is read whole; see part_of. Raises AudioError.
    """
    audio_S, rate_hz = _read(path, max_seconds, segment, exact=True)
    return audio_S if audio_S.dtype == np.int16 else to_int16(resample(audio_S, rate_hz))


def read_wave(path: Path, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """Read a file as amplitudes at its own rate: float32 [S], full scale 1, the mean of its channels; and that rate.

    S is at least 400 after resampling to 16 kHz. Memory is that of the result. Raises AudioError as read_audio does.
    """
    return _read(path, max_seconds, None, exact=False)


def _read(path: Path, max_seconds: float, segment: Segment | None, exact: bool) -> tuple[np.ndarray, int]:
    """Read float32 [S] at the file's own rate, and that rate; with `exact`, 16 kHz mono 16-bit files as int16 [S]."""
    if demuxer := demuxer_of(path):
        return read_compressed(path, demuxer, max_seconds, segment)
    try:
        # By descriptor, because soundfile decides by the extension of a path.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            check_format(sound.samplerate, sound.channels)
            for declared, present in SIZE_CORRECTION.findall(sound.extra_info):
                if int(present) + SIZE_SLACK_BYTES < int(declared) < UNKNOWN_SIZE_BYTES:
                    raise AudioError(f"is truncated: a chunk declares {declared} bytes and {present} are there")
            first, num_frames = part_of(sound.frames, sound.samplerate, segment)
            check_length(num_frames, sound.samplerate, max_seconds)
            if first:
                sound.seek(first)
            if exact and (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16"):
                return _decode(sound, num_frames, "int16")[0], sound.samplerate
            mono_S = np.empty(num_frames, np.float32)
            block = READ_AT_ONCE // sound.channels
            for start in range(0, num_frames, block):
                audio_CS = _decode(sound, min(block, num_frames - start), "float32")
                mono_S[start : start + block] = mean_of_channels(audio_CS)
            return mono_S, sound.samplerate
    except soundfile.LibsndfileError as error:
        raise AudioError(f"libsndfile: {error.error_string.rstrip('.') or f'error {error.code}'}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


def _decode(sound: soundfile.SoundFile, num_frames: int, dtype: str) -> np.ndarray:
    """Read the next frames of an open file, [C, S]."""
    audio_SC = sound.read(num_frames, dtype=dtype, always_2d=True)
    if len(audio_SC) != num_frames:
        raise AudioError(f"is truncated: its header declares {sound.frames} frames and {sound.tell()} are there")
    return audio_SC.T


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
