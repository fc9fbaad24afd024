"""The files of an evaluation: its figures, a table of classes, and a picture of the confusions.

    evaluation.json             the figures, of which checkpoint, on which clips
    evaluation_classes.csv      class, clips, average_precision, auc; with one label per clip also recall and precision
    evaluation_confusion.png    with one label per clip: clips of each class by predicted class

Shapes: N clips, C classes.
"""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from asda.errors import UserError
from asda.evaluation.metrics import ByClass, by_class, confusion
from asda.system import write_whole_file

CELL_INCHES, MARGIN_INCHES, SMALLEST_INCHES, LARGEST_INCHES, DPI = 0.26, 2.2, 4.5, 40.0, 150
NAME_POINTS, COUNT_POINTS, TITLE_POINTS = 8, 6.5, 9
LONGEST_NAME = 24  # characters
MOST_COUNTED = 150  # classes; beyond, numbers are too small to read
LIGHT_FROM = 0.55  # share of a row from which a count is written in white


def check_place(out: Path) -> None:
    """Raise UserError if write_evaluation could not write; call it before long work. It writes nothing."""
    if out.is_dir():
        raise UserError(
            f"{out} is a folder, but --out names the JSON file to write; add a file name: {out / 'evaluation.json'}"
        )
    files = [out, *_beside(out)]
    if folder := next((path for path in files if path.is_dir()), None):
        raise UserError(f"{folder} is a folder, but a file of the evaluation has this name; give another file in --out")
    if locked := next((path for path in files if path.exists() and not os.access(path, os.W_OK)), None):
        raise UserError(f"{locked} exists and is not writable; make it writable, or give another file in --out")
    place = next(path for path in out.absolute().parents if path.exists())
    are_new = not all(path.exists() for path in files)
    if are_new and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UserError(f"{place} is not a writable folder, so {out} cannot be written; give a file elsewhere in --out")


def _beside(out: Path) -> list[Path]:
    return [out.with_name(f"{out.stem}_{name}") for name in ("classes.csv", "confusion.png")]


def write_evaluation(
    out: Path,
    about: dict[str, Any],
    figures: dict[str, float | int],
    scores_NC: np.ndarray,
    targets_NC: np.ndarray,
    vocabulary: tuple[str, ...],
) -> list[str]:
    """Write the files, the picture last because it is the most likely to fail.

    `figures` are metrics.summary of the scores, which are finite; if they have an accuracy, every clip has one label.
    The JSON file `out` begins with `about`, and the names of the others with its stem.

    Returns:
        A line for each file, or for the missing package that the picture needs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    table, picture = _beside(out)
    counts_CC = confusion(scores_NC, targets_NC) if "accuracy" in figures else None
    found = about | {key: value if math.isfinite(value) else None for key, value in figures.items()}  # JSON has no nan
    if counts_CC is not None:
        found |= {"labels": vocabulary, "confusion": counts_CC.tolist()}  # rows: labels; columns: predictions
    lines_of_json = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    write_whole_file(out, "{\n" + ",\n".join(lines_of_json) + "\n}\n")
    _write_table(table, vocabulary, by_class(scores_NC, targets_NC), counts_CC)
    lines = [f"written to {out}", f"classes in {table}"]
    if counts_CC is not None:
        lines.append(_try_to_draw(picture, counts_CC, vocabulary))
    return lines


def _write_table(path: Path, vocabulary: tuple[str, ...], classes: ByClass, counts_CC: np.ndarray | None) -> None:
    """Write a line for each class, in the order of the vocabulary; undefined figures are empty cells."""
    columns: dict[str, Any] = {"class": vocabulary, "clips": classes.clips_C}
    columns |= {"average_precision": classes.average_precision_C, "auc": classes.auc_C}
    if counts_CC is not None:
        with np.errstate(invalid="ignore"):
            hits_C = counts_CC.diagonal()
            columns |= {"recall": hits_C / counts_CC.sum(axis=1), "precision": hits_C / counts_CC.sum(axis=0)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in zip(*columns.values(), strict=True))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}"
    return str(value)


def _try_to_draw(path: Path, counts_CC: np.ndarray, vocabulary: tuple[str, ...]) -> str:
    """Draw the picture; return a line that says where it is, or why there is none."""
    try:
        from matplotlib.figure import Figure  # an optional extra
    except ImportError:
        return "no picture of the confusions: it needs matplotlib; pip install 'asda[report]'"
    inches = min(LARGEST_INCHES, max(SMALLEST_INCHES, MARGIN_INCHES + CELL_INCHES * len(vocabulary)))
    figure = Figure(figsize=(inches, inches), dpi=DPI, layout="constrained")
    _draw(figure.subplots(), counts_CC, vocabulary)
    figure.savefig(path)
    return f"confusions in {path}"


def _draw(axes: Any, counts_CC: np.ndarray, vocabulary: tuple[str, ...]) -> None:
    """Draw a row for each class, coloured by the share of its clips, with numbers if they are large enough to read."""
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    shrink = min(CELL_INCHES, LARGEST_INCHES / len(vocabulary)) / CELL_INCHES
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..." for name in vocabulary]
    as_they_are = {"fontsize": NAME_POINTS * shrink, "parse_math": False}  # a name may hold a $
    axes.set_xticks(range(len(names)), names, rotation=90, **as_they_are)
    axes.set_yticks(range(len(names)), names, **as_they_are)
    axes.set_xlabel("prediction", fontsize=TITLE_POINTS)
    axes.set_ylabel("label (colour: share of its clips)", fontsize=TITLE_POINTS)
    share = counts_CC.trace() / counts_CC.sum()
    axes.set_title(f"{counts_CC.sum()} clips, {100 * share:.1f} % on the diagonal", fontsize=TITLE_POINTS)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e3e8ee", linewidth=0.4)  # rows and columns to follow
    axes.tick_params(which="both", length=0)
    if len(names) > MOST_COUNTED:
        return
    for row, column in np.argwhere(counts_CC):
        count, colour = str(counts_CC[row, column]), "white" if shares_CC[row, column] >= LIGHT_FROM else "#222222"
        size = COUNT_POINTS * shrink * min(1, 3 / len(count))
        axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=size)
