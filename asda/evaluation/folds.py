"""Cross-validation: the trainings of a plan, the record of their figures, and what a difference between two means.

A cell is one training: the split it holds out, and its seed. All other splits of the dataset train. Two records are
compared cell by cell, which is only fair if both evaluated the same clips.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from scipy.special import stdtrit

from asda.config.run import Config, load_config
from asda.data.remote.fetch import without_credentials
from asda.data.shards.index import DatasetIndex
from asda.errors import UserError
from asda.system import write_whole_file

RECORD = "crossval.json"
METRICS = ("accuracy", "mAP")  # a run reports one or both


@dataclass(frozen=True)
class Cell:
    """One training."""

    fold: str  # the split that it holds out
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.fold}-seed{self.seed}"


Figures = dict[Cell, dict[str, float]]  # the metrics of each training


@dataclass(frozen=True)
class Plan:
    """All trainings of one cross-validation."""

    config: Path
    overrides: tuple[str, ...]
    data: str
    splits: tuple[str, ...]
    cells: tuple[Cell, ...]
    out: Path
    hashes: dict[str, str]  # by split: a hash of its shards and of the order of the classes

    def arguments(self, cell: Cell) -> list[str]:
        """Return the overrides of one training; {seed} and {fold} are filled in."""
        own = [text.replace("{seed}", str(cell.seed)).replace("{fold}", cell.fold) for text in self.overrides]
        train = other_splits(self.data, self.splits, cell.fold)
        places = [f"data.train={self.data}:{train}", f"data.valid={self.data}:{cell.fold}"]
        return [*own, *places, f"run.seed={cell.seed}", f"run.folder={self.out / cell.name}"]

    def resolved(self, cell: Cell) -> Config:
        """Return the checked configuration of one training. Raises UserError."""
        return load_config(self.config, self.arguments(cell))


def other_splits(data: str, splits: Sequence[str], fold: str) -> str:
    """Name the splits that train if one is held out, as fold1+fold3. Raises UserError if it or others are missing."""
    if fold not in splits or len(splits) < 2:
        where = without_credentials(data)
        raise UserError(
            f"--hold-out {fold}: {where} has the splits {', '.join(splits)}; name one or more of at least two"
        )
    return "+".join(split for split in splits if split != fold)


def split_hashes(index: DatasetIndex) -> dict[str, str]:
    """Hash the shards of each split together with the classes in their order."""
    contents = {name: [[s.hash for s in split.shards], index.vocabulary] for name, split in index.splits.items()}
    return {name: xxhash.xxh3_64_hexdigest(json.dumps(content).encode()) for name, content in contents.items()}


def interval(values: Sequence[float]) -> float:
    """Return half the width of Student's 95 % confidence interval of the mean of two values or more."""
    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5


def paired(ours: Figures, theirs: Figures, where: Path) -> Figures:
    """Return their figures of our cells. Raises UserError if their folder, `where`, lacks a training or a figure."""
    for cell, of_cell in ours.items():
        if cell not in theirs:
            raise UserError(f"--against {where} has no finished run {cell.name}; give it the same folds and seeds")
        for metric in of_cell:
            if theirs[cell].get(metric) is None:
                raise UserError(
                    f"--against {where} has no {metric} of {cell.name}, which a difference needs; run that call again"
                )
    return {cell: theirs[cell] for cell in ours}


def write_record(plan: Plan, figures: Figures) -> Path:
    """Write the plan and the figures of its trainings into its folder, as JSON."""
    path, runs = plan.out / RECORD, [asdict(cell) | of_cell for cell, of_cell in figures.items()]
    write_whole_file(path, json.dumps(describe_plan(plan) | {"runs": runs}, indent=1) + "\n")
    return path


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return what all runs of a folder have in common, as the record states it."""
    overrides = list(plan.overrides)
    return {"config": str(plan.config), "data": plan.data, "overrides": overrides, "shards": plan.hashes}


def read_figures(folder: Path) -> Figures:
    """Read the figures that `write_record` has written. Raises UserError."""
    runs = read_record(folder)["runs"]
    return {Cell(run["fold"], run["seed"]): {name: run[name] for name in METRICS if name in run} for run in runs}


def read_record(folder: Path) -> dict[str, Any]:
    """Read all that `write_record` has written. Raises UserError if the file is damaged."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(map(_is_run, found["runs"])) and isinstance(found.get("shards", {}), dict):
            return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, or not written by asda crossval; remove it: the runs beside it are kept")


def _is_run(run: dict[str, Any]) -> bool:
    figures = [run[name] for name in METRICS if run.get(name) is not None]
    return isinstance(run["fold"], str) and type(run["seed"]) is int and all(type(x) in (int, float) for x in figures)


def check_same_clips(plan: Plan, against: Path) -> None:
    """Refuse a record whose held-out clips differ from the plan's: no difference could be paired. Raises UserError."""
    if not (against / RECORD).is_file():
        raise UserError(f"{against / RECORD} is missing; --against takes the --out of another asda crossval")
    theirs = read_record(against)
    for fold in dict.fromkeys(cell.fold for cell in plan.cells):
        if theirs.get("shards", {}).get(fold) != plan.hashes[fold]:
            raise UserError(
                f"--against {against} was evaluated on {without_credentials(str(theirs.get('data')))}, whose {fold} "
                f"differs from that of {without_credentials(plan.data)}; give runs with the same held-out clips"
            )
