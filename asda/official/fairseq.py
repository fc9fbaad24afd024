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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from asda.checkpoint.weights import misfit, named
from asda.config.load import keys_of
from asda.config.model import AstConfig, ClassifyConfig, ModelConfig, PretrainConfig, of_asda
from asda.config.presets import DEFAULT_SIZE, PRESETS, SIZES, Tree, filled
from asda.config.run import Description, dump_config
from asda.data.labels import NUM_AUDIOSET_CLASSES, audioset_labels
from asda.errors import UserError
from asda.models.classifier import Classifier
from asda.models.encoder import sincos_positions
from asda.models.pretrain import MaskedStudents
from asda.official import fairseq_settings as settings

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
MEL_BINS = 128
# What fairseq's loader expects beside weights and cfg, as before the first step.
NO_UPDATES: Tree = {"lr_scheduler_state": {}, "num_updates": 0}
FAIRSEQ_FRAME: Tree = {
    "args": None,
    "criterion": None,
    "optimizer_history": [{"criterion_name": "ModelCriterion", "optimizer_name": "FP16Optimizer", **NO_UPDATES}],
    "task_state": {},
    "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
}


class Wishes(NamedTuple):
    """Settings of the user for a file; None leaves one to the file."""

    heads: int | None = None
    mean: float | None = None
    std: float | None = None
    labels: tuple[str, ...] | None = None
    preset: str | None = None  # names the lambda of differential attention, which no checkpoint records


class Converted(NamedTuple):
    """The result of a conversion: what write_weights takes, and notes on what was assumed or left out."""

    description: Description
    weights: dict[str, Weights]
    notes: list[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint that is being read."""

    name: str  # for messages
    state: Tree  # its tensors by name
    wishes: Wishes
    notes: list[str] = field(default_factory=list)

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of a tensor from which sizes are read. Raises UserError."""
        tensor = self.state.get(key)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{self.name} does not fit: {key} is missing")
        if tensor.ndim != ndim or 0 in tensor.shape:
            rule = f"should have {ndim} dimensions, none of them 0"
            raise UserError(f"{self.name} does not fit: {named(key, tensor)} {rule}")
        return tuple(tensor.shape)

    def count(self, prefix: str) -> int:
        """Count the different numbers after a prefix; misfit() names a missing one among them."""
        numbers = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in self.state)
        return len({number[1] for number in numbers if number})

    def heads(self, recorded: int, width: int, why: str) -> int:
        """Return the number of heads: the user's, that of the file, or as in every published model, with a note."""
        if heads := self.wishes.heads or recorded:
            return heads
        self.notes.append(f"heads of 64 features are assumed{why} (--heads)")
        return max(1, width // 64)

    def labels(self, num_classes: int, recorded: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return the names of the classes: the user's, those of the file, AudioSet's by their number, or numbers."""
        given = recorded if self.wishes.labels is None else self.wishes.labels
        if given is not None and len(given) != num_classes:
            raise UserError(f"--labels names {len(given)} classes, the checkpoint has {num_classes}; one name per line")
        if given is not None or num_classes == 0:
            return given or ()
        if num_classes == NUM_AUDIOSET_CLASSES:
            self.notes.append("the labels are AudioSet's, by their number")
            return audioset_labels()
        why = 'have no names in the file: they are called "class 0", ... (--labels)'
        self.notes.append(f"the {num_classes} classes {why}")
        return tuple(f"class {number}" for number in range(num_classes))

    def description(self, preset: str, **sections: Any) -> Description:
        """Make the description of these sections; the preset and the size fill in the rest. Raises UserError."""
        model = sections["model"].items()
        size = next((size for size, values in SIZES.items() if values["model"].items() <= model), DEFAULT_SIZE)
        about = {"what": f"converted from {self.name}"}
        return self.validated(filled({"_about": about, "preset": preset, "size": size, **sections}))

    def validated(self, tree: Tree) -> Description:
        """Check the tree of a description. Raises UserError naming the first invalid value."""
        try:
            return Description.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            first = error.errors()[0]
            where, why = ".".join(map(str, keys_of(first, Description))), first["msg"].removeprefix("Value error, ")
            raise UserError(f"{self.name} describes a model that asda does not have ({where}: {why})") from None

    def check(self, expected: Weights) -> None:
        """Refuse other names and shapes, and all but finite floating-point numbers in memory. Raises UserError."""
        if complaint := misfit(expected, self.state):
            raise UserError(f"{self.name} does not fit: {complaint}")
        for key, tensor in self.state.items():
            there = tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"
            if not (there and bool(tensor.isfinite().all())):
                raise UserError(
                    f"{self.name} holds values in {key} that are not finite numbers; the checkpoint is damaged"
                )


class Layout(NamedTuple):
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


def renamed(name: str, prefixes: list[tuple[str, str]]) -> str:
    """Return a name with the first of our prefixes that it has replaced by theirs."""
    return next((theirs + name.removeprefix(ours) for ours, theirs in prefixes if name.startswith(ours)), name)


def from_official(file: Mapping[str, Any], cfg: Tree, wishes: Wishes, source: str) -> Converted:
    """Translate a checkpoint: {"model": {...}, ...} as torch.load gives it, or the tensors themselves.

    Its cfg comes as plain data ({} if there is none), its file name for messages. Raises UserError if the tensors are
    not those of such a model, or its cfg asks for a network that ours is not.
    """
    content = file["model"] if isinstance(file.get("model"), Mapping) else file
    student = Source(source, {str(key): value for key, value in content.items()}, wishes)
    teacher, notes = student.state.pop("_ema", None), student.notes
    layout = _recognise(student)
    notes += _drop_strangers(student.state)
    description = _recorded(file, student) or _inferred(student, layout, cfg)
    precisions = {str(t.dtype).removeprefix("torch.") for t in student.state.values() if isinstance(t, Tensor)}
    notes += [f"tensors of {precision} became float32" for precision in sorted(precisions - {"float32"})]
    has_decoder = not layout.fine_tuned and not layout.hugging_face
    weights = {"model": _translate(student, description, layout, has_decoder)}
    if isinstance(teacher, Mapping):
        teacher = replace(student, name=f"_ema of {source}", state=dict(teacher))
        notes += [f"_ema: {note}" for note in _drop_strangers(teacher.state)]
        followed = _translate(teacher, description, layout, has_decoder=False)
        weights["teacher"] = {name.removeprefix("encoder."): tensor for name, tensor in followed.items()}
    elif not layout.fine_tuned:
        notes.append("it holds no EMA teacher")
    if layout.hugging_face and not layout.fine_tuned:
        notes.append("it holds no decoder: good for features and fine-tuning, not for the official layout")
    return Converted(description, weights, notes)


def to_official(description: Description, weights: dict[str, Weights]) -> Tree:
    """Return the checkpoint that torch.save should write for the official code; from_official reads it back.

    The weights are "model", and "teacher" if there is one. Raises UserError if the official code cannot compute this
    model, or a part of it is missing.
    """
    model = _expressible(description)
    fine_tuned = isinstance(description.objective, ClassifyConfig)
    layout = Layout(fine_tuned, hugging_face=False, joined_qkv=model.attention_lambda == "absent")
    if complaint := misfit(parameters_on_meta(description), weights["model"]):
        raise UserError(f"the weights are not whole: {complaint}")
    state: Tree = _join(weights["model"], model, layout)
    if "teacher" in weights:
        state["_ema"] = _join({f"encoder.{key}": tensor for key, tensor in weights["teacher"].items()}, model, layout)
    return {
        **FAIRSEQ_FRAME,
        "cfg": settings.official_cfg(description),
        "model": state,
        "asda": dump_config(description),  # fairseq ignores it; from_official reads it back
    }


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


def official_positions(rows: int, columns: int, width: int) -> Tensor:
    """Compute sincos_positions as the official code does, less exactly: [1, rows * columns, width] in fp32."""
    num_waves = width // 4
    frequency_W = 1 / 10000 ** (np.arange(num_waves, dtype=np.float32) / np.float32(num_waves))
    row_N, column_N = (axis.ravel().astype(np.float32) for axis in np.indices((rows, columns)))
    phases = [np.outer(column_N, frequency_W), np.outer(row_N, frequency_W)]
    table_ND = np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table_ND)[None]


def _recognise(source: Source) -> Layout:
    state = source.state
    for fine_tuned, hugging_face in ((False, False), (True, False), (False, True)):
        layout = Layout(fine_tuned, hugging_face, joined_qkv=any(".attn.qkv." in key for key in state))
        if layout.key("encoder.cls_token") in state:
            return layout._replace(fine_tuned=fine_tuned or "model.head.weight" in state)
    if "encoder.cls_token" in state:
        raise UserError(f"{source.name} holds weights in asda's own layout; --to official writes the official one")
    found = ", ".join(named(key, value) for key, value in list(state.items())[:3]) or "nothing"
    raise UserError(
        f"{source.name} is not a checkpoint of EAT, ASDA or SSLAM: {IMAGE}extra_tokens is missing; it begins with "
        f"{found}"
    )


def _recorded(file: Mapping[str, Any], source: Source) -> Description | None:
    """Return the description that to_official left in the file, with the user's changes."""
    if not isinstance(file.get("asda"), str):
        return None
    wishes = source.wishes
    try:
        tree = json.loads(file["asda"])
        tree["data"]["log_mel"] |= {} if wishes.mean is None else {"mean": wishes.mean}
        tree["data"]["log_mel"] |= {} if wishes.std is None else {"std": wishes.std}
        tree["model"] |= {"heads": wishes.heads} if wishes.heads else {}
        tree["labels"] = source.labels(len(tree["labels"]), tuple(tree["labels"]))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{source.name} has a damaged description of its model; convert its weights again") from None
    return source.validated(tree)


def _inferred(source: Source, layout: Layout, cfg: Tree) -> Description:
    """Make a description from the shapes, the cfg, and the preset and size that they suggest."""
    wishes, notes = source.wishes, source.notes
    notes += settings.check_cfg(cfg, source.name)
    preset = "eat" if layout.joined_qkv else wishes.preset or "released"
    attention = {key: value for key, value in PRESETS[preset]["model"].items() if key != "mlp_ratio"}
    model = _model_tree(source, layout, cfg) | attention
    if not layout.joined_qkv:
        notes.append(f"lambda {model['attention_lambda']} is that of preset {preset}: no checkpoint records it")
    num_classes = source.shape(layout.key("head.weight"), 2)[0] if layout.fine_tuned else 0
    data, recipe = settings.input_tree(cfg, num_classes, wishes.mean, wishes.std)
    if wishes.mean is None or wishes.std is None:
        notes.append(
            f"log-mel mean {recipe.mean} and std {recipe.std} are those of {recipe.name}: "
            "no checkpoint records them (--mean, --std)"
        )
    objective = settings.classify_tree(cfg) if layout.fine_tuned else _pretrain_tree(source, layout, cfg, model)
    return source.description(preset, objective=objective, data=data, model=model, labels=source.labels(num_classes))


def _model_tree(source: Source, layout: Layout, cfg: Tree) -> Tree:
    width = source.shape(layout.key("encoder.cls_token"), 3)[-1]
    patch = source.shape(layout.key("encoder.patch_embed.weight"), 4)[-1]
    num_positions = source.shape(layout.key(POSITIONS), 3)[1]
    hidden = source.shape(layout.key("encoder.blocks.0.mlp.fc1.weight"), 2)[0]
    recorded = settings.number(settings.model_section(cfg), "num_heads", 0)
    return {
        "width": width,
        "depth": source.count(layout.key("encoder.blocks.")),
        "heads": source.heads(recorded, width, ": neither the shapes nor a cfg tell"),
        "mlp_ratio": ratio_of(hidden, width),
        "patch": patch,
        "max_time_patches": max(1, num_positions // max(1, MEL_BINS // patch)),
    }


def _pretrain_tree(source: Source, layout: Layout, cfg: Tree, model: Tree) -> Tree:
    """Read the objective from the cfg, its decoder from the shapes; presets fill in the rest."""
    tree = {"target_layers": model["depth"]} | settings.pretrain_tree(cfg)
    first = source.state.get(layout.key("decoder.convs.0.weight"))
    if isinstance(first, Tensor) and first.ndim == 4 and 0 not in first.shape:
        tree["decoder"] = tree.get("decoder", {}) | {
            "layers": source.count(layout.key("decoder.convs.")),
            "width": first.shape[0],
            "kernel": first.shape[-1],
            "groups": max(1, model["width"] // first.shape[1]),
        }
    return tree


def ratio_of(hidden: int, width: int) -> float:
    """Return the ratio from which the width makes the hidden width again, although ratios are rounded."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


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


def _translate(source: Source, description: Description, layout: Layout, has_decoder: bool) -> Weights:
    """Make our parameters from theirs, in fp32, as copies."""
    model, expected = of_asda(description.model), parameters_on_meta(description)
    if not has_decoder:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("decoder.")}
    source.check(_join(expected, model, layout))
    _check_positions(source.state[layout.key(POSITIONS)][0], model, source.name)
    ours: Weights = {}
    for name, tensor in expected.items():
        theirs = source.state[layout.key(name)]  # all rows are ours, except in EAT's qkv: qk, then v
        rows = theirs[-len(tensor) :] if ".v." in name else theirs[: len(tensor)]
        ours[name] = rows.reshape(tensor.shape).to(torch.float32, copy=True)
    return ours


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
