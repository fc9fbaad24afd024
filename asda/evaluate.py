"""Evaluate on held-out shards: deepspeed asda/evaluate.py --checkpoint runs/x --data shards/y:test

Evaluates each clip exactly once, on any number of processes (`asda evaluate` is one), prints the metrics of
docs/evaluation.md, and writes them with a table of classes and a picture of the confusions.

Shapes: B clips of a batch, N clips or patches, P pixels of a patch, X figures of a clip, K checkpoints, C classes.
"""

import logging
import os
import sys

if not __package__:  # run as a script: Python has put asda/ first, where names of ours would hide other packages
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if os.path.realpath(path) != here)]
if __name__ == "__main__":
    logging.raiseExceptions = False  # as in exit_with_sentence, but before DeepSpeed is imported, which logs

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asda.data.clips import ClipDataset
from asda.data.datasets import open_evaluation_data
from asda.engine.processes import Processes, join_processes, leave_processes
from asda.errors import UserError, exit_with_sentence
from asda.evaluation.combine import Member, check_same_classes, members, read_together
from asda.evaluation.loop import logits_of_clips
from asda.evaluation.metrics import summary
from asda.evaluation.report import check_place, write_evaluation
from asda.inference import mean_logits

EPILOG = """examples:
  asda evaluate --checkpoint runs/x --data shards/y:test
  asda evaluate --checkpoint runs/x --best --chunks
  asda evaluate --checkpoint runs/x --last 5 --average        (the run needs run.keep=5)
  asda evaluate --checkpoint runs/a runs/b --ensemble
  deepspeed --num_accelerators 2 asda/evaluate.py --checkpoint runs/x

By default --out is evaluation.json in the run folder; evaluation_average.json or evaluation_ensemble.json if several
checkpoints are combined; COPY_evaluation.json beside a checkpoint COPY outside a run folder."""


def combined_logits(
    several: list[Member],
    weights: dict[str, Tensor] | None,
    dataset: ClipDataset,
    processes: Processes,
    *,
    chunks: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits and targets, [N, C], of some weights, or if there are None of the ensemble of several checkpoints.

    The ensemble is the mean of the probabilities.
    """
    if weights is not None:
        return logits_of_clips(several[-1].config, weights, dataset, processes, chunks=chunks)
    each = [logits_of_clips(one.config, one.weights(), dataset, processes, chunks=chunks) for one in several]
    logits_KNC = torch.from_numpy(np.stack([logits_NC for logits_NC, _ in each])).double()
    return mean_logits(logits_KNC, torch.ones(len(several), dtype=torch.float64), several[0].loss).numpy(), each[0][1]


def evaluate(find: Callable[[], list[Member]], data: str | None, out: Path | None, *, way: str, chunks: bool) -> None:
    """Evaluate the checkpoints that `find` finds, print the figures, and write the files of asda.evaluation.report.

    `way` combines several: "average" or "ensemble"; "" evaluates one.
    """
    several = found_to_combine(find, way)
    processes = join_processes()
    several, weights = read_together(several, find, way)
    newest = several[-1]
    specs = data or newest.config.data.test or newest.config.data.valid
    if not specs:
        raise UserError(f"{newest.folder} has neither data.test nor data.valid; give --data FOLDER:SPLIT")
    out = out or default_out(newest.folder, way)
    if processes.is_first:
        check_place(out)  # the only rank that writes
    dataset = open_evaluation_data(newest.config, newest.state.vocabulary, specs)
    logits_NC, targets_NC = combined_logits(several, weights, dataset, processes, chunks=chunks)
    leave_processes()
    if bad := int(np.isnan(logits_NC).any(axis=1).sum()):
        raise UserError(
            f"{newest.folder} gives nan for {bad} of {len(logits_NC)} clips, so there are no figures. A weight may be "
            "nan; evaluate an earlier checkpoint"
        )
    if not processes.is_first:
        return
    figures = summary(logits_NC, targets_NC)
    about = {
        "checkpoint": str(newest.folder),
        "data": specs,
        "dataset_hashes": dataset.hashes,
        "step": newest.state.step,
        "chunks": chunks,
    }
    combined = []
    if way:
        about |= {"combined": way, "of": [str(one.folder) for one in several]}
        combined = [f"{way} of {len(several)} checkpoints", *(f"  step {m.state.step}  {m.folder}" for m in several)]
    try:  # first of all print: a disk may be full by now
        print(*combined, *_in_words(figures, specs), sep="\n", flush=True)
    finally:  # also if nobody reads it
        lines = write_evaluation(out, about, figures, logits_NC, targets_NC, dataset.vocabulary)
    print(*lines, sep="\n")


def found_to_combine(find: Callable[[], list[Member]], way: str) -> list[Member]:
    """Return the checkpoints that `find` finds. Raises UserError if `way` does not fit their number or classes."""
    several = find()
    if len(several) > 1 and not way:
        raise UserError(
            f"{len(several)} checkpoints are named; combine them with --average (of their weights) or --ensemble (of "
            "their probabilities)"
        )
    if len(several) == 1 and way:
        raise UserError(
            f"--{way} combines several checkpoints, but 1 is named; give --last N for the newest N of a run, or "
            "name more in --checkpoint"
        )
    if way == "ensemble":
        check_same_classes(several)
    return several


def default_out(folder: Path, way: str) -> Path:
    """Return the default of --out: in the run's folder; beside a checkpoint that is not in a run, under its name."""
    name = f"evaluation_{way}.json" if way else "evaluation.json"  # a report may need both
    if folder.parent.name != "checkpoints":
        folder = folder.resolve()  # "." and "x/.." have no name
    if folder.parent.name == "checkpoints":
        return folder.parent.parent / name
    return folder.with_name(f"{folder.name}_{name}")


def _in_words(figures: dict[str, float | int], data: str | list[str]) -> list[str]:
    lines = [f"{figures['clips']} clips of {data}, {figures['classes']} classes"]
    if "accuracy" in figures:
        lines.append(f"accuracy  {100 * figures['accuracy']:.2f} %  (chance {100 / figures['classes']:.2f} %)")
    lines.append(f"mAP       {figures['mAP']:.4f}  ({figures['classes_without_positives']} classes without positives)")
    return [*lines, f"mAUC      {figures['mAUC']:.4f}", f"d-prime   {figures['d_prime']:.3f}"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, sys.argv by default."""
    parser = argparse.ArgumentParser(
        prog="asda evaluate",
        description="Compute accuracy, mAP, mAUC and d-prime of fine-tuned checkpoints on held-out shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, nargs="+", help="checkpoints, or runs (the newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=_positive, default=0, metavar="N", help="the newest N checkpoints of the run")
    which.add_argument("--best", action="store_true", help="the best checkpoint of each run (run.keep_best)")
    how = parser.add_mutually_exclusive_group()
    way: dict[str, Any] = {"dest": "way", "action": "store_const", "default": ""}
    how.add_argument("--average", const="average", help="one network with the mean of all weights", **way)
    how.add_argument("--ensemble", const="ensemble", help="the mean of the probabilities of all", **way)
    parser.add_argument("--chunks", action="store_true", help="score long clips in full, averaging over chunks")
    parser.add_argument("--data", help="FOLDER:SPLIT; default: the run's data.test, else its data.valid")
    parser.add_argument("--out", type=Path, help="the JSON file; the table and the picture go beside it")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and evaluate. Raises UserError."""
    args = parse_args(argv)
    find = partial(members, args.checkpoint, last=args.last, best=args.best)
    evaluate(find, args.data, args.out, way=args.way, chunks=args.chunks)


if __name__ == "__main__":
    exit_with_sentence(main)
