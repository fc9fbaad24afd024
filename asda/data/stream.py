"""From shards to batches of clips: a webdataset pipeline whose samples are micro-batches.

1. draws     which clips a micro-batch visits                  asda.data.order, pure arithmetic
2. shards    that come next are fetched, or announced          asda.data.remote.storage
3. clips     read, verified, decoded                           asda.data.clips
4. batches   crop, masks and augmentation of every visit       `training_batches`, `evaluation_batches`
5. patches   normalised log-mel patches on the device          asda.data.features.dali, in DALI

Steps 3 and 4 are done ahead in threads or, with data.workers, in processes (asda.data.prefetch); those make the patches
too where no GPU does.

The order is chosen before anything is read, so a shard's neighbours are not read one after another as webdataset does
alone; every frame of a shard is reached by its offset instead, within the few shards of a group.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from webdataset.pipeline import DataPipeline

from asda.config.data import AugmentConfig, DataConfig, LogMelStats
from asda.config.run import Config
from asda.data.batches import Batch, PatchMaker
from asda.data.clips import Clip, ClipDataset, DamageBudget, Note, read_clips
from asda.data.features.augment import ClipAugmentation, draw_augmentations
from asda.data.features.cpu import PatchLayout
from asda.data.features.dali import PatchPipeline
from asda.data.features.fbank import num_samples
from asda.data.order import ClipOrder, Draw, clip_rng, rank_slice
from asda.data.prefetch import read_ahead, read_ahead_in_processes
from asda.errors import UserError

MaskMaker = Callable[[np.random.Generator], np.ndarray]  # -> [M, K] int64; pickled where there are worker processes


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
    patches: PatchMaker | None = None,
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
        patches: makes them in worker processes; None leaves it to DALI. See `patch_maker`.

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
    load = _TrainingLoad(dataset, config, seed, masks, budget, patches)
    for loaded in _ahead(draws(), load, config, dataset):
        if loaded.damaged:
            budget.add(loaded.damaged)
        yield loaded


@dataclass(frozen=True)
class _TrainingLoad:
    """From the visits of a micro-batch to its batch, in a thread or in a worker process."""

    dataset: ClipDataset
    config: DataConfig
    seed: int
    masks: MaskMaker | None
    budget: DamageBudget
    patches: PatchMaker | None

    def __call__(self, draws: list[Draw], note: Note) -> Batch:
        clips = read_clips(self.dataset, draws, self.budget, note)
        if self.config.crop == "random":
            clips = [_random_crop(clip, self.config.frames, self.seed) for clip in clips]
        visible = [self.masks(clip_rng(self.seed, draw, "masks")) for draw in draws] if self.masks else None
        lengths = tuple(len(clip.samples) for clip in clips)
        augmentations = draw_augmentations(draws, lengths, self.config, self.seed)
        batch = Batch(clips, np.stack(visible) if visible else None, augmentations, lengths=lengths)
        batch = self.patches(batch) if self.patches else batch
        return replace(batch, damaged=frozenset(self.budget.met))


def evaluation_batches(
    dataset: ClipDataset,
    config: DataConfig,
    *,
    batch: int,
    rank: int,
    world_size: int,
    patches: PatchMaker | None = None,
) -> Iterator[Batch]:
    """Rank's share of the clips, in order, once; all ranks together see every clip exactly once. Always strict."""
    mine = rank_slice(0, len(dataset), rank, world_size)
    draws = ([Draw(0, clip) for clip in mine[low : low + batch]] for low in range(0, len(mine), batch))
    return _ahead(draws, _EvaluationLoad(dataset, patches), config, dataset)


@dataclass(frozen=True)
class _EvaluationLoad:
    """As _TrainingLoad, without chance."""

    dataset: ClipDataset
    patches: PatchMaker | None

    def __call__(self, draws: list[Draw], note: Note) -> Batch:
        clips = read_clips(self.dataset, draws, note=note)
        batch = Batch(clips, None, lengths=tuple(len(clip.samples) for clip in clips))
        return self.patches(batch) if self.patches else batch


def _ahead(
    draws: Iterator[list[Draw]],
    load: Callable[[list[Draw], Note], Batch],
    config: DataConfig,
    dataset: ClipDataset,
) -> Iterator[Batch]:
    """Batches in order, loaded by threads of this process or by worker processes."""

    def by_threads(source: Iterator[list[Draw]]) -> Iterator[Batch]:
        return read_ahead(source, load, threads=config.threads, ahead=config.prefetch, timeout_s=config.timeout_s)

    def by_processes(source: Iterator[list[Draw]]) -> Iterator[Batch]:
        return read_ahead_in_processes(
            source,
            load,
            processes=config.workers,
            ahead_each=batches_per_worker(config),
            timeout_s=config.timeout_s,
            describe=lambda some: " and ".join(sorted({dataset.locate(draw.clip)[0].entry.name for draw in some})),
        )

    return iter(DataPipeline(lambda: draws, by_processes if config.workers else by_threads))


def patch_maker(config: Config, device: torch.device, *, training: bool = False) -> PatchMaker | None:
    """What makes the patches inside worker processes: where there are such, and no GPU makes them."""
    if not config.data.workers or _on_gpu(config.data, device):
        return None
    augmented = training and config.data.augment != AugmentConfig()
    return PatchMaker(_layout(config), augmented, batches_per_worker(config.data))


@contextmanager
def with_patches(
    batches: Iterator[Batch], config: Config, batch_size: int, device: torch.device, *, training: bool = False
) -> Iterator[Iterator[tuple[torch.Tensor, Batch]]]:
    """Add the patches: gives an iterator over (float32 [B, N, P] where they are made, the batch they belong to).

    DALI makes them, but for batches that have theirs from a `patch_maker`. While training, what data.augment asks for
    happens to the clips.
    """
    if patch_maker(config, device):
        yield _hold(batches, config.data.workers * (batches_per_worker(config.data) + 2))
        return
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


def _hold(batches: Iterator[Batch], num_held: int) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Take out the patches, and keep the last ones: torch finds their shared memory mapped when it comes again."""
    held: deque[torch.Tensor] = deque(maxlen=num_held)
    for batch in batches:
        assert batch.patches_BNP is not None, "these batches are made without a patch_maker"
        held.append(batch.patches_BNP)
        yield batch.patches_BNP, batch


def batches_per_worker(config: DataConfig) -> int:
    """How far ahead each worker process works."""
    return max(1, config.prefetch // max(1, config.workers))


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
