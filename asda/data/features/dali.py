"""From int16 clips to normalised log-mel patches: one DALI pipeline, on the CPU or on a GPU.

1. waves      int16 clips of any length from a Python iterator     fn.external_source
2. log-mel    Kaldi's fbank, float32 [T, M]                        `NativePatches`, or fbank.py in threads
3. frames     cut or padded to a fixed number of frames            fn.slice
4. normalise  (x - mean) / (2 std)                                 fn.normalize
5. patches    [time patches x mel patches, pixels]                 fn.reshape, fn.transpose

On a GPU each stage is made of DALI's own operators, which cost it next to nothing. On a CPU they take several times
the log-mel's time, so stages 2 to 5 are one function in the graph there, asda.data.features.cpu. Tests hold both to
torchaudio's numbers.

Each stage applies its part of the augmentation (asda.data.features.augment). A clip's numbers come through the same
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
NUMBERS = (*ClipAugmentation._fields, "partner")  # of a clip, in the order of asda.data.features.augment.packed

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
        self._taken: deque[tuple[list[list[np.ndarray]], Extra]] = deque()
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
            inputs = fn.external_source(
                source=self._next_inputs,
                num_outputs=2 if augmented else 1,
                dtype=[DALIDataType.INT16, DALIDataType.FLOAT64][: 2 if augmented else 1],
                ndim=1,
                batch=True,
                no_copy=device == "cpu",  # a GPU needs a copy in memory that it can reach
            )
            if self._cpu_patches is None:
                patches_NP = NativePatches(layout, self._device)(*inputs)
            else:
                patches_NP = fn.python_function(*inputs, function=self._cpu_patches.make, batch_processing=True)
            self._pipe.set_outputs(patches_NP)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[torch.Tensor, Extra]:
        """Return the next batch. Raises what the source raised, as it was."""
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        try:
            batch = self._pipe.run(stream)[0].as_tensor() if self._pipe else None
        except StopIteration:
            batch = None
        if batch is None:
            self.close()
            error, self._error = self._error, None
            raise error or StopIteration
        if stream is None:
            patches_BNP = torch.from_dlpack(batch)  # DALI's dynamic executor, its default, gives the buffer away
        else:
            # DALI would take the buffer back when torch lets go of it, which may still have work queued on it.
            patches_BNP = torch.empty(batch.shape(), dtype=torch.float32, device=self._device)
            feed_ndarray(batch, patches_BNP, cuda_stream=stream)
        return patches_BNP, self._taken.popleft()[-1]

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

    def _next_inputs(self) -> list[list[np.ndarray]]:
        """Answer DALI's request for a batch. DALI knows no error but the end, so another one is kept for `__next__`."""
        try:
            waves, augmentations, extra = next(self._source)
            augmentations = augmentations if self._augmented else None
            numbers = [] if augmentations is None else [list(packed(augmentations))]
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None
        inputs = [used_parts(waves, augmentations, self._frames), *numbers]
        self._taken.append((inputs, extra))
        return inputs


class Numbers:
    """The numbers of each clip inside a graph, by the names of their fields and "partner", its place in the batch."""

    def __init__(self, numbers_K: DataNode, device: str):
        self._host_K = numbers_K
        self._device_K = numbers_K.gpu() if device == "gpu" else numbers_K

    def factor(self, name: str, dtype: DALIDataType = DALIDataType.FLOAT) -> DataNode:
        """Return a number for arithmetic, on the device of the data."""
        return fn.cast(self._device_K[NUMBERS.index(name)], dtype=dtype)

    def argument(self, name: str, dtype: DALIDataType = DALIDataType.INT32) -> DataNode:
        """Return a number for an operator's argument, which DALI wants on the CPU."""
        return fn.cast(self._host_K[NUMBERS.index(name)], dtype=dtype)


class NativePatches:
    """Log-mel patches from DALI's operators: the graph of a pipeline on a GPU.

    DALI's own mel_filter_bank is not Kaldi's (its triangles are linear in Hz), and DALI has no matrix product; that one
    step is torch's, on DALI's memory.
    """

    def __init__(self, layout: PatchLayout, device: torch.device):
        self._layout = layout
        self._device = "gpu" if device.type == "cuda" else "cpu"
        # In float64, because training may have switched float32 products to TF32, which has three digits.
        self._filters_KM = fbank.mel_filters().to(device, torch.float64)
        # A stream of its own, because torch's default one has the training step queued.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, wave_S: DataNode, numbers_K: DataNode | None = None) -> DataNode:
        """Build the graph: int16 [S], and the numbers of augment.packed if clips are augmented, to [N, P]."""
        layout, numbers = self._layout, None if numbers_K is None else Numbers(numbers_K, self._device)
        x_TM = resized(self._log_mel(wave_S, numbers), layout.frames, fill=layout.pad_log_mel)
        if numbers is not None and layout.mask_first:
            x_TM = self._masked(x_TM, numbers)
        x_TM = fn.normalize(x_TM, mean=layout.mean, stddev=2 * layout.std)
        if numbers is not None:
            # The complement, so that the noise of the frames is not the noise of the samples.
            key = numbers.factor("noise_key", DALIDataType.UINT32) ^ uint32(0xFFFFFFFF)
            noise_TM = uniform_noise((layout.frames, fbank.NUM_MEL_BINS), key, self._device)
            x_TM = x_TM + numbers.factor("frame_noise") * noise_TM
            x_TM, share = rolled(x_TM, numbers.argument("frame_shift"), layout.frames), numbers.factor("share")
            x_TM = x_TM * share + fn.permute_batch(x_TM, indices=numbers.argument("partner")) * (1.0 - share)
            x_TM = x_TM if layout.mask_first else self._masked(x_TM, numbers)
        grid = [layout.frames // layout.patch, layout.patch, fbank.NUM_MEL_BINS // layout.patch, layout.patch]
        return fn.reshape(fn.transpose(fn.reshape(x_TM, shape=grid), perm=[0, 2, 1, 3]), shape=layout.shape)

    def _log_mel(self, wave_S: DataNode, numbers: Numbers | None) -> DataNode:
        """Compute log-mel [T, M] of int16 [S], with at most `frames` frames."""
        num_samples: Any = fn.cast(wave_S.shape()[0], dtype=DALIDataType.INT32)  # one kind for all of its arguments
        num_frames = dali_math.min((num_samples - fbank.FRAME_WINDOW) // fbank.FRAME_SHIFT + 1, self._layout.frames)
        wave_S = wave_S.gpu() if self._device == "gpu" else wave_S
        wave_S = fn.cast(wave_S, dtype=DALIDataType.FLOAT) / float(INT16_SCALE)
        wave_S = wave_S - fn.reductions.mean(wave_S)
        needed = fbank.num_samples(self._layout.frames)
        if numbers is None:
            wave_S = resized(wave_S, needed)
        else:  # noise is added also in the padding
            noise_S = uniform_noise((needed,), numbers.factor("noise_key", DALIDataType.UINT32), self._device) - 0.5
            noise_S = noise_S * ROOT_12 * (fn.reductions.rms(wave_S) * numbers.factor("noise_ratio"))
            wave_S = resized(rolled(wave_S, numbers.argument("wave_shift"), num_samples), needed)
            wave_S = (wave_S + noise_S) * numbers.factor("gain")
        mel_TM = fn.dl_tensor_python_function(
            self._power_spectrum(wave_S), function=self._mel_energies, device=self._device, batch_processing=True
        )
        return dali_math.log(dali_math.max(mel_TM, fbank.MIN_ENERGY))[:num_frames]

    def _power_spectrum(self, wave_S: DataNode) -> DataNode:
        """Compute |FFT|^2 of the centred, pre-emphasised and windowed frames of a padded wave, [T, K].

        Pre-emphasis runs over the joined frames; it is wrong only in the first sample of each, which the window drops.
        """
        frames, shift, width = self._layout.frames, fbank.FRAME_SHIFT // BLOCK, fbank.FRAME_WINDOW // BLOCK
        order = [shift * t + b for t in range(frames) for b in range(width)]
        framed = fn.sequence_rearrange(fn.reshape(wave_S, shape=[-1, BLOCK]), new_order=order)
        raw_TW = fn.reshape(framed, shape=[frames, fbank.FRAME_WINDOW])
        centred_TW = raw_TW - fn.reductions.mean(raw_TW, axes=[1], keep_dims=True)
        joined = fn.preemphasis_filter(fn.reshape(centred_TW, shape=[-1]), preemph_coeff=fbank.PRE_EMPHASIS)
        frames_TW = fn.reshape(joined, shape=[frames, fbank.FRAME_WINDOW])
        frames_TW = frames_TW * Constant(fbank.WINDOW_W.numpy(), device=self._device)
        return fn.spectrogram(
            fn.reshape(resized(frames_TW, fbank.FFT_POINTS, axis=1), shape=[-1]),
            nfft=fbank.FFT_POINTS,
            window_length=fbank.FFT_POINTS,
            window_step=fbank.FFT_POINTS,
            window_fn=[1.0] * fbank.FFT_POINTS,
            center_windows=False,
            layout="tf",
        )

    def _mel_energies(self, powers: list) -> list:
        """Multiply DLPack tensors [T, K] by the filters, [T, M]; DALI waited for its stream, so this waits for ours."""
        with torch.cuda.stream(self._stream):
            power_BTK = torch.stack([torch.from_dlpack(power_TK) for power_TK in powers])
            mel_BTM = (power_BTK.double() @ self._filters_KM).float()
        if self._stream is not None:
            self._stream.synchronize()
        return [mel_TM.__dlpack__() for mel_TM in mel_BTM]

    def _masked(self, x_TM: DataNode, numbers: Numbers) -> DataNode:
        """Fill a band of mel bins and a stretch of frames with 0."""
        names = ("mel_start", "mel_stop", "frame_start", "frame_stop")
        mel_start, mel_stop, start, stop = (numbers.argument(name, DALIDataType.FLOAT) for name in names)
        zero, frames = mel_start * 0, self._layout.frames
        return fn.erase(
            x_TM,
            anchor=fn.stack(zero, mel_start, start, zero),
            shape=fn.stack(zero + frames, mel_stop - mel_start, stop - start, zero + fbank.NUM_MEL_BINS),
            axes=[0, 1],
            fill_value=0.0,
        )


def resized(data: DataNode, length: int, axis: int = 0, fill: float = 0.0) -> DataNode:
    """Cut or pad an axis to a length."""
    return fn.slice(data, start=[0], shape=[length], axes=[axis], out_of_bounds_policy="pad", fill_values=[fill])


def rolled(data: DataNode, shift: DataNode, length: DataNode | int) -> DataNode:
    """Roll the first axis, which has this length, forward: numpy.roll for 0 <= shift < length."""
    return fn.slice(fn.cat(data, data, axis=0), start=length - shift, shape=length, axes=[0])


def uint32(value: int) -> Any:
    """Return a number that stays 32 bits wide in arithmetic, which then wraps around as C's does."""
    return Constant(value, dtype=DALIDataType.UINT32)


def uniform_noise(shape: tuple[int, ...], key: DataNode, device: str) -> DataNode:
    """Compute asda.data.features.cpu.uniform of every place, float32. Division by a power of two is a shift."""
    counters = np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(WEYL_STEP)
    bits = Constant(counters.reshape(shape), device=device) + key
    bits = (bits ^ (bits // uint32(1 << 16))) * uint32(0x85EBCA6B)
    bits = (bits ^ (bits // uint32(1 << 13))) * uint32(0xC2B2AE35)
    bits = bits ^ (bits // uint32(1 << 16))
    whole: Any = fn.cast(bits // uint32(1 << 8), dtype=DALIDataType.FLOAT)
    return whole * 2.0**-24
