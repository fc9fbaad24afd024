"""From shards to micro-batches of patches: a webdataset.DataPipeline, whose stages are generator functions.

    stream = training_batches(...).compose(make_patches(...))

1. draws     which clips each micro-batch visits; shards that come soon are announced    list[Draw]
2. read      ahead, in threads: clips are read, verified, decoded and cropped; masks     Batch
             and augmentations are drawn
3. patches   normalised log-mel patches on the device                                    ([B, N, P], Batch)

A stage takes the samples of the stage before it and yields its own, in the thread of the training loop. `compose` adds
one: stream.compose(my_stage). Slow work on a batch belongs into `read`, which runs in the threads.

The order is chosen before anything is read (asda.data.order), so plain webdataset's stages, which read a shard from
its first sample to its last, are not used: every clip is reached by its offset, within the few shards of a group.

Shapes: B clips, M students, K visible patches of a student, N patches, P pixels of a patch, C classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from webdataset.pipeline import DataPipeline

from asda.config.data import AugmentConfig, DataConfig, LogMelStats
from asda.config.run import Config
from asda.data.clips import Clip, ClipDataset, DamageBudget, read_clips
from asda.data.features.augment import ClipAugmentation, draw_augmentations, mixed_targets, present_patches
from asda.data.features.dali import PatchPipeline
from asda.data.features.fbank import num_samples
from asda.data.order import ClipOrder, Draw, clip_rng, rank_slice
from asda.data.prefetch import Note, read_ahead
from asda.errors import UserError
from asda.models.patches import PatchLayout

MaskMaker = Callable[[np.random.Generator], np.ndarray]  # -> [M, K] int64
PatchStage = Callable[[Iterator["Batch"]], Iterator[tuple[Tensor, "Batch"]]]


@dataclass(frozen=True)
class Batch:
    """The clips of one micro-batch, in order."""

    clips: list[Clip]
    visible_BMK: np.ndarray | None = None  # int64, the patches that each student sees; None without students
    augmentations: list[ClipAugmentation] | None = None  # one for each clip; None changes nothing

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples of each clip."""
        return tuple(len(clip.samples) for clip in self.clips)

    def targets(self, num_classes: int) -> np.ndarray:
        """Return [B, C] float32: 1 if the clip has the label; for a mixture the shares of its clips."""
        targets_BC = np.zeros((len(self.clips), num_classes), dtype=np.float32)
        for row, clip in enumerate(self.clips):
            targets_BC[row, list(clip.labels)] = 1
        return targets_BC if self.augmentations is None else mixed_targets(targets_BC, self.augmentations)

    def present(self, config: Config, device: torch.device) -> Tensor | None:
        """Return [B, N] bool, whether a patch holds audio; None if the network sees padding as it is."""
        if config.data.padding == "constant":
            return None
        present_BN = present_patches(self.lengths, self.augmentations, config.data.frames, config.model.patch)
        return torch.from_numpy(present_BN).to(device)


def training_batches(
    dataset: ClipDataset,
    config: DataConfig,
    *,
    seed: int,
    first_step: int,
    batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    masks: MaskMaker | None,
    budget: DamageBudget | None = None,
) -> DataPipeline:
    """Return stages 1 and 2 of training: this rank's micro-batches, without end, from any `first_step` on.

    A step has `batch` clips over all ranks, a micro-batch at most `micro_batch`. `dataset` was opened with the datasets
    of `config`. `masks` draws what the students of a clip see, if there are students. Without a `budget`, the first
    damaged clip is an error.

    Raises:
        UserError: balanced draws need sample weights that are missing; while iterating, what `read_clips` and
            `read_ahead` raise.
    """
    order = ClipOrder(dataset.ordered(config), seed=seed, group_shards=config.group_shards)

    def draws() -> Iterator[list[Draw]]:
        start = announced = first_step * batch
        while True:
            if start >= announced:  # this group of shards and the next, each half a group ahead of need
                for shard in order.shards_ahead(start, order.draws_per_group + 1):
                    dataset.shards[shard].prefetch()
                announced = start + order.draws_per_group // 2
            mine = rank_slice(start, start + batch, rank, world_size)
            for low in range(mine.start, mine.stop, micro_batch):
                yield order.draws(low, min(low + micro_batch, mine.stop))
            start += batch

    def read(draws: list[Draw], note: Note) -> Batch:  # in a thread; all chance follows from the draw
        clips = read_clips(dataset, draws, budget, note)
        if config.crop == "random":
            clips = [_random_crop(clip, config.frames, seed) for clip in clips]
        augmentations = draw_augmentations(draws, Batch(clips).lengths, config, seed)
        visible_BMK = np.stack([masks(clip_rng(seed, draw, "masks")) for draw in draws]) if masks else None
        return Batch(clips, visible_BMK, augmentations)

    return _pipeline(draws, read, config)


def evaluation_batches(
    dataset: ClipDataset, config: DataConfig, *, batch: int, rank: int, world_size: int
) -> DataPipeline:
    """Return stages 1 and 2 of evaluation: this rank's share of the clips, in order, once. Always strict.

    All ranks together see every clip exactly once.
    """
    mine = rank_slice(0, len(dataset), rank, world_size)

    def draws() -> Iterator[list[Draw]]:
        for low in range(0, len(mine), batch):
            yield [Draw(0, clip) for clip in mine[low : low + batch]]

    def read(draws: list[Draw], note: Note) -> Batch:
        return Batch(read_clips(dataset, draws, note=note))

    return _pipeline(draws, read, config)


def _random_crop(clip: Clip, frames: int, seed: int) -> Clip:
    """Cut a random stretch of exactly `frames` log-mel frames out of a clip that has more."""
    length = num_samples(frames)
    if (spare := len(clip.samples) - length) <= 0:
        return clip
    start = int(clip_rng(seed, clip.draw, "crop").integers(spare + 1))
    return replace(clip, samples=clip.samples[start : start + length])


def _pipeline(
    draws: Callable[[], Iterator[list[Draw]]], read: Callable[[list[Draw], Note], Batch], config: DataConfig
) -> DataPipeline:
    """Join stages 1 and 2: data.threads threads read, data.prefetch micro-batches ahead."""
    ahead = partial(read_ahead, work=read, threads=config.threads, ahead=config.prefetch, timeout_s=config.timeout_s)
    return DataPipeline(draws, ahead)


def make_patches(config: Config, device: torch.device, batch_size: int, *, training: bool = False) -> PatchStage:
    """Return stage 3: from a Batch of at most `batch_size` clips to (its patches, float32 [B, N, P], the Batch).

    The CPU makes the patches if `device` is one, or data.device says so. data.augment happens only in `training`.

    Raises:
        UserError: data.device is gpu and there is no CUDA device.
    """
    data, stats = config.data, config.data.log_mel
    if data.device == "gpu" and device.type != "cuda":
        raise UserError("data.device is gpu, but this machine has no CUDA device; use auto or cpu")
    assert isinstance(stats, LogMelStats), 'the trainer puts the figures of the shards in the place of "dataset"'
    mask_first = data.augment.spec_augment.order == "before_normalisation"
    settings = {
        "layout": PatchLayout(data.frames, config.model.patch, stats.mean, stats.std, data.pad_log_mel, mask_first),
        "batch_size": batch_size,
        "device": "gpu" if data.device != "cpu" and device.type == "cuda" else "cpu",
        "threads": max(1, data.threads),
        "prefetch": 2,  # what DALI holds ready; the reading ahead is done before it
        "augmented": training and data.augment != AugmentConfig(),
    }

    def patches(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Batch]]:
        source = (([clip.samples for clip in batch.clips], batch.augmentations, batch) for batch in batches)
        with PatchPipeline(source, **settings) as made:
            yield from made

    return patches
