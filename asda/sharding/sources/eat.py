"""The manifests of EAT, ASDA and other fairseq code: train.tsv, train.lbl, label_descriptors.csv.

    train.tsv              a root folder, then file<TAB>number of samples; a file may be pack.h5/key
    train.lbl              id<TAB>MIDs separated by commas, in any order; a file's id is its name without extension
    label_descriptors.csv  index,mid,name

Chen et al., "EAT: Self-supervised pre-training with efficient audio transformer", IJCAI 2024.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from asda.data.audio.find import walk
from asda.errors import UserError
from asda.sharding.audio_ref import Place, open_pack
from asda.sharding.sources.hdf5 import PACK_EXTENSIONS, pack_keys, pack_rate_hz
from asda.sharding.sources.listing import Classes, Listing, Row, SourceOptions, examples, files_in

DESCRIPTORS = "label_descriptors.csv"


def rows_from_eat(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of one or more tsv files, or of all in a folder; the stem of a tsv is their split."""
    rows: list[Row] = []
    missing: list[tuple[str, str]] = []
    unused = 0
    vocabulary = None
    for table in [table for path in inputs for table in files_in(path, ".tsv", "train.tsv")]:
        labels: dict[str, tuple[str, ...]] = {}
        if options.use_labels:
            beside = table.with_name(DESCRIPTORS)
            if options.class_labels is None and not beside.is_file():
                lost = f"{beside}: no such file"
                raise UserError(f"{lost}; give the table index,mid,name as --class-labels, or --no-labels")
            classes = Classes(options.class_labels or beside)
            if vocabulary not in (None, classes.names):
                other = f"{classes.table} names other classes than the table of the manifest before"
                raise UserError(f"{other}; run once for each")
            vocabulary = classes.names
            labels = _read_labels(table.with_suffix(".lbl"), classes)
        found, lost = _read_manifest(table, labels, options)
        rows += found
        missing += lost
        unused += max(0, len(labels) - len(found) - len(lost))
    if not rows:
        raise UserError(f"none of the {len(missing)} files in the manifests exists; give their folder as --audio")
    return Listing(rows, {"labels of clips that no manifest lists": unused}, vocabulary, missing)


def _read_labels(path: Path, classes: Classes) -> dict[str, tuple[str, ...]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; --no-labels lists the clips without")
    labels: dict[str, tuple[str, ...]] = {}
    for line, text in _lines(path):
        clip, tab, mids = text.partition("\t")
        if not tab or clip in labels:
            raise UserError(f"{path} line {line} repeats {clip!r} or is not id<TAB>labels; each clip has one line")
        labels[clip] = classes.labels(mids, f"{path} line {line}")
    return labels


def _read_manifest(
    table: Path, labels: dict[str, tuple[str, ...]], options: SourceOptions
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return the clips of one manifest, and those whose audio is missing, with the reason."""
    lines = _lines(table)
    files = _Files(_root(table, next(lines, (1, ""))[1], options.audio), options.sample_rate_hz)
    rows: list[Row] = []
    missing: list[tuple[str, str]] = []
    unlabelled: list[str] = []
    for line, text in lines:
        name, tab, num_samples = text.partition("\t")
        if not tab or not num_samples.strip().isdigit():
            raise UserError(f"{table} line {line} is not file<TAB>number of samples")
        clip = os.path.splitext(os.path.basename(name))[0]
        if options.use_labels and clip not in labels:
            unlabelled.append(clip)
        elif isinstance(place := files.find(name), str):
            missing.append((name, place))
        else:
            rows.append(Row(place, os.path.normpath(name), labels.get(clip, ()), table.stem, place.path))
    if unlabelled:
        lost = examples(unlabelled)
        raise UserError(f"{table.with_suffix('.lbl')} has no line for {lost}; add them, or give --no-labels")
    return rows, missing


def _root(table: Path, line: str, audio: Path | None) -> Path:
    """Return the folder of a manifest: as its first line says, or in --audio, where it may have its own subfolder."""
    named = Path(line)
    root = named if audio is None else audio / named.name if (audio / named.name).is_dir() else audio
    if not line or not root.is_dir():
        given = f"--audio {audio}" if audio else f"{table} line 1: the root {line!r}"
        raise UserError(f"{given} is not a folder here; give the folder with the files as --audio")
    return root


class _Files:
    """The files below a root, and the clips in its HDF5 packs. The folder is listed once, not for every row."""

    def __init__(self, root: Path, sample_rate_hz: int | None):
        self.root = root
        self.sample_rate_hz = sample_rate_hz
        self._names = set(walk(root))
        self._packs: dict[str, tuple[int, dict[str, tuple[str, int | None]]]] = {}  # rate in Hz, key -> entry, row

    def find(self, name: str) -> Place | str:
        """Return the place of a clip, or the reason why it has none."""
        if os.path.normpath(name) in self._names:
            return Place(os.path.join(self.root, name))
        pack, _, key = name.rpartition("/")
        if not pack.endswith(PACK_EXTENSIONS):
            return "no such file"
        pack = os.path.normpath(pack)
        if pack not in self._names:
            return f"no pack {pack}"
        whole = str(self.root / pack)
        if pack not in self._packs:
            with open_pack(whole) as opened:
                self._packs[pack] = pack_rate_hz(opened, self.sample_rate_hz), pack_keys(opened)
        sample_rate_hz, keys = self._packs[pack]
        if key not in keys:
            return f"no {key} in the pack"
        entry, row = keys[key]
        return Place(whole, entry=entry, row=row, sample_rate_hz=sample_rate_hz)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the lines that are not empty. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield number, text
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from None
