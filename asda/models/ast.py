"""The Audio Spectrogram Transformer (AST: Gong, Chung and Glass, Interspeech 2021).

Overlapping patches with learned positions, behind a class and a distillation token, pass through pre-norm blocks of
ordinary attention. The patches' tokens stand in AST's own order, mel band by mel band: number = mel * T + time.

Shapes: B clips, N patches of the data, which do not overlap, P pixels of one; T time patches and F mel patches of the
network, which overlap, S = 2 + F * T tokens (no sequences here), D width.
"""

from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from asda.config.model import AstConfig, ModelConfig
from asda.models.attention import Attention
from asda.models.encoder import INIT_STD, DropPath, Mlp, init_linear, run_block
from asda.models.patches import from_patches

NUM_SPECIAL = 2  # tokens before those of the patches: CLS and DIST


class AstBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual (pre-norm)."""

    def __init__(self, config: AstConfig, number: int, drop_path: float):
        super().__init__()
        width = config.width
        ordinary = ModelConfig(
            width=width, heads=config.heads, attention_lambda="absent", attention_norm="none", attention_scale=1.0
        )
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(ordinary, number)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_BSD: Tensor) -> Tensor:
        """Transform the tokens, [B, S, D] -> [B, S, D]."""
        tokens_BSD = tokens_BSD + self.drop_path(self.attn(self.norm1(tokens_BSD)))
        return tokens_BSD + self.drop_path(self.mlp(self.norm2(tokens_BSD)))


class AstEncoder(nn.Module):
    """Patches of log-mel in, tokens out: CLS, DIST, then one token an overlapping patch; drop_path as in Encoder."""

    num_special = NUM_SPECIAL

    def __init__(self, config: AstConfig, drop_path: float = 0.0):
        super().__init__()
        self.recompute = False  # as in Encoder
        self.patch, self.num_mel_patches = config.patch, config.grid[1]
        self.patch_embed = nn.Conv2d(1, config.width, config.patch, (config.mel_stride, config.time_stride))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(NUM_SPECIAL + prod(config.grid), config.width))
        rates = np.linspace(0, drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList([AstBlock(config, number, rate) for number, rate in enumerate(rates)])
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.apply(init_linear)
        for table in (self.patch_embed.weight, self.cls_token, self.dist_token, self.positions):
            nn.init.trunc_normal_(table, std=INIT_STD)  # as in DeiT, from whose weights AST's own started
        nn.init.zeros_(self.patch_embed.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, patches_BNP: Tensor, present_BN: Tensor | None = None, depth: int | None = None) -> Tensor:
        """Encode each clip by itself, as Encoder does: [B, S, D], after the last block normalised.

        A clip has exactly config.frames frames, and no padding mask: the configuration refuses data.padding masked.
        """
        assert present_BN is None, "the configuration refuses it"
        image_B1MT = from_patches(patches_BNP, self.patch).transpose(1, 2).contiguous()[:, None]  # M mel bins, T frames
        patches_BND = self.patch_embed(image_B1MT.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        special = [token.expand(len(patches_BNP), -1, -1) for token in (self.cls_token, self.dist_token)]
        tokens_BSD = torch.cat([*special, patches_BND], dim=1) + self.positions
        for block in self.blocks[:depth]:
            tokens_BSD = run_block(block, self.recompute, tokens_BSD)
        return self.norm(tokens_BSD) if depth in (None, len(self.blocks)) else tokens_BSD


def fitted_positions(positions_SD: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Fit a learned table of positions to clips of another length, by AST's own rule.

    A shorter clip takes the middle of the table; a longer one takes the table stretched along time by linear
    interpolation. CLS and DIST keep their positions. `grid` is (T, F) of the table, `wanted` that of the network.
    """
    (now, bands), (then, wanted_bands) = grid, wanted
    assert bands == wanted_bands, "equal strides and patches give equal mel patches"
    special_KD, table_ND = positions_SD.tensor_split([NUM_SPECIAL])
    table_1DFT = table_ND.T.unflatten(1, (bands, now))[None]
    if then <= now:
        first = now // 2 - then // 2
        table_1DFT = table_1DFT[..., first : first + then]
    else:
        table_1DFT = interpolate(table_1DFT, size=(bands, then), mode="bilinear")
    return torch.cat([special_KD, table_1DFT[0].flatten(1).T]).contiguous()
