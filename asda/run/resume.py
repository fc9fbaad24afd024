"""What may differ when a run goes on, and what may not.

    for line in check_continuation(folder, saved, config):
        log.say(line)          # changed since step-0005000: engine.zero_stage 1 -> 3

A value decides when another one would give other weights in exact arithmetic: then the two runs are not one, and the
second is refused. What changes only the pace, the places, the messages or the order of sums may change, and is said.
Noise for dropped blocks and masked tokens is drawn for each rank, so it is another one where ranks or micro-batches
are; its distribution stays.
"""

import json
from pathlib import Path
from typing import Any

from asda.config.data import MixedData
from asda.config.run import Config
from asda.data.remote.fetch import shareable, without_credentials
from asda.errors import UserError

MAX_VALUE_CHARS = 60  # of a value in a message

# Keys, and sections of which every key counts. A test sorts each key of the configuration into one of the two sets; at
# run time a key that is in neither decides.
DECIDING = frozenset(
    {
        "objective",
        "model",
        "optimizer",
        "data.train",  # which splits and which shares; their folders may move, because shards are compared by hash
        "data.frames",
        "data.crop",
        "data.log_mel",
        "data.pad_log_mel",
        "data.padding",
        "data.augment",
        "data.order",
        "data.group_shards",
        "engine.precision",  # more than the order of sums: what a weight can be
        "run.seed",
    }
)
MAY_CHANGE = frozenset(
    {
        "_about",
        "preset",  # with the size a name for values that are compared one by one
        "size",
        "data.valid",  # seen by evaluations alone
        "data.test",
        "data.device",  # two ways to compute the same log-mel
        "data.workers",
        "data.threads",
        "data.prefetch",
        "data.timeout_s",
        "data.max_damaged",
        "data.cache",
        "data.cache_gib",
        "engine.attention",  # the same function, computed in another order
        "engine.zero_stage",
        "engine.micro_batch",  # the clips of a step stay the same
        "engine.activation_checkpointing",
        "engine.offload_optimizer",
        "engine.timeout_s",
        "run.folder",
        "run.log_every",
        "run.save_every",
        "run.eval_every",
        "run.keep",
        "run.keep_best",
        "run.on_failed_save",
        "run.max_bad_steps",
        "run.check_replicas_every",
        "run.min_target_spread",
        "run.min_prediction_spread",
        "run.wandb",
        "probe",  # judges the teacher and teaches it nothing
        "resume",
    }
)


def check_continuation(folder: Path, saved: Config, config: Config) -> list[str]:
    """Compare the run that a checkpoint belongs to with the one that is to go on from it.

    Args:
        folder: the checkpoint, for messages.
        saved: its configuration.
        config: the new one, resolved as the saved one is (data.log_mel in figures).

    Returns:
        One line for every value that has changed and may; empty when nothing has.

    Raises:
        UserError: naming every value that decides and has changed, old -> new.
    """
    lines = changes(saved, config)
    refused = [line for key, line in lines.items() if decides(key)]
    if refused:
        raise UserError(
            f"{folder} was trained with other values, and these decide what is learned: {', '.join(refused)}; "
            "set them back, or give another run.folder"
        )
    allowed = [f"changed since {folder.name}: {line}" for line in lines.values()]
    return allowed + _moved(folder, saved, config)


def changes(saved: Config, config: Config) -> dict[str, str]:
    """By key with dots, a line "key old -> new" for every value that differs."""
    theirs, ours = flattened(saved), flattened(config)
    changed = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    return {key: f"{key} {_shown(theirs, key)} -> {_shown(ours, key)}" for key in changed}


def decides(key: str) -> bool:
    """Whether a run with another value of this key (with dots) is another run."""
    return not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def flattened(config: Config) -> dict[str, Any]:
    """Every value by its key with dots; data.train without the folders of its splits, as a list of its datasets."""
    tree = config.model_dump(mode="json", by_alias=True)
    tree["data"]["train"] = [_without_folder(part) for part in config.data.datasets]
    return _leaves(tree)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _without_folder(part: MixedData) -> dict[str, Any]:
    splits = [spec.rpartition(":")[2] for spec in _specs(part)]
    return part.model_dump(mode="json", exclude={"data"}) | {"splits": splits}


def _specs(part: MixedData) -> list[str]:
    return [part.data] if isinstance(part.data, str) else part.data


def _moved(folder: Path, saved: Config, config: Config) -> list[str]:
    """A line when the shards stand elsewhere; their hashes are compared with the checkpoint's by the trainer."""
    before, now = ([spec for part in c.data.datasets for spec in _specs(part)] for c in (saved, config))
    if before == now:
        return []
    moves = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
    places = ", ".join(f"{without_credentials(a)} -> {without_credentials(b)}" for a, b in moves)
    return [f"changed since {folder.name}: data.train {places}"]


def _shown(leaves: dict[str, Any], key: str) -> str:
    """A value for a message: as JSON, cut where it is long, without the passwords that a location may hold."""
    text = json.dumps(shareable(leaves[key])) if key in leaves else "absent"
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
