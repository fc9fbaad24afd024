"""Sources of files that lie in one place: a folder, a CSV of paths, and the archives of ESC-50 and Speech Commands.

Piczak, "ESC: Dataset for environmental sound classification", ACM Multimedia 2015.
Warden, "Speech Commands: a dataset for limited-vocabulary speech recognition", 2018. The recordings in
_background_noise_ are left out: they belong to no split, last minutes where words last a second, and the 35 classes
(30 in v0.01) on which results are published have none for silence.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from asda.data.audio.find import is_audio, walk
from asda.data.audio.waves import AUDIO_EXTENSIONS
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import (
    Listing,
    Row,
    SourceOptions,
    check_cells,
    examples,
    read_cells,
    require_columns,
)

ESC50_COLUMNS = ("filename", "fold", "target", "category")
NOISE = "_background_noise_"
WORD_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


def only_input(inputs: list[Path], source: str) -> Path:
    """Return the one input of a source that takes one."""
    if len(inputs) != 1:
        raise UserError(f"--source {source} takes one --input and got {len(inputs)}; run once for each")
    return inputs[0]


def rows_from_folder(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a folder's audio: one class per first-level subfolder, or no labels if all files lie directly in it."""
    folder = only_input(inputs, "folder")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source folder wants a folder of audio files")
    files = sorted(walk(folder))
    audio = [name for name in files if is_audio(name)]
    if not audio:
        known = " ".join(AUDIO_EXTENSIONS)
        raise UserError(f"{folder} holds no audio file among {len(files)} files; known extensions are {known}")
    direct = [name for name in audio if "/" not in name]
    if options.use_labels and 0 < len(direct) < len(audio):
        mixed = f"audio both directly ({direct[0]}) and in subfolders, which would be classes"
        raise UserError(f"{folder} holds {mixed}; move one kind away, or give --no-labels")
    labelled = options.use_labels and not direct
    rows = [_row_in_folder(folder, name, "", labelled) for name in audio]
    return Listing(rows, {"files that are hidden or not audio": len(files) - len(audio)})


def rows_from_speechcommands(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the words of a Speech Commands folder: `valid` and `test` as its lists say, `train` all others."""
    folder = only_input(inputs, "speechcommands")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source speechcommands wants that of the unpacked archive")
    split_of = _word_splits(folder)
    files = sorted(walk(folder))
    clips = [name for name in files if is_audio(name) and name.count("/") == 1]
    words = [name for name in clips if not name.startswith(f"{NOISE}/")]
    if not words:
        raise UserError(f"{folder} holds no audio in subfolders, which would be the words")
    rows = [
        _row_in_folder(folder, name, split_of.pop(os.path.splitext(name)[0], "train"), options.use_labels)
        for name in words
    ]
    if split_of:
        lost = examples(split_of)
        raise UserError(f"{folder} has no file for {lost}, which its lists name; unpack the whole archive")
    others = len(files) - len(clips) - len(WORD_LISTS)
    left_out = {f"recordings in {NOISE}": len(clips) - len(words), "files that are not recordings of words": others}
    return Listing(rows, left_out, tuple(sorted({n.split("/")[0] for n in words})) if options.use_labels else None)


def _row_in_folder(folder: Path, name: str, group: str, labelled: bool) -> Row:
    path = f"{folder}/{name}"
    return Row(Place(path), name, (name.split("/")[0],) if labelled else (), group, path)


def _word_splits(folder: Path) -> dict[str, str]:
    """Return clip, without its extension, -> the split whose list names it."""
    split_of: dict[str, str] = {}
    for split, name in WORD_LISTS.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; the archive of Speech Commands has it, and it says what is {split}")
        for line, text in enumerate(path.read_text(encoding="utf-8").split(), start=1):
            if split_of.setdefault(os.path.splitext(text)[0], split) != split:
                raise UserError(f"{path} line {line}: {text} is in both lists; it belongs to one")
    return split_of


def rows_from_csv(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a CSV with a column `path`; optional are `label`, `labels` or `tags`, and `split` or `fold`."""
    table = only_input(inputs, "csv")
    if not table.is_file():
        raise UserError(f"--input {table} is not a CSV file; --source csv wants a table with a column 'path'")
    folder = _folder_of(table)
    left_out: dict[str, int] = {}
    selected = _select(table, options, ("path",), left_out)
    rows = [_row_of_csv(table, folder, where, record, options) for where, record in selected]
    _refuse_two_names(rows)
    return Listing(rows, left_out)


def rows_from_esc50(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of an ESC-50 folder, their folds as fold1 to fold5, their classes in the order of `target`."""
    folder = only_input(inputs, "esc50")
    table = folder / "meta" / "esc50.csv"
    if not table.is_file() or not (folder / "audio").is_dir():
        raise UserError(f"--input {folder} has no meta/esc50.csv or no audio/, as the folder of ESC-50 has")
    rows: list[Row] = []
    category_of: dict[int, str] = {}
    left_out: dict[str, int] = {}
    for where, record in _select(table, options, ESC50_COLUMNS, left_out):
        name, fold, target, category = (record[column] for column in ESC50_COLUMNS)
        if not (name and fold and target and category) or not (fold + target).isdigit():
            raise UserError(f"{where}: {', '.join(ESC50_COLUMNS)} must not be empty, and fold and target are numbers")
        if (before := category_of.setdefault(int(target), category)) != category:
            raise UserError(f"{where}: the target {target} was {before!r} before")
        labels = (category,) if options.use_labels else ()
        rows.append(Row(Place(f"{folder}/audio/{name}"), name, labels, f"fold{fold}", where))
    vocabulary = tuple(category for _, category in sorted(category_of.items()))
    if len(set(vocabulary)) < len(vocabulary):
        raise UserError(f"{table} gives one category two targets; each class has one")
    return Listing(rows, left_out, vocabulary if options.use_labels else None)


def _select(
    table: Path, options: SourceOptions, wanted: tuple[str, ...], left_out: dict[str, int]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place for messages, column -> stripped cell) of the rows with the values of --where; count the others.

    Raises UserError if the table lacks a column of `wanted` or of --where, or no row is left.
    """
    lines = read_cells(table)
    columns = [name.strip() for name in next(lines, (0, []))[1]]
    if len(set(columns)) != len(columns):
        raise UserError(f"{table} names a column twice in its header: {', '.join(columns)}")
    num_rows = num_kept = 0
    for num_rows, (line, cells) in enumerate(lines, start=1):
        where = f"{table} line {line}"
        check_cells(where, cells, len(columns))
        if num_rows == 1:
            require_columns(table, columns, (*wanted, *(column for column, _ in options.where)))
        record = dict(zip(columns, map(str.strip, cells), strict=True))
        if all(record[column] == value for column, value in options.where):
            num_kept += 1
            yield where, record
    left_out["rows without the --where values"] = num_rows - num_kept
    if not num_rows:
        raise UserError(f"{table} has no rows below its header")
    if not num_kept:
        raise UserError(f"no row of {table} has {' and '.join('='.join(pair) for pair in options.where)}")


def _folder_of(table: Path) -> str:
    """Return the table's folder without "..", so that names do not depend on the spelling of --input."""
    plain = os.path.abspath(table.parent)  # wrong behind a link, where the folder is kept as it is
    same = os.path.exists(plain) and os.path.samefile(plain, table.parent)
    return plain if same else str(table.parent.absolute())


def _row_of_csv(table: Path, folder: str, where: str, record: dict[str, str], options: SourceOptions) -> Row:
    if not record["path"] or "\0" in record["path"]:
        raise UserError(f"{where}: the cell 'path' is empty or holds a zero byte")
    given = relative = os.path.normpath(record["path"])
    if os.path.isabs(relative) and Path(relative).is_relative_to(folder):
        relative = os.path.relpath(relative, folder)
    column = next((name for name in ("label", "labels", "tags") if name in record), None)
    names = record[column].split(";") if column and options.use_labels else ()
    labels = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    column = next((name for name in ("split", "fold") if name in record), None)
    group = record[column] if column else ""
    if column and not group:
        raise UserError(f"{where}: the cell {column!r} is empty; every row needs one, or drop the column")
    if column == "fold" and not group.startswith("fold"):
        group = f"fold{group}"
    return Row(Place(os.path.join(table.parent, given)), relative, labels, group, where)


def _refuse_two_names(rows: list[Row]) -> None:
    """Refuse a file outside the table's folder that is listed twice: relative to the folder and from the root."""
    first_of: dict[str, Row] = {}
    for row in rows:
        if row.relative.startswith(("/", "..")):
            path = os.path.abspath(row.place.path)
            first = first_of.setdefault(path, row)
            paths = first.place.path, row.place.path
            if first.relative != row.relative and all(map(os.path.exists, paths)) and os.path.samefile(*paths):
                raise UserError(f"{row.where} lists {path} again, after {first.where}; keep one of them")
