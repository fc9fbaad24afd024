"""Convert weights between the layouts of the official EAT, ASDA and SSLAM code and ours. Nothing here opens a file.

    pre-trained   {"model": {NAME: tensor, ..., "_ema": {NAME: tensor, ...}}, "cfg": {...}, ...}     fairseq
    fine-tuned    {"model": {"model." + NAME: tensor, "fc_norm...", "head..."}, "cfg": {...}, ...}   fairseq
    Hugging Face  {"model." + SHORT NAME: tensor, ...}, with or without fc_norm and head; no decoder, no teacher

Our parameters are theirs under other names, with two exceptions: the patch embedding is a matrix here and a convolution
there, and EAT joins our qk and v to one qkv. Their file also holds the table of positions, which we compute. Sizes come
from the shapes, or else from the cfg (fairseq_settings.py); what neither tells is assumed, and a note says so.

Shapes: D width, P patch, N positions of the longest clip.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from asda.checkpoint.weights import misfit, named
from asda.config.load import keys_of
from asda.config.model import AstConfig, ClassifyConfig, ModelConfig, PretrainConfig, of_asda
from asda.config.presets import DEFAULT_SIZE, PRESETS, SIZES, filled
from asda.config.run import Description, dump_config
from asda.data.labels import NUM_AUDIOSET_CLASSES, audioset_labels
from asda.errors import UserError
from asda.models.classifier import Classifier
from asda.models.encoder import sincos_positions
from asda.models.pretrain import MaskedStudents
from asda.official.fairseq_settings import (
    check_cfg,
    classify_tree,
    input_tree,
    model_section,
    number,
    official_cfg,
    pretrain_tree,
)

Tree = dict[str, Any]
Weights = dict[str, Tensor]

IMAGE = "modality_encoders.IMAGE."
POSITIONS = "positions"  # our name for their table
OURS_TO_THEIRS = [
    ("encoder.cls_token", IMAGE + "extra_tokens"),
    ("encoder.patch_embed.", IMAGE + "local_encoder.proj."),
    (POSITIONS, IMAGE + "fixed_positional_encoder.positions"),
    ("encoder.norm.", IMAGE + "context_encoder.norm."),
    ("encoder.blocks.", "blocks."),
    ("decoder.convs.", IMAGE + "decoder.blocks."),
    ("decoder.", IMAGE + "decoder."),
    ("norm.", "fc_norm."),
]
# Parts of other objectives that the official code can switch on; no feature depends on them.
NOT_OURS = ("recon_proj.", "cls_proj.", "center", IMAGE + "encoder_mask")
FEATURES_PER_HEAD = 64  # of every published model
MEL_BINS = 128
# What fairseq's loader expects beside weights and cfg, as before the first step.
FAIRSEQ_FRAME: Tree = {
    "args": None,
    "criterion": None,
    "optimizer_history": [
        {
            "criterion_name": "ModelCriterion",
            "optimizer_name": "FP16Optimizer",
            "lr_scheduler_state": {},
            "num_updates": 0,
        }
    ],
    "task_state": {},
    "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
}


@dataclass(frozen=True)
class Wishes:
    """Settings of the user for a file; None leaves one to the file."""

    heads: int | None = None
    mean: float | None = None
    std: float | None = None
    labels: tuple[str, ...] | None = None
    preset: str | None = None  # names the lambda of differential attention, which no checkpoint records


@dataclass(frozen=True)
class Converted:
    """The result of a conversion: what write_weights takes, and notes on what was assumed or left out."""

    description: Description
    weights: dict[str, Weights]
    notes: list[str]


@dataclass(frozen=True)
class Layout:
    """The names of parameters in a file."""

    fine_tuned: bool
    hugging_face: bool
    joined_qkv: bool

    def key(self, ours: str) -> str:
        """Return their name for one of our parameters (in MaskedStudents or Classifier), or for POSITIONS."""
        name = re.sub(r"(decoder\.blocks\.\d+)\.", r"\1.0.", renamed(ours, OURS_TO_THEIRS))
        if self.joined_qkv:
            name = re.sub(r"attn\.(qk|v)\.", "attn.qkv.", name)
        if self.hugging_face:
            return "model." + name.replace(IMAGE + "context_encoder.norm", "pre_norm").removeprefix(IMAGE)
        return "model." + name if self.fine_tuned and not name.startswith(("fc_norm.", "head.")) else name


def from_official(file: Mapping[str, Any], cfg: Tree, wishes: Wishes, source: str) -> Converted:
    """Translate a checkpoint.

    Args:
        file: what torch.load or safetensors gives: {"model": {...}, ...}, or the tensors themselves.
        cfg: its cfg as plain data; {} if there is none.
        wishes: what the user said.
        source: the file's name, for messages.

    Raises:
        UserError: the tensors are not those of such a model, or its cfg asks for a network that ours is not.
    """
    content = file["model"] if isinstance(file.get("model"), Mapping) else file
    state = {str(key): value for key, value in content.items()}
    teacher = state.pop("_ema", None)
    layout = _recognise(state, source)
    notes = _drop_strangers(state)
    description = _recorded(file, wishes, source) or _inferred(state, layout, cfg, wishes, source, notes)
    precisions = {str(t.dtype).removeprefix("torch.") for t in state.values() if isinstance(t, Tensor)} - {"float32"}
    notes += [f"tensors of {precision} became float32" for precision in sorted(precisions)]
    has_decoder = not layout.fine_tuned and not layout.hugging_face
    weights = {"model": _translate(state, description, layout, source, has_decoder)}
    if isinstance(teacher, Mapping):
        teacher = dict(teacher)
        notes += [f"_ema: {note}" for note in _drop_strangers(teacher)]
        followed = _translate(teacher, description, layout, f"_ema of {source}", has_decoder=False)
        weights["teacher"] = {name.removeprefix("encoder."): tensor for name, tensor in followed.items()}
    elif not layout.fine_tuned:
        notes.append("it holds no EMA teacher")
    if layout.hugging_face and not layout.fine_tuned:
        notes.append("it holds no decoder: good for features and fine-tuning, not for the official layout")
    return Converted(description, weights, notes)


def to_official(description: Description, weights: dict[str, Weights]) -> Tree:
    """Return the checkpoint that torch.save should write for the official code; from_official reads it back.

    Args:
        description: of our weights.
        weights: "model", and "teacher" if there is one.

    Raises:
        UserError: the official code cannot compute this model, or a part of it is missing.
    """
    model = _expressible(description)
    layout = Layout(
        fine_tuned=isinstance(description.objective, ClassifyConfig),
        hugging_face=False,
        joined_qkv=model.attention_lambda == "absent",
    )
    if complaint := misfit(parameters_on_meta(description), weights["model"]):
        raise UserError(f"the weights are not whole: {complaint}")
    state: Tree = _join(weights["model"], model, layout)
    if "teacher" in weights:
        state["_ema"] = _join({f"encoder.{key}": tensor for key, tensor in weights["teacher"].items()}, model, layout)
    return {
        **FAIRSEQ_FRAME,
        "cfg": official_cfg(description),
        "model": state,
        "asda": dump_config(description),  # fairseq ignores it; from_official reads it back
    }


def official_positions(rows: int, columns: int, width: int) -> Tensor:
    """Compute the table of positions as the official code does, in fp32: [1, rows * columns, width].

    sincos_positions is the same table, computed more exactly.
    """
    num_waves = width // 4
    frequency_W = 1 / 10000 ** (np.arange(num_waves, dtype=np.float32) / np.float32(num_waves))
    row_N, column_N = (axis.ravel().astype(np.float32) for axis in np.indices((rows, columns)))
    phases = [np.outer(column_N, frequency_W), np.outer(row_N, frequency_W)]
    table_ND = np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table_ND)[None]


# ---- sizes and settings


def _recognise(state: Tree, source: str) -> Layout:
    for fine_tuned, hugging_face in ((False, False), (True, False), (False, True)):
        layout = Layout(fine_tuned, hugging_face, joined_qkv=any(".attn.qkv." in key for key in state))
        if layout.key("encoder.cls_token") in state:
            return replace(layout, fine_tuned=fine_tuned or "model.head.weight" in state)
    if "encoder.cls_token" in state:
        raise UserError(f"{source} holds weights in asda's own layout; --to official writes the official one")
    found = ", ".join(named(key, value) for key, value in list(state.items())[:3]) or "nothing"
    raise UserError(
        f"{source} is not a checkpoint of EAT, ASDA or SSLAM: {IMAGE}extra_tokens is missing; it begins with {found}"
    )


def _recorded(file: Mapping[str, Any], wishes: Wishes, source: str) -> Description | None:
    """Return the description that to_official left in the file, with the user's changes."""
    if not isinstance(file.get("asda"), str):
        return None
    try:
        tree = json.loads(file["asda"])
        log_mel = {"mean": wishes.mean, "std": wishes.std}
        tree["data"]["log_mel"] |= {key: value for key, value in log_mel.items() if value is not None}
        tree["model"] |= {"heads": wishes.heads} if wishes.heads else {}
        tree["labels"] = labels_of(len(tree["labels"]), wishes.labels or tuple(tree["labels"]), [])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{source} has a damaged description of its model; convert its weights again") from None
    return _validated(tree, source)


def _inferred(state: Tree, layout: Layout, cfg: Tree, wishes: Wishes, source: str, notes: list[str]) -> Description:
    """Make a description from the shapes, the cfg, and the preset and size that they suggest."""
    notes += check_cfg(cfg, source)
    preset = "eat" if layout.joined_qkv else wishes.preset or "released"
    attention = {key: value for key, value in PRESETS[preset]["model"].items() if key != "mlp_ratio"}
    model = _model_tree(state, layout, cfg, wishes, source, notes) | attention
    if not layout.joined_qkv:
        notes.append(f"lambda {model['attention_lambda']} is that of preset {preset}: no checkpoint records it")
    num_classes = shape_of(state, layout.key("head.weight"), 2, source)[0] if layout.fine_tuned else 0
    data, recipe = input_tree(cfg, num_classes, wishes.mean, wishes.std)
    if wishes.mean is None or wishes.std is None:
        notes.append(
            f"log-mel mean {recipe.mean} and std {recipe.std} are those of {recipe.name}: "
            "no checkpoint records them (--mean, --std)"
        )
    objective = classify_tree(cfg) if layout.fine_tuned else _pretrain_tree(state, layout, cfg, model)
    labels = labels_of(num_classes, wishes.labels, notes)
    return described(source, preset, objective=objective, data=data, model=model, labels=labels)


def described(source: str, preset: str, **sections: Any) -> Description:
    """Make the description of a converted model of its sections; its preset and size fill in the rest.

    Raises:
        UserError: names the first invalid value.
    """
    model = sections["model"].items()
    size = next((size for size, values in SIZES.items() if values["model"].items() <= model), DEFAULT_SIZE)
    about = {"what": f"converted from {source}"}
    return _validated(filled({"_about": about, "preset": preset, "size": size, **sections}), source)


def _validated(tree: Tree, source: str) -> Description:
    try:
        return Description.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        first = error.errors()[0]
        where, why = ".".join(map(str, keys_of(first, Description))), first["msg"].removeprefix("Value error, ")
        raise UserError(f"{source} describes a model that asda does not have ({where}: {why})") from None


def _model_tree(state: Tree, layout: Layout, cfg: Tree, wishes: Wishes, source: str, notes: list[str]) -> Tree:
    width = shape_of(state, layout.key("encoder.cls_token"), 3, source)[-1]
    patch = shape_of(state, layout.key("encoder.patch_embed.weight"), 4, source)[-1]
    num_positions = shape_of(state, layout.key(POSITIONS), 3, source)[1]
    hidden = shape_of(state, layout.key("encoder.blocks.0.mlp.fc1.weight"), 2, source)[0]
    heads = wishes.heads or number(model_section(cfg), "num_heads", 0)
    if not heads:
        heads = max(1, width // FEATURES_PER_HEAD)
        notes.append(f"heads of {FEATURES_PER_HEAD} features are assumed: neither the shapes nor a cfg tell (--heads)")
    return {
        "width": width,
        "depth": count_numbers(state, layout.key("encoder.blocks.")),
        "heads": heads,
        "mlp_ratio": ratio_of(hidden, width),
        "patch": patch,
        "max_time_patches": max(1, num_positions // max(1, MEL_BINS // patch)),
    }


def _pretrain_tree(state: Tree, layout: Layout, cfg: Tree, model: Tree) -> Tree:
    """Read the objective from the cfg, its decoder from the shapes; presets fill in the rest."""
    tree = {"target_layers": model["depth"]} | pretrain_tree(cfg)
    first = state.get(layout.key("decoder.convs.0.weight"))
    if isinstance(first, Tensor) and first.ndim == 4 and 0 not in first.shape:
        tree["decoder"] = tree.get("decoder", {}) | {
            "layers": count_numbers(state, layout.key("decoder.convs.")),
            "width": first.shape[0],
            "kernel": first.shape[-1],
            "groups": max(1, model["width"] // first.shape[1]),
        }
    return tree


def labels_of(num_classes: int, given: tuple[str, ...] | None, notes: list[str]) -> tuple[str, ...]:
    """Return the names of the classes: those given, AudioSet's by their number, or numbers. Adds a note."""
    if given is not None:
        if len(given) != num_classes:
            raise UserError(f"--labels names {len(given)} classes, the checkpoint has {num_classes}; one name per line")
        return given
    if num_classes == NUM_AUDIOSET_CLASSES:
        notes.append("the labels are AudioSet's, by their number")
        return audioset_labels()
    if num_classes:
        notes.append(f'the {num_classes} classes have no names in the file: they are called "class 0", ... (--labels)')
    return tuple(f"class {number}" for number in range(num_classes))


# ---- tensors


def parameters_on_meta(description: Description) -> Weights:
    """Return the state of the module that a description builds (of one class without labels), without memory."""
    objective = description.objective
    with torch.device("meta"):
        if isinstance(objective, PretrainConfig):
            return MaskedStudents(of_asda(description.model), objective).state_dict()
        return Classifier(description.model, objective, len(description.labels) or 1).state_dict()


def _drop_strangers(state: Tree) -> list[str]:
    """Remove the parts of other objectives from `state`; return a note on each."""
    strangers = [key for key in state if key.removeprefix("model.").startswith(NOT_OURS)]
    for key in strangers:
        del state[key]
    return [f"{key} belongs to an objective that asda does not have, and was left out" for key in strangers]


def _translate(
    state: Mapping[str, Any], description: Description, layout: Layout, source: str, has_decoder: bool
) -> Weights:
    """Make our parameters from theirs, in fp32, as copies."""
    model, expected = of_asda(description.model), parameters_on_meta(description)
    if not has_decoder:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("decoder.")}
    check_tensors(_join(expected, model, layout), state, source)
    _check_positions(state[layout.key(POSITIONS)][0], model, source)
    ours = {name: _rows(name, state[layout.key(name)], layout).reshape(t.shape) for name, t in expected.items()}
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in ours.items()}


def check_tensors(expected: Weights, found: Mapping[str, Any], source: str) -> None:
    """Refuse other names and shapes, and all but finite floating-point numbers in memory. Raises UserError."""
    if complaint := misfit(expected, found):
        raise UserError(f"{source} does not fit: {complaint}")
    for key, tensor in found.items():
        there = tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not (there and bool(tensor.isfinite().all())):
            raise UserError(f"{source} holds values in {key} that are not finite numbers; the checkpoint is damaged")


def _rows(ours: str, theirs: Tensor, layout: Layout) -> Tensor:
    """Return our part of a joined qkv, or the whole of any other tensor."""
    if not layout.joined_qkv or ".attn." not in ours or ".proj." in ours:
        return theirs
    num_qk = len(theirs) // 3 * 2
    return theirs[:num_qk] if ".qk." in ours else theirs[num_qk:]


def _join(ours: Weights, model: ModelConfig, layout: Layout) -> Weights:
    """Make their tensors from ours, with the table of positions."""
    parts: dict[str, Weights] = {}
    for name, tensor in ours.items():
        conv = (model.width, 1, model.patch, model.patch)
        theirs = tensor.reshape(conv) if name == "encoder.patch_embed.weight" else tensor
        parts.setdefault(layout.key(name), {})[name] = theirs
    # Parts of one tensor follow each other by name, whatever the order of a file: qk, then v.
    joined = {key: torch.cat([part[name] for name in sorted(part)]) for key, part in parts.items()}
    table_1ND = official_positions(model.max_time_patches, model.mel_bins // model.patch, model.width)
    return joined | {layout.key(POSITIONS): table_1ND}


def _check_positions(theirs_ND: Tensor, model: ModelConfig, source: str) -> None:
    """Refuse learned or other positions: ours are always sines and cosines.

    Theirs have their phases in fp32: the frequency and its product with the row are each rounded by up to 2^-24 of the
    phase, the sine by a little. A model that was trained in fp16 has a table that was rounded once more, by up to
    2^-11, even if the file now holds it in fp32. Another grid or formula differs by far more.
    """
    columns = model.mel_bins // model.patch
    error_ND = (theirs_ND.float() - sincos_positions(model.max_time_patches, columns, model.width)).abs()
    row_N1 = torch.arange(len(error_ND))[:, None] // columns
    stored = max(2**-11, torch.finfo(theirs_ND.dtype).eps / 2)
    if (error_ND > row_N1.clamp(min=columns - 1) * 2**-23 + 2**-23 + stored).any():
        raise UserError(
            f"{source} has another table of positions than the sines and cosines of EAT and ASDA "
            f"(off by up to {error_ND.max():.2g}); asda computes those and cannot take others"
        )


def _expressible(description: Description) -> ModelConfig:
    """Return the model section of a network that the official code has: two kinds of attention, constants fixed."""
    model = description.model
    if isinstance(model, AstConfig):
        raise UserError(
            "the official layout is that of EAT and ASDA, and this model is an AST; use its folder as it is"
        )
    is_eat = model.attention_lambda == "absent"
    for key, value in PRESETS["eat" if is_eat else "released"]["model"].items():
        if getattr(model, key) != value and not (is_eat and key == "mlp_ratio"):
            raise UserError(
                f"the official code cannot compute this model: it has model.{key} {value} fixed, "
                f"this model has {getattr(model, key)}"
            )
    return model


# ---- small readers


def renamed(name: str, prefixes: list[tuple[str, str]]) -> str:
    """Return a name with the first of our prefixes that it has replaced by theirs."""
    return next((theirs + name.removeprefix(ours) for ours, theirs in prefixes if name.startswith(ours)), name)


def shape_of(state: Tree, key: str, ndim: int, source: str) -> tuple[int, ...]:
    """Return the shape of a tensor from which sizes are read. Raises UserError."""
    tensor = state.get(key)
    if not isinstance(tensor, Tensor):
        raise UserError(f"{source} does not fit: {key} is missing")
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise UserError(f"{source} does not fit: {named(key, tensor)} should have {ndim} dimensions, none of them 0")
    return tuple(tensor.shape)


def count_numbers(state: Tree, prefix: str) -> int:
    """Count the different numbers after a prefix; misfit() names a missing one among them."""
    return len({number[1] for key in state if (number := re.match(re.escape(prefix) + r"(\d+)\.", key))})


def ratio_of(hidden: int, width: int) -> float:
    """Return the ratio from which the width makes the hidden width again, although ratios are rounded."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
