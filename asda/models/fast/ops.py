"""Chains of row-wise operations with one kernel each way, where the tensors are bf16 on a CPU; elsewhere as defined.

Each function begins with its definition in torch, which everything but that one case uses, and every way has its
gradients. The kernels (cpu_kernels.py) keep less for the backward: never what one of them can make again.

Shapes: `...` rows, D features of a row. S sequences, B clips, M students of a clip, N patches, K visible ones.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, layer_norm, linear

VARIANCE_FLOOR = 1e-6  # under the square root of the collapse monitors, as in data2vec 2.0


def kernels_for(*tensors: Tensor | None) -> ModuleType | None:
    """The kernels if these tensors are what they take: bf16, on a CPU. This is the one switch."""
    fit = all(x is None or (x.dtype == torch.bfloat16 and x.device.type == "cpu") for x in tensors)
    return _kernels() if fit and _kernels().AVAILABLE else None


def _kernels() -> ModuleType:
    from asda.models.fast import cpu_kernels  # which compiles: wanted only where it is used

    return cpu_kernels


class Norm(nn.LayerNorm):
    """A LayerNorm, of a sum if there is a residual."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D]."""
        if kernels_for(input, residual, self.weight):
            return _Norm.apply(input, residual, self.weight, self.bias, self.eps)  # pyright: ignore[reportReturnType]
        return super().forward(input if residual is None else input + residual)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x, kernels = x.contiguous(), _kernels()
        residual = None if residual is None else residual.contiguous()
        summed = x if residual is None else torch.empty_like(x)
        y, moments_R2 = torch.empty_like(x), _moments_of(x)
        sizes = [*_rows(x), residual is not None]
        given = [x, x if residual is None else residual, weight, bias]
        kernels.launch(kernels.norm, sizes, [eps], *given, summed, y, moments_R2)
        ctx.save_for_backward(summed, weight, moments_R2)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        summed, weight, moments_R2 = ctx.saved_tensors
        kernels, dx = _kernels(), torch.empty_like(summed)
        sums_P2D = torch.zeros(torch.get_num_threads(), 2, len(weight))
        kernels.launch(
            kernels.norm_backward, _rows(summed), [], summed, dy.contiguous(), weight, moments_R2, dx, sums_P2D
        )
        dweight, dbias = sums_P2D.sum(0).to(weight.dtype)
        return dx, dx if ctx.has_residual else None, dweight, dbias, None


class GeluLinear(nn.Linear):
    """A linear layer after an exact GELU, whose result is not kept for the backward but made again there."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden] -> [..., D]."""
        # Autocast casts what it sees, and does not look into _GeluLinear; a meta tensor (costs.py) knows no autocast.
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            return super().forward(gelu(input))
        return _GeluLinear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        raised, dx = _gelu_backward(x, dy @ weight)
        dy_RD = dy.flatten(0, -2)
        return dx, dy_RD.T @ raised.flatten(0, -2), dy_RD.sum(0)


def _gelu_backward(x: Tensor, draised: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x), and the gradient of x."""
    if not (kernels := kernels_for(x, draised)):
        return gelu(x), torch.ops.aten.gelu_backward(draised, x)
    x, raised = x.contiguous(), torch.empty_like(draised)
    kernels.launch(kernels.gelu_backward, _rows(x), [], x, draised, raised)
    return raised, draised  # in which the gradient lies by now


def norm_gelu(x: Tensor, residual: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """gelu(x, normalised over its features, without weights) + residual; [..., D] -> [..., D]."""
    if kernels_for(x, residual):
        return _NormGelu.apply(x, residual, eps)  # pyright: ignore[reportReturnType]
    raised = gelu(layer_norm(x, x.shape[-1:], eps=eps))
    return raised if residual is None else raised + residual


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, eps: float) -> Tensor:
        x, kernels = x.contiguous(), _kernels()
        residual = None if residual is None else residual.contiguous()
        y, moments_R2 = torch.empty_like(x), _moments_of(x)
        sizes = [*_rows(x), residual is not None]
        kernels.launch(kernels.norm_gelu, sizes, [eps], x, x if residual is None else residual, y, moments_R2)
        ctx.save_for_backward(x, moments_R2)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, moments_R2 = ctx.saved_tensors
        kernels, dx = _kernels(), torch.empty_like(x)
        kernels.launch(kernels.norm_gelu_backward, _rows(x), [], x, dy.contiguous(), moments_R2, dx)
        return dx, dy if ctx.has_residual else None, None


def masked_error(pred_SND: Tensor, targets_BND: Tensor, visible_SK: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of |prediction - target|^2 over the masked patches, and the spread of the predictions there; fp32.

    Args:
        pred_SND: of M = S / B students of each clip, one clip after the other.
        targets_BND: fp32.
        visible_SK: the places that are not masked, none of them twice.
    """
    masked_SN = torch.ones(pred_SND.shape[:2], device=pred_SND.device).scatter(1, visible_SK, 0.0)
    if kernels_for(pred_SND):
        return _MaskedError.apply(pred_SND, targets_BND, masked_SN)  # pyright: ignore[reportReturnType]
    pred_SND = pred_SND.float()
    pred_BMND = pred_SND.unflatten(0, (len(targets_BND), -1))
    error_SN = (pred_BMND - targets_BND[:, None]).square().sum(-1).flatten(0, 1)
    return (error_SN * masked_SN).sum() / masked_SN.sum(), feature_spread(pred_SND.detach(), masked_SN)


def feature_spread(features_D: Tensor, weight: Tensor) -> Tensor:
    """Each feature's standard deviation over the tokens of weight 1, averaged over features: 0 means collapse.

    data2vec logs this as "variance"; features_D is [..., D] in fp32, weight [...] holds 0 and 1.
    """
    features_ND, weight_N1 = features_D.flatten(0, -2), weight.flatten()[:, None]
    count = weight_N1.sum()
    mean_D = (features_ND * weight_N1).sum(0) / count
    variance_D = ((features_ND - mean_D).square() * weight_N1).sum(0) / (count - 1)
    return (variance_D + VARIANCE_FLOOR).sqrt().mean()


class _MaskedError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred_SND: Tensor, targets_BND: Tensor, masked_SN: Tensor):
        pred_SND, targets_BND, kernels = pred_SND.contiguous(), targets_BND.float().contiguous(), _kernels()
        masked_SN = masked_SN.to(torch.uint8)
        count, (num_sequences, patches, width) = masked_SN.sum(dtype=torch.float64), pred_SND.shape
        ctx.sizes = [num_sequences * patches, width, targets_BND.shape[0] * patches]
        ctx.sizes += [num_sequences // len(targets_BND), patches]
        sums_P3D = torch.zeros(torch.get_num_threads(), 3, width, dtype=torch.float64)
        kernels.launch(kernels.masked_error, ctx.sizes, [], pred_SND, targets_BND, masked_SN, sums_P3D)
        error_D, total_D, square_D = sums_P3D.sum(0)
        # bf16 numbers have 8 digits and fp64 has 53: nothing is lost in the difference of the two sums.
        variance_D = (square_D - total_D.square() / count) / (count - 1)
        spread = (variance_D + VARIANCE_FLOOR).sqrt().mean().float()
        ctx.save_for_backward(pred_SND, masked_SN, count)
        ctx.targets_BND = targets_BND  # a tensor of the inference mode, which autograd would not keep
        ctx.mark_non_differentiable(spread)
        return (error_D.sum() / count).float(), spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, derror: Tensor, _: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        pred_SND, masked_SN, count = ctx.saved_tensors
        kernels, dpred_SND = _kernels(), torch.empty_like(pred_SND)
        factor = float(2 * derror / count)
        kernels.launch(
            kernels.masked_error_backward, ctx.sizes, [factor], pred_SND, ctx.targets_BND, masked_SN, dpred_SND
        )
        return dpred_SND, None, None


def _rows(x: Tensor) -> list[int]:
    return [x.numel() // x.shape[-1], x.shape[-1]]


def _moments_of(x: Tensor) -> Tensor:
    """Room for the mean and the reciprocal deviation of every row, [R, 2]."""
    return torch.empty(x.numel() // x.shape[-1], 2)
