"""Parts that the pictures share: matplotlib without a display, and values over seconds and Hz.

Shapes: T frames (or time patches), F mel bins or mel patches.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.features.fbank import FRAME_SHIFT, FRAME_WINDOW, LOW_HZ, NUM_MEL_BINS
from asda.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DB_PER_NEPER = 10 / math.log(10)  # a log-mel value is the natural logarithm of an energy
FRAME_SHIFT_S = FRAME_SHIFT / SAMPLE_RATE_HZ
FRAME_WINDOW_S = FRAME_WINDOW / SAMPLE_RATE_HZ
TICKS_HZ = (100, 250, 500, 1000, 2000, 4000, 7000)

PANEL_INCHES = (3.2, 2.3)
PANELS_A_ROW = 6
PANEL_FRAMES = 600  # columns in a panel, about two a pixel
CAPTION_CHARACTERS = 46  # in a line under a panel
SHEET_MARGIN_INCHES = (1.2, 0.6)
SCALE_PERCENTILES = (1, 99.9)  # of all levels of a sheet: the ends of its colour scale


def pyplot(flag: str) -> Any:
    """Return matplotlib's pyplot, which draws into files only. Raises UserError, naming the flag, if it is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(f"{flag} needs matplotlib; install it with: pip install 'asda[report]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def to_png(figure: "Figure", dpi: int = 100) -> bytes:
    """Return a figure as PNG, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot("a picture").close(figure)
    return buffer.getvalue()


def show_levels(
    axes: "Axes", level_TF: np.ndarray, num_frames: int = 0, low_db: float | None = None, high_db: float | None = None
) -> "AxesImage":
    """Draw log-mel levels in dB, [T, F], each frame around its centre, with ticks in seconds and in Hz.

    Args:
        axes: to draw into.
        level_TF: dB.
        num_frames: of the clip, if a column stands for several frames; default T.
        low_db: the lower end of the colour scale; default the lowest level.
        high_db: its upper end; default the highest level.
    """
    return _show_over_time(axes, level_TF, num_frames or len(level_TF), cmap="magma", vmin=low_db, vmax=high_db)


def show_patches(
    axes: "Axes",
    value_TF: np.ndarray,
    num_frames: int,
    low: float = 0,
    high: float | None = None,
    cmap: str = "viridis",
) -> "AxesImage":
    """Draw a value of each patch, [T, F], over the seconds and Hz of `show_levels`."""
    colours = {"interpolation": "nearest", "cmap": cmap, "vmin": low, "vmax": high}
    return _show_over_time(axes, value_TF, num_frames, **colours)


def _show_over_time(axes: "Axes", value_TF: np.ndarray, num_frames: int, **colours: Any) -> "AxesImage":
    first_s = (FRAME_WINDOW_S - FRAME_SHIFT_S) / 2
    last_s = first_s + num_frames * FRAME_SHIFT_S
    extent = (first_s, last_s, -0.5, NUM_MEL_BINS - 0.5)
    image = axes.imshow(value_TF.T, origin="lower", aspect="auto", extent=extent, **colours)
    label_hz(axes, TICKS_HZ)
    axes.set_xlim(0, last_s)
    return image


def label_hz(axes: "Axes", ticks_hz: Sequence[int]) -> None:
    """Label an axis of mel bins with these frequencies."""
    axes.set_yticks([mel_bin(hz) for hz in ticks_hz], [f"{hz:,}" for hz in ticks_hz])


def mel_bin(hz: float) -> float:
    """Return the place of a frequency among the mel bins; 0 is the centre of the first bin."""
    mel, low, high = (1127 * math.log(1 + f / 700) for f in (hz, LOW_HZ, SAMPLE_RATE_HZ / 2))
    return (mel - low) / (high - low) * (NUM_MEL_BINS + 1) - 1


def printable(name: str) -> str:
    """Escape the bytes of a file name that are not UTF-8: a picture has no letters for them."""
    return name.encode(errors="backslashreplace").decode()


class Panel(NamedTuple):
    """One clip of a contact sheet."""

    level_TF: np.ndarray  # dB, T <= PANEL_FRAMES
    num_frames: int  # of the clip
    caption: str


def make_panel(level_TF: np.ndarray, caption: str) -> Panel:
    """Make a panel; if a clip has more frames than a panel shows, its columns are means of neighbouring frames."""
    parts = np.array_split(level_TF, min(PANEL_FRAMES, len(level_TF)))
    return Panel(np.stack([part.mean(0) for part in parts]), len(level_TF), caption)


def draw_panels(title: str, panels: list[Panel]) -> bytes:
    """Draw a contact sheet, as PNG: every panel over its own seconds, all on one colour scale."""
    plt = pyplot("--sheet")
    columns = min(PANELS_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    (width, height), (right, top) = PANEL_INCHES, SHEET_MARGIN_INCHES
    size = (width * columns + right, height * rows + top)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    low_db, high_db = np.percentile(np.concatenate([panel.level_TF.ravel() for panel in panels]), SCALE_PERCENTILES)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        show_levels(axes, panel.level_TF, panel.num_frames, low_db, high_db)
        axes.set_xlabel(printable(panel.caption), parse_math=False, fontsize=8)
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.tick_params(labelsize=7, labelleft=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("Hz (mel scale)", fontsize=8)
        axes.tick_params(labelleft=True)
    figure.colorbar(grid[0, 0].images[0], ax=grid, label="energy (dB)", extend="both", fraction=0.02, pad=0.01)
    figure.suptitle(printable(title), parse_math=False)
    return to_png(figure)
