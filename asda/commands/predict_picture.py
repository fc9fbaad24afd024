"""The picture of `asda predict`: a spectrogram, and below it the strongest tags over time.

Shapes: T frames, F mel bins, W windows, C classes, K classes shown.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from asda.commands.pictures import DB_PER_NEPER, FRAME_SHIFT_S, printable, pyplot, show_levels, to_png
from asda.data.features.fbank import NUM_MEL_BINS
from asda.inference import File, Model, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 20  # tags in the picture
MOST_COLUMNS = 3000  # of the spectrogram and of the tags, about three a pixel


def draw(out: Path, file: File, model: Model, duration_s: float, parts: list[Timeline], top: int) -> None:
    """Write the picture of one file, with up to `top` tags: those that are strongest in any window."""
    plt = pyplot("--picture")
    rows = min(top, MOST_ROWS)
    heights = (3.2, 0.3 * rows)
    figure, (above, below) = plt.subplots(
        2, figsize=(11, 4 + 0.3 * rows), height_ratios=heights, sharex=True, layout="constrained"
    )
    image = show_levels(above, *spectrogram(model, replace(file, progress=None), duration_s))
    figure.colorbar(image, ax=above, label="energy (dB)")
    above.set_ylabel("frequency (Hz)")
    above.set_title(printable(Path(file.path).name), parse_math=False)
    draw_tags(below, narrowed(Timeline.joined(parts)), model.labels, rows)
    below.set_xlabel("time (s)")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(to_png(figure, dpi=120))


def spectrogram(model: Model, file: File, duration_s: float) -> tuple[np.ndarray, int]:
    """Return levels in dB, [T, F], and the frames of the clip; a column is the mean of as many frames as needed."""
    step = math.ceil(duration_s / FRAME_SHIFT_S / MOST_COLUMNS)
    stats, num_frames = model.description.data.log_mel, 0
    sums_TF, counts_T = np.zeros((MOST_COLUMNS + 1, NUM_MEL_BINS)), np.zeros(MOST_COLUMNS + 1)
    for mel_TF in model.log_mel_blocks(file):
        columns = np.arange(num_frames, num_frames + len(mel_TF)) // step
        np.add.at(sums_TF, columns, mel_TF.numpy() * 2 * stats.std + stats.mean)
        np.add.at(counts_T, columns, 1)
        num_frames += len(mel_TF)
    shown = counts_T > 0
    return sums_TF[shown] / counts_T[shown, None] * DB_PER_NEPER, num_frames


def narrowed(timeline: Timeline) -> Timeline:
    """Join windows that a pixel cannot tell apart; each class keeps its highest probability."""
    groups = torch.arange(len(timeline.starts_s)).chunk(MOST_COLUMNS)
    return Timeline(
        torch.stack([timeline.starts_s[group[0]] for group in groups]),
        torch.stack([timeline.ends_s[group[-1]] for group in groups]),
        torch.stack([timeline.probabilities[group].amax(0) for group in groups]),
    )


def draw_tags(axes: "Axes", timeline: Timeline, labels: tuple[str, ...], rows: int) -> None:
    """Draw a row for each tag, strongest first, named with its highest probability; a cell is a window's centre."""
    peaks_K, classes_K = timeline.probabilities.max(dim=0).values.topk(min(rows, len(labels)))
    centres_W = ((timeline.starts_s + timeline.ends_s) / 2).numpy()
    between_W = (centres_W[1:] + centres_W[:-1]) / 2
    edges_W = [float(timeline.starts_s[0]), *between_W, float(timeline.ends_s[-1])]
    image = axes.pcolormesh(
        edges_W, range(len(classes_K) + 1), timeline.probabilities[:, classes_K].T.numpy(), vmin=0, vmax=1, cmap="Blues"
    )
    peaks = zip(classes_K.tolist(), peaks_K.tolist(), strict=True)
    names = [f"{labels[number]} (max {100 * peak:.0f} %)" for number, peak in peaks]
    axes.set_yticks([row + 0.5 for row in range(len(names))], names, parse_math=False)
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes, label="probability")
