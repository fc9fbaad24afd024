"""Inverse block masks: a student sees a few blocks of patches and predicts all others (data2vec 2.0, 2022).

Shapes: M masks, T time patches, F mel patches, N = T * F patches, C block centres, K visible patches.
"""

import numpy as np
from numpy.typing import NDArray

from asda.config import MaskConfig
from asda.errors import UserError


def inverse_block_masks(
    rng: np.random.Generator, num_masks: int, grid: tuple[int, int], config: MaskConfig
) -> NDArray[np.bool_]:
    """Draw masks, [M, N], True where a patch is visible; every mask has exactly int(N * (1 - ratio)) visible patches.

    The union of blocks around random centres is brought to that number: by hiding random patches of it when it is
    larger, by showing random patches outside of it when it is smaller.

    Args:
        rng: the source of randomness; the same state gives the same masks.
        num_masks: M.
        grid: time patches and mel patches of the clip.
        config: shares and block size.

    Raises:
        UserError: when a student would see nothing.
    """
    num_patches = grid[0] * grid[1]
    num_visible = int(num_patches * (1 - config.ratio))
    if num_visible == 0:
        raise UserError(
            f"objective.mask.ratio {config.ratio} leaves none of the {grid[0]} x {grid[1]} patches of a clip visible; "
            f"use longer clips (data.frames) or a smaller ratio"
        )
    centres_MC = draw_centres(rng, num_masks, num_patches, config)
    # A patch of a block outranks every other patch, and chance decides among equals: of a union that is too large
    # this keeps a uniform choice, and to one that is too small it adds a uniform choice.
    rank_MN = block_union(centres_MC, grid, config.block) + rng.random((num_masks, num_patches), dtype=np.float32)
    shown_MK = np.argpartition(rank_MN, -num_visible, axis=1)[:, -num_visible:]
    visible_MN = np.zeros((num_masks, num_patches), dtype=bool)
    np.put_along_axis(visible_MN, shown_MK, True, axis=1)
    return visible_MN


def draw_centres(rng: np.random.Generator, num_masks: int, num_patches: int, config: MaskConfig) -> NDArray[np.int64]:
    """The patches around which blocks are shown, [M, C]: any patch, also twice, so many that about enough is seen."""
    num_centres = int(num_patches * ((1 - config.ratio) + config.adjust) / config.block**2)
    return rng.integers(num_patches, size=(num_masks, num_centres))


def block_union(centres_MC: NDArray[np.int64], grid: tuple[int, int], block: int) -> NDArray[np.bool_]:
    """Mark the block x block patches around each centre, cut off at the borders of the grid: [M, C] -> [M, N]."""
    num_rows, num_columns = grid
    offsets = np.arange(block) - block // 2
    rows = np.clip(centres_MC[..., None] // num_columns + offsets, 0, num_rows - 1)  # [M, C, block]
    columns = np.clip(centres_MC[..., None] % num_columns + offsets, 0, num_columns - 1)
    cells = rows[..., :, None] * num_columns + columns[..., None, :]  # [M, C, block, block]
    union_MN = np.zeros((len(centres_MC), num_rows * num_columns), dtype=bool)
    np.put_along_axis(union_MN, cells.reshape(len(centres_MC), -1), True, axis=1)
    return union_MN


def visible_indices(masks_MN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The places of the visible patches, ascending, [M, K]; all masks must have the same number of them."""
    return np.nonzero(masks_MN)[1].reshape(len(masks_MN), -1)
