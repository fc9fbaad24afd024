"""Decode files by libsndfile, and refuse those that hold less than they declare."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from asda.data.audio.waves import AudioError, Segment, check_format, check_length, mean_of_channels, part_of

READ_AT_ONCE = 1 << 20  # values of all channels, 4 MiB of float32: only their mean is kept
# libsndfile shortens a truncated file's header to what is there; only its log knows: "data : 900 (should be 600)".
SIZE_CORRECTION = re.compile(r": (\d+) \(should be (\d+)\)")
SIZE_SLACK_BYTES = 8  # writers that forget a pad byte or count the RIFF header itself are off by this much at most
UNKNOWN_SIZE_BYTES = 0x7FFF_0000  # from here on a declared size is a streaming writer's "unknown"


@contextmanager
def open_at(path: Path, max_seconds: float, segment: Segment | None) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """Open an audio file at the first frame to read; yield it and the number of frames, both checked.

    Errors of libsndfile in the block become AudioError too.
    """
    try:
        # By descriptor, because soundfile decides by the extension of a path.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            check_format(sound.samplerate, sound.channels)
            _check_sizes(sound)
            first, num_frames = part_of(sound.frames, sound.samplerate, segment)
            check_length(num_frames, sound.samplerate, max_seconds)
            if first:
                sound.seek(first)
            yield sound, num_frames
    except soundfile.LibsndfileError as error:
        raise AudioError(f"libsndfile: {error.error_string.rstrip('.') or f'error {error.code}'}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


def _check_sizes(sound: soundfile.SoundFile) -> None:
    """Refuse a header that promises more bytes than the file has."""
    for declared, present in SIZE_CORRECTION.findall(sound.extra_info):
        if int(present) + SIZE_SLACK_BYTES < int(declared) < UNKNOWN_SIZE_BYTES:
            raise AudioError(f"is truncated: a chunk declares {declared} bytes and {present} are there")


def decode_int16(sound: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Read the next samples of a mono 16-bit file, int16 [S]."""
    samples_S = sound.read(num_frames, dtype="int16")
    _check_whole(sound, len(samples_S), num_frames)
    return samples_S


def decode_mono(sound: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Read the next frames of an open file and average the channels: float32 [S] at its own rate."""
    mono_S = np.empty(num_frames, np.float32)
    block = READ_AT_ONCE // sound.channels
    for start in range(0, num_frames, block):
        expected = min(block, num_frames - start)
        audio_SC = sound.read(expected, dtype="float32", always_2d=True)
        _check_whole(sound, len(audio_SC), expected)
        mono_S[start : start + expected] = mean_of_channels(audio_SC.T)
    return mono_S


def _check_whole(sound: soundfile.SoundFile, num_read: int, expected: int) -> None:
    if num_read != expected:
        there = sound.tell()
        raise AudioError(f"is truncated: its header declares {sound.frames} frames and {there} are there")
