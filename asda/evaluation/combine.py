"""Several checkpoints as one: which they are, whether they may be combined, and the mean of their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asda.checkpoint.read import (
    State,
    best_checkpoint,
    checkpoints_of,
    description_of,
    read_state,
    resolve_checkpoint,
    step_folder,
)
from asda.checkpoint.weights import misfit, read_weights
from asda.config.model import ClassifyConfig
from asda.config.run import Config
from asda.errors import UserError

MOST_KEYS_NAMED = 4  # in a complaint about networks that differ


@dataclass(frozen=True)
class Member:
    """A checkpoint of a classifier that is evaluated, alone or with others."""

    folder: Path
    config: Config
    state: State

    @property
    def loss(self) -> str:
        """Of its objective: "ce" is for one label a clip, "bce" for any number."""
        assert isinstance(self.config.objective, ClassifyConfig)
        return self.config.objective.loss

    def weights(self) -> dict[str, Tensor]:
        """On the CPU, in fp32."""
        return read_weights(self.folder, "model")


def members(paths: list[Path], *, last: int = 0, best: bool = False) -> list[Member]:
    """The checkpoints that are meant.

    Args:
        paths: run folders (the newest intact checkpoint of each) or checkpoints.
        last: the newest so many of a single run instead, without one that is kept only as its best; 0: not asked for.
        best: the one that run.keep_best has kept of each run instead.

    Raises:
        UserError: there is none, too few, or one is damaged or no classifier.
    """
    if last:
        paths = _newest(paths, last)
    if best:
        paths = [best_checkpoint(path) for path in paths]
    return [_opened(resolve_checkpoint(path)) for path in paths]


def those_of_the_first_rank(several: list[Member]) -> list[Member]:
    """What the first rank found, on all ranks: a run may have saved a checkpoint between their look-ups.

    All ranks call this together.

    Raises:
        UserError: it is not there any more, or damaged.
    """
    found = [[one.folder for one in several]]
    dist.broadcast_object_list(found)
    both = zip(several, found[0], strict=True)
    return [one if one.folder == folder else _opened(resolve_checkpoint(folder)) for one, folder in both]


def averaged(several: list[Member]) -> dict[str, Tensor]:
    """The mean of each weight, added up in fp64 and rounded once.

    Raises:
        UserError: networks, input or classes are not the same.
    """
    check_alike(several, _network, "--average")
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for member in several:
        weights = member.weights()
        if complaint := misfit(sums or weights, weights):
            raise UserError(f"{member.folder} cannot be averaged with {several[0].folder}: {complaint}")
        kinds = {name: tensor.dtype for name, tensor in weights.items()}
        sums = {name: sums.get(name, 0) + tensor.double() for name, tensor in weights.items()}
    return {name: (total / len(several)).to(kinds[name]) for name, total in sums.items()}


def check_same_classes(several: list[Member]) -> None:
    """Raise UserError where the scores of classifiers do not mean the same classes, or the same probabilities."""
    check_alike(several, lambda one: {"loss": one.loss, "classes": one.state.vocabulary}, "--ensemble")


def check_alike(several: list[Member], traits: Callable[[Member], dict[str, Any]], flag: str) -> None:
    """Raise UserError naming what differs of what `traits` gives of each checkpoint."""
    first = traits(several[0])
    for other in several[1:]:
        theirs = traits(other)
        differing = [key for key in dict.fromkeys([*first, *theirs]) if first.get(key) != theirs.get(key)]
        if differing:
            more = f" and {len(differing) - MOST_KEYS_NAMED} more" if len(differing) > MOST_KEYS_NAMED else ""
            raise UserError(
                f"{flag} cannot combine {several[0].folder} and {other.folder}: they differ in "
                f"{', '.join(differing[:MOST_KEYS_NAMED])}{more}; take checkpoints that agree in that"
            )


def _network(one: Member) -> dict[str, Any]:
    """Everything that makes weights mean the same function: the network, its input, its classes."""
    description = description_of(one.config, one.state.vocabulary)
    objective = description.objective
    assert isinstance(objective, ClassifyConfig)
    parts = {"model": description.model, "data": description.data}
    leaves = {f"{section}.{key}": value for section, part in parts.items() for key, value in part.model_dump().items()}
    return leaves | {"pooling": objective.pooling, "loss": objective.loss, "classes": description.labels}


def _newest(paths: list[Path], last: int) -> list[Path]:
    if len(paths) > 1:
        raise UserError(f"--last {last} is for one run, and --checkpoint names {len(paths)} folders")
    found = checkpoints_of(paths[0])
    old_best = _kept_only_as_best(paths[0], found)
    found = [folder for folder in found if folder != old_best]
    if len(found) < last:
        beside = f", and {old_best.name} kept only as its best" if old_best else ""
        raise UserError(
            f"{paths[0]} holds {len(found)} checkpoints of a run{beside}, --last asks for {last}; ask for fewer, or "
            "train with a larger run.keep"
        )
    return found[-last:]


def _kept_only_as_best(run: Path, found: list[Path]) -> Path | None:
    """The checkpoint that lies there for run.keep_best alone: those that came between it and the newest are gone."""
    if not found:
        return None
    config, state = read_state(resolve_checkpoint(found[-1]))
    best = step_folder(run, state.best_step)
    return best if best in found[: -config.run.keep] else None


def _opened(folder: Path) -> Member:
    config, state = read_state(folder)
    if not isinstance(config.objective, ClassifyConfig):
        raise UserError(f"{folder} is a pre-training checkpoint and has no classes; fine-tune it first")
    return Member(folder, _anywhere(config), state)


def _anywhere(config: Config) -> Config:
    """A run's configuration for any machine: with a GPU asked for by name it could not be evaluated on a CPU.

    Where patches are made and how attention is computed decide no more than a rounding, and no override could be given.
    """
    data = config.data.model_copy(update={"device": "auto"})
    engine = config.engine.model_copy(update={"attention": "auto"})
    return config.model_copy(update={"data": data, "engine": engine})
