"""Read audio of any format, rate and length as mono: whole, or block by block in bounded memory.

    with open_audio(path) as recording:
        for block_S in recording.blocks(): ...    float32 at recording.rate_hz

libsndfile decodes what it knows (asda.data.audio.sndfile), FFmpeg the rest (asda.data.audio.ffmpeg).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from asda.data.audio.ffmpeg import HEAD_BYTES, FfmpegSound, demuxer_of
from asda.data.audio.resampling import resample, resample_blocks
from asda.data.audio.sndfile import SndfileSound, open_by_sndfile
from asda.data.audio.waves import (
    CUT_SLACK_S,
    MAX_SECONDS,
    SAMPLE_RATE_HZ,
    AudioError,
    Segment,
    amplitude_complaint,
    check_length,
    mean_of_channels,
    part_of,
    to_int16,
)

CANCELLING_DB = 30.0  # channels whose mean lies this far below the loudest of them cancel each other


def read_audio(
    path: Path, max_seconds: float = MAX_SECONDS, segment: Segment | None = None, channel: int | None = None
) -> np.ndarray:
    """Read a file, or the segment of a longer one, as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio is returned bit for bit; any other is averaged, resampled and rounded with
    saturation. A file that lasts no longer than its segment is read whole; see part_of.

    Raises:
        AudioError: the file cannot be used, or its channels cancel each other and no `channel` is chosen.
    """
    with open_audio(path, segment, channel) as recording:
        if recording.exact:
            check_length(recording.num_frames or 0, recording.rate_hz, max_seconds)
            return np.concatenate(list(recording.int16_blocks()))
        return to_int16(resample(recording.read(max_seconds), recording.rate_hz))


def read_wave(
    path: Path, max_seconds: float = MAX_SECONDS, segment: Segment | None = None, channel: int | None = None
) -> tuple[np.ndarray, int]:
    """Read a file as amplitudes at its own rate: float32 [S], full scale 1, the mean of its channels; and that rate.

    S is at least 400 after resampling to 16 kHz. Memory is that of the result. Raises AudioError as read_audio does.
    """
    with open_audio(path, segment, channel) as recording:
        return recording.read(max_seconds), recording.rate_hz


def wave_blocks(path: Path, segment: Segment | None = None, channel: int | None = None) -> Iterator[np.ndarray]:
    """Yield a file of any length as amplitudes at 16 kHz, float32 [S] a block. Raises AudioError as read_audio does."""
    num_samples = 0
    with open_audio(path, segment, channel) as recording:
        for block_S in resample_blocks(recording.blocks(), recording.rate_hz):
            num_samples += len(block_S)
            yield block_S
        check_length(num_samples, SAMPLE_RATE_HZ, math.inf)
        recording.check_channels()


def count_frames(path: Path) -> tuple[int, int]:
    """Return the length of a file in frames, and its rate; a file without a believable length is decoded for it."""
    with open_audio(path) as recording:
        num_frames = recording.num_frames
        return sum(map(len, recording.blocks())) if num_frames is None else num_frames, recording.rate_hz


@contextmanager
def open_audio(path: Path, segment: Segment | None = None, channel: int | None = None) -> Iterator["Recording"]:
    """Open a file, or a segment of it in seconds, to be read block by block. Raises AudioError."""
    if demuxer := demuxer_of(_head(path)):
        yield Recording(FfmpegSound(path, demuxer), segment, channel)
        return
    with open_by_sndfile(path) as sound:
        yield Recording(sound, segment, channel)


def _head(path: Path) -> bytes:
    """Return the first bytes of a file. Raises AudioError if there are none."""
    try:
        if not path.is_file():
            raise AudioError("is not a regular file" if path.exists() else "no such file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error
    if not head:
        raise AudioError("the file is empty")
    return head


class Recording:
    """An open file, or a segment of one, as a single channel.

    Attributes:
        rate_hz: samples per second.
        num_channels: of the file; they are averaged, or one is chosen.
        num_frames: samples that `blocks` yields; None if the file does not tell.
        exact: whether it is 16 kHz mono int16, and `int16_blocks` yields it bit for bit.
    """

    def __init__(self, sound: SndfileSound | FfmpegSound, segment: Segment | None, channel: int | None):
        if channel is not None and not 0 <= channel < sound.num_channels:
            counted = f"{sound.num_channels} channel{'s' * (sound.num_channels > 1)}"
            raise AudioError(f"has {counted}, counted from 0, and no channel {channel}")
        self._sound, self._channel = sound, channel
        self.rate_hz, self.num_channels, self.exact = sound.rate_hz, sound.num_channels, sound.exact
        length = sound.num_frames
        if length is None and segment is not None:
            enough_s = max(segment[1], segment[1] - segment[0] + CUT_SLACK_S)
            length = sum(part.shape[1] for part in sound.blocks(0, math.ceil(enough_s * sound.rate_hz) + 1))
        self._first, self.num_frames = (0, None) if length is None else part_of(length, sound.rate_hz, segment)
        # Sums of squares: of each channel, and of their mean.
        self._squares_C, self._mean_squares = np.zeros(sound.num_channels), 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the amplitudes, float32 [S] a block of bounded size; full scale 1.

        Raises:
            AudioError: the file ends before or after its declared end, or holds what cannot be amplitudes.
        """
        only = self._only_sounding() if self._channel is None and self.num_channels > 2 else self._channel
        for audio_CS in self._sound.blocks(self._first, self.num_frames):
            if only is not None:
                yield _checked(audio_CS[only])
                continue
            mean_S = mean_of_channels(audio_CS)
            if self.num_channels > 1:
                self._squares_C += [np.dot(channel_S, channel_S) for channel_S in audio_CS]
                self._mean_squares += float(np.dot(mean_S, mean_S))
            yield mean_S

    def int16_blocks(self) -> Iterator[np.ndarray]:
        """Yield the samples of an exact recording, int16 [S] a block."""
        assert isinstance(self._sound, SndfileSound)
        return (audio_1S[0] for audio_1S in self._sound.blocks(self._first, self.num_frames, "int16"))

    def read(self, max_seconds: float) -> np.ndarray:
        """Return all amplitudes, float32 [S]; raise AudioError if they are longer, too short, or cancel each other."""
        if self.num_frames is not None:
            check_length(self.num_frames, self.rate_hz, max_seconds)
        out_S, num_read = np.empty(self.num_frames or 0, np.float32), 0
        for block_S in self.blocks():
            if num_read + len(block_S) > len(out_S):  # the length was not declared, or estimated
                out_S = np.concatenate([out_S[:num_read], np.empty(max(len(block_S), num_read), np.float32)])
            if len(block_S) == len(out_S):  # all at once, as short clips come
                out_S = block_S
            else:
                out_S[num_read : num_read + len(block_S)] = block_S
            num_read += len(block_S)
            if self.num_frames is None and num_read > max_seconds * self.rate_hz:
                break
        check_length(num_read, self.rate_hz, max_seconds + (0 if self.num_frames is None else 1))
        self.check_channels()
        return out_S[:num_read]

    def check_channels(self) -> None:
        """Refuse channels that cancel each other in what `blocks` has yielded."""
        loudest = float(self._squares_C.max(initial=0))
        if loudest > 0 and self._mean_squares <= loudest * 10 ** (-CANCELLING_DB / 10):
            below = (
                f"{10 * math.log10(loudest / self._mean_squares):.0f} dB below the loudest"
                if self._mean_squares
                else "silence"
            )
            raise AudioError(f"its channels cancel each other: their mean is {below}; choose one with --channel 0")

    def _only_sounding(self) -> int | None:
        """Return the one channel of several that is not digital silence throughout, which keeps its level; or None."""
        sounding_C = np.zeros(self.num_channels, bool)
        for audio_CS in self._sound.blocks(self._first, self.num_frames):
            sounding_C |= audio_CS.any(axis=1)
            if sounding_C.sum() > 1:
                return None
        return int(sounding_C.argmax()) if sounding_C.any() else None


def _checked(wave_S: np.ndarray) -> np.ndarray:
    if complaint := amplitude_complaint(wave_S):
        raise AudioError(complaint)
    return wave_S
