"""One micro-batch: its clips, its masks, and the way of both from a worker process."""

from collections import deque
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from asda.config.run import Config
from asda.data.clips import Clip
from asda.data.features.augment import ClipAugmentation, mixed_targets, packed, present_patches, used_parts
from asda.data.features.cpu import CpuPatches, PatchLayout


@dataclass(frozen=True)
class Batch:
    """The clips of one micro-batch, in order; masks only where there are students."""

    clips: list[Clip]
    visible_BMK: np.ndarray | None  # [B, M, K] int64, the patches that each student sees
    augmentations: list[ClipAugmentation] | None = None  # what happens to each clip
    patches_BNP: torch.Tensor | None = None  # where a worker process has made them; the clips' samples are gone then
    lengths: tuple[int, ...] = ()  # samples of each clip
    damaged: frozenset[int] = frozenset()  # all damaged clips that the worker process has met

    def __reduce__(self) -> tuple:
        """On its way from a worker: torch passes tensors through shared memory, numpy arrays would be copied thrice."""
        samples = [torch.from_numpy(clip.samples) for clip in self.clips if self.patches_BNP is None]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["clips"] = [replace(clip, samples=np.empty(0, np.int16)) for clip in self.clips]
        return _arrived, (values, torch.cat(samples) if samples else torch.empty(0))

    def targets(self, num_classes: int) -> np.ndarray:
        """[B, C] float32, 1 where the clip has the label; of a mixture the shares of its clips."""
        targets_BC = np.zeros((len(self.clips), num_classes), dtype=np.float32)
        for row, clip in enumerate(self.clips):
            targets_BC[row, list(clip.labels)] = 1
        return targets_BC if self.augmentations is None else mixed_targets(targets_BC, self.augmentations)

    def present(self, config: Config, device: torch.device) -> torch.Tensor | None:
        """[B, N] bool, where the patches hold audio and not padding alone; None where padding is seen as it is."""
        if config.data.padding == "constant":
            return None
        present_BN = present_patches(self.lengths, self.augmentations, config.data.frames, config.model.patch)
        return torch.from_numpy(present_BN).to(device)


def _arrived(values: dict[str, Any], samples: torch.Tensor) -> Batch:
    """A batch in the process that asked for it; its samples are views of one tensor in shared memory."""
    if values["patches_BNP"] is None:
        waves = np.split(samples.numpy(), np.cumsum(values["lengths"])[:-1])
        pairs = zip(values["clips"], waves, strict=True)
        values["clips"] = [replace(clip, samples=wave_S) for clip, wave_S in pairs]
    return Batch(**values)


class PatchMaker:
    """Makes the patches of batches in a worker process, by the function that DALI's graph calls on a CPU.

    They come in turn in the same few stretches of shared memory, since fresh ones cost a third of all the time.
    """

    def __init__(self, layout: PatchLayout, augmented: bool, batches_ahead: int):
        """Prepare nothing yet; the object is pickled on its way to the worker.

        Args:
            layout: of the patches.
            augmented: whether the batches' augmentations happen to the clips.
            batches_ahead: how many batches a worker may finish before the first of them is taken.
        """
        self._layout, self._augmented = layout, augmented
        self._num_slots = batches_ahead + 2  # one that the caller has, one on its way to it
        self._slots: deque[torch.Tensor] = deque()
        self._cpu_patches: CpuPatches | None = None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its patches and without its samples; the patches are good until the next batch is taken."""
        patches_BNP = self._next_slot(len(batch.clips))
        if self._cpu_patches is None:
            self._cpu_patches = CpuPatches(self._layout, 0, threads=0)
        self._cpu_patches.write_to(patches_BNP.numpy())
        augmentations = batch.augmentations if self._augmented else None
        waves = used_parts([clip.samples for clip in batch.clips], augmentations, self._layout.frames)
        if self._augmented:
            assert augmentations is not None, "these batches are not made for training"
            self._cpu_patches.augmented(waves, list(packed(augmentations)))
        else:
            self._cpu_patches.plain(waves)
        clips = [replace(clip, samples=clip.samples[:0]) for clip in batch.clips]
        return replace(batch, clips=clips, patches_BNP=patches_BNP)

    def _next_slot(self, num_clips: int) -> torch.Tensor:
        """The stretch of memory that was used longest ago."""
        if len(self._slots) < self._num_slots:
            self._slots.append(torch.empty(num_clips, *self._layout.shape).share_memory_())
        else:
            self._slots.rotate(-1)
        if len(self._slots[-1]) < num_clips:
            self._slots[-1] = torch.empty(num_clips, *self._layout.shape).share_memory_()
        return self._slots[-1][:num_clips]
