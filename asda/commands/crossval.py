"""Cross-validate a configuration: train it once for each held-out split and seed, and print mean and interval.

Each split of the dataset is held out in turn, and the others train. Every training is a run in a folder of its own; its
last step is evaluated. If stopped, the same command resumes; once all runs are finished, it only prints.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from asda.commands.parsing import check_range, comma_list, make_parser
from asda.commands.text import percent
from asda.config.run import load_stored_config
from asda.data.remote.fetch import shareable, without_credentials
from asda.data.shards.read import load_dataset
from asda.errors import STOPPED_EXIT, Stopped, UserError
from asda.evaluation.folds import (
    METRICS,
    RECORD,
    Cell,
    Figures,
    Plan,
    check_same_clips,
    describe_plan,
    interval,
    other_splits,
    paired,
    read_figures,
    read_record,
    split_hashes,
    write_record,
)

GIVEN = {"run.seed": "--seeds", "run.folder": "--out", "data.train": "--data", "data.valid": "--data and --hold-out"}

EXAMPLES = """examples
  asda crossval --config configs/esc50_asda.json --data shards/esc50 --out runs/esc50
      the five folds of ESC-50: a line for each, then their mean and standard deviation
  asda crossval --config configs/real_finetune.json --data shards/words --hold-out valid --seeds 1,2,3 \\
      --out runs/words objective.init_from=runs/a
      train on all splits but valid, with three seeds
  asda crossval ... --out runs/scratch objective.init_from= --against runs/words
      the same from scratch, and then the difference of the two, run by run
  asda crossval ... --seeds 1,2,3 'objective.init_from=runs/pretrained-{seed}'
      {seed} and {fold} in an override are replaced by those of the run

The interval is Student's 95 % confidence interval, over all runs, or over the differences of runs with equal fold and
seed. The runs share clips: it tells how far the mean moves with fold and seed, not with other recordings."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("crossval", (__doc__ or "").strip(), EXAMPLES)
    add = parser.add_argument
    add("--config", required=True, type=Path, help="a run with objective.kind classify")
    add("--data", required=True, help="folder or URL of a dataset with at least two splits")
    add("--hold-out", metavar="A,B", type=comma_list(str), help="splits to hold out, in turn (default: every split)")
    add("--seeds", metavar="1,2", type=comma_list(int), default=[1], help="values of run.seed (default: 1)")
    add("--out", required=True, type=Path, help=f"folder of the runs, their logs and {RECORD}")
    add("--against", type=Path, help="compare with another --out that has the same held-out clips and seeds")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    add("--ranks", type=int, default=1, help="ranks of each training, by deepspeed (default: 1, plain python)")
    add("overrides", nargs="*", metavar="section.key=value", help="as for asda train")
    args = parser.parse_args(argv)
    for text in args.overrides:
        if instead := GIVEN.get(text.partition("=")[0]):
            raise UserError(f"{text} would be replaced in every run; give {instead}")
    check_range("--jobs", args.jobs, 1)
    check_range("--ranks", args.ranks, 1)
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """List the trainings, and check the configuration of each. Raises UserError."""
    index = load_dataset(args.data)
    splits = tuple(index.splits)
    folds = tuple(args.hold_out or splits)
    for fold in folds:
        other_splits(args.data, splits, fold)
    cells = tuple(Cell(fold, seed) for seed in args.seeds for fold in folds)
    plan = Plan(args.config, tuple(args.overrides), args.data, splits, cells, args.out, split_hashes(index))
    for cell in cells:
        plan.resolved(cell)
    return plan


def claim(plan: Plan) -> None:
    """Make the folder of the runs, or check that the runs in it belong to this plan: what is finished is reused.

    Raises:
        UserError: the folder holds runs of another plan, or the configuration or the shards have changed since.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    if not (plan.out / RECORD).exists():
        write_record(plan, {})
    theirs = read_record(plan.out)
    for name, value in describe_plan(plan).items():
        if theirs.get(name) == value:
            continue
        if name == "shards":
            where = without_credentials(plan.data)
            raise UserError(
                f"the shards of {where} have changed since the runs in {plan.out} began; give another --out"
            )
        was, now = (json.dumps(shareable(some)) for some in (theirs.get(name), value))
        raise UserError(f"{plan.out} holds runs with {name} {was}, not {now}; give another --out")
    for cell in plan.cells:
        check_unchanged(plan, cell)


def check_unchanged(plan: Plan, cell: Cell) -> None:
    """Refuse to resume a training whose configuration has changed in a way that affects results. Raises UserError."""
    from asda.data.datasets import open_clips  # these two import torch
    from asda.run.resume import changes, decides

    folder, config = plan.out / cell.name, plan.resolved(cell)
    if not (folder / "config.json").is_file():
        return
    if config.data.log_mel == "dataset":  # a training writes the figures themselves
        log_mel = open_clips(config.data).log_mel
        config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": log_mel})})
    saved = load_stored_config(folder / "config.json")
    changed = [line for key, line in changes(saved, config).items() if decides(key)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with other values: {changed[0]}{more}; set them back, or give another --out"
        )


def train_all(plan: Plan, jobs: int, ranks: int) -> Figures:
    """Run every training that is not finished, and return the figures of all.

    Raises:
        UserError: a training failed; its message is the last line of its log.
        Stopped: this process was asked to stop, and so were the trainings, which have saved.
    """
    steps = plan.resolved(plan.cells[0]).optimizer.steps
    waiting = [cell for cell in plan.cells if final_figures(plan.out / cell.name, steps) is None]
    progress = tqdm(total=len(plan.cells), initial=len(plan.cells) - len(waiting), unit="run", disable=None)
    trainings = Trainings(plan, ranks)
    with ThreadPoolExecutor(jobs) as pool, trainings, progress:
        for cell, seconds in pool.map(trainings.finish, waiting):
            progress.update()
            figures = final_figures(plan.out / cell.name, steps) or {}
            shown = (f"{metric} {_shown(figures[metric], metric)}" for metric in METRICS if metric in figures)
            tqdm.write(f"{cell.name}: {'  '.join(shown)}  {seconds:.0f} s")
    return {cell: final_figures(plan.out / cell.name, steps) or {} for cell in plan.cells}


class Trainings:
    """The processes that train. As a context it stops them all when it is left by an error or an interrupt."""

    def __init__(self, plan: Plan, ranks: int):
        self._plan, self._ranks = plan, ranks
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._over = Lock(), False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        with self._lock:
            self._over = kind is not None
            for process in self._running if self._over else ():
                process.terminate()
        if kind is KeyboardInterrupt:
            raise Stopped(f"stopped; the same command resumes the trainings in {self._plan.out}")

    def finish(self, cell: Cell) -> tuple[Cell, float]:
        """Train to the last step, and return the cell and the seconds that it took. Raises UserError and Stopped."""
        started, log = time.monotonic(), self._plan.out / f"{cell.name}.log"
        with log.open("ab") as output:
            with self._lock:
                if self._over:
                    raise Stopped("another training has failed")
                process = subprocess.Popen(self._command(cell), stdout=output, stderr=output)
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code == STOPPED_EXIT or (code and self._over):
            raise Stopped(f"{cell.name} was stopped; the same command resumes it")
        if code:
            raise UserError(f"{cell.name} ended with exit code {code}; its log is {log}: {_last_line(log)}")
        return cell, time.monotonic() - started

    def _command(self, cell: Cell) -> list[str]:
        launch = [sys.executable, "-m"]
        if self._ranks > 1:
            from asda.engine.processes import free_port  # takes seconds

            launcher = str(Path(sys.executable).with_name("deepspeed"))
            ranks = ["--num_accelerators", str(self._ranks), "--master_port", str(free_port())]
            launch = [launcher, *ranks, "--module"]
        return [*launch, "asda.train", "--config", str(self._plan.config), *self._plan.arguments(cell)]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    errors = [line for line in lines if "error: " in line]
    return (errors or [line for line in lines if line.strip()] or ["it is empty"])[-1]


def final_figures(folder: Path, steps: int) -> dict[str, float] | None:
    """Return the metrics of a finished run on its held-out clips; None if it is not finished."""
    from asda.run.log import read_metrics  # brings torch

    if not (folder / "metrics.jsonl").is_file():
        return None
    entries = [entry for entry in read_metrics(folder, "valid") if entry["step"] == steps]
    return {name: entries[-1][name] for name in METRICS if name in entries[-1]} if entries else None


def table(figures: Figures, metric: str) -> list[str]:
    """Return a line for each fold, over its seeds, and one for the mean over all runs."""
    folds = list(dict.fromkeys(cell.fold for cell in figures))
    of_fold = {fold: [f[metric] for cell, f in figures.items() if cell.fold == fold] for fold in folds}
    lines = [f"{fold:12} {_spread(values, metric)}" for fold, values in of_fold.items()]
    means = [statistics.fmean(values) for values in of_fold.values()]
    deviation = f"  (deviation over folds {_shown(statistics.stdev(means), metric)})" if len(means) > 1 else ""
    return [*lines, f"{'mean':12} {_spread([v for values in of_fold.values() for v in values], metric)}{deviation}"]


def _spread(values: Sequence[float], metric: str) -> str:
    half = f" +- {_shown(interval(values), metric)}" if len(values) > 1 else ""
    return f"{_shown(statistics.fmean(values), metric)}{half}  of {len(values)}"


def _shown(value: float, metric: str) -> str:
    return percent(value) if metric == "accuracy" else f"{value:.3f}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, and print."""
    args = parse_args(argv)
    plan = make_plan(args)
    claim(plan)
    if args.against:  # after the claim, because a call may be compared with itself
        check_same_clips(plan, args.against)
    figures = train_all(plan, args.jobs, args.ranks)
    print(f"{write_record(plan, figures)}: {len(figures)} runs")
    theirs = paired(figures, read_figures(args.against), args.against) if args.against else {}
    for metric in METRICS:
        if not all(metric in of_cell for of_cell in figures.values()):
            continue
        print(f"\n{metric}", *table(figures, metric), sep="\n")
        if theirs:
            values = [figures[cell][metric] - theirs[cell][metric] for cell in figures]
            print(f"{'difference':12} {_spread(values, metric)}  to {args.against}")
