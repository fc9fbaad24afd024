"""One HTML page about a run, or about several beside each other.

    asda report RUN [RUN ...] --out report.html

Pre-trainings and fine-tunings, mixed at will: what each is, held-out figures, curves, pace and memory, how the
configurations differ, confusions, what students see, where the teacher looks. Everything is inside the page, so it can
be mailed; nothing in it runs.
"""

import argparse
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    read_runs,
    training_hours,
)
from asda.config.model import PretrainConfig
from asda.config.presets import departures
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.order import Draw
from asda.data.remote.cache import CacheConfig
from asda.data.remote.fetch import shareable
from asda.errors import UserError, exit_with_sentence
from asda.evaluation.attention_maps import SIGNED, Network, clip_log_mel, load_network
from asda.evaluation.attention_noise import choose_clips, make_mixtures, measure, ratio_estimate
from asda.sharding.writer import write_file

EPILOG = """examples:
  asda report runs/mine
  asda report runs/pretrain runs/finetune runs/scratch --out comparison.html

A run whose data or checkpoints are not there has no pictures, and the page says why. Held-out figures are those of
asda/evaluate.py where it has been run and of data.test, of the best step and the last; else the newest of data.valid.
"""
LOOKED_THROUGH = 24  # clips, of which the liveliest is pictured
MIXTURES = 16  # clips for the measure of irrelevant context
MOST_CONFUSIONS = 8  # pairs of classes that are named
PIXELS_AN_INCH = 96  # of CSS, at which letters are as large as they were drawn
LONG_VALUE = 48  # characters of a configuration's value; longer ones are folded
NONE = "&ndash;"


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def write_report(args: argparse.Namespace) -> None:
    """Write the page."""
    page = build_page(read_runs(args.runs))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _write_page(args.out, page.encode())
    print(f"written {args.out}")


def _write_page(out: Path, page: bytes) -> None:
    """Write a whole file or nothing; what is there and no file, as /dev/stdout, is written as it is."""
    if out.exists() and not out.is_file():
        out.write_bytes(page)
    else:
        write_file(out.resolve(), page)


def build_page(runs: Sequence[Run]) -> str:
    """The whole page."""
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}")
    parts = [
        "" if len(runs) == 1 else f"<h1>{len(runs)} runs</h1>",
        _cards(runs),
        _held_out_section(runs),
        _curve_sections(runs),
        _throughput_section(runs),
        _configuration_section(runs),
        *(_confusion_section(run) for run in runs if "confusion" in run.evaluation),
        *(_picture_sections(run) for run in runs if run.pretrains),
        *(_warnings(run) for run in runs if run.entries["warning"]),
    ]
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>\n{css}</style></head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body></html>\n"


def _cards(runs: Sequence[Run]) -> str:
    """What each run is, in its colour."""
    cards = []
    for number, run in enumerate(runs):
        items = "".join(f"<dt>{name}</dt><dd>{_cell(value)}</dd>" for name, value in _facts(run).items())
        colour, level = look(number)[0], "h1" if len(runs) == 1 else "h2"
        cards.append(
            f'<section class="card" style="border-color: {colour}"><{level}>{html.escape(run.name)}</{level}>'
            f"<dl>{items}</dl></section>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _facts(run: Run) -> dict[str, Any]:
    config, about = run.config, run.config.about
    facts = {
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
    return facts | {name: text for name, text in stories.items() if text}


def _objective(run: Run) -> str:
    objective = run.config.objective
    if isinstance(objective, PretrainConfig):
        return f"pre-training, {objective.students} students, {100 * objective.mask.ratio:g} % hidden"
    start = f"from {objective.init_from}" if objective.init_from else "from scratch"
    return f"classification ({objective.loss}), {start}"


def _headline(run: Run) -> str:
    figures = next((judged.figures for judged in held_out(run)), {})
    names = {"accuracy": "accuracy", "knn_accuracy": "nearest neighbours", "linear_accuracy": "linear layer"}
    words = [f"{name} {100 * figures[key]:.1f} %" for key, name in names.items() if key in figures]
    words += [
        f"{key.replace('_', ' ')} {figures[key]:.3f}" for key in ("mAP", "knn_mAP", "linear_mAP") if key in figures
    ]
    return ", ".join(words) or "nothing measured"


def _held_out_section(runs: Sequence[Run]) -> str:
    tagged = [_classifier_row(run, judged) for run in runs if not run.pretrains for judged in held_out(run)]
    probed = [_probe_row(run, judged) for run in runs if run.pretrains for judged in held_out(run)]
    header = ["run", "accuracy", "mAP", "data", "source", "clips", "classes", "chance", "step"]
    parts = [_table(header, tagged)] if tagged else []
    if probed:
        note = "Pre-trainings, by labels they were not trained on (the probe of the newest evaluation):"
        header = ["run", "nearest neighbours", "linear layer", "measure", "data", "step"]
        parts += [f"<p>{note}</p>", _table(header, probed)]
    return "\n".join(
        ["<h2>Held-out clips</h2>", *(parts or ["<p>None of the runs has been judged on labels yet.</p>"])]
    )


def _classifier_row(run: Run, judged: Judged) -> list[Any]:
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
        _percent(1 / figures["classes"]) if guessed else None,
        figures.get("step"),
    ]


def _probe_row(run: Run, judged: Judged) -> list[Any]:
    figures = judged.figures
    measure = "accuracy" if "knn_accuracy" in figures else "mAP"
    words = _percent if measure == "accuracy" else lambda value: _number(value, ".3f")
    return [
        run.name,
        *(words(figures.get(f"{judge}_{measure}")) for judge in ("knn", "linear")),
        measure,
        judged.data or None,
        figures["step"],
    ]


def _curve_sections(runs: Sequence[Run]) -> str:
    numbered = dict(enumerate(runs))
    kinds = (("Pre-training", PRETRAINING, True), ("Fine-tuning", CLASSIFYING, False))
    parts = [
        _curves(t, {n: r for n, r in numbered.items() if r.pretrains == kind}, curves) for t, curves, kind in kinds
    ]
    return "\n".join(part for part in parts if part)


def _curves(title: str, runs: dict[int, Run], curves: Sequence[Curve]) -> str:
    panels = curve_panels(runs, curves)
    if not panels:
        return f"<h2>{title}: curves</h2>\n<p>There is no line of training on record yet.</p>" if runs else ""
    legend = "".join(f"<li>{swatch(number)}{html.escape(run.name)}</li>" for number, run in runs.items())
    every = " or ".join(f"{n:,}" for n in sorted({run.config.run.log_every for run in runs.values()}))
    collapse = " A spread of 0 would be collapse." if curves is PRETRAINING else ""
    note = (
        f"A point stands for {every} steps: losses, spreads and rates are means over them, gradient norm and learning "
        f"rate are those of the last. Nothing is smoothed, but of more than {MOST_POINTS} points neighbours are "
        "averaged. Steps that a continued run did again count once; a gap is a figure that was not finite." + collapse
    )
    return f'<h2>{title}: curves</h2>\n<ul class="legend">{legend}</ul>\n{_grid(panels)}\n<p class="soft">{note}</p>'


def _throughput_section(runs: Sequence[Run]) -> str:
    header = ["run", "clips/s", "ms a step", "TFLOP/s", "of product rate", "data wait", "memory, GiB",
              "GPU, GiB", "skipped", "warnings"]  # fmt: skip
    note = (
        "Medians over the lines of training, of all ranks together. TFLOP/s count useful operations; their share is of "
        "the rate of matrix products that was measured before the first step. Data wait is time without a batch; "
        "memory is the peak of the rank that has most; skipped are steps whose loss or gradient was not finite."
    )
    return f'<h2>Throughput and memory</h2>\n{_table(header, map(_throughput_row, runs))}\n<p class="soft">{note}</p>'


def _throughput_row(run: Run) -> list[Any]:
    rate, share = median(run.of_training("clips_per_s")), median(run.of_training("gemm_share"))
    skipped = run.of_training("skipped_steps")
    return [
        run.name,
        _number(rate, ".1f"),
        _number(1000 * run.config.optimizer.batch / rate if rate else None, ".0f"),
        _number(median(run.of_training("tflop_per_s")), ".3f"),
        _percent(share),
        _percent(median(run.of_training("data_wait_share"))),
        _number(max(run.of_training("rss_gib"), default=None), ".2f"),
        _number(max(run.of_training("cuda_gib"), default=None), ".2f"),
        int(skipped[-1]) if skipped else None,
        len(run.entries["warning"]),
    ]


def _configuration_section(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        (run,) = runs
        tree = shareable(run.config.model_dump(mode="json"))
        items = "".join(f"<li>{html.escape(line)}</li>" for line in departures(tree))
        base = f"preset {run.config.preset}, size {run.config.size}"
        body = f"<p>Departures from {base}:</p><ul>{items}</ul>" if items else f"<p>As {base} have it.</p>"
    else:
        rows = [[key, *(_folded(value) for value in values)] for key, values in differences(runs).items()]
        header = ["key", *(run.name for run in runs)]
        body = _table(header, rows, "words") if rows else "<p>The configurations are equal.</p>"
    trees = [shareable(run.config.model_dump(mode="json", by_alias=True)) for run in runs]
    whole = "".join(
        _details(f"all of {run.name}", f"<pre>{html.escape(json.dumps(tree, indent=2))}</pre>")
        for run, tree in zip(runs, trees, strict=True)
    )
    title = "Configuration" if len(runs) == 1 else "How the configurations differ"
    return f"<h2>{title}</h2>\n{body}\n{whole}"


def _folded(value: Any) -> Any:
    """A value of a configuration; what is long opens at a touch."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= LONG_VALUE:
        return text or '""'
    return Html(_details(f"{text[: LONG_VALUE - 8]} ...", html.escape(text)))


def _confusion_section(run: Run) -> str:
    """The matrix of evaluation.json: rows true, columns predicted."""
    name, found = html.escape(run.name), confusions(run)
    if found is None:
        return f"<h2>Confusion: {name}</h2>\n<p>evaluation.json holds a matrix that does not fit its labels.</p>"
    counts_CC, labels = found
    width = PIXELS_AN_INCH * confusion_inches(len(labels))
    most = "100%" if len(labels) <= NUMBERED_CLASSES else f"{width:.0f}px"  # a phone shows few classes whole
    parts = [
        f'<h2>Confusion: {name}</h2>\n<div class="scroll"><figure style="width: {width:.0f}px; max-width: {most}">'
        f"{confusion_picture(counts_CC, labels)}</figure></div>",
        f'<p class="soft">Held-out clips of {html.escape(in_words(run.evaluation.get("data")))}: rows true, columns '
        "predicted.</p>",
    ]
    rows = _worst(counts_CC, labels)
    return "\n".join([*parts, _table(["true", "taken for", "clips", "of"], rows, "words")] if rows else parts)


def _worst(counts_CC: np.ndarray, labels: Sequence[str]) -> list[list[Any]]:
    """The pairs of classes that are taken for each other most: true, predicted, clips, clips of the true class."""
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    places = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(labels)) for place in places]
    return [[labels[t], labels[p], int(wrong_CC[t, p]), int(counts_CC[t].sum())] for t, p in pairs if wrong_CC[t, p]]


def _picture_sections(run: Run) -> str:
    """Masks, attention and the measure, or the sentence why there are none."""
    name, objective = html.escape(run.name), run.config.objective
    assert isinstance(objective, PretrainConfig)
    try:
        network, masks, attention = _pictures(run, objective)
    except UserError as error:
        return f"<h2>Pictures of {name}</h2>\n<p>There are none: {html.escape(str(error))}.</p>"
    return (
        f'<h2>What students see: {name}</h2>\n{_grid(masks)}\n<p class="soft">{_mask_caption(run, objective)}</p>\n'
        f"<h2>Where the teacher looks: {name}</h2>\n{_grid(attention)}\n"
        f'<p class="soft">{_attention_caption(network)}</p>'
    )


def _mask_caption(run: Run, objective: PretrainConfig) -> str:
    patch, hidden = run.config.model.patch, f"{100 * objective.mask.ratio:g} %"
    return (
        f"Log-mel in dB of a clip, and what some of its {objective.students} students see of it: {hidden} of the "
        f"{patch} x {patch} patches are hidden (grey), and predicted from the others."
    )


def _pictures(run: Run, objective: PretrainConfig) -> tuple[Network, list[str], list[str]]:
    """The teacher, and the panels of masks and of attention; raises UserError where weights or data are not there."""
    if run.complaint:
        raise UserError(run.complaint)
    network, data = load_network(run.folder), run.config.data
    cache = CacheConfig(data.cache, data.cache_gib)
    dataset = ClipDataset(*(part.data for part in data.datasets), labelled=False, cache=cache)
    clip = _liveliest(dataset, network)
    masks = mask_panels(clip, network, objective, run.config.run.seed)
    return network, masks, [*attention_panels(clip, network), *_noise_panel(dataset, network)]


def _attention_caption(network: Network) -> str:
    two = (
        "the first map, the second, and the first minus lambda times the second, which mixes the values (red adds, "
        "blue subtracts)"
    )
    maps = "the one map" if network.model.attention_lambda == "absent" else two
    return (
        f"Attention of the CLS token in the last block, mean over heads: {maps}. 1 is what a patch would get if "
        f"attention were spread evenly. The points by block are from {MIXTURES} training clips of which one half was "
        "replaced by half of another clip: how much weight the patches that stayed put on the replaced half, over what "
        "they put on it before; below 1 they turn away from it. Bars cover 95 % (bootstrap over clips). "
        "docs/attention_measure.md defines it, asda attention measures it on other clips."
    )


def _liveliest(dataset: ClipDataset, network: Network) -> Clip:
    """The clip whose patches change most over time: a picture of it shows more than one of steady noise."""
    patch = network.description.model.patch

    def liveliness(clip: Clip) -> float:
        mel_TM = clip_log_mel(clip, network.description)
        return float(mel_TM.reshape(-1, patch, mel_TM.shape[1] // patch, patch).mean((1, 3)).std(0).mean())

    return max(read_clips(dataset, [Draw(0, n) for n in range(min(LOOKED_THROUGH, len(dataset)))]), key=liveliness)


def _noise_panel(dataset: ClipDataset, network: Network) -> list[str]:
    """The measure of irrelevant context; nothing where the clips do not allow it."""
    try:
        mixtures = make_mixtures(choose_clips(dataset, MIXTURES, seed=0), [network], "clip", seed=0)
    except UserError:
        return []
    shares = {name: values for name, values in measure(network, mixtures).items() if name != SIGNED}
    return [block_panel({name: [ratio_estimate(*block_2B) for block_2B in values] for name, values in shares.items()})]


def _warnings(run: Run) -> str:
    lines = "".join(
        f"<li>step {e['step']:,}: {html.escape(str(e.get('text', '')))}</li>" for e in run.entries["warning"]
    )
    return _details(f"{len(run.entries['warning'])} warnings of {run.name}", f"<ul>{lines}</ul>")


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def _grid(panels: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(f"<figure>{panel}</figure>" for panel in panels)}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "figures") -> str:
    """A table that scrolls by itself where the screen is narrow."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, Html):
        return value
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="asda report",
        description="One HTML page about a run, or about several beside each other.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the page."""
    write_report(parse_args(argv))


if __name__ == "__main__":
    exit_with_sentence(main)
