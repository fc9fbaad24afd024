"""The order of clips is arithmetic: complete, random, local, and the same for every number of ranks."""

from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from xxhash import xxh3_64_hexdigest

from asda.config.data import MIN_SHARE, OrderConfig
from asda.data.order import (
    BLOCK,
    CHUNK,
    ORDER_VERSION,
    ClipOrder,
    Draw,
    OrderedDataset,
    choose_with_replacement,
    choose_without_replacement,
    clip_rng,
    hash_of,
    mix64,
    rank_slice,
    shuffled,
    uniform,
)
from asda.errors import UserError

# Every test below that looks at chance is seeded, and would fail once in a million seeds if the order were random.
RARE = 1e-6

SIZES = [5, 1, 12, 7, 7, 3, 20, 9, 1, 15]  # clips of 10 shards, 80 in all
WEIGHTS = (1.0 + np.arange(sum(SIZES)) % 13).astype(np.float32)
EAT = OrderConfig(mode="balanced", draws_per_epoch=33)
AST = OrderConfig(mode="balanced", replacement=True)
SEQUENTIAL = OrderConfig(mode="sequential")

CASES: dict[str, list[OrderedDataset]] = {
    "shuffled": [OrderedDataset("a", SIZES)],
    "balanced": [OrderedDataset("a", SIZES, EAT, WEIGHTS)],
    "with replacement": [OrderedDataset("a", SIZES, AST, WEIGHTS)],
    "sequential": [OrderedDataset("a", SIZES, SEQUENTIAL)],
    "mixture": [
        OrderedDataset("a", SIZES, EAT, WEIGHTS, share=2),
        OrderedDataset("b", [30] * 4, share=0.7),
        OrderedDataset("c", SIZES, AST, WEIGHTS, share=0.1),
    ],
}
# What a run of ORDER_VERSION 2 visits first. Resumed runs depend on it: a change needs a new ORDER_VERSION.
DIGESTS = {
    "shuffled": "f18549a6b61011dc",
    "balanced": "eb15632de43e9744",
    "with replacement": "4fd77079eb250256",
    "sequential": "2be7bf6bad1914a7",
    "mixture": "97fd1af059ed4aea",
}
every_case = pytest.mark.parametrize("case", CASES)
shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def order_of(datasets: list[OrderedDataset], seed: int = 1, group_shards: int = 3) -> ClipOrder:
    return ClipOrder(datasets, seed=seed, group_shards=group_shards)


def clips_of(sizes: list[int], seed: int, epoch: int, group_shards: int = 3) -> list[int]:
    """The clips of one shuffled epoch."""
    order, num_clips = order_of([OrderedDataset("a", sizes)], seed, group_shards), sum(sizes)
    return [draw.clip for draw in order.draws(epoch * num_clips, (epoch + 1) * num_clips)]


def shards_of(datasets: list[OrderedDataset], draws: list[Draw]) -> list[int]:
    sizes = [size for dataset in datasets for size in dataset.shard_clips]
    shard_of_clip = np.repeat(np.arange(len(sizes)), sizes)
    return [int(shard_of_clip[draw.clip]) for draw in draws]


def assert_counts(observed: NDArray, expected: NDArray) -> None:
    """Pearson's chi-square test."""
    assert expected.min() > 5, "the test holds for counts that are not tiny"
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2.isf(RARE, observed.size - 1)


# What an epoch visits


@given(shard_sizes, st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 20))
def test_a_shuffled_epoch_visits_every_clip_exactly_once(sizes: list[int], seed: int, epoch: int, group: int) -> None:
    assert sorted(clips_of(sizes, seed, epoch, group)) == list(range(sum(sizes)))


@given(shard_sizes, st.integers(0, 200), st.integers(1, 60))
def test_a_sequential_run_visits_the_clips_as_listed_again_and_again(sizes: list[int], start: int, count: int) -> None:
    draws = order_of([OrderedDataset("a", sizes, SEQUENTIAL)]).draws(start, start + count)
    assert draws == [Draw(*divmod(position, sum(sizes))) for position in range(start, start + count)]


@given(shard_sizes, st.integers(1, 30), st.integers(0, 5), st.integers(0, 100))
def test_a_balanced_epoch_has_its_number_of_different_clips(sizes: list[int], num: int, epoch: int, seed: int) -> None:
    num = min(num, sum(sizes))
    order = order_of(
        [OrderedDataset("a", sizes, OrderConfig(mode="balanced", draws_per_epoch=num), np.ones(sum(sizes)))], seed
    )
    draws = order.draws(epoch * num, (epoch + 1) * num)
    assert {draw.epoch for draw in draws} == {epoch}
    assert len({draw.clip for draw in draws}) == num


def test_draws_without_replacement_have_the_exact_probabilities_of_drawing_one_by_one() -> None:
    weights, num_epochs = np.array([1.0, 2, 3, 4, 5, 6]), 6000
    expected = dict.fromkeys(combinations(range(6), 3), 0.0)
    for a, b, c in permutations(range(6), 3):  # P(first a, then b among those left, then c)
        left = weights.sum() - np.cumsum([0, weights[a], weights[b]])
        expected[tuple(sorted((a, b, c)))] += float(np.prod(weights[[a, b, c]] / left))  # type: ignore[index]
    found = Counter(tuple(choose_without_replacement(weights, 3, hash_of(1, n)).tolist()) for n in range(num_epochs))
    assert_counts(np.array([found[s] for s in expected]), num_epochs * np.array(list(expected.values())))


def test_clips_are_drawn_without_replacement_as_often_as_by_numpy() -> None:
    rng, trials = np.random.default_rng(3), 1500
    weights = rng.uniform(0.5, 5, 200)
    ours, theirs = np.zeros(200), np.zeros(200)
    for trial in range(trials):
        ours[choose_without_replacement(weights, 50, hash_of(2, trial))] += 1
        theirs[rng.choice(200, 50, replace=False, p=weights / weights.sum(), shuffle=False)] += 1
    # Each clip: two binomials of one probability, about .05 to .5. Their difference is normal enough with counts of 75.
    rate = (ours + theirs) / (2 * trials)
    z = (ours - theirs) / np.sqrt(2 * trials * rate * (1 - rate))
    assert np.abs(z).max() < stats.norm.isf(RARE / (2 * 200))


def test_draws_with_replacement_follow_the_weights() -> None:
    weights = np.random.default_rng(4).uniform(0.5, 5, 50).astype(np.float32)
    counts = np.bincount(choose_with_replacement(weights, 20_000, hash_of(5)), minlength=50)
    assert_counts(counts, 20_000 * weights / weights.sum(dtype=np.float64))


def test_balanced_draws_flatten_the_histogram_of_classes() -> None:
    counts = np.array([2000, 600, 150, 50])
    classes = np.repeat(np.arange(4), counts)
    weights = (1000 / (counts + 0.01))[classes].astype(np.float32)  # one label a clip
    order = order_of([OrderedDataset("a", [100] * 28, AST, weights)])
    drawn = np.bincount([classes[draw.clip] for draw in order.draws(0, 2800)], minlength=4)
    assert_counts(drawn, np.full(4, 700.0))


@pytest.mark.parametrize("replacement", [False, True])
def test_clips_of_weight_zero_are_never_drawn(replacement: bool) -> None:
    weights = np.array([0, 1, 0, 0, 2, 1, 0], dtype=np.float32)
    config = OrderConfig(mode="balanced", draws_per_epoch=3, replacement=replacement)
    assert {d.clip for d in order_of([OrderedDataset("a", [4, 3], config, weights)]).draws(0, 900)} == {1, 4, 5}


# How random it is


def test_every_permutation_of_an_epoch_is_equally_likely() -> None:
    for sizes, group in (([4], 1), ([1, 1, 1, 1], 1), ([2, 2], 2)):  # clips of a shard, shards, both together
        found = Counter(tuple(clips_of(sizes, 3, epoch, group)) for epoch in range(2400))
        assert_counts(np.array([found[p] for p in permutations(range(4))]), np.full(24, 100.0))


def test_a_clip_is_as_likely_at_every_place_of_an_epoch() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(2000):  # 4 shards in groups of 2: both the groups and the clips in them are shuffled
        counts[clips_of([2, 2, 2, 2], 3, epoch, 2), np.arange(8)] += 1
    # Rows and columns add up to 2000, which leaves 49 degrees of freedom.
    assert ((counts - 250) ** 2 / 250).sum() < stats.chi2.isf(RARE, 49)


@pytest.mark.parametrize("sizes", [[3000], [1] * 3000], ids=["clips", "shards"])
def test_epochs_seeds_and_datasets_are_uncorrelated(sizes: list[int]) -> None:
    orders = [clips_of(sizes, seed, epoch, 1) for seed in (1, 2, 3) for epoch in (0, 1, 2)]
    both = order_of([OrderedDataset("a", sizes), OrderedDataset("b", sizes)], group_shards=1).draws(0, 6 * BLOCK)
    assert orders[0] == [draw.clip for draw in both if draw.clip < 3000], "the first is ordered as it is alone"
    orders.append([draw.clip - 3000 for draw in both if draw.clip >= 3000])
    # The correlation of two random permutations of n is nearly normal, with mean 0 and variance 1 / (n - 1).
    places = [np.argsort(order) for order in orders]
    bound = stats.norm.isf(RARE / (10 * 9)) / np.sqrt(2999)
    assert np.abs(np.corrcoef(places)[~np.eye(10, dtype=bool)]).max() < bound


def test_hashes_are_those_of_splitmix64() -> None:
    # Published outputs of splitmix64 seeded with 0; its state grows by the increment that mix64 adds.
    increment = 0x9E3779B97F4A7C15
    states = np.array([0, increment, 2 * increment % 2**64], dtype=np.uint64)
    assert mix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert sorted(shuffled(np.arange(1000), hash_of(1)).tolist()) == list(range(1000))


# Ranks, jumps, and what may never change


@every_case
def test_a_jump_to_any_position_equals_iterating(case: str) -> None:
    whole = order_of(CASES[case]).draws(0, 3 * BLOCK)
    wandering = order_of(CASES[case])
    for position in np.random.default_rng(6).integers(0, 3 * BLOCK - 50, 25).tolist():
        expected = whole[position : position + 50]
        assert order_of(CASES[case]).draws(position, position + 50) == expected
        assert wandering.draws(position, position + 50) == expected


@every_case
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_any_number_of_ranks_sees_the_same_global_batches(case: str, ranks: int) -> None:
    single, orders = order_of(CASES[case]), [order_of(CASES[case]) for _ in range(ranks)]
    for start in range(0, 600, 24):
        slices = [rank_slice(start, start + 24, rank, ranks) for rank in range(ranks)]
        several = [order.draws(mine.start, mine.stop) for order, mine in zip(orders, slices, strict=True)]
        assert [draw for draws in several for draw in draws] == single.draws(start, start + 24)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 9))
def test_rank_slices_are_disjoint_complete_and_even(start: int, size: int, ranks: int) -> None:
    slices = [rank_slice(start, start + size, rank, ranks) for rank in range(ranks)]
    assert [position for part in slices for position in part] == list(range(start, start + size))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@every_case
def test_no_two_visits_of_a_run_are_equal(case: str) -> None:
    draws = order_of(CASES[case]).draws(0, 2000)
    assert len(set(draws)) == 2000
    assert (max(draw.repeat for draw in draws) > 0) == (case in ("with replacement", "mixture"))
    repeats = Counter((draw.epoch, draw.clip) for draw in draws[:1920])  # 24 epochs of 80 with replacement
    if case == "with replacement":
        for (epoch, clip), times in repeats.items():
            assert {Draw(epoch, clip, repeat) for repeat in range(times)} <= set(draws)


@every_case
def test_the_order_of_this_version_is_frozen(case: str) -> None:
    assert ORDER_VERSION == 2
    order = order_of(CASES[case])
    draws = order.draws(0, 500) + order.draws(10**9, 10**9 + 500)
    assert xxh3_64_hexdigest(np.array(draws, dtype="<i8").tobytes()) == DIGESTS[case]


# Where it reads


@given(shard_sizes, st.integers(1, 5), st.sampled_from(["shuffled", "balanced", "sequential"]))
def test_at_most_a_group_of_shards_is_read_at_a_time(sizes: list[int], group: int, mode: str) -> None:
    config = OrderConfig(mode="balanced", replacement=True) if mode == "balanced" else OrderConfig(mode=mode)  # type: ignore[arg-type]
    datasets = [OrderedDataset("a", sizes, config, np.arange(1.0, sum(sizes) + 1))]
    visited = shards_of(datasets, order_of(datasets, group_shards=group).draws(0, sum(sizes)))
    first = {shard: visited.index(shard) for shard in visited}
    last = {shard: len(visited) - 1 - visited[::-1].index(shard) for shard in visited}
    for place in range(len(visited)):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= (1 if mode == "sequential" else group)


@every_case
def test_the_shards_ahead_are_those_that_the_next_draws_read_the_first_group_first(case: str) -> None:
    datasets = CASES[case]
    order = order_of(datasets)
    for position in np.random.default_rng(7).integers(0, 5000, 25).tolist():
        for num_draws in (1, 10, 30):  # less than the shortest epoch
            ahead = order.shards_ahead(position, num_draws)
            needed = shards_of(datasets, order.draws(position, position + num_draws))
            assert set(needed) <= set(ahead)
            assert len(set(ahead)) == len(ahead)
            assert needed[0] in ahead[: 3 * len(datasets)]
        within = 3 * len(datasets)  # a single draw touches one group of a dataset
        assert len(order.shards_ahead(position, 1)) <= within
    everything = set(range(sum(len(dataset.shard_clips) for dataset in datasets)))
    assert set(order.shards_ahead(123, 10**6)) <= everything, "however far it looks, an epoch is all there is"


def test_the_shards_ahead_come_in_the_order_of_their_groups() -> None:
    datasets = CASES["shuffled"]
    order = order_of(datasets, group_shards=2)
    ahead, visited = order.shards_ahead(0, sum(SIZES)), shards_of(datasets, order.draws(0, sum(SIZES)))
    first_visits = [min(visited.index(shard) for shard in ahead[low : low + 2]) for low in range(0, 10, 2)]
    assert sorted(ahead) == list(range(10))
    assert all(earlier < later for earlier, later in pairwise(first_visits))
    datasets = CASES["sequential"]
    order = order_of(datasets, group_shards=2)
    assert order.shards_ahead(6, 20) == [2, 3, 4] == list(dict.fromkeys(shards_of(datasets, order.draws(6, 26))))


# Mixtures


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(0, 100))
def test_every_prefix_of_a_mixture_keeps_the_shares(shares: list[float], seed: int) -> None:
    # At the end of a block the visits of a dataset differ from its share by at most 1: two roundings of a half. Within
    # a block that gives it n places, k of the first m places differ from n m / BLOCK by at most n (1 - n / BLOCK).
    datasets = [OrderedDataset(str(n), [5 + n], SEQUENTIAL, share=share) for n, share in enumerate(shares)]
    first_clips = np.cumsum([0, *(5 + n for n in range(len(shares)))])
    draws = order_of(datasets, seed).draws(0, 5 * BLOCK // 2)
    dataset_of = np.searchsorted(first_clips, [draw.clip for draw in draws], side="right") - 1
    for number, share in enumerate(np.array(shares) / sum(shares)):
        expected = share * np.arange(1, len(draws) + 1)
        error = np.abs(np.cumsum(dataset_of == number) - expected)
        places = share * BLOCK + 1
        assert error.max() <= 1 + max(0, places * (1 - (places - 2) / BLOCK))
        assert error[BLOCK - 1 :: BLOCK].max() <= 1 + 1e-9  # the shares were normalised in float64


def test_shares_stay_exact_over_a_very_long_run() -> None:
    datasets = [OrderedDataset(str(n), [7], SEQUENTIAL, share=share) for n, share in enumerate((1, 1, 1 / 3))]
    order, position = order_of(datasets), BLOCK * 10**10
    draws = order.draws(position, position + BLOCK)
    for number, share in enumerate((Fraction(1), Fraction(1), Fraction(1 / 3))):
        first = next(draw for draw in draws if draw.clip // 7 == number)
        own_position = first.epoch * 7 + first.clip % 7
        assert abs(own_position - share / (2 + Fraction(1 / 3)) * position) <= 1


def test_the_datasets_of_a_mixture_are_shuffled_anew_in_every_block() -> None:
    datasets = [OrderedDataset("a", [7], share=1), OrderedDataset("b", [7], share=1)]

    def second(seed: int) -> NDArray[np.bool_]:
        draws = order_of(datasets, seed).draws(0, 100 * BLOCK)
        return np.array([draw.clip >= 7 for draw in draws]).reshape(100, BLOCK)

    in_block = second(1)
    most = stats.binom.isf(RARE / (2 * BLOCK), 100, 0.5)  # each place is a fair coin
    assert 100 - most <= in_block.sum(axis=0).min() <= in_block.sum(axis=0).max() <= most
    # Neighbours, blocks and seeds agree in half of the places. Two random choices of n / 2 of n places agree in twice a
    # hypergeometric number of them, of variance n / 4 x n / (n - 1).
    for same in (in_block[:, 1:] == in_block[:, :-1], in_block[1:] == in_block[:-1], in_block == second(2)):
        z_blocks = (same.sum(axis=1) - same.shape[1] / 2) / np.sqrt(same.shape[1] / 4)
        assert np.abs(z_blocks).max() < stats.norm.isf(RARE / (2 * 100))


def test_each_dataset_of_a_mixture_keeps_its_own_epochs() -> None:
    datasets = [OrderedDataset("a", SIZES, share=0.9), OrderedDataset("b", [3, 4], share=0.1)]
    draws = order_of(datasets).draws(0, 4 * BLOCK)
    alone = order_of(datasets[:1]).draws(0, 3600)
    assert [draw for draw in draws if draw.clip < 80] == alone
    small = [draw for draw in draws if draw.clip >= 80]
    for epoch in range(400 // 7):
        assert {draw.epoch for draw in small[7 * epoch : 7 * epoch + 7]} == {epoch}
        assert {draw.clip for draw in small[7 * epoch : 7 * epoch + 7]} == set(range(80, 87))


def test_the_smallest_share_gets_a_visit_in_every_block() -> None:
    datasets = [OrderedDataset("a", [10], share=1 - MIN_SHARE), OrderedDataset("b", [10], share=MIN_SHARE)]
    draws = order_of(datasets).draws(0, 50 * BLOCK)
    assert sum(draw.clip >= 10 for draw in draws) == 50
    with pytest.raises(ValueError, match=r"less than 0\.001"):
        order_of([OrderedDataset("a", [10]), OrderedDataset("b", [10], share=MIN_SHARE / 2)])


# The randomness of a visit


def test_randomness_belongs_to_the_visit_and_the_purpose() -> None:
    visit = (1, Draw(5, 6, 7), "masks")
    others = [
        (2, Draw(5, 6, 7), "masks"),
        (1, Draw(6, 6, 7), "masks"),
        (1, Draw(5, 7, 7), "masks"),
        (1, Draw(5, 6, 8), "masks"),
        (1, Draw(5, 6, 7), "crop"),
    ]
    assert clip_rng(*visit).random() == clip_rng(*visit).random()
    assert len({clip_rng(*other).random() for other in [visit, *others]}) == 6
    # Resumed runs depend on it.
    assert clip_rng(*visit).bit_generator.random_raw() == 5169950268721154717


def test_neighbouring_visits_and_purposes_share_no_bit() -> None:
    draws = [Draw(epoch, clip, repeat) for epoch in range(8) for clip in range(64) for repeat in range(4)]

    def bits(purpose: str) -> NDArray[np.uint8]:
        values = [clip_rng(1, draw, purpose).bit_generator.random_raw() for draw in draws]
        return np.unpackbits(np.array(values, dtype=np.uint64)[:, None].view(np.uint8), axis=1)

    crop, masks = bits("crop"), bits("masks")
    pairs = {
        "ones": crop,
        "purposes": crop ^ masks,
        "clips": crop ^ np.roll(crop, 4, axis=0),
        "repeats": crop ^ np.roll(crop, 1, axis=0),
        "epochs": crop ^ np.roll(crop, 256, axis=0),
    }
    for name, differences in pairs.items():  # 2048 fair coins for each of 64 bits
        z = (differences.sum(axis=0, dtype=np.int64) - 1024) / np.sqrt(2048 / 4)
        assert np.abs(z).max() < stats.norm.isf(RARE / (2 * 64)), name


# What is refused


@pytest.mark.parametrize(
    ("dataset", "sentence"),
    [
        (OrderedDataset("mine:train", []), "mine:train has no clips to draw"),
        (OrderedDataset("mine:train", [4], EAT), "mine:train has no sample weights"),
        (OrderedDataset("mine:train", [4], AST, np.zeros(0)), "mine:train has no sample weights"),
        (
            OrderedDataset("mine:train", [4], AST, np.ones(3)),
            "the 3 sample weights of mine:train must be numbers from 0",
        ),
        (OrderedDataset("mine:train", [2], AST, np.array([1, -1])), "numbers from 0 up, one for each of its 2 clips"),
        (OrderedDataset("mine:train", [2], AST, np.array([1, np.nan])), "numbers from 0 up"),
        (OrderedDataset("mine:train", [2], AST, np.array([1, np.inf])), "numbers from 0 up"),
        (OrderedDataset("mine:train", [2], AST, np.zeros(2)), "has 0 clips with a weight above 0"),
        (
            OrderedDataset("mine:train", [40], EAT, np.eye(1, 40)[0]),
            "draws_per_epoch is 33, but mine:train has 1 clips",
        ),
    ],
)
def test_what_cannot_be_ordered_is_refused_with_a_sentence(dataset: OrderedDataset, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        order_of([dataset])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# As many clips as there are


def at_once_without_replacement(weights_N: NDArray, num_draws: int, key: int) -> NDArray[np.int64]:
    """The choice as it is defined: all times, and the earliest of them."""
    with np.errstate(divide="ignore"):
        times_N = -np.log(uniform(np.arange(len(weights_N)), key)) / weights_N
    return np.sort(np.argsort(times_N)[:num_draws])


def at_once_with_replacement(weights_N: NDArray, num_draws: int, key: int) -> NDArray[np.int64]:
    edges_N = np.cumsum(weights_N, dtype=np.float64)
    points = np.sort(uniform(np.arange(num_draws), key)) * edges_N[-1]
    return np.searchsorted(edges_N, np.minimum(points, np.nextafter(edges_N[-1], 0)), side="right")


@pytest.mark.parametrize(("num_clips", "num_draws"), [(1, 1), (CHUNK, 7), (CHUNK + 1, 999), (500_000, 20_000)])
@pytest.mark.parametrize("kind", ["even", "random", "of three classes", "half of them 0"])
def test_draws_by_chunks_equal_those_of_the_whole_to_the_bit(kind: str, num_clips: int, num_draws: int) -> None:
    rng = np.random.default_rng(num_clips)
    weights = {
        "even": np.ones(num_clips),
        "random": rng.uniform(1e-3, 1e5, num_clips),
        "of three classes": rng.choice([1e-4, 0.5, 9e4], num_clips),
        "half of them 0": np.append(1.0, rng.integers(0, 2, num_clips - 1)),
    }[kind].astype(np.float32)
    num_draws = min(num_draws, int(np.count_nonzero(weights)))
    for key in (hash_of(1), hash_of(2)):
        ours, whole = choose_without_replacement, at_once_without_replacement
        np.testing.assert_array_equal(ours(weights, num_draws, key), whole(weights, num_draws, key))
        ours, whole = choose_with_replacement, at_once_with_replacement
        np.testing.assert_array_equal(ours(weights, 3 * num_draws, key), whole(weights, 3 * num_draws, key))


def test_draws_of_every_clip_and_of_many_more_than_clips_equal_those_of_the_whole() -> None:
    weights = np.random.default_rng(1).uniform(0.01, 10, 200_000).astype(np.float32)
    assert choose_without_replacement(weights, 200_000, 3).tolist() == list(range(200_000))
    few = weights[:5]
    expected = at_once_with_replacement(few, 100_000, 3)
    np.testing.assert_array_equal(choose_with_replacement(few, 100_000, 3), expected)
