"""From int16 clips to normalised log-mel patches: one DALI pipeline, on the CPU or on a GPU.

1. waves      int16 clips of any length from a Python iterator     fn.external_source
2. log-mel    Kaldi's fbank, float32 [T, M]                        `NativeLogMel`, or fbank.py in threads
3. frames     cut or padded to a fixed number of frames            fn.slice
4. normalise  (x - mean) / (2 std)                                 fn.normalize
5. patches    [time patches x mel patches, pixels]                 fn.reshape, fn.transpose

On a GPU each stage is made of DALI's own operators, which cost it next to nothing. On a CPU they take several times
the log-mel's time, so stages 2 to 5 are one function in the graph there, asda.data.features.cpu. Both are held to
torchaudio's numbers.

Augmentation (asda.data.features.augment) joins in where its stage is: each clip's numbers come through the same
fn.external_source as its wave, so a graph does the same to a clip wherever it stands in whatever batch.

Shapes: B clips, S samples, T frames, W samples of a frame, K spectral lines, M mel bins, N patches, P pixels.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import nvidia.dali.math as dali_math
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from nvidia.dali.types import Constant, DALIDataType

from asda.data.audio.waves import INT16_SCALE
from asda.data.features import fbank
from asda.data.features.augment import ClipAugmentation, packed, used_parts
from asda.data.features.cpu import ROOT_12, WEYL_STEP, CpuPatches
from asda.models.patches import PatchLayout

BLOCK = 80  # samples; the greatest common divisor of frame shift and window: frames are made of whole blocks
BLOCKS_PER_SHIFT = fbank.FRAME_SHIFT // BLOCK
BLOCKS_PER_FRAME = fbank.FRAME_WINDOW // BLOCK

Extra = TypeVar("Extra")


class PatchPipeline(Generic[Extra]):
    """Iterates over (patches, extra): float32 [B, N, P] on the device, and whatever the source gave beside the clips.

    - A batch may have fewer clips than `batch_size`. Every tensor owns its memory.
    - The source is asked only from within `next`, in the caller's thread. Its arrays must stay as they are until their
      patches are out. Its exceptions come out of the iteration unchanged, after the batches before them.
    - Close the pipeline, or use it in a `with` statement, to end its threads; the end of the source closes it too.
    """

    def __init__(
        self,
        source: Iterator[tuple[list[np.ndarray], Sequence[ClipAugmentation] | None, Extra]],
        layout: PatchLayout,
        *,
        batch_size: int,
        device: Literal["cpu", "gpu"],
        threads: int,
        prefetch: int,
        augmented: bool,
        native: bool | None = None,
    ):
        """Build the pipeline; nothing is taken from the source before the first batch is asked for.

        Args:
            source: batches of 1 to `batch_size` clips, int16 [S] with S >= 400; an augmentation for each; an extra.
            layout: of the patches.
            batch_size: most clips in a batch.
            device: where the patches are made and handed out; "gpu" is torch's current CUDA device.
            threads: CPU threads that compute.
            prefetch: batches prepared ahead.
            augmented: whether the augmentations are applied.
            native: whether DALI's own operators make the patches; None: on a GPU only.
        """
        self._source, self._frames, self._augmented = source, layout.frames, augmented
        # For each batch that DALI has taken and not yet handed out: the arrays that it reads, and the extra.
        self._taken: deque[tuple[list[np.ndarray], np.ndarray | None, Extra]] = deque()
        self._error: Exception | None = None
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else torch.device("cpu")
        native = device == "gpu" if native is None else native
        self._cpu_patches = None if native else CpuPatches(layout, batch_size, threads)
        self._pipe: Pipeline | None = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device.index,  # None on the CPU: a pipeline that needs no driver
            prefetch_queue_depth=prefetch,
        )
        with self._pipe:
            inputs = self._inputs()
            if self._cpu_patches is None:
                patches_NP = NativePatches(layout, self._device)(*inputs)
            else:
                patches_NP = fn.python_function(*inputs, function=self._cpu_patches.make, batch_processing=True)
            self._pipe.set_outputs(patches_NP)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[torch.Tensor, Extra]:
        """Return the next batch.

        Raises:
            Exception: what the source raised, as it was.
            StopIteration: the source has ended, or the pipeline is closed.
        """
        patches_BNP = self._run()
        if patches_BNP is not None:
            return patches_BNP, self._taken.popleft()[-1]
        self.close()
        error, self._error = self._error, None
        raise error or StopIteration

    def close(self) -> None:
        """End the threads and drop what was prepared; closing twice does nothing."""
        if self._pipe is not None:
            # What DALI's destructor does. The traceback of a source's error holds references to the pipeline, so
            # letting go of ours would not end it.
            self._pipe._shutdown()
            self._pipe = None
            self._source = iter(())  # DALI keeps a reference to us, but the source shall end with the pipeline
        if self._cpu_patches is not None:
            self._cpu_patches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _inputs(self) -> Sequence[DataNode]:
        """Build the graph's inputs: the waves and, if clips are augmented, the numbers of each clip."""
        one_or_two = {"dtype": DALIDataType.INT16, "ndim": 1}
        if self._augmented:
            one_or_two = {"num_outputs": 2, "dtype": [DALIDataType.INT16, DALIDataType.FLOAT64], "ndim": [1, 1]}
        # On the CPU DALI reads our arrays where they are; for a GPU it copies them into memory that a GPU can reach.
        inputs = fn.external_source(
            source=self._next_inputs, batch=True, no_copy=self._device.type == "cpu", **one_or_two
        )
        return [inputs] if isinstance(inputs, DataNode) else inputs

    def _next_inputs(self) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
        """Answer DALI's request for a batch. DALI knows no error but the end, so another one is kept for `__next__`."""
        try:
            waves, augmentations, extra = next(self._source)
            augmentations = augmentations if self._augmented else None
            numbers_BK = None if augmentations is None else packed(augmentations)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None
        waves = used_parts(waves, augmentations, self._frames)
        self._taken.append((waves, numbers_BK, extra))
        return waves if numbers_BK is None else (waves, list(numbers_BK))

    def _run(self) -> torch.Tensor | None:
        """One batch as a tensor of its own; None after the last."""
        if self._pipe is None:
            return None
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        try:
            batch = self._pipe.run(stream)[0].as_tensor()
        except StopIteration:
            return None
        if stream is None:
            return torch.from_dlpack(batch)  # DALI's dynamic executor, its default, gives the buffer away
        # On a GPU it would take the buffer back when torch lets go of it, which may still have work queued on it.
        patches_BNP = torch.empty(batch.shape(), dtype=torch.float32, device=self._device)
        return feed_ndarray(batch, patches_BNP, cuda_stream=stream)


class Numbers:
    """The numbers of each clip inside a graph, by the names of their fields; one more is its partner in the batch."""

    def __init__(self, numbers_K: DataNode, device: str):
        self._host_K = numbers_K
        self._device_K = numbers_K.gpu() if device == "gpu" else numbers_K

    def factor(self, name: str, dtype: DALIDataType = DALIDataType.FLOAT) -> DataNode:
        """For arithmetic, on the device of the data."""
        return fn.cast(self._device_K[ClipAugmentation._fields.index(name)], dtype=dtype)

    def argument(self, name: str, dtype: DALIDataType = DALIDataType.INT32) -> DataNode:
        """For an operator's argument, which DALI wants on the CPU."""
        return fn.cast(self._host_K[ClipAugmentation._fields.index(name)], dtype=dtype)

    @property
    def partner(self) -> DataNode:
        """Place in the batch, an operator's argument."""
        return fn.cast(self._host_K[len(ClipAugmentation._fields)], dtype=DALIDataType.INT32)


class NativePatches:
    """Patches from DALI's operators alone: the graph of a pipeline on a GPU."""

    def __init__(self, layout: PatchLayout, device: torch.device):
        self._layout = layout
        self._device = "gpu" if device.type == "cuda" else "cpu"
        self._log_mel = NativeLogMel(layout.frames, device)

    def __call__(self, waves_S: DataNode, numbers_K: DataNode | None = None) -> DataNode:
        """Graph: int16 [S], and the numbers of asda.data.augment.packed where clips are augmented, to [N, P]."""
        layout, numbers = self._layout, None if numbers_K is None else Numbers(numbers_K, self._device)
        mel_TM = fn.slice(
            self._log_mel(waves_S, numbers),
            start=[0],
            shape=[layout.frames],
            axes=[0],
            out_of_bounds_policy="pad",
            fill_values=[layout.pad_log_mel],
        )
        if numbers is not None and layout.mask_first:
            mel_TM = self._masked(mel_TM, numbers)
        mel_TM = fn.normalize(mel_TM, mean=layout.mean, stddev=2 * layout.std)
        if numbers is not None:
            mel_TM = self._mixed(self._noisy(mel_TM, numbers), numbers)
            mel_TM = mel_TM if layout.mask_first else self._masked(mel_TM, numbers)
        return self._cut(mel_TM)

    def _noisy(self, mel_TM: DataNode, numbers: Numbers) -> DataNode:
        """Noise in every value, then the frames rolled."""
        shape = (self._layout.frames, fbank.NUM_MEL_BINS)
        # The complement, so that the noise of the frames is not the noise of the samples.
        key = numbers.factor("noise_key", DALIDataType.UINT32) ^ uint32(0xFFFFFFFF)
        mel_TM = mel_TM + numbers.factor("frame_noise") * uniform_noise(shape, key, self._device)
        return rolled(mel_TM, numbers.argument("frame_shift"), self._layout.frames, self._layout.frames)

    def _mixed(self, mel_TM: DataNode, numbers: Numbers) -> DataNode:
        share = numbers.factor("share")
        return mel_TM * share + fn.permute_batch(mel_TM, indices=numbers.partner) * (1.0 - share)

    def _masked(self, mel_TM: DataNode, numbers: Numbers) -> DataNode:
        """0 in a band of mel bins and in a stretch of frames."""
        mel_start, mel_stop, frame_start, frame_stop = (
            numbers.argument(name, DALIDataType.FLOAT)
            for name in ("mel_start", "mel_stop", "frame_start", "frame_stop")
        )
        none = mel_start * 0
        return fn.erase(
            mel_TM,
            anchor=fn.stack(none, mel_start, frame_start, none),
            shape=fn.stack(
                none + self._layout.frames, mel_stop - mel_start, frame_stop - frame_start, none + fbank.NUM_MEL_BINS
            ),
            axes=[0, 1],
            fill_value=0.0,
        )

    def _cut(self, mel_TM: DataNode) -> DataNode:
        frames, patch = self._layout.frames, self._layout.patch
        grid = [frames // patch, patch, fbank.NUM_MEL_BINS // patch, patch]
        return fn.reshape(fn.transpose(fn.reshape(mel_TM, shape=grid), perm=[0, 2, 1, 3]), shape=self._layout.shape)


class NativeLogMel:
    """Kaldi's fbank from DALI's operators: the log-mel of a pipeline on a GPU.

    DALI's own mel_filter_bank is not Kaldi's (its triangles are linear in Hz), and DALI has no matrix product; that one
    step is torch's, on DALI's memory.
    """

    def __init__(self, frames: int, device: torch.device):
        self._frames, self._num_samples = frames, fbank.num_samples(frames)
        # In float64, because training may have switched float32 products to TF32, which has three digits.
        self._filters_KM = fbank.mel_filters().to(device, torch.float64)
        # A stream of its own, because torch's default one has the training step queued.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, waves_S: DataNode, numbers: Numbers | None = None) -> DataNode:
        """Graph: int16 [S] to log-mel [T, M], with at most `frames` frames."""
        num_samples: Any = fn.cast(waves_S.shape()[0], dtype=DALIDataType.INT32)  # one kind for all of its arguments
        num_frames = dali_math.min((num_samples - fbank.FRAME_WINDOW) // fbank.FRAME_SHIFT + 1, self._frames)
        if self._stream is not None:
            waves_S = waves_S.gpu()
        wave_S = fn.cast(waves_S, dtype=DALIDataType.FLOAT) / float(INT16_SCALE)
        wave_S = wave_S - fn.reductions.mean(wave_S)
        wave_S = self._padded(wave_S) if numbers is None else self._augmented(wave_S, num_samples, numbers)
        power_TK = self._power_spectrum(self._frame(wave_S))
        mel_TM = fn.dl_tensor_python_function(
            power_TK, function=self._mel_energies, device="gpu" if self._stream else "cpu", batch_processing=True
        )
        return dali_math.log(dali_math.max(mel_TM, fbank.MIN_ENERGY))[:num_frames]

    def _padded(self, wave_S: DataNode) -> DataNode:
        """Return a wave of any length as one that makes `frames` frames."""
        return fn.slice(wave_S, start=[0], shape=[self._num_samples], axes=[0], out_of_bounds_policy="pad")

    def _augmented(self, wave_S: DataNode, num_samples: DataNode, numbers: Numbers) -> DataNode:
        """Compute the patches of a wave that is rolled, amplified and made noisy, also in the padding."""
        device = "gpu" if self._stream is not None else "cpu"
        key = numbers.factor("noise_key", DALIDataType.UINT32)
        noise_S = (uniform_noise((self._num_samples,), key, device) - 0.5) * ROOT_12
        noise_S = noise_S * (fn.reductions.rms(wave_S) * numbers.factor("noise_ratio"))
        wave_S = rolled(wave_S, numbers.argument("wave_shift"), num_samples, num_samples)
        return (self._padded(wave_S) + noise_S) * numbers.factor("gain")

    def _frame(self, wave_S: DataNode) -> DataNode:
        """All frames [T, W] of a padded wave, minus their means."""
        blocks = BLOCKS_PER_SHIFT * (self._frames - 1) + BLOCKS_PER_FRAME
        order = [BLOCKS_PER_SHIFT * t + b for t in range(self._frames) for b in range(BLOCKS_PER_FRAME)]
        framed = fn.sequence_rearrange(fn.reshape(wave_S, shape=[blocks, BLOCK]), new_order=order)
        raw_TW = fn.reshape(framed, shape=[self._frames, fbank.FRAME_WINDOW])
        return raw_TW - fn.reductions.mean(raw_TW, axes=[1], keep_dims=True)

    def _power_spectrum(self, centred_TW: DataNode) -> DataNode:
        """|FFT|^2 of the pre-emphasised and windowed frames, [T, K].

        Pre-emphasis runs over the joined frames; it is wrong only in the first sample of each, which the window drops.
        """
        joined = fn.preemphasis_filter(fn.reshape(centred_TW, shape=[-1]), preemph_coeff=fbank.PRE_EMPHASIS)
        frames_TW = fn.reshape(joined, shape=[self._frames, fbank.FRAME_WINDOW])
        frames_TW = frames_TW * Constant(fbank.WINDOW_W.numpy(), device=centred_TW.device)
        padded_TN = fn.slice(frames_TW, start=[0], shape=[fbank.FFT_POINTS], axes=[1], out_of_bounds_policy="pad")
        return fn.spectrogram(
            fn.reshape(padded_TN, shape=[-1]),
            nfft=fbank.FFT_POINTS,
            window_length=fbank.FFT_POINTS,
            window_step=fbank.FFT_POINTS,
            window_fn=[1.0] * fbank.FFT_POINTS,
            center_windows=False,
            layout="tf",
        )

    def _mel_energies(self, powers: list) -> list:
        """DLPack tensors [T, K] of a batch to [T, M]; DALI has waited for its stream, so we wait for ours."""
        with torch.cuda.stream(self._stream):
            power_BTK = torch.stack([torch.from_dlpack(power_TK) for power_TK in powers])
            mel_BTM = (power_BTK.double() @ self._filters_KM).float()
        if self._stream is not None:
            self._stream.synchronize()
        return [mel_TM.__dlpack__() for mel_TM in mel_BTM]


def rolled(data: DataNode, shift: DataNode, length: DataNode | int, keep: DataNode | int) -> DataNode:
    """numpy.roll along the first axis: 0 <= shift < length; `keep` of the result from its start on."""
    return fn.slice(fn.cat(data, data, axis=0), start=length - shift, shape=keep, axes=[0])


def uint32(value: int) -> Any:
    """Return a number that stays 32 bits wide in arithmetic, which then wraps around as C's does."""
    return Constant(value, dtype=DALIDataType.UINT32)


def uniform_noise(shape: tuple[int, ...], key: DataNode, device: str) -> DataNode:
    """asda.data.features.cpu.uniform of every place, float32; division by a power of two is a shift."""
    counters = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(WEYL_STEP)
    bits = Constant(counters.reshape(shape), device=device) + key
    bits = (bits ^ (bits // uint32(1 << 16))) * uint32(0x85EBCA6B)
    bits = (bits ^ (bits // uint32(1 << 13))) * uint32(0xC2B2AE35)
    bits = bits ^ (bits // uint32(1 << 16))
    whole: Any = fn.cast(bits // uint32(1 << 8), dtype=DALIDataType.FLOAT)
    return whole * 2.0**-24
