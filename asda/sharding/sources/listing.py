"""Inputs and results of every source, and parts that several need: cells of a CSV, AudioSet's classes, examples."""

import codecs
import csv
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path

from asda.data.audio.find import is_hidden
from asda.errors import UserError
from asda.sharding.audio_ref import Place

MAX_STOP_S = 10.0**6  # 11 days; a larger number is not in seconds
MAX_NAMED = 3  # examples in a sentence
SPLIT_FOLDERS = {  # names of folders and of archives that mean a split, in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


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
    table: str = ""  # for messages: the table whose files must exist, but for some
    notes: list[str] = field(default_factory=list)  # what else the user should know, for the summary


@dataclass(frozen=True)
class SourceOptions:
    """The user's options for the source."""

    use_labels: bool = True
    where: tuple[tuple[str, str], ...] = ()  # (column, value) that a table's row must have
    audio: Path | None = None  # folder with the audio, if the table does not say
    class_labels: Path | None = None  # index, mid, display name; None: AudioSet's own 527
    sample_rate_hz: int | None = None  # of HDF5 packs that do not name theirs
    path_column: str | None = None  # None: the first that is present of those in tables.py; so the next
    label_column: str | None = None
    label_separator: str | None = None  # between the labels in a cell; None: ";", if the cells agree
    use_segments: bool = True  # columns for start and end cut the clip
    top_folders: str | None = None  # "classes" or "splits"; None: as their names say, if they agree
    label_names: tuple[str, ...] | None = None  # of labels that are numbers


def files_in(path: Path, ending: str, example: str) -> list[Path]:
    """Return the file itself, or the files of a folder with this ending, sorted. Raises UserError if it has none."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.glob(f"*{ending}") if not is_hidden(each.name))
    if not found:
        raise UserError(f"--input {path} holds no *{ending}, such as {example}")
    return found


def read_cells(table: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) for each row of a CSV that is not empty. Raises UserError naming the line."""
    with table.open(encoding=encoding_of(table), newline="") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True, delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{table} is not a UTF-8 CSV near line {reader.line_num + 1}: {error}") from None


def encoding_of(table: Path) -> str:
    """Return UTF-16 for a text with its byte order mark, as spreadsheets write it, else UTF-8. Raises UserError."""
    if not table.is_file():
        raise UserError(f"{table}: no such file")
    with table.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


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


def segment_of(where: str, start: str, stop: str, *, duration: bool = False) -> tuple[float, float]:
    """Return start and end in seconds; `stop` may be a duration. Raises UserError if they are not a segment."""
    try:
        start_s, stop_s = float(start), float(stop) + (float(start) if duration else 0)
    except ValueError:
        raise UserError(f"{where}: start {start.strip()!r} and end {stop.strip()!r} must be seconds") from None
    if not 0 <= start_s < stop_s < MAX_STOP_S:
        raise UserError(f"{where}: start {start_s:g} s and end {stop_s:g} s must be 0 <= start < end, in seconds")
    return start_s, stop_s


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


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ only in case, space or Unicode form, each with the first of its kind."""
    first: dict[str, str] = {}
    plain = ((name, " ".join(unicodedata.normalize("NFKC", name).casefold().split())) for name in names)
    return [(first[folded], name) for name, folded in plain if first.setdefault(folded, name) != name]


def counted(number: int, thing: str) -> str:
    """Return "1 clip" or "2 clips" for a sentence."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def examples(names: Collection[str]) -> str:
    """Return "a, b, c and 5 more" for a sentence."""
    more = len(names) - MAX_NAMED
    return ", ".join(islice(names, MAX_NAMED)) + (f" and {more} more" if more > 0 else "")
