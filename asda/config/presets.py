"""Published recipes by name, so that a configuration need not spell them out.

    {"preset": "eat", "size": "large", "model": {"mlp_ratio": 3.5}, ...}

A preset is a network function, a size its dimensions. Both also set the values of the pre-training objective that were
published with them. Values in the configuration win, and checkpoints record every value beside the names.
"""

from typing import Any

Tree = dict[str, Any]


def _asda(attention_lambda: Any, norm: str, scale: Any, mlp_ratio: float = 3.5, utterance_weight: float = 96.0) -> Tree:
    """Return a preset of ASDA's network; its weight is 0.5, summed over 12 clips x 16 students."""
    attention = {"attention_lambda": attention_lambda, "attention_norm": norm, "attention_scale": scale}
    return {
        "model": {"architecture": "asda", "mlp_ratio": mlp_ratio, **attention},
        "objective": {"utterance_weight": utterance_weight},
    }


PRESETS: dict[str, Tree] = {
    "released": _asda(0.1, "joint", 0.95),  # ASDA as its published code computes it: 49.0 mAP on AS-2M
    "paper": _asda(0.3, "joint", 0.95),  # ASDA as its paper describes it
    # ASDA with the attention of the Differential Transformer (Ye et al., 2024): lambda is learned, each head normalised
    "learned": _asda("learned", "per_head", "by_depth"),
    # EAT (Chen et al., IJCAI 2024), which has ordinary attention; SSLAM has the same network. The weight is 1, summed
    # over 12 clips x 16 students
    "eat": _asda("absent", "none", 1.0, mlp_ratio=4.0, utterance_weight=192.0),
    # The Audio Spectrogram Transformer (Gong et al., Interspeech 2021), and HAM-AST with its model.conformer and
    # model.channel_attention
    "ast": {"model": {"architecture": "ast", "mlp_ratio": 4.0}},
}


def _size(
    width: int, depth: int, heads: int, layers: int = 6, kernel: int = 3, mask: Any = (0.8, 0.07), anneal: int = 100_000
) -> Tree:
    """Return the dimensions of a network and the objective published with them; the defaults are those of base."""
    return {
        "model": {"width": width, "depth": depth, "heads": heads},
        "objective": {
            "target_layers": depth,
            "mask": {"ratio": mask[0], "adjust": mask[1], "block": 5},
            "ema": {"decay": 0.9998, "end_decay": 0.99999, "anneal_steps": anneal},
            "decoder": {"layers": layers, "width": width, "kernel": kernel, "groups": 16},
        },
    }


SIZES: dict[str, Tree] = {
    "tiny": _size(192, 12, 3),  # ours; the widths of DeiT-tiny and -small
    "small": _size(384, 12, 6),  # ours
    "base": _size(768, 12, 12),
    "large": _size(1024, 24, 16, layers=3, kernel=5, mask=(0.75, 0.1), anneal=150_000),  # EAT-large
}

DEFAULT_PRESET = "released"
DEFAULT_SIZE = "base"
DEFAULT_FRAMES = 1024  # as data.frames


def filled(tree: Tree) -> Tree:
    """Fill in the values of the preset and the size that a configuration does not give.

    An unknown name fills in nothing; the check of the configuration reports it. If the architecture is not that of the
    preset, the preset fills in nothing either.
    """
    architecture = at(tree, "model.architecture")
    given = {"preset": "ast" if architecture == "ast" else DEFAULT_PRESET} | tree
    preset, size = (
        table.get(name, {}) if isinstance(name, str) else {}
        for table, name in ((PRESETS, given["preset"]), (SIZES, tree.get("size", DEFAULT_SIZE)))
    )
    defaults = size if architecture not in (None, at(preset, "model.architecture")) else merged(size, preset)
    if at(tree, "objective.kind") != "pretrain":
        defaults = {key: section for key, section in defaults.items() if key != "objective"}
    whole = merged(defaults, given)
    if at(whole, "model.architecture") == "ast" and "frames" not in whole["model"]:  # for which positions are learned
        whole["model"] = whole["model"] | {"frames": at(whole, "data.frames") or DEFAULT_FRAMES}
    return whole


def departures(tree: Tree) -> list[str]:
    """List how a complete configuration departs from its preset and size: 'model.depth 6 (base: 12)'."""
    return [
        f"{dotted} {value} ({name}: {published})"
        for name, table in ((tree["preset"], PRESETS), (tree["size"], SIZES))
        for dotted, published in _leaves(table[name]).items()
        if (value := at(tree, dotted)) not in (None, published)
    ]


def at(tree: Any, dotted: str) -> Any:
    """Return the value at a dotted key; None if it is missing, as masks are in a classifier's objective."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def merged(defaults: Any, given: Any) -> Any:
    """Return the given tree with the defaults that it lacks, at any depth."""
    if not isinstance(defaults, dict) or not isinstance(given, dict):
        return given
    return defaults | {key: merged(defaults[key], value) if key in defaults else value for key, value in given.items()}


def _leaves(tree: Tree, prefix: str = "") -> Tree:
    leaves: Tree = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
