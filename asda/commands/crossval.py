"""A configuration over held-out splits and seeds: mean, deviation and interval, and the difference to another such run.

    asda crossval --config configs/esc50_asda.json --data shards/esc50 --out runs/esc50

Each split of the dataset is held out in turn, and the others train. Every training is a run of asda/train.py in a
folder of its own; what is judged is its last step. Stopped, the same command goes on; finished, it only prints.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import xxhash
from tqdm import tqdm

from asda.config.run import Config, load_config
from asda.data.clips import ClipDataset
from asda.data.remote.cache import CacheConfig
from asda.data.remote.fetch import shareable, without_credentials
from asda.data.shards.index import DatasetIndex, SplitIndex
from asda.data.shards.read import load_dataset
from asda.errors import STOPPED_EXIT, Stopped, UserError, exit_with_sentence
from asda.run.log import read_metrics
from asda.run.resume import changes, decides

Part = TypeVar("Part", str, int)
ROOT = Path(__file__).resolve().parent.parent
RECORD = "crossval.json"
GIVEN = {"run.seed": "--seeds", "run.folder": "--out", "data.train": "--data", "data.valid": "--data and --hold-out"}
METRICS = ("accuracy", "mAP")  # a run reports one or both
# Quantiles 0.975 of Student's t with 1, 2, ... 29 degrees of freedom; beyond, the normal one is off by less than 5 %
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
NORMAL = 1.960

EXAMPLES = """examples:
  asda crossval --config configs/esc50_asda.json --data shards/esc50 --out runs/esc50
      the five folds of ESC-50; prints each, then their mean and deviation
  asda crossval --config configs/real_finetune.json --data shards/words --hold-out valid --seeds 1,2,3 \\
      --out runs/words objective.init_from=runs/a
      trains on all splits but valid, with three seeds
  asda crossval ... --out runs/scratch objective.init_from= --against runs/words
      as well, and then the difference of the two, run by run
  asda crossval ... --seeds 1,2,3 'objective.init_from=runs/pretrained-{seed}'
      {seed} and {fold} in an override stand for those of the run

The interval is Student's, 95 %, over all runs, or over all differences of runs with equal fold and seed. Runs share
clips: it says how far the mean moves with fold and seed, not with other recordings."""


@dataclass(frozen=True)
class Cell:
    """One training: what it holds out, and its seed."""

    fold: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.fold}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """All trainings of one call."""

    config: Path
    overrides: tuple[str, ...]
    data: str
    splits: tuple[str, ...]
    cells: tuple[Cell, ...]
    out: Path
    hashes: dict[str, str]  # of each split: its shards, and the order of the classes

    def arguments(self, cell: Cell) -> list[str]:
        """Overrides of one training."""
        own = [text.replace("{seed}", str(cell.seed)).replace("{fold}", cell.fold) for text in self.overrides]
        train = other_splits(self.data, self.splits, cell.fold)
        places = [f"data.train={self.data}:{train}", f"data.valid={self.data}:{cell.fold}"]
        return [*own, *places, f"run.seed={cell.seed}", f"run.folder={self.out / cell.name}"]

    def resolved(self, cell: Cell) -> Config:
        """The configuration of one training, checked."""
        return load_config(self.config, self.arguments(cell))


def run(plan: Plan, jobs: int, ranks: int) -> dict[Cell, dict[str, float]]:
    """Do every training that is not finished, and return the figures of all.

    Raises:
        UserError: a training failed; its message is the last line of its log.
        Stopped: this process was asked to; so were the trainings, which have saved.
    """
    steps = plan.resolved(plan.cells[0]).optimizer.steps
    waiting = [cell for cell in plan.cells if figures_of(plan.out / cell.name, steps) is None]
    bar = tqdm(total=len(plan.cells), initial=len(plan.cells) - len(waiting), unit="run", disable=None)
    trainings = Trainings(plan, ranks)
    with ThreadPoolExecutor(jobs) as pool, trainings:
        for cell, seconds in pool.map(trainings.finish, waiting):
            bar.update()
            tqdm.write(f"{cell.name}: {in_words(figures_of(plan.out / cell.name, steps) or {})}  {seconds:.0f} s")
    bar.close()
    return {cell: figures_of(plan.out / cell.name, steps) or {} for cell in plan.cells}


class Trainings:
    """The processes that train. As a context it ends them, once, when it is left by an error or a signal."""

    def __init__(self, plan: Plan, ranks: int):
        self._plan, self._ranks = plan, ranks
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._over = Lock(), False

    def __enter__(self) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        with self._lock:
            self._over = kind is not None
            for process in self._running if self._over else ():
                process.terminate()
        if kind is KeyboardInterrupt:
            raise Stopped(f"stopped; the same command goes on with the trainings in {self._plan.out}")

    def finish(self, cell: Cell) -> tuple[Cell, float]:
        """Train to the last step; the cell and its seconds."""
        started, log = time.monotonic(), self._plan.out / f"{cell.name}.log"
        with log.open("ab") as output:
            with self._lock:
                if self._over:
                    raise Stopped("another training has failed")
                process = subprocess.Popen(self._command(cell), stdout=output, stderr=output, cwd=Path.cwd())
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code == STOPPED_EXIT or (code and self._over):
            raise Stopped(f"{cell.name} was stopped; the same command goes on")
        if code:
            raise UserError(f"{cell.name} ended with exit code {code}; all it said is in {log}: {_last_line(log)}")
        return cell, time.monotonic() - started

    def _command(self, cell: Cell) -> list[str]:
        launch = [sys.executable]
        if self._ranks > 1:
            from asda.engine.processes import free_port  # takes seconds

            launcher = str(Path(sys.executable).with_name("deepspeed"))
            launch = [launcher, "--num_accelerators", str(self._ranks), "--master_port", str(free_port())]
        training = [str(ROOT / "asda/train.py"), "--config", str(self._plan.config)]
        return [*launch, *training, *self._plan.arguments(cell)]


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    errors = [line for line in lines if "error: " in line]
    return (errors or [line for line in lines if line.strip()] or ["nothing"])[-1]


def figures_of(folder: Path, steps: int) -> dict[str, float] | None:
    """What a finished run reached on its held-out clips; None where it is not finished."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    entries = [entry for entry in read_metrics(folder, "valid") if entry["step"] == steps]
    return {name: entries[-1][name] for name in METRICS if name in entries[-1]} if entries else None


def in_words(figures: dict[str, float]) -> str:
    """One line: accuracy 81.2 %  mAP 0.873."""
    words = {"accuracy": lambda value: f"{100 * value:.1f} %", "mAP": lambda value: f"{value:.3f}"}
    return "  ".join(f"{name} {words[name](figures[name])}" for name in METRICS if name in figures)


def interval(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of the mean of two values or more."""
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def table(figures: dict[Cell, dict[str, float]], metric: str) -> list[str]:
    """A row for every fold, over its seeds, then the mean over all."""
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
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def claim(plan: Plan) -> None:
    """Make the folder of the runs, unless it holds runs of another call.

    Raises:
        UserError: it does, also where the configuration or the shards have changed since; what is finished there would
            pass for this call's.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    path = plan.out / RECORD
    if not path.exists():
        write(plan, {})
    theirs = _parsed(path)
    for name, value in _about(plan).items():
        if theirs.get(name) == value:
            continue
        if name == "shards":
            raise UserError(
                f"the shards of {without_credentials(plan.data)} have changed since the runs in {plan.out} began; give "
                "another --out"
            )
        was, now = (json.dumps(shareable(some)) for some in (theirs.get(name), value))
        raise UserError(f"{plan.out} holds runs whose {name} was {was}, not {now}; give another --out")
    for cell in plan.cells:
        check_unchanged(plan, cell)


def check_unchanged(plan: Plan, cell: Cell) -> None:
    """Compare a training that has begun with what this call would train there.

    Raises:
        UserError: a value of the configuration that decides its figures is not what it was.
    """
    folder, config = plan.out / cell.name, plan.resolved(cell)
    if not (folder / "config.json").is_file():
        return
    if config.data.log_mel == "dataset":  # figures in what the training has written
        cache = CacheConfig(config.data.cache, config.data.cache_gib)
        dataset = ClipDataset(*(part.data for part in config.data.datasets), labelled=False, cache=cache)
        config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": dataset.log_mel})})
    changed = [line for key, line in changes(load_config(folder / "config.json"), config).items() if decides(key)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with other values: {changed[0]}{more}; set them back, or give another --out"
        )


def write(plan: Plan, figures: dict[Cell, dict[str, float]]) -> Path:
    """The figures of every run as JSON, in the folder of all."""
    path = plan.out / RECORD
    runs = [asdict(cell) | of_cell for cell, of_cell in figures.items()]
    half = path.with_suffix(".tmp")  # a kill leaves the old file or the new one
    half.write_text(json.dumps(_about(plan) | {"runs": runs}, indent=1) + "\n")
    half.replace(path)
    return path


def read(folder: Path) -> dict[Cell, dict[str, float]]:
    """What `write` has written."""
    runs = _parsed(folder / RECORD)["runs"]
    return {Cell(run["fold"], run["seed"]): {name: run[name] for name in METRICS if name in run} for run in runs}


def check_same_clips(plan: Plan, against: Path) -> None:
    """Raise UserError where the other call judged other clips, which no difference could be paired with."""
    if not (against / RECORD).is_file():
        raise UserError(f"{against / RECORD} is missing; --against names the --out of another call of this tool")
    theirs = _parsed(against / RECORD)
    for fold in dict.fromkeys(cell.fold for cell in plan.cells):
        if theirs.get("shards", {}).get(fold) != plan.hashes[fold]:
            raise UserError(
                f"--against {against} was judged on {without_credentials(str(theirs.get('data')))}, which did not have "
                f"the {fold} of {without_credentials(plan.data)} as it is now; give the --out of a call with that"
            )


def split_hashes(index: DatasetIndex) -> dict[str, str]:
    """By the name of each split, one hash of its shards and of the classes in their order."""

    def hashed(split: SplitIndex) -> str:
        contents = [[shard.hash for shard in split.shards], index.vocabulary]
        return xxhash.xxh3_64_hexdigest(json.dumps(contents).encode())

    return {name: hashed(split) for name, split in index.splits.items()}


def paired(figures: dict[Cell, dict[str, float]], against: Path) -> dict[Cell, dict[str, float]]:
    """The other call's figures of the same runs.

    Raises:
        UserError: it has no such run, or lacks a figure of it.
    """
    theirs = read(against)
    for cell, of_cell in figures.items():
        if cell not in theirs:
            raise UserError(f"--against {against} has no finished run {cell.name}; give it the same folds and seeds")
        for metric in of_cell:
            if theirs[cell].get(metric) is None:
                raise UserError(
                    f"--against {against} has no {metric} of {cell.name}, which a difference needs; run that call again"
                )
    return theirs


def _parsed(path: Path) -> dict[str, Any]:
    """A record; its rows are of runs."""
    try:
        found = json.loads(path.read_text())
        whole = all({"fold", "seed"} <= run.keys() for run in found["runs"])
        if whole and isinstance(found.get("shards", {}), dict):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is not what this tool has written; remove it, the runs beside it stay")


def _about(plan: Plan) -> dict[str, object]:
    return {
        "config": str(plan.config),
        "data": plan.data,
        "overrides": list(plan.overrides),
        "shards": plan.hashes,
    }


def planned(args: argparse.Namespace) -> Plan:
    """The trainings that the command line asks for.

    Raises:
        UserError: the dataset has no such split, or nothing would be left to train on; the configuration is wrong; an
            override is of what this tool gives each run.
    """
    for text in args.overrides:
        if instead := GIVEN.get(text.partition("=")[0]):
            raise UserError(f"{text} would be replaced in every run; give {instead}")
    for name in ("jobs", "ranks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; sys.argv by default."""
    parser = argparse.ArgumentParser(
        prog="asda crossval",
        description="Train a configuration once for every held-out split and seed, and sum up.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, type=Path, help="a run with objective.kind classify")
    add("--data", required=True, help="folder or URL of a dataset with at least two splits")
    add("--hold-out", metavar="A,B", type=names, help="splits to hold out, one after another (default: every split)")
    add("--seeds", metavar="1,2", type=numbers, default=[1], help="values of run.seed (default: 1)")
    add("--out", required=True, type=Path, help="folder of the runs, their logs and crossval.json")
    add("--against", type=Path, help="--out of another call with the same clips held out and seeds: the difference")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    add("--ranks", type=int, default=1, help="ranks of each training, by deepspeed (default: 1, plain python)")
    add("overrides", nargs="*", metavar="section.key=value", help="as for asda/train.py")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, and print."""
    args = parse_args(argv)
    plan = planned(args)
    claim(plan)
    if args.against:  # after the claim, because a call may be compared with itself
        check_same_clips(plan, args.against)
    figures = run(plan, args.jobs, args.ranks)
    print(f"{write(plan, figures)}: {len(figures)} runs")
    theirs = paired(figures, args.against) if args.against else {}
    for metric in METRICS:
        if not all(metric in of_cell for of_cell in figures.values()):
            continue
        print(f"\n{metric}", *table(figures, metric), sep="\n")
        if theirs:
            values = [figures[cell][metric] - theirs[cell][metric] for cell in figures]
            print(f"{'difference':12} {_spread(values, metric)}  to {args.against}")


def other_splits(data: str, splits: Sequence[str], fold: str) -> str:
    """What is left to train on where one split is held out: fold1+fold3.

    Raises:
        UserError: the dataset has no such split, or no other.
    """
    if fold not in splits or len(splits) < 2:
        where = without_credentials(data)
        raise UserError(
            f"--hold-out {fold}: {where} has the splits {', '.join(splits)}; name one or more of at least two"
        )
    return "+".join(split for split in splits if split != fold)


def names(text: str) -> list[str]:
    """Parts between commas. Raises UserError where one stands twice: its figures would count twice."""
    return _once(text, text.split(","))


def numbers(text: str) -> list[int]:
    """Whole numbers between commas, as names."""
    return _once(text, [int(number) for number in text.split(",")])


def _once(text: str, parts: list[Part]) -> list[Part]:
    for part in parts:
        if parts.count(part) > 1:
            raise UserError(f"{text} names {part} twice; name each once")
    return parts


if __name__ == "__main__":
    exit_with_sentence(main)
