"""Evaluate several checkpoints as one: find them, check that they can be combined, average their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from asda.engine.processes import from_all_ranks
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
        """The loss of its objective: "ce" for one label per clip, "bce" for any number."""
        assert isinstance(self.config.objective, ClassifyConfig)
        return self.config.objective.loss

    def weights(self) -> dict[str, Tensor]:
        """Read the weights, on the CPU, in fp32."""
        return read_weights(self.folder, "model")


def members(paths: list[Path], *, last: int = 0, best: bool = False) -> list[Member]:
    """Open the checkpoints that a command names: the paths, or the newest intact checkpoint of those that are runs.

    `last` takes the newest so many of a single run instead, without an older one that is kept only as its best; `best`
    takes the best checkpoint of each run.

    Raises:
        UserError: there are none or too few, or one is damaged or not of a classifier.
    """
    if last:
        paths = _newest(paths, last)
    elif best:
        paths = [best_checkpoint(path) for path in paths]
    return [_opened(resolve_checkpoint(path)) for path in paths]


def read_together(
    several: list[Member], find: Callable[[], list[Member]], way: str
) -> tuple[list[Member], dict[str, Tensor] | None]:
    """Read the weights to evaluate, of the same checkpoints on all ranks, which call this together.

    A run that trains meanwhile may remove a checkpoint, because it keeps only a few; then they are found anew.

    Args:
        several: the checkpoints; the first rank's are taken, because a run may have saved another one meanwhile.
        find: finds them anew.
        way: "average" of the weights, "ensemble", or "" for one.

    Returns:
        The checkpoints, and their weights; None for an ensemble, whose weights are read one after another.

    Raises:
        UserError: on all ranks, if a checkpoint cannot be read.
    """
    while True:
        several = from_all_ranks(several)[0]
        weights, failure = None, ""
        try:
            if way != "ensemble":
                weights = averaged(several) if len(several) > 1 else several[0].weights()
        except UserError as error:
            failure = str(error)
        failures = list(filter(None, from_all_ranks(failure)))
        if not failures:
            return several, weights
        if all(from_all_ranks(all(one.folder.exists() for one in several))):
            raise UserError(failures[0])
        several = find()


def averaged(several: list[Member]) -> dict[str, Tensor]:
    """Average each weight, in fp64, rounded once.

    Raises:
        UserError: networks, input or classes differ.
    """
    _check_alike(several, _network, "--average")
    weights = several[0].weights()
    sums = {name: tensor.double() for name, tensor in weights.items()}
    for member in several[1:]:
        weights = member.weights()
        if complaint := misfit(sums, weights):
            raise UserError(f"{member.folder} cannot be averaged with {several[0].folder}: {complaint}")
        sums = {name: total + weights[name].double() for name, total in sums.items()}
    return {name: (total / len(several)).to(weights[name].dtype) for name, total in sums.items()}


def check_same_classes(several: list[Member]) -> None:
    """Raise UserError if the scores of classifiers mean other classes, or other probabilities."""
    _check_alike(several, lambda one: {"loss": one.loss, "classes": one.state.vocabulary}, "--ensemble")


def _check_alike(several: list[Member], traits: Callable[[Member], dict[str, Any]], flag: str) -> None:
    """Raise UserError if what `traits` returns differs between checkpoints."""
    first = traits(several[0])
    for other in several[1:]:
        theirs = traits(other)
        differing = [key for key in dict.fromkeys([*first, *theirs]) if first.get(key) != theirs.get(key)]
        if differing:
            more = f" and {len(differing) - MOST_KEYS_NAMED} more" if len(differing) > MOST_KEYS_NAMED else ""
            raise UserError(
                f"{flag} cannot combine {several[0].folder} and {other.folder}: they differ in "
                f"{', '.join(differing[:MOST_KEYS_NAMED])}{more}; choose checkpoints that agree in these"
            )


def _network(one: Member) -> dict[str, Any]:
    """Return everything that weights need to mean the same function: the network, its input, its classes."""
    description = description_of(one.config, one.state.vocabulary)
    assert isinstance(description.objective, ClassifyConfig)
    parts = {"model": description.model, "data": description.data}
    leaves = {f"{section}.{key}": value for section, part in parts.items() for key, value in part.model_dump().items()}
    return leaves | {"pooling": description.objective.pooling, "loss": one.loss, "classes": description.labels}


def _newest(paths: list[Path], last: int) -> list[Path]:
    if len(paths) > 1:
        raise UserError(f"--last {last} is for one run, but --checkpoint names {len(paths)} folders")
    found = checkpoints_of(paths[0])
    old_best = None
    if found:
        config, state = read_state(resolve_checkpoint(found[-1]))
        best = step_folder(paths[0], state.best_step)
        if best in found[: -config.run.keep]:  # only run.keep_best has kept it
            old_best = best
            found.remove(best)
    if len(found) < last:
        beside = f" (besides {old_best.name}, kept only as its best)" if old_best else ""
        number = f"{len(found)} checkpoint" + ("" if len(found) == 1 else "s")
        raise UserError(
            f"{paths[0]} has {number}{beside}, --last asks for {last}; ask for fewer, or train with a larger run.keep"
        )
    return found[-last:]


def _opened(folder: Path) -> Member:
    config, state = read_state(folder)
    if not isinstance(config.objective, ClassifyConfig):
        raise UserError(f"{folder} is a pre-training checkpoint and has no classes; fine-tune it first")
    # Evaluate on any machine: a run that names a GPU could not be evaluated on a CPU. The device that makes patches and
    # the way attention is computed change only the rounding.
    data = config.data.model_copy(update={"device": "auto"})
    engine = config.engine.model_copy(update={"attention": "auto"})
    return Member(folder, config.model_copy(update={"data": data, "engine": engine}), state)
