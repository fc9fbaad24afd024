"""The benchmark compares like with like: its plain implementation gives our losses and our gradients."""

import golden
import numpy as np
import plain_asda
import pytest
import torch

from asda.models.masks import visible_patches
from asda.models.pretrain import MaskedStudents, Teacher

GRID = (8, 8)


@pytest.fixture
def sides() -> tuple[MaskedStudents, plain_asda.PlainStudents]:
    torch.manual_seed(0)
    ours = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN).double()
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # biases and norms that could be mistaken for none
    plain = plain_asda.PlainStudents(golden.TINY, golden.TINY_PRETRAIN).double()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_the_plain_step_has_our_losses_and_gradients(sides: tuple[MaskedStudents, plain_asda.PlainStudents]):
    ours, plain = sides
    patches_BNP = torch.randn(2, 64, 256, dtype=torch.float64)
    num_students, rng = golden.TINY_PRETRAIN.students, np.random.default_rng(0)
    masks = visible_patches(rng, num_masks=2 * num_students, grid=GRID, config=golden.TINY_PRETRAIN.mask)
    visible_BMK = torch.from_numpy(masks).unflatten(0, (2, num_students))
    noise_SND = torch.randn(2 * num_students, 64, golden.TINY.width, dtype=torch.float64)
    targets = torch.randn(2, 64, golden.TINY.width), torch.randn(2, golden.TINY.width)
    losses = [side(patches_BNP, visible_BMK, *targets, noise_SND) for side in (ours, plain)]
    # Ours computes the losses in fp32 whatever the weights are: sums of some 10,000 numbers, in pairs.
    both = [torch.stack(list(side)).double() for side in losses]
    torch.testing.assert_close(*both, rtol=100 * 2**-24, atol=0)
    mine, theirs = (
        dict(zip(dict(side.named_parameters()), torch.autograd.grad(total, list(side.parameters())), strict=True))
        for (total, *_), side in zip(losses, sides, strict=True)
    )
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        # What reaches the weights was rounded to fp32 in the losses, 2^-24 of each number; all after that is fp64. A
        # factor 100 for sums that cancel. A key's bias changes nothing: its gradient is rounding alone.
        scale = gradient.abs().max().clamp(min=1e-3)
        assert float((mine[name] - gradient).abs().max() / scale) < 100 * 2**-24, name


def test_the_plain_teacher_asks_for_what_ours_asks(sides: tuple[MaskedStudents, plain_asda.PlainStudents]):
    ours, plain = sides
    patches_BNP = torch.randn(2, 64, 256)
    targets = Teacher(ours.encoder, 2).targets(patches_BNP)
    tokens_BND, cls_BD = plain_asda.plain_targets(plain.encoder.float(), patches_BNP, 2)
    torch.testing.assert_close(targets.tokens, tokens_BND, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.cls, cls_BD, rtol=1e-4, atol=1e-4)
