"""HAM-AST: Conformer blocks and channel attention on AST's tokens (Liu, Zhang and Makino, NCSP 2025).

The Conformer is that of Gulati et al. (arXiv 2005.08100) with the relative attention of Transformer-XL (Dai et al.,
2019). Channel attention pools as CBAM does (Woo et al., 2018). What the HAM-AST paper leaves open is configured;
docs/ham_ast.md gives the reasons for the defaults.

Shapes: B clips, T time patches, F mel patches, S = 2 + F * T tokens: CLS, DIST, then the patches mel band by mel band;
D width, H heads, E = D / H, L distances between two tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import glu, pad, scaled_dot_product_attention, silu

from asda.config.model import AstConfig, ChannelAttentionConfig, ConformerConfig
from asda.models.ast import NUM_SPECIAL
from asda.models.encoder import INIT_STD, init_linear, run_block, sinusoids

NORM_EPS = 1e-5  # of the Conformer's norms: torch's own


class Ham(nn.Sequential):
    """Conformer blocks and channel attention, each if the configuration asks for it: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: AstConfig):
        super().__init__()
        if config.conformer.blocks:
            self.conformer = Conformer(config)
        if config.channel_attention.enabled:
            self.channels = ChannelAttention(config.width, config.channel_attention)


class Conformer(nn.Module):
    """The blocks, and the distances between tokens that all of them use; these are computed, hence in no checkpoint."""

    table_LD: Tensor  # sines and cosines of every distance that occurs
    number_SS: Tensor  # int64, row of the table for each query and key

    def __init__(self, config: AstConfig):
        super().__init__()
        self.recompute = False  # as in the encoder
        self.blocks = nn.ModuleList([ConformerBlock(config) for _ in range(config.conformer.blocks)])
        num_time, num_mel = config.grid
        if config.conformer.axis == "time":  # CLS and DIST have no place in time and are at distance 0 of all
            farthest = num_time - 1
            place_N = torch.arange(num_time).repeat(num_mel)
            distance_SS = pad(place_N[:, None] - place_N, (NUM_SPECIAL, 0, NUM_SPECIAL, 0))
        else:
            farthest = NUM_SPECIAL + num_time * num_mel - 1
            place_S = torch.arange(farthest + 1)
            distance_SS = place_S[:, None] - place_S
        table_LD = sinusoids(torch.arange(-farthest, farthest + 1), config.width)
        self.register_buffer("table_LD", table_LD, persistent=False)
        self.register_buffer("number_SS", distance_SS + farthest, persistent=False)
        self.apply(init_linear)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Pass the tokens through all blocks, [B, S, D] -> [B, S, D]."""
        table_LD = self.table_LD.to(tokens_BSD.dtype)
        for block in self.blocks:
            tokens_BSD = run_block(block, self.recompute, tokens_BSD, table_LD, self.number_SS)
        return tokens_BSD


class ConformerBlock(nn.Module):
    """Half a feed-forward module, attention, convolution, the other half, a norm (arXiv 2005.08100, eq. 1)."""

    def __init__(self, config: AstConfig):
        super().__init__()
        width, settings = config.width, config.conformer
        hidden = int(width * settings.mlp_ratio)
        self.first = FeedForward(width, hidden, settings.dropout)
        self.attention = RelativeAttention(width, settings.heads or config.heads, settings.dropout)
        self.convolution = Convolution(width, config.grid, settings)
        self.second = FeedForward(width, hidden, settings.dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens_BSD: Tensor, table_LD: Tensor, number_SS: Tensor) -> Tensor:
        """Apply equation 1, [B, S, D] -> [B, S, D]."""
        tokens_BSD = tokens_BSD + 0.5 * self.first(tokens_BSD)
        tokens_BSD = tokens_BSD + self.attention(tokens_BSD, table_LD, number_SS)
        tokens_BSD = tokens_BSD + self.convolution(tokens_BSD)
        tokens_BSD = tokens_BSD + 0.5 * self.second(tokens_BSD)
        return self.norm(tokens_BSD)


class FeedForward(nn.Sequential):
    """Norm, then two linear layers around a swish, with dropout after each: [B, S, D] -> [B, S, D]."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.swish, self.inner_dropout = nn.SiLU(), nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)


class RelativeAttention(nn.Module):
    """Norm, then attention with logits ((q + u) k^T + (q + v) (W r)^T) / sqrt(E) (Transformer-XL, section 3.3)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.distance = nn.Linear(width, width, bias=False)  # W: from sines and cosines to keys
        self.u = nn.Parameter(torch.empty(heads, 1, width // heads))
        self.v = nn.Parameter(torch.empty(heads, 1, width // heads))
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        for bias in (self.u, self.v):
            nn.init.normal_(bias, std=INIT_STD)

    def forward(self, tokens_BSD: Tensor, table_LD: Tensor, number_SS: Tensor) -> Tensor:
        """Mix the tokens by content and distance, [B, S, D] -> [B, S, D]."""
        q_BHSE, k_BHSE, v_BHSE = self._by_head(self.qkv(self.norm(tokens_BSD)), 3)
        (r_1HLE,) = self._by_head(self.distance(table_LD)[None], 1)
        by_distance_BHSL = (q_BHSE + self.v) @ r_1HLE.transpose(-2, -1)
        number_BHSS = number_SS.expand(*by_distance_BHSL.shape[:2], -1, -1)
        bias_BHSS = by_distance_BHSL.gather(-1, number_BHSS) * q_BHSE.shape[-1] ** -0.5
        mixed_BHSE = scaled_dot_product_attention(q_BHSE + self.u, k_BHSE, v_BHSE, bias_BHSS)
        return self.dropout(self.proj(mixed_BHSE.transpose(1, 2).flatten(2)))

    def _by_head(self, joined_BNC: Tensor, parts: int) -> Tensor:
        """Separate parts and heads, [B, N, parts * D] -> [parts, B, H, N, E]."""
        return joined_BNC.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Convolution(nn.Module):
    """Norm, gated linear unit, depthwise convolution, norm, swish, linear layer (arXiv 2005.08100, figure 2).

    The norm in the middle is of each token ("layer") or clip ("group"), not a BatchNorm, because its running moments
    depend on how a batch is cut into ranks and micro-batches, and our checkpoints hold no buffers.
    """

    def __init__(self, width: int, grid: tuple[int, int], config: ConformerConfig):
        super().__init__()
        self.num_time_patches, self.axis = grid[0], config.axis
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.gate = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, config.kernel, padding=config.kernel // 2, groups=width)
        per_token = config.norm == "layer"
        self.middle = nn.LayerNorm(width, eps=NORM_EPS) if per_token else ClipNorm(1, width, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Mix neighbouring tokens, [B, S, D] -> [B, S, D]."""
        gated_BSD = glu(self.gate(self.norm(tokens_BSD)), dim=-1)
        if self.axis == "sequence":
            mixed_BSD = self._along(gated_BSD, gated_BSD.shape[1])
        else:  # each mel band by itself, and CLS and DIST as sequences of one token
            special_BKD, patches_BND = gated_BSD.tensor_split([NUM_SPECIAL], dim=1)
            mixed = [self._along(special_BKD, 1), self._along(patches_BND, self.num_time_patches)]
            mixed_BSD = torch.cat(mixed, dim=1)
        return self.dropout(self.proj(silu(self.middle(mixed_BSD))))

    def _along(self, tokens_BSD: Tensor, length: int) -> Tensor:
        """Convolve sequences of `length` tokens, each padded with zeros, [B, S, D] -> [B, S, D]."""
        sequences_RLD = tokens_BSD.unflatten(1, (-1, length)).flatten(0, 1)
        return self.depthwise(sequences_RLD.transpose(1, 2)).transpose(1, 2).reshape(tokens_BSD.shape)


class ClipNorm(nn.GroupNorm):
    """A norm over all tokens and features of a clip, with a weight and a bias for each feature."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each clip, [B, S, D] -> [B, S, D]."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class ChannelAttention(nn.Module):
    """Multiplies each feature by a weight computed from the features' maxima and means over a clip's tokens."""

    def __init__(self, width: int, config: ChannelAttentionConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(2 * width if config.combine == "concat" else width, width // config.reduction)
        self.fc2 = nn.Linear(width // config.reduction, width)
        self.apply(init_linear)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Weigh the features, [B, S, D] -> [B, S, D]."""
        return tokens_BSD * self.weights(tokens_BSD)[:, None]

    def weights(self, tokens_BSD: Tensor) -> Tensor:
        """Compute the weights of the features, [B, D]: in (0, 1) with sigmoid, of mean 1 with softmax."""
        pooled_BND = tokens_BSD[:, NUM_SPECIAL:] if self.config.tokens == "patches" else tokens_BSD
        pooled = [pooled_BND.mean(1), pooled_BND.amax(1)]
        inputs = [torch.cat(pooled, dim=-1)] if self.config.combine == "concat" else pooled
        score_BD = torch.stack([self.fc2(self.fc1(input_BC).relu()) for input_BC in inputs]).sum(0)
        return score_BD.sigmoid() if self.config.normalize == "sigmoid" else score_BD.softmax(-1) * score_BD.shape[-1]
