"""Turn files, arrays and tensors of audio into 16 kHz mono float32. Shapes: S samples, C channels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from asda.data.audio.read import count_frames, wave_blocks
from asda.data.audio.resampling import resample
from asda.data.audio.waves import (
    INT16_SCALE,
    MAX_CHANNELS,
    MIN_SAMPLES,
    RATE_BOUNDS_HZ,
    SAMPLE_RATE_HZ,
    AudioError,
    amplitude_complaint,
)
from asda.errors import UserError

Audio = Tensor | np.ndarray


@dataclass(frozen=True)
class File:
    """A file of audio, for more than its path says.

    Attributes:
        path: of the file.
        channel: the one to take, counted from 0; None averages all.
        progress: told the seconds of each block that was read.
    """

    path: str | Path
    channel: int | None = None
    progress: Callable[[float], object] | None = None


Clip = Audio | str | Path | File


def blocks_of(audio: Clip, sample_rate_hz: float | None, name: str = "audio") -> Iterator[Tensor]:
    """Yield a clip at 16 kHz, the mean over its channels: float32 [S] a block, full scale 1.

    A file comes block by block, so that its length takes no memory; an array is one block.

    Args:
        audio: a file or its path; or [S] or [C, S], floats with full scale 1 or int16.
        sample_rate_hz: of an array; a whole number. A file knows its own.
        name: of the audio, for messages.

    Raises:
        UserError: the file cannot be read; or the shape, the type, a sample, the length or the rate is out of bounds.
    """
    if isinstance(audio, str | Path):
        audio = File(audio)
    if not isinstance(audio, File):
        yield to_wave(audio, sample_rate_hz, name)
        return
    with _reading(audio, sample_rate_hz):
        for block_S in wave_blocks(Path(audio.path), channel=audio.channel):
            yield from_numpy(block_S)
            if audio.progress:
                audio.progress(len(block_S) / SAMPLE_RATE_HZ)


def length_of(audio: Clip, sample_rate_hz: float | None) -> tuple[int, int]:
    """Return how many samples a channel of a clip has, and their rate. Raises UserError."""
    if isinstance(audio, str | Path):
        audio = File(audio)
    if isinstance(audio, File):
        with _reading(audio, sample_rate_hz):
            return count_frames(Path(audio.path))
    mono_S, rate_hz = to_mono(audio, sample_rate_hz)
    return len(mono_S), rate_hz


@contextmanager
def _reading(file: File, sample_rate_hz: float | None) -> Iterator[None]:
    if sample_rate_hz is not None:
        raise UserError(f"{file.path}: a file knows its own rate; leave sample_rate_hz out")
    try:
        yield
    except AudioError as error:
        raise UserError(f"{file.path}: {error}") from None


def to_wave(audio: Audio, sample_rate_hz: float | None, name: str = "audio") -> Tensor:
    """Return a clip at 16 kHz, float32 [S], S >= 400, resampled like the official feature extraction; see blocks_of."""
    wave_S = resample(*to_mono(audio, sample_rate_hz, name))
    if len(wave_S) < MIN_SAMPLES:
        raise UserError(f"{name} has {len(wave_S)} samples at 16 kHz; the shortest clip has {MIN_SAMPLES} (0.025 s)")
    return from_numpy(wave_S)


def to_mono(audio: Audio, sample_rate_hz: float | None, name: str = "audio") -> tuple[np.ndarray, int]:
    """Return the mean over the channels, float32 [S] of full scale 1, and the rate; averaged as read_wave does."""
    low_hz, high_hz = RATE_BOUNDS_HZ
    if sample_rate_hz is None:
        raise UserError(f"{name} is an array; give its sample_rate_hz")
    number = isinstance(sample_rate_hz, int | float | np.number) and not isinstance(sample_rate_hz, bool)
    if not number or not low_hz <= sample_rate_hz <= high_hz or sample_rate_hz != int(sample_rate_hz):
        raise UserError(f"sample_rate_hz {sample_rate_hz!r} must be a whole number from {low_hz} to {high_hz}")
    audio_CS = _checked_channels(audio, name)
    mono_S = np.zeros(audio_CS.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and refused below
        for channel_S in audio_CS:  # one by one: a float copy of all of them may be large
            mono_S += channel_S
    mono_S /= len(audio_CS) * (INT16_SCALE if audio_CS.dtype == np.int16 else 1)
    if complaint := amplitude_complaint(mono_S):
        raise UserError(f"{name} {complaint}")
    return mono_S, int(sample_rate_hz)


def is_list(audio: Any) -> bool:
    """Return whether this is a list of clips, not one clip."""
    return isinstance(audio, Sequence) and not isinstance(audio, str)


def _checked_channels(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()
    if not isinstance(audio, np.ndarray):
        raise UserError(
            f"{name} is a {type(audio).__name__}; give a path, or an array or a tensor, [S] or [channels, S]"
        )
    if audio.dtype.kind != "f" and audio.dtype != np.int16:
        raise UserError(f"{name} is of {audio.dtype}; give floats with full scale 1, or int16")
    if audio.ndim not in (1, 2):
        raise UserError(f"{name} has shape {audio.shape}; give [S] or [channels, S]")
    if audio.size == 0:
        raise UserError(f"{name} has shape {audio.shape} and holds no samples")
    if audio.ndim == 2 and len(audio) > min(MAX_CHANNELS, audio.shape[1]):
        raise UserError(f"{name} has shape {audio.shape}, which looks like [S, channels]; give [channels, S]")
    return np.atleast_2d(audio)
