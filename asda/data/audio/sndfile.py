"""Decode files by libsndfile, part by part, and refuse those that hold less than they declare."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile

from asda.data.audio.parts import UNKNOWN_SIZE_BYTES, Part, PartFile, parts_of
from asda.data.audio.waves import SAMPLE_RATE_HZ, AudioError, check_format

READ_AT_ONCE = 1 << 20  # values of all channels, 4 MiB of float32
# libsndfile shortens a truncated file's header to what is there; only its log knows: "data : 900 (should be 600)".
SIZE_CORRECTION = re.compile(r": (\d+) \(should be (\d+)\)")
SIZE_SLACK_BYTES = 8  # writers that forget a pad byte or count the RIFF header itself are off by this much at most
# Decoded before a part and dropped: the first frames behind a seek lack what lies in those before, in MP3 and Opus.
# GSM and a few others cannot seek; in Vorbis libsndfile ends up elsewhere (its issue 885), or crashes if headers are
# damaged: they are decoded from their beginning, at about 2000 times real time.
PREROLL_FRAMES = 1 << 14
MPEG_MESSAGES = (b"[src/libmpg123", b"Note: ", b"Warning: ", b"\n")  # how lines of libmpg123 begin

Dtype = Literal["float32", "int16"]

_stderr_lock = threading.Lock()


class _Forward(soundfile.SoundFile):
    """A file whose reads follow each other.

    soundfile seeks behind every read if a file is seekable, to where it already is. Behind a seek, libmpg123 lacks what
    the next frames refer to: the first 0.1 s of every block of an MP3 would be wrong.
    """

    def seekable(self) -> bool:
        """Return False, so that soundfile does not seek by itself."""
        return False

    def can_seek(self) -> bool:
        """Return whether libsndfile can seek."""
        return super().seekable()


@contextmanager
def open_by_sndfile(path: Path) -> Iterator["SndfileSound"]:
    """Open a file, or the parts that it is made of. Errors of libsndfile in the block become AudioError."""
    opened: list[_Forward] = []
    try:
        with path.open("rb") as file:
            try:
                opened += [_open(file, part) for part in parts_of(path) or (None,)]
                yield SndfileSound(opened)
            finally:
                for sound in opened:
                    sound.close()
    except soundfile.LibsndfileError as error:
        raise AudioError(f"libsndfile: {error.error_string.rstrip('.') or f'error {error.code}'}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


def _open(file: BinaryIO, part: Part | None) -> _Forward:
    # By descriptor, because soundfile decides by the extension of a path.
    source: Any = file.fileno() if part is None else PartFile(part, file)
    with without_messages():
        sound = _Forward(source, closefd=False)
    check_format(sound.samplerate, sound.channels)
    for declared, present in SIZE_CORRECTION.findall(sound.extra_info):
        if int(present) + SIZE_SLACK_BYTES < int(declared) < UNKNOWN_SIZE_BYTES:
            raise AudioError(f"is truncated: a chunk declares {declared} bytes and {present} are there")
    return sound


class SndfileSound:
    """An open file.

    Attributes:
        rate_hz: samples per second.
        num_channels: of the file.
        num_frames: the length, one sample per channel each.
        exact: whether its samples are 16 kHz, mono, int16.
    """

    def __init__(self, sounds: list[_Forward]):
        first = sounds[0]
        for sound in sounds[1:]:
            if (sound.samplerate, sound.channels) != (first.samplerate, first.channels):
                raise AudioError(
                    f"joins sounds of {first.samplerate} Hz, {first.channels} channels and of {sound.samplerate} Hz, "
                    f"{sound.channels} channels; split it into files"
                )
        self._sounds = sounds
        self.rate_hz, self.num_channels = first.samplerate, first.channels
        self.num_frames = sum(sound.frames for sound in sounds)
        self.exact = all(
            (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16") for sound in sounds
        )

    def blocks(self, first: int, most: int | None, dtype: Dtype = "float32") -> Iterator[np.ndarray]:
        """Decode `most` frames from frame `first`, or all: [C, S] a block. Raises AudioError if they are not there."""
        left = self.num_frames - first if most is None else most
        for sound in self._sounds:
            skipped = min(first, sound.frames)
            first -= skipped
            wanted = min(left, sound.frames - skipped)
            if not wanted:
                continue
            left -= wanted
            yield from _blocks(sound, skipped, wanted, dtype)


def _blocks(sound: _Forward, first: int, wanted: int, dtype: Dtype) -> Iterator[np.ndarray]:
    quiet = without_messages if sound.format == "MP3" else _nothing
    size = max(1, READ_AT_ONCE // sound.channels)
    with quiet():
        _go_to(sound, first, size)
    for start in range(0, wanted, size):
        expected = min(size, wanted - start)
        with quiet():
            audio_SC = sound.read(expected, dtype=dtype, always_2d=True)
        if len(audio_SC) != expected:
            there = first + start + len(audio_SC)
            raise AudioError(f"is truncated: its header declares {sound.frames} frames and {there} are there")
        yield audio_SC.T


def _go_to(sound: _Forward, first: int, size: int) -> None:
    """Move to a frame: decode what must be decoded before it, and drop it."""
    before = first
    if sound.can_seek() and sound.subtype != "VORBIS":
        before = min(first, PREROLL_FRAMES) if sound.format in ("OGG", "MP3") else 0
    if sound.can_seek():
        sound.seek(first - before)
    for start in range(0, before, size):
        sound.read(min(size, before - start))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def without_messages() -> Iterator[None]:
    """Keep what libmpg123 writes to stderr away from it, and let all else through a little later."""
    with _stderr_lock, os.fdopen(os.memfd_create("messages"), "w+b") as kept:
        real = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
            kept.seek(0)
            if lines := [line for line in kept if not line.startswith(MPEG_MESSAGES)]:
                os.write(2, b"".join(lines))
