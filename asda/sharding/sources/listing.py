"""Inputs and results of every source, and parts that several need: cells of a CSV, AudioSet's classes, examples."""

import csv
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
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


def check_cells(where: str, cells: list[str], num_columns: int) -> None:
    """Refuse a row that has more or fewer cells than the header."""
    if len(cells) != num_columns:
        counts = f"{len(cells)} cells, its header has {num_columns}"
        raise UserError(f"{where} has {counts}; cells that contain a comma need double quotes")


def require_columns(table: Path, columns: list[str], wanted: Iterable[str]) -> None:
    """Refuse a table without the columns that are needed."""
    for column in wanted:
        if column not in columns:
            raise UserError(f"{table} has no column {column!r}; its columns are {', '.join(columns)}")


class Classes:
    """Names of AudioSet's classes by their machine ids (MIDs, as "/m/09x0r"), in the order of their indices."""

    def __init__(self, table: Path | None):
        """Read a table index,mid,name, with or without a header; None reads AudioSet's 527."""
        self.table = table or Path(str(files("asda.data") / "audioset_labels.csv"))
        rows = [(line, [cell.strip() for cell in cells]) for line, cells in read_cells(self.table)]
        if rows and rows[0][1][0] == "index":
            rows = rows[1:]
        self._names: dict[str, str] = {}
        for number, (line, cells) in enumerate(rows):
            if len(cells) != 3 or cells[0] != str(number) or not all(cells):
                raise UserError(f"{self.table} line {line} is not index,mid,name with the index {number}")
            self._names[cells[1]] = cells[2]
        self.names = tuple(self._names.values())
        if not rows or len(set(self.names)) < len(rows):
            raise UserError(f"{self.table} is empty, or names a class twice; each line is one class: index,mid,name")
        self._labels: dict[str, tuple[str, ...]] = {}  # most lists come again: two million rows share them

    def labels(self, mids: str, where: str) -> tuple[str, ...]:
        """Return the names of MIDs separated by commas. Raises UserError with `where` for an unknown one."""
        labels = self._labels.get(mids)
        if labels is None:
            wanted = [mid.strip() for mid in mids.split(",") if mid.strip()]
            if unknown := next((mid for mid in wanted if mid not in self._names), None):
                what = f"{unknown!r} is not among the {len(self._names)} classes of {self.table}"
                raise UserError(f"{where}: {what}; correct it, or give the table that has it as --class-labels")
            labels = self._labels[mids] = tuple(dict.fromkeys(self._names[mid] for mid in wanted))
        return labels


def examples(names: Collection[str]) -> str:
    """Return "a, b, c and 5 more" for a sentence."""
    more = len(names) - MAX_NAMED
    return ", ".join(islice(names, MAX_NAMED)) + (f" and {more} more" if more > 0 else "")
