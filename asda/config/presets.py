"""Published recipes by name, so that a configuration need not spell them out.

    {"preset": "eat", "size": "large", "model": {"mlp_ratio": 3.5}, ...}

A preset is a network function, a size its dimensions. Both also set the values of the pre-training objective that were
published with them. Values in the configuration win, and checkpoints record every value beside the names.
"""

from typing import Any

Tree = dict[str, Any]

_ASDA: Tree = {
    "architecture": "asda",
    "mlp_ratio": 3.5,
    "attention_lambda": 0.1,
    "attention_norm": "joint",
    "attention_scale": 0.95,
}
# The Differential Transformer (Ye et al., 2024) learns lambda and normalises each head
_LEARNED: Tree = {"attention_lambda": "learned", "attention_norm": "per_head", "attention_scale": "by_depth"}
_ORDINARY: Tree = {"attention_lambda": "absent", "attention_norm": "none", "attention_scale": 1.0, "mlp_ratio": 4.0}
_WEIGHT: Tree = {"utterance_weight": 96.0}  # 0.5, summed over 12 clips x 16 students

PRESETS: dict[str, Tree] = {
    # ASDA as its published code computes it: 49.0 mAP on AS-2M
    "released": {"model": _ASDA, "objective": _WEIGHT},
    # ASDA as its paper describes it
    "paper": {"model": _ASDA | {"attention_lambda": 0.3}, "objective": _WEIGHT},
    # ASDA with the attention of the Differential Transformer
    "learned": {"model": _ASDA | _LEARNED, "objective": _WEIGHT},
    # EAT (Chen et al., IJCAI 2024), which has ordinary attention; SSLAM has the same network. The weight is 1, summed
    # over 12 clips x 16 students
    "eat": {"model": _ASDA | _ORDINARY, "objective": {"utterance_weight": 192.0}},
    # The Audio Spectrogram Transformer (Gong et al., Interspeech 2021), and HAM-AST with its model.conformer and
    # model.channel_attention
    "ast": {"model": {"architecture": "ast", "mlp_ratio": 4.0}},
}

_BASE_OBJECTIVE: Tree = {
    "target_layers": 12,
    "mask": {"ratio": 0.8, "adjust": 0.07, "block": 5},
    "ema": {"decay": 0.9998, "end_decay": 0.99999, "anneal_steps": 100_000},
}


def _of_base_depth(width: int, heads: int) -> Tree:
    """Return the published base recipe at a width: 12 blocks of 64-wide heads, a decoder of 6 layers."""
    decoder = {"layers": 6, "width": width, "kernel": 3, "groups": 16}
    return {
        "model": {"width": width, "depth": 12, "heads": heads},
        "objective": {**_BASE_OBJECTIVE, "decoder": decoder},
    }


SIZES: dict[str, Tree] = {
    "tiny": _of_base_depth(192, 3),  # ours; the widths of DeiT-tiny and -small
    "small": _of_base_depth(384, 6),  # ours
    "base": _of_base_depth(768, 12),
    "large": {  # EAT-large
        "model": {"width": 1024, "depth": 24, "heads": 16},
        "objective": {
            "target_layers": 24,
            "mask": {"ratio": 0.75, "adjust": 0.1, "block": 5},
            "decoder": {"layers": 3, "width": 1024, "kernel": 5, "groups": 16},
            "ema": {"decay": 0.9998, "end_decay": 0.99999, "anneal_steps": 150_000},
        },
    },
}

DEFAULT_PRESET = "released"
DEFAULT_SIZE = "base"
DEFAULT_FRAMES = 1024  # as data.frames


def filled(tree: Tree) -> Tree:
    """Fill in the values of the preset and the size that a configuration does not give."""
    given = {"preset": _preset_of(tree)} | tree
    defaults = _defaults(given["preset"], tree.get("size", DEFAULT_SIZE), _at(tree, "model.architecture"))
    objective = tree.get("objective")
    if not isinstance(objective, dict) or objective.get("kind") != "pretrain":
        defaults.pop("objective", None)
    whole = _merged(defaults, given)
    if _at(whole, "model.architecture") == "ast" and "frames" not in whole["model"]:  # for which positions are learned
        whole["model"] = whole["model"] | {"frames": _at(whole, "data.frames") or DEFAULT_FRAMES}
    return whole


def _preset_of(tree: Tree) -> Any:
    """Return the name of the preset; if it is not given, the default one of the architecture."""
    return tree.get("preset", "ast" if _at(tree, "model.architecture") == "ast" else DEFAULT_PRESET)


def departures(tree: Tree) -> list[str]:
    """List how a complete configuration departs from its preset and size: 'model.depth 6 (base: 12)'."""
    found = []
    for name, source in ((tree["preset"], PRESETS), (tree["size"], SIZES)):
        for dotted, published in _leaves(source[name]).items():
            value = _at(tree, dotted)
            if value is not None and value != published:
                found.append(f"{dotted} {value} ({name}: {published})")
    return found


def _defaults(preset: Any, size: Any, architecture: Any) -> Tree:
    """Merge both tables. An unknown name gives an empty one, which the check of the configuration reports.

    The model of the preset is left out if the configuration has another architecture.
    """
    of_preset = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    if architecture not in (None, _at(of_preset, "model.architecture")):
        of_preset = {"model": {}}
    of_size = SIZES.get(size, {}) if isinstance(size, str) else {}
    return _merged(of_size, of_preset)


def _merged(defaults: Any, given: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(given, dict):
        return given
    return {key: _merged(defaults[key], given[key]) if key in given else defaults[key] for key in defaults} | {
        key: value for key, value in given.items() if key not in defaults
    }


def _leaves(tree: Tree, prefix: str = "") -> Tree:
    leaves: Tree = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _at(tree: Any, dotted: str) -> Any:
    """Return the value at a dotted key; None if it is missing, as masks are in a classifier's objective."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
