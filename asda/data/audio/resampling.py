"""Resample to 16 kHz, in one piece or block by block: the results are the same within rounding (3e-8).

By torchaudio (a sinc of 6 zero crossings under a Hann window), to the bit as the official feature extraction calls
torchaudio.functional.resample, which may lose the last sample to the rounding of its length. Rates whose kernel would
be huge (MAX_KERNEL_VALUES) are left to soxr (HQ).
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import soxr

from asda.data.audio.waves import SAMPLE_RATE_HZ, resampled_length

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

# torch is imported where it resamples: it takes a second and 450 MB, and whoever only opens a dataset needs none.

RESAMPLE_AT_ONCE = 1 << 19  # samples: 10 s at 48 kHz in one piece; torchaudio takes up to 60 bytes for each
# Values of torchaudio's resampling kernel: it holds 16000 / g filters of about rate / g taps, where g is the greatest
# common divisor of the two. 22.05 and 44.1 kHz take 0.1 M values, 11127 Hz would take 178 M (0.7 GB).
MAX_KERNEL_VALUES = 1 << 22
LOWPASS_ZEROS, LOWPASS_ROLLOFF = 6, 0.99  # torchaudio's defaults: zero crossings each side, share of the Nyquist band


def resample(wave_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample a whole wave to 16 kHz, float32 [S] to float32 [resampled_length(S, rate_hz)]."""
    if rate_hz == SAMPLE_RATE_HZ:
        return wave_S
    short = max(len(wave_S), resampled_length(len(wave_S), rate_hz)) <= RESAMPLE_AT_ONCE
    if short and kernel_values(rate_hz) <= MAX_KERNEL_VALUES:
        import torch

        return _resampler(rate_hz)(torch.from_numpy(wave_S)).numpy()
    out_S, stop = np.empty(resampled_length(len(wave_S), rate_hz), np.float32), 0
    blocks = (wave_S[start : start + RESAMPLE_AT_ONCE] for start in range(0, len(wave_S), RESAMPLE_AT_ONCE))
    for block_S in resample_blocks(blocks, rate_hz):
        out_S[stop : (stop := stop + len(block_S))] = block_S
    return out_S


def resample_blocks(blocks: Iterable[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    """Resample the blocks of a wave, float32 [S] each, and yield blocks of any length, float32 [S] at 16 kHz."""
    resampler = Resampler(rate_hz)
    for block_S in blocks:
        yield resampler.push(block_S)
    yield resampler.flush()


class Resampler:
    """Resamples a wave that arrives block by block.

    With torchaudio, `old` samples become `new`, and the outputs n * new to (n + 1) * new are dot products of samples
    around group n of the input. So a stretch of whole groups, with as many groups around it as the filter reaches
    over, gives what the whole wave gives.
    """

    def __init__(self, rate_hz: int):
        self._rate_hz, self._num_in, self._num_out = rate_hz, 0, 0
        self._soxr = None
        if rate_hz != SAMPLE_RATE_HZ and kernel_values(rate_hz) > MAX_KERNEL_VALUES:
            self._soxr = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
        elif rate_hz != SAMPLE_RATE_HZ:
            filters = _resampler(rate_hz)
            self._old, self._new = rate_hz // filters.gcd, SAMPLE_RATE_HZ // filters.gcd
            self._reach = math.ceil(filters.width / self._old)  # groups
            self._groups = max(1, RESAMPLE_AT_ONCE // max(self._old, self._new))  # in a stretch
            self._held_S, self._before = np.empty(0, np.float32), 0  # samples from `before` groups ahead of the next

    def push(self, wave_S: np.ndarray) -> np.ndarray:
        """Take the next samples, float32 [S]; return those at 16 kHz that they complete, float32 [S]."""
        self._num_in += len(wave_S)
        if self._rate_hz == SAMPLE_RATE_HZ:
            return wave_S
        if self._soxr is not None:
            return self._counted(self._soxr.resample_chunk(wave_S))
        self._held_S = np.concatenate([self._held_S, wave_S])
        done = [np.empty(0, np.float32)]
        while len(self._held_S) >= (self._before + self._groups + self._reach) * self._old:
            done.append(self._stretch(self._groups))
        return self._counted(np.concatenate(done))

    def flush(self) -> np.ndarray:
        """End the wave; return its last samples at 16 kHz, float32 [S]."""
        if self._rate_hz == SAMPLE_RATE_HZ:
            return np.empty(0, np.float32)
        left = resampled_length(self._num_in, self._rate_hz) - self._num_out
        if self._soxr is not None:
            # soxr rounds the length to the nearest: silence behind the wave brings it up to ours.
            silence_S = np.zeros(self._rate_hz // SAMPLE_RATE_HZ + 1, np.float32)
            return self._counted(self._soxr.resample_chunk(silence_S, last=True)[:left])
        done = [np.empty(0, np.float32)]
        while sum(map(len, done)) < left:
            done.append(self._stretch(self._groups))
        return self._counted(np.concatenate(done)[:left])

    def _stretch(self, groups: int) -> np.ndarray:
        """Resample the next groups, and let go of what no later one reaches."""
        import torch

        piece_S = torch.from_numpy(self._held_S[: (self._before + groups + self._reach) * self._old])
        whole_S = torch.nn.functional.pad(piece_S, (0, -len(piece_S) % self._old))  # the last may be a part of a group
        out_S = _resampler(self._rate_hz)(whole_S).numpy()[self._before * self._new :][: groups * self._new]
        kept = max(0, self._before + groups - self._reach)
        self._held_S, self._before = self._held_S[kept * self._old :], self._before + groups - kept
        return out_S

    def _counted(self, wave_S: np.ndarray) -> np.ndarray:
        self._num_out += len(wave_S)
        return wave_S


def kernel_values(rate_hz: int) -> int:
    """Return the size of torchaudio's kernel for a rate."""
    gcd = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    old, new = rate_hz // gcd, SAMPLE_RATE_HZ // gcd
    width = math.ceil(LOWPASS_ZEROS * old / (min(old, new) * LOWPASS_ROLLOFF))
    return new * (2 * width + old)


@lru_cache(maxsize=8)
def _resampler(rate_hz: int) -> "Resample":
    """Keep the kernel, computed in float32 as torchaudio's function does; its class would take float64."""
    import torch
    from torchaudio.transforms import Resample

    return Resample(rate_hz, SAMPLE_RATE_HZ, dtype=torch.float32)
