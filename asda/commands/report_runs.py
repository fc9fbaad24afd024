"""The facts of a run for a report: configuration, metrics, evaluation, and the figures that follow from them."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asda.checkpoint.read import State, newest_checkpoint, read_state
from asda.config.model import PretrainConfig
from asda.config.run import Config, load_stored_config
from asda.data.remote.fetch import shareable
from asda.errors import UserError
from asda.run.log import read_metrics

KINDS = ("train", "valid", "test", "test_best", "probe")
FIGURES = ("accuracy", "mAP", "clips", "classes", "step")  # of evaluation.json, all numbers
Entry = dict[str, Any]  # a line of metrics.jsonl


class Judged(NamedTuple):
    """Metrics on labelled clips."""

    figures: Entry
    source: str  # the file or metric kind, and which weights
    data: str  # the clips


@dataclass(frozen=True)
class Run:
    """A run folder, as it was read."""

    name: str  # unique in a report
    folder: Path
    config: Config
    entries: dict[str, list[Entry]]  # by kind, every step once
    evaluation: Entry  # evaluation.json; empty if there is none
    state: State | None  # of the newest intact checkpoint
    complaint: str  # why there is no checkpoint to draw pictures from; "" if there is one

    @property
    def pretrains(self) -> bool:
        """Whether the run is a pre-training."""
        return isinstance(self.config.objective, PretrainConfig)

    @property
    def steps_done(self) -> int:
        """The last step of the checkpoint or of metrics.jsonl, whichever is newer."""
        logged = [entry["step"] for entry in self.entries["train"][-1:]]
        return max([*logged, self.state.step if self.state else 0])

    def of_training(self, key: str) -> list[float]:
        """Return a figure of all lines of training that have it."""
        return [entry[key] for entry in self.entries["train"] if key in entry]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Raises UserError if one is not a run."""
    return [_read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is not the folder of a run: config.json or metrics.jsonl is missing")
    state, complaint = _newest_state(folder)
    return Run(
        name=name,
        folder=folder,
        config=load_stored_config(folder / "config.json"),
        entries={kind: without_repeats(read_metrics(folder, kind)) for kind in KINDS}
        | {"warning": read_metrics(folder, "warning")},
        evaluation=_read_evaluation(folder / "evaluation.json"),
        state=state,
        complaint=complaint,
    )


def _newest_state(folder: Path) -> tuple[State | None, str]:
    try:
        newest = newest_checkpoint(folder, warn=lambda sentence: None)
        return (read_state(newest)[1], "") if newest else (None, f"{folder} has no checkpoint yet")
    except UserError as error:
        return None, str(error)


def _read_evaluation(path: Path) -> Entry:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again with asda evaluate") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object; write it again with asda evaluate")
    for key in FIGURES:
        if not isinstance(found.get(key, 0), int | float):
            raise UserError(f"{path}: {key} is {found[key]!r}, not a number; write it again with asda evaluate")
    return found


def confusions(run: Run) -> tuple[np.ndarray, list[str]] | None:
    """Return the matrix of evaluation.json, [true, predicted] clips, and its labels; None if the two do not fit."""
    labels, rows = run.evaluation.get("labels"), run.evaluation.get("confusion")
    try:
        counts_CC = np.array(rows, dtype=np.int64)
    except (ValueError, TypeError):
        return None
    if not isinstance(labels, list) or counts_CC.shape != (len(labels), len(labels)):
        return None
    return counts_CC, [str(label) for label in labels]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parts before it as make all names differ.

    Raises:
        UserError: the same folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(
            f"{next(p for p in folders if paths.count(p.resolve()) > 1)} is given twice; name each run once"
        )
    for num_parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths differ")


def without_repeats(entries: Iterable[Entry]) -> list[Entry]:
    """Keep every step once: a resumed run repeats the steps after its checkpoint, and the later line counts."""
    kept: list[Entry] = []
    for entry in entries:
        while kept and kept[-1]["step"] >= entry["step"]:
            kept.pop()
        kept.append(entry)
    return kept


def training_hours(run: Run) -> float:
    """Return the hours of all steps, without evaluations, saves and steps repeated after a stop."""
    seconds, done = 0.0, 0
    for entry in run.entries["train"]:
        steps, done = entry["step"] - done, entry["step"]
        seconds += steps * run.config.optimizer.batch / entry["clips_per_s"]
    return seconds / 3600


def median(values: Sequence[float]) -> float | None:
    """Return the median; None if there are no values."""
    return statistics.median(values) if values else None


def held_out(run: Run) -> list[Judged]:
    """Return metrics on labelled clips, the headline first; empty if there are none.

    data.valid, which selected the best step, is left out if there are metrics on other clips.
    """
    data, entries = run.config.data, {kind: run.entries[kind][-1:] for kind in KINDS}
    if run.pretrains:
        return [
            Judged(entry, "probe", in_words(run.config.probe and run.config.probe.test)) for entry in entries["probe"]
        ]
    evaluation = run.evaluation
    chunks = ", chunks" if evaluation.get("chunks") else ""
    found = [Judged(evaluation, "evaluation.json", in_words(evaluation.get("data")) + chunks)] if evaluation else []
    best = [entry | {"step": entry["best_step"]} for entry in entries["test_best"]]
    found += [Judged(entry, "test, best on valid", in_words(data.test)) for entry in best]
    found += [Judged(entry, "test, last", in_words(data.test)) for entry in entries["test"]]
    return found or [Judged(entry, "valid", in_words(data.valid)) for entry in entries["valid"]]


def in_words(data: Any) -> str:
    """Name the clips: "FOLDER:SPLIT", or several; "" if not known."""
    data = shareable(data)
    return ", ".join(map(str, data)) if isinstance(data, list) else str(data or "")


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the dotted keys in which configurations differ, with the values of all; None if a run lacks the key.

    run.folder and the section _about are left out.
    """
    trees = [leaves(shareable(run.config.model_dump(mode="json", exclude={"about"}))) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if key != "run.folder"]
    rows = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
