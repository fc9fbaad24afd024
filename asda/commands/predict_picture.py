"""The picture of `asda predict`: a spectrogram, and below it the strongest tags over time.

Shapes: T frames, F mel bins, W windows, C classes, K classes shown.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from asda.commands.pictures import DB_PER_NEPER, printable, pyplot, show_levels, to_png
from asda.inference import Model, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 20  # tags in the picture


def draw(out: Path, path: Path, model: Model, mel_TF: torch.Tensor, timeline: Timeline, top: int) -> None:
    """Write the picture of one file, with up to `top` tags: those that are strongest in any window."""
    plt = pyplot("--picture")
    rows = min(top, MOST_ROWS)
    heights = (3.2, 0.3 * rows)
    figure, (above, below) = plt.subplots(
        2, figsize=(11, 4 + 0.3 * rows), height_ratios=heights, sharex=True, layout="constrained"
    )
    stats = model.description.data.log_mel
    image = show_levels(above, (mel_TF.numpy() * 2 * stats.std + stats.mean) * DB_PER_NEPER)
    figure.colorbar(image, ax=above, label="energy (dB)")
    above.set_ylabel("frequency (Hz)")
    above.set_title(printable(path.name), parse_math=False)
    draw_tags(below, timeline, model.labels, rows)
    below.set_xlabel("time (s)")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(to_png(figure, dpi=120))


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
