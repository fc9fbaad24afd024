"""Inverse block masks against 2,000 masks of the official generator.

The masks of one sample are compared with those of another by statistics that are one number a mask, so that the
numbers of a sample are independent of each other. The seed is fixed: each test either always passes or always fails.
"""

from pathlib import Path

import golden
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from asda.config import MaskConfig
from asda.errors import UserError
from asda.models.masks import block_union, inverse_block_masks, visible_indices

Masks = NDArray[np.bool_]
CASES = {
    "asda_64x8_len5": ((64, 8), MaskConfig(), 102),
    "tiny_8x8_len3": ((8, 8), MaskConfig(block=3), 12),
}
NUM_OURS = 8000
SIGNIFICANCE = 1e-3  # of each test, shared out among its comparisons (Bonferroni)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def grid(case: str) -> tuple[int, int]:
    return CASES[case][0]


@pytest.fixture(scope="module")
def official(case: str, grid: tuple[int, int], shared: Path) -> Masks:
    """Visible patches of the official masks, [2000, T, F]."""
    return (golden.load(shared, "mask_generator")[f"{case}.mask"].numpy() == 0).reshape(-1, *grid)


@pytest.fixture(scope="module")
def ours(case: str, grid: tuple[int, int]) -> Masks:
    return inverse_block_masks(np.random.default_rng(1), NUM_OURS, grid, CASES[case][1]).reshape(-1, *grid)


def assert_means_agree(a: NDArray[np.integer], b: NDArray[np.integer]) -> None:
    """Welch's test of every column of [samples, comparisons]; with thousands of samples its t is a normal."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    standard_error = np.sqrt(a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b))
    z = (a.mean(0) - b.mean(0)) / standard_error
    z_limit = float(np.sqrt(2 * np.log(2 * z.size / SIGNIFICANCE)))  # P(|z| > l) <= 2 exp(-l^2 / 2)
    assert np.abs(z).max() < z_limit, (z, z_limit)


def assert_histograms_agree(a: NDArray[np.integer], b: NDArray[np.integer]) -> None:
    """Chi-square test of homogeneity; values with fewer than 10 expected counts are merged into their neighbours."""
    values = np.arange(max(a.max(), b.max()) + 1)
    table = np.array([[np.sum(x == value) for value in values] for x in (a, b)])
    merged, pending = [], np.zeros(2)
    for column in table.T:
        pending = pending + column
        if pending.sum() * min(len(a), len(b)) / (len(a) + len(b)) >= 10:
            merged.append(pending)
            pending = np.zeros(2)
    merged[-1] = merged[-1] + pending
    table = np.array(merged)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    p_value = chi2.sf(((table - expected) ** 2 / expected).sum(), len(table) - 1)
    assert p_value > SIGNIFICANCE, merged


def neighbours_of(visible: Masks) -> NDArray[np.int64]:
    """Pairs of visible patches side by side, per mask."""
    return (visible[:, 1:] & visible[:, :-1]).sum((1, 2)) + (visible[:, :, 1:] & visible[:, :, :-1]).sum((1, 2))


def full_windows_of(visible: Masks, block: int) -> NDArray[np.int64]:
    """Windows of block x block visible patches, per mask."""
    windows = np.lib.stride_tricks.sliding_window_view(visible, (block, block), axis=(1, 2))
    return windows.all((-2, -1)).sum((1, 2))


def test_every_mask_has_the_exact_number_of_visible_patches(case: str, ours: Masks, official: Masks):
    assert set(ours.sum((1, 2))) == set(official.sum((1, 2))) == {CASES[case][2]}


def test_blocks_around_the_official_centres_lie_where_the_official_ones_lie(
    case: str, grid: tuple[int, int], official: Masks, shared: Path
):
    centres_MC = golden.load(shared, "mask_generator")[f"{case}.centres"].numpy().astype(np.int64)
    union_MN = block_union(centres_MC, grid, CASES[case][1].block)
    visible_MN = official.reshape(len(official), -1)
    num_union, num_visible = union_MN.sum(1), visible_MN.sum(1)
    # A union that is too small lies within the mask, one that is too large contains it.
    assert not (union_MN & ~visible_MN)[num_union <= num_visible].any()
    assert not (visible_MN & ~union_MN)[num_union >= num_visible].any()
    expected = golden.numbers(shared, "mask_generator")[case]["block_union_before_adjust"]
    assert num_union.mean() == pytest.approx(expected["mean"])
    assert (num_union.min(), num_union.max()) == (expected["min"], expected["max"])


def test_each_row_is_visible_as_often_as_officially(ours: Masks, official: Masks):
    assert_means_agree(ours.sum(2), official.sum(2))


def test_each_column_is_visible_as_often_as_officially(ours: Masks, official: Masks):
    assert_means_agree(ours.sum(1), official.sum(1))


def test_visible_patches_have_as_many_visible_neighbours_as_officially(ours: Masks, official: Masks):
    assert_means_agree(neighbours_of(ours), neighbours_of(official))


def test_whole_blocks_are_as_many_as_officially(case: str, ours: Masks, official: Masks):
    block = CASES[case][1].block
    assert_histograms_agree(full_windows_of(ours, block), full_windows_of(official, block))


def test_rows_without_a_visible_patch_are_as_many_as_officially(ours: Masks, official: Masks):
    assert_histograms_agree((~ours.any(2)).sum(1), (~official.any(2)).sum(1))


def test_masks_of_one_call_are_independent(case: str, grid: tuple[int, int], ours: Masks):
    overlap = (ours[:-1:2] & ours[1::2]).sum((1, 2))
    # The expected overlap of two independent masks is the sum of the squared probabilities of being visible.
    expected = np.square(ours.mean(0)).sum()
    # Estimating the probabilities from the same masks adds their variance, at most 1/4 a patch, over their number.
    bias = ours.shape[1] * ours.shape[2] / 4 / NUM_OURS
    standard_error = overlap.std() / np.sqrt(len(overlap))
    assert abs(overlap.mean() - expected) < 3.3 * standard_error + bias  # 3.3: two-sided 1e-3


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


def test_a_clip_of_which_nothing_would_be_visible_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"ratio 0\.8 leaves none of the 2 x 2 patches .* longer clips"):
        inverse_block_masks(np.random.default_rng(0), 1, (2, 2), MaskConfig())
