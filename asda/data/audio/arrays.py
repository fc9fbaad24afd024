"""Turn arrays and tensors of audio into 16 kHz mono float32. Shapes: S samples, C channels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from asda.data.audio.resampling import resample
from asda.data.audio.waves import INT16_SCALE, MAX_CHANNELS, MIN_SAMPLES, RATE_BOUNDS_HZ, amplitude_complaint
from asda.errors import UserError

Audio = Tensor | np.ndarray


def to_wave(audio: Audio, sample_rate_hz: float, name: str = "audio") -> Tensor:
    """Return the mean over the channels at 16 kHz: float32 [S], full scale 1, S >= 400.

    It averages like asda.data.audio.read.read_wave and resamples like the official feature extraction.

    Args:
        audio: [S] or [C, S], floats with full scale 1, or int16.
        sample_rate_hz: a whole number.
        name: of the audio, for messages.

    Raises:
        UserError: the shape, the type, a sample, the length or the rate is out of bounds.
    """
    low_hz, high_hz = RATE_BOUNDS_HZ
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
    wave_S = resample(mono_S, int(sample_rate_hz))
    if len(wave_S) < MIN_SAMPLES:
        raise UserError(f"{name} has {len(wave_S)} samples at 16 kHz; the shortest clip has {MIN_SAMPLES} (0.025 s)")
    return from_numpy(wave_S)


def to_waves(audio: Any, sample_rate_hz: float) -> list[Tensor]:
    """Apply to_wave to a clip, or to each clip of a list; all have the same rate."""
    if not is_list(audio):
        return [to_wave(audio, sample_rate_hz)]
    return [to_wave(clip, sample_rate_hz, f"audio[{number}]") for number, clip in enumerate(audio)]


def is_list(audio: Any) -> bool:
    """Return whether this is a list of clips, not one clip."""
    return isinstance(audio, Sequence) and not isinstance(audio, str)


def _checked_channels(audio: Any, name: str) -> np.ndarray:
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()
    if not isinstance(audio, np.ndarray):
        raise UserError(f"{name} is a {type(audio).__name__}; give an array or a tensor, [S] or [channels, S]")
    if audio.dtype.kind != "f" and audio.dtype != np.int16:
        raise UserError(f"{name} is of {audio.dtype}; give floats with full scale 1, or int16")
    if audio.ndim not in (1, 2):
        raise UserError(f"{name} has shape {audio.shape}; give [S] or [channels, S]")
    if audio.size == 0:
        raise UserError(f"{name} has shape {audio.shape} and holds no samples")
    if audio.ndim == 2 and len(audio) > min(MAX_CHANNELS, audio.shape[1]):
        raise UserError(f"{name} has shape {audio.shape}, which looks like [S, channels]; give [channels, S]")
    return np.atleast_2d(audio)
