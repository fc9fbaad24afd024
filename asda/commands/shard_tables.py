"""Count what is in a dataset of shards: figures for programs, and tables for people.

Shapes: N clips.
"""

import csv
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from asda.commands.text import bar, on_one_line, shortened
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.shards.index import DatasetIndex, SplitIndex
from asda.sharding.journal import SILENT_FILE

MIB = 1 << 20
BAR_CHARACTERS = 30  # in the longest bar of a histogram
NAME_CHARACTERS = 36  # in a class name of a table
MOST_NAMES = 10  # absent classes in a line
MOST_LENGTH_ROWS = 12  # in the histogram of lengths


def dataset_figures(
    dataset: DatasetIndex, splits: Mapping[str, SplitIndex], samples_N: np.ndarray, num_unlabelled: int
) -> dict[str, Any]:
    """Return the figures of some splits, which together have at least one clip.

    Args:
        dataset: all splits.
        splits: those to count.
        samples_N: the lengths of their clips at 16 kHz, in any order.
        num_unlabelled: how many of the clips have no label.
    """
    counts = np.array([split.class_counts for split in splits.values()], dtype=np.int64).sum(0)
    return {
        "dataset": str(dataset.folder),
        "format_version": dataset.format_version,
        "sample_rate_hz": dataset.sample_rate_hz,
        "command": dataset.command,
        "rejected": dataset.rejected,
        "duplicates": asdict(dataset.duplicates),
        "classes": len(dataset.vocabulary),
        "splits": {name: split_figures(dataset, split) for name, split in splits.items()},
        "class_counts": dict(zip(dataset.vocabulary, counts.tolist(), strict=True)),
        "clips_without_label": num_unlabelled,
        "lengths": length_figures(samples_N),
    }


def split_figures(dataset: DatasetIndex, split: SplitIndex) -> dict[str, Any]:
    """Return one row of the table of splits; `ratio` is the shards' size over that of their samples."""
    num_bytes = sum(shard.bytes for shard in split.shards)
    raw_bytes = round(split.seconds * SAMPLE_RATE_HZ) * 2
    return {
        "clips": split.clips,
        "seconds": split.seconds,
        "shards": len(split.shards),
        "bytes": num_bytes,
        "raw_bytes": raw_bytes,
        "ratio": num_bytes / raw_bytes,
        "log_mel": {"mean": split.log_mel.mean, "std": split.log_mel.std},
        "absent_classes": [
            name for name, count in zip(dataset.vocabulary, split.class_counts, strict=True) if not count
        ],
    }


def length_figures(samples_N: np.ndarray) -> dict[str, Any]:
    """Return the shortest, median and longest length in s, and the clips in bins of equal width, [from_s, to_s)."""
    width = bin_width(int(samples_N.min()), int(samples_N.max()))
    first = int(samples_N.min()) // width
    counts = np.bincount(samples_N // width - first).tolist()
    return {
        "shortest_s": int(samples_N.min()) / SAMPLE_RATE_HZ,
        "median_s": float(np.median(samples_N)) / SAMPLE_RATE_HZ,
        "longest_s": int(samples_N.max()) / SAMPLE_RATE_HZ,
        "bins": [
            {"from_s": place * width / SAMPLE_RATE_HZ, "to_s": (place + 1) * width / SAMPLE_RATE_HZ, "clips": count}
            for place, count in enumerate(counts, start=first)
        ],
    }


def bin_width(shortest: int, longest: int) -> int:
    """Return the least of 10, 20, 50, 100, ... ms, in samples, that needs at most MOST_LENGTH_ROWS bins."""
    widths = (digit * 10**power * SAMPLE_RATE_HZ // 100 for power in itertools.count() for digit in (1, 2, 5))
    return next(width for width in widths if longest // width - shortest // width < MOST_LENGTH_ROWS)


def tables(figures: dict[str, Any], num_classes: float) -> list[str]:
    """Return figures as lines of text, with the `num_classes` most frequent and the `num_classes` rarest classes."""
    lines = [f"{figures['dataset']}: format version {figures['format_version']}, {figures['classes']} classes"]
    lines += [f"made by: {figures['command']}"] if figures["command"] else []
    lines += [f"rejected: {figures['rejected']:,} clips"] if figures["rejected"] else []
    lines += duplicate_lines(figures["duplicates"])
    lines += silence_lines(figures["dataset"])
    lines += ["", *split_table(figures["splits"])]
    if figures["classes"]:
        absent = absent_table(figures["splits"], figures["classes"], all_names=num_classes == math.inf)
        lines += ["", *class_table(figures, num_classes), "", *absent]
    return [*lines, "", *length_table(figures["lengths"])]


def duplicate_lines(counts: dict[str, int]) -> list[str]:
    """Return lines about pairs of clips that are the same, or nearly so."""
    return [
        f"{kind} duplicates: {counts[kind]:,} pairs, {counts[f'{kind}_across_splits']:,} of them across splits"
        for kind in ("exact", "near")
        if counts[kind]
    ]


def silence_lines(folder: str) -> list[str]:
    """Return a line about clips of digital silence, if the local folder of a dataset has a table of them."""
    path = Path(folder, SILENT_FILE)
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    are = "clip is" if len(rows) == 1 else "clips are"
    first = on_one_line(rows[0]["path"])
    return [f"WARNING: {len(rows):,} {are} digital silence, the first is {first}; {path} lists them"]


def split_table(splits: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each split, and one for their sum."""
    width = max(12, *(len(name) + 2 for name in splits))
    header = f"{'split':<{width}}{'clips':>10}{'hours':>10}{'shards':>8}{'MiB':>10}{'raw MiB':>10}{'ratio':>7}"
    lines = [header + f"{'log-mel mean':>14}{'std':>9}"]
    for name, row in splits.items():
        stats = f"{row['log_mel']['mean']:>14.4f}{row['log_mel']['std']:>9.4f}"
        lines.append(f"{name:<{width}}{sizes(row)}{stats}")
    if len(splits) > 1:
        fields = ("clips", "seconds", "shards", "bytes", "raw_bytes")
        total = {field: sum(split[field] for split in splits.values()) for field in fields}
        lines.append(f"{'all':<{width}}{sizes(total)}")
    return lines


def sizes(row: dict[str, Any]) -> str:
    """Format the columns of the table of splits that can be added up, and the ratio."""
    mib, raw_mib = row["bytes"] / MIB, row["raw_bytes"] / MIB
    hours = row["seconds"] / 3600
    return f"{row['clips']:>10,}{hours:>10.2f}{row['shards']:>8,}{mib:>10.1f}{raw_mib:>10.1f}{mib / raw_mib:>7.2f}"


def class_table(figures: dict[str, Any], most: float) -> list[str]:
    """Return lines with the classes that have clips, ordered by their number."""
    num_clips = sum(split["clips"] for split in figures["splits"].values())
    counts = {name: count for name, count in figures["class_counts"].items() if count}
    unlabelled = figures["clips_without_label"]
    words = f"{unlabelled:,} clips have no label" if unlabelled else "every clip has a label"
    lines = [f"classes by clips: {sum(counts.values()) / num_clips:.2f} labels a clip, {words}"]
    ranked = sorted(counts.items(), key=lambda row: (-row[1], row[0]))
    rows = [(name, count, f"{count:>11,}{100 * count / num_clips:>7.1f} %") for name, count in ranked]
    drawn = with_bars(rows)
    if len(drawn) <= 2 * most:
        return lines + drawn
    shown = int(most)
    return [*lines, *drawn[:shown], f"  ... {len(drawn) - 2 * shown:,} classes between", *drawn[len(drawn) - shown :]]


def absent_table(splits: dict[str, dict[str, Any]], num_classes: int, *, all_names: bool = False) -> list[str]:
    """Return a line for each split with the classes of the vocabulary that it lacks."""
    lines = ["absent classes"]
    for name, split in splits.items():
        absent = split["absent_classes"]
        shown = absent if all_names else absent[:MOST_NAMES]
        more = f" and {len(absent) - len(shown)} more" if len(absent) > len(shown) else ""
        lines.append(f"  {name}: {len(absent)} of {num_classes}{': ' if absent else ''}{'; '.join(shown)}{more}")
    return lines


def length_table(lengths: dict[str, Any]) -> list[str]:
    """Return lines with the number of clips by length."""
    words = ", ".join(f"{name} {lengths[f'{name}_s']:.2f} s" for name in ("shortest", "median", "longest"))
    if len(lengths["bins"]) == 1:
        return [f"lengths: {words}"]
    rows = [(f"{row['from_s']:9.2f} to {row['to_s']:9.2f} s", row["clips"]) for row in lengths["bins"]]
    return [f"lengths: {words}", *with_bars([(name, count, f"{count:>11,}") for name, count in rows])]


def with_bars(rows: list[tuple[str, int, str]]) -> list[str]:
    """Format rows of (name, count, figures) as lines of name, figures and a bar; every count above 0 shows."""
    names = [shortened(name, NAME_CHARACTERS) for name, _, _ in rows]
    width, most = max(map(len, names), default=0), max((count for _, count, _ in rows), default=0)
    return [
        f"  {name:<{width}}{figures}  {bar(count / most if most else 0, BAR_CHARACTERS)}".rstrip()
        for name, (_, count, figures) in zip(names, rows, strict=True)
    ]
