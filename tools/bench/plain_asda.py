"""A plain implementation of ASDA's pre-training from the paper: the baseline of tools/bench/bench_step.py.

Explicit attention maps, nn.LayerNorm, F.gelu, nn.Conv2d, losses over the masked patches. tests/tools/test_bench_step.py
shows that losses, gradients and targets equal those of asda.models.

Shapes: B clips, M students of each, S = B * M sequences, N patches of a clip, K visible ones, X masked ones of all, P
pixels of a patch, T time patches, F mel patches, D width, H heads, E = D / H.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from asda.config.model import DecoderConfig, ModelConfig, PretrainConfig
from asda.models.encoder import sincos_positions


class PlainAttention(nn.Module):
    """(softmax(q1 k1^T / sqrt(E)) - lambda softmax(q2 k2^T / sqrt(E))) v, normalised, scaled and projected."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.lam, self.scale = config.heads, config.attention_lambda, config.attention_scale
        self.qk = nn.Linear(config.width, 4 * config.width)
        self.v = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_SND: Tensor) -> Tensor:
        """Mix the tokens, [S, N, D] -> [S, N, D]."""
        q1, q2, k1, k2 = (self._by_head(part) for part in self.qk(x_SND).chunk(4, dim=-1))
        first, second = (
            (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) for q, k in ((q1, k1), (q2, k2))
        )
        mixed_SHNE = (first - self.lam * second) @ self._by_head(self.v(x_SND))
        return self.proj(self.norm(mixed_SHNE.transpose(1, 2).flatten(2)) * self.scale)

    def _by_head(self, x_SND: Tensor) -> Tensor:
        return x_SND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PlainMlp(nn.Module):
    """Two linear layers and a GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, int(config.width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.width * config.mlp_ratio), config.width)

    def forward(self, x_SND: Tensor) -> Tensor:
        """Compute fc2(gelu(fc1(x))), [S, N, D] -> [S, N, D]."""
        return self.fc2(functional.gelu(self.fc1(x_SND)))


class PlainBlock(nn.Module):
    """Attention and MLP, each followed by its residual and a norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn, self.mlp = PlainAttention(config), PlainMlp(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width, eps=1e-6), nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x_SND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, and its MLP's."""
        x_SND = self.norm1(x_SND + self.attn(x_SND))
        ffn_SND = self.mlp(x_SND)
        return self.norm2(x_SND + ffn_SND), ffn_SND


class PlainEncoder(nn.Module):
    """Patches in, tokens out; hidden patches are left out before the first block."""

    positions: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        num_mel_patches = config.mel_bins // config.patch
        self.patch_embed = nn.Linear(config.patch**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        table_ND = sincos_positions(config.max_time_patches, num_mel_patches, config.width)
        self.register_buffer("positions", table_ND, persistent=False)

    def forward(self, patches_BNP: Tensor, visible_BMK: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return tokens with CLS first, [S, 1 + K, D], and the outputs of all MLPs."""
        x_SND = self.patch_embed(patches_BNP) + self.positions[: patches_BNP.shape[1]]
        if visible_BMK is not None:
            visible_SK = visible_BMK.flatten(0, 1)
            x_SND = x_SND.repeat_interleave(visible_BMK.shape[1], dim=0)
            x_SND = x_SND.gather(1, visible_SK[..., None].expand(-1, -1, x_SND.shape[-1]))
        x_SND = self.norm(torch.cat([self.cls_token.expand(len(x_SND), -1, -1), x_SND], dim=1))
        ffns = []
        for block in self.blocks:
            x_SND, ffn_SND = block(x_SND)
            ffns.append(ffn_SND)
        return x_SND, ffns


class PlainDecoder(nn.Module):
    """Layers of convolution, norm over the channels, GELU and residual; then a projection."""

    def __init__(self, config: DecoderConfig, width: int):
        super().__init__()
        widths = [width] + [config.width] * (config.layers - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, config.width, config.kernel, padding=config.kernel // 2, groups=config.groups) for w in widths
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.proj = nn.Linear(config.width, width)

    def forward(self, x_SDTF: Tensor) -> Tensor:
        """Predict the features of every patch, [S, D, T, F] -> [S, N, D]."""
        for conv in self.convs:
            y_SDTF = self.norm(conv(x_SDTF).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y_SDTF = functional.gelu(y_SDTF)
            x_SDTF = x_SDTF + y_SDTF if x_SDTF.shape == y_SDTF.shape else y_SDTF
        return self.proj(x_SDTF.flatten(2).transpose(1, 2))


class PlainStudents(nn.Module):
    """Encoder, decoder and losses; parameters are named as in asda.models.pretrain.MaskedStudents."""

    def __init__(self, model: ModelConfig, config: PretrainConfig):
        super().__init__()
        self.encoder = PlainEncoder(model)
        self.decoder = PlainDecoder(config.decoder, model.width)
        self.num_mel_patches = model.mel_bins // model.patch
        self.noise_std, self.utterance_weight = config.decoder.noise_std, config.utterance_weight

    def forward(
        self,
        patches_BNP: Tensor,
        visible_BMK: Tensor,
        targets_BND: Tensor,
        target_cls_BD: Tensor,
        noise_SND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the total loss, the frame loss, the utterance loss, and the spread of the predictions."""
        (num_clips, num_students, _), visible_SK = visible_BMK.shape, visible_BMK.flatten(0, 1)
        tokens_SKD, _ = self.encoder(patches_BNP, visible_BMK)
        width = tokens_SKD.shape[-1]
        if noise_SND is None:
            noise_SND = torch.randn(len(visible_SK), patches_BNP.shape[1], width) * self.noise_std
        places = visible_SK[..., None].expand(-1, -1, width)
        grid_SND = noise_SND.to(tokens_SKD.dtype).scatter(1, places, tokens_SKD[:, 1:])
        grid_SDTF = grid_SND.transpose(1, 2).unflatten(2, (-1, self.num_mel_patches))
        pred_SND = self.decoder(grid_SDTF)

        masked_SN = torch.ones(pred_SND.shape[:2], dtype=torch.bool).scatter(1, visible_SK, False)
        wanted_SND = targets_BND.repeat_interleave(num_students, dim=0)
        error_X = (pred_SND[masked_SN].float() - wanted_SND[masked_SN]).square().sum(-1) / width**0.5
        cls_BMD = tokens_SKD[:, 0].float().unflatten(0, (num_clips, num_students))
        frame = error_X.mean()
        utterance = ((cls_BMD - target_cls_BD[:, None]).square().sum(-1) / width**0.5).mean()
        spread = spread_of(pred_SND[masked_SN].detach().float())
        return frame + self.utterance_weight * utterance, frame, utterance, spread


def plain_targets(encoder: PlainEncoder, patches_BNP: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Compute the teacher's targets: tokens [B, N, D] and their mean [B, D]."""
    _, ffns = encoder(patches_BNP)
    normed = [functional.instance_norm(ffn[:, 1:].float().transpose(1, 2)).transpose(1, 2) for ffn in ffns[-layers:]]
    mean_BND = torch.stack(normed).mean(0)
    tokens_BND = functional.layer_norm(mean_BND, mean_BND.shape[-1:])
    spread_of(tokens_BND.flatten(0, 1))
    return tokens_BND, tokens_BND.mean(1)


def spread_of(features_XD: Tensor) -> Tensor:
    """Average the features' standard deviations."""
    return (features_XD.var(dim=0) + 1e-6).sqrt().mean()
