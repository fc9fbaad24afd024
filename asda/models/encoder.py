"""The encoder of ASDA and EAT: patches become tokens, and tokens pass through post-norm blocks of attention.

Shapes: B sequences, T time patches, F mel patches, N patches of a sequence (T * F of a whole clip), P pixels of a
patch, D width. Tokens are 1 + N: CLS, then one a patch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from asda.config.model import ModelConfig
from asda.models.attention import Attention

NORM_EPS = 1e-6  # EAT and ASDA; the norm inside the attention has 1e-5
INIT_STD = 0.02  # of the weights of linear layers, as in BERT
MAX_WAVELENGTH = 10_000.0  # patches / (2 pi), of the slowest position feature ("Attention is all you need")


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Make the fixed position table of a grid, [rows * columns, width] in fp32, row after row.

    The first half of the features encodes the column (mel), the second half the row (time), by the same wavelengths
    (He et al., "Masked autoencoders", 2021).
    """
    row_N, column_N = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unbind(1)
    return torch.cat([sinusoids(column_N, width // 2), sinusoids(row_N, width // 2)], dim=1)


def sinusoids(position_N: Tensor, width: int) -> Tensor:
    """Compute sines, then cosines, of positions, [N, width] in fp32 ("Attention is all you need", section 3.5)."""
    num_waves = width // 2
    frequency_W = MAX_WAVELENGTH ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)
    phase_NW = position_N[:, None] * frequency_W
    return torch.cat([phase_NW.sin(), phase_NW.cos()], dim=1).float()


def init_linear(module: nn.Module) -> None:
    """Draw N(0, 0.02) weights and zero the biases of a linear layer; meant for nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Compute fc2(gelu(fc1(x))), [B, N, D] -> [B, N, D]."""
        return self.fc2(gelu(self.fc1(tokens_BND)))


class DropPath(nn.Module):
    """Drops a branch for a random share of the sequences in training, and scales up the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch_BND: Tensor) -> Tensor:
        """Drop whole sequences of a branch, [B, N, D] -> [B, N, D]."""
        if not self.training or self.rate == 0:
            return branch_BND
        keep = 1 - self.rate
        return branch_BND * (torch.empty_like(branch_BND[:, :1, :1]).bernoulli_(keep) / keep)


class Block(nn.Module):
    """Attention and MLP, each followed by its residual and then its norm (post-norm)."""

    def __init__(self, config: ModelConfig, number: int, drop_path: float):
        super().__init__()
        self.attn = Attention(config, number)
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_BND: Tensor, present_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the block's output, and its MLP's before the last residual, of which the targets are made."""
        tokens_BND = self.norm1(tokens_BND + self.drop_path(self.attn(tokens_BND, present_BN)))
        ffn_BND = self.mlp(tokens_BND)
        return self.norm2(tokens_BND + self.drop_path(ffn_BND)), ffn_BND


class Encoder(nn.Module):
    """Patches of log-mel in; CLS and one token a patch out. The rate drop_path is the last block's, 0 the first's."""

    num_special = 1  # tokens before those of the patches: CLS
    positions: Tensor  # [N, D] of the longest clip; fixed by the config, hence in no checkpoint

    def __init__(self, config: ModelConfig, drop_path: float = 0.0):
        super().__init__()
        self.recompute = False  # keep only the input of each block for the backward, and compute the block again there
        self.num_mel_patches = config.mel_bins // config.patch
        self.patch_embed = nn.Linear(config.patch**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        rates = np.linspace(0, drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList([Block(config, number, rate) for number, rate in enumerate(rates)])
        table_ND = sincos_positions(config.max_time_patches, self.num_mel_patches, config.width)
        self.register_buffer("positions", table_ND, persistent=False)
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.normal_(self.cls_token)

    def forward(
        self,
        patches_BNP: Tensor,
        where_BN: Tensor | None = None,
        present_BN: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Encode each sequence of patches by itself: [B, 1 + N, D], CLS first, in the dtype of weights or autocast.

        Args:
            patches_BNP: normalised log-mel in any float dtype; the pixels of a patch frame by frame.
            where_BN: int64 places of the patches in their clip, time * F + mel; None for a whole clip in order.
            present_BN: False at patches that are padding, which no token attends to; None if there is no padding.
            depth: number of blocks to pass through; None for all.
        """
        tokens_BND = self.embed(patches_BNP, where_BN)
        if present_BN is not None:
            present_BN = nn.functional.pad(present_BN, (1, 0), value=True)  # CLS is always present
        for block in self.blocks[:depth]:
            tokens_BND = run_block(block, self.recompute, tokens_BND, present_BN)[0]
        return tokens_BND

    def embed(self, patches_BNP: Tensor, where_BN: Tensor | None = None) -> Tensor:
        """Make the input of the first block, [B, 1 + N, D]; arguments as for forward."""
        positions = self.positions[: patches_BNP.shape[1]] if where_BN is None else self.positions[where_BN]
        dtype = self.patch_embed.weight.dtype  # DeepSpeed casts the weights and leaves the positions in fp32
        patches_BND = self.patch_embed(patches_BNP.to(dtype)) + positions.to(dtype)
        return self.norm(torch.cat([self.cls_token.expand(len(patches_BND), -1, -1), patches_BND], dim=1))

    def steps(self, patches_BNP: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's input and what its MLP adds to its residual, for whole clips: two of [B, 1 + N, D]."""
        tokens_BND = self.embed(patches_BNP)
        for block in self.blocks:
            output_BND, ffn_BND = block(tokens_BND)
            yield tokens_BND, ffn_BND
            tokens_BND = output_BND


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """Call a block; with `recompute`, keep only its inputs for the backward, and compute it again there."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
