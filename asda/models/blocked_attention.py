"""Differential attention on a CPU: explicit matrices, for a few heads of one sequence at a time.

The products are cheap, and bf16 ones cheaper still; what costs is carrying N x N matrices to memory and back. So the
heads that are computed together share a scratch that fits the cache, and all sequences go through the same scratch.
The backward is written out, which saves the matrices that autograd would keep.

Shapes: as in attention.py, and M maps (1 or 2), J heads of a block, C = M * J matrices of a block, S blocks of a call.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SCRATCH_BYTES = 5 << 20  # of the maps of one block: 2 to 6 MiB are alike, 12 are slower in fp32
# Short sequences keep their maps for the backward (16 x 103 tokens: 20 ms against 25); long ones compute them again,
# which takes as long as fetching them from memory and saves 100 MB a layer (8 x 513 tokens).
LONGEST_KEPT = 128  # tokens


class BlockedAttention(torch.autograd.Function):
    """attention.attend with explicit matrices, block by block, on CPU tensors of one dtype."""

    @staticmethod
    def forward(ctx: Any, qk_2BGNE: Tensor, v_BHNE: Tensor, lam: float | Tensor, present_BN: Tensor | None):
        """Softmax of every map, their difference, its product with v; [B, H, N, E], the heads of a token together."""
        call = _Call(qk_2BGNE, v_BHNE, float(lam), present_BN)
        keeps = any(ctx.needs_input_grad) and v_BHNE.shape[2] <= LONGEST_KEPT
        maps_SCNN = call.empty_maps(call.num_blocks if keeps else 1)
        mixed_BHNE = like_tokens(v_BHNE)
        with torch.autocast("cpu", enabled=False):  # which would compute softmax in fp32, into new memory
            for number, (q, k, v, bias, mixed) in enumerate(call.blocks(v_BHNE, call.bias_BH1N, mixed_BHNE)):
                maps_CNN = call.compute_maps(q, k, bias, out=maps_SCNN[number % len(maps_SCNN)])
                call.v_JNE.copy_(v)
                mixed.copy_(torch.bmm(call.difference(maps_CNN), call.v_JNE, out=call.result_JNE))
        ctx.save_for_backward(qk_2BGNE, v_BHNE, present_BN, maps_SCNN if keeps else None)
        ctx.lam, ctx.lam_dtype = call.lam, lam.dtype if isinstance(lam, Tensor) else None
        return mixed_BHNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed_BHNE: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of qk_2BGNE, v_BHNE and, where it is a tensor, lam.

        With P = softmax(L), A = P1 - lam P2 and O = A v: dv = A^T dO, dA = dO v^T, dP1 = dA, dP2 = -lam dA,
        dlam = -sum(dA * P2), and dL = P * (dP - rowsum(P * dP)), from which dq = dL k and dk = dL^T q, both scaled.
        """
        qk_2BGNE, v_BHNE, present_BN, kept_SCNN = ctx.saved_tensors
        learned = ctx.needs_input_grad[2]
        call = _Call(qk_2BGNE, v_BHNE, ctx.lam, present_BN)
        maps_SCNN = call.empty_maps(1) if kept_SCNN is None else kept_SCNN
        dqk_2BGNE, dv_BHNE = like_projection(qk_2BGNE), like_tokens(v_BHNE)
        dq_BMHNE, dk_BMHNE = call.split_maps(dqk_2BGNE)
        gradients = (d_mixed_BHNE, dq_BMHNE, dk_BMHNE, dv_BHNE)
        d_lam = torch.zeros((), dtype=torch.float64)
        with torch.autocast("cpu", enabled=False):
            for number, (q, k, v, bias, d_mixed, dq, dk, dv) in enumerate(
                call.blocks(v_BHNE, call.bias_BH1N, *gradients)
            ):
                maps_CNN = maps_SCNN[number % len(maps_SCNN)]
                if kept_SCNN is None:
                    call.compute_maps(q, k, bias, out=maps_CNN)
                else:
                    call.take(q, k)
                d_mixed_JNE = call.d_mixed_JNE.copy_(d_mixed)
                dv.copy_(torch.bmm(call.difference(maps_CNN).mT, d_mixed_JNE, out=call.result_JNE))
                d_difference_JNN = torch.bmm(d_mixed_JNE, call.v_JNE.copy_(v).mT, out=call.difference_JNN)
                if learned:
                    d_lam -= (d_difference_JNN * maps_CNN.chunk(2)[1]).sum(dtype=torch.float64)
                d_logits_CNN = call.softmax_backward(d_difference_JNN, maps_CNN)
                dq.copy_(call.scaled_product(d_logits_CNN, call.k_MJNE))
                dk.copy_(call.scaled_product(d_logits_CNN.mT, call.q_MJNE))
        return dqk_2BGNE, dv_BHNE, d_lam.to(ctx.lam_dtype) if learned else None, None


class _Call:
    """The sizes of one call, and the scratch through which its blocks go one after the other."""

    def __init__(self, qk_2BGNE: Tensor, v_BHNE: Tensor, lam: float, present_BN: Tensor | None):
        num_sequences, heads, tokens, features = v_BHNE.shape
        self.num_maps, self.lam, self.scale = qk_2BGNE.shape[2] // heads, lam, features**-0.5
        self.q_BMHNE, self.k_BMHNE = self.split_maps(qk_2BGNE)
        self.heads = _heads_of_a_block(heads, self.num_maps * tokens**2 * v_BHNE.element_size())
        self.num_blocks = num_sequences * heads // self.heads

        self.is_padded = present_BN is not None
        bias_BN = v_BHNE.new_zeros(num_sequences, tokens)
        if present_BN is not None:
            bias_BN.masked_fill_(~present_BN, -math.inf)
        self.bias_BH1N = bias_BN[:, None, None].expand(-1, heads, 1, -1)

        def scratch(*shape: int) -> Tensor:
            return v_BHNE.new_empty(shape)

        maps = (self.num_maps, self.heads, tokens, features)
        self.q_MJNE, self.k_MJNE, self.product_MJNE = scratch(*maps), scratch(*maps), scratch(*maps)
        self.v_JNE, self.d_mixed_JNE, self.result_JNE = scratch(*maps[1:]), scratch(*maps[1:]), scratch(*maps[1:])
        self.logits_CNN = scratch(self.num_maps * self.heads, tokens, tokens)
        self.difference_JNN = scratch(self.heads, tokens, tokens)

    def split_maps(self, qk_2BGNE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, each [B, M, H, N, E]."""
        q_BMHNE, k_BMHNE = qk_2BGNE.unflatten(2, (self.num_maps, -1))
        return q_BMHNE, k_BMHNE

    def empty_maps(self, num_blocks: int) -> Tensor:
        """Memory for the maps of so many blocks, [S, C, N, N]."""
        return self.logits_CNN.new_empty(num_blocks, *self.logits_CNN.shape)

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Queries, keys and what is given ([B, ..., H, N, E]), sequence by sequence and some heads at a time."""
        for of_sequence in zip(*(x.unbind(0) for x in (self.q_BMHNE, self.k_BMHNE, *tensors)), strict=True):
            yield from zip(*(x.split(self.heads, dim=-3) for x in of_sequence), strict=True)

    def take(self, q_MJNE: Tensor, k_MJNE: Tensor) -> None:
        """Copy a block's queries and keys to the scratch, where each head lies in one piece, as products like it."""
        self.q_MJNE.copy_(q_MJNE)
        self.k_MJNE.copy_(k_MJNE)

    def compute_maps(self, q_MJNE: Tensor, k_MJNE: Tensor, bias_J1N: Tensor, out: Tensor) -> Tensor:
        """The block's maps, [C, N, N]."""
        self.take(q_MJNE, k_MJNE)
        q_CNE, k_CNE = self.q_MJNE.flatten(0, 1), self.k_MJNE.flatten(0, 1)
        torch.baddbmm(bias_J1N[:1], q_CNE, k_CNE.mT, beta=int(self.is_padded), alpha=self.scale, out=self.logits_CNN)
        return torch.softmax(self.logits_CNN, dim=-1, out=out)

    def difference(self, maps_CNN: Tensor) -> Tensor:
        """First map - lam * second map, [J, N, N]; the map itself where there is one."""
        if self.num_maps == 1:
            return maps_CNN
        first_JNN, second_JNN = maps_CNN.chunk(2)
        return torch.sub(first_JNN, second_JNN, alpha=self.lam, out=self.difference_JNN)

    def softmax_backward(self, d_difference_JNN: Tensor, maps_CNN: Tensor) -> Tensor:
        """The gradient of the logits, except for the factors 1 and -lam of the two maps, [C, N, N]."""
        for map_JNN, d_logits_JNN in zip(maps_CNN.split(self.heads), self.logits_CNN.split(self.heads), strict=True):
            torch.ops.aten._softmax_backward_data.out(
                d_difference_JNN, map_JNN, -1, map_JNN.dtype, grad_input=d_logits_JNN
            )
        return self.logits_CNN

    def scaled_product(self, d_logits_CNN: Tensor, x_MJNE: Tensor) -> Tensor:
        """d_logits x, with the scale of the logits and the factors 1 and -lam, [M, J, N, E]."""
        torch.bmm(d_logits_CNN, x_MJNE.flatten(0, 1), out=self.product_MJNE.flatten(0, 1))
        for product_JNE, factor in zip(self.product_MJNE, (1.0, -self.lam), strict=False):
            product_JNE.mul_(factor * self.scale)  # N x E numbers, where the logits would be N x N
        return self.product_MJNE


def _heads_of_a_block(heads: int, bytes_of_a_head: int) -> int:
    """The largest divisor of `heads` whose maps fit the scratch, at least 1."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n * bytes_of_a_head <= SCRATCH_BYTES]
    return max(fitting, default=1)


def like_tokens(v_BHNE: Tensor) -> Tensor:
    """Empty, [B, H, N, E], laid out as the tokens are, [B, N, H * E], so that joining the heads copies nothing."""
    num_sequences, heads, tokens, features = v_BHNE.shape
    return v_BHNE.new_empty(num_sequences, tokens, heads, features).transpose(1, 2)


def like_projection(qk_2BGNE: Tensor) -> Tensor:
    """Empty, [2, B, G, N, E], laid out as the linear layer makes it, [B, N, 2 * G * E]."""
    _, num_sequences, heads, tokens, features = qk_2BGNE.shape
    return qk_2BGNE.new_empty(num_sequences, tokens, 2, heads, features).permute(2, 0, 3, 1, 4)
