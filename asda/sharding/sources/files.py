"""Sources of files that lie in one place: a folder, and the archives of ESC-50, FSD50K and Speech Commands.

Piczak, "ESC: Dataset for environmental sound classification", ACM Multimedia 2015.
Fonseca et al., "FSD50K: an open dataset of human-labeled sound events", IEEE/ACM TASLP 2022.
Warden, "Speech Commands: a dataset for limited-vocabulary speech recognition", 2018. The recordings in
_background_noise_ are left out: they belong to no split, last minutes where words last a second, and the 35 classes
(30 in v0.01) on which results are published have none for silence.
"""

import os
from collections import Counter
from pathlib import Path

from asda.data.audio.find import is_audio, unreadable, walk
from asda.data.audio.waves import AUDIO_EXTENSIONS
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import (
    SPLIT_FOLDERS,
    Listing,
    Row,
    SourceOptions,
    examples,
    read_cells,
    require_columns,
)
from asda.sharding.sources.tables import Table, header_of, only_input, records_of, selected

ESC50_COLUMNS = ("filename", "fold", "target", "category")
FSD50K_TABLES = {"dev": ("fname", "labels", "split"), "eval": ("fname", "labels")}
NOISE = "_background_noise_"
WORD_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


def rows_from_folder(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a folder's audio: a class per subfolder, or no labels if it has none; train/ and test/ on top are splits."""
    folder = only_input(inputs, "folder")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source folder wants a folder of audio files")
    files = sorted(walk(folder))
    audio = [name for name in files if is_audio(name)]
    if not audio:
        known = " ".join(AUDIO_EXTENSIONS)
        raise UserError(f"{folder} holds no audio file among {len(files)} files; known extensions are {known}")
    split_of = _top_splits(folder, audio, options.top_folders)
    depth = 1 if split_of else 0  # of the classes
    direct = [name for name in audio if name.count("/") == depth]
    if options.use_labels and 0 < len(direct) < len(audio):
        mixed = f"audio both directly ({direct[0]}) and in subfolders, which would be classes"
        raise UserError(f"{folder} holds {mixed}; move one kind away, or give --no-labels")
    labelled = options.use_labels and not direct
    rows = [_row_in_folder(folder, n, split_of.get(n.split("/")[0], ""), labelled, depth) for n in audio]
    notes = [f"splits: {', '.join(f'{top}/ is {split}' for top, split in split_of.items())}"] if split_of else []
    unread = ", ".join(f"{count} {extension}" for extension, count in unreadable(files).items())
    notes += [f"not read: sounds in formats without a decoder here: {unread}"] if unread else []
    return Listing(rows, {"files that are hidden or not audio": len(files) - len(audio)}, notes=notes)


def _top_splits(folder: Path, audio: list[str], given: str | None) -> dict[str, str]:
    """Return folder on top -> split, or {} if those folders are classes. Raises UserError if they may be either."""
    tops = sorted({name.split("/")[0] for name in audio if "/" in name})
    direct = any("/" not in name for name in audio)
    splits = {top: SPLIT_FOLDERS[top.casefold()] for top in tops if top.casefold() in SPLIT_FOLDERS}
    if given == "classes" or (given is None and not splits):
        return {}
    others = [top for top in tops if top not in splits]
    if given is None and (others or direct):
        beside = f"{examples(others)}, which would be classes" if others else "audio without a folder"
        what = f"{examples(list(splits))}, which would be splits, beside {beside}"
        raise UserError(f"{folder} holds {what}; give --top-folders classes or --top-folders splits")
    if direct or not tops:
        raise UserError(f"--top-folders splits: {folder} holds audio without a folder, and so without a split")
    split_of = {top: splits.get(top, top) for top in tops}
    for split, count in Counter(split_of.values()).items():
        if count > 1:
            same = " and ".join(top for top in tops if split_of[top] == split)
            raise UserError(f"{folder} holds {same}, which both mean the split {split}; join or rename them")
    return split_of


def rows_from_fsd50k(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of an FSD50K folder, unpacked as it is published: train, val, and test, which is its eval."""
    folder = only_input(inputs, "fsd50k")
    tables = {name: folder / "FSD50K.ground_truth" / f"{name}.csv" for name in (*FSD50K_TABLES, "vocabulary")}
    if lost := [str(table) for table in tables.values() if not table.is_file()]:
        raise UserError(f"--input {folder} has no {lost[0]}, as the folder of FSD50K has; unpack FSD50K.ground_truth")
    vocabulary = tuple(cells[1] for _, cells in read_cells(tables["vocabulary"]) if len(cells) > 1)
    rows: list[Row] = []
    for name, wanted in FSD50K_TABLES.items():
        require_columns(tables[name], header_of(tables[name]), wanted)
        for where, record in records_of(tables[name]):
            clip, labels, split = (str(record.get(column, "test")) for column in ("fname", "labels", "split"))
            relative = f"FSD50K.{name}_audio/{clip}.wav"
            names = tuple(label for label in labels.split(",") if label) if options.use_labels else ()
            if unknown := set(names) - set(vocabulary):
                raise UserError(f"{where}: {min(unknown)!r} is not in {tables['vocabulary']}; unpack the archive again")
            rows.append(Row(Place(f"{folder}/{relative}"), relative, names, split, where))
    return Listing(rows, vocabulary=vocabulary if options.use_labels else None, table=str(tables["dev"].parent))


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


def _row_in_folder(folder: Path, name: str, group: str, labelled: bool, depth: int = 0) -> Row:
    path = f"{folder}/{name}"
    return Row(Place(path), name, (name.split("/")[depth],) if labelled else (), group, path)


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


def rows_from_esc50(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of an ESC-50 folder, their folds as fold1 to fold5, their classes in the order of `target`."""
    folder = only_input(inputs, "esc50")
    table = folder / "meta" / "esc50.csv"
    if not table.is_file() or not (folder / "audio").is_dir():
        raise UserError(f"--input {folder} has no meta/esc50.csv or no audio/, as the folder of ESC-50 has")
    rows: list[Row] = []
    category_of: dict[int, str] = {}
    left_out: dict[str, int] = {}
    columns = header_of(table)
    require_columns(table, columns, ESC50_COLUMNS)
    for where, record in selected(Table(str(table), columns, records_of(table)), options, left_out):
        name, fold, target, category = (str(record[column]) for column in ESC50_COLUMNS)
        if not (name and fold and target and category) or not (fold + target).isdigit():
            raise UserError(f"{where}: {', '.join(ESC50_COLUMNS)} must not be empty, and fold and target are numbers")
        if (before := category_of.setdefault(int(target), category)) != category:
            raise UserError(f"{where}: the target {target} was {before!r} before")
        labels = (category,) if options.use_labels else ()
        rows.append(Row(Place(f"{folder}/audio/{name}"), name, labels, f"fold{fold}", where))
    vocabulary = tuple(category for _, category in sorted(category_of.items()))
    if len(set(vocabulary)) < len(vocabulary):
        raise UserError(f"{table} gives one category two targets; each class has one")
    where = f"{table}; they belong into {folder}/audio"
    return Listing(rows, left_out, vocabulary if options.use_labels else None, table=where)
