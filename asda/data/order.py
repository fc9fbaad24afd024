"""The order of clips: arithmetic, not state.

Which clip stands at which position of a run follows from (clips per shard, weights, seed, position) alone: not from
ranks, threads, or where an earlier run stopped. A run's place in its data is therefore one integer, the number of
clips drawn so far, and a stopped run continues by asking for the next position.

    position 0 ........... V-1 | V ........... 2V-1 | ...        V visits make an epoch
             epoch 0           | epoch 1            |
    global batch s = positions [s * batch, (s + 1) * batch); rank r of R takes the r-th of R equal slices of it.

1. mixture  position -> (dataset, position in that dataset); only where several datasets are mixed do they differ
2. visits   epoch -> which clips are visited: every clip once (shuffled, sequential), or a weighted choice (balanced)
3. groups   the shards are shuffled and cut into groups of `group_shards`; all visits of a group come together
4. clips    the visits of one group, shuffled (sequential: all shards and clips stay as they are)

So reads stay within a few shards at a time, and since make_shards.py already spreads the clips over the shards at
random, groups are well mixed. A jump costs steps 1 to 4 for one epoch and one group: the shuffled order of 2 million
clips is never built as a whole. Steps 2 to 4 follow from hashes of (seed, dataset, epoch).

Shapes: D datasets, S shards of one of them, N its clips, V its visits in an epoch, G groups, B positions of a block.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from asda.config.data import MIN_SHARE, OrderConfig
from asda.errors import UserError

ORDER_VERSION = 2  # a change of the arithmetic below changes every run's order: raise this, and refuse older states
BLOCK = round(1 / MIN_SHARE)  # positions in which a mixture keeps its shares; the smallest still gets one of them
REPEAT_BIT = 40  # of a visit's number: clip + (repeat << 40); a dataset has fewer than 2**40 clips
CHUNK = 1 << 16  # clips hashed at a time, so that they stay in the processor's cache

_SHARDS, _CLIPS, _CHOICE, _MIXTURE = range(4)  # what a hash is for


class Draw(NamedTuple):
    """One visit of one clip. No two visits of a run are equal."""

    epoch: int  # of the clip's own dataset
    clip: int  # its number: datasets as listed, shards in their listed order, clips in the order of the shard
    repeat: int = 0  # tells the visits of a clip in one epoch apart: 0, 1, ... where draws are with replacement


@dataclass(frozen=True)
class OrderedDataset:
    """The inputs of the order of one dataset, apart from the seed and the size of a group."""

    name: str  # for messages
    shard_clips: Sequence[int] | NDArray[np.int64]  # [S] number of clips in each shard
    order: OrderConfig = field(default_factory=OrderConfig)
    weights: np.ndarray | None = None  # [N] how much likelier a clip is chosen; only balanced needs it
    share: float = 1.0  # of the run's visits, relative to the other datasets' shares


class ClipOrder:
    """Positions of a run, without end, over one dataset or a mixture of several.

    Clips are numbered through all datasets, shards too. Any position may be asked for at any time.
    """

    def __init__(self, datasets: Sequence[OrderedDataset], *, seed: int, group_shards: int):
        """Prepare the order of one dataset, or of several that are mixed by their shares.

        The clips of at most `group_shards` shards are shuffled together. Nothing is shuffled before it is asked for.

        Raises:
            UserError: a dataset without clips; balanced draws without usable weights, or more of them than clips.
        """
        self._orders: list[_DatasetOrder] = []
        first_clip = first_shard = 0
        for number, dataset in enumerate(datasets):
            if not (num_clips := int(np.sum(dataset.shard_clips))):
                raise UserError(f"{dataset.name} has no clips to draw; name another split in data.train")
            self._orders.append(_DatasetOrder(dataset, hash_of(seed, number), group_shards, first_clip, first_shard))
            first_clip += num_clips
            first_shard += len(dataset.shard_clips)
        self._mixture = _Mixture([dataset.share for dataset in datasets], seed)

    def draws(self, start: int, stop: int) -> list[Draw]:
        """Return the visits at positions start .. stop - 1."""
        places = (self._mixture.place(position) for position in range(start, stop))
        return [self._orders[dataset].draw(own_position) for dataset, own_position in places]

    def shards_ahead(self, position: int, num_draws: int) -> list[int]:
        """Return the shards that the next draws read, for a reader that fetches them early.

        They are those of all groups that the positions touch, in the order in which the groups come. At most one
        epoch of each dataset is looked at.
        """
        starts = self._mixture.counts_at(position)
        stops = self._mixture.counts_at(position + num_draws)
        needed = [  # how far ahead, from 0 to 1, and what
            (max(0, group_start - start) / (stop - start), shards)
            for order, start, stop in zip(self._orders, starts, stops, strict=True)
            for group_start, shards in order.groups(start, stop)
        ]
        needed.sort(key=lambda item: item[0])
        return list(dict.fromkeys(shard for _, shards in needed for shard in shards))

    @property
    def draws_per_group(self) -> int:
        """About as many draws as the largest group has: looking so far ahead shows the next group early enough."""
        return ceil(max(o.draws_per_group / s for o, s in zip(self._orders, self._mixture.shares, strict=True)))


class _Epoch(NamedTuple):
    """The visits of one epoch of one dataset, sorted by clip, and how they are grouped."""

    visits_V: NDArray[np.int64] | None  # clips, ascending, equal ones side by side; None: every clip once
    bounds: NDArray[np.int64]  # [S + 1] shard s has visits bounds[s] .. bounds[s + 1] - 1
    shards: NDArray[np.int64]  # [S] in the order of their groups
    edges: NDArray[np.int64]  # [G + 1] group g has shards[edges[g] : edges[g + 1]]
    starts: list[int]  # [G + 1] place of each group's first visit in the epoch

    def group(self, number: int) -> NDArray[np.int64]:
        """Return the shards of a group, ascending."""
        return np.sort(self.shards[self.edges[number] : self.edges[number + 1]])


class _DatasetOrder:
    """The order of one dataset, epoch after epoch. Keeps the last epochs and groups that it was asked for."""

    def __init__(self, dataset: OrderedDataset, key: int, group_shards: int, first_clip: int, first_shard: int):
        self._mode, self._replacement = dataset.order.mode, dataset.order.replacement
        self._key, self._first_clip, self._first_shard = key, first_clip, first_shard
        self._first_clips = np.concatenate([[0], np.cumsum(np.asarray(dataset.shard_clips, dtype=np.int64))])
        self._weights = _checked_weights(dataset) if self._mode == "balanced" else None
        self.visits_per_epoch = dataset.order.draws_per_epoch or int(self._first_clips[-1])
        # Sequential reads one shard after the other, so a group of one says best what is needed next.
        num_shards = len(dataset.shard_clips)
        self._num_groups = num_shards if self._mode == "sequential" else -(-num_shards // group_shards)
        self.draws_per_group = self.visits_per_epoch / self._num_groups
        # The reader is in one epoch and one group, and looks for shards a group or two further.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=2)(self._make_group)

    def draw(self, position: int) -> Draw:
        """Return the visit at a position of this dataset."""
        epoch, place = divmod(position, self.visits_per_epoch)
        starts = self._epoch(epoch).starts
        group = bisect_right(starts, place) - 1
        visit = int(self._group(epoch, group)[place - starts[group]])
        return Draw(epoch, self._first_clip + visit % (1 << REPEAT_BIT), visit >> REPEAT_BIT)

    def groups(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """Position and shards of every group with visits at positions start .. stop - 1, at most an epoch of them."""
        stop = min(stop, start + self.visits_per_epoch)
        while start < stop:
            number, place = divmod(start, self.visits_per_epoch)
            epoch = self._epoch(number)
            group = bisect_right(epoch.starts, place) - 1
            shards = [int(s) for s in epoch.group(group) if epoch.bounds[s] < epoch.bounds[s + 1]]
            epoch_start = number * self.visits_per_epoch
            yield epoch_start + epoch.starts[group], [self._first_shard + shard for shard in shards]
            start = epoch_start + epoch.starts[group + 1]

    def _make_epoch(self, epoch: int) -> _Epoch:
        visits_V = None
        if self._weights is not None:
            choose = choose_with_replacement if self._replacement else choose_without_replacement
            visits_V = choose(self._weights, self.visits_per_epoch, hash_of(self._key, _CHOICE, epoch))
        bounds = self._first_clips if visits_V is None else np.searchsorted(visits_V, self._first_clips)
        shards = np.arange(len(self._first_clips) - 1)
        if self._mode != "sequential":
            shards = shuffled(shards, hash_of(self._key, _SHARDS, epoch))
        edges = np.arange(self._num_groups + 1) * len(shards) // self._num_groups  # sizes differ by one at most
        starts = np.concatenate([[0], np.cumsum(np.diff(bounds)[shards])])[edges]
        return _Epoch(visits_V, bounds, shards, edges, starts.tolist())

    def _make_group(self, epoch: int, group: int) -> NDArray[np.int64]:
        """Return the visits of a group in their order, each as clip + (repeat << REPEAT_BIT)."""
        made = self._epoch(epoch)
        places = np.concatenate([np.arange(*made.bounds[shard : shard + 2]) for shard in made.group(group)])
        if made.visits_V is None:
            visits = places
        else:
            clips = made.visits_V[places]  # ascending, as the shards of a group and the visits of a shard are
            visits = clips + ((np.arange(len(clips)) - np.searchsorted(clips, clips)) << REPEAT_BIT)
        return visits if self._mode == "sequential" else shuffled(visits, hash_of(self._key, _CLIPS, epoch))


class _Mixture:
    """Which dataset stands at which position.

    Positions come in blocks of BLOCK. Before block b, the first j datasets together have had round(b * BLOCK * their
    share) visits, so every dataset has had its share to within one visit however long the run, by a formula in b alone.
    Within a block the datasets are shuffled. As no share is below 1 / BLOCK, the rounded sums never cross.
    """

    def __init__(self, shares: Sequence[float], seed: int):
        total = sum(map(Fraction, shares))
        self.shares = [float(share / total) for share in map(Fraction, shares)]
        self._edges = [edge / total for edge in accumulate(map(Fraction, shares), initial=Fraction(0))]
        if min(self.shares) < MIN_SHARE:
            raise ValueError(f"a dataset's share is {min(self.shares)} of all, less than {MIN_SHARE}")
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def place(self, position: int) -> tuple[int, int]:
        """Return the dataset at a position, and the number of its visits before."""
        block, at = divmod(position, BLOCK)
        datasets_B, own_positions_B = self._block(block)
        return int(datasets_B[at]), int(own_positions_B[at])

    def counts_at(self, position: int) -> list[int]:
        """[D] visits of each dataset before a position."""
        block, at = divmod(position, BLOCK)
        in_block = np.bincount(self._block(block)[0][:at], minlength=len(self.shares))
        return [before + int(more) for before, more in zip(self._counts(block), in_block, strict=True)]

    def _counts(self, block: int) -> list[int]:
        """[D] visits of each dataset before a block; exact, in fractions of integers."""
        sums = [int(edge * block * BLOCK + Fraction(1, 2)) for edge in self._edges]
        return [high - low for low, high in pairwise(sums)]

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        befores, afters = self._counts(block), self._counts(block + 1)
        datasets_B = np.repeat(np.arange(len(befores)), np.subtract(afters, befores))
        datasets_B = datasets_B[shuffled(np.arange(BLOCK), hash_of(self._seed, _MIXTURE, block))]
        own_positions_B = np.empty(BLOCK, dtype=np.int64)
        for dataset, (before, after) in enumerate(zip(befores, afters, strict=True)):
            own_positions_B[datasets_B == dataset] = np.arange(before, after)
        return datasets_B, own_positions_B


def choose_without_replacement(weights_N: np.ndarray, num_draws: int, key: int) -> NDArray[np.int64]:
    """Clips drawn one after another, each time by weight among those that are left; all at once, by one pass.

    Every clip gets an exponential time -ln(u) / weight, and the earliest win (Efraimidis and Spirakis, Information
    Processing Letters 97, 2006, whose keys u ** (1 / weight) sort alike); twice as many are in memory. On another
    machine a logarithm may differ in its last bit, which changes the choice only if it lies between the last time taken
    and the first one left: once in 1e10 epochs of 200,000 draws.

    Returns:
        [num_draws] clips, ascending, all different; none of weight 0 as long as enough others are there.
    """
    early: list[tuple[np.ndarray, np.ndarray]] = []  # clips and their times
    latest = np.inf
    for low in range(0, len(weights_N), CHUNK):
        clips = np.arange(low, min(low + CHUNK, len(weights_N)))
        with np.errstate(divide="ignore"):  # weight 0: never
            times = -np.log(uniform(clips, key)) / weights_N[low : low + CHUNK]
        early.append((clips[times <= latest], times[times <= latest]))
        if sum(len(times) for _, times in early) > 2 * num_draws + CHUNK:
            early = [_earliest(early, num_draws)]
            latest = early[0][1].max()
    return np.sort(_earliest(early, num_draws)[0])


def _earliest(pieces: list[tuple[np.ndarray, np.ndarray]], num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the clips of the earliest times, and those times, in any order."""
    clips, times = map(np.concatenate, zip(*pieces, strict=True))
    kept = np.argpartition(times, num - 1)[:num]
    return clips[kept], times[kept]


def choose_with_replacement(weights_N: np.ndarray, num_draws: int, key: int) -> NDArray[np.int64]:
    """Independent draws by weight, [num_draws], ascending, equal ones side by side."""
    total = 0.0
    for _, edges in _running_sums(weights_N):
        total = edges[-1]
    points = np.empty(num_draws)
    for low in range(0, num_draws, CHUNK):
        points[low : low + CHUNK] = uniform(np.arange(low, min(low + CHUNK, num_draws)), key)
    points.sort()  # since a search in order is fast
    points *= total
    np.minimum(points, np.nextafter(total, 0), out=points)  # rounding may lift the last one behind the last clip
    draws, start = points.view(np.int64), 0  # each takes the place of its point
    for low, edges in _running_sums(weights_N):
        stop = int(np.searchsorted(points[start:], edges[-1])) + start
        draws[start:stop] = low + np.searchsorted(edges, points[start:stop], side="right")
        start = stop
    return draws


def _running_sums(weights_N: np.ndarray) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the first clip of each chunk, and the sums of all weights up to each of its clips, as by one np.cumsum."""
    total = 0.0
    for low in range(0, len(weights_N), CHUNK):
        edges = np.cumsum(np.append(total, weights_N[low : low + CHUNK]), dtype=np.float64)[1:]
        yield low, edges
        total = edges[-1]


def _checked_weights(dataset: OrderedDataset) -> np.ndarray:
    """Return the weights of a dataset, or a sentence why draws cannot be balanced by them."""
    weights_N, num_clips = dataset.weights, int(np.sum(dataset.shard_clips))
    if weights_N is None or len(weights_N) == 0:
        raise UserError(
            f"{dataset.name} has no sample weights, so its draws cannot be balanced; shards made with labels have "
            "them, and with data.order.mode shuffled none are needed"
        )
    if len(weights_N) != num_clips or not (weights_N.min() >= 0 and weights_N.max() < np.inf):  # as nan is neither
        raise UserError(
            f"the {len(weights_N)} sample weights of {dataset.name} must be numbers from 0 up, one for each of its "
            f"{num_clips} clips; make the shards again with asda shards"
        )
    num_choosable, draws = int(np.count_nonzero(weights_N)), dataset.order.draws_per_epoch or num_clips
    if num_choosable == 0 or (not dataset.order.replacement and draws > num_choosable):
        raise UserError(
            f"data.order.draws_per_epoch is {draws}, but {dataset.name} has {num_choosable} clips with a weight above "
            "0; draw fewer, or set data.order.replacement=true"
        )
    return weights_N


def mix64(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all 64 bits, one to one (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(values: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    """Return a uniform number for each value, strictly between 0 and 1: 52 random bits and a half."""
    bits = mix64(values.astype(np.uint64) ^ np.uint64(key)) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def shuffled(values: NDArray[np.int64], key: int) -> NDArray[np.int64]:
    """Different values in the order of their hashes, which are different too: no tie is left to the sort."""
    return values[np.argsort(mix64(values.astype(np.uint64) ^ np.uint64(key)))]


def hash_of(*parts: int) -> int:
    """One 64-bit hash of several integers from 0 to 2**64 - 1, the order of which counts."""
    return xxh3_64_intdigest(struct.pack(f"<{len(parts)}Q", *parts))


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> range:
    """Rank's share of the positions start .. stop - 1: contiguous, disjoint, together all, even to 1."""
    size = stop - start
    return range(start + size * rank // world_size, start + size * (rank + 1) // world_size)


def clip_rng(seed: int, draw: Draw, purpose: str) -> np.random.Generator:
    """Return random numbers of one visit, the same on whatever rank, thread or resumed run it happens.

    What is drawn for one purpose, "crop" or "masks", changes nothing for the others. Philox takes its key as it is:
    10 us each, no seeding.
    """
    visit = struct.pack("<4Q", seed, draw.epoch, draw.clip, draw.repeat) + purpose.encode()
    return np.random.Generator(np.random.Philox(key=xxh3_128_intdigest(visit)))
