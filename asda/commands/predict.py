"""Say what is heard in audio files: the strongest tags of each, over time if wished, as a table, JSON or a picture.

Shapes: T frames, M mel bins, W windows, C classes, K classes shown.
"""

import argparse
import io
import json
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import asda
from asda.commands.pictures import DB_PER_NEPER, printable, pyplot, show_levels
from asda.data.audio.find import audio_files
from asda.data.audio.read import read_wave
from asda.data.audio.waves import SAMPLE_RATE_HZ, AudioError
from asda.data.features.fbank import FRAME_SHIFT
from asda.errors import UserError, exit_with_sentence
from asda.inference import Model, Tag, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_CHARACTERS = 25  # of a probability of 1
FRAME_SHIFT_S = FRAME_SHIFT / SAMPLE_RATE_HZ
MOST_ROWS = 20  # of the picture's tags

EXAMPLES = """
examples
  asda predict --model runs/mine_tags dog.wav
      the five strongest tags; --model takes a fine-tuned run, one of its checkpoints, or converted weights
  asda predict --model weights/eat --json --top 527 recordings > tags.jsonl
      all audio below a folder, one object per file: file, duration_s, tags [{label, probability}]
  asda predict --model weights/eat --timeline --hop 0.5 street.flac
      the strongest tag around every 0.5 s; with --json all classes of all windows: timeline {starts_s, ends_s,
      labels [class], probabilities [window][class]}. Windows shorter than the clips that the model was trained on
      (--window) tell times apart better and classes worse
  asda predict --model weights/eat --picture street.png --hop 0.5 street.flac
      a spectrogram, and the strongest tags over time below it

A file that cannot be used is named on stderr with the reason. The others are done all the same; the exit code is 2.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line."""
    parser = argparse.ArgumentParser(
        prog="asda predict",
        description="Say what is heard in audio files: the strongest tags of each, and over time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="audio files, and folders of them")
    add("--model", required=True, type=Path, metavar="PATH", help="a run, a checkpoint, or converted weights")
    add("--top", type=int, default=5, metavar="K", help="tags shown of each file (default %(default)s)")
    add("--json", action="store_true", help="one JSON object per file and line, in place of tables")
    add("--timeline", action="store_true", help="tags over time, too")
    add("--window", type=float, metavar="S", help="seconds heard at a time (default: what the model was trained on)")
    add("--hop", type=float, metavar="S", help="seconds from one window to the next (default: a window)")
    add("--picture", type=Path, metavar="PNG", help="draw spectrogram and tags over time of one file")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network computes")
    return parser.parse_args(argv)


def predict(args: argparse.Namespace) -> None:
    """Go through the files."""
    check_arguments(args)
    files = audio_files(args.inputs)
    if args.picture and len(files) > 1:
        raise UserError(f"--picture {args.picture} draws one file, and {len(files)} are given; give one")
    model = asda.load(args.model, device=args.device)
    if not model.labels:
        raise UserError(f"--model {args.model} is pre-trained only and knows no classes; fine-tune it first")
    check_times(args, model)
    failures = []
    for file in tqdm(files, unit="file", disable=sys.stdout.isatty() or not sys.stderr.isatty()):
        try:
            print(predict_file(model, file.path, args), flush=True)
        except (AudioError, UserError) as error:
            failures.append(f"{file.path}: {error}")
            if len(files) > 1:
                tqdm.write(f"error: {failures[-1]}", file=sys.stderr)
    if failures:
        raise UserError(failures[0] if len(files) == 1 else f"{len(failures)} of {len(files)} files cannot be used")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what makes no sense before a model is loaded."""
    if args.top < 1:
        raise UserError(f"--top {args.top} must be at least 1")
    if not (args.timeline or args.picture) and (args.window, args.hop) != (None, None):
        raise UserError("--window and --hop are of a timeline; add --timeline or --picture")
    if args.picture and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture {args.picture} must end in .png")
    if args.picture:
        pyplot("--picture")


def check_times(args: argparse.Namespace, model: Model) -> None:
    """Refuse windows that the model does not take."""
    window_s = model.chunk_s if args.window is None else args.window
    if not FRAME_SHIFT_S <= window_s <= model.chunk_s:
        raise UserError(
            f"--window {window_s:g} must be from {FRAME_SHIFT_S} to {model.chunk_s:g} s, what the model hears"
        )
    if args.hop is not None and not FRAME_SHIFT_S <= args.hop <= window_s:
        raise UserError(f"--hop {args.hop:g} must be from {FRAME_SHIFT_S} s to a window, {window_s:g} s")


def predict_file(model: Model, path: Path, args: argparse.Namespace) -> str:
    """The answer for one file as text; draws the picture where one is wished."""
    wave_S, rate_hz = read_wave(path, max_seconds=math.inf)
    tags = model.tags(wave_S, rate_hz, top=args.top)
    timeline = None
    if args.timeline or args.picture:
        timeline = model.timeline(wave_S, rate_hz, args.window, args.hop)
    if args.picture:
        assert timeline is not None
        draw(args.picture, path, model, model.log_mel(wave_S, rate_hz), timeline, min(args.top, MOST_ROWS))
    shown = timeline if args.timeline else None
    duration_s = len(wave_S) / rate_hz
    if args.json:
        return json.dumps(as_json(path, duration_s, tags, shown, model.labels))
    return "\n".join(as_table(path, duration_s, tags, shown, model.labels))


def as_json(
    path: Path, duration_s: float, tags: list[Tag], timeline: Timeline | None, labels: tuple[str, ...]
) -> dict[str, Any]:
    """One file for programs; "timeline" is there when it was asked for."""
    record: dict[str, Any] = {
        "file": str(path),
        "duration_s": duration_s,
        "tags": [{"label": tag.label, "probability": tag.probability} for tag in tags],
    }
    if timeline is not None:
        record["timeline"] = {
            "starts_s": timeline.starts_s.tolist(),
            "ends_s": timeline.ends_s.tolist(),
            "labels": labels,
            "probabilities": timeline.probabilities.tolist(),
        }
    return record


def as_table(
    path: Path, duration_s: float, tags: list[Tag], timeline: Timeline | None, labels: tuple[str, ...]
) -> list[str]:
    """One file for people."""
    lines = [f"{path}  ({duration_s:.2f} s)"]
    lines += [f"  {with_bar(tag.probability)}  {tag.label}" for tag in tags]
    if timeline is not None:
        lines += ["  strongest tag over time"]
        strongest = zip(timeline.starts_s, timeline.ends_s, *timeline.probabilities.max(dim=1), strict=True)
        lines += [
            f"  {start_s:8.2f} to {end_s:8.2f} s  {with_bar(float(probability))}  {labels[int(label)]}"
            for start_s, end_s, probability, label in strongest
        ]
    return lines


def with_bar(probability: float) -> str:
    """A probability as percent and as a bar."""
    return f"{100 * probability:5.1f} %  {'#' * round(BAR_CHARACTERS * probability):{BAR_CHARACTERS}}"


def draw(out: Path, path: Path, model: Model, mel_TM: torch.Tensor, timeline: Timeline, top: int) -> None:
    """Write the picture: the spectrogram, and below it the `top` classes that are strongest anywhere, over time."""
    plt = pyplot("--picture")
    figure, (above, below) = plt.subplots(
        2, figsize=(11, 4 + 0.3 * top), height_ratios=(3.2, 0.3 * top), sharex=True, layout="constrained"
    )
    stats = model.description.data.log_mel
    draw_spectrogram(above, (mel_TM.numpy() * 2 * stats.std + stats.mean) * DB_PER_NEPER)
    draw_tags(below, timeline, model.labels, top)
    above.set_title(printable(path.name), parse_math=False)
    below.set_xlabel("time (s)")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_spectrogram(axes: "Axes", level_TM: np.ndarray) -> None:
    """Log-mel levels in dB; Hz on the left, mel bins on the right."""
    image = show_levels(axes, level_TM)
    axes.figure.colorbar(image, ax=axes, label="energy (dB)", pad=0.06)
    axes.set_ylabel("frequency (Hz)")
    axes.secondary_yaxis("right").set_ylabel("mel bin")


def draw_tags(axes: "Axes", timeline: Timeline, labels: tuple[str, ...], top: int) -> None:
    """A row for each of the `top` classes, strongest first; each window is drawn around its centre."""
    peaks_K, classes_K = timeline.probabilities.max(dim=0).values.topk(min(top, len(labels)))
    centres_W = ((timeline.starts_s + timeline.ends_s) / 2).numpy()
    between_W = (centres_W[1:] + centres_W[:-1]) / 2
    edges_W = [float(timeline.starts_s[0]), *between_W, float(timeline.ends_s[-1])]
    image = axes.pcolormesh(
        edges_W, range(len(classes_K) + 1), timeline.probabilities[:, classes_K].T.numpy(), vmin=0, vmax=1
    )
    names = [f"{labels[c]} ({100 * peak:.0f} %)" for c, peak in zip(classes_K.tolist(), peaks_K.tolist(), strict=True)]
    axes.set_yticks([row + 0.5 for row in range(len(names))], names, parse_math=False)
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes, label="probability", pad=0.06)


def main(argv: list[str] | None = None) -> None:
    """Run; end quietly when the reader of stdout has gone."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    predict(parse_args(argv))


if __name__ == "__main__":
    exit_with_sentence(main)
