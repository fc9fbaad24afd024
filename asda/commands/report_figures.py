"""The pictures of a report: SVG that takes its text colour from the page, so that dark mode works.

Shapes: T frames, F mel bins or mel patches, N patches, K = 1 + N tokens with CLS first, C classes, M students.
"""

import io
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from asda.commands.pictures import DB_PER_NEPER, label_hz, pyplot, show_levels, show_patches
from asda.commands.report_runs import Run
from asda.config.model import PretrainConfig
from asda.data.clips import Clip
from asda.data.order import clip_rng
from asda.evaluation.attention import (
    FIRST,
    ONLY,
    SECOND,
    SIGNED,
    Estimate,
    Network,
    attention_of,
    block_inputs,
    clip_log_mel,
    named_maps,
    on_patches,
)
from asda.models.masks import inverse_block_masks

COLOURS = (
    "#3d85c6",
    "#e07a1f",
    "#3f9b57",
    "#b4559e",
    "#c39b16",
    "#d1495b",
    "#7b8794",
    "#1aa6b7",
)  # seen on light and dark
DASHES = ("-", "--", ":", "-.")  # one after the other, if there are more runs than colours
MOST_POINTS = 400  # of a curve; a longer one is shown as means of neighbours
FEW_POINTS = 12  # up to which points are marked
NUM_STUDENTS = 3  # whose masks are shown
FEW_TICKS_HZ = (250, 1000, 4000)  # for a picture as wide as a phone
NUMBERED_CLASSES, NAMED_CLASSES = 12, 60  # most classes of a confusion matrix with numbers, with names
PANEL_INCHES = (4.4, 2.7)
INK = "#010203"  # becomes the page's text colour
HIDDEN = "#a9b0b8"  # a patch that a student does not see
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "asda",  # the same page for the same runs
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
} | {f"{part}color": INK for part in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.")}

_numbers = count()  # numbers the pictures, so that ids are unique


class Curve(NamedTuple):
    """A figure of metrics.jsonl over the steps."""

    kind: str
    key: str
    title: str
    log: bool = False
    factor: float = 1.0


RUNNING = (
    Curve("train", "lr", "learning rate"),
    Curve("train", "grad_norm", "gradient norm", log=True),
    Curve("train", "clips_per_s", "throughput, clips/s"),
    Curve("train", "data_wait_share", "waiting for data, % of time", factor=100),
)
PRETRAINING = (
    Curve("train", "frame_loss", "frame loss", log=True),
    Curve("train", "utterance_loss", "utterance loss", log=True),
    Curve("train", "target_variance", "spread of the teacher's targets"),
    Curve("train", "prediction_variance", "spread of the predictions"),
    Curve("probe", "knn_accuracy", "probe: nearest neighbours, accuracy %", factor=100),
    Curve("probe", "linear_accuracy", "probe: linear layer, accuracy %", factor=100),
    Curve("probe", "knn_mAP", "probe: nearest neighbours, mAP"),
    Curve("probe", "linear_mAP", "probe: linear layer, mAP"),
    *RUNNING,
)
CLASSIFYING = (
    Curve("train", "loss", "training loss"),
    Curve("valid", "accuracy", "held-out accuracy, %", factor=100),
    Curve("valid", "mAP", "held-out mAP"),
    *RUNNING,
)


def look(number: int) -> tuple[str, str]:
    """Return the colour and dash of a run, by its place among all runs."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def to_svg(draw: Callable[[Any, Any], None], alt: str, size: tuple[float, float] = PANEL_INCHES) -> Markup:
    """Draw an SVG: `draw` is given a figure of `size` inches and its axes; `alt` describes the picture."""
    plt = pyplot("asda report")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(figure, axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=144)
        plt.close(figure)
    return _inlined(buffer.getvalue(), alt)


def _inlined(svg: str, alt: str) -> Markup:
    """Adapt an SVG to a page: remove what only a file needs, make ids unique, take the page's colour and font."""
    svg = re.sub(r"^.*?<svg[^>]*viewBox=(\"[^\"]*\")[^>]*>", r"<svg viewBox=\1>", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: (?:\w+ )?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>p{next(_numbers)}-", svg)
    svg = svg.replace(INK, "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))  # noqa: S704 (matplotlib escapes)


def curve_panels(runs: dict[int, Run], curves: Sequence[Curve]) -> list[Markup]:
    """Draw each figure that a run has; `runs` by their place among all runs, which gives the colour.

    A metric that was evaluated only once is left out: it stands in the table of held-out clips.
    """

    def is_curve(curve: Curve) -> bool:
        counts = [sum(curve.key in entry for entry in run.entries[curve.kind]) for run in runs.values()]
        return max(counts, default=0) >= (1 if curve.kind == "train" else 2)

    return [_curve_panel(runs, curve) for curve in curves if is_curve(curve)]


def _curve_panel(runs: dict[int, Run], curve: Curve) -> Markup:
    def draw(figure: Any, axes: Any) -> None:
        for number, run in runs.items():
            colour, dash = look(number)
            steps, values = points(run.entries[curve.kind], curve)
            marker = "o" if len(steps) <= FEW_POINTS else None
            axes.plot(steps, values, dash, color=colour, marker=marker, markersize=4, linewidth=1.4)
        axes.set(title=curve.title, xlabel="step")
        axes.grid(alpha=0.35, linewidth=0.6)
        _scale(axes, curve.log)

    return to_svg(draw, f"{curve.title} over steps of {', '.join(run.name for run in runs.values())}")


def points(entries: Sequence[dict[str, Any]], curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a curve; if there are more than MOST_POINTS, means of neighbours."""
    found = np.array([(e["step"], e[curve.key] * curve.factor) for e in entries if curve.key in e]).reshape(-1, 2)
    if len(found) > MOST_POINTS:
        found = np.stack([part.mean(0) for part in np.array_split(found, MOST_POINTS)])
    return found[:, 0], found[:, 1]


def _scale(axes: Any, log: bool) -> None:
    """Scale an axis: a logarithmic one is labelled 1, 2, 5; a linear one begins at 0 if that costs little room."""
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    values = values[np.isfinite(values)]
    if log and values.size and (values > 0).all():
        axes.set_yscale("log", subs=())
        near = values.max() < 100 * values.min()
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if near else (1,))
        axes.yaxis.set_major_formatter("{x:g}")
    elif values.size and 0 <= values.min() < values.max() / 2:
        axes.set_ylim(0, None)


def mask_panels(clip: Clip, network: Network, objective: PretrainConfig, seed: int) -> list[Markup]:
    """Draw a clip, and what its first students see of it in training."""
    model = network.description.model
    mel_TF = clip_log_mel(clip, network.description)
    grid = (len(mel_TF) // model.patch, model.mel_bins // model.patch)
    rng = clip_rng(seed, clip.draw, "masks")
    visible_MN = inverse_block_masks(rng, objective.students, grid, objective.mask)[:NUM_STUDENTS]
    patch = np.ones((model.patch, model.patch), dtype=bool)
    panels = [_spectrogram(mel_TF, f"clip {clip.key}")]
    for number, visible_N in enumerate(visible_MN, start=1):
        seen_TF = np.ma.array(mel_TF, mask=~np.kron(visible_N.reshape(grid), patch))
        panels.append(_spectrogram(seen_TF, f"what student {number} sees", mel_TF))
    return panels


def _spectrogram(mel_TF: np.ndarray, title: str, scale_TF: np.ndarray | None = None) -> Markup:
    """Draw levels in dB, in the colours of `scale_TF` if given: the whole of which a part is shown."""

    def draw(figure: Any, axes: Any) -> None:
        scale = mel_TF if scale_TF is None else scale_TF
        image = show_levels(axes, mel_TF * DB_PER_NEPER, 0, scale.min() * DB_PER_NEPER, scale.max() * DB_PER_NEPER)
        image.set_interpolation("nearest")
        image.set_cmap(image.get_cmap().with_extremes(bad=HIDDEN))
        _label(figure, axes, image, title)

    return to_svg(draw, f"spectrogram: {title}")


def attention_panels(clip: Clip, network: Network) -> list[Markup]:
    """Draw what CLS takes from each patch in the last block, mean over heads: one map, or two and their difference."""
    mel_TF = clip_log_mel(clip, network.description)
    maps = named_maps(attention_of(network, -1), block_inputs(network, mel_TF)[-1])
    shares = {name: on_patches(maps[name][:, 0, 1:].mean(0), network) for name in (ONLY, FIRST, SECOND) if name in maps}
    top = max(float(share_TF.max()) for share_TF in shares.values())
    panels = [_patch_map(share_TF, len(mel_TF), f"{name}, times the mean", 0, top) for name, share_TF in shares.items()]
    if SIGNED in maps:
        first_N, difference_N = (maps[name][:, 0, 1:].mean(0) for name in (FIRST, SIGNED))
        difference_TF = (difference_N / first_N.mean()).reshape(shares[FIRST].shape).numpy()
        limit = float(np.abs(difference_TF).max())
        lam = float(attention_of(network, -1).current_lambda())
        title = f"A1 - {lam:.3g} A2, times the mean of A1"
        panels.append(_patch_map(difference_TF, len(mel_TF), title, -limit, limit, "RdBu_r"))
    return [_spectrogram(mel_TF, f"clip {clip.key}"), *panels]


def _patch_map(value_TF: np.ndarray, frames: int, title: str, low: float, high: float, cmap: str = "viridis") -> Markup:
    def draw(figure: Any, axes: Any) -> None:
        _label(figure, axes, show_patches(axes, value_TF, frames, low, high, cmap), title)

    return to_svg(draw, f"map over time and frequency: {title}")


def _label(figure: Any, axes: Any, image: Any, title: str) -> None:
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="seconds", ylabel="Hz (mel scale)")
    label_hz(axes, FEW_TICKS_HZ)
    figure.colorbar(image, ax=axes).outline.set_visible(False)


def block_panel(ratios: dict[str, list[Estimate]]) -> Markup:
    """Draw unrelated / own of each map over the blocks, with intervals."""
    num_blocks = len(next(iter(ratios.values())))

    def draw(figure: Any, axes: Any) -> None:
        for number, (name, estimates) in enumerate(ratios.items()):
            values = np.array([estimate.value for estimate in estimates])
            reach = [values - [e.low for e in estimates], np.array([e.high for e in estimates]) - values]
            place = np.arange(num_blocks) + 0.12 * (number - (len(ratios) - 1) / 2)
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(place, values, reach, fmt="o", markersize=4, color=colour, label=name, capsize=2)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(num_blocks))
        axes.set(title="weight on the unrelated half / on the clip's own", xlabel="block")
        axes.legend(frameon=False, fontsize=8, ncols=len(ratios), loc="upper center", bbox_to_anchor=(0.5, -0.22))

    return to_svg(draw, f"weight on unrelated context of {', '.join(ratios)} in each block", (4.4, 3.0))


def confusion_inches(num_classes: int) -> float:
    """Return the width at which the names beside a confusion matrix can be read."""
    return min(9.0, max(4.0, 2.5 + 0.2 * num_classes))


def confusion_picture(counts_CC: np.ndarray, labels: Sequence[str]) -> Markup:
    """Draw a confusion matrix: rows true, columns predicted; the colour is the share of the row."""
    share_CC = counts_CC / np.maximum(1, counts_CC.sum(1, keepdims=True))
    inches = confusion_inches(len(labels))

    def draw(figure: Any, axes: Any) -> None:
        image = axes.imshow(100 * share_CC, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        axes.set(xlabel="predicted", ylabel="true", xticks=[], yticks=[])
        if len(labels) <= NAMED_CLASSES:
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
            axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        if len(labels) <= NUMBERED_CLASSES:
            for (row, column), number in np.ndenumerate(counts_CC):
                ink = "black" if share_CC[row, column] > 0.6 else "white"
                axes.text(column, row, str(number), ha="center", va="center", color=ink, fontsize=8)
        figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.7).outline.set_visible(False)

    return to_svg(draw, "confusion matrix", (inches, inches * 0.9))


def swatch(number: int) -> Markup:
    """Draw the line of a run for a legend."""
    colour, dash = look(number)
    pattern = {"-": "", "--": "7 3", ":": "2 3", "-.": "7 3 2 3"}[dash]
    line = f'<line x1="0" y1="5" x2="28" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{pattern}"/>'
    return Markup(f'<svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>')  # noqa: S704 (no text of others)
