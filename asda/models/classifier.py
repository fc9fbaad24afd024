"""A classifier on the encoder's tokens, its losses, and the learning rates of its layers.

Shapes: B clips, N patches of a clip, P pixels of a patch, D width, C classes.
"""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, logsigmoid

from asda.config.model import AstConfig, ClassifyConfig, ModelConfig
from asda.models.ast import AstEncoder
from asda.models.encoder import INIT_STD, NORM_EPS, Encoder
from asda.models.ham import Conformer, Ham

CERTAINTY_GAP = 1e-6  # of the logarithm of a pooled probability: 1 would have no logit; the released value


class Classifier(nn.Module):
    """Encoder, which may be pre-trained, HAM-AST's blocks if there are any, pooling, LayerNorm, linear layer."""

    def __init__(self, model: ModelConfig | AstConfig, config: ClassifyConfig, num_classes: int):
        super().__init__()
        self.pooling = config.pooling
        self.encoder = make_encoder(model, config.drop_path)
        self.ham, eps = (Ham(model), model.norm_eps) if isinstance(model, AstConfig) else (nn.Identity(), NORM_EPS)
        self.norm = nn.LayerNorm(model.width, eps=eps)
        self.head = Head(model.width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches_BNP: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """Compute logits, [B, C] in fp32, of whole clips of normalised log-mel.

        present_BN is False at patches that are padding, which are neither attended to nor pooled; None if none are.
        """
        tokens_BND = self.ham(self.encoder(patches_BNP, present_BN=present_BN))
        if self.encoder.num_special > 1:  # AST: the mean of CLS and DIST takes the place of CLS
            special_BKD, patches_BND = tokens_BND.tensor_split([self.encoder.num_special], dim=1)
            tokens_BND = torch.cat([special_BKD.mean(1, keepdim=True), patches_BND], dim=1)
        return self.head(self.norm(POOLINGS[self.pooling](tokens_BND, present_BN)))

    def set_recompute(self, recompute: bool) -> None:
        """Set whether to keep only the input of each block for the backward, and compute the block again there."""
        for part in self.modules():
            if isinstance(part, Encoder | AstEncoder | Conformer):
                part.recompute = recompute


class Head(nn.Linear):
    """[B, D] in any dtype -> [B, C] in fp32: bf16 scores, with 8 bits, would tie clips that differ."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute in fp64, the one type that autocast does not change; beside the encoder its cost is nothing."""
        return linear(input.double(), self.weight.double(), self.bias.double()).float()


def make_encoder(model: ModelConfig | AstConfig, drop_path: float = 0.0) -> Encoder | AstEncoder:
    """Make the encoder of the configured architecture, freshly initialised."""
    return AstEncoder(model, drop_path) if isinstance(model, AstConfig) else Encoder(model, drop_path)


def mean(features_BND: Tensor, present_BN: Tensor | None = None) -> Tensor:
    """Average each feature over the tokens that are present: [B, N, D] -> [B, D]."""
    if present_BN is None:
        return features_BND.mean(1)
    weight_BN1 = present_BN[..., None].to(features_BND.dtype)
    return (features_BND * weight_BN1).sum(1) / weight_BN1.sum(1)


def linear_softmax(features_BND: Tensor, present_BN: Tensor | None = None) -> Tensor:
    """Average each feature over the tokens, as a probability weighted by itself: [B, N, D] -> [B, D].

    With p = sigmoid(feature), the result is the logit of sum(p^2) / sum(p) (Wang et al., 2019). It is computed from
    logarithms, which do not overflow, in fp64: the difference of two of them loses digits that the next norm shows.
    """
    log_p_BND = logsigmoid(features_BND.double())
    if present_BN is not None:
        log_p_BND = log_p_BND.masked_fill(~present_BN[..., None], -math.inf)
    log_pooled_BD = (2 * log_p_BND).logsumexp(1) - log_p_BND.logsumexp(1) - CERTAINTY_GAP
    return (log_pooled_BD - (-log_pooled_BD.expm1()).log()).to(features_BND.dtype)


POOLINGS = {
    "cls": lambda tokens_BND, present_BN: tokens_BND[:, 0],
    "mean": lambda tokens_BND, present_BN: mean(tokens_BND[:, 1:], present_BN),
    "linear_softmax": lambda tokens_BND, present_BN: linear_softmax(tokens_BND[:, 1:], present_BN),
}


def classification_loss(logits_BC: Tensor, targets_BC: Tensor, config: ClassifyConfig) -> Tensor:
    """Compute the mean loss of a clip, an fp32 scalar.

    "ce" is the cross-entropy with one-hot (or mixed) targets, smoothed by config.label_smoothing; "bce" is the sum over
    classes of the binary cross-entropies. The released recipes divide a batch's bce by its number of positive labels
    (about two a clip in AudioSet). Then a clip's weight would depend on the other clips of its rank; a constant factor
    makes no difference, because Adam undoes it. Targets are probabilities, in rows that sum to 1 for "ce".
    """
    targets_BC = targets_BC.float()
    if config.loss == "ce":
        return cross_entropy(logits_BC.float(), targets_BC, label_smoothing=config.label_smoothing)
    return binary_cross_entropy_with_logits(logits_BC.float(), targets_BC, reduction="none").sum(dim=1).mean()


def lr_scales(model: Classifier, layer_decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate: layer_decay ** (depth - i) in block i, 1 elsewhere.

    The patch embedding and the CLS token, below the blocks, have 1 too, as released.
    """
    depth = len(model.encoder.blocks)
    blocks = {name: re.match(r"encoder\.blocks\.(\d+)\.", name) for name, _ in model.named_parameters()}
    return {name: layer_decay ** (depth - int(block[1])) if block else 1.0 for name, block in blocks.items()}
