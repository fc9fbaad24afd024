"""Pre-training: masked students predict the features that an EMA teacher computes from the whole clip.

M students see each clip through M masks. A student encodes its visible patches. A convolutional decoder fills in noise
for the hidden ones and predicts the teacher's features there (frame loss). The CLS token predicts the clip's mean
feature (utterance loss). The recipe is EAT's (Chen et al., IJCAI 2024) with ASDA's encoder.

Shapes: B clips, M students of each, S = B * M sequences, T time patches, F mel patches, N = T * F patches of a clip,
K visible ones, P pixels of a patch, D width; here C decoder width.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, instance_norm, layer_norm

from asda.config.model import DecoderConfig, ModelConfig, PretrainConfig
from asda.models.encoder import Encoder

VARIANCE_FLOOR = 1e-6  # under the square root of feature_spread, as in data2vec 2.0


class Losses(NamedTuple):
    """The loss of a step and its terms, fp32 scalars."""

    total: Tensor  # frame + utterance_weight * utterance
    frame: Tensor  # mean over masked patches of |prediction - target|^2 / sqrt(D)
    utterance: Tensor  # mean over students of |CLS - target|^2 / sqrt(D)
    pred_var: Tensor  # feature_spread of the predictions at masked patches; no gradient


class Targets(NamedTuple):
    """The teacher's features, which every student of a clip predicts; fp32."""

    tokens: Tensor  # [B, N, D], one a patch
    cls: Tensor  # [B, D], their mean
    target_var: Tensor  # feature_spread of the tokens; scalar


class Decoder(nn.Module):
    """Convolutions over the patch grid, each with a norm without weights, a GELU and a residual; then a projection."""

    def __init__(self, config: DecoderConfig, width: int):
        super().__init__()
        widths = [width] + [config.width] * (config.layers - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, config.width, config.kernel, padding=config.kernel // 2, groups=config.groups) for w in widths
        )
        self.proj = nn.Linear(config.width, width)  # keeps torch's initialisation, as the convolutions do

    def forward(self, grid_STFD: Tensor) -> Tensor:
        """Predict the features of every patch: [S, T, F, D] -> [S, T, F, D]."""
        x_STFC = grid_STFD
        for conv in self.convs:
            y_STFC = conv(x_STFC.movedim(-1, 1)).movedim(1, -1)
            y_STFC = gelu(layer_norm(y_STFC, y_STFC.shape[-1:]))
            x_STFC = y_STFC + x_STFC if x_STFC.shape == y_STFC.shape else y_STFC  # the first may change the width
        return self.proj(x_STFC)


class MaskedStudents(nn.Module):
    """The trained module: one encoder for all students, and the decoder.

    Parameters may be fp32 or bf16; losses are fp32 either way. Each parameter is used only inside the forward of the
    module that owns it, as ZeRO stage 3 demands.
    """

    def __init__(self, model: ModelConfig, config: PretrainConfig):
        super().__init__()
        self.encoder = Encoder(model)
        self.decoder = Decoder(config.decoder, model.width)
        self.noise_std, self.utterance_weight = config.decoder.noise_std, config.utterance_weight

    def forward(
        self,
        patches_BNP: Tensor,
        visible_BMK: Tensor,
        targets_BND: Tensor,
        target_cls_BD: Tensor,
        noise_SND: Tensor | None = None,
    ) -> Losses:
        """Compute the losses of all students of a micro-batch.

        Args:
            patches_BNP: normalised log-mel of whole clips, any float dtype.
            visible_BMK: int64 places of the patches that each student sees; the same number for all.
            targets_BND: the teacher's features of the patches.
            target_cls_BD: the teacher's features of the clips.
            noise_SND: the decoder's input at masked patches, N(0, noise_std); None draws it from torch's generator.
        """
        visible_SK = visible_BMK.flatten(0, 1)
        clip_B11 = torch.arange(len(patches_BNP), device=visible_BMK.device)[:, None, None]
        tokens_SKD = self.encoder(patches_BNP[clip_B11, visible_BMK].flatten(0, 1), visible_SK)
        cls_SD, tokens_SKD = tokens_SKD[:, 0], tokens_SKD[:, 1:]
        if noise_SND is None:  # drawn in fp32 and rounded below: on a CPU torch draws bf16 normals four times slower
            size = len(tokens_SKD), patches_BNP.shape[1], tokens_SKD.shape[2]
            noise_SND = torch.empty(size, device=tokens_SKD.device).normal_(std=self.noise_std)
        grid_SND = noise_SND.to(tokens_SKD.dtype).scatter(1, visible_SK[..., None].expand_as(tokens_SKD), tokens_SKD)
        pred_STFD = self.decoder(grid_SND.unflatten(1, (-1, self.encoder.num_mel_patches)))
        return self._losses(pred_STFD.flatten(1, 2), cls_SD, visible_BMK, targets_BND, target_cls_BD)

    def _losses(
        self, pred_SND: Tensor, cls_SD: Tensor, visible_BMK: Tensor, targets_BND: Tensor, target_cls_BD: Tensor
    ) -> Losses:
        error, pred_var = masked_error(pred_SND, targets_BND, visible_BMK.flatten(0, 1))
        frame = error * pred_SND.shape[-1] ** -0.5
        utterance = scaled_error(cls_SD.float().unflatten(0, visible_BMK.shape[:2]), target_cls_BD[:, None]).mean()
        return Losses(frame + self.utterance_weight * utterance, frame, utterance, pred_var)


def masked_error(pred_SND: Tensor, targets_BND: Tensor, visible_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of |prediction - target|^2 over masked patches, and the spread of the predictions there; fp32.

    Predictions are of M = S / B students of each clip, one clip after the other; visible_SK has each place once.
    """
    pred_SND = pred_SND.float()
    masked_SN = torch.ones(pred_SND.shape[:2], device=pred_SND.device).scatter(1, visible_SK, 0.0)
    pred_BMND = pred_SND.unflatten(0, (len(targets_BND), -1))
    error_SN = (pred_BMND - targets_BND[:, None]).square().sum(-1).flatten(0, 1)
    return (error_SN * masked_SN).sum() / masked_SN.sum(), feature_spread(pred_SND.detach(), masked_SN)


def feature_spread(features_D: Tensor, weight: Tensor) -> Tensor:
    """Average the features' standard deviations over the tokens of weight 1; 0 means collapse.

    data2vec logs this as "variance". features_D is [..., D] in fp32, weight [...] holds 0 and 1.
    """
    features_ND, weight_N1 = features_D.flatten(0, -2), weight.flatten()[:, None]
    count = weight_N1.sum()
    mean_D = (features_ND * weight_N1).sum(0) / count
    variance_D = ((features_ND - mean_D).square() * weight_N1).sum(0) / (count - 1)
    return (variance_D + VARIANCE_FLOOR).sqrt().mean()


def scaled_error(pred_D: Tensor, target_D: Tensor) -> Tensor:
    """Compute |pred - target|^2 / sqrt(D) over the last dimension (the scale of data2vec 2.0)."""
    return (pred_D - target_D).square().sum(-1) * pred_D.shape[-1] ** -0.5


class Teacher(nn.Module):
    """An fp32 copy of the students' encoder, which follows it as a moving average and is never trained.

    Make it before the engine casts or partitions the students' parameters.
    """

    def __init__(self, encoder: Encoder, target_layers: int):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False).eval()
        self.target_layers = target_layers

    @torch.inference_mode()
    def targets(self, patches_BNP: Tensor) -> Targets:
        """Compute the targets of whole clips; under torch.autocast too the norms are in fp32.

        The MLP outputs of the last target_layers blocks, without CLS, are normalised per feature over the patches of
        the clip and averaged; a LayerNorm over the features follows. Each layer's mean over the patches is 0, so the
        clip feature is only the small residue that the last norm leaves. Nothing may write into the targets, which are
        inference tensors; a loss may subtract them.
        """
        outputs = [ffn_BND for _, ffn_BND in self.encoder.steps(patches_BNP)][-self.target_layers :]
        layers_LBDN = [instance_norm(ffn_BND[:, 1:].float().transpose(1, 2)) for ffn_BND in outputs]
        mean_BND = torch.stack(layers_LBDN).mean(0).transpose(1, 2)
        tokens_BND = layer_norm(mean_BND, mean_BND.shape[-1:])
        spread = feature_spread(tokens_BND, torch.ones_like(tokens_BND[..., 0]))
        return Targets(tokens_BND, tokens_BND.mean(1), spread)
