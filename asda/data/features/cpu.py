"""The in-graph function of a DALI pipeline on the CPU: waves of a batch in, finished patches out.

DALI's CPU operators would pass over a clip's 0.5 MB once each for padding, normalising and cutting into patches, which
costs more than half of the log-mel itself. Here a thread takes a clip (or the two of a mixture) through all stages
while its log-mel lies in the core's cache. The loops are compiled by numba and run without Python's lock.

Shapes: B clips, S samples, T frames, M mel bins, N patches, F mel patches, P pixels of a patch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from asda.data.audio.waves import INT16_SCALE
from asda.data.features import fbank
from asda.data.features.augment import ClipAugmentation, unpacked
from asda.models.patches import PatchLayout
from asda.system import compiled

NUM_MEL_BINS = fbank.NUM_MEL_BINS  # a constant for numba, which makes faster loops of it than of a length
ROOT_12 = 12**0.5  # 1 / rms of a uniform number from -0.5 to 0.5
WEYL_STEP = 0x9E3779B9  # 2^32 / golden ratio: spreads neighbouring counters over all 32 bits


class CpuPatches:
    """Makes the patches of batches in threads. Close it to end them."""

    def __init__(self, layout: PatchLayout, batch_size: int, threads: int):
        self._layout = layout
        self._patches_BNP = np.empty((batch_size, *layout.shape), np.float32)
        self._scratch = _Scratch(layout.frames)
        self._threads, self._pool = threads, _single_core_threads(threads)

    def make(self, waves: list[np.ndarray], numbers: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Make the patches of a batch: int16 [S] of each clip to float32 [N, P], valid until the next call.

        `numbers` are the rows of asda.data.features.augment.packed; None changes nothing.
        """
        nothing = ClipAugmentation()
        rows = [(nothing, place) for place in range(len(waves))] if numbers is None else map(unpacked, numbers)
        augmentations, partners = zip(*rows, strict=True)
        # Each pair once; a clip that is not mixed is its own partner.
        todo = iter([sorted({place, partner}) for place, partner in enumerate(partners) if place <= partner])

        def work(_: int) -> None:
            for places in todo:  # threads may share it: taking an item is one step of the interpreter
                self._make_mixture(places, [waves[n] for n in places], [augmentations[n] for n in places])

        # Each thread takes the next clip until none is left. With a future for each clip, this thread would wake for
        # each, and take Python's lock from those that compute: 0.2 ms a clip.
        list(self._pool.map(work, range(self._threads)))
        return list(self._patches_BNP[: len(waves)])

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _make_mixture(self, places: list[int], waves: list[np.ndarray], both: list[ClipAugmentation]) -> None:
        frames_2TM = self._scratch.frames_2TM
        for x_TM, wave_S, one in zip(frames_2TM, waves, both, strict=False):
            self._make_frames(wave_S, one, x_TM)
        if len(places) == 2:
            _mix(frames_2TM[0].reshape(-1), frames_2TM[1].reshape(-1), np.float32(both[0].share))
        for x_TM, one, place in zip(frames_2TM, both, places, strict=False):
            if not self._layout.mask_first:
                _mask(x_TM, one)
            _cut_into_patches(x_TM, self._layout.patch, self._patches_BNP[place])

    def _make_frames(self, wave_S: np.ndarray, one: ClipAugmentation, out_TM: np.ndarray) -> None:
        """Make the normalised frames of a clip before it is mixed."""
        num_real = min(fbank.num_frames(len(wave_S)), self._layout.frames)
        if one.wave_shift or one.noise_ratio:
            augmented_S = self._scratch.wave_S[: fbank.num_samples(num_real)]
            _augment_wave(wave_S, one.wave_shift, one.gain, one.noise_ratio, one.noise_key, augmented_S)
            fbank.log_mel(augmented_S, out_TM=out_TM[:num_real])
        else:
            fbank.log_mel(wave_S, one.gain, out_TM[:num_real])
        self._finish(out_TM, num_real, one)

    def _finish(self, out_TM: np.ndarray, num_real: int, one: ClipAugmentation) -> None:
        """Pad, normalise, make noisy and roll log-mel that has `num_real` frames."""
        layout = self._layout
        out_TM[num_real:] = layout.pad_log_mel
        if layout.mask_first:
            _mask(out_TM, one)
        _normalise(out_TM.reshape(-1), layout.mean, layout.std)
        if one.frame_noise:
            # The complement, so that the noise of the frames is not the noise of the samples.
            _add_noise(out_TM.reshape(-1), np.float32(one.frame_noise), one.noise_key ^ 0xFFFFFFFF)
        if one.frame_shift:
            out_TM[:] = np.roll(out_TM, one.frame_shift, axis=0)


class _Scratch(threading.local):
    """Each thread's work space."""

    def __init__(self, frames: int):
        self.wave_S = np.empty(fbank.num_samples(frames), np.float32)
        self.frames_2TM = np.empty((2, frames, NUM_MEL_BINS), np.float32)


def _single_core_threads(num_threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch computes on one core each; elsewhere it computes as before.

    torch.set_num_threads concerns the calling thread and all that have not asked for their number yet. So each thread
    of the pool asks, and then the setting is put back.
    """
    before, all_started = torch.get_num_threads(), threading.Barrier(num_threads)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="asda-fbank", initializer=torch.get_num_threads)
    list(pool.map(lambda _: all_started.wait(), range(num_threads)))  # a waiting thread leaves the next task to another
    torch.set_num_threads(before)
    return pool


def _mask(x_TM: np.ndarray, one: ClipAugmentation) -> None:
    """Fill what SpecAug masks with 0."""
    x_TM[:, one.mel_start : one.mel_stop] = 0
    x_TM[one.frame_start : one.frame_stop] = 0


# Numba takes the types of these functions from their callers. Each is one plain loop, which compiles to vector
# instructions; nothing in them is reordered or fused.


@compiled
def uniform(counter, key):
    """Return a uniform float32 in [0, 1) of 24 bits, from two uint32: MurmurHash3's finaliser (Appleby, public domain).

    Noise is a function of a clip's key and a value's place, because DALI can compute that on a GPU too. Arrays made on
    the host would cost 0.5 MB of transfer a clip, and DALI's own generators know nothing of clips.
    """
    bits = np.uint32(np.uint32(counter * np.uint32(WEYL_STEP)) + key)
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    bits = bits ^ (bits >> np.uint32(16))
    return np.float32(bits >> np.uint32(8)) * np.float32(2**-24)


@compiled
def _augment_wave(samples_S, shift, gain, noise_ratio, noise_key, out_S):
    """Centre, roll, amplify and make noisy a clip; write its first samples, full scale 1."""
    total, squares = np.int64(0), np.int64(0)  # exact, for clips of up to 2^33 samples
    for sample in samples_S:
        total += np.int64(sample)
        squares += np.int64(sample) * np.int64(sample)
    mean = total / len(samples_S)
    rms = np.sqrt(max(squares / len(samples_S) - mean * mean, 0.0))
    wrapped = min(shift, len(out_S))  # samples that come in from the clip's end
    _amplify(samples_S[len(samples_S) - shift :], mean, gain, out_S[:wrapped])
    _amplify(samples_S, mean, gain, out_S[wrapped:])
    noise, key = np.float32(rms / INT16_SCALE * noise_ratio * gain * ROOT_12), np.uint32(noise_key)
    if noise != 0:
        for i in range(len(out_S)):
            out_S[i] += noise * (uniform(np.uint32(i), key) - np.float32(0.5))


@compiled
def _amplify(samples_S, mean, gain, out_S):
    unit, offset, factor = np.float32(1 / INT16_SCALE), np.float32(mean / INT16_SCALE), np.float32(gain)
    for i in range(len(out_S)):
        out_S[i] = (np.float32(samples_S[i]) * unit - offset) * factor


@compiled
def _normalise(values, mean, std):
    offset, factor = np.float32(mean), np.float32(1) / np.float32(2 * std)
    for i in range(len(values)):
        values[i] = (values[i] - offset) * factor


@compiled
def _add_noise(values, amount, key):
    for i in range(len(values)):
        values[i] += amount * uniform(np.uint32(i), np.uint32(key))


@compiled
def _mix(first, second, share):
    rest = np.float32(1) - share
    for i in range(len(first)):
        one, other = first[i], second[i]
        first[i], second[i] = share * one + rest * other, share * other + rest * one


@compiled
def _cut_into_patches(x_TM, patch, out_NP):
    """Cut frames [T, M] into patches [N, P]: time-major, the pixels of a patch frame by frame."""
    mel_patches = NUM_MEL_BINS // patch
    for frame in range(len(x_TM)):
        in_M = x_TM[frame]
        first_patch, first_pixel = frame // patch * mel_patches, frame % patch * patch
        for f in range(mel_patches):
            in_P, out_P = in_M[f * patch : (f + 1) * patch], out_NP[first_patch + f, first_pixel : first_pixel + patch]
            for i in range(patch):
                out_P[i] = in_P[i]
