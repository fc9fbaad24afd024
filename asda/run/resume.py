"""Resume a run from a checkpoint: what may differ, and what must not.

A value decides if another one would give other weights in exact arithmetic. Then the two would not be one run, and the
second is refused. Values that affect only speed, places, messages or the order of sums may change, and are reported;
their fields in asda/config are of type MayChange. Dropped blocks and masking noise are drawn for each rank: other ranks
or micro-batches draw other noise of the same distribution.
"""

import json
from pathlib import Path
from typing import Any

from asda.checkpoint.read import State, read_state
from asda.config.base import MAY_CHANGE, Section, sections_of
from asda.config.data import MixedData
from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.data.remote.fetch import shareable, without_credentials
from asda.errors import UserError

MAX_VALUE_CHARS = 60  # of a value in a message


def open_checkpoint(
    folder: Path, config: Config, dataset: ClipDataset, world_size: int
) -> tuple[Config, State, list[str]]:
    """Read the checkpoint that a run resumes from, and compare the two.

    Args:
        folder: the newest intact checkpoint of config.run.folder.
        config: the run, resolved as the saved one is (data.log_mel in figures).
        dataset: its training clips.
        world_size: its ranks.

    Returns:
        The configuration and the state of the checkpoint, and lines that say what has changed since.

    Raises:
        UserError: something that decides the weights has changed, or resuming is not wanted.
    """
    if config.resume == "never":
        raise UserError(
            f"{config.run.folder} already has a checkpoint, and resume is never; give another run.folder or resume=auto"
        )
    saved, state = read_state(folder, to_resume=True)
    changed = check_settings(folder, saved, config)
    if state.data_fingerprint != dataset.fingerprint:
        raise UserError(
            f"the shards of {config.data.train} differ from those that {folder} was trained on; give another run.folder"
        )
    if state.vocabulary != dataset.vocabulary:
        raise UserError(
            f"the shards of {config.data.train} have other classes, or the same in another order, than those that "
            f"{folder} was trained on. Make the shards again with the same --labels FILE, or give another run.folder"
        )
    if state.world_size != world_size:
        changed.append(f"changed since {folder.name}: ranks {state.world_size} -> {world_size}")
    return saved, state, [f"resuming from {folder}: {state.step} of {config.optimizer.steps} steps are done", *changed]


def check_settings(folder: Path, saved: Config, config: Config) -> list[str]:
    """Compare the configuration of a checkpoint with the one that resumes from it.

    Args:
        folder: the checkpoint, for messages.
        saved: its configuration.
        config: the new one, resolved as the saved one is.

    Returns:
        One line for every value that has changed and may; empty if nothing has.

    Raises:
        UserError: names every value that has changed and must not, old -> new.
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
    """Return a line "key old -> new" for every value that differs, by its dotted key."""
    theirs, ours = flattened(saved), flattened(config)
    changed = [key for key in dict.fromkeys([*theirs, *ours]) if theirs.get(key) != ours.get(key)]
    return {key: f"{key} {_shown(theirs, key)} -> {_shown(ours, key)}" for key in changed}


def decides(key: str) -> bool:
    """Return whether the value of a dotted key must stay the same; so must that of an unknown key."""
    sections: list[type[Section]] = [Config]
    for part in key.split("."):
        fields = [f for section in sections for n, f in section.model_fields.items() if part in (n, f.alias)]
        if any(MAY_CHANGE in field.metadata for field in fields):
            return False
        sections = [section for field in fields for section in sections_of(field.annotation)]
    return True


def flattened(config: Config) -> dict[str, Any]:
    """Return every value by its dotted key; data.train as a list of its datasets, without the folders of its splits."""
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
    """Return a line if the shards have moved; open_checkpoint compares their hashes."""
    before, now = ([spec for part in c.data.datasets for spec in _specs(part)] for c in (saved, config))
    if before == now:
        return []
    moves = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
    places = ", ".join(f"{without_credentials(a)} -> {without_credentials(b)}" for a, b in moves)
    return [f"changed since {folder.name}: data.train {places}"]


def _shown(leaves: dict[str, Any], key: str) -> str:
    """Write a value for a message: as JSON, shortened, without the passwords that a location may hold."""
    text = json.dumps(shareable(leaves[key])) if key in leaves else "absent"
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
