"""Differential attention: one softmax map minus lambda times another (ASDA, Interspeech 2025).

Shapes: B sequences, N tokens, D width, H heads, E = D / H features per head.
"""

from torch import Tensor, nn

from asda.config import ModelConfig

NORM_EPS = 1e-5  # of the norm over the concatenated heads; the other norms of the encoder have 1e-6


def attention_map(q_BHNE: Tensor, k_BHNE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)): what every token takes from every other, [B, H, N, N]."""
    scaled_q_BHNE = q_BHNE * q_BHNE.shape[-1] ** -0.5  # before the product: there it is E wide, afterwards N wide
    return (scaled_q_BHNE @ k_BHNE.transpose(-2, -1)).softmax(dim=-1)


def differential_attention(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: float) -> Tensor:
    """(softmax(q1 k1^T / sqrt(E)) - lam softmax(q2 k2^T / sqrt(E))) v, all of shape [B, H, N, E]."""
    return (attention_map(q1, k1) - lam * attention_map(q2, k2)) @ v


class DifferentialAttention(nn.Module):
    """The attention of an encoder block.

    Queries and keys are twofold and the values single; the heads are normalised together, not one by one, and
    scaled, before the projection.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.lam = config.attention_lambda
        self.scale = config.attention_scale
        self.qk = nn.Linear(config.width, 4 * config.width)  # rows: q1, q2, k1, k2
        self.v = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Mix the tokens of each sequence: [B, N, D] -> [B, N, D]."""
        q1, q2, k1, k2 = self._queries_and_keys(tokens_BND)
        v_BHNE = self._split_heads(self.v(tokens_BND))
        mixed_BHNE = differential_attention(q1, k1, q2, k2, v_BHNE, self.lam)
        mixed_BND = mixed_BHNE.transpose(1, 2).flatten(2)
        return self.proj(self.norm(mixed_BND) * self.scale)

    def maps(self, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps before their difference, each [B, H, N, N] with rows that sum to 1: for pictures."""
        q1, q2, k1, k2 = self._queries_and_keys(tokens_BND)
        return attention_map(q1, k1), attention_map(q2, k2)

    def _queries_and_keys(self, tokens_BND: Tensor) -> list[Tensor]:
        return [self._split_heads(part_BND) for part_BND in self.qk(tokens_BND).chunk(4, dim=-1)]

    def _split_heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, E]
