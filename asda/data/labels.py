"""Names of classes: a user's, from a file, and AudioSet's, in the order of the logits of models trained on it.

audioset_labels.csv is AudioSet's own class_labels_indices.csv, unchanged: by Google, under CC BY 4.0. Gemmeke et al.,
"Audio Set: an ontology and human-labeled dataset for audio events", ICASSP 2017.
"""

import csv
from functools import cache
from importlib.resources import files
from pathlib import Path

from asda.errors import UserError

NUM_AUDIOSET_CLASSES = 527


@cache
def audioset_labels() -> tuple[str, ...]:
    """Return the 527 names, "Speech" first; AudioSet's evaluation, EAT and ASDA number their classes like this."""
    table = (files("asda.data") / "audioset_labels.csv").read_text(encoding="utf-8")
    names = tuple(row["display_name"] for row in csv.DictReader(table.splitlines()))
    assert len(names) == NUM_AUDIOSET_CLASSES
    return names


def read_labels(path: Path) -> tuple[str, ...]:
    """Read what --labels names: class names, one per line, in the order of their ids. Raises UserError."""
    if not path.is_file():
        raise UserError(f"--labels {path}: no such file")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {path} is no UTF-8 text: {error}") from None
    if not names:
        raise UserError(f"--labels {path} is empty; write one class name per line")
    for line, name in enumerate(names, start=1):
        if not name or name in names[: line - 1]:
            raise UserError(
                f"--labels {path} line {line} is empty or repeats a name ({name!r}); each line is one class"
            )
    return names
