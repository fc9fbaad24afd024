"""Convert weights of AST from the layout of Hugging Face to ours. Nothing here opens a file.

    with a classifier   {"audio_spectrogram_transformer." + NAME: tensor, ..., "classifier...": tensor}
    without             {NAME: tensor, ...}

Names are those of the published files (encoder.layer.0.attention.attention.query.weight, ...). Our queries and keys
are one matrix; everything else only has another name. Sizes come from the shapes or else from config.json, the
statistics of the log-mel from preprocessor_config.json.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from asda.config.presets import Tree
from asda.config.run import Description
from asda.errors import UserError
from asda.official.fairseq import Converted, Source, Weights, Wishes, parameters_on_meta, ratio_of, renamed

PREFIX = "audio_spectrogram_transformer."
EMBEDDINGS = "embeddings."
POSITIONS = EMBEDDINGS + "position_embeddings"
OURS_TO_THEIRS = [
    ("encoder.cls_token", EMBEDDINGS + "cls_token"),
    ("encoder.dist_token", EMBEDDINGS + "distillation_token"),
    ("encoder.positions", POSITIONS),
    ("encoder.patch_embed.", EMBEDDINGS + "patch_embeddings.projection."),
    ("encoder.norm.", "layernorm."),
    ("norm.", "classifier.layernorm."),
    ("head.", "classifier.dense."),
]
OF_A_BLOCK = [
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("attn.qk.", "attention.attention.query."),  # and, with the same end, attention.attention.key.
    ("attn.v.", "attention.attention.value."),
    ("attn.proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
]
# What config.json must say about the network, because ours has it fixed
FIXED: Tree = {"num_mel_bins": 128, "hidden_act": "gelu", "qkv_bias": True}
# By number of classes, of the published recipes: the loss; the statistics of the log-mel
BCE_CLASSES = (527, 35)  # AudioSet, Speech Commands V2
LOG_MEL = {35: (-6.845978, 5.5654526), 50: (-6.6268077, 5.358466)}  # of Speech Commands V2 and ESC-50
AUDIOSET_LOG_MEL = (-4.2677393, 4.5689974)


def is_ast(state: Mapping[str, Any]) -> bool:
    """Return whether these tensors are an AST in the layout of Hugging Face."""
    return any(key.removeprefix(PREFIX) == EMBEDDINGS + "distillation_token" for key in state)


def from_hugging_face(
    state: Mapping[str, Any], config: Tree, preprocessor: Tree, wishes: Wishes, source: str
) -> Converted:
    """Translate the tensors of an AST; their file has this name, for messages.

    config.json and preprocessor_config.json beside them are {} if they are missing. Raises UserError if the tensors
    are not those of an AST, or config.json asks for a network that ours is not.
    """
    for key, ours in FIXED.items():
        if config.get(key, ours) != ours:
            raise UserError(f"{source} was made with {key} {config[key]}; asda's AST has {ours}")
    theirs = Source(source, {key.removeprefix(PREFIX): value for key, value in state.items()}, wishes)
    description = _described(theirs, config, preprocessor)
    expected = parameters_on_meta(description)
    if not description.labels:
        expected = {name: tensor for name, tensor in expected.items() if name.startswith("encoder.")}
        theirs.notes.append("it has no classifier: good for features and fine-tuning")
    return Converted(description, {"model": _translated(theirs, expected)}, theirs.notes)


def _described(source: Source, config: Tree, preprocessor: Tree) -> Description:
    model, wishes, head = _model_tree(source, config), source.wishes, "classifier.dense.weight"
    classes = source.shape(head, 2)[0] if head in source.state else 0
    published = LOG_MEL.get(classes, AUDIOSET_LOG_MEL)
    mean, std = preprocessor.get("mean", published[0]), preprocessor.get("std", published[1])
    if "mean" not in preprocessor and wishes.mean is None:
        source.notes.append(
            f"log-mel mean {mean} and std {std} are assumed, there is no preprocessor_config.json (--mean, --std)"
        )
    mean, std = (given if given is not None else found for given, found in ((wishes.mean, mean), (wishes.std, std)))
    return source.description(
        "ast",
        objective={"kind": "classify", "init_from": "", "loss": _loss(config, classes, source.notes)},
        data={"frames": model["frames"], "log_mel": {"mean": mean, "std": std}},
        model=model,
        labels=source.labels(classes, _named_labels(config, classes)),
    )


def _model_tree(source: Source, config: Tree) -> Tree:
    width, _, _, patch = source.shape(EMBEDDINGS + "patch_embeddings.projection.weight", 4)
    hidden = source.shape("encoder.layer.0.intermediate.dense.weight", 2)[0]
    recorded = _whole(config, "num_attention_heads", source.name)
    model = {
        "architecture": "ast",
        "width": width,
        "depth": source.count("encoder.layer."),
        "heads": source.heads(recorded, width, ", no config.json says num_attention_heads"),
        "mlp_ratio": ratio_of(hidden, width),
        "patch": patch,
        "time_stride": _whole(config, "time_stride", source.name) or 10,
        "mel_stride": _whole(config, "frequency_stride", source.name) or 10,
        "norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    num_patches = source.shape(POSITIONS, 3)[1] - 2
    return model | {"frames": _whole(config, "max_length", source.name) or _frames(num_patches, model)}


def _frames(num_patches: int, model: Tree) -> int:
    """Return the fewest frames that are whole patches of the data and give this number of positions."""
    bands = max(1, (FIXED["num_mel_bins"] - model["patch"]) // model["mel_stride"] + 1)
    fewest = (num_patches // bands - 1) * model["time_stride"] + model["patch"]
    return math.ceil(fewest / model["patch"]) * model["patch"]


def _whole(config: Tree, key: str, source: str) -> int:
    """Return a whole number above 0, or 0 if config.json has no such key. Raises UserError."""
    if key not in config:
        return 0
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{key} {json.dumps(value)} in the config.json of {source} must be a whole number above 0; correct it, or "
            "fetch the file again"
        )
    return value


def _loss(config: Tree, classes: int, notes: list[str]) -> str:
    """Return the loss that config.json names, or that of the published recipe for this number of classes."""
    kinds = {"single_label_classification": "ce", "multi_label_classification": "bce"}
    if config.get("problem_type") in kinds:
        return kinds[config["problem_type"]]
    if classes and classes not in BCE_CLASSES:
        notes.append("cross-entropy is assumed: config.json has no problem_type")
    return "bce" if classes in BCE_CLASSES else "ce"


def _named_labels(config: Tree, classes: int) -> tuple[str, ...] | None:
    """Return the class names of config.json, if it has one for each class."""
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(classes)}:
        return None
    return tuple(str(names[str(number)]) for number in range(classes))


def _translated(source: Source, expected: Weights) -> Weights:
    """Make our parameters from theirs, in fp32, as copies."""
    keys = {name: _keys(name) for name in expected}
    wanted: Weights = {}
    for name, tensor in expected.items():
        wanted |= zip(keys[name], tensor.tensor_split(len(keys[name])), strict=True)
    wanted[POSITIONS] = wanted[POSITIONS][None]
    source.check(wanted)
    joined = {name: torch.cat([source.state[key].float() for key in keys[name]]) for name in expected}
    return {name: tensor.reshape(expected[name].shape).contiguous() for name, tensor in joined.items()}


def _keys(ours: str) -> list[str]:
    """Return their names for one of our parameters, in the order of its parts."""
    key = renamed(ours, OURS_TO_THEIRS)
    if block := re.match(r"encoder\.blocks\.(\d+)\.", ours):
        key = f"encoder.layer.{block[1]}." + renamed(ours.removeprefix(block[0]), OF_A_BLOCK)
    return [key, key.replace(".query.", ".key.")] if ".query." in key else [key]
