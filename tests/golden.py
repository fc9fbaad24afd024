"""The official models' numbers: their tensors, their parameter names in ours, their tiny sizes.

The files and their notes are described in golden/README.md of the shared folder. A correct fp32 implementation agrees
with them to a relative rms of 1e-5: the official code's own rounding, measured against its fp64 run, reaches 2.2e-6
(json key fp32_vs_fp64), a second implementation rounds as much in another order, and 1e-5 is 3.2 times the sqrt(2) of
both together. Only `fwd.targets.cls`, a mean that nearly cancels, has a floor of 9.4e-6 (of 1.2e-5 on another
machine) and gets 2e-5.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from asda.config import DecoderConfig, MaskConfig, ModelConfig, PretrainConfig

REL_RMS = 1e-5
TINY = ModelConfig(width=96, depth=3, heads=4)
TINY_PRETRAIN = PretrainConfig(
    kind="pretrain",
    students=4,
    utterance_weight=0.5 * 2 * 4,  # cls_loss x clips x students
    target_layers=3,
    mask=MaskConfig(block=3),
    decoder=DecoderConfig(layers=2, width=96, groups=4),
)
PATCH = TINY.patch
KEY_PARTS = 2  # of the four parts q1, q2, k1, k2 of a qk layer, those that are keys come last
OFFICIAL_TO_OURS = [
    ("model.", ""),
    ("modality_encoders.IMAGE.extra_tokens", "encoder.cls_token"),
    ("modality_encoders.IMAGE.local_encoder.proj.", "encoder.patch_embed."),
    ("modality_encoders.IMAGE.context_encoder.norm.", "encoder.norm."),
    ("modality_encoders.IMAGE.decoder.blocks.", "decoder.convs."),
    ("modality_encoders.IMAGE.decoder.", "decoder."),
    ("blocks.", "encoder.blocks."),
    ("fc_norm.", "norm."),
]


def load(shared: Path, name: str) -> dict[str, Tensor]:
    """All tensors of one golden file."""
    return load_file(shared / "golden" / f"{name}.safetensors")


def numbers(shared: Path, name: str) -> dict[str, Any]:
    """The json beside a golden file: sizes, scalar sums, notes."""
    return json.loads((shared / "golden" / f"{name}.json").read_text())


def checkpoint(shared: Path, name: str) -> dict[str, Any]:
    """The official checkpoint's ['model']: parameters, and under "_ema" the teacher's."""
    return torch.load(shared / "golden" / f"{name}_official.pt", weights_only=True)["model"]


def our_name(official: str) -> str:
    """A parameter's name in MaskedStudents or Classifier."""
    for theirs, ours in OFFICIAL_TO_OURS:
        if official.startswith(theirs):
            official = ours + official.removeprefix(theirs)
            if ours:
                break
    return official.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "convs" in official else official


def our_parameters(official: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The official tensors that begin with `prefix`, under our names and in our shapes.

    The patch embedding's convolution becomes the matrix that it is; the position table, which ours computes, is left
    out, and so is the teacher nested in a checkpoint.
    """
    ours = {}
    for name, tensor in official.items():
        if name.startswith(prefix) and not name.endswith(("positions", "_ema")):
            ours_name = our_name(name.removeprefix(prefix))
            ours[ours_name] = tensor.flatten(1) if "patch_embed.weight" in ours_name else tensor
    return ours


def encoder_parameters(official: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The encoder's part of our_parameters, without "encoder." before the names."""
    ours = our_parameters(official, prefix)
    return {name.removeprefix("encoder."): t for name, t in ours.items() if name.startswith("encoder.")}


def patchify(source_B1TF: Tensor) -> Tensor:
    """Log-mel [B, 1, frames, mel bins] as patches [B, N, P], time-major, the pixels of a patch frame by frame."""
    blocks = source_B1TF.squeeze(1).unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, T, frame, F, bin]
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def rel_rms(ours: Tensor, golden: Tensor) -> float:
    """rms(ours - golden) / rms(golden), in fp64."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    exact = golden.detach().double()
    return float((ours.detach().double() - exact).norm() / exact.norm())


def without_key_biases(name: str, tensor: Tensor) -> Tensor:
    """`tensor` of parameter `name` without the rows whose true gradient is zero.

    A bias of the keys adds the same number to all logits of a query, so softmax ignores it; Adam makes steps of
    rounding noise there, up to 0.11 of the learning rate.
    """
    return tensor[: len(tensor) // KEY_PARTS] if name.endswith("qk.bias") else tensor
