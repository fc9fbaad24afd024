"""From shards to batches of clips.

1. order     positions of the run -> draws                              asda.data.order, pure arithmetic
2. frames    draw -> one verified zstd frame of a shard                 asda.data.shards, in threads
3. samples   frames joined to a tar stream -> webdataset's stages       tar_file_expander | group_by_keys
4. clips     wav and json members -> int16 samples, labels, crop        decode
5. batches   clips of one micro-batch, read ahead in order              `training_batches`, `evaluation_batches`
6. patches   normalised log-mel patches on the device                   asda.data.pipeline, in DALI

Any frames of any shards, one after the other, form a valid tar stream (shards/README.md). So the order of the clips is
chosen before anything is read, and webdataset still sees one archive with neighbouring members.
"""

import io
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch
import xxhash
from webdataset.tariterators import group_by_keys, tar_file_expander

from asda.config import Config, DataConfig, LogMelStats
from asda.data.audio import decode_wav
from asda.data.fbank import num_samples
from asda.data.index import TAR_END, DatasetIndex
from asda.data.order import Draw, ShuffledOrder, clip_rng, rank_slice
from asda.data.pipeline import PatchPipeline
from asda.data.shards import ShardFile, load_dataset
from asda.errors import UserError


class ClipDataset:
    """The clips of one or more splits as one numbered sequence.

    Attributes:
        vocabulary: class names, a label's id is its position; empty where labels are not used.
        num_labels: labels of all clips together; equal to the number of clips where each has one.
        log_mel: mean and standard deviation of the log-mel values of all clips.
        shards: all shards, in the order that numbers the clips.
        fingerprint: one hash of all shards; what it stays equal for is the same data in the same order.
    """

    def __init__(self, specs: str | list[str], *, labelled: bool):
        """Open "FOLDER:SPLIT" or "FOLDER:SPLIT+SPLIT", or a list of such.

        Args:
            specs: which splits of which folders.
            labelled: whether the labels are used; then all folders must have the same vocabulary.

        Raises:
            UserError: a folder, split or shard is missing or damaged, or the vocabularies differ.
        """
        specs = [specs] if isinstance(specs, str) else specs
        parts = [(index, name) for spec in specs for index, name in _parse_spec(spec)]
        self.vocabulary = _one_vocabulary([index for index, _ in parts]) if labelled else ()
        self.shards = [ShardFile(index.folder, shard) for index, name in parts for shard in index.splits[name].shards]
        self.log_mel = _pooled_stats([index.splits[name].log_mel for index, name in parts])
        self.num_labels = sum(sum(index.splits[name].class_counts) for index, name in parts)
        self.fingerprint = xxhash.xxh3_128_hexdigest("".join(shard.entry.hash for shard in self.shards).encode())
        self._first_clip = [0, *accumulate(shard.entry.clips for shard in self.shards)]

    def __len__(self) -> int:
        return self._first_clip[-1]

    @property
    def shard_clips(self) -> list[int]:
        """Number of clips in each shard."""
        return [shard.entry.clips for shard in self.shards]

    def locate(self, clip: int) -> tuple[ShardFile, int]:
        """The shard that holds a clip, and the clip's place in it."""
        number = bisect_right(self._first_clip, clip) - 1
        return self.shards[number], clip - self._first_clip[number]


@dataclass(frozen=True)
class Clip:
    """One visit of one clip, decoded."""

    draw: Draw
    key: str
    samples: np.ndarray  # [S] int16 at 16 kHz
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """The clips of one micro-batch, in order; masks only where there are students."""

    clips: list[Clip]
    visible_BMK: np.ndarray | None  # [B, M, K] int64, the patches that each student sees

    def targets(self, num_classes: int) -> np.ndarray:
        """[B, C] float32, 1 where the clip has the label."""
        targets = np.zeros((len(self.clips), num_classes), dtype=np.float32)
        for row, clip in enumerate(self.clips):
            targets[row, list(clip.labels)] = 1
        return targets


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
) -> Iterator[Batch]:
    """Rank's micro-batches from step `first_step` on, without end; `batch` clips a step over all ranks."""
    order = ShuffledOrder(dataset.shard_clips, seed, config.group_shards)

    def draws() -> Iterator[list[Draw]]:
        start = first_step * batch
        while True:
            mine = rank_slice(start, start + batch, rank, world_size)
            for low in range(mine.start, mine.stop, micro_batch):
                yield order.draws(low, min(low + micro_batch, mine.stop))
            start += batch

    def load(batch_draws: list[Draw]) -> Batch:
        clips = fetch_clips(dataset, batch_draws)
        rngs = [clip_rng(seed, clip.draw) for clip in clips]
        if config.crop == "random":
            clips = [_random_crop(clip, config.frames, rng) for clip, rng in zip(clips, rngs, strict=True)]
        return Batch(clips, np.stack([masks(rng) for rng in rngs]) if masks else None)

    return _read_ahead(draws(), load, config.threads, config.prefetch)


def evaluation_batches(
    dataset: ClipDataset, config: DataConfig, *, batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Rank's share of the clips, in order, once; all ranks together see every clip exactly once."""
    mine = rank_slice(0, len(dataset), rank, world_size)
    draws = ([Draw(0, clip) for clip in mine[low : low + batch]] for low in range(0, len(mine), batch))
    return _read_ahead(draws, lambda some: Batch(fetch_clips(dataset, some), None), config.threads, config.prefetch)


def with_patches(
    batches: Iterator[Batch], config: Config, batch_size: int, device: torch.device
) -> PatchPipeline[Batch]:
    """Add the patches: iterates over (float32 [B, N, P] where DALI computes them, the batch they belong to)."""
    stats = config.data.log_mel
    assert isinstance(stats, LogMelStats), "train.py writes the figures of the shards into the configuration"
    if config.data.device == "gpu" and device.type != "cuda":
        raise UserError("data.device is gpu, but this machine has no CUDA device; use auto or cpu")
    on_gpu = config.data.device != "cpu" and device.type == "cuda"
    return PatchPipeline(
        (([clip.samples for clip in batch.clips], batch) for batch in batches),
        frames=config.data.frames,
        patch=config.model.patch,
        mean=stats.mean,
        std=stats.std,
        pad_log_mel=config.data.pad_log_mel,
        batch_size=batch_size,
        device="gpu" if on_gpu else "cpu",
        threads=config.data.threads,
        prefetch=2,  # what DALI holds ready; the reading ahead is done by the threads before it
    )


def fetch_clips(dataset: ClipDataset, draws: list[Draw]) -> list[Clip]:
    """Read, verify and decode clips, in the order asked for.

    Raises:
        UserError: a frame is damaged, or holds another clip than the index says; nothing of it is used.
    """
    places = [dataset.locate(draw.clip) for draw in draws]
    keys = [shard.index.keys[number] for shard, number in places]
    frames = [shard.read_frame(number) for shard, number in places]
    samples = list(group_by_keys(tar_file_expander(_tar_streams(keys, frames))))
    if [sample["__key__"] for sample in samples] != keys:
        raise UserError(f"the frames of {keys} hold other clips; make the shards again with tools/make_shards.py")
    return [_decode(*args) for args in zip(draws, places, samples, strict=True)]


def _tar_streams(keys: list[str], frames: list[bytes]) -> Iterator[dict]:
    """Join frames to as few tar streams as possible: webdataset wants a key once in a stream."""
    start = 0
    while start < len(keys):
        stop = start + next((n for n, key in enumerate(keys[start:]) if key in keys[start : start + n]), len(keys))
        yield {"url": "frames", "stream": io.BytesIO(b"".join(frames[start:stop]) + TAR_END)}
        start = stop


def _decode(draw: Draw, place: tuple[ShardFile, int], sample: dict) -> Clip:
    shard, number = place
    try:
        samples = decode_wav(sample["wav"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"shard {shard.entry.name}, key {sample['__key__']}: the frame is intact, but its wav member is not what "
            f"shards/README.md says ({error}); make the shard again with tools/make_shards.py"
        ) from None
    return Clip(draw, sample["__key__"], samples, tuple(shard.index.labels[number]))


def _random_crop(clip: Clip, frames: int, rng: np.random.Generator) -> Clip:
    """A random stretch that makes exactly `frames` log-mel frames, of clips that have more."""
    length = num_samples(frames)
    spare = len(clip.samples) - length
    if spare <= 0:
        return clip
    start = int(rng.integers(spare + 1))
    return Clip(clip.draw, clip.key, clip.samples[start : start + length], clip.labels)


def _read_ahead(
    draws: Iterable[list[Draw]], load: Callable[[list[Draw]], Batch], threads: int, prefetch: int
) -> Iterator[Batch]:
    """Load batches in `threads` threads, at most `prefetch` ahead, and yield them in order."""
    draws = iter(draws)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="asda-reader")
    try:
        waiting: deque[Future[Batch]] = deque(pool.submit(load, some) for some in islice(draws, prefetch))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(load, some) for some in islice(draws, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _parse_spec(spec: str) -> list[tuple[DatasetIndex, str]]:
    folder, colon, names = spec.rpartition(":")
    if not colon or not folder or not names:
        raise UserError(
            f"cannot read the data {spec!r}; write FOLDER:SPLIT or FOLDER:SPLIT+SPLIT, as in shards/esc:fold1"
        )
    index = load_dataset(Path(folder), names.split("+"))
    return [(index, name) for name in names.split("+")]


def _one_vocabulary(indexes: list[DatasetIndex]) -> tuple[str, ...]:
    first = indexes[0]
    for other in indexes[1:]:
        if other.vocabulary != first.vocabulary:
            raise UserError(
                f"{first.folder} and {other.folder} have different vocabularies ({len(first.vocabulary)} and "
                f"{len(other.vocabulary)} classes); make both with the same --labels FILE"
            )
    return first.vocabulary


def _pooled_stats(stats: list) -> LogMelStats:
    """Mean and standard deviation over the union of several sets of values."""
    frames = np.array([s.frames for s in stats], dtype=np.float64)
    means = np.array([s.mean for s in stats])
    mean = float(np.average(means, weights=frames))
    variance = np.average(np.array([s.std for s in stats]) ** 2 + (means - mean) ** 2, weights=frames)
    return LogMelStats(mean=mean, std=float(np.sqrt(variance)))
