"""The definition of the patches: each one by hand, and back."""

import numpy as np
import pytest
import torch

from asda.models.patches import PatchLayout, from_patches, normalised, padded, to_patches

PATCH = 16


def test_patches_are_cut_one_after_the_other_and_come_back() -> None:
    x_TF = torch.arange(3 * PATCH * 128.0).reshape(-1, 128)
    corners = [(t, f) for t in range(0, len(x_TF), PATCH) for f in range(0, 128, PATCH)]
    by_hand_NP = torch.stack([x_TF[t : t + PATCH, f : f + PATCH].flatten() for t, f in corners])
    assert torch.equal(to_patches(x_TF, PATCH), by_hand_NP)
    assert by_hand_NP.shape == PatchLayout(len(x_TF), PATCH, 0.0, 1.0, 0.0).shape
    both_BTF = torch.stack([x_TF, -x_TF])
    assert torch.equal(to_patches(both_BTF, PATCH)[1], -by_hand_NP)
    assert torch.equal(from_patches(to_patches(both_BTF, PATCH), PATCH), both_BTF)


@pytest.mark.parametrize("num_frames", [1, 31, 32, 33, 80])
def test_a_clip_is_cut_or_filled_up_before_it_is_normalised(num_frames: int) -> None:
    mel_TF = torch.from_numpy(np.random.default_rng(0).normal(-4, 3, (num_frames, 128))).float()
    x_TF = normalised(padded(mel_TF, 32, -1.0), -4.0, 3.0)
    real = min(num_frames, 32)
    assert torch.equal(x_TF[:real], (mel_TF[:real] + 4) / 6)
    assert x_TF.shape == (32, 128)
    assert (x_TF[real:] == 0.5).all()
