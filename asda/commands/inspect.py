"""Show what is in a dataset of shards: tables, lists, pictures and single clips; and verify that it is intact."""

import argparse
import csv
import difflib
import itertools
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from asda.commands.parsing import check_range, make_parser
from asda.commands.shard_tables import dataset_figures, tables
from asda.commands.text import aligned, on_one_line, shortened
from asda.data.audio.waves import SAMPLE_RATE_HZ, decode_wav
from asda.data.remote.cache import CacheConfig
from asda.data.shards.index import REPAIR, DatasetIndex
from asda.data.shards.read import ShardFile, load_dataset
from asda.errors import UserError, failure_of
from asda.sharding.verify import read_members, verify_dataset
from asda.system import write_whole_file

if TYPE_CHECKING:
    from asda.commands.pictures import Panel

COLUMNS = ("key", "split", "shard", "seconds", "labels", "source")
MAKER = "asda shards"
MOST_PANELS = 400  # in a contact sheet; matplotlib draws up to 65,536 pixels

EXAMPLES = """examples
  asda inspect shards/esc50
      splits, hours, bytes, classes and lengths; --json for programs, --classes all for every class
  asda inspect shards/esc50 --verify
      read everything, and name every damaged clip and file
  asda inspect shards/esc50 --find dog
      the clips with a label, as CSV: key, split, shard, seconds, labels, source
  asda inspect shards/esc50 --list --columns key,seconds > clips.csv
      all clips; without the column source only the indexes of the shards are read
  asda inspect shards/esc50 --sheet dogs.png --find dog --num 24
      a contact sheet of spectrograms of a random sample
  asda inspect shards/esc50 --key 1-100032-A-0 --split fold1
      one clip: labels, length, the bytes of the shard that hold it, what its JSON says
  asda inspect shards/esc50 --export 1-100032-A-0 dog.wav
      that clip as a WAV, bit for bit as it lies in the shard
"""


class Clip(NamedTuple):
    """A clip by its place: the split, the shard, and the row of the shard's index."""

    split: str
    shard: ShardFile
    number: int

    @property
    def key(self) -> str:
        """The clip's name in the dataset."""
        return self.shard.index.keys[self.number]

    @property
    def num_samples(self) -> int:
        """The clip's length, in samples at 16 kHz."""
        return self.shard.index.num_samples[self.number]

    @property
    def label_ids(self) -> tuple[int, ...]:
        """The clip's labels, as positions in the vocabulary."""
        return self.shard.index.labels[self.number]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line."""
    parser = make_parser("inspect", "Show what is in a dataset of shards, and verify that it is intact.", EXAMPLES)
    add = parser.add_argument
    add("dataset", metavar="SHARDS", help="a dataset: its folder, or a URL (https://, s3://, ...)")
    add("--split", action="append", default=[], metavar="NAME", help="only this split; may be repeated (default: all)")
    add("--find", metavar="LABEL", help="only clips with this label: a list, or with --sheet a picture")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--list", action="store_true", help="the clips as CSV")
    either.add_argument("--key", help="one clip: its row of the index, and its JSON")
    either.add_argument("--export", nargs=2, metavar=("KEY", "WAV"), help="write one clip to a file")
    either.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of spectrograms")
    either.add_argument("--verify", action="store_true", help="read everything; exit code 2 if anything is damaged")
    add(
        "--classes",
        default="10",
        metavar="N",
        help="show the N most frequent and N rarest classes, or all (default: 10)",
    )
    add(
        "--columns",
        default=",".join(COLUMNS),
        metavar="A,B",
        help="columns of --list and --find (default: %(default)s)",
    )
    add("--num", type=int, default=24, metavar="N", help="number of clips on a --sheet (default: %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the choice of clips for a --sheet (default: %(default)s)",
    )
    add(
        "--cache",
        action="store_true",
        help="for a URL: fetch whole shards, and keep copies in ~/.cache/asda. --verify and --list always do; "
        "otherwise single clips are fetched, which some servers refuse",
    )
    add("--json", action="store_true", help="the tables, or the clip of --key, as one JSON object")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def inspect_shards(args: argparse.Namespace) -> None:
    """Open the dataset, and show what is asked for. Raises UserError."""
    if args.verify:
        verify_dataset(args.dataset, len(os.sched_getaffinity(0)), args.split, CacheConfig())
        return
    tables_only = not (args.key or args.export or args.sheet or args.list or args.find)
    # Only the tables, which read no shard, refuse missing files and wrong sizes; all else reports what it reads.
    cache = CacheConfig() if args.cache or args.list else None
    dataset = load_dataset(args.dataset, args.split or None, cache, tolerant=not tables_only)
    names = tuple(dict.fromkeys(args.split)) or tuple(dataset.splits)
    if not all(dataset.splits[name].clips for name in names):
        raise UserError(f"{dataset.folder}: a split has no clips; make the dataset again with {MAKER}")
    if args.key is not None:
        print(clip_text(dataset, find_key(dataset, names, args.key), as_json=args.json))
    elif args.export:
        export(find_key(dataset, names, args.export[0]), Path(args.export[1]))
    elif args.sheet:
        draw_sheet(args.sheet, sample(dataset, names, args.find, args.num, args.seed), dataset)
    elif args.list or args.find is not None:
        list_clips(dataset, clips_with(dataset, names, args.find), args.columns.split(","))
    else:
        figures = summarize(dataset, names)
        print(json.dumps(figures) if args.json else "\n".join(tables(figures, most_classes(args.classes))))


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, before anything is read. Raises UserError."""
    most_classes(args.classes)
    if unknown := [name for name in args.columns.split(",") if name not in COLUMNS]:
        raise UserError(f"--columns {args.columns}: unknown column {unknown[0]!r}; choose from {','.join(COLUMNS)}")
    if args.find is not None and (args.key is not None or args.export or args.verify):
        raise UserError("--find goes with --list and --sheet, not with --key, --export or --verify")
    if args.json and (args.list or args.find is not None or args.export or args.sheet or args.verify):
        raise UserError("--json goes with the tables and with --key; --list and --find print CSV")
    if args.export and Path(args.export[1]).suffix.lower() != ".wav":
        raise UserError(f"--export {args.export[1]} must end in .wav")
    check_range("--num", args.num, 1, MOST_PANELS)
    check_range("--seed", args.seed, 0)
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet} must end in .png")
    if args.sheet:
        from asda.commands.pictures import pyplot  # brings torch

        pyplot("--sheet")


def most_classes(text: str) -> float:
    """Read --classes; all is infinity. Raises UserError."""
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise UserError(f"--classes {text} must be a whole number, or all")
    return math.inf if text == "all" else int(text)


# Choosing clips


def shard_files(dataset: DatasetIndex, names: Iterable[str]) -> list[tuple[str, ShardFile]]:
    """List every shard of some splits, with its split's name."""
    return [(name, ShardFile(dataset.folder, entry)) for name in names for entry in dataset.splits[name].shards]


def every_clip(dataset: DatasetIndex, names: Iterable[str]) -> Iterator[Clip]:
    """Yield all clips in the dataset's order; a shard's index is read at the first of its clips."""
    for name, shard in shard_files(dataset, names):
        yield from (Clip(name, shard, number) for number in range(shard.entry.clips))


def clips_with(dataset: DatasetIndex, names: Iterable[str], label: str | None) -> Iterator[Clip]:
    """Yield the clips with a label, or all clips. Raises UserError if the vocabulary lacks the label."""
    clips = every_clip(dataset, names)
    if label is None:
        return clips
    if label not in dataset.vocabulary:
        near = difflib.get_close_matches(label.casefold(), dataset.vocabulary, n=3, cutoff=0.5)
        near += [name for name in dataset.vocabulary if label.casefold() in name.casefold() and name not in near]
        hint = f"did you mean {', '.join(map(repr, near[:3]))}?" if near else "--classes all shows its classes"
        raise UserError(f"--find {label}: {dataset.folder} has no such class; {hint}")
    wanted = dataset.vocabulary.index(label)
    return (clip for clip in clips if wanted in clip.label_ids)


def find_key(dataset: DatasetIndex, names: Iterable[str], key: str) -> Clip:
    """Return the clip with this key. Raises UserError, with keys that contain it, if there is none."""
    near: list[str] = []
    for name, shard in shard_files(dataset, names):
        if key in shard.index.keys:
            return Clip(name, shard, shard.index.keys.index(key))
        near += [other for other in shard.index.keys if key.casefold() in other.casefold()][: 3 - len(near)]
    hint = f"keys that contain it: {', '.join(near)}" if near else "--list names all keys"
    raise UserError(f"{dataset.folder} has no clip {key!r} in {', '.join(names)}; {hint}")


def sample(dataset: DatasetIndex, names: Iterable[str], label: str | None, num: int, seed: int) -> list[Clip]:
    """Draw up to `num` different clips, and sort them by label and key. Raises UserError if there are none."""
    rng = np.random.default_rng(seed)
    if label is None:  # by place, which reads only the indexes of the clips that are drawn
        shards = shard_files(dataset, names)
        firsts = [0, *itertools.accumulate(shard.entry.clips for _, shard in shards)]
        places = rng.choice(firsts[-1], min(num, firsts[-1]), replace=False)
        numbers = [bisect_right(firsts, place) - 1 for place in places]
        chosen = [Clip(*shards[n], int(place) - firsts[n]) for n, place in zip(numbers, places, strict=True)]
    else:
        clips = list(clips_with(dataset, names, label))
        if not clips:
            raise UserError(f"{dataset.folder} has no clip with the label {label!r} in {', '.join(names)}")
        chosen = [clips[place] for place in rng.choice(len(clips), min(num, len(clips)), replace=False)]
    return sorted(chosen, key=lambda clip: (clip.label_ids, clip.key))


# Showing them


def summarize(dataset: DatasetIndex, names: Iterable[str]) -> dict[str, Any]:
    """Return what --json prints and the tables show. Reads dataset.json and the shards' indexes."""
    lengths, num_unlabelled = [], 0
    shards = shard_files(dataset, names)
    for _, shard in tqdm(shards, unit="index", disable=not sys.stderr.isatty(), leave=False):
        lengths.append(np.array(shard.index.num_samples))
        num_unlabelled += sum(not labels for labels in shard.index.labels)
    splits = {name: dataset.splits[name] for name in names}
    return dataset_figures(dataset, splits, np.concatenate(lengths), num_unlabelled)


def list_clips(dataset: DatasetIndex, clips: Iterable[Clip], columns: list[str]) -> None:
    """Print a CSV, which asda shards can read; labels are separated by ";".

    Raises:
        UserError: clips could not be read for the column source, which is empty there.
    """
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(columns)
    failures = Failures()
    for clip in tqdm(clips, unit="clip", disable=sys.stdout.isatty() or not sys.stderr.isatty()):
        row = {
            "key": clip.key,
            "split": clip.split,
            "shard": clip.shard.entry.name,
            "seconds": clip.num_samples / SAMPLE_RATE_HZ,
            "labels": ";".join(label_names(dataset, clip)),
        }
        if "source" in columns:
            with failures.of_clip():
                row["source"] = read_members(clip.shard, clip.number)[1].get("source", "")
        table.writerow(row.get(column, "") for column in columns)
    failures.tell(f"{dataset.folder}: {{}} clips cannot be read, and have no source in the list; {REPAIR}")


class Failures:
    """Clips of a loop that could not be read: each costs that clip alone."""

    def __init__(self):
        self._count = 0

    @contextmanager
    def of_clip(self) -> Iterator[None]:
        """Print the exception that ends the block, if any, and count it."""
        try:
            yield
        except Exception as error:
            self._count += 1
            tqdm.write(f"error: {on_one_line(failure_of(error))}", file=sys.stderr)

    def tell(self, sentence: str) -> None:
        """Raise a UserError with the number of failures, if there are any."""
        if self._count:
            raise UserError(sentence.format(self._count))


def label_names(dataset: DatasetIndex, clip: Clip) -> list[str]:
    """Name a clip's classes. Raises UserError if the index gives it an unknown one."""
    if clip.label_ids and max(clip.label_ids) >= len(dataset.vocabulary):
        raise UserError(
            f"shard {clip.shard.entry.name}, key {clip.key}: the index gives it label {max(clip.label_ids)}, and there "
            f"are {len(dataset.vocabulary)} classes, counted from 0; {REPAIR}"
        )
    return [dataset.vocabulary[label] for label in clip.label_ids]


def clip_text(dataset: DatasetIndex, clip: Clip, *, as_json: bool) -> str:
    """Say all that is known about one clip: its row of the index, and its JSON."""
    index = clip.shard.index
    wav, described = read_members(clip.shard, clip.number)
    first, end = index.offsets[clip.number : clip.number + 2]
    figures: dict[str, Any] = {
        "key": clip.key,
        "split": clip.split,
        "shard": clip.shard.entry.name,
        "number": clip.number,
        "bytes": [first, end],
        "hash": index.hashes[clip.number],
        "samples": clip.num_samples,
        "seconds": clip.num_samples / SAMPLE_RATE_HZ,
        "label_ids": list(clip.label_ids),
        "labels": label_names(dataset, clip),
        "json": described,
    }
    if as_json:
        return json.dumps(figures)
    labels = zip(figures["labels"], clip.label_ids, strict=True)
    rows = {
        "key": clip.key,
        "split": clip.split,
        "labels": ", ".join(f"{name} ({label})" for name, label in labels) or "none",
        "length": f"{figures['seconds']:.3f} s, {clip.num_samples:,} samples",
        "shard": f"{clip.shard.entry.name}, clip {clip.number} of {len(index.keys)}, counted from 0",
        "bytes": f"{first} to {end} of the shard, for a WAV of {len(wav)}",
        "hash": f"{index.hashes[clip.number]} (xxh3_64 of these bytes)",
        "json": json.dumps(described),
    }
    return "\n".join(aligned(rows, 8))


def export(clip: Clip, out: Path) -> None:
    """Write the WAV of one clip, bit for bit."""
    wav, _ = read_members(clip.shard, clip.number)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole_file(out, wav)
    print(f"written {out}: {clip.num_samples / SAMPLE_RATE_HZ:.2f} s, {len(wav):,} bytes")


# Drawing a contact sheet


def draw_sheet(out: Path, clips: list[Clip], dataset: DatasetIndex) -> None:
    """Write a picture with the log-mel of every clip, and say where."""
    from asda.commands.pictures import draw_panels

    bar = tqdm(clips, unit="clip", disable=not sys.stderr.isatty(), leave=False)
    panels: list[Panel] = []
    failures = Failures()
    for clip in bar:
        with failures.of_clip():
            panels.append(clip_panel(dataset, clip))
    if panels:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole_file(out, draw_panels(f"{dataset.folder}: {len(panels)} clips on one colour scale", panels))
        print(f"written {out}: {len(panels)} clips")
    failures.tell(f"{dataset.folder}: {{}} clips cannot be read, and are not drawn; {REPAIR}")


def clip_panel(dataset: DatasetIndex, clip: Clip) -> "Panel":
    """Make the picture of one clip, with key, labels and length under it. Raises UserError."""
    from asda.commands.pictures import CAPTION_CHARACTERS, DB_PER_NEPER, make_panel
    from asda.data.features.fbank import log_mel

    length = f"{clip.num_samples / SAMPLE_RATE_HZ:.2f} s"
    labels = shortened(", ".join(label_names(dataset, clip)) or "no label", CAPTION_CHARACTERS - len(length) - 2)
    caption = f"{shortened(clip.key, CAPTION_CHARACTERS)}\n{labels}, {length}"
    return make_panel(log_mel(decode_wav(read_members(clip.shard, clip.number)[0])) * DB_PER_NEPER, caption)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and show the dataset."""
    inspect_shards(parse_args(argv))
