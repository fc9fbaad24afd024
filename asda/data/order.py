"""The order of clips: arithmetic, not state.

Which clip stands at which position of a run follows from (clips per shard, seed, position) alone: not from ranks,
threads, or where an earlier run stopped. A run's place in its data is therefore one integer, the number of clips
drawn so far, and a stopped run continues by asking for the next position.

    position 0 ............ N-1 | N ............ 2N-1 | ...
             epoch 0            |  epoch 1            |
    global batch s = positions [s * batch, (s + 1) * batch); rank r of R takes the r-th of R equal slices of it.

An epoch visits every clip exactly once. Shards are shuffled, neighbours in that order form groups of `group_shards`,
and the clips of a group are shuffled together: reads stay within a few shards at a time, and since make_shards.py
already spreads the clips over the shards at random, groups are well mixed.
"""

from typing import NamedTuple

import numpy as np

ORDER_VERSION = 1  # a change of the arithmetic below changes every run's order: raise this, and refuse older states


class Draw(NamedTuple):
    """One visit of one clip."""

    epoch: int
    clip: int  # position in the dataset: shards in their listed order, clips in the order of the shard


def mix64(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits, one to one (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_of(*parts: int) -> np.uint64:
    """One hash of several integers, the order of which counts."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix64(state ^ np.uint64(part))
    return state[0]


def epoch_order(shard_clips: np.ndarray, seed: int, epoch: int, group_shards: int) -> np.ndarray:
    """The clips of one epoch in the order of their visits.

    Args:
        shard_clips: [S] number of clips in each shard.
        seed: the run's seed.
        epoch: 0, 1, ...
        group_shards: shards whose clips are shuffled together.

    Returns:
        [N] int64, a permutation of the N = sum(shard_clips) clips.
    """
    shards = np.arange(len(shard_clips), dtype=np.uint64)
    shard_rank = np.argsort(np.argsort(mix64(shards ^ hash_of(seed, epoch, 1))))
    group_of_clip = np.repeat(shard_rank // group_shards, shard_clips)
    clips = np.arange(group_of_clip.size, dtype=np.uint64)
    return np.lexsort((mix64(clips ^ hash_of(seed, epoch, 2)), group_of_clip))


class ShuffledOrder:
    """Positions of a run, epoch after epoch without end. Keeps the order of the epoch it was asked for last."""

    def __init__(self, shard_clips: list[int], seed: int, group_shards: int):
        self._shard_clips = np.asarray(shard_clips, dtype=np.int64)
        self._seed = seed
        self._group_shards = group_shards
        self._num_clips = int(self._shard_clips.sum())
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def draws(self, start: int, stop: int) -> list[Draw]:
        """The visits at positions start .. stop - 1."""
        return [self._draw(position) for position in range(start, stop)]

    def _draw(self, position: int) -> Draw:
        epoch, place = divmod(position, self._num_clips)
        if epoch != self._epoch:
            self._order = epoch_order(self._shard_clips, self._seed, epoch, self._group_shards)
            self._epoch = epoch
        return Draw(epoch, int(self._order[place]))


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> range:
    """Rank's share of the positions start .. stop - 1: contiguous, disjoint, together all, even to 1."""
    size = stop - start
    return range(start + size * rank // world_size, start + size * (rank + 1) // world_size)


def clip_rng(seed: int, draw: Draw) -> np.random.Generator:
    """Randomness of one visit (crop, masks), the same on whatever rank, thread or resumed run it happens."""
    key = [int(hash_of(seed, draw.epoch, draw.clip, 3)), int(hash_of(seed, draw.epoch, draw.clip, 4))]
    return np.random.Generator(np.random.Philox(key=key))
