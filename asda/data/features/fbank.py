"""Log-mel frames as Kaldi computes them, on the CPU.

The front-end of the published models is Kaldi's fbank as torchaudio has it. Two float32 programs that round in
different places differ by up to 5e-3 in the quietest bins of a loud frame, because an FFT carries the rounding of its
largest line into all others. So this one rounds where torchaudio rounds: same order of operations, same FFT. Numba
compiles one pass before the FFT and one after it, with two weights a line where torchaudio multiplies by 128. They run
without Python's lock, so that threads compute side by side.

Shapes: S samples, T frames, W samples of a frame, N points of the FFT, K = N/2 + 1 spectral lines, M mel bins.
"""

import math
import threading

import numpy as np
import torch

from asda.data.audio.waves import INT16_SCALE, SAMPLE_RATE_HZ
from asda.models.patches import NUM_MEL_BINS
from asda.system import compiled

FRAME_SHIFT = SAMPLE_RATE_HZ * 10 // 1000  # samples, 10 ms
FRAME_WINDOW = SAMPLE_RATE_HZ * 25 // 1000  # samples, 25 ms
FFT_POINTS = 512  # the window, zero-padded to a power of two
NUM_LINES = FFT_POINTS // 2 + 1
LOW_HZ = 20.0  # Kaldi's default; the upper edge of the last filter is the Nyquist frequency
PRE_EMPHASIS = 0.97  # Kaldi's default
MIN_ENERGY = torch.finfo(torch.float32).eps  # Kaldi's floor under the logarithm; silence is log(1.19e-7) = -15.94

# Bounds the work space of a long clip to 4 MiB. A tenth of it would fit the cache better and save one thread 5 %, but
# each step then takes 30 us, and threads that take Python's lock so often wait for one another: two do the work of 1.3.
FRAMES_AT_ONCE = 1024
LANES = 48  # frames computed together; rows of a power of 2 would share their places in the cache
TORCH_ROWS, TORCH_LANES = 4, 8  # how torch adds up the values of a frame

WINDOW_W = torch.hann_window(FRAME_WINDOW, periodic=False)  # symmetric: the first sample of a frame never counts


def num_frames(num_samples: int) -> int:
    """Count the frames that lie wholly within a clip of `num_samples` >= 400 samples (Kaldi's snip_edges)."""
    return 1 + (num_samples - FRAME_WINDOW) // FRAME_SHIFT


def num_samples(num_frames: int) -> int:
    """Return the number of samples that make exactly `num_frames` frames."""
    return FRAME_WINDOW + (num_frames - 1) * FRAME_SHIFT


def mel_filters() -> torch.Tensor:
    """Compute Kaldi's triangular filters, float32 [K, M].

    The triangles lie on the mel scale, mel = 1127 ln(1 + Hz / 700), their corners at equal distances. The line at the
    Nyquist frequency has no weight. Everything is float32, because torchaudio's weights are: the slopes are differences
    of nearly equal numbers, and float64 moves them by 1e-5.
    """
    low, high = (1127 * math.log(1 + hz / 700) for hz in (LOW_HZ, SAMPLE_RATE_HZ / 2))
    step = (high - low) / (NUM_MEL_BINS + 1)
    bins_M = torch.arange(NUM_MEL_BINS)
    left_M, centre_M, right_M = (low + (bins_M + corner) * step for corner in (0.0, 1.0, 2.0))
    line_hz_K1 = SAMPLE_RATE_HZ / FFT_POINTS * torch.arange(NUM_LINES)[:, None]
    mel_K1 = 1127 * (1 + line_hz_K1 / 700).log()
    rising_KM = (mel_K1 - left_M) / (centre_M - left_M)
    falling_KM = (right_M - mel_K1) / (right_M - centre_M)
    filters_KM = torch.minimum(rising_KM, falling_KM).clamp_(min=0)
    filters_KM[-1] = 0  # float32 leaves a crumb of 1e-5 there
    return filters_KM


def log_mel(wave_S: np.ndarray, gain: float = 1.0, out_TM: np.ndarray | None = None) -> np.ndarray:
    """Compute the log-mel frames of one clip, float32 [T, 128], T = num_frames(S). Several threads may call it.

    16 kHz, minus the clip's mean, times `gain`; frames of 25 ms every 10 ms, each minus its mean, pre-emphasised, under
    a symmetric Hann window; |FFT|^2; 128 mel filters from 20 Hz to 8 kHz; natural logarithm, floored at -15.94. ASDA
    and EAT call torchaudio.compliance.kaldi.fbank so (htk_compat, no energy, no dither).

    The wave has S >= 400 samples: int16, or float32 of full scale 1. The result of a clip's first frames goes into
    `out_TM` if it is given, which must be contiguous.
    """
    out_TM = np.empty((num_frames(len(wave_S)), NUM_MEL_BINS), np.float32) if out_TM is None else out_TM
    unit = np.float32(1 / INT16_SCALE if wave_S.dtype == np.int16 else 1)
    total = _sum_of_integers(wave_S) if wave_S.dtype == np.int16 else wave_S.sum(dtype=np.float64)
    scales = unit, np.float32(total / len(wave_S) * unit), np.float32(gain), np.float32(PRE_EMPHASIS)
    for start in range(0, len(out_TM), FRAMES_AT_ONCE):
        mel_TM = out_TM[start : start + FRAMES_AT_ONCE]
        frames_TN = _scratch.frames_TN[: len(mel_TM)]
        part_S = wave_S[start * FRAME_SHIFT : start * FRAME_SHIFT + num_samples(len(mel_TM))]
        _windowed_frames(part_S, *scales, WINDOW_W.numpy(), frames_TN.numpy())
        spectrum_TK = torch.fft.rfft(frames_TN)
        _mel_energies(torch.view_as_real(spectrum_TK).flatten(1).numpy(), *LINE_FILTERS, mel_TM)
    torch.from_numpy(out_TM).log_()
    return out_TM


def log_mel_of_wave(wave_S: torch.Tensor) -> torch.Tensor:
    """Compute `log_mel` of a tensor of amplitudes: float32 [S], full scale 1, to float32 [T, 128]."""
    return torch.from_numpy(log_mel(wave_S.numpy()))


# Numba takes the types of these functions from their callers. Their inner loops run over whole rows or constant
# lengths, so that they become vector instructions; nothing is reordered or fused, every value rounds as the line says.


@compiled
def _sum_of_integers(wave_S):
    total = np.int64(0)
    for sample in wave_S:
        total += np.int64(sample)
    return total


@compiled
def _windowed_frames(wave_S, unit, mean, gain, pre_emphasis, window_W, out_TN):
    """Write centred, pre-emphasised and windowed frames into the first W columns of `out_TN`; column 0 stays 0."""
    centred_S = np.empty(len(wave_S), np.float32)
    for i in range(len(wave_S)):
        centred_S[i] = (np.float32(wave_S[i]) * unit - mean) * gain
    sums_L = np.empty(TORCH_ROWS * TORCH_LANES, np.float32)
    for frame in range(len(out_TN)):
        raw_W = centred_S[frame * FRAME_SHIFT : frame * FRAME_SHIFT + FRAME_WINDOW]
        frame_mean = _sum_as_torch(raw_W, sums_L) / np.float32(FRAME_WINDOW)
        out_W = out_TN[frame]
        for i in range(1, FRAME_WINDOW):
            emphasised = (raw_W[i] - frame_mean) - pre_emphasis * (raw_W[i - 1] - frame_mean)
            out_W[i] = emphasised * window_W[i]


@compiled
def _sum_as_torch(values_W, sums_L):
    """Add up a frame in the order of torch: four rows of eight sums, the rest to the first row."""
    whole = len(values_W) - len(values_W) % len(sums_L)
    sums_L[:] = 0
    for start in range(0, whole, len(sums_L)):
        part_L = values_W[start : start + len(sums_L)]
        for lane in range(len(sums_L)):
            sums_L[lane] += part_L[lane]
    for i in range(whole, len(values_W)):
        sums_L[i % TORCH_LANES] += values_W[i]
    for i in range(TORCH_LANES, len(sums_L)):
        sums_L[i % TORCH_LANES] += sums_L[i]
    total = sums_L[0]
    for lane in range(1, TORCH_LANES):
        total += sums_L[lane]
    return total


@compiled
def _mel_energies(spectrum_T2K, filter_K, weights_K2, out_TM):
    """Compute the energies in the mel filters, [T, M], floored at MIN_ENERGY; real and imaginary parts alternate.

    It takes LANES frames at a time: each line adds to its two filters, for all of the frames together.
    """
    power_KL = np.zeros((NUM_LINES, LANES), np.float32)
    energy_ML = np.empty((NUM_MEL_BINS, LANES), np.float32)
    for start in range(0, len(out_TM), LANES):
        num_frames = min(LANES, len(out_TM) - start)
        for lane in range(num_frames):
            lines_2K = spectrum_T2K[start + lane]
            for k in range(NUM_LINES):
                power_KL[k, lane] = lines_2K[2 * k] * lines_2K[2 * k] + lines_2K[2 * k + 1] * lines_2K[2 * k + 1]
        energy_ML[:] = np.float32(0)
        for k in range(NUM_LINES):
            first_L, second_L, power_L = energy_ML[filter_K[k]], energy_ML[filter_K[k] + 1], power_KL[k]
            for lane in range(LANES):
                first_L[lane] += weights_K2[k, 0] * power_L[lane]
            for lane in range(LANES):
                second_L[lane] += weights_K2[k, 1] * power_L[lane]
        for lane in range(num_frames):
            out_M = out_TM[start + lane]
            for m in range(NUM_MEL_BINS):
                out_M[m] = max(energy_ML[m, lane], np.float32(MIN_ENERGY))


class _Scratch(threading.local):
    """Each thread's work space: fresh memory for every clip would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self.frames_TN = torch.zeros(FRAMES_AT_ONCE, FFT_POINTS)  # column 0 and the padding are never written


# The first filter in which each line has weight, int64 [K], and its weights there and in the next, float32 [K, 2]. Each
# filter ends where the next but one begins, so there is no third.
_FILTERS_KM = mel_filters().numpy()
_FIRST_K = np.minimum((_FILTERS_KM > 0).argmax(axis=1), NUM_MEL_BINS - 2)
LINE_FILTERS = _FIRST_K, np.take_along_axis(_FILTERS_KM, _FIRST_K[:, None] + np.arange(2), axis=1)
_scratch = _Scratch()
