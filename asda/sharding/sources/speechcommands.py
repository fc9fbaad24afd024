"""The folder of Speech Commands, v0.01 or v0.02: a subfolder per word, validation_list.txt, testing_list.txt.

Warden, "Speech Commands: a dataset for limited-vocabulary speech recognition", 2018. The recordings in
_background_noise_ are left out: they belong to no split, last minutes where words last a second, and the 35 classes
(30 in v0.01) on which results are published have none for silence.
"""

import os
from pathlib import Path

from asda.data.audio.find import is_audio, walk
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Listing, Row, SourceOptions, examples, only_input

NOISE = "_background_noise_"
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}


def rows_from_speechcommands(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the words of a Speech Commands folder: `valid` and `test` as its lists say, `train` all others."""
    folder = only_input(inputs, "speechcommands")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source speechcommands wants that of the unpacked archive")
    split_of = _splits(folder)
    files = sorted(walk(folder))
    clips = [name for name in files if is_audio(name) and name.count("/") == 1]
    words = [name for name in clips if not name.startswith(f"{NOISE}/")]
    if not words:
        raise UserError(f"{folder} holds no audio in subfolders, which would be the words")
    rows = [_row(folder, name, split_of.pop(_stem(name), "train"), options.use_labels) for name in words]
    if split_of:
        shown = examples(split_of, len(split_of))
        raise UserError(f"{folder} has no file for {shown}, which its lists name; unpack the whole archive")
    others = len(files) - len(clips) - len(LISTS)
    left_out = {f"recordings in {NOISE}": len(clips) - len(words), "files that are not recordings of words": others}
    return Listing(rows, left_out, tuple(sorted({n.split("/")[0] for n in words})) if options.use_labels else None)


def _row(folder: Path, name: str, split: str, use_labels: bool) -> Row:
    path = f"{folder}/{name}"
    return Row(Place(path), name, (name.split("/")[0],) if use_labels else (), split, path)


def _splits(folder: Path) -> dict[str, str]:
    """Return clip, without its extension, -> the split whose list names it."""
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; the archive of Speech Commands has it, and it says what is {split}")
        for line, text in enumerate(path.read_text(encoding="utf-8").split(), start=1):
            if split_of.setdefault(_stem(text), split) != split:
                raise UserError(f"{path} line {line}: {text} is in both lists; it belongs to one")
    return split_of


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
