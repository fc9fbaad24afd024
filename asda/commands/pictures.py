"""What the pictures of the tools share: matplotlib without a display, and log-mel levels over s and Hz.

Shapes: T frames (or time patches), M mel bins, F mel patches.
"""

import io
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.features.fbank import FRAME_SHIFT, FRAME_WINDOW, LOW_HZ, NUM_MEL_BINS
from asda.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

DB_PER_NEPER = 10 / math.log(10)  # a log-mel value is the natural logarithm of an energy
FRAME_SHIFT_S = FRAME_SHIFT / SAMPLE_RATE_HZ
FRAME_WINDOW_S = FRAME_WINDOW / SAMPLE_RATE_HZ
TICKS_HZ = (100, 250, 500, 1000, 2000, 4000, 7000)

PANEL_INCHES = (3.2, 2.3)
PANELS_A_ROW = 6
PANEL_FRAMES = 600  # columns of a panel, about two a pixel
CAPTION_CHARACTERS = 46  # of a line under a panel
SHEET_MARGIN_INCHES = (1.2, 0.6)
SHEET_DPI = 100
SCALE_PERCENTILES = (1, 99.9)  # of all levels of a sheet, between which its colour scale lies


def pyplot(flag: str) -> Any:
    """matplotlib's, which draws into files only; raises UserError naming the flag where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(f"{flag} needs matplotlib; install it with: pip install 'asda[report]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def show_levels(
    axes: "Axes", level_TM: np.ndarray, num_frames: int = 0, low_db: float | None = None, high_db: float | None = None
) -> "AxesImage":
    """Draw log-mel levels in dB, [T, M], each frame around its centre, with ticks in seconds and in Hz.

    `num_frames` is the clip's own number where T is less, because a column stands for several frames. The colour scale
    ends at the picture's lowest and highest level unless low_db and high_db say otherwise.
    """
    first_s = (FRAME_WINDOW_S - FRAME_SHIFT_S) / 2
    last_s = first_s + (num_frames or len(level_TM)) * FRAME_SHIFT_S
    image = axes.imshow(
        level_TM.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low_db,
        vmax=high_db,
        extent=(first_s, last_s, -0.5, NUM_MEL_BINS - 0.5),
    )
    axes.set_yticks([mel_bin(hz) for hz in TICKS_HZ], [f"{hz:,}" for hz in TICKS_HZ])
    axes.set_xlim(0, last_s)
    return image


def show_patches(
    axes: "Axes",
    value_TF: np.ndarray,
    num_frames: int,
    low: float = 0,
    high: float | None = None,
    cmap: str = "viridis",
) -> "AxesImage":
    """Draw a value of each patch, [T, F], over the seconds and Hz of `show_levels`."""
    first_s = (FRAME_WINDOW_S - FRAME_SHIFT_S) / 2
    image = axes.imshow(
        value_TF.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=cmap,
        vmin=low,
        vmax=high,
        extent=(first_s, first_s + num_frames * FRAME_SHIFT_S, -0.5, NUM_MEL_BINS - 0.5),
    )
    axes.set_yticks([mel_bin(hz) for hz in TICKS_HZ], [f"{hz:,}" for hz in TICKS_HZ])
    axes.set_xlim(0, first_s + num_frames * FRAME_SHIFT_S)
    return image


def mel_bin(hz: float) -> float:
    """Where a frequency lies among the mel bins; 0 is the centre of the first."""
    mel, low, high = (1127 * math.log(1 + f / 700) for f in (hz, LOW_HZ, SAMPLE_RATE_HZ / 2))
    return (mel - low) / (high - low) * (NUM_MEL_BINS + 1) - 1


def printable(name: str) -> str:
    """A name for a picture, which has no letters for the bytes of a file name that is no UTF-8."""
    return name.encode(errors="backslashreplace").decode()


class Panel(NamedTuple):
    """One clip of a contact sheet."""

    level_TM: np.ndarray  # dB, T <= PANEL_FRAMES
    num_frames: int  # of the clip
    caption: str


def make_panel(level_TM: np.ndarray, caption: str) -> Panel:
    """A panel whose columns are means of neighbouring frames where a clip has more frames than a panel shows."""
    parts = np.array_split(level_TM, min(PANEL_FRAMES, len(level_TM)))
    return Panel(np.stack([part.mean(0) for part in parts]), len(level_TM), caption)


def draw_panels(title: str, panels: list[Panel]) -> bytes:
    """Return a contact sheet as PNG: every panel over its own seconds, all on one colour scale."""
    plt = pyplot("--sheet")
    columns = min(PANELS_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    (width, height), (right, top) = PANEL_INCHES, SHEET_MARGIN_INCHES
    size = (width * columns + right, height * rows + top)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    low_db, high_db = np.percentile(np.concatenate([panel.level_TM.ravel() for panel in panels]), SCALE_PERCENTILES)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        show_levels(axes, panel.level_TM, panel.num_frames, low_db, high_db)
        axes.set_xlabel(printable(panel.caption), parse_math=False, fontsize=8)
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.tick_params(labelsize=7, labelleft=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("Hz (mel scale)", fontsize=8)
        axes.tick_params(labelleft=True)
    figure.colorbar(grid[0, 0].images[0], ax=grid, label="energy (dB)", extend="both", fraction=0.02, pad=0.01)
    figure.suptitle(printable(title), parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=SHEET_DPI)
    plt.close(figure)
    return buffer.getvalue()
