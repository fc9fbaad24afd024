"""The tables of docs/results.md, from what the scripts beside this file have left in runs/exp.

python runs/tables.py
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import crossval  # noqa: E402  in tools/

from asda.runlog import read_metrics  # noqa: E402

RUNS = Path("runs/exp")
SEEDS = (1, 2, 3)
FOLDS = (1, 2, 3, 4)
TASKS = ("esc10", "us8k", "speech_commands", "arabic_sc")
VARIANTS = (
    "base", "one_map", "lambda_0", "lambda_0.3", "lambda_0.5", "lambda_learned", "utterance_0", "utterance_96",
    "students_1", "students_4", "students_16", "students_1_equal", "students_4_equal", "students_16_equal",
)  # fmt: skip
LAMBDAS = ("one_map", "lambda_0", "base", "lambda_0.3", "lambda_0.5", "lambda_learned")
HAM = ("ham-ast", "ham-channels", "ham-conformer3", "ham-conformer6-channels")
Row = list[str]


def accuracies(name: str) -> dict[crossval.Cell, float] | None:
    """Of a finished call of tools/crossval.py."""
    path = RUNS / name
    if not (path / crossval.RECORD).is_file():
        return None
    return {cell: figures["accuracy"] for cell, figures in crossval.read(path).items()} or None


def percent(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    return f"{100 * statistics.fmean(values):.1f} +- {100 * crossval.interval(values):.1f}"


def difference(ours: dict[crossval.Cell, float] | None, theirs: dict[crossval.Cell, float] | None) -> str:
    """Run by run, of equal fold and seed."""
    if ours is None or theirs is None:
        return ""
    return percent([ours[cell] - theirs[cell] for cell in ours])


def told(values: dict[crossval.Cell, float] | None) -> str:
    """The mean over folds and seeds, or that it has not been run."""
    return "not run" if values is None else percent(list(values.values()))


def transfer() -> list[Row]:
    """Pre-trained against from scratch."""
    rows = [["task", "pre-trained, %", "from scratch, %", "difference", "runs each"]]
    for task in TASKS:
        ours, theirs = accuracies(f"{task}-pretrained"), accuracies(f"{task}-scratch")
        rows.append([task, told(ours), told(theirs), difference(ours, theirs), str(len(ours or ()))])
    return rows


def best() -> list[Row]:
    """The recipe that was chosen on us8k, on esc10."""
    rows = [["esc10", "accuracy, %", *(f"fold{fold}" for fold in FOLDS)]]
    ours = accuracies("esc10-best")
    if ours is not None:
        of_folds = [[share for cell, share in ours.items() if cell.fold == f"fold{fold}"] for fold in FOLDS]
        rows.append(["one network", told(ours), *(f"{100 * statistics.fmean(shares):.1f}" for shares in of_folds)])
    paths = [RUNS / f"esc10-best/ensemble-fold{fold}.json" for fold in FOLDS]
    if all(path.is_file() for path in paths):
        shares = [100 * json.loads(path.read_text())["accuracy"] for path in paths]
        rows.append(["three seeds, averaged", f"{statistics.fmean(shares):.1f}", *(f"{share:.1f}" for share in shares)])
    return rows


def probes() -> list[Row]:
    """Frozen features."""
    rows = [["task", "encoder", "neighbours, %", "linear, %"]]
    for task in TASKS:
        path = RUNS / f"probe-{task}.json"
        judged = json.loads(path.read_text())["judged"] if path.is_file() else []
        for encoder in ("teacher", "random") if judged else ():
            shares = [[of_set[encoder][f"{judge}_accuracy"] for of_set in judged] for judge in ("knn", "linear")]
            rows.append([task, encoder, *(f"{100 * statistics.fmean(of_judge):.1f}" for of_judge in shares)])
    return rows


def ablations() -> list[Row]:
    """Every variant: how its pre-training went, and what came of it on esc10."""
    head = ["variant", "frame loss", "clips/s", "peak GiB", "probe, linear, %", "esc10, %", "difference to base"]
    base = accuracies("esc10-base")
    return [head, *(_ablation(name, base) for name in VARIANTS)]


def _ablation(name: str, base: dict[crossval.Cell, float] | None) -> Row:
    runs = [RUNS / f"{name}-{seed}" for seed in SEEDS]
    if not all((run / "finished").is_file() for run in runs):
        return [name, "not run", *[""] * 5]
    lines = [read_metrics(run, "train") for run in runs]
    columns: list[Callable[[list[dict]], float]] = [
        lambda of_run: of_run[-1]["frame_loss"],
        lambda of_run: statistics.median(line["clips_per_s"] for line in of_run),
        lambda of_run: max(line["rss_gib"] for line in of_run),
    ]
    means = [f"{statistics.fmean(column(of_run) for of_run in lines):.2f}" for column in columns]
    linear = [read_metrics(run, "probe")[-1]["linear_accuracy"] for run in runs]
    ours = accuracies(f"esc10-{name}")
    return [name, *means, percent(linear), told(ours), "" if name == "base" else difference(ours, base)]


def ham() -> list[Row]:
    """AST and what HAM-AST adds."""
    first = accuracies(HAM[0])
    rows = [["esc10", "accuracy, %", "difference to AST"]]
    for name in HAM:
        rows.append([name, told(accuracies(name)), "" if name == HAM[0] else difference(accuracies(name), first)])
    return rows


def attention() -> list[Row]:
    """Weight on the unrelated half, over that on the clip's own: by the first map, and by the mixture."""
    rows = [["variant", "seed", "A1", "abs(A1 - lambda A2)"]]
    for seed in SEEDS:
        path = RUNS / f"attention-{seed}.json"
        if path.is_file():
            of_runs = json.loads(path.read_text())["runs"]
            rows += [[name, str(seed), *_ratios(of_runs[f"{name}-{seed}"])] for name in LAMBDAS]
    return rows


def _ratios(maps: dict[str, list[dict[str, dict[str, float]]]]) -> Row:
    """Means over blocks of `unrelated / own`, of the maps that have it."""
    wanted = [blocks for name, blocks in maps.items() if name != "A2" and "unrelated / own" in blocks[0]]
    return [f"{statistics.fmean(block['unrelated / own']['value'] for block in blocks):.3f}" for blocks in wanted]


def main() -> None:
    """Print all tables, in Markdown."""
    for table in (transfer, best, probes, ablations, ham, attention):
        head, *rows = table()
        lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
        print(f"\n{table.__doc__}\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
