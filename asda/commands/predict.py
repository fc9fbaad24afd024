"""Tag audio files: the strongest tags of each file, optionally over time, as a table, JSON or a picture."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import asda
from asda.commands.parsing import CHECKPOINT_HELP, check_range, make_parser
from asda.commands.text import bar
from asda.data.audio.find import audio_files
from asda.data.audio.read import read_wave
from asda.data.audio.waves import AudioError
from asda.errors import UserError

if TYPE_CHECKING:
    from asda.inference import Model, Tag, Timeline

BAR_CHARACTERS = 25  # for a probability of 1

EXAMPLES = """examples
  asda predict --model runs/mine_tags dog.wav
      the five strongest tags; --model takes a fine-tuned run, one of its checkpoints, or converted weights
  asda predict --model weights/eat --json --top 527 recordings > tags.jsonl
      all audio below a folder, one object per file: file, duration_s, tags [{label, probability}]
  asda predict --model weights/eat --timeline --hop 0.5 street.flac
      the strongest tag every 0.5 s; with --json all classes of all windows: timeline {starts_s, ends_s,
      labels [class], probabilities [window][class]}. Windows shorter than the clips of training (--window) give
      sharper times and worse tags
  asda predict --model weights/eat --picture street.png --hop 0.5 street.flac
      a spectrogram, and the strongest tags over time below it

Unreadable files are reported on stderr and skipped; the exit code is then 2.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("predict", "Tag audio files: the strongest tags of each file, optionally over time.", EXAMPLES)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="audio files, and folders of them")
    add("--model", required=True, type=Path, metavar="PATH", help=CHECKPOINT_HELP)
    add("--top", type=int, default=5, metavar="K", help="number of tags for each file (default: %(default)s)")
    add("--json", action="store_true", help="one JSON object per file and line, instead of tables")
    add("--timeline", action="store_true", help="also tags over time")
    add("--window", type=float, metavar="S", help="seconds of a window (default: the clips of training)")
    add("--hop", type=float, metavar="S", help="seconds from one window to the next (default: a window)")
    add("--picture", type=Path, metavar="PNG", help="draw spectrogram and tags over time of one file")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network computes")
    args = parser.parse_args(argv)
    check_range("--top", args.top, 1)
    if not (args.timeline or args.picture) and (args.window, args.hop) != (None, None):
        raise UserError("--window and --hop are for a timeline; add --timeline or --picture")
    if args.picture and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture {args.picture} must end in .png")
    return args


def predict(args: argparse.Namespace) -> None:
    """Tag the files, and print. Raises UserError if a file cannot be used, after all others are done."""
    files = audio_files(args.inputs)
    if args.picture:
        from asda.commands.pictures import pyplot  # brings torch

        pyplot("--picture")
        if len(files) > 1:
            raise UserError(f"--picture {args.picture} draws one file, and {len(files)} are given; give one")
    model = asda.load(args.model, device=args.device)
    if not model.labels:
        raise UserError(f"--model {args.model} is pre-trained only and has no classes; fine-tune it first")
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


def check_times(args: argparse.Namespace, model: "Model") -> None:
    """Refuse windows and hops that the model cannot take. Raises UserError."""
    from asda.commands.pictures import FRAME_SHIFT_S

    window_s = model.chunk_s if args.window is None else args.window
    if not FRAME_SHIFT_S <= window_s <= model.chunk_s:
        raise UserError(
            f"--window {window_s:g} must be from {FRAME_SHIFT_S} to {model.chunk_s:g} s, the model's clip length"
        )
    if args.hop is not None and not FRAME_SHIFT_S <= args.hop <= window_s:
        raise UserError(f"--hop {args.hop:g} must be from {FRAME_SHIFT_S} s to a window, {window_s:g} s")


def predict_file(model: "Model", path: Path, args: argparse.Namespace) -> str:
    """Return what is printed for one file, and draw its picture if asked for. Raises AudioError and UserError."""
    wave_S, rate_hz = read_wave(path, max_seconds=math.inf)
    tags = model.tags(wave_S, rate_hz, top=args.top)
    timeline = model.timeline(wave_S, rate_hz, args.window, args.hop) if args.timeline or args.picture else None
    if args.picture and timeline is not None:
        from asda.commands.predict_picture import draw

        draw(args.picture, path, model, model.log_mel(wave_S, rate_hz), timeline, args.top)
    shown = timeline if args.timeline else None
    duration_s = len(wave_S) / rate_hz
    if args.json:
        return json.dumps(as_json(path, duration_s, tags, shown, model.labels))
    return "\n".join(as_table(path, duration_s, tags, shown, model.labels))


def as_json(
    path: Path, duration_s: float, tags: list["Tag"], timeline: "Timeline | None", labels: tuple[str, ...]
) -> dict[str, Any]:
    """Return one file's answer for programs; it has "timeline" if that was asked for."""
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
    path: Path, duration_s: float, tags: list["Tag"], timeline: "Timeline | None", labels: tuple[str, ...]
) -> list[str]:
    """Return one file's answer for people, as lines."""
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
    """Word a probability in percent, with a bar."""
    return f"{100 * probability:5.1f} %  {bar(probability, BAR_CHARACTERS):{BAR_CHARACTERS}}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and predict."""
    predict(parse_args(argv))
