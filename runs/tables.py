"""Print the tables of docs/results.md from runs/exp, which the scripts beside this file fill.

python runs/tables.py
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from asda.errors import exit_with_sentence
from asda.evaluation.folds import RECORD, Cell, interval, read_figures
from asda.run.log import read_metrics

RUNS = Path("runs/exp")
SEEDS = (1, 2, 3)
FOLDS = ("fold1", "fold2", "fold3", "fold4")
TASKS = ("esc10", "us8k", "speech_commands", "arabic_sc")
VARIANTS = (
    "base", "one_map", "lambda_0", "lambda_0.3", "lambda_0.5", "lambda_learned", "utterance_0", "utterance_96",
    "students_1", "students_4", "students_16", "students_1_equal", "students_4_equal", "students_16_equal",
)  # fmt: skip
LAMBDAS = ("one_map", "lambda_0", "base", "lambda_0.3", "lambda_0.5", "lambda_learned")
NETWORKS = {  # whose attention is measured: the record, and the run in it
    "teacher": ("attention", "{name}-{seed}"),
    "fine-tuned": ("attention-tuned", "esc10-{name}/fold4-seed{seed}"),
}
HAM = ("ham-ast", "ham-channels", "ham-conformer3", "ham-conformer6-channels")
Row = list[str]


def accuracies(name: str) -> dict[Cell, float] | None:
    """Return the accuracies of a finished asda crossval by training; None if it has not been run."""
    path = RUNS / name
    if not (path / RECORD).is_file():
        return None
    return {cell: figures["accuracy"] for cell, figures in read_figures(path).items()} or None


def read_json(name: str) -> dict | None:
    """Read a JSON file of runs/exp; None if it is missing."""
    return json.loads((RUNS / name).read_text(encoding="utf-8")) if (RUNS / name).is_file() else None


def rounded(share: float) -> str:
    """Format a share in percent."""
    return f"{100 * share:.1f}"


def percent(values: Sequence[float]) -> str:
    """Format the mean and half the width of its 95 % interval, in percent."""
    return f"{100 * statistics.fmean(values):.1f} +- {100 * interval(values):.1f}"


def difference(ours: dict[Cell, float] | None, theirs: dict[Cell, float] | None) -> str:
    """Format the mean difference, paired by fold and seed."""
    if ours is None or theirs is None:
        return ""
    return percent([ours[cell] - theirs[cell] for cell in ours])


def told(values: dict[Cell, float] | None) -> str:
    """Format the mean over folds and seeds, or say that it has not been run."""
    return "not run" if values is None else percent(list(values.values()))


def transfer() -> list[Row]:
    """Compare pre-training with training from scratch."""
    rows = [["task", "pre-trained, %", "from scratch, %", "difference", "runs each"]]
    for task in TASKS:
        ours, theirs = accuracies(f"{task}-pretrained"), accuracies(f"{task}-scratch")
        rows.append([task, told(ours), told(theirs), difference(ours, theirs), str(len(ours or ()))])
    return rows


def scratch() -> list[Row]:
    """Train from scratch at other learning rates than the 5e-4 above."""
    rows = [["esc10, learning rate", "from scratch, %", "pre-trained at 5e-4 is ahead by"]]
    ours = accuracies("esc10-pretrained") or {}
    for rate in ("0.00025", "0.0005", "0.001"):
        found = accuracies("esc10-scratch" if rate == "0.0005" else f"esc10-scratch-{rate}")
        rows.append([rate, told(found), difference(ours, found) if ours else ""])
    return rows


def best() -> list[Row]:
    """Compare the best small model on esc10 with logistic regression on log-mel statistics, on the same folds."""
    rows = [["esc10, accuracy in %", "mean", *FOLDS]]
    ours, baseline = accuracies("esc10-best"), read_json("logmel-esc10.json")
    if ours is None:
        return rows
    of_folds = [statistics.fmean(share for cell, share in ours.items() if cell.fold == fold) for fold in FOLDS]
    rows.append(["one network", told(ours), *map(rounded, of_folds)])
    ensembles = [found for fold in FOLDS if (found := read_json(f"esc10-best/ensemble-{fold}.json"))]
    if len(ensembles) == len(FOLDS):
        rows.append(_of_folds("three seeds, averaged", [found["accuracy"] for found in ensembles]))
    if baseline:
        theirs = [baseline[fold] for fold in FOLDS]
        ahead = [a - b for a, b in zip(of_folds, theirs, strict=True)]
        rows.append(_of_folds("logistic regression", theirs))
        rows.append(["one network is ahead by", percent(ahead), *map(rounded, ahead)])
    return rows


def _of_folds(name: str, shares: list[float]) -> Row:
    return [name, rounded(statistics.fmean(shares)), *map(rounded, shares)]


def probes() -> list[Row]:
    """Evaluate frozen features."""
    rows = [["task", "encoder", "neighbours, %", "linear, %"]]
    for task in TASKS:
        judged = (read_json(f"probe-{task}.json") or {"judged": []})["judged"]
        for encoder in ("teacher", "random") if judged else ():
            shares = [[of_set[encoder][f"{judge}_accuracy"] for of_set in judged] for judge in ("knn", "linear")]
            rows.append([task, encoder, *(rounded(statistics.fmean(of_judge)) for of_judge in shares)])
        if baseline := read_json(f"logmel-{task}.json"):
            rows.append([task, "log-mel statistics", "", rounded(statistics.fmean(baseline.values()))])
    return rows


def ablations() -> list[Row]:
    """Compare all variants: their pre-training, and their accuracy on esc10."""
    head = ["variant", "frame loss", "clips/s", "peak GiB", "probe, linear, %", "esc10, %", "difference to base"]
    base = accuracies("esc10-base")
    scratch = accuracies("esc10-small-scratch")
    rows = [["not pre-trained", *[""] * 4, told(scratch), difference(scratch, base)]]
    return [head, *rows, *(_ablation(name, base) for name in VARIANTS)]


def _ablation(name: str, base: dict[Cell, float] | None) -> Row:
    runs = [RUNS / f"{name}-{seed}" for seed in SEEDS]
    if not all((run / "finished").is_file() for run in runs):
        return [name, "not run", *[""] * 5]
    lines = [read_metrics(run, "train") for run in runs]
    loss = statistics.fmean(of_run[-1]["frame_loss"] for of_run in lines)
    # The median ignores hours in which something else ran.
    pace = statistics.median(line["clips_per_s"] for of_run in lines for line in of_run)
    memory = max(line["rss_gib"] for of_run in lines for line in of_run)
    linear = [read_metrics(run, "probe")[-1]["linear_accuracy"] for run in runs]
    ours = accuracies(f"esc10-{name}")
    trained = [f"{loss:.2f}", f"{pace:.1f}", f"{memory:.2f}", percent(linear)]
    return [name, *trained, told(ours), "" if name == "base" else difference(ours, base)]


def lambdas() -> list[Row]:
    """Evaluate the ablations' teachers on two more tasks: does the best lambda depend on the task?"""
    rows = [["variant", "us8k, linear, %", "difference to base", "speech_commands, linear, %", "difference to base"]]
    for name in LAMBDAS:
        row = [name]
        for task in ("us8k", "speech_commands"):
            ours, base = _of_seeds(task, name), _of_seeds(task, "base")
            row += [told(ours), "" if name == "base" else difference(ours, base)]
        rows.append(row)
    return rows


def _of_seeds(task: str, name: str) -> dict[Cell, float] | None:
    """Return the linear layer's accuracy by seed, averaged over all held-out sets."""
    found = {seed: read_json(f"probe-{task}-{name}-{seed}.json") for seed in SEEDS}
    if not all(found.values()):
        return None
    return {
        Cell("all", seed): statistics.fmean(one["teacher"]["linear_accuracy"] for one in of_seed["judged"])
        for seed, of_seed in found.items()
        if of_seed
    }


def ham() -> list[Row]:
    """Compare AST with what HAM-AST adds."""
    first = accuracies(HAM[0])
    rows = [["esc10", "accuracy, %", "difference to AST"]]
    for name in HAM:
        rows.append([name, told(accuracies(name)), "" if name == HAM[0] else difference(accuracies(name), first)])
    return rows


def attention() -> list[Row]:
    """Measure attention to a foreign half over that to the clip's own, by map: means over blocks, then over seeds."""
    maps = ("A1, or the only map", "abs(A1 - lambda A2)")
    rows = [["variant", *(f"{network}: {of_map}" for network in NETWORKS for of_map in maps)]]
    for name in LAMBDAS:
        of_maps = [values for network in NETWORKS for values in attention_of(name, network)]
        rows.append([name, *map(_mean_ratio, of_maps)])
    return rows


def attention_of(name: str, network: str) -> list[list[float]]:
    """Return the ratios of all seeds: for the first or only map, and for the difference (empty with one map)."""
    record, run = NETWORKS[network]
    found = {seed: one["runs"] for seed in SEEDS if (one := read_json(f"{record}-{seed}.json"))}
    each = [_ratios(runs[run.format(name=name, seed=seed)]) for seed, runs in found.items()]
    return [[ratios[number] for ratios in each if number < len(ratios)] for number in range(2)]


def _mean_ratio(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}" if values else ""
    return f"{mean} +- {interval(values):.3f}" if len(values) > 1 else mean


def _ratios(maps: dict[str, list[dict[str, dict[str, float]]]]) -> list[float]:
    """Return means over blocks of `unrelated / own`, for the first map and the difference, or for the only map."""
    wanted = [blocks for name, blocks in maps.items() if name != "A2" and "unrelated / own" in blocks[0]]
    return [statistics.fmean(block["unrelated / own"]["value"] for block in blocks) for blocks in wanted]


def main() -> None:
    """Print all tables, in Markdown."""
    for table in (transfer, scratch, best, probes, ablations, lambdas, ham, attention):
        head, *rows = table()
        lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
        print(f"\n{table.__doc__}\n", *lines, sep="\n")


if __name__ == "__main__":
    exit_with_sentence(main)
