"""The encoder of ASDA and EAT: patches become tokens, tokens pass through post-norm blocks of attention.

Shapes: B sequences, T time patches, F mel patches, N patches of a sequence (T * F when all are there), P pixels of
a patch, D width.
"""

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
    """The fixed position table of a grid, [rows * columns, width] in fp32, row after row.

    The first half of the features tells the column (mel), the second half the row (time); each half holds sines,
    then cosines, of the same wavelengths (He et al., "Masked autoencoders", 2021).
    """
    num_waves = width // 4
    frequency_W = MAX_WAVELENGTH ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)
    row_N, column_N = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).unbind(1)
    phases = [column_N[:, None] * frequency_W, row_N[:, None] * frequency_W]
    return torch.cat([wave(phase) for phase in phases for wave in (torch.sin, torch.cos)], dim=1).float()


def init_linear(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases, if it is a linear layer; meant for nn.Module.apply."""
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
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(gelu(self.fc1(tokens_BND)))


class DropPath(nn.Module):
    """While training, leaves a branch out for a random share of the sequences and scales the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if not self.training or self.rate == 0:
            return branch_BND
        keep = 1 - self.rate
        kept_B11 = torch.empty_like(branch_BND[:, :1, :1]).bernoulli_(keep)
        return branch_BND * (kept_B11 / keep)


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
        """The block's output and, from before the last residual, the MLP's, of which the targets are made."""
        tokens_BND = self.norm1(tokens_BND + self.drop_path(self.attn(tokens_BND, present_BN)))
        ffn_BND = self.mlp(tokens_BND)
        return self.norm2(tokens_BND + self.drop_path(ffn_BND)), ffn_BND


class Encoder(nn.Module):
    """Patches of log-mel in, tokens out: the CLS token first, then one token per patch.

    Args:
        config: the sizes.
        drop_path: rate of the last block, linear from 0 at the first.
    """

    num_special = 1  # tokens before those of the patches: CLS
    positions: Tensor  # [N, D] of the longest clip; fixed, hence in no checkpoint: it follows from the config

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
        self._init_weights()

    def _init_weights(self) -> None:
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.normal_(self.cls_token)

    def forward(self, patches_BNP: Tensor, where_BN: Tensor | None = None, present_BN: Tensor | None = None) -> Tensor:
        """Encode each sequence of patches by itself.

        Args:
            patches_BNP: normalised log-mel, any float dtype; the pixels of a patch frame by frame.
            where_BN: int64 places of the patches in their clip, time * F + mel; None when all are there in order.
            present_BN: False where a patch is padding, of which no token takes anything; None when there is none.

        Returns:
            [B, 1 + N, D] tokens, CLS first, in the dtype of the weights (or of autocast).
        """
        tokens_BND = self.embed(patches_BNP, where_BN)
        present_BN = with_cls(present_BN)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                outputs: Any = checkpoint(block, tokens_BND, present_BN, use_reentrant=False)
                tokens_BND = outputs[0]
            else:
                tokens_BND, _ = block(tokens_BND, present_BN)
        return tokens_BND

    def layers(self, patches_BNP: Tensor, present_BN: Tensor | None = None) -> list[Tensor]:
        """The input of the first block, then the output of each, CLS included: (depth + 1) x [B, 1 + N, D]."""
        outputs = [self.embed(patches_BNP)]
        present_BN = with_cls(present_BN)
        for block in self.blocks:
            outputs.append(block(outputs[-1], present_BN)[0])
        return outputs

    def at_depth(self, patches_BNP: Tensor, depth: int, present_BN: Tensor | None = None) -> Tensor:
        """The input of the first block (depth 0), or the output of block number `depth`, counted from 1."""
        tokens_BND, present_BN = self.embed(patches_BNP), with_cls(present_BN)
        for block in self.blocks[:depth]:
            tokens_BND, _ = block(tokens_BND, present_BN)
        return tokens_BND

    def ffn_outputs(self, patches_BNP: Tensor) -> list[Tensor]:
        """What the MLP of each block adds to its residual, CLS included, for whole clips: depth x [B, 1 + N, D]."""
        tokens_BND = self.embed(patches_BNP)
        outputs = []
        for block in self.blocks:
            tokens_BND, ffn_BND = block(tokens_BND)
            outputs.append(ffn_BND)
        return outputs

    def embed(self, patches_BNP: Tensor, where_BN: Tensor | None = None) -> Tensor:
        """The input of the first block, [B, 1 + N, D]; arguments as for forward."""
        positions = self.positions[: patches_BNP.shape[1]] if where_BN is None else self.positions[where_BN]
        dtype = self.patch_embed.weight.dtype  # DeepSpeed casts the weights and leaves the positions in fp32
        patch_tokens_BND = self.patch_embed(patches_BNP.to(dtype)) + positions.to(dtype)
        cls_B1D = self.cls_token.expand(len(patches_BNP), -1, -1)
        return self.norm(torch.cat([cls_B1D, patch_tokens_BND], dim=1))


def with_cls(present_BN: Tensor | None) -> Tensor | None:
    """Which tokens are present when these patches are: CLS always is, [B, 1 + N]."""
    return None if present_BN is None else nn.functional.pad(present_BN, (1, 0), value=True)
