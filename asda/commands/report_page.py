"""The content of report.html.jinja: the rows and pictures of each section, by the names that the template uses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from asda.commands.report_figures import (
    CLASSIFYING,
    MOST_POINTS,
    NUMBERED_CLASSES,
    PRETRAINING,
    Curve,
    attention_panels,
    block_panel,
    confusion_inches,
    confusion_picture,
    curve_panels,
    look,
    mask_panels,
    swatch,
)
from asda.commands.report_runs import (
    Judged,
    Run,
    confusions,
    differences,
    held_out,
    in_words,
    median,
    training_hours,
)
from asda.commands.text import percent
from asda.config.model import PretrainConfig
from asda.config.presets import departures
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.order import Draw
from asda.data.remote.cache import CacheConfig
from asda.data.remote.fetch import shareable
from asda.errors import UserError
from asda.evaluation.attention import (
    SIGNED,
    Network,
    choose_clips,
    clip_log_mel,
    load_network,
    make_mixtures,
    measure,
    ratio_estimate,
)

TEMPLATE = "report.html.jinja"
LOOKED_THROUGH = 24  # clips, of which the liveliest is pictured
MIXTURES = 16  # clips for the measure of irrelevant context
MOST_CONFUSIONS = 8  # pairs of classes that are named
PIXELS_AN_INCH = 96  # in CSS: pictures of this scale have letters as large as they were drawn
LONG_VALUE = 48  # characters of a configuration's value; longer ones are folded

Row = list[Any]


def build_page(runs: Sequence[Run]) -> str:
    """Return the whole page, as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return (
        page.get_template(TEMPLATE)
        .render(
            cards=[{"name": r.name, "colour": look(number)[0], "facts": facts(r)} for number, r in enumerate(runs)],
            classified=[_classifier_row(run, judged) for run in runs if not run.pretrains for judged in held_out(run)],
            probed=[_probe_row(run, judged) for run in runs if run.pretrains for judged in held_out(run)],
            curves=[part for part in _curves(runs) if part["legend"]],
            throughput=[_throughput_row(run) for run in runs],
            confusions=[_confusion(run) for run in runs if "confusion" in run.evaluation],
            pictured=[_pictures(run) for run in runs if run.pretrains],
            warnings=[(run.name, run.entries["warning"]) for run in runs if run.entries["warning"]],
            **_configurations(runs),
        )
        .lstrip()
    )


def facts(run: Run) -> dict[str, Any]:
    """Return what a run is, and what it reached, in a few words each."""
    config, about = run.config, run.config.about
    found = {
        "objective": _objective(run),
        "steps": f"{run.steps_done:,} of {config.optimizer.steps:,}",
        "clips/s": _number(median(run.of_training("clips_per_s")), ".1f"),
        "training": f"{training_hours(run):.2f} h",
        "ranks": f"{run.state.world_size}" if run.state else "not known",
        "precision": config.engine.precision,
        "data": in_words(train) if isinstance(train := config.data.train, str) else f"{len(train)} datasets",
        "held out": _headline(run),
    }
    stories = {"about": about.get("what", ""), "meant for": about.get("hardware", "")}
    return found | {name: text for name, text in stories.items() if text}


def _objective(run: Run) -> str:
    objective = run.config.objective
    if isinstance(objective, PretrainConfig):
        return f"pre-training, {objective.students} students, {100 * objective.mask.ratio:g} % hidden"
    start = f"from {objective.init_from}" if objective.init_from else "from scratch"
    return f"classification ({objective.loss}), {start}"


def _headline(run: Run) -> str:
    figures = next((judged.figures for judged in held_out(run)), {})
    names = {"accuracy": "accuracy", "knn_accuracy": "nearest neighbours", "linear_accuracy": "linear layer"}
    words = [f"{name} {percent(figures[key])}" for key, name in names.items() if key in figures]
    words += [
        f"{key.replace('_', ' ')} {figures[key]:.3f}" for key in ("mAP", "knn_mAP", "linear_mAP") if key in figures
    ]
    return ", ".join(words) or "nothing measured"


def _classifier_row(run: Run, judged: Judged) -> Row:
    figures = judged.figures
    guessed = "accuracy" in figures and figures.get("classes")
    return [
        run.name,
        _percent(figures.get("accuracy")),
        _number(figures.get("mAP"), ".3f"),
        judged.data or None,
        judged.source,
        figures.get("clips"),
        figures.get("classes"),
        percent(1 / figures["classes"]) if guessed else None,
        figures.get("step"),
    ]


def _probe_row(run: Run, judged: Judged) -> Row:
    figures = judged.figures
    measure = "accuracy" if "knn_accuracy" in figures else "mAP"
    words = _percent if measure == "accuracy" else lambda value: _number(value, ".3f")
    scores = [words(figures.get(f"{method}_{measure}")) for method in ("knn", "linear")]
    return [run.name, *scores, measure, judged.data or None, figures["step"]]


def _curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    kinds: list[tuple[str, bool, Sequence[Curve]]]
    kinds = [("Pre-training", True, PRETRAINING), ("Fine-tuning", False, CLASSIFYING)]
    parts = []
    for title, pretrains, curves in kinds:
        chosen = {number: run for number, run in enumerate(runs) if run.pretrains == pretrains}
        parts.append(
            {
                "title": title,
                "pretrains": pretrains,
                "panels": curve_panels(chosen, curves),
                "legend": [(swatch(number), run.name) for number, run in chosen.items()],
                "every": " or ".join(f"{n:,}" for n in sorted({run.config.run.log_every for run in chosen.values()})),
                "most_points": MOST_POINTS,
            }
        )
    return parts


def _throughput_row(run: Run) -> Row:
    rate, skipped = median(run.of_training("clips_per_s")), run.of_training("skipped_steps")
    return [
        run.name,
        _number(rate, ".1f"),
        _number(1000 * run.config.optimizer.batch / rate if rate else None, ".0f"),
        _number(median(run.of_training("tflop_per_s")), ".3f"),
        _percent(median(run.of_training("gemm_share"))),
        _percent(median(run.of_training("data_wait_share"))),
        _number(max(run.of_training("rss_gib"), default=None), ".2f"),
        _number(max(run.of_training("cuda_gib"), default=None), ".2f"),
        int(skipped[-1]) if skipped else None,
        len(run.entries["warning"]),
    ]


def _configurations(runs: Sequence[Run]) -> dict[str, Any]:
    """Return how one run departs from its preset or how several differ, and all configurations, without secrets."""
    first = runs[0].config
    trees = [shareable(run.config.model_dump(mode="json", by_alias=True)) for run in runs]
    return {
        "base": f"preset {first.preset}, size {first.size}",
        "departures": departures(shareable(first.model_dump(mode="json"))),
        "differences": [[key, *map(_folded, values)] for key, values in differences(runs).items()],
        "trees": [(run.name, json.dumps(tree, indent=2)) for run, tree in zip(runs, trees, strict=True)],
    }


def _folded(value: Any) -> str | dict[str, str] | None:
    """Return the text of a value; if it is long, its start and the whole, which opens on a click."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= LONG_VALUE:
        return text or '""'
    return {"start": f"{text[: LONG_VALUE - 8]} ...", "whole": text}


def _confusion(run: Run) -> dict[str, Any]:
    """Return the matrix of evaluation.json as a picture, and the classes that are confused most."""
    found = confusions(run)
    if found is None:
        return {"name": run.name, "picture": None}
    counts_CC, labels = found
    width = f"{PIXELS_AN_INCH * confusion_inches(len(labels)):.0f}"
    return {
        "name": run.name,
        "picture": confusion_picture(counts_CC, labels),
        "width": width,
        "most": "100%" if len(labels) <= NUMBERED_CLASSES else f"{width}px",  # a phone shows few classes whole
        "data": in_words(run.evaluation.get("data")),
        "worst": _worst(counts_CC, labels),
    }


def _worst(counts_CC: np.ndarray, labels: Sequence[str]) -> list[Row]:
    """Return the pairs of classes that are confused most: true, predicted, clips, clips of the true class."""
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    places = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(labels)) for place in places]
    return [[labels[t], labels[p], int(wrong_CC[t, p]), int(counts_CC[t].sum())] for t, p in pairs if wrong_CC[t, p]]


def _pictures(run: Run) -> dict[str, Any]:
    """Return the panels of masks and of attention, or why they are missing."""
    objective, data = run.config.objective, run.config.data
    assert isinstance(objective, PretrainConfig)
    if run.complaint:
        return {"name": run.name, "missing": run.complaint}
    try:
        network = load_network(run.folder)
        cache = CacheConfig(data.cache, data.cache_gib)
        dataset = ClipDataset(*(part.data for part in data.datasets), labelled=False, cache=cache)
        clip = _liveliest(dataset, network)
    except UserError as error:
        return {"name": run.name, "missing": str(error)}
    return {
        "name": run.name,
        "missing": "",
        "masks": mask_panels(clip, network, objective, run.config.run.seed),
        "attention": [*attention_panels(clip, network), *_noise_panel(dataset, network)],
        "students": objective.students,
        "hidden": f"{100 * objective.mask.ratio:g}",
        "patch": run.config.model.patch,
        "one_map": network.model.attention_lambda == "absent",
        "mixtures": MIXTURES,
    }


def _liveliest(dataset: ClipDataset, network: Network) -> Clip:
    """Return the clip whose patches change most over time: its picture shows more than one of steady noise."""
    patch = network.description.model.patch

    def liveliness(clip: Clip) -> float:
        mel_TF = clip_log_mel(clip, network.description)
        return float(mel_TF.reshape(-1, patch, mel_TF.shape[1] // patch, patch).mean((1, 3)).std(0).mean())

    return max(read_clips(dataset, [Draw(0, n) for n in range(min(LOOKED_THROUGH, len(dataset)))]), key=liveliness)


def _noise_panel(dataset: ClipDataset, network: Network) -> list[Markup]:
    """Draw the measure of irrelevant context; return nothing if the clips do not allow it."""
    try:
        mixtures = make_mixtures(choose_clips(dataset, MIXTURES, seed=0), [network], "clip", seed=0)
    except UserError:
        return []
    shares = {name: values for name, values in measure(network, mixtures).items() if name != SIGNED}
    return [block_panel({name: [ratio_estimate(*block_2B) for block_2B in values] for name, values in shares.items()})]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _percent(share: float | None) -> str | None:
    return None if share is None else percent(share)
