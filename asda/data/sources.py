"""Where clips come from: one small function per source, all in the table SOURCES.

A source lists files and what is known about them; it opens no audio. To add one, write a function
(input path, options) -> Listing and name it in SOURCES: tools/make_shards.py offers it as --source.
"""

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asda.errors import UserError

LABEL_COLUMNS = ("label", "labels", "tags")  # of a CSV, the first that is present
LABEL_SEPARATOR = ";"
# What libsndfile recognises by content, by the names such files bear.
AUDIO_EXTENSIONS = (
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist"),
)


@dataclass(frozen=True)
class Row:
    """One clip as its source lists it."""

    path: Path  # file to read
    relative: str  # the path as given, relative to the input; no two rows share it
    labels: tuple[str, ...]
    group: str  # its split, "fold1" for fold 1, or "" where the source has neither
    where: str  # for messages


@dataclass(frozen=True)
class Listing:
    """What a source found."""

    rows: list[Row]
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many, for the summary


@dataclass(frozen=True)
class SourceOptions:
    """What the user asked of the source."""

    use_labels: bool = True
    where: tuple[tuple[str, str], ...] = ()  # (column, value) that a table's row must have


def rows_from_csv(table: Path, options: SourceOptions) -> Listing:
    """List a CSV with a column `path`, and maybe `label`, `labels` or `tags`, and `split` or `fold`."""
    if not table.is_file():
        raise UserError(f"--input {table} is not a CSV file; --source csv wants a table with a column 'path'")
    records = list(read_csv(table))
    if not records:
        raise UserError(f"{table} has no rows below its header")
    columns = records[0][1]
    for column in ("path", *(column for column, _ in options.where)):
        if column not in columns:
            raise UserError(f"{table} has no column {column!r}; its columns are {', '.join(columns)}")
    kept = [(line, record) for line, record in records if all(record[c] == v for c, v in options.where)]
    if not kept:
        raise UserError(f"no row of {table} has {' and '.join('='.join(pair) for pair in options.where)}")
    rows = [_csv_row(table, line, record, options) for line, record in kept]
    _refuse_duplicates(rows)
    return Listing(rows, {"rows without the --where values": len(records) - len(kept)})


def read_csv(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> cell) for each row, cells stripped. Raises UserError naming the line."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = [name.strip() for name in next(reader, [])]
            if len(set(columns)) != len(columns):
                raise UserError(f"{table} names a column twice in its header: {', '.join(columns)}")
            for cells in reader:
                if cells and len(cells) != len(columns):
                    raise UserError(
                        f"{table} line {reader.line_num} has {len(cells)} cells, its header has {len(columns)}; "
                        "cells that contain a comma need double quotes"
                    )
                if cells:
                    yield reader.line_num, dict(zip(columns, map(str.strip, cells), strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table} is no UTF-8 CSV near line {reader.line_num + 1}: {error}") from None


def _csv_row(table: Path, line: int, record: dict[str, str], options: SourceOptions) -> Row:
    where = f"{table} line {line}"
    if not record["path"] or "\0" in record["path"]:
        raise UserError(f"{where}: the cell 'path' is empty or holds a zero byte")
    relative = os.path.normpath(record["path"])
    if os.path.isabs(relative) and Path(relative).is_relative_to(table.parent.absolute()):
        relative = os.path.relpath(relative, table.parent.absolute())
    column = next((name for name in LABEL_COLUMNS if name in record), None)
    labels = _split_labels(record[column]) if column and options.use_labels else ()
    return Row(table.parent / relative, relative, labels, _csv_group(where, record), where)


def _split_labels(cell: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in cell.split(LABEL_SEPARATOR) if name.strip()))


def _csv_group(where: str, record: dict[str, str]) -> str:
    column = next((name for name in ("split", "fold") if name in record), None)
    if column is None:
        return ""
    value = record[column]
    if not value:
        raise UserError(f"{where}: the cell {column!r} is empty; every row needs one, or drop the column")
    return value if column == "split" or value.startswith("fold") else f"fold{value}"


def _refuse_duplicates(rows: list[Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if row.relative in seen:
            raise UserError(f"{row.where} lists {row.relative} again, after {seen[row.relative]}; keep one of them")
        seen[row.relative] = row.where


def rows_from_folder(folder: Path, options: SourceOptions) -> Listing:
    """List a folder's audio: one class per first-level subfolder, or no labels where all files lie directly in it."""
    if options.where:
        raise UserError("--where needs a table's columns; use it with --source csv")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source folder wants a folder of audio files")
    files = sorted(walk(folder))
    audio = [name for name in files if is_audio(name)]
    if not audio:
        known = " ".join(AUDIO_EXTENSIONS)
        raise UserError(f"{folder} holds no audio file among {len(files)} files; known extensions are {known}")
    direct = [name for name in audio if "/" not in name]
    if options.use_labels and 0 < len(direct) < len(audio):
        raise UserError(
            f"{folder} holds audio both directly ({direct[0]}) and in subfolders, which would be classes; "
            "move one kind away, or give --no-labels"
        )
    labelled = options.use_labels and not direct
    rows = [
        Row(folder / name, name, (name.split("/")[0],) if labelled else (), "", str(folder / name)) for name in audio
    ]
    return Listing(rows, {"files that are hidden or not audio": len(files) - len(audio)})


def is_audio(relative: str) -> bool:
    """Whether a name has an audio extension and no part of its path is hidden."""
    return Path(relative).suffix.lower() in AUDIO_EXTENSIONS and not any(p.startswith(".") for p in relative.split("/"))


def walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files, following links to folders, each folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()  # a link back into the tree
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in files)


SOURCES: dict[str, Callable[[Path, SourceOptions], Listing]] = {
    "csv": rows_from_csv,
    "folder": rows_from_folder,
}
