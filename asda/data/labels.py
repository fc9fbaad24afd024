"""The class names of AudioSet, in the order of the logits of every model that was trained on it.

audioset_labels.csv is AudioSet's own class_labels_indices.csv, unchanged: by Google, under CC BY 4.0. Gemmeke et al.,
"Audio Set: an ontology and human-labeled dataset for audio events", ICASSP 2017.
"""

import csv
from functools import cache
from importlib.resources import files

NUM_AUDIOSET_CLASSES = 527


@cache
def audioset_labels() -> tuple[str, ...]:
    """The 527 names, "Speech" first; AudioSet's evaluation, EAT and ASDA number their classes like this."""
    table = (files("asda.data") / "audioset_labels.csv").read_text(encoding="utf-8")
    names = tuple(row["display_name"] for row in csv.DictReader(table.splitlines()))
    assert len(names) == NUM_AUDIOSET_CLASSES
    return names
