"""Differential attention on a CPU: explicit matrices, for some heads of some sequences at a time.

The products are cheap, and bf16 ones cheaper still; what costs is carrying N x N matrices to memory and back. So the
heads that are computed together share a scratch that fits the cache, and all sequences go through the same scratch.
The backward is written out, which saves the matrices that autograd would keep.

Shapes: as in attention.py, and M maps (1 or 2), I sequences and J heads of a block, X = I * J matrices of each map in
it, C = M * X in all, S blocks of a call.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asda.models.fast.ops import kernels_for

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
                difference_XNN = call.compute_maps(q, k, bias, out=maps_SCNN[number % len(maps_SCNN)])
                call.v_IJNE.copy_(v)
                mixed.copy_(call.product(difference_XNN, call.v_IJNE))
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
                call.v_IJNE.copy_(v)
                call.d_mixed_IJNE.copy_(d_mixed)
                d_mixed_XNE = call.d_mixed_IJNE.flatten(0, 1)
                torch.bmm(d_mixed_XNE, call.v_IJNE.flatten(0, 1).mT, out=call.difference_XNN)
                if learned:
                    d_lam -= (call.difference_XNN * maps_CNN.chunk(2)[1]).sum(dtype=torch.float64)
                difference_XNN, d_logits_CNN = call.maps_backward(maps_CNN)
                dv.copy_(call.product(difference_XNN.mT, call.d_mixed_IJNE))
                dq.copy_(call.scaled_products(d_logits_CNN, call.k_MIJNE).transpose(0, 1))
                dk.copy_(call.scaled_products(d_logits_CNN.mT, call.q_MIJNE).transpose(0, 1))
        return dqk_2BGNE, dv_BHNE, d_lam.to(ctx.lam_dtype) if learned else None, None


class _Call:
    """The sizes of one call, and the scratch through which its blocks go one after the other."""

    def __init__(self, qk_2BGNE: Tensor, v_BHNE: Tensor, lam: float, present_BN: Tensor | None):
        num_sequences, heads, tokens, features = v_BHNE.shape
        self.num_maps, self.lam, self.scale = qk_2BGNE.shape[2] // heads, lam, features**-0.5
        self.q_BMHNE, self.k_BMHNE = self.split_maps(qk_2BGNE)
        bytes_of_a_head = self.num_maps * tokens**2 * v_BHNE.element_size()
        self.heads = _most(heads, bytes_of_a_head)
        self.sequences = _most(num_sequences, heads * bytes_of_a_head) if self.heads == heads else 1
        self.num_blocks = (num_sequences // self.sequences) * (heads // self.heads)
        self.kernels = kernels_for(v_BHNE)

        self.is_padded = present_BN is not None
        bias_BN = v_BHNE.new_zeros(num_sequences, tokens)
        if present_BN is not None:
            bias_BN.masked_fill_(~present_BN, -math.inf)
        self.bias_BH1N = bias_BN[:, None, None].expand(-1, heads, 1, -1)

        def scratch(*shape: int) -> Tensor:
            return v_BHNE.new_empty(shape)

        block = (self.sequences, self.heads, tokens, features)
        self.q_MIJNE, self.k_MIJNE, self.products_MIJNE = (scratch(self.num_maps, *block) for _ in range(3))
        self.v_IJNE, self.d_mixed_IJNE, self.product_IJNE = (scratch(*block) for _ in range(3))
        matrices = self.sequences * self.heads
        self.logits_CNN = scratch(self.num_maps * matrices, tokens, tokens)
        self.difference_XNN = scratch(matrices, tokens, tokens)

    def split_maps(self, qk_2BGNE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, each [B, M, H, N, E]."""
        q_BMHNE, k_BMHNE = qk_2BGNE.unflatten(2, (self.num_maps, -1))
        return q_BMHNE, k_BMHNE

    def empty_maps(self, num_blocks: int) -> Tensor:
        """Memory for the maps of so many blocks, [S, C, N, N]."""
        return self.logits_CNN.new_empty(num_blocks, *self.logits_CNN.shape)

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Queries, keys and what is given ([B, ..., H, N, E]), some sequences and some heads at a time."""
        for of_sequences in zip(
            *(x.split(self.sequences) for x in (self.q_BMHNE, self.k_BMHNE, *tensors)), strict=True
        ):
            yield from zip(*(x.split(self.heads, dim=-3) for x in of_sequences), strict=True)

    def take(self, q_IMJNE: Tensor, k_IMJNE: Tensor) -> None:
        """Copy a block's queries and keys to the scratch, where each head lies in one piece, as products like it."""
        self.q_MIJNE.copy_(q_IMJNE.transpose(0, 1))
        self.k_MIJNE.copy_(k_IMJNE.transpose(0, 1))

    def compute_maps(self, q_IMJNE: Tensor, k_IMJNE: Tensor, bias_IJ1N: Tensor, out: Tensor) -> Tensor:
        """The block's maps into out, [C, N, N]; returns first map - lam * second, or the only one, [X, N, N]."""
        self.take(q_IMJNE, k_IMJNE)
        q_CNE, k_CNE = self.q_MIJNE.flatten(0, 2), self.k_MIJNE.flatten(0, 2)
        bias_C1N = bias_IJ1N.flatten(0, 1).repeat(self.num_maps, 1, 1) if self.is_padded else self.logits_CNN[:, :1]
        torch.baddbmm(bias_C1N, q_CNE, k_CNE.mT, beta=int(self.is_padded), alpha=self.scale, out=self.logits_CNN)
        if self.kernels:
            kernel, sizes = self.kernels.maps_and_difference, self._sizes()
            self.kernels.launch(kernel, sizes, [self.lam], self.logits_CNN, out, self.difference_XNN)
            return out if self.num_maps == 1 else self.difference_XNN
        return self.difference(torch.softmax(self.logits_CNN, dim=-1, out=out))

    def difference(self, maps_CNN: Tensor) -> Tensor:
        """First map - lam * second map, [X, N, N]; the map itself where there is one."""
        if self.num_maps == 1:
            return maps_CNN
        first_XNN, second_XNN = maps_CNN.chunk(2)
        return torch.sub(first_XNN, second_XNN, alpha=self.lam, out=self.difference_XNN)

    def maps_backward(self, maps_CNN: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the difference, which lies in difference_XNN: the difference, and dL / (1, -lam)."""
        if self.kernels:
            kernel, sizes, inout = self.kernels.maps_backward, self._sizes(), self.difference_XNN
            self.kernels.launch(kernel, sizes, [self.lam], maps_CNN, inout, self.logits_CNN, inout)
            return (maps_CNN if self.num_maps == 1 else self.difference_XNN), self.logits_CNN
        for map_XNN, d_logits_XNN in zip(
            maps_CNN.chunk(self.num_maps), self.logits_CNN.chunk(self.num_maps), strict=True
        ):
            torch.ops.aten._softmax_backward_data.out(
                self.difference_XNN, map_XNN, -1, map_XNN.dtype, grad_input=d_logits_XNN
            )
        return self.difference(maps_CNN), self.logits_CNN

    def product(self, weights_XNN: Tensor, x_IJNE: Tensor) -> Tensor:
        """Weights x, [I, J, N, E]."""
        torch.bmm(weights_XNN, x_IJNE.flatten(0, 1), out=self.product_IJNE.flatten(0, 1))
        return self.product_IJNE

    def scaled_products(self, d_logits_CNN: Tensor, x_MIJNE: Tensor) -> Tensor:
        """d_logits x, with the scale of the logits and the factors 1 and -lam, [M, I, J, N, E]."""
        parts = zip(d_logits_CNN.chunk(self.num_maps), x_MIJNE, self.products_MIJNE, (1.0, -self.lam), strict=False)
        for d_logits_XNN, x_IJNE, product_IJNE, factor in parts:
            product_XNE, alpha = product_IJNE.flatten(0, 1), factor * self.scale
            if factor == 0:
                product_XNE.zero_()  # torch's baddbmm leaves what lay there when alpha is 0, in bf16 and fp16
                continue
            torch.baddbmm(product_XNE, d_logits_XNN, x_IJNE.flatten(0, 1), beta=0, alpha=alpha, out=product_XNE)
        return self.products_MIJNE

    def _sizes(self) -> list[int]:
        matrices, tokens, _ = self.difference_XNN.shape
        return [matrices * tokens, tokens, self.num_maps]


def _most(number: int, bytes_of_each: int) -> int:
    """The largest divisor of `number` of which so many fit the scratch, at least 1."""
    fitting = [n for n in range(1, number + 1) if number % n == 0 and n * bytes_of_each <= SCRATCH_BYTES]
    return max(fitting, default=1)


def like_tokens(v_BHNE: Tensor) -> Tensor:
    """Empty, [B, H, N, E], laid out as the tokens are, [B, N, H * E], so that joining the heads copies nothing."""
    num_sequences, heads, tokens, features = v_BHNE.shape
    return v_BHNE.new_empty(num_sequences, tokens, heads, features).transpose(1, 2)


def like_projection(qk_2BGNE: Tensor) -> Tensor:
    """Empty, [2, B, G, N, E], laid out as the linear layer makes it, [B, N, 2 * G * E]."""
    _, num_sequences, heads, tokens, features = qk_2BGNE.shape
    return qk_2BGNE.new_empty(num_sequences, tokens, 2, heads, features).permute(2, 0, 3, 1, 4)
