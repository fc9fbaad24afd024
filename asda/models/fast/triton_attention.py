"""Differential attention in one kernel each way: two softmaxes and one product with v, without maps in memory.

All keys of a sequence must fit one tile. A program of the forward takes some queries of one head and all keys, so each
softmax is complete at once. A program of the backward takes one head and loops over its queries; it computes the maps
again from queries and keys. Only the inputs are kept between the two. Softmax, differences and sums are in fp32;
operands of products have the dtype of the inputs. Tested in Triton's interpreter on a CPU (TRITON_INTERPRET=1 before
the import); not yet run on a GPU.

Shapes: as in attention.py. In the kernels: L queries of a step, N keys (padded to a power of two), E features (padded).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.knobs import runtime

QUERIES_A_STEP = 32  # of one program: two 32 x 128 matrices of fp32 are 64 registers a thread of 4 warps
SMALLEST_TILE = 16  # of a product in Triton
NUM_WARPS = 4
INTERPRETED = tl.constexpr(runtime.interpret)  # the interpreter has no product of bf16: same values, in fp32


@triton.jit
def _dot(a, b):
    """Multiply two matrices, summing in fp32; fp32 operands are not rounded to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(pointer, row, row_stride, num_rows, column, num_columns):
    """Load a tile of a matrix whose rows are dense, with zeros outside of the matrix."""
    inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, row, row_stride, num_rows, column, num_columns):
    inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(pointer + row[:, None] * row_stride + column[None, :], value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _map(q_LE, k_NE, shown_N, scale):
    """Compute softmax(q k^T * scale) over the shown keys, [L, N] in fp32."""
    logits_LN = _dot(q_LE, tl.trans(k_NE)) * scale
    logits_LN = tl.where(shown_N[None, :], logits_LN, float("-inf"))
    raised_LN = tl.exp(logits_LN - tl.max(logits_LN, axis=1)[:, None])
    return raised_LN / tl.sum(raised_LN, axis=1)[:, None]


@triton.jit
def _logit_gradient(map_LN, d_map_LN, scale):
    """Compute the gradient of _map's logits, times scale, [L, N] in fp32."""
    mean_L = tl.sum(map_LN * d_map_LN, axis=1)
    return map_LN * (d_map_LN - mean_L[:, None]) * scale


@triton.jit
def _shown(present_pointer, sequence, key_N, num_tokens, padded: tl.constexpr):
    """Tell which keys exist and are present, [N]."""
    shown_N = key_N < num_tokens
    if padded:
        shown_N = shown_N & (tl.load(present_pointer + sequence * num_tokens + key_N, mask=shown_N, other=0) != 0)
    return shown_N


@triton.jit
def _forward(
    q, k, v, lam, present, out,
    q_sequence, q_head, q_token, k_sequence, k_head, k_token, v_sequence, v_head, v_token,
    out_sequence, out_head, out_token,
    num_heads, num_tokens, num_features, scale,
    maps: tl.constexpr, padded: tl.constexpr, L: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Compute out = (P1 - lam P2) v for L queries of one head of one sequence."""
    sequence, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    query_L = tl.program_id(1) * L + tl.arange(0, L)
    key_N, feature_E = tl.arange(0, N), tl.arange(0, E)
    shown_N = _shown(present, sequence, key_N, num_tokens, padded)
    q += sequence * q_sequence + head * q_head
    k += sequence * k_sequence + head * k_head

    q_LE = _load(q, query_L, q_token, num_tokens, feature_E, num_features)
    k_NE = _load(k, key_N, k_token, num_tokens, feature_E, num_features)
    weights_LN = _map(q_LE, k_NE, shown_N, scale)
    if maps == 2:
        q_LE = _load(q + num_heads * q_head, query_L, q_token, num_tokens, feature_E, num_features)
        k_NE = _load(k + num_heads * k_head, key_N, k_token, num_tokens, feature_E, num_features)
        weights_LN -= tl.load(lam) * _map(q_LE, k_NE, shown_N, scale)

    v_NE = _load(v + sequence * v_sequence + head * v_head, key_N, v_token, num_tokens, feature_E, num_features)
    out_LE = _dot(weights_LN.to(v_NE.dtype), v_NE)
    out += sequence * out_sequence + head * out_head
    _store(out, out_LE, query_L, out_token, num_tokens, feature_E, num_features)


@triton.jit
def _backward(
    q, k, v, lam, present, d_out, dq, dk, dv, d_lam,
    q_sequence, q_head, q_token, k_sequence, k_head, k_token, v_sequence, v_head, v_token,
    d_out_sequence, d_out_head, d_out_token,
    dq_sequence, dq_head, dq_token, dk_sequence, dk_head, dk_token, dv_sequence, dv_head, dv_token,
    num_heads, num_tokens, num_features, scale,
    maps: tl.constexpr, padded: tl.constexpr, L: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one head of one sequence: dq for L queries at a time, sums over them for the others."""
    sequence, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    key_N, feature_E = tl.arange(0, N), tl.arange(0, E)
    shown_N = _shown(present, sequence, key_N, num_tokens, padded)
    q += sequence * q_sequence + head * q_head
    k += sequence * k_sequence + head * k_head
    dq += sequence * dq_sequence + head * dq_head
    dk += sequence * dk_sequence + head * dk_head
    d_out += sequence * d_out_sequence + head * d_out_head

    k1_NE = _load(k, key_N, k_token, num_tokens, feature_E, num_features)
    v_NE = _load(v + sequence * v_sequence + head * v_head, key_N, v_token, num_tokens, feature_E, num_features)
    dk1_NE = tl.zeros((N, E), tl.float32)
    dv_NE = tl.zeros((N, E), tl.float32)
    if maps == 2:
        weight = tl.load(lam)
        k2_NE = _load(k + num_heads * k_head, key_N, k_token, num_tokens, feature_E, num_features)
        dk2_NE = tl.zeros((N, E), tl.float32)
        d_lam_sum = 0.0

    for first_query in range(0, N, L):
        query_L = first_query + tl.arange(0, L)
        d_out_LE = _load(d_out, query_L, d_out_token, num_tokens, feature_E, num_features)
        d_weights_LN = _dot(d_out_LE, tl.trans(v_NE))

        q1_LE = _load(q, query_L, q_token, num_tokens, feature_E, num_features)
        map1_LN = _map(q1_LE, k1_NE, shown_N, scale)
        d_logits_LN = _logit_gradient(map1_LN, d_weights_LN, scale).to(q1_LE.dtype)
        dq_LE = _dot(d_logits_LN, k1_NE)
        _store(dq, dq_LE, query_L, dq_token, num_tokens, feature_E, num_features)
        dk1_NE += _dot(tl.trans(d_logits_LN), q1_LE)
        weights_LN = map1_LN
        if maps == 2:
            q2_LE = _load(q + num_heads * q_head, query_L, q_token, num_tokens, feature_E, num_features)
            map2_LN = _map(q2_LE, k2_NE, shown_N, scale)
            d_lam_sum -= tl.sum(map2_LN * d_weights_LN)  # rows past the last token have no d_out, hence add nothing
            d_logits_LN = _logit_gradient(map2_LN, -weight * d_weights_LN, scale).to(q2_LE.dtype)
            dq_LE = _dot(d_logits_LN, k2_NE)
            _store(dq + num_heads * dq_head, dq_LE, query_L, dq_token, num_tokens, feature_E, num_features)
            dk2_NE += _dot(tl.trans(d_logits_LN), q2_LE)
            weights_LN -= weight * map2_LN
        dv_NE += _dot(tl.trans(weights_LN).to(d_out_LE.dtype), d_out_LE)

    _store(dk, dk1_NE, key_N, dk_token, num_tokens, feature_E, num_features)
    dv += sequence * dv_sequence + head * dv_head
    _store(dv, dv_NE, key_N, dv_token, num_tokens, feature_E, num_features)
    if maps == 2:
        _store(dk + num_heads * dk_head, dk2_NE, key_N, dk_token, num_tokens, feature_E, num_features)
        tl.store(d_lam + tl.program_id(0), d_lam_sum)


class TritonAttention(torch.autograd.Function):
    """attention.attend by the kernels above, for at most 128 tokens and 128 features a head, in fp32 or bf16."""

    @staticmethod
    def forward(ctx: Any, qk_2BGNE: Tensor, v_BHNE: Tensor, lam: float | Tensor, present_BN: Tensor | None):
        """Compute attention, [B, H, N, E]."""
        qk_2BGNE, v_BHNE = _with_dense_features(qk_2BGNE), _with_dense_features(v_BHNE)
        lam_1 = torch.as_tensor(lam, dtype=torch.float32, device=v_BHNE.device).reshape(1)  # stays on the device
        present_BN = None if present_BN is None else present_BN.to(torch.int8).contiguous()
        mixed_BHNE = torch.empty_like(v_BHNE)  # in the layout of v, so that joining the heads copies nothing
        q_BGNE, k_BGNE = qk_2BGNE
        sizes = _sizes(qk_2BGNE, v_BHNE, present_BN)
        num_heads, tokens = v_BHNE.shape[0] * v_BHNE.shape[1], v_BHNE.shape[2]  # of all sequences
        _forward[num_heads, -(-tokens // sizes["L"])](
            *(q_BGNE, k_BGNE, v_BHNE, lam_1, v_BHNE if present_BN is None else present_BN, mixed_BHNE),
            *_strides(q_BGNE, k_BGNE, v_BHNE, mixed_BHNE),
            **sizes,
        )
        ctx.save_for_backward(qk_2BGNE, v_BHNE, lam_1, present_BN)
        ctx.lam_dtype = lam.dtype if isinstance(lam, Tensor) else None
        return mixed_BHNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed_BHNE: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute the gradients of qk_2BGNE, v_BHNE and, if it is a tensor, lam."""
        qk_2BGNE, v_BHNE, lam_1, present_BN = ctx.saved_tensors
        d_mixed_BHNE = _with_dense_features(d_mixed_BHNE)
        dqk_2BGNE, dv_BHNE = torch.empty_like(qk_2BGNE), torch.empty_like(v_BHNE)
        d_lam_of_heads = v_BHNE.new_zeros(v_BHNE.shape[0] * v_BHNE.shape[1], dtype=torch.float32)
        (q_BGNE, k_BGNE), (dq_BGNE, dk_BGNE) = qk_2BGNE, dqk_2BGNE
        _backward[d_lam_of_heads.shape](
            *(q_BGNE, k_BGNE, v_BHNE, lam_1, v_BHNE if present_BN is None else present_BN),
            *(d_mixed_BHNE, dq_BGNE, dk_BGNE, dv_BHNE, d_lam_of_heads),
            *_strides(q_BGNE, k_BGNE, v_BHNE, d_mixed_BHNE, dq_BGNE, dk_BGNE, dv_BHNE),
            **_sizes(qk_2BGNE, v_BHNE, present_BN),
        )
        d_lam = d_lam_of_heads.sum().to(ctx.lam_dtype) if ctx.needs_input_grad[2] else None
        return dqk_2BGNE, dv_BHNE, d_lam, None


def _sizes(qk_2BGNE: Tensor, v_BHNE: Tensor, present_BN: Tensor | None) -> dict[str, Any]:
    _, heads, tokens, features = v_BHNE.shape
    sizes = {"num_heads": heads, "num_tokens": tokens, "num_features": features, "scale": features**-0.5}
    tiles = {"L": min(QUERIES_A_STEP, _padded(tokens)), "N": _padded(tokens), "E": _padded(features)}
    kind = {"maps": qk_2BGNE.shape[2] // heads, "padded": present_BN is not None}
    return sizes | tiles | kind | {"num_warps": NUM_WARPS}


def _padded(size: int) -> int:
    return max(SMALLEST_TILE, 1 << (size - 1).bit_length())


def _strides(*tensors_BHNE: Tensor) -> list[Any]:
    return [stride for x_BHNE in tensors_BHNE for stride in x_BHNE.stride()[:3]]


def _with_dense_features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
