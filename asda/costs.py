"""What a network costs: parameters and arithmetic per clip, counted on shapes alone (no memory, no weights)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asda.config import ClassifyConfig, ModelConfig, PretrainConfig
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier
from asda.models.pretrain import MaskedStudents, Teacher

META = torch.device("meta")  # tensors with a shape and no content
PREFIXES = ["", "k", "M", "G", "T", "P", "E", "Z"]
Costs = dict[str, int]  # by part of the network


class Network(NamedTuple):
    """Trainable parameters by part, and floating-point operations (a product and its sum are two) of one clip."""

    parameters: Costs
    flops: Costs


def network_costs(model: ModelConfig, objective: PretrainConfig | ClassifyConfig, frames: int, classes: int) -> Network:
    """Count a training step of one clip: forward and backward of what is trained, forward of the teacher.

    Only products of matrices and convolutions count, as is usual; attention is counted as its definition, whichever
    path computes it. A step of a rank costs as many times more as it has clips.

    Args:
        model: the encoder.
        objective: students and decoder, or the classifier.
        frames: log-mel frames of a clip.
        classes: of a classifier; not used in pre-training.
    """
    num_patches = (frames // model.patch) * (model.mel_bins // model.patch)
    with META:
        patches_BNP = torch.empty(1, num_patches, model.patch**2)
        if isinstance(objective, PretrainConfig):
            return _pretraining(model, objective, patches_BNP)
        classifier = Classifier(model, objective, classes)
        flops = {"forward and backward": _flops(lambda: classifier(patches_BNP).sum().backward(), classifier)}
        return Network({"encoder": _size(classifier.encoder), "head": _size(classifier.norm, classifier.head)}, flops)


def _pretraining(model: ModelConfig, objective: PretrainConfig, patches_BNP: torch.Tensor) -> Network:
    students, num_patches = MaskedStudents(model, objective), patches_BNP.shape[1]
    teacher = Teacher(students.encoder, objective.target_layers)
    num_visible = int(num_patches * (1 - objective.mask.ratio))
    visible_BMK = torch.zeros(1, objective.students, num_visible, dtype=torch.int64)
    targets_BND = torch.empty(1, num_patches, model.width)
    grid = (-1, model.mel_bins // model.patch)
    tokens_STFD = torch.empty(objective.students, num_patches, model.width).unflatten(1, grid).requires_grad_()
    whole = _flops(
        lambda: students(patches_BNP, visible_BMK, targets_BND, targets_BND[:, 0]).total.backward(), students
    )
    decoder = _flops(lambda: students.decoder(tokens_STFD).sum().backward(), students)
    flops = {
        "students": whole - decoder,
        "decoder": decoder,
        "teacher": _flops(lambda: teacher.targets(patches_BNP), teacher),
    }
    return Network({"encoder": _size(students.encoder), "decoder": _size(students.decoder)}, flops)


def in_flop(count: float) -> str:
    """1.175 TFLOP: four digits and the prefix that suits them."""
    power = min(int(math.log10(max(count, 1))) // 3, len(PREFIXES) - 1)
    return f"{count / 1000**power:.4g} {PREFIXES[power]}FLOP"


def _size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _flops(work: Callable[[], Any], module: nn.Module) -> int:
    set_attention_path(module, "explicit")
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
    ) as counter:
        work()
    return counter.get_total_flops()


def _conv_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Each of the two gradients costs what the forward does: torch's own formula forgets the groups in one of them."""
    (wants_input, wants_weight, _), forward = (
        args[-1],
        2 * grad_shape[0] * math.prod(grad_shape[2:]) * math.prod(w_shape),
    )
    return forward * (wants_input + wants_weight)
