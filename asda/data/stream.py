"""From shards to batches of clips: a webdataset pipeline whose samples are micro-batches.

1. draws     which clips a micro-batch visits                  asda.data.order, pure arithmetic
2. shards    that come next are fetched, or announced          asda.data.remote.storage
3. clips     read, verified, decoded                           asda.data.clips
4. batches   crop, masks and augmentation of every visit       `training_batches`, `evaluation_batches`
5. patches   normalised log-mel patches on the device          asda.data.features.dali, in DALI

Steps 3 and 4 are done ahead in threads (asda.data.prefetch).

The order is chosen before anything is read, so a shard's neighbours are not read one after another as webdataset does
alone; every frame of a shard is reached by its offset instead, within the few shards of a group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from webdataset.pipeline import DataPipeline

from asda.config.data import AugmentConfig, DataConfig, LogMelStats
from asda.config.run import Config
from asda.data.batches import Batch
from asda.data.clips import Clip, ClipDataset, DamageBudget, read_clips
from asda.data.features.augment import ClipAugmentation, draw_augmentations
from asda.data.features.cpu import PatchLayout
from asda.data.features.dali import PatchPipeline
from asda.data.features.fbank import num_samples
from asda.data.order import ClipOrder, Draw, clip_rng, rank_slice
from asda.data.prefetch import Note, read_ahead
from asda.errors import UserError

MaskMaker = Callable[[np.random.Generator], np.ndarray]  # -> [M, K] int64


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
) -> Iterator[Batch]:
    """Rank's micro-batches from step `first_step` on, without end; `batch` clips a step over all ranks.

    Args:
        dataset: opened with the datasets of `config`.
        config: of the data.
        seed: of the run.
        first_step: the first that is wanted; any step is reached at once.
        batch: clips of a step.
        micro_batch: most clips of a batch that is given out.
        rank: whose share.
        world_size: ranks.
        masks: draws what the students of a clip see, if there are students.
        budget: of damaged clips; None is strict.

    Raises:
        UserError: what `read_clips` and `read_ahead` raise; sample weights that are needed and not there.
    """
    order = ClipOrder(dataset.ordered(config), seed=seed, group_shards=config.group_shards)

    def draws() -> Iterator[list[Draw]]:
        start = announced = first_step * batch
        while True:
            if start >= announced:  # this group of shards and the next, each half a group ahead of need
                dataset.announce(order.shards_ahead(start, order.draws_per_group + 1))
                announced = start + order.draws_per_group // 2
            mine = rank_slice(start, start + batch, rank, world_size)
            for low in range(mine.start, mine.stop, micro_batch):
                yield order.draws(low, min(low + micro_batch, mine.stop))
            start += batch

    budget = budget or DamageBudget()
    yield from _ahead(draws(), _TrainingLoad(dataset, config, seed, masks, budget), config)


@dataclass(frozen=True)
class _TrainingLoad:
    """From the visits of a micro-batch to its batch, in a thread."""

    dataset: ClipDataset
    config: DataConfig
    seed: int
    masks: MaskMaker | None
    budget: DamageBudget

    def __call__(self, draws: list[Draw], note: Note) -> Batch:
        clips = read_clips(self.dataset, draws, self.budget, note)
        if self.config.crop == "random":
            clips = [_random_crop(clip, self.config.frames, self.seed) for clip in clips]
        visible = [self.masks(clip_rng(self.seed, draw, "masks")) for draw in draws] if self.masks else None
        lengths = tuple(len(clip.samples) for clip in clips)
        augmentations = draw_augmentations(draws, lengths, self.config, self.seed)
        return Batch(clips, np.stack(visible) if visible else None, augmentations, lengths=lengths)


def evaluation_batches(
    dataset: ClipDataset,
    config: DataConfig,
    *,
    batch: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """Rank's share of the clips, in order, once; all ranks together see every clip exactly once. Always strict."""
    mine = rank_slice(0, len(dataset), rank, world_size)
    draws = ([Draw(0, clip) for clip in mine[low : low + batch]] for low in range(0, len(mine), batch))
    return _ahead(draws, _EvaluationLoad(dataset), config)


@dataclass(frozen=True)
class _EvaluationLoad:
    """As _TrainingLoad, without chance."""

    dataset: ClipDataset

    def __call__(self, draws: list[Draw], note: Note) -> Batch:
        clips = read_clips(self.dataset, draws, note=note)
        return Batch(clips, None, lengths=tuple(len(clip.samples) for clip in clips))


def _ahead(
    draws: Iterator[list[Draw]], load: Callable[[list[Draw], Note], Batch], config: DataConfig
) -> Iterator[Batch]:
    """Batches in order, loaded by threads."""
    ahead = partial(read_ahead, work=load, threads=config.threads, ahead=config.prefetch, timeout_s=config.timeout_s)
    return iter(DataPipeline(lambda: draws, ahead))


@contextmanager
def with_patches(
    batches: Iterator[Batch], config: Config, batch_size: int, device: torch.device, *, training: bool = False
) -> Iterator[Iterator[tuple[torch.Tensor, Batch]]]:
    """Add the patches: gives an iterator over (float32 [B, N, P], their batch).

    While training, what data.augment asks for happens to the clips.
    """
    layout, augmented = _layout(config), training and config.data.augment != AugmentConfig()

    def augmentations(batch: Batch) -> list[ClipAugmentation]:
        assert batch.augmentations is not None, "these batches are not made for training"
        return batch.augmentations

    with PatchPipeline(
        (([clip.samples for clip in batch.clips], batch) for batch in batches),
        frames=layout.frames,
        patch=layout.patch,
        mean=layout.mean,
        std=layout.std,
        pad_log_mel=layout.pad_log_mel,
        batch_size=batch_size,
        device="gpu" if _on_gpu(config.data, device) else "cpu",
        threads=max(1, config.data.threads),
        prefetch=2,  # what DALI holds ready; the reading ahead is done before it
        augmentations=augmentations if augmented else None,
        mask_first=layout.mask_first,
    ) as pipeline:
        yield pipeline


def _on_gpu(config: DataConfig, device: torch.device) -> bool:
    if config.device == "gpu" and device.type != "cuda":
        raise UserError("data.device is gpu, but this machine has no CUDA device; use auto or cpu")
    return config.device != "cpu" and device.type == "cuda"


def _layout(config: Config) -> PatchLayout:
    stats = config.data.log_mel
    assert isinstance(stats, LogMelStats), "train.py writes the figures of the shards into the configuration"
    mask_first = config.data.augment.spec_augment.order == "before_normalisation"
    return PatchLayout(
        config.data.frames, config.model.patch, stats.mean, stats.std, config.data.pad_log_mel, mask_first
    )


def _random_crop(clip: Clip, frames: int, seed: int) -> Clip:
    """A random stretch that makes exactly `frames` log-mel frames, of clips that have more."""
    length = num_samples(frames)
    spare = len(clip.samples) - length
    if spare <= 0:
        return clip
    start = int(clip_rng(seed, clip.draw, "crop").integers(spare + 1))
    return replace(clip, samples=clip.samples[start : start + length])
