"""One micro-batch: its clips and its masks."""

from dataclasses import dataclass

import numpy as np
import torch

from asda.config.run import Config
from asda.data.clips import Clip
from asda.data.features.augment import ClipAugmentation, mixed_targets, present_patches


@dataclass(frozen=True)
class Batch:
    """The clips of one micro-batch, in order; masks only where there are students."""

    clips: list[Clip]
    visible_BMK: np.ndarray | None  # [B, M, K] int64, the patches that each student sees
    augmentations: list[ClipAugmentation] | None = None  # what happens to each clip
    lengths: tuple[int, ...] = ()  # samples of each clip

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
