"""Sources of files that lie in one place: a folder, and the archives of ESC-50, FSD50K and Speech Commands.

Piczak, "ESC: Dataset for environmental sound classification", ACM Multimedia 2015.
Warden, "Speech Commands: a dataset for limited-vocabulary speech recognition", 2018. The recordings in
_background_noise_ are left out: they belong to no split, last minutes where words last a second, and the 35 classes
(30 in v0.01) on which results are published have none for silence.
"""

import os
from pathlib import Path

from asda.data.audio.find import is_audio, walk
from asda.data.audio.waves import AUDIO_EXTENSIONS
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Listing, Row, SourceOptions, examples, require_columns
from asda.sharding.sources.tables import Table, header_of, only_input, records_of, selected

ESC50_COLUMNS = ("filename", "fold", "target", "category")
NOISE = "_background_noise_"
WORD_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


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
