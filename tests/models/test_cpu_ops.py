"""The fused operations of a CPU against their definitions in fp64, forward and backward.

The inputs are bf16 numbers on both sides, so all that differs is the rounding inside.
"""

import math
from collections.abc import Callable

import pytest
import torch
from golden import rel_rms
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from asda.models.fast import ops as cpu_ops
from asda.models.fast.ops import GeluLinear, Norm, feature_spread, kernels_for, masked_error, norm_gelu

R, D = 50, 72  # rows and features: the width is no multiple of a register's
EPS = 1e-6
# A rounding to bf16 is relative to the number: at most eps / 2, uniform, so its rms is eps / sqrt(12).
ROUNDING = torch.finfo(torch.bfloat16).eps / 12**0.5
MARGIN = 2  # for what is not uniform, and for sums in fp32

pytestmark = [
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    pytest.mark.skipif(kernels_for() is None, reason="torch's wheel brings no OpenMP library here"),
]


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


def with_gradients(work: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result, then the gradient of each input."""
    result = work(*inputs)
    torch.manual_seed(1)
    cotangent = torch.randn(result.shape).bfloat16().to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, inputs, cotangent)]


def assert_rounds_at_most(
    ours: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], roundings: int
) -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for result, exact in zip(with_gradients(ours, inputs), with_gradients(definition, wide), strict=True):
        assert result.dtype == torch.bfloat16
        assert rel_rms(result, exact) < MARGIN * roundings**0.5 * ROUNDING


def norm_of(x: Tensor, *rest: Tensor) -> Tensor:
    """Norm with these weights, after an optional residual: (x, residual, weight, bias) or (x, weight, bias)."""
    *residual, weight, bias = rest
    module = Norm(D, eps=EPS).to(x.dtype)
    del module.weight, module.bias
    module.weight, module.bias = weight, bias  # type: ignore[assignment]
    return module(x, *residual)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_norm_is_layer_norm(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    inputs = draws((R, D), (D,), (D,))
    assert_rounds_at_most(norm_of, lambda x, w, b: layer_norm(x, (D,), w, b, EPS), inputs, 1)
    torch.set_num_threads(before)


def test_a_norm_of_a_sum_rounds_the_sum_as_well():
    inputs = draws((R, D), (R, D), (D,), (D,))
    assert_rounds_at_most(norm_of, lambda x, r, w, b: layer_norm(x + r, (D,), w, b, EPS), inputs, 2)


@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_and_gelu_are_those_of_torch(has_residual: bool):
    inputs = draws((4, R, D), (4, R, D))[: 1 + has_residual]

    def definition(x: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        return gelu(layer_norm(x, (D,), eps=EPS)) + residual

    # Rounded are what goes into the GELU and what comes out.
    assert_rounds_at_most(lambda *xs: norm_gelu(*xs, eps=EPS), definition, inputs, 2)


def test_a_linear_layer_after_a_gelu_is_that():
    inputs = draws((4, R, D), (24, D), (24,))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module = GeluLinear(D, 24).to(x.dtype)
        del module.weight, module.bias
        module.weight, module.bias = weight, bias  # type: ignore[assignment]
        return module(x)

    # The GELU and the result; in the backward the gradient between them.
    assert_rounds_at_most(ours, lambda x, w, b: linear(gelu(x), w, b), inputs, 2)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(lambda x, w, b: linear(gelu(x), w, b), wide)
    torch.testing.assert_close(with_gradients(ours, wide), expected)


def error_case() -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of 3 students of each of 2 clips, targets, and 7 visible places of each student."""
    (pred_SND,) = draws((6, 40, D))
    targets_BND = torch.randn(2, 40, D)
    return pred_SND, targets_BND, torch.stack([torch.randperm(40)[:7] for _ in range(6)])


def masked_rows(pred_SND: Tensor, visible_SK: Tensor) -> Tensor:
    masked_SN = torch.ones(pred_SND.shape[:2], dtype=torch.bool).scatter(1, visible_SK, False)
    return pred_SND[masked_SN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_masked_error_counts_masked_patches_alone(dtype: torch.dtype):
    pred_SND, targets_BND, visible_SK = error_case()
    pred_SND = pred_SND.detach().to(dtype).requires_grad_()
    error, spread = masked_error(pred_SND, targets_BND.to(torch.float32), visible_SK)
    exact_SND = pred_SND.detach().double().requires_grad_()
    difference_XD = masked_rows(exact_SND, visible_SK) - masked_rows(
        targets_BND.double().repeat_interleave(3, 0), visible_SK
    )
    expected = difference_XD.square().sum(-1).mean()
    expected_spread = (masked_rows(exact_SND, visible_SK).var(dim=0) + 1e-6).sqrt().mean()
    # Differences and squares in fp32, the sums of the kernel in fp64; the definition is in fp32 throughout.
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(spread.double(), expected_spread, rtol=1e-5, atol=0)
    assert not spread.requires_grad
    (gradient,) = torch.autograd.grad(1.7 * error, pred_SND)
    (exact,) = torch.autograd.grad(1.7 * expected, exact_SND)
    assert rel_rms(gradient, exact) < MARGIN * ROUNDING
    assert not gradient.gather(1, visible_SK[..., None].expand(-1, -1, D)).any()


def test_targets_of_the_inference_mode_are_taken():
    pred_SND, targets_BND, visible_SK = error_case()
    with torch.inference_mode():
        inference_BND = targets_BND.clone()
    gradients = [
        torch.autograd.grad(masked_error(pred_SND, t, visible_SK)[0], pred_SND) for t in (targets_BND, inference_BND)
    ]
    assert torch.equal(*(g for (g,) in gradients))


def test_what_has_no_value_keeps_none():
    # A kernel that lost a nan would hide a bad batch from the check before the update.
    for bad in (float("nan"), float("inf")):
        (x, residual, weight, bias), clean = draws((R, D), (R, D), (D,), (D,)), torch.ones(R, dtype=torch.bool)
        x.data[3, 5] = bad
        clean[3] = False
        for result in (norm_of(x, residual, weight, bias), norm_gelu(x, residual)):
            assert torch.equal(result.isfinite().all(1), clean)
        pred_SND, targets_BND, visible_SK = error_case()
        visible_SK[:] = torch.arange(7)
        pred_SND.data[0, 20, 5] = bad
        error, _ = masked_error(pred_SND, targets_BND, visible_SK)
        assert not error.isfinite()


def test_the_spread_is_of_the_tokens_of_weight_one():
    torch.manual_seed(0)
    features_ND, weight_N = torch.randn(50, 7), (torch.arange(50) < 30).float()
    features_ND[30:] = 1e3
    expected = (features_ND[:30].var(dim=0) + 1e-6).sqrt().mean()
    torch.testing.assert_close(feature_spread(features_ND, weight_N), expected)


def test_gelu_and_its_slope_are_within_a_rounding_for_every_number():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()]
    raised, slope = cpu_ops._gelu_backward(x.view(2, -1), torch.ones(2, len(x) // 2, dtype=torch.bfloat16))
    exact = x.double()
    below = torch.special.erfc(-exact / math.sqrt(2)) / 2  # torch's gelu computes 1 + erf, which has no digits at -9
    density = (-exact.square() / 2).exp() / math.sqrt(2 * math.pi)
    rounding, approximation = 2.0**-8, 1e-4  # half a unit of 8 digits; what _normal says of itself
    smallest = 14 * 2.0**-126  # a bell below 2^-126 is taken for 0, and multiplied by |x| < 14 where it is above
    error = (raised.flatten().double() - exact * below).abs()
    assert (error <= (rounding + approximation) * (exact * below).abs() + smallest).all()
    # The slope is a sum of two terms, which cancel near -0.75.
    error = (slope.flatten().double() - (below + exact * density)).abs()
    terms = below + (exact * density).abs()
    assert (error <= rounding * (below + exact * density).abs() + approximation * terms + smallest).all()
