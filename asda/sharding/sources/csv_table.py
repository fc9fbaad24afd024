"""A CSV with a column `path`, and optional columns for labels and splits or folds."""

import os
from pathlib import Path

from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Listing, Row, SourceOptions, only_input, refuse_duplicates, select

LABEL_COLUMNS = ("label", "labels", "tags")  # the first that is present
LABEL_SEPARATOR = ";"


def rows_from_csv(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a CSV with a column `path`; optional are `label`, `labels` or `tags`, and `split` or `fold`."""
    table = only_input(inputs, "csv")
    if not table.is_file():
        raise UserError(f"--input {table} is not a CSV file; --source csv wants a table with a column 'path'")
    folder = _folder_of(table)
    rows: list[Row] = []
    num_others = 0
    for kept in select(table, options, ("path",)):
        if kept:
            rows.append(_row(table, folder, *kept, options))
        else:
            num_others += 1
    refuse_duplicates(rows)
    _refuse_two_names(rows)
    return Listing(rows, {"rows without the --where values": num_others})


def _folder_of(table: Path) -> str:
    """Return the table's folder without "..", so that names do not depend on the spelling of --input."""
    plain = os.path.abspath(table.parent)  # wrong behind a link, where the folder is kept as it is
    same = os.path.exists(plain) and os.path.samefile(plain, table.parent)
    return plain if same else str(table.parent.absolute())


def _refuse_two_names(rows: list[Row]) -> None:
    """Refuse a file outside the table's folder that is listed twice: relative to the folder and from the root."""
    first_of: dict[str, Row] = {}
    for row in rows:
        if row.relative.startswith(("/", "..")):
            path = os.path.abspath(row.place.path)
            first = first_of.setdefault(path, row)
            paths = first.place.path, row.place.path
            if first is not row and all(map(os.path.exists, paths)) and os.path.samefile(*paths):
                raise UserError(f"{row.where} lists {path} again, after {first.where}; keep one of them")


def _row(table: Path, folder: str, line: int, record: dict[str, str], options: SourceOptions) -> Row:
    where = f"{table} line {line}"
    if not record["path"] or "\0" in record["path"]:
        raise UserError(f"{where}: the cell 'path' is empty or holds a zero byte")
    given = relative = os.path.normpath(record["path"])
    if os.path.isabs(relative) and Path(relative).is_relative_to(folder):
        relative = os.path.relpath(relative, folder)
    column = next((name for name in LABEL_COLUMNS if name in record), None)
    labels = _split_labels(record[column]) if column and options.use_labels else ()
    return Row(Place(os.path.join(table.parent, given)), relative, labels, _group(where, record), where)


def _split_labels(cell: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in cell.split(LABEL_SEPARATOR) if name.strip()))


def _group(where: str, record: dict[str, str]) -> str:
    column = next((name for name in ("split", "fold") if name in record), None)
    if column is None:
        return ""
    value = record[column]
    if not value:
        raise UserError(f"{where}: the cell {column!r} is empty; every row needs one, or drop the column")
    return value if column == "split" or value.startswith("fold") else f"fold{value}"
