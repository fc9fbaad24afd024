"""From int16 clips to normalised log-mel patches: one DALI pipeline, on the CPU or on a GPU.

1. waves      int16 clips of any length from a Python iterator     fn.external_source
2. log-mel    Kaldi's fbank, float32 [T, M]                        `NativeLogMel`, or asda.data.fbank in threads
3. frames     cut or padded to a fixed number of frames            fn.slice
4. normalise  (x - mean) / (2 std)                                 fn.normalize
5. patches    [time patches x mel patches, pixels]                 fn.reshape, fn.transpose

The native log-mel is made of DALI's own operators and costs a GPU next to nothing; on a CPU it is five times slower
than asda.data.fbank, which therefore stands in its place there. Both are held to torchaudio's numbers.

Shapes: B clips, S samples, T frames, W samples of a frame, K spectral lines, M mel bins, N patches, P pixels.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Literal, Self, TypeVar

import numpy as np
import nvidia.dali.math as dali_math
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from nvidia.dali.types import Constant, DALIDataType

from asda.data import fbank
from asda.data.audio import INT16_SCALE

BLOCK = 80  # samples; the greatest common divisor of frame shift and window: frames are made of whole blocks
BLOCKS_PER_SHIFT = fbank.FRAME_SHIFT // BLOCK
BLOCKS_PER_FRAME = fbank.FRAME_WINDOW // BLOCK

Extra = TypeVar("Extra")


class PatchPipeline(Generic[Extra]):
    """Iterates over (patches, extra): float32 [b, N, P] on the device, and whatever the source gave beside the clips.

    Patches are time-major (number = time patch x mel patches + mel patch), pixels row-major (frame, mel bin). A batch
    may have fewer clips than `batch_size`. Every tensor owns its memory. An exception of the source comes out of the
    iteration unchanged, after the batches before it. The source is asked only from within `next`, in the caller's
    thread. Close the pipeline, or use it in a `with` statement, to end its threads; the source's end closes it too.
    """

    def __init__(
        self,
        source: Iterator[tuple[list[np.ndarray], Extra]],
        *,
        frames: int,
        patch: int,
        mean: float,
        std: float,
        pad_log_mel: float,
        batch_size: int,
        device: Literal["cpu", "gpu"],
        threads: int,
        prefetch: int,
        native: bool | None = None,
    ):
        """Build the pipeline; nothing is taken from the source before the first batch is asked for.

        Args:
            source: batches of 1 to `batch_size` clips, int16 [S] with S >= 400, and anything that belongs to them.
            frames: log-mel frames of 10 ms a clip is cut or padded to, a multiple of `patch`.
            patch: frames and mel bins per patch.
            mean: of the log-mel values.
            std: of the log-mel values.
            pad_log_mel: log-mel value of padding, before normalisation.
            batch_size: most clips in a batch.
            device: where the patches are made and handed out; "gpu" is torch's current CUDA device.
            threads: CPU threads that compute.
            prefetch: batches prepared ahead.
            native: whether DALI's own operators compute the log-mel; None: on a GPU only.
        """
        self._source = source
        self._extras: deque[Extra] = deque()  # of the batches that DALI has taken and not yet handed out
        self._error: Exception | None = None
        self._max_samples = fbank.num_samples(frames)
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == "gpu" else torch.device("cpu")
        native = device == "gpu" if native is None else native
        self._pool = None if native else _single_core_threads(threads)
        self._pipe: Pipeline | None = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self._device.index,  # None on the CPU: a pipeline that needs no driver
            prefetch_queue_depth=prefetch,
        )
        with self._pipe:
            waves_S = fn.external_source(source=self._next_waves, batch=True, dtype=DALIDataType.INT16, ndim=1)
            if self._pool is None:
                mel_TM = NativeLogMel(frames, self._device)(waves_S)
            else:
                mel_TM = _log_mel_in_threads(waves_S, self._pool)
            self._pipe.set_outputs(_patches(mel_TM, frames, patch, mean, std, pad_log_mel))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[torch.Tensor, Extra]:
        """The next batch.

        Raises:
            Exception: what the source raised, as it was.
            StopIteration: the source has ended, or the pipeline is closed.
        """
        patches_BNP = self._run()
        if patches_BNP is not None:
            return patches_BNP, self._extras.popleft()
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
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_waves(self) -> list[np.ndarray]:
        """DALI's request for a batch. It knows no errors but the end, so an error is kept until the queue is empty."""
        try:
            waves, extra = next(self._source)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise StopIteration from None
        self._extras.append(extra)
        return [wave_S[: self._max_samples] for wave_S in waves]  # no later sample reaches a frame that is kept

    def _run(self) -> torch.Tensor | None:
        """One batch as a tensor of its own, because DALI reuses its buffers; None after the last."""
        if self._pipe is None:
            return None
        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        try:
            batch = self._pipe.run(stream)[0].as_tensor()
        except StopIteration:
            return None
        patches_BNP = torch.empty(batch.shape(), dtype=torch.float32, device=self._device)
        return feed_ndarray(batch, patches_BNP, cuda_stream=stream)


def _patches(mel_TM: DataNode, frames: int, patch: int, mean: float, std: float, pad_log_mel: float) -> DataNode:
    """Log-mel frames, however many, to patches [N, P]."""
    grid = [frames // patch, patch, fbank.NUM_MEL_BINS // patch, patch]
    mel_TM = fn.slice(
        mel_TM, start=[0], shape=[frames], axes=[0], out_of_bounds_policy="pad", fill_values=[pad_log_mel]
    )
    mel_TM = fn.normalize(mel_TM, mean=mean, stddev=2 * std)
    return fn.reshape(
        fn.transpose(fn.reshape(mel_TM, shape=grid), perm=[0, 2, 1, 3]),
        shape=[grid[0] * grid[2], patch * patch],
    )


def _log_mel_in_threads(waves_S: DataNode, pool: ThreadPoolExecutor) -> DataNode:
    """Graph of a pipeline on the CPU: int16 [S] to log-mel [T, M], a clip per thread."""

    def compute(waves: list[np.ndarray]) -> list[np.ndarray]:
        return list(pool.map(fbank.log_mel, waves))

    return fn.python_function(waves_S, function=compute, batch_processing=True)


class NativeLogMel:
    """Kaldi's fbank from DALI's operators: the log-mel of a pipeline on a GPU.

    DALI's own mel_filter_bank is not Kaldi's (its triangles are linear in Hz), and DALI has no matrix product; that one
    step is torch's, on DALI's memory.
    """

    def __init__(self, frames: int, device: torch.device):
        self._frames = frames
        # In float64, because training may have switched float32 products to TF32, which has three digits.
        self._filters_KM = fbank.mel_filters().to(device, torch.float64)
        # A stream of its own, because torch's default one has the training step queued.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, waves_S: DataNode) -> DataNode:
        """Graph: int16 [S] to log-mel [T, M]; S is at most what makes `frames` frames."""
        num_frames = (waves_S.shape()[0] - fbank.FRAME_WINDOW) // fbank.FRAME_SHIFT + 1
        if self._stream is not None:
            waves_S = waves_S.gpu()
        power_TK = self._power_spectrum(self._frame(waves_S))
        mel_TM = fn.dl_tensor_python_function(
            power_TK, function=self._mel_energies, device="gpu" if self._stream else "cpu", batch_processing=True
        )
        return dali_math.log(dali_math.max(mel_TM, fbank.MIN_ENERGY))[:num_frames]

    def _frame(self, waves_S: DataNode) -> DataNode:
        """All frames [T, W] of a wave padded to `frames` frames, minus the wave's mean and their own."""
        blocks = BLOCKS_PER_SHIFT * (self._frames - 1) + BLOCKS_PER_FRAME
        order = [BLOCKS_PER_SHIFT * t + b for t in range(self._frames) for b in range(BLOCKS_PER_FRAME)]
        wave_S = fn.cast(waves_S, dtype=DALIDataType.FLOAT) / float(INT16_SCALE)
        wave_S = wave_S - fn.reductions.mean(wave_S)
        wave_S = fn.slice(wave_S, start=[0], shape=[blocks * BLOCK], axes=[0], out_of_bounds_policy="pad")
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


def _single_core_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch computes on one core each; elsewhere it computes as before.

    torch.set_num_threads concerns the calling thread and all that have not computed yet, so the setting is put back
    once every thread of the pool has its own.
    """
    before = torch.get_num_threads()
    all_here = threading.Barrier(num_threads)

    def settle(_: int) -> None:
        torch.set_num_threads(1)
        all_here.wait()  # holds the thread, so that the next task starts another one

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="asda-fbank")
    list(pool.map(settle, range(num_threads)))
    torch.set_num_threads(before)
    return pool
