"""Inputs and results of every source, and parts that several need: inputs, rows of a CSV, examples for messages."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asda.errors import UserError
from asda.sharding.audio_ref import Place

MAX_NAMED = 3  # examples in a sentence


@dataclass(frozen=True, slots=True)
class Row:
    """One clip as its source lists it."""

    place: Place  # where its audio lies
    relative: str  # what names it in the input: a relative path, or an id; no two rows share it
    labels: tuple[str, ...]
    group: str  # its split, "fold1" for fold 1, or "" if the source has neither
    where: str  # for messages


@dataclass(frozen=True)
class Listing:
    """The clips that a source found."""

    rows: list[Row]
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many, for the summary
    vocabulary: tuple[str, ...] | None = None  # if the source fixes the ids of its classes
    missing: list[tuple[str, str]] = field(default_factory=list)  # clips without audio: (relative, reason)


@dataclass(frozen=True)
class SourceOptions:
    """The user's options for the source."""

    use_labels: bool = True
    where: tuple[tuple[str, str], ...] = ()  # (column, value) that a table's row must have
    audio: Path | None = None  # folder with the audio, if the table does not say
    class_labels: Path | None = None  # index, mid, display name; None: AudioSet's own 527
    sample_rate_hz: int | None = None  # of HDF5 packs that do not name theirs


def only_input(inputs: list[Path], source: str) -> Path:
    """Return the one input of a source that takes one."""
    if len(inputs) != 1:
        raise UserError(f"--source {source} takes one --input and got {len(inputs)}; run once for each")
    return inputs[0]


def files_in(path: Path, ending: str, example: str) -> list[Path]:
    """Return the file itself, or the files of a folder with this ending, sorted. Raises UserError if it has none."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(f"*{ending}"))
    if not found:
        raise UserError(f"--input {path} holds no *{ending}, such as {example}")
    return found


def read_cells(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) for each row of a CSV that is not empty. Raises UserError naming the line."""
    if not table.is_file():
        raise UserError(f"{table}: no such file")
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{table} is not a UTF-8 CSV near line {reader.line_num + 1}: {error}") from None


def read_csv(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> cell) for each row below the header, cells stripped. Raises UserError."""
    rows = read_cells(table)
    columns = [name.strip() for name in next(rows, (0, []))[1]]
    if len(set(columns)) != len(columns):
        raise UserError(f"{table} names a column twice in its header: {', '.join(columns)}")
    for line, cells in rows:
        check_cells(table, line, cells, len(columns))
        yield line, dict(zip(columns, map(str.strip, cells), strict=True))


def check_cells(table: Path, line: int, cells: list[str], num_columns: int) -> None:
    """Refuse a row that has more or fewer cells than the header."""
    if len(cells) != num_columns:
        raise UserError(
            f"{table} line {line} has {len(cells)} cells, its header has {num_columns}; "
            "cells that contain a comma need double quotes"
        )


def require_columns(table: Path, columns: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse a table without the columns that are needed."""
    columns = list(columns)
    for column in wanted:
        if column not in columns:
            raise UserError(f"{table} has no column {column!r}; its columns are {', '.join(columns)}")


def select(table: Path, options: SourceOptions, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]] | None]:
    """Yield the rows of a CSV, and None for each without the values of --where. The columns `wanted` must be there."""
    num_rows = num_kept = 0
    for line, record in read_csv(table):
        if not num_rows:
            require_columns(table, record, (*wanted, *(column for column, _ in options.where)))
        num_rows += 1
        kept = all(record[column] == value for column, value in options.where)
        num_kept += kept
        yield (line, record) if kept else None
    if not num_rows:
        raise UserError(f"{table} has no rows below its header")
    if not num_kept:
        raise UserError(f"no row of {table} has {' and '.join('='.join(pair) for pair in options.where)}")


def refuse_duplicates(rows: list[Row]) -> None:
    """Refuse two rows with one name."""
    seen: set[str] = set()
    for row in rows:
        if row.relative in seen:
            first = next(other for other in rows if other.relative == row.relative)
            raise UserError(f"{row.where} lists {row.relative} again, after {first.where}; keep one of them")
        seen.add(row.relative)


def examples(names: Iterable[str], count: int) -> str:
    """Return "a, b, c and 5 more" for a sentence."""
    shown = [name for name, _ in zip(names, range(MAX_NAMED), strict=False)]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")
