"""Inverse block masks: a student sees a few blocks of patches and predicts all others (data2vec 2.0, 2022).

Shapes: M masks (one a student), T time patches, F mel patches, N = T * F patches, K visible ones; here C block centres.
"""

import numpy as np
from numpy.typing import NDArray

from asda.config.model import MaskConfig
from asda.system import compiled


def inverse_block_masks(
    rng: np.random.Generator, num_masks: int, grid: tuple[int, int], config: MaskConfig
) -> NDArray[np.bool_]:
    """Draw masks, [M, N], True at visible patches; every mask has exactly config.visible(N) of them.

    A mask starts as a union of blocks around random centres. If it has too many patches, random ones are hidden; if it
    has too few, random ones outside are shown. The same state of `rng` gives the same masks; `grid` is (T, F).
    """
    num_patches = grid[0] * grid[1]
    num_visible = config.visible(num_patches)
    visible_MN = block_union(draw_centres(rng, num_masks, num_patches, config), grid, config.block)
    # One draw a patch that changes: a mask hides fewer than it has, or shows fewer than num_visible.
    most_changes = max(num_visible, int(visible_MN.sum(1).max()))
    _bring_to(visible_MN, num_visible, rng.random((num_masks, most_changes)))
    return visible_MN


def draw_centres(rng: np.random.Generator, num_masks: int, num_patches: int, config: MaskConfig) -> NDArray[np.int64]:
    """Draw the patches around which blocks are shown, [M, C], with repetition; C is config.blocks(num_patches)."""
    return rng.integers(num_patches, size=(num_masks, config.blocks(num_patches)))


def block_union(centres_MC: NDArray[np.int64], grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    """Mark block x block patches around each centre, cut off at the borders of the grid: [M, C] -> [M, N]."""
    union_MRF = np.zeros((len(centres_MC), *grid), dtype=bool)
    _mark_blocks(centres_MC, block, union_MRF)
    return union_MRF.reshape(len(centres_MC), -1)


def visible_indices(masks_MN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """List the places of the visible patches, ascending, [M, K]; all masks must have the same number of them."""
    return (np.flatnonzero(masks_MN) % masks_MN.shape[1]).reshape(len(masks_MN), -1)


def visible_patches(
    rng: np.random.Generator, *, num_masks: int, grid: tuple[int, int], config: MaskConfig
) -> NDArray[np.int64]:
    """Draw masks for the students of one clip and list their visible patches, [M, K]."""
    return visible_indices(inverse_block_masks(rng, num_masks, grid, config))


# Compiled by numba, without Python's lock: 16 masks take 20 us.
@compiled
def _mark_blocks(centres_MC, block, union_MRF):
    _, num_rows, num_columns = union_MRF.shape
    for mask in range(len(centres_MC)):
        for centre in centres_MC[mask]:
            row, column = centre // num_columns - block // 2, centre % num_columns - block // 2
            for r in range(max(row, 0), min(row + block, num_rows)):
                for c in range(max(column, 0), min(column + block, num_columns)):
                    union_MRF[mask, r, c] = True


@compiled
def _bring_to(visible_MN, num_visible, chance_MX):
    """Hide or show random patches until every mask has `num_visible`: the first steps of a shuffle."""
    candidates = np.empty(visible_MN.shape[1], np.int64)
    for mask in range(len(visible_MN)):
        visible_N = visible_MN[mask]
        count = visible_N.sum()
        hides, num_candidates = count > num_visible, 0
        for patch in range(len(visible_N)):
            if visible_N[patch] == hides:
                candidates[num_candidates] = patch
                num_candidates += 1
        for change in range(abs(count - num_visible)):
            chosen = change + int(chance_MX[mask, change] * (num_candidates - change))
            visible_N[candidates[chosen]] = not hides
            candidates[chosen] = candidates[change]
