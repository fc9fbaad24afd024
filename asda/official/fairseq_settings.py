"""Read the settings of the official EAT, ASDA and SSLAM code from a cfg, and write them to one.

A cfg is the tree that fairseq keeps beside the weights, here as plain data. presets.py fills in what it leaves out.
A fine-tuned checkpoint carries the cfg of its pre-training inside its own.
"""

import math
from typing import Any, NamedTuple

from asda.config.model import ClassifyConfig, PretrainConfig, of_asda
from asda.config.presets import Tree, at, filled, merged
from asda.config.run import Description
from asda.data.labels import NUM_AUDIOSET_CLASSES
from asda.errors import UserError

IMAGE = "modalities.image."
DECODER = IMAGE + "decoder."
# If the model section has one of these keys, it must have this value, or the encoder is not ours.
ENCODER_CFG = {
    "layer_norm_first": False,
    "norm_eps": 1e-6,
    "norm_affine": True,
    IMAGE + "in_chans": 1,
    IMAGE + "prenet_depth": 0,
    IMAGE + "num_extra_tokens": 1,
    IMAGE + "fixed_positions": True,
    IMAGE + "use_alibi_encoder": False,
}
# The same for pre-training; features and fine-tuning do not depend on it.
PRETRAINING_CFG = {
    "instance_norm_target_layer": True,
    **dict.fromkeys(("layer_norm_target_layer", "batch_norm_target_layer"), False),
    "layer_norm_targets": True,
    **dict.fromkeys(("instance_norm_targets", "end_of_block_targets"), False),
    "loss_beta": 0.0,
    "d2v_loss": 1.0,
    "recon_loss": 0.0,
    **dict.fromkeys(("utterance_level", "ema_encoder_only"), False),
    **dict.fromkeys((IMAGE + "inverse_mask", IMAGE + "ema_local_encoder", DECODER + "decoder_residual"), True),
    **dict.fromkeys((DECODER + "add_positions_masked", DECODER + "add_positions_all"), False),
}
# Their key in the model section, and ours in the objective section of pre-training
OBJECTIVE_KEYS = {
    "average_top_k_layers": "target_layers",
    "clone_batch": "students",
    "ema_decay": "ema.decay",
    "ema_end_decay": "ema.end_decay",
    "ema_anneal_end_step": "ema.anneal_steps",
    IMAGE + "mask_prob": "mask.ratio",
    IMAGE + "mask_prob_adjust": "mask.adjust",
    IMAGE + "mask_length": "mask.block",
    IMAGE + "mask_noise_std": "decoder.noise_std",
    DECODER + "decoder_dim": "decoder.width",
    DECODER + "decoder_groups": "decoder.groups",
    DECODER + "decoder_kernel": "decoder.kernel",
    DECODER + "decoder_layers": "decoder.layers",
}
# What else fairseq must find to build the model: its own defaults are those of another model.
LOADING_CFG = {
    "_name": "data2vec_multi",
    "supported_modality": "IMAGE",
    **dict.fromkeys(("encoder_dropout", "post_mlp_drop", "attention_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("dropout_input", "layerdrop", "start_drop_path_rate", "end_drop_path_rate"), 0.0),
    **dict.fromkeys(("min_target_var", "min_pred_var"), 0.0),
    "skip_ema": False,
    "seed": 1,
    "modalities._name": None,
    IMAGE + "type": "IMAGE",
    IMAGE + "input_size": 224,
    **dict.fromkeys((IMAGE + "start_drop_path_rate", IMAGE + "end_drop_path_rate"), 0.0),
    **dict.fromkeys((IMAGE + "prenet_layerdrop", IMAGE + "prenet_dropout", DECODER + "input_dropout"), 0.0),
    IMAGE + "init_extra_token_zero": False,
    DECODER + "projection_layers": 1,
}
TASK_CFG = {"data": "", "key": "source", "rebuild_batches": True, "audio_mae": True, "downsr_16hz": True, "seed": 1}
POOLINGS = {"MEAN_POOLING": "mean", "CLS_TOKEN": "cls", "LIN_SOFTMAX": "linear_softmax"}  # numbered from 1 in pickles
PUBLISHED_BATCH = 12  # clips per GPU; the official utterance term is a sum over them, ours a mean
OFFICIAL_ASDA_MLP_RATIO = 4.0  # what ASDA's configuration says; its code makes 3.5 of it


class InputRecipe(NamedTuple):
    """Settings of the official data code for a dataset; they stand in that code, not in checkpoints."""

    name: str
    flag: str  # in the cfg
    classes: int
    frames: int
    mean: float
    std: float
    pads_with_mean: bool = False


# Constants of the EAT and ASDA repositories (data/raw_audio_dataset.py). ASDA pads FSD50K after the normalisation,
# which is padding with the mean before it.
AUDIOSET = InputRecipe("AudioSet", "", NUM_AUDIOSET_CLASSES, 1024, -4.268, 4.569)
OTHER_INPUTS = [
    InputRecipe("ESC-50", "esc50_eval", 50, 512, -6.627, 5.359),
    InputRecipe("Speech Commands 2", "spcv2_eval", 35, 128, -6.846, 5.565),
    InputRecipe("FSD50K", "fsd50k_eval", 200, 1024, -7.966, 4.753, pads_with_mean=True),
]


def check_cfg(cfg: Tree, source: str) -> list[str]:
    """Return notes on how the pre-training differed from ours. Raises UserError if the encoder is not ours."""
    model, notes = model_section(cfg), []
    for key, ours in (ENCODER_CFG | PRETRAINING_CFG).items():
        theirs = at(model, key)
        if not isinstance(theirs, int | float) or theirs == ours:
            continue
        if key in ENCODER_CFG:
            raise UserError(f"{source} was made with model.{key} {theirs}; asda's encoder has {ours}")
        notes.append(f"pre-trained with model.{key} {theirs}, where asda has {ours}; the encoder does not depend on it")
    return notes


def model_section(cfg: Tree) -> Tree:
    """Return the section of the encoder and its pre-training, or {}."""
    return _section(_pretraining(cfg), "model")


def number(tree: Tree, key: str, default: Any) -> Any:
    """Return a number, or the default if it is missing or a reference that only fairseq can follow."""
    value = tree.get(key)
    return value if _is_number(value) else default


def pretrain_tree(cfg: Tree) -> Tree:
    """Make our objective section, without the decoder's sizes, which are in the weights."""
    model = model_section(cfg)
    found = {ours: at(model, theirs) for theirs, ours in OBJECTIVE_KEYS.items() if not theirs.startswith(DECODER)}
    factors = [model.get("cls_loss"), at(_pretraining(cfg), "dataset.batch_size"), model.get("clone_batch")]
    if all(map(_is_number, factors)):
        found["utterance_weight"] = math.prod(map(float, factors))
    return {"kind": "pretrain", **_nested({key: value for key, value in found.items() if _is_number(value)})}


def classify_tree(cfg: Tree) -> Tree:
    """Make our objective section for a fine-tuned checkpoint."""
    settings = _section(cfg, "model")
    # The official classifier takes the cross-entropy for single labels, except with mixup on Speech Commands.
    mixed = number(settings, "mixup", 0.0) > 0
    single = settings.get("esc50_eval") is True or (settings.get("spcv2_eval") is True and not mixed)
    return {
        "kind": "classify",
        "init_from": "",
        "loss": "ce" if single else "bce",
        "pooling": _pooling(settings.get("prediction_mode")),
        "label_smoothing": number(settings, "label_smoothing", 0.0) if single else 0.0,
        "drop_path": number(settings, "drop_path_rate", 0.0),
        "layer_decay": number(settings, "layer_decay", 0.0) or 1.0,  # 0 means none
    }


def input_tree(cfg: Tree, num_classes: int, mean: float | None, std: float | None) -> tuple[Tree, InputRecipe]:
    """Make our data section for the dataset that the cfg names or, without a cfg, the number of classes suggests.

    The mean and std of the log-mel are those that the user gave. The second result is the recipe that fills in others.
    """
    sections = [_section(cfg, "model"), _section(cfg, "task"), _section(_pretraining(cfg), "task")]
    flagged = [recipe for recipe in OTHER_INPUTS if any(part.get(recipe.flag) is True for part in sections[:2])]
    by_classes = [] if cfg else [recipe for recipe in OTHER_INPUTS if recipe.classes == num_classes]
    recipe = [*flagged, *by_classes, AUDIOSET][0]
    mean = recipe.mean if mean is None else mean
    tree = {
        "frames": next(filter(_is_number, (part.get("target_length") for part in sections)), recipe.frames),
        "log_mel": {"mean": mean, "std": recipe.std if std is None else std},
        "pad_log_mel": mean if recipe.pads_with_mean else 0.0,
    }
    return tree, recipe


def _pooling(mode: Any) -> str:
    """Translate a mode given by name (with or without its class) or number; the default is the class token."""
    name = "CLS_TOKEN" if mode is None else str(mode).rpartition(".")[2]
    if name.isdecimal() and 1 <= int(name) <= len(POOLINGS):
        name = list(POOLINGS)[int(name) - 1]
    if name not in POOLINGS:
        raise UserError(f"the cfg has model.prediction_mode {mode}; asda knows {', '.join(POOLINGS)}")
    return POOLINGS[name]


def official_cfg(description: Description) -> Tree:
    """Make the cfg from which fairseq rebuilds a model, with everything that changes what it computes."""
    objective, frames = description.objective, description.data.frames
    if isinstance(objective, PretrainConfig):
        return _pretraining_cfg(description, objective)
    tree = {"preset": description.preset, "size": description.size, "objective": {"kind": "pretrain"}}
    assumed = filled(tree)["objective"] | {"target_layers": description.model.depth}
    pretraining = _pretraining_cfg(description, PretrainConfig.model_validate(assumed))
    flags = _flags(description, objective)
    model = {
        "_name": "mae_image_classification",
        "model_path": "",
        "pretrained_model_args": pretraining | {"criterion": None, "lr_scheduler": None},
        "data": "",
        "num_classes": len(description.labels),
        "prediction_mode": next(theirs for theirs, ours in POOLINGS.items() if ours == objective.pooling),
        "use_fc_norm": True,
        "norm_eps": None,
        "audio_mae": True,
        "target_length": frames,
        "mixup": 0.0,
        "label_smoothing": objective.label_smoothing,
        "drop_path_rate": objective.drop_path,
        "layer_decay": objective.layer_decay,
        **flags,
    }
    task = {"_name": "mae_image_classification", "target_length": frames, **TASK_CFG, **flags}
    return {**pretraining, "task": task, "model": model}


def _pretraining_cfg(description: Description, objective: PretrainConfig) -> Tree:
    model, frames, steps = of_asda(description.model), description.data.frames, objective.ema.anneal_steps
    settings = objective.model_dump()
    network = {
        "depth": model.depth,
        "num_heads": model.heads,
        "embed_dim": model.width,
        "mlp_ratio": model.mlp_ratio if model.attention_lambda == "absent" else OFFICIAL_ASDA_MLP_RATIO,
        "cls_loss": objective.utterance_weight / (PUBLISHED_BATCH * objective.students),
        "max_update": steps,
        IMAGE + "patch_size": model.patch,
        IMAGE + "embed_dim": model.width,
        IMAGE + "target_length": frames,
        IMAGE + "max_length": model.max_time_patches,
        IMAGE + "num_alibi_heads": model.heads,
        IMAGE + "model_depth": model.depth,
        **{theirs: at(settings, ours) for theirs, ours in OBJECTIVE_KEYS.items()},
    }
    return {
        "common": {"seed": 1},
        "task": {"_name": "mae_image_pretraining", "target_length": frames, **TASK_CFG},
        "dataset": {"batch_size": PUBLISHED_BATCH},
        "criterion": {"_name": "model"},
        "optimization": {"max_update": steps},
        "lr_scheduler": "pass_through",
        "model": _nested(LOADING_CFG | ENCODER_CFG | PRETRAINING_CFG | network),
    }


def input_notes(description: Description) -> list[str]:
    """Return notes on what the official data code does differently: its constants are not in checkpoints."""
    data, objective = description.data, description.objective
    flags = _flags(description, objective) if isinstance(objective, ClassifyConfig) else {}
    recipe = next((recipe for recipe in OTHER_INPUTS if flags.get(recipe.flag)), AUDIOSET)
    mean, std, notes = data.log_mel.mean, data.log_mel.std, []
    if (mean, std) != (recipe.mean, recipe.std):
        notes.append(
            f"the official code will normalise by {recipe.name}'s mean {recipe.mean} and std {recipe.std}, this model "
            f"wants {mean:g} and {std:g}: put them into its data/raw_audio_dataset.py"
        )
    if data.padding == "masked" or data.pad_log_mel:
        how = "hides padding from the network" if data.padding == "masked" else f"pads with {data.pad_log_mel:g}"
        notes.append(f"the official code pads with a log-mel of 0, which its network sees; this model {how}")
    return notes


def _flags(description: Description, objective: ClassifyConfig) -> dict[str, bool]:
    """Return the flags that tell the official code the dataset."""
    log_mel = description.data.log_mel
    flags = {recipe.flag: (log_mel.mean, log_mel.std) == (recipe.mean, recipe.std) for recipe in OTHER_INPUTS[:2]}
    flags["esc50_eval"] |= objective.loss == "ce" and not flags["spcv2_eval"]  # it also chooses the cross-entropy
    return flags


def _pretraining(cfg: Tree) -> Tree:
    places = (at(cfg, "model.pretrained_model_args"), at(cfg, "pretrained_model_args"))
    return next((inner for inner in places if isinstance(inner, dict)), cfg)


def _section(tree: Tree, key: str) -> Tree:
    section = tree.get(key)
    return section if isinstance(section, dict) else {}


def _nested(leaves: Tree) -> Tree:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: Tree = {}
    for dotted, value in leaves.items():
        for key in reversed(dotted.split(".")):
            value = {key: value}
        tree = merged(tree, value)
    return tree


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
