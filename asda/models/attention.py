"""Differential attention: one softmax map minus lambda times another (ASDA, Interspeech 2025).

The definition stands first, then two faster ways to compute it (torch's fused attention, a Triton kernel), then the
module for the encoder's blocks.

Shapes: B sequences, N tokens, D width, H heads, E = D / H features of a head. G = H times the number of maps: the heads
of the first map, then those of the second. A leading 2: queries, then keys.
"""

import math
import os
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from asda.config.model import ModelConfig
from asda.errors import UserError

NORM_EPS = 1e-5  # of the norm after the difference; the encoder's other norms have 1e-6
LAMBDA_STD = 0.1  # of the vectors of a learned lambda (Differential Transformer, section 2.1)
TRITON_TILE = 128  # most tokens, and most features of a head, that the Triton kernel takes
LONGEST_EXPLICIT = 128  # most tokens that auto trains with explicit maps on a CPU; see choose_path

AttentionPath = Literal["auto", "explicit", "sdpa", "triton"]
Lambda = float | Tensor  # the weight of the second map; a 0-dim tensor if it is learned


def attention_map(q_BHNE: Tensor, k_BHNE: Tensor, present_BN: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(E)) over the keys that are present, [B, H, N, N]."""
    scaled_q_BHNE = q_BHNE * q_BHNE.shape[-1] ** -0.5  # cheaper before the product: E numbers a query, not N
    logits_BHNN = scaled_q_BHNE @ k_BHNE.transpose(-2, -1)
    if present_BN is not None:
        logits_BHNN = logits_BHNN.masked_fill(~present_BN[:, None, None], -math.inf)
    return logits_BHNN.softmax(dim=-1)


def differential_attention(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Lambda, present_BN: Tensor | None = None
) -> Tensor:
    """Compute (softmax(q1 k1^T / sqrt(E)) - lam softmax(q2 k2^T / sqrt(E))) v; all are [B, H, N, E]."""
    return (attention_map(q1, k1, present_BN) - lam * attention_map(q2, k2, present_BN)) @ v


def by_definition(qk_2BGNE: Tensor, v_BHNE: Tensor, lam: Lambda, present_BN: Tensor | None = None) -> Tensor:
    """Compute what attend does, by the two functions above."""
    if qk_2BGNE.shape[2] == v_BHNE.shape[1]:
        return attention_map(*qk_2BGNE, present_BN=present_BN) @ v_BHNE
    (q1, k1), (q2, k2) = qk_2BGNE.chunk(2, dim=2)
    return differential_attention(q1, k1, q2, k2, v_BHNE, lam, present_BN)


def attend(
    qk_2BGNE: Tensor, v_BHNE: Tensor, lam: Lambda, present_BN: Tensor | None = None, path: AttentionPath = "auto"
) -> Tensor:
    """Compute ordinary attention if G = H and differential attention if G = 2 H, [B, H, N, E].

    Args:
        qk_2BGNE: queries and keys of all maps, in any layout whose last dimension is dense.
        v_BHNE: values, of the same dtype.
        lam: weight of the second map; a gradient flows to it if it is a tensor.
        present_BN: False at padding, which no token attends to; None if there is no padding.
        path: how to compute it, see choose_path.
    """
    needs_gradient = torch.is_grad_enabled() and (qk_2BGNE.requires_grad or v_BHNE.requires_grad)
    taken = choose_path(path, v_BHNE.device.type, v_BHNE.shape[2], v_BHNE.shape[3], needs_gradient)
    if taken == "sdpa":
        return _by_sdpa(qk_2BGNE, v_BHNE, lam, present_BN)
    if taken == "triton":
        from asda.models.fast.triton_attention import TritonAttention  # not every machine has Triton

        return TritonAttention.apply(qk_2BGNE, v_BHNE, lam, present_BN)  # pyright: ignore[reportReturnType]
    return by_definition(qk_2BGNE, v_BHNE, lam, present_BN)


def _by_sdpa(qk_2BGNE: Tensor, v_BHNE: Tensor, lam: Lambda, present_BN: Tensor | None) -> Tensor:
    mask_B11N = None if present_BN is None else present_BN[:, None, None]
    # One call a map, with the same v: one call for both would need a doubled copy of v.
    first, *second = (
        scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, mask_B11N)
        for q_BHNE, k_BHNE in qk_2BGNE.split(v_BHNE.shape[1], dim=2)
    )
    if not second:
        return first
    return first - lam * second[0] if isinstance(lam, Tensor) else torch.sub(first, second[0], alpha=lam)


def choose_path(
    path: AttentionPath, device_type: str, tokens: int, features: int, needs_gradient: bool
) -> AttentionPath:
    """Choose how to compute attention for sequences of so many tokens and heads of so many features.

    `auto` takes torch's fused attention (sdpa). On a CPU, training of short sequences takes the definition (explicit)
    instead, because the backward of sdpa is slow in bf16 with AMX. There the definition takes 0.38 of sdpa's time for
    103 tokens and 1.08 for 513, 1.4 to 1.7 in fp32, up to 2.9 without a backward (12 heads of 64 features; measure your
    machine by `python tools/bench/bench.py attention`).

    `triton` must be asked for: its kernels have run in Triton's interpreter only, and their speed is unknown. Sequences
    longer than its tile take sdpa instead.

    Raises:
        UserError: if Triton is asked for and cannot run.
    """
    if path == "triton":
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"engine.attention triton needs a CUDA device and this run has a {device_type}; use auto, or set "
                "TRITON_INTERPRET=1 to try it slowly"
            )
        return "triton" if max(tokens, features) <= TRITON_TILE else "sdpa"
    if path != "auto":
        return path
    return "explicit" if device_type == "cpu" and needs_gradient and tokens <= LONGEST_EXPLICIT else "sdpa"


def describe_paths(path: AttentionPath, device_type: str, features: int, sequences: dict[str, tuple[int, bool]]) -> str:
    """Describe in one line the paths of sequences, given as name -> (tokens, whether gradients are needed)."""
    taken = [
        f"{choose_path(path, device_type, tokens, features, needs_gradient)} for {name} of {tokens} tokens"
        for name, (tokens, needs_gradient) in sequences.items()
    ]
    return f"{path}: {', '.join(taken)}"


def set_attention_path(module: nn.Module, path: AttentionPath) -> None:
    """Make every attention inside `module` compute by `path`."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.path = path


class Attention(nn.Module):
    """The attention of block number `block`, from 0: differential, or ordinary if lambda is absent.

    Every map has queries and keys of its own; all maps share the values. The result is normalised, over all heads
    together or head by head, then scaled and projected. Learned lambdas and their scale depend on the block.
    """

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        width, features = config.width, config.width // config.heads
        num_maps = 1 if config.attention_lambda == "absent" else 2
        self.heads = config.heads
        self.path: AttentionPath = "auto"
        self.qk = nn.Linear(width, 2 * num_maps * width)  # rows: q1, q2, k1, k2; or q, k
        self.v = nn.Linear(width, width)
        if config.attention_lambda == "learned":
            self.lam = LearnedLambda(features, block)
        else:
            self.lam = 0.0 if config.attention_lambda == "absent" else config.attention_lambda
        norms = {"joint": nn.LayerNorm(width, eps=NORM_EPS), "per_head": PerHeadNorm(features), "none": nn.Identity()}
        self.norm = norms[config.attention_norm]
        self.scale = 1 - initial_lambda(block) if config.attention_scale == "by_depth" else config.attention_scale
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """Mix the tokens of each sequence, [B, N, D] -> [B, N, D]; present_BN is False at padding."""
        qk_2BGNE = self._queries_and_keys(tokens_BND)
        v_BHNE = self.v(tokens_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed_BHNE = attend(qk_2BGNE, v_BHNE, self.current_lambda(), present_BN, self.path)
        return self.proj(self.norm(mixed_BHNE.transpose(1, 2).flatten(2)) * self.scale)

    def current_lambda(self) -> Lambda:
        """Return the weight of the second map."""
        return self.lam() if isinstance(self.lam, nn.Module) else self.lam

    def maps(self, tokens_BND: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps before their difference, for pictures: each [B, H, N, N], with rows that sum to 1."""
        return attention_map(*self._queries_and_keys(tokens_BND)).split(self.heads, dim=1)

    def _queries_and_keys(self, tokens_BND: Tensor) -> Tensor:
        features = tokens_BND.shape[-1] // self.heads
        return self.qk(tokens_BND).unflatten(-1, (2, -1, features)).permute(2, 0, 3, 1, 4)  # [2, B, G, N, E]


class PerHeadNorm(nn.Module):
    """An RMSNorm over the features of each head, with shared weights (Differential Transformer, eq. 3)."""

    def __init__(self, features: int):
        super().__init__()
        self.norm = nn.RMSNorm(features, eps=NORM_EPS)

    def forward(self, mixed_BND: Tensor) -> Tensor:
        """Normalise each head, [B, N, D] -> [B, N, D]."""
        return self.norm(mixed_BND.unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


class LearnedLambda(nn.Module):
    """exp(q1 . k1) - exp(q2 . k2) + an initial value that grows with depth (Differential Transformer, eq. 2)."""

    def __init__(self, features: int, block: int):
        super().__init__()
        vectors = (torch.empty(features).normal_(std=LAMBDA_STD) for _ in range(4))
        self.q1, self.k1, self.q2, self.k2 = map(nn.Parameter, vectors)
        self.initial = initial_lambda(block)

    def forward(self) -> Tensor:
        """Return the weight of the second map, an fp32 scalar."""
        first, second = ((q.float() * k.float()).sum().exp() for q, k in ((self.q1, self.k1), (self.q2, self.k2)))
        return first - second + self.initial


def initial_lambda(block: int) -> float:
    """Return 0.2 for the first block, towards 0.8 for deep ones (Differential Transformer, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)
