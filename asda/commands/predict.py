"""Tag audio files: the strongest tags of each file, optionally over time, as a table, JSON, events or a picture."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import asda
from asda.commands.parsing import CHECKPOINT_HELP, check_range, make_parser
from asda.commands.text import bar, on_one_line
from asda.data.audio.find import audio_files
from asda.errors import UserError, failure_of

if TYPE_CHECKING:
    from asda.inference import Model, Tag, Timeline
    from asda.inference.events import Event, EventRule

BAR_CHARACTERS = 25  # for a probability of 1
PATIENCE_S = 3  # before the progress within a file is shown

EXAMPLES = """examples
  asda predict --model runs/mine_tags dog.wav
      the five strongest tags; --model takes a fine-tuned run, one of its checkpoints, or converted weights
  asda predict --model weights/eat --json --top 527 recordings > tags.jsonl
      all audio below a folder, one object per file: file, duration_s, tags [{label, probability}]
  asda predict --model weights/eat --timeline --hop 0.5 street.flac
      the strongest tag every 0.5 s; with --json all classes of all windows: timeline {starts_s, ends_s,
      labels [class], probabilities [window][class]}. Windows shorter than the clips of training (--window) give
      sharper times and worse tags
  asda predict --model weights/eat --window 2 --hop 0.5 --events calls.csv --threshold 0.6 --low 0.3 night.flac
      a table of events: file, onset_s, offset_s, label, score. An event begins where a class reaches --threshold, and
      lasts while it stays at --low or above; events of a class at most --merge seconds apart become one, and those
      shorter than --shortest are dropped. --events-format audacity (labels) or raven (selections) writes a folder
      with a table for each file
  asda predict --model weights/eat --picture street.png --hop 0.5 street.flac
      a spectrogram, and the strongest tags over time below it

Recordings may last for days: they are read in blocks. Only --timeline with --json, and --picture, keep all windows.
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
    add("--channel", type=int, metavar="N", help="take this channel, counted from 0 (default: the mean of all)")
    add("--timeline", action="store_true", help="also tags over time")
    add("--window", type=float, metavar="S", help="seconds of a window (default: the clips of training)")
    add("--hop", type=float, metavar="S", help="seconds from one window to the next (default: a window)")
    add("--picture", type=Path, metavar="PNG", help="draw spectrogram and tags over time of one file")
    add("--events", type=Path, metavar="PATH", help="write a table of events: a CSV file, or a folder of tables")
    add("--events-format", choices=("csv", "audacity", "raven"), default="csv", help="default: %(default)s")
    add("--threshold", type=float, default=0.5, metavar="P", help="an event begins here (default: %(default)s)")
    add("--low", type=float, metavar="P", help="an event ends below this (default: the threshold)")
    add("--shortest", type=float, default=0.0, metavar="S", help="drop shorter events (default: %(default)s)")
    add("--merge", type=float, default=0.0, metavar="S", help="join events this close (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network computes")
    args = parser.parse_args(argv)
    check_range("--top", args.top, 1)
    if args.channel is not None:
        check_range("--channel", args.channel, 0)
    args.over_time = bool(args.timeline or args.picture or args.events)
    if not args.over_time and (args.window, args.hop) != (None, None):
        raise UserError("--window and --hop are for tags over time; add --timeline, --events or --picture")
    for option in ("events_format", "threshold", "low", "shortest", "merge"):
        if not args.events and getattr(args, option) != parser.get_default(option):
            raise UserError(f"--{option.replace('_', '-')} is for a table of events; add --events")
    check_range("--shortest", args.shortest, 0)
    check_range("--merge", args.merge, 0)
    if args.picture and args.picture.suffix.lower() != ".png":
        raise UserError(f"--picture {args.picture} must end in .png")
    return args


def predict(args: argparse.Namespace) -> None:
    """Tag the files, and print. Raises UserError if a file cannot be used, after all others are done."""
    from asda.inference.events import EventRule  # brings torch
    from asda.inference.tables import event_tables

    files = audio_files(args.inputs)
    if args.picture:
        from asda.commands.pictures import pyplot

        pyplot("--picture")
        if len(files) > 1:
            raise UserError(f"--picture {args.picture} draws one file, and {len(files)} are given; give one")
    rule = EventRule(args.threshold, args.low, args.shortest, args.merge)
    model = asda.load(args.model, device=args.device)
    if not model.labels:
        raise UserError(f"--model {args.model} is pre-trained only and has no classes; fine-tune it first")
    check_times(args, model)
    failures = []
    with event_tables(args.events, args.events_format, files) as write:
        for file in tqdm(files, unit="file", disable=sys.stdout.isatty() or not sys.stderr.isatty()):
            try:
                answer = predict_file(model, file.path, rule, args)
                write(file, answer.events)
                print(answer.as_json(model.labels, args) if args.json else answer.as_text(args), flush=True)
            except Exception as error:  # one bad file costs one file
                reason = failure_of(error)
                failures.append(reason if isinstance(error, UserError) else f"{file.path}: {reason}")
                if len(files) > 1:
                    tqdm.write(f"error: {on_one_line(failures[-1])}", file=sys.stderr)
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


@dataclass
class Answer:
    """All that is told of one file."""

    path: Path
    duration_s: float
    tags: list["Tag"]
    parts: list["Timeline"] = field(default_factory=list)  # every window, for --picture and --timeline --json
    strongest: list[str] = field(default_factory=list)  # a line for each window, for --timeline
    events: list["Event"] = field(default_factory=list)

    def follow(
        self, parts: Iterator["Timeline"], args: argparse.Namespace, labels: tuple[str, ...]
    ) -> Iterator["Timeline"]:
        """Pass the windows on, and keep what will be told."""
        for part in parts:
            if args.picture or (args.timeline and args.json):
                self.parts.append(part)
            if args.timeline and not args.json:
                self.strongest += strongest_lines(part, labels)
            yield part

    def as_json(self, labels: tuple[str, ...], args: argparse.Namespace) -> str:
        """Return an object for programs; it has "timeline" and "events" if they were asked for."""
        record: dict[str, Any] = {
            "file": str(self.path),
            "duration_s": self.duration_s,
            "tags": [{"label": tag.label, "probability": tag.probability} for tag in self.tags],
        }
        if args.timeline:
            record["timeline"] = {
                "starts_s": [start_s for part in self.parts for start_s in part.starts_s.tolist()],
                "ends_s": [end_s for part in self.parts for end_s in part.ends_s.tolist()],
                "labels": labels,
                "probabilities": [row_C for part in self.parts for row_C in part.probabilities.tolist()],
            }
        if args.events:
            record["events"] = [asdict(event) for event in self.events]
        return json.dumps(record)

    def as_text(self, args: argparse.Namespace) -> str:
        """Return lines for people."""
        lines = [f"{self.path}  ({self.duration_s:.2f} s)"]
        lines += [f"  {with_bar(tag.probability)}  {tag.label}" for tag in self.tags]
        if args.timeline:
            lines += ["  strongest tag over time", *self.strongest]
        if args.events:
            lines += [f"  {len(self.events)} events of {len({event.label for event in self.events})} classes"]
        return "\n".join(lines)


def predict_file(model: "Model", path: Path, rule: "EventRule", args: argparse.Namespace) -> Answer:
    """Tag one file, over time as well if asked for, and draw its picture. Raises UserError."""
    from asda.inference.events import find_events

    duration_s = model.duration_s(path)
    to_hear_s = round((1 + args.over_time) * duration_s)
    with tqdm(total=to_hear_s, unit="s", leave=False, delay=PATIENCE_S, disable=None) as progress:
        file = asda.File(path, args.channel, progress.update)
        answer = Answer(path, duration_s, model.tags(file, top=args.top))
        if args.over_time:
            parts = model.timeline_blocks(file, None, args.window, args.hop)
            answer.events = list(find_events(answer.follow(parts, args, model.labels), model.labels, rule))
    if args.picture:
        from asda.commands.predict_picture import draw

        draw(args.picture, file, model, duration_s, answer.parts, args.top)
    return answer


def strongest_lines(timeline: "Timeline", labels: tuple[str, ...]) -> list[str]:
    """Return a line for each window: its times, its strongest class and the class's probability."""
    strongest = zip(timeline.starts_s, timeline.ends_s, *timeline.probabilities.max(dim=1), strict=True)
    return [
        f"  {start_s:8.2f} to {end_s:8.2f} s  {with_bar(float(probability))}  {labels[int(label)]}"
        for start_s, end_s, probability, label in strongest
    ]


def with_bar(probability: float) -> str:
    """Word a probability in percent, with a bar."""
    return f"{100 * probability:5.1f} %  {bar(probability, BAR_CHARACTERS):{BAR_CHARACTERS}}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and predict."""
    predict(parse_args(argv))
