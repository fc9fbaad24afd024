"""Differential attention: one softmax map minus lambda times another (ASDA, Interspeech 2025).

Shapes: B sequences, N tokens, D width, H heads, E = D / H features per head, G = H times the number of maps: the heads
of the first map, then those of the second.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from asda.config import ModelConfig

NORM_EPS = 1e-5  # of the norm after the difference; the other norms of the encoder have 1e-6
LAMBDA_STD = 0.1  # of the vectors that make a learned lambda (Differential Transformer, section 2.1)

Path = Literal["auto", "explicit", "sdpa", "triton"]
Lambda = float | Tensor  # the weight of the second map; a 0-dim tensor where it is learned


def attention_map(q_BHNE: Tensor, k_BHNE: Tensor, present_BN: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)): what every token takes from every other that is present, [B, H, N, N]."""
    scaled_q_BHNE = q_BHNE * q_BHNE.shape[-1] ** -0.5  # before the product: there it is E wide, afterwards N wide
    logits_BHNN = scaled_q_BHNE @ k_BHNE.transpose(-2, -1)
    if present_BN is not None:
        logits_BHNN = logits_BHNN.masked_fill(~present_BN[:, None, None], -math.inf)
    return logits_BHNN.softmax(dim=-1)


def differential_attention(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Lambda, present_BN: Tensor | None = None
) -> Tensor:
    """(softmax(q1 k1^T / sqrt(E)) - lam softmax(q2 k2^T / sqrt(E))) v, all of shape [B, H, N, E]."""
    return (attention_map(q1, k1, present_BN) - lam * attention_map(q2, k2, present_BN)) @ v


def attend(
    q_BGNE: Tensor, k_BGNE: Tensor, v_BHNE: Tensor, lam: Lambda, present_BN: Tensor | None, path: Path
) -> Tensor:
    """Ordinary attention when G = H, differential attention when G = 2 H; [B, H, N, E]."""
    if path == "sdpa":
        return _by_sdpa(q_BGNE, k_BGNE, v_BHNE, lam, present_BN)
    if q_BGNE.shape[1] == v_BHNE.shape[1]:
        return attention_map(q_BGNE, k_BGNE, present_BN) @ v_BHNE
    (q1, q2), (k1, k2) = q_BGNE.chunk(2, dim=1), k_BGNE.chunk(2, dim=1)
    return differential_attention(q1, k1, q2, k2, v_BHNE, lam, present_BN)


def _by_sdpa(q_BGNE: Tensor, k_BGNE: Tensor, v_BHNE: Tensor, lam: Lambda, present_BN: Tensor | None) -> Tensor:
    mask_B11N = None if present_BN is None else present_BN[:, None, None]
    num_maps = q_BGNE.shape[1] // v_BHNE.shape[1]
    v_BGNE = v_BHNE.repeat(1, num_maps, 1, 1)
    first, *second = scaled_dot_product_attention(q_BGNE, k_BGNE, v_BGNE, mask_B11N).chunk(num_maps, dim=1)
    return first - lam * second[0] if second else first


class Attention(nn.Module):
    """The attention of an encoder block: differential, or ordinary where lambda is absent.

    Queries and keys are as many as the maps and the values single. What the maps gather is normalised (over all heads
    together, or head by head) and scaled, before the projection.

    Args:
        config: width, heads and kind.
        block: the block's number, 0 for the first; learned lambdas and their scale depend on it.
    """

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        width, features = config.width, config.width // config.heads
        num_maps = 1 if config.attention_lambda == "absent" else 2
        self.heads = config.heads
        self.path: Path = "auto"
        self.qk = nn.Linear(width, 2 * num_maps * width)  # rows: q1, q2, k1, k2; or q, k
        self.v = nn.Linear(width, width)
        self.lam = _make_lambda(config, block)
        self.norm = {
            "joint": lambda: nn.LayerNorm(width, eps=NORM_EPS),
            "per_head": lambda: PerHeadNorm(features),
            "none": nn.Identity,
        }[config.attention_norm]()
        self.scale = 1 - initial_lambda(block) if config.attention_scale == "by_depth" else config.attention_scale
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """Mix the tokens of each sequence, [B, N, D] -> [B, N, D]; of tokens that are not present nothing is taken."""
        q_BGNE, k_BGNE = self._queries_and_keys(tokens_BND)
        v_BHNE = self._split_heads(self.v(tokens_BND), self.heads)
        mixed_BHNE = attend(q_BGNE, k_BGNE, v_BHNE, self.current_lambda(), present_BN, self.path)
        mixed_BND = mixed_BHNE.transpose(1, 2).flatten(2)
        return self.proj(self.norm(mixed_BND) * self.scale)

    def current_lambda(self) -> Lambda:
        """The weight of the second map."""
        return self.lam() if isinstance(self.lam, nn.Module) else self.lam

    def maps(self, tokens_BND: Tensor) -> tuple[Tensor, ...]:
        """The maps before their difference, each [B, H, N, N] with rows that sum to 1: for pictures."""
        q_BGNE, k_BGNE = self._queries_and_keys(tokens_BND)
        return attention_map(q_BGNE, k_BGNE).split(self.heads, dim=1)

    def _queries_and_keys(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        q_BNC, k_BNC = self.qk(tokens_BND).chunk(2, dim=-1)
        num_heads = q_BNC.shape[-1] * self.heads // tokens_BND.shape[-1]  # G
        return self._split_heads(q_BNC, num_heads), self._split_heads(k_BNC, num_heads)

    def _split_heads(self, x_BNC: Tensor, num_heads: int) -> Tensor:
        return x_BNC.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, N, E]


class PerHeadNorm(nn.Module):
    """An RMSNorm over the features of each head, with weights that the heads share (Differential Transformer)."""

    def __init__(self, features: int):
        super().__init__()
        self.norm = nn.RMSNorm(features, eps=NORM_EPS)

    def forward(self, mixed_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.norm(mixed_BND.unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


class LearnedLambda(nn.Module):
    """exp(q1 . k1) - exp(q2 . k2) + an initial value that grows with depth (Differential Transformer, eq. 2 and 3)."""

    def __init__(self, features: int, block: int):
        super().__init__()
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(torch.empty(features)) for _ in range(4))
        self.initial = initial_lambda(block)
        for vector in self.parameters():
            nn.init.normal_(vector, std=LAMBDA_STD)

    def forward(self) -> Tensor:
        """The weight of the second map, an fp32 scalar."""
        first, second = ((q.float() * k.float()).sum().exp() for q, k in ((self.q1, self.k1), (self.q2, self.k2)))
        return first - second + self.initial


def initial_lambda(block: int) -> float:
    """0.2 in the first block, towards 0.8 in deep ones."""
    return 0.8 - 0.6 * math.exp(-0.3 * block)


def _make_lambda(config: ModelConfig, block: int) -> "float | LearnedLambda":
    if config.attention_lambda == "learned":
        return LearnedLambda(config.width // config.heads, block)
    return 0.0 if config.attention_lambda == "absent" else config.attention_lambda


def set_attention_path(module: nn.Module, path: Path) -> None:
    """Make every attention inside `module` compute by `path`."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.path = path
