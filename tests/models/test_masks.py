"""Masks: what the comparison with the official generator would notice, and properties.

golden_data.py compares 8,000 of ours with 2,000 official ones: the number of visible patches and the blocks
around the official centres exactly, the rest by the eight statistics of `noticed`. Their power: the share of masks that
must come from a wrong generator to be noticed in ten of ten simulated comparisons, and the next smaller share that was
tried, with how many of ten noticed it. 64 x 8 patches, blocks of 5; the right generator stands for the official one.

    wrong generator                     noticed at   next            noticed first by
    a centre more                            1 %     0.5 %  0/10     distinct centres
    a centre fewer                           3 %       2 %  7/10     distinct centres
    blocks of 4 patches                      5 %       3 %  7/10     visible neighbours
    blocks pushed inside the border         10 %       7 %  5/10     visible per mel patch
    blocks wrapped around                   10 %       7 %  7/10     whole blocks
    added and removed in order              10 %       7 %  8/10     visible per time patch
    blocks a column off                     20 %      15 %  4/10     visible per mel patch
    no centre in the outer rows             50 %      30 %  5/10     centres
    centres without replacement             70 %      50 %  8/10     distinct centres (2 % of masks have two equal ones)
    the right one                                      0 %  0/10

Seeds are fixed: each test either always passes or always fails.
"""

from collections.abc import Callable

import numpy as np
import pytest
from mask_statistics import SIGNIFICANCE, Difference, Masks, differences, of_histograms
from numpy.typing import NDArray

from asda.config.model import MaskConfig
from asda.models import masks
from asda.models.masks import inverse_block_masks, visible_indices

GRID, CONFIG = (64, 8), MaskConfig()
NUM_OURS, NUM_OFFICIAL = 8000, 2000
Centres = NDArray[np.int64]
Patch = pytest.MonkeyPatch

right_draw, right_union = masks.draw_centres, masks.block_union


def blocks_of_4(centres_MC: Centres, grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    return right_union(centres_MC, grid, 4)


def a_patch_off(centres_MC: Centres, grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    rows, columns = np.divmod(centres_MC, grid[1])
    return right_union(rows * grid[1] + np.minimum(columns + 1, grid[1] - 1), grid, block)


def pushed_inside(centres_MC: Centres, grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    """Blocks at the border whole, and not cut off."""
    rows, columns = np.divmod(centres_MC, grid[1])
    half = block // 2
    rows, columns = (np.clip(x, half, size - 1 - half) for x, size in zip((rows, columns), grid, strict=True))
    return right_union(rows * grid[1] + columns, grid, block)


def wrapped(centres_MC: Centres, grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    """Blocks at the border go on at the opposite one."""
    union_MRC = np.zeros((len(centres_MC), *grid), dtype=bool)
    offsets = np.arange(block) - block // 2
    for centres_M in centres_MC.T:
        rows, columns = np.divmod(centres_M, grid[1])
        for row in offsets:
            for column in offsets:
                union_MRC[np.arange(len(rows)), (rows + row) % grid[0], (columns + column) % grid[1]] = True
    return union_MRC.reshape(len(centres_MC), -1)


def another_number(change: int) -> Callable:
    def draw(rng: np.random.Generator, num_masks: int, num_patches: int, config: MaskConfig) -> Centres:
        num_centres = right_draw(rng, 1, num_patches, config).shape[1] + change
        return rng.integers(num_patches, size=(num_masks, num_centres))

    return draw


def without_replacement(rng: np.random.Generator, num_masks: int, num_patches: int, config: MaskConfig) -> Centres:
    num_centres = right_draw(rng, 1, num_patches, config).shape[1]
    return rng.permuted(np.tile(np.arange(num_patches), (num_masks, 1)), axis=1)[:, :num_centres]


def avoiding_the_border(rng: np.random.Generator, num_masks: int, num_patches: int, config: MaskConfig) -> Centres:
    centres_MC = right_draw(rng, num_masks, num_patches, config)
    return np.clip(centres_MC, GRID[1], num_patches - GRID[1] - 1)  # never in the first or last row


class FirstComeFirstServed:
    """Adds and removes patches in their order and not by chance."""

    def __init__(self, rng: np.random.Generator):
        self.integers = rng.integers

    def random(self, size: tuple[int, int]) -> NDArray:
        return np.zeros(size)


# What is wrong: what it replaces, and the share of masks at which it is noticed.
WRONG: dict[str, tuple[str, Callable, float]] = {
    "blocks of 4 patches": ("block_union", blocks_of_4, 0.05),
    "blocks a column off": ("block_union", a_patch_off, 0.2),
    "blocks pushed inside the border": ("block_union", pushed_inside, 0.1),
    "blocks wrapped around": ("block_union", wrapped, 0.1),
    "a centre fewer": ("draw_centres", another_number(-1), 0.03),
    "a centre more": ("draw_centres", another_number(1), 0.01),
    "centres without replacement": ("draw_centres", without_replacement, 0.7),
    "no centre in the outer rows": ("draw_centres", avoiding_the_border, 0.5),
    "added and removed in order": ("default_rng", FirstComeFirstServed, 0.1),
}


def sample(seed: int, num_masks: int, wrong: str | None = None) -> tuple[Masks, Centres]:
    """Masks [S, T, F] and their centres [S, C]; what is `wrong` is replaced."""
    replaced, by, _ = WRONG[wrong] if wrong else ("", None, 0.0)
    seen: list[Centres] = []
    with Patch.context() as patch:
        rng = np.random.default_rng(seed)
        if replaced == "default_rng":
            rng = by(rng)  # type: ignore[misc]
        elif by is not None:
            patch.setattr(masks, replaced, by)
        patch.setattr(masks, "block_union", remembering(masks.block_union, seen))
        visible_SN = inverse_block_masks(rng, num_masks, GRID, CONFIG)
    return visible_SN.reshape(-1, *GRID), seen[0]


def remembering(union: Callable, seen: list[Centres]) -> Callable:
    def remember(centres_MC: Centres, *size: object) -> NDArray[np.bool_]:
        seen.append(centres_MC)
        return union(centres_MC, *size)

    return remember


def num_distinct(centres_SC: Centres) -> NDArray[np.int64]:
    return np.array([len(set(centres_C)) for centres_C in centres_SC.tolist()])


def noticed(seed: int, wrong: str | None, share: float) -> list[str]:
    """The names of the differences beyond their limits when a share of 8,000 masks is of a wrong generator."""
    official, official_centres = sample(2 * seed, NUM_OFFICIAL)
    num_wrong = round(share * NUM_OURS)
    sizes = ((10**6 + seed, NUM_OURS - num_wrong, None), (2 * 10**6 + seed, num_wrong, wrong))
    parts = [sample(*size) for size in sizes if size[1]]
    ours = np.concatenate([visible for visible, _ in parts])
    distinct = np.concatenate([num_distinct(centres) for _, centres in parts])
    cells = np.concatenate([centres.ravel() for _, centres in parts])
    found = [
        *differences(ours, official, CONFIG.block),
        of_histograms("distinct centres", distinct, num_distinct(official_centres)),
        of_histograms("centres", cells, official_centres.ravel()),
    ]
    return [difference.name for difference in found if difference.statistic > difference.limit]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_generator_is_noticed_at_the_stated_share(wrong: str):
    assert noticed(1, wrong, WRONG[wrong][2])


def test_the_right_generator_raises_no_alarm():
    # Eight differences at 1e-3 in each of ten comparisons: none is expected.
    assert [noticed(seed, None, 0.0) for seed in range(10)] == [[]] * 10


def overlap_of_pairs(visible: Masks) -> Difference:
    """How many patches masks have in common with the next one, against what independent masks have."""
    overlap = (visible[:-1:2] & visible[1::2]).sum((1, 2))
    # The expected overlap of two independent masks is the sum of the squared probabilities of being visible.
    expected = np.square(visible.mean(0)).sum()
    # Estimating the probabilities from the same masks adds their variance, at most 1/4 a patch, over their number.
    bias = visible.shape[1] * visible.shape[2] / 4 / len(visible)
    standard_error = overlap.std() / np.sqrt(len(overlap))
    return Difference("overlap", float(abs(overlap.mean() - expected)), float(3.3 * standard_error + bias))  # two-sided


def test_masks_of_one_call_are_independent():
    assert SIGNIFICANCE == 1e-3  # of which 3.3 standard errors are the two-sided limit
    visible, _ = sample(1, NUM_OURS)
    assert overlap_of_pairs(visible).statistic < overlap_of_pairs(visible).limit


def test_one_mask_in_twenty_that_repeats_its_neighbour_is_noticed():
    visible, _ = sample(1, NUM_OURS)
    visible[1::40] = visible[::40]
    assert overlap_of_pairs(visible).statistic > overlap_of_pairs(visible).limit


def test_every_mask_has_the_exact_number_of_visible_patches():
    visible, _ = sample(1, NUM_OURS)
    assert set(visible.sum((1, 2))) == {102}  # int(512 x 0.2)


def test_the_same_generator_state_gives_the_same_masks_and_another_gives_others():
    first, again, other = (
        inverse_block_masks(np.random.default_rng(seed), 16, (64, 8), MaskConfig()) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_visible_indices_are_the_places_of_the_visible_patches_in_order():
    masks_MN = inverse_block_masks(np.random.default_rng(0), 16, (64, 8), MaskConfig())
    indices_MK = visible_indices(masks_MN)
    assert indices_MK.dtype == np.int64
    assert indices_MK.shape == (16, 102)
    assert (np.diff(indices_MK, axis=1) > 0).all()
    assert all(masks_MN[m, indices_MK[m]].all() for m in range(16))
