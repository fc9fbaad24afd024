"""Tables of clips as people have them: CSV, tab and semicolon tables, JSON lines; which column means what.

Nothing is guessed: a column that is not used is named, and a cell that may mean two things is refused.
"""

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from asda.data.audio.find import existing
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import (
    Listing,
    Row,
    SourceOptions,
    check_cells,
    encoding_of,
    examples,
    read_cells,
    require_columns,
    segment_of,
)

# Names of columns, without regard to case; the first that is present counts.
PATH_COLUMNS = (
    *("path", "file_name", "filename", "file", "filepath", "file_path", "audio", "audio_path", "audio_file"),
    *("audio_filename", "audio_filepath", "wav", "wav_path", "fname", "clip"),
)
LABEL_COLUMNS = (
    *("label", "labels", "tags", "tag", "category", "categories", "class", "classes", "class_name", "target_name"),
    *("label_name", "event_label", "species", "primary_label"),
)
SPLIT_COLUMNS = ("split", "fold")
SEGMENT_COLUMNS = (  # start and end in seconds, or start and duration
    *(("start", "end"), ("start", "stop"), ("onset", "offset"), ("start_s", "end_s"), ("start_s", "stop_s")),
    *(("start_time", "end_time"), ("start_seconds", "end_seconds"), ("begin time (s)", "end time (s)")),
    *(("start", "duration"), ("start_s", "duration_s"), ("start_time", "duration"), ("onset", "duration")),
    ("offset", "duration"),
)
SEGMENT_WORDS = {name for pair in SEGMENT_COLUMNS for name in pair} - {"stop", "duration", "duration_s"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
JSON_LINES = (".jsonl", ".ndjson")

SEPARATOR = ";"  # of labels, unless the user gives another
OTHER_SEPARATORS = ",|/"  # which may part labels too
ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d{1,18})"""
LIST = re.compile(rf"\[\s*(?:{ITEM}(?:\s*,\s*{ITEM})*\s*,?)?\s*\]", re.ASCII)
LIKE_A_LIST = re.compile(r"""\[\s*(?:['"\d].*)?\]""", re.DOTALL)
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.ASCII)
MISSING_SHARE = 0.9  # of a table's files: then the paths are wrong, or the files are elsewhere

Cell = str | tuple[str, ...]  # a tuple: a list of labels
Record = dict[str, Cell]  # column -> cell


class Table(NamedTuple):
    """An open table."""

    name: str  # for messages
    columns: list[str]
    records: Iterable[tuple[str, Record]]  # (place for messages, cells)


@dataclass(frozen=True)
class Columns:
    """Which column of a table means what; None: no column does."""

    label: str | None
    group: str | None
    segment: tuple[str, str] | None

    @classmethod
    def of(cls, table: Table, options: SourceOptions, segments: bool) -> "Columns":
        """Choose the columns of a table. Raises UserError if a given one is missing, or a start has no end."""
        label = find_column(table, LABEL_COLUMNS, options.label_column, "--label-column")
        group = find_column(table, SPLIT_COLUMNS)
        pairs = [tuple(find_column(table, (name,)) for name in pair) for pair in SEGMENT_COLUMNS] if segments else []
        segment = next(((start, end) for start, end in pairs if start and end), None)
        alone = next((c for c in table.columns if c.casefold() in SEGMENT_WORDS), None)
        if segments and alone and not segment:
            what = f"{table.name} has a column {alone!r} and none that completes it to a segment"
            raise UserError(f"{what}, as start and end, or onset and offset; add it, or give --no-segments")
        return cls(label if options.use_labels else None, group, segment)


def find_column(table: Table, names: Iterable[str], given: str | None = None, option: str = "") -> str | None:
    """Return the given column, else the first of `names` that is present in any case, else None."""
    known = ", ".join(table.columns)
    if given is not None and given not in table.columns:
        raise UserError(f"{option} {given}: {table.name} has no such column; its columns are {known}")
    folded = {column.casefold(): column for column in reversed(table.columns)}
    return given or next((name if name in table.columns else folded[name] for name in names if name in folded), None)


def rows_from_csv(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a table of paths: CSV, also with semicolons or tabs, or JSON lines. Raises UserError."""
    path = only_input(inputs, "csv")
    if not path.is_file():
        raise UserError(f"--input {path} is not a CSV file; --source csv wants a table with a column 'path'")
    table = read_table(path, options)
    column = find_column(table, PATH_COLUMNS, options.path_column, "--path-column")
    if not table.columns:
        raise UserError(f"{path} has no rows below its header")
    if column is None:
        known = ", ".join(table.columns)
        raise UserError(f"{path} has no column 'path'; its columns are {known}; name it by --path-column")
    locate = partial(_located, path.parent, _folder_of(path), column)
    listing = list_table(table, options, locate, {column}, segments=options.use_segments)
    _refuse_two_names(listing.rows)
    return replace(listing, table=f"{path}; its paths are relative to {path.parent}")


def only_input(inputs: list[Path], source: str) -> Path:
    """Return the one input of a source that takes one."""
    if len(inputs) != 1:
        raise UserError(f"--source {source} takes one --input and got {len(inputs)}; run once for each")
    return inputs[0]


# Reading


def read_table(path: Path, options: SourceOptions) -> Table:
    """Open a table with the separator that makes a column of paths. Raises UserError if two separators do."""
    if path.suffix.lower() in JSON_LINES:
        columns = list(dict.fromkeys(column for _, record in _json_lines(path) for column in record))
        cells = ((where, {c: as_cell(record.get(c)) for c in columns}) for where, record in _json_lines(path))
        return Table(str(path), columns, cells)
    headers = {delimiter: Table(str(path), _header(path, delimiter), ()) for delimiter in DELIMITERS}
    wanted = PATH_COLUMNS if options.path_column is None else (options.path_column.casefold(),)
    fitting = [delimiter for delimiter, table in headers.items() if find_column(table, wanted)]
    if len(fitting) > 1 and any(len(headers[delimiter].columns) > 1 for delimiter in fitting):
        two = " and ".join(DELIMITERS[delimiter] for delimiter in fitting)
        raise UserError(f"{path}: the header names a column of paths with {two} between its cells; give --path-column")
    if not fitting:
        next(read_cells(path), None)  # raises UserError if its text cannot be read
    delimiter = fitting[0] if fitting else max(headers, key=lambda each: len(headers[each].columns))
    return Table(str(path), headers[delimiter].columns, records_of(path, delimiter))


def _header(path: Path, delimiter: str) -> list[str]:
    """Return the cells of the first line; [] if the file is empty or does not fit the delimiter."""
    try:
        return header_of(path, delimiter)
    except UserError:
        return []


def header_of(path: Path, delimiter: str = ",") -> list[str]:
    """Return the names of the columns; [] if the file is empty. Raises UserError."""
    return [name.strip() for name in next(read_cells(path, delimiter), (0, []))[1]]


def records_of(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Record]]:
    """Yield (place for messages, column -> stripped cell) of the rows below a header. Raises UserError."""
    lines = read_cells(path, delimiter)
    columns = [name.strip() for name in next(lines, (0, []))[1]]
    if len(set(columns)) != len(columns):
        raise UserError(f"{path} names a column twice in its header: {', '.join(columns)}")
    for line, cells in lines:
        where = f"{path} line {line}"
        check_cells(where, cells, len(columns))
        yield where, dict(zip(columns, map(str.strip, cells), strict=True))


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place for messages, object) of the lines that are not empty. Raises UserError."""
    number = 1
    with path.open(encoding=encoding_of(path)) as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("no object")
                yield f"{path} line {number}", record
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not UTF-8 with one JSON object a line, near line {number}: {error}") from None


def as_cell(value: object) -> Cell:
    """Return a value of JSON or of a parquet file as a cell: lists of names and numbers as tuples, null as ""."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return tuple(str(item).strip() for item in value)
    return str(value).strip() if isinstance(value, (str, int, float)) else json.dumps(value, default=str)


# Rows


def list_table(
    table: Table,
    options: SourceOptions,
    locate: Callable[[str, Record], tuple[str, Place]],
    used: set[str],
    *,
    segments: bool = False,
) -> Listing:
    """List the rows that --where selects; `locate` tells name and audio of a row, from the columns `used`."""
    left_out: dict[str, int] = {}
    columns = Columns.of(table, options, segments)
    labels = Labels(options.label_separator)
    rows: list[Row] = []
    for where, record in selected(table, options, left_out):
        relative, place = locate(where, record)
        if columns.segment:
            relative, place = cut_row(relative, place, times_of(where, record, columns.segment))
        names = labels.of(record[columns.label], where) if columns.label else ()
        rows.append(Row(place, relative, names, _group(record, columns.group, where), where))
    labels.refuse_other_separators(columns.label or "")
    return Listing(rows, left_out, notes=_notes(table, columns, used, options))


def selected(table: Table, options: SourceOptions, left_out: dict[str, int]) -> Iterator[tuple[str, Record]]:
    """Yield the rows with the values of --where; count the others. Raises UserError if no row is left."""
    num_rows = num_kept = 0
    for num_rows, (where, record) in enumerate(table.records, start=1):
        if num_rows == 1:
            require_columns(Path(table.name), table.columns, (column for column, _ in options.where))
        if all(record[column] == value or (value,) == record[column] for column, value in options.where):
            num_kept += 1
            yield where, record
    left_out["rows without the --where values"] = num_rows - num_kept
    if not num_rows:
        raise UserError(f"{table.name} has no rows below its header")
    if not num_kept:
        raise UserError(f"no row of {table.name} has {' and '.join('='.join(pair) for pair in options.where)}")


def _notes(table: Table, columns: Columns, used: set[str], options: SourceOptions) -> list[str]:
    """Name the columns that are not used, and say that no column is one of labels."""
    used = used | {columns.label or "", columns.group or "", *(columns.segment or ())}
    used |= {column for column, _ in options.where}
    others = [column for column in table.columns if column not in used]
    notes = [f"not used: the columns {', '.join(others)} of {table.name}"] if others else []
    if options.use_labels and not columns.label:
        notes.append(f"no labels: {table.name} has no column such as label, tags or category; see --label-column")
    return notes


def _group(record: Record, column: str | None, where: str) -> str:
    """Return the split of a row, or its fold as fold1."""
    if column is None:
        return ""
    group = str(record[column])
    if not group:
        raise UserError(f"{where}: the cell {column!r} is empty; every row needs one, or drop the column")
    return f"fold{group}" if column.casefold() == "fold" and not group.startswith("fold") else group


def _located(parent: Path, folder: str, column: str, where: str, record: Record) -> tuple[str, Place]:
    """Return the path of a row relative to the table's `folder`, if it lies there, and its audio."""
    cell = record[column]
    if not isinstance(cell, str) or not cell or "\0" in cell:
        raise UserError(f"{where}: the cell {column!r} is empty or holds a zero byte")
    if ADDRESS.match(cell):
        raise UserError(f"{where}: {cell} is an address, and addresses are not read; download the file, give its path")
    given = relative = os.path.normpath(cell)
    if os.path.isabs(relative) and Path(relative).is_relative_to(folder):
        relative = os.path.relpath(relative, folder)
    path = Path(parent, given)
    if not given.isascii() and (found := existing(path)) != path:
        return str(Path(*found.parts[-len(Path(relative).parts) :])), Place(str(found))
    return relative, Place(os.path.join(parent, given))


def _folder_of(table: Path) -> str:
    """Return the table's folder without "..", so that names do not depend on the spelling of --input."""
    plain = os.path.abspath(table.parent)  # wrong behind a link, where the folder is kept as it is
    same = os.path.exists(plain) and os.path.samefile(plain, table.parent)
    return plain if same else str(table.parent.absolute())


def _refuse_two_names(rows: list[Row]) -> None:
    """Refuse a file outside the table's folder that is listed twice: relative to the folder and from the root."""
    first_of: dict[tuple[str, float, float | None], Row] = {}
    for row in rows:
        if row.relative.startswith(("/", "..")):
            path = os.path.abspath(row.place.path)
            first = first_of.setdefault((path, row.place.start_s, row.place.stop_s), row)
            paths = first.place.path, row.place.path
            if first.relative != row.relative and all(map(os.path.exists, paths)) and os.path.samefile(*paths):
                raise UserError(f"{row.where} lists {path} again, after {first.where}; keep one of them")


def refuse_missing(rows: list[Row], table: str) -> None:
    """Refuse a table of which 90 % of the files or more do not exist: its paths are wrong, or it is elsewhere."""
    missing = [row.relative for row in rows if not os.path.lexists(row.place.path)]
    if missing and len(missing) >= MISSING_SHARE * len(rows):
        counts = f"{len(missing)} of {len(rows)} files do not exist, such as {examples(missing)}"
        raise UserError(f"{counts}, which are listed in {table}; correct the paths, or move the table to its files")


# Segments


def times_of(where: str, record: Record, columns: tuple[str, str]) -> tuple[float, float] | None:
    """Return start and end of a row in seconds; None for the whole file, if both cells are empty."""
    start, stop = (record[column] for column in columns)
    if not start and not stop:
        return None
    return segment_of(where, str(start), str(stop), duration=columns[1].casefold().startswith("duration"))


def cut_row(relative: str, place: Place, times: tuple[float, float] | None) -> tuple[str, Place]:
    """Return name and audio of a segment: a/b.wav from 1 to 2.5 s is a/b:1-2.5.wav, whose key is a_b_1-2_5."""
    if times is None:
        return relative, place
    stem, extension = os.path.splitext(relative)
    named = "-".join(f"{time_s:.6f}".rstrip("0").rstrip(".") for time_s in times)
    return f"{stem}:{named}{extension}", place.cut(*times)


# Labels


class Labels:
    """The names of classes in the cells of a column, and whether their separator is the right one."""

    def __init__(self, separator: str | None):
        """Take the user's separator; None takes ";", and refuses a column whose cells look like lists of another."""
        self._separator = separator or SEPARATOR
        self._first: dict[str, str] | None = {} if separator is None else None  # cell -> where it stands first

    def of(self, cell: Cell, where: str) -> tuple[str, ...]:
        """Return the names in a cell, each once. Raises UserError for a broken list."""
        if isinstance(cell, str) and LIKE_A_LIST.fullmatch(cell):
            try:
                cell = as_cell(ast.literal_eval(LIST.fullmatch(cell)[0]))  # pyright: ignore[reportOptionalSubscript]
            except (TypeError, ValueError, SyntaxError):
                raise UserError(f'{where}: {cell} is not a list of labels; write ["a", "b"] or a;b') from None
        if isinstance(cell, str):
            if self._first is not None:
                self._first.setdefault(cell, where)
            cell = tuple(name.strip() for name in cell.split(self._separator))
        return tuple(dict.fromkeys(name for name in cell if name))

    def refuse_other_separators(self, column: str) -> None:
        """Refuse cells such as "Guitar,Music" if no cell has a ";", and "Guitar" and "Music" occur in other cells."""
        if not self._first or any(SEPARATOR in cell for cell in self._first):
            return
        for separator in OTHER_SEPARATORS:
            parts_of = {cell: {part.strip() for part in cell.split(separator)} - {""} for cell in self._first}
            num_cells = Counter(part for parts in parts_of.values() for part in parts)
            for cell, parts in parts_of.items():
                if len(parts) > 1 and all(num_cells[part] > 1 for part in parts):
                    what = f"the cell {column!r} is {cell!r}, and {examples(sorted(parts))} are labels of other rows"
                    fix = f"give --label-separator '{separator}' if it holds several labels, '{SEPARATOR}' if it is one"
                    raise UserError(f"{self._first[cell]}: {what}; {fix}")
