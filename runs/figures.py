"""Draw the picture of docs/results.md from runs/exp, which the scripts beside this file fill.

python runs/figures.py        writes docs/results.svg; what has not been run is left out
"""

import statistics
from pathlib import Path
from typing import Any

import tables

from asda.commands.pictures import pyplot
from asda.errors import exit_with_sentence
from asda.evaluation.folds import interval

OUT = Path("docs/results.svg")
CHANCE = {"esc10": 10, "us8k": 10, "speech_commands": 100 / 13, "arabic_sc": 2.5}  # %
OURS, THEIRS, LINE = "#1f5fa8", "#c2571a", "#8894a0"
DOT = {"fmt": "o", "capsize": 3, "markersize": 5, "linewidth": 1.2}


def draw() -> None:
    """Draw three panels: with and without pre-training, what each choice changes, where attention falls."""
    plt = pyplot("runs/figures.py")
    plt.rcParams.update({"svg.hashsalt": "asda", "svg.fonttype": "none", "font.size": 9})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained")
    _transfer(axes[0])
    _ablations(axes[1])
    _attention(axes[2])
    figure.savefig(OUT, metadata={"Date": None})
    print(f"written {OUT}")


def _transfer(axes: Any) -> None:
    axes.set_title("Accuracy in %, equal fine-tuning")
    tasks = [task for task in tables.TASKS if tables.accuracies(f"{task}-pretrained")]
    for start, colour, shift in (("pretrained", OURS, -0.12), ("scratch", THEIRS, 0.12)):
        for row, task in enumerate(tasks):
            mean, half = _percent(list((tables.accuracies(f"{task}-{start}") or {}).values()))
            axes.errorbar(mean, row + shift, xerr=half, color=colour, label=start if not row else None, **DOT)
    for row, task in enumerate(tasks):
        axes.plot([CHANCE[task]] * 2, [row - 0.3, row + 0.3], color=LINE, label="chance" if not row else None)
    axes.set_xlim(0, 100)
    _name_rows(axes, tasks)
    axes.legend(frameon=False, loc="lower right")


def _ablations(axes: Any) -> None:
    axes.set_title("esc10: points more than the base\n(lambda 0.1, 8 students, utterance weight 1)")
    base = tables.accuracies("esc10-base") or {}
    done = {name: found for name in tables.VARIANTS[1:] if base and (found := tables.accuracies(f"esc10-{name}"))}
    for row, found in enumerate(done.values()):
        mean, half = _percent([found[cell] - base[cell] for cell in found])
        axes.errorbar(mean, row, xerr=half, color=OURS, **DOT)
    axes.axvline(0, color=LINE, linewidth=1)
    _name_rows(axes, list(done))


def _attention(axes: Any) -> None:
    axes.set_title("Weight on foreign sound\nover that on the clip's own; a dot is a seed")
    for row, name in enumerate(tables.LAMBDAS):
        for network, shape, shift in (("teacher", "o", -0.15), ("fine-tuned", "s", 0.15)):
            maps = zip(
                tables.attention_of(name, network),
                (THEIRS, OURS),
                ("A1, or the only map", "|A1 - lambda A2|"),
                strict=True,
            )
            for values, colour, label in maps:
                of = f"{network}: {label}" if name == "base" else None
                axes.plot(values, [row + shift] * len(values), shape, color=colour, markersize=5, label=of)
    axes.axvline(1, color=LINE, linewidth=1)
    _name_rows(axes, list(tables.LAMBDAS))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.08), ncols=2)


def _percent(shares: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval, in percent."""
    return 100 * statistics.fmean(shares), 100 * interval(shares)


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#e3e8ee", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    exit_with_sentence(draw)
