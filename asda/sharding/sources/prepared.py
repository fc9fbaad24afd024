"""Datasets that were prepared for other code: HDF5 packs, and manifests, which may name clips in packs.

PANNs' pack: audio_name [N], waveform [N, S], target [N, classes]. Kong et al., "PANNs: large-scale pretrained audio
neural networks for audio pattern recognition", 2020.

The manifests of EAT, ASDA and other fairseq code. Chen et al., "EAT: Self-supervised pre-training with efficient audio
transformer", IJCAI 2024.

    train.tsv              a root folder, then file<TAB>number of samples; a file may be pack.h5/key
    train.lbl              id<TAB>MIDs separated by commas, in any order; a file's id is its name without extension
    label_descriptors.csv  index,mid,name
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asda.data.audio.find import is_hidden, walk
from asda.errors import UserError
from asda.sharding.audio_ref import Place, open_pack
from asda.sharding.sources.listing import Classes, Listing, Row, SourceOptions, examples, files_in

if TYPE_CHECKING:
    import h5py

PACK_EXTENSIONS = (".h5", ".hdf5")
DEFAULT_RATE_HZ = 32_000  # PANNs and EAT pack at this rate
NAMES, WAVEFORM, TARGET, RATE = "audio_name", "waveform", "target", "sample_rate"
PART = re.compile(r"(_segments)?(_part\d+)?$", re.ASCII)  # unbalanced_train_part07 is a part of unbalanced_train
KnownLabels = dict[tuple[int, ...], tuple[str, ...]]  # every list of labels once, for two million rows to share


def rows_from_hdf5(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of packs, or of all packs in a folder and below; a pack's stem without its part is their split."""
    names = Classes(options.class_labels).names if options.use_labels else None
    known: KnownLabels = {}
    rows: list[Row] = []
    for path in [pack for given in inputs for pack in _packs(given)]:
        whole, group = str(path), PART.sub("", path.stem)
        with open_pack(whole) as pack:
            clips = _clip_names(pack)
            labels = _labels(pack, len(clips), names, known) if names else [()] * len(clips)
            rate_hz = _rate_hz(pack, options.sample_rate_hz)
        places = (Place(whole, entry=WAVEFORM, row=row, sample_rate_hz=rate_hz) for row in range(len(clips)))
        rows += [Row(*row, group, whole) for row in zip(places, clips, labels, strict=True)]
    return Listing(rows, vocabulary=names)


def _packs(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in sorted(walk(path)) if name.endswith(PACK_EXTENSIONS) and not is_hidden(name)]
    if not found:
        raise UserError(f"--input {path} holds no pack; they are named {' or '.join('*' + e for e in PACK_EXTENSIONS)}")
    return found


def _clip_names(pack: "h5py.File") -> list[str]:
    names_N, waveform_NS = _data_set(pack, NAMES), _data_set(pack, WAVEFORM)
    clips = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names_N[:]]
    if waveform_NS.ndim != 2 or len(waveform_NS) != len(clips):
        shape = f"{len(clips)} names and a {WAVEFORM} of the shape {waveform_NS.shape}"
        raise UserError(f"{pack.filename} has {shape}; each clip has its name and its row of samples")
    if not clips:
        raise UserError(f"{pack.filename} holds no clip")
    return clips


def _labels(pack: "h5py.File", num_clips: int, names: tuple[str, ...], known: KnownLabels) -> list[tuple[str, ...]]:
    target_NK = _data_set(pack, TARGET)[:]
    if target_NK.shape != (num_clips, len(names)):
        shape = f"the shape {target_NK.shape}, not ({num_clips}, {len(names)}) for its clips and the classes"
        repair = "give the table of its classes as --class-labels, or --no-labels"
        raise UserError(f"{pack.filename}: {TARGET} has {shape}; {repair}")
    clip_numbers, class_numbers = np.nonzero(target_NK)
    pieces = np.split(class_numbers, np.searchsorted(clip_numbers, np.arange(1, num_clips)))
    ids = (tuple(piece.tolist()) for piece in pieces)
    return [known.get(some) or known.setdefault(some, tuple(names[n] for n in some)) for some in ids]


def _data_set(pack: "h5py.File", name: str) -> "h5py.Dataset":
    import h5py

    data = pack.get(name)
    if not isinstance(data, h5py.Dataset):
        known = ", ".join(pack)
        raise UserError(f"{pack.filename} has no data set {name!r}, as PANNs' packs of waveforms do; it has {known}")
    return data


def _rate_hz(pack: "h5py.File", given: int | None) -> int:
    """Return the sample rate that a pack names, else the given one, else 32 kHz. Raises UserError if they differ."""
    named = pack.attrs.get(RATE)
    if named is None:
        return given or DEFAULT_RATE_HZ
    if given not in (None, int(named)):
        says = f"{pack.filename} says that it has {int(named)} Hz"
        raise UserError(f"--sample-rate {given}: {says}; leave --sample-rate out")
    return int(named)


def _keys(pack: "h5py.File") -> dict[str, tuple[str, int | None]]:
    """Return key -> (data set, row) for the clips in a pack: PANNs' rows by name, else one data set each."""
    if NAMES in pack:
        return {name: (WAVEFORM, row) for row, name in enumerate(_clip_names(pack))}
    return {str(name): (str(name), None) for name in pack}


def rows_from_eat(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of one or more tsv files, or of all in a folder; the stem of a tsv is their split."""
    rows: list[Row] = []
    missing: list[tuple[str, str]] = []
    unused = 0
    vocabulary = None
    for table in [table for path in inputs for table in files_in(path, ".tsv", "train.tsv")]:
        labels: dict[str, tuple[str, ...]] = {}
        if options.use_labels:
            beside = table.with_name("label_descriptors.csv")
            if options.class_labels is None and not beside.is_file():
                repair = "give the table index,mid,name as --class-labels, or --no-labels"
                raise UserError(f"{beside}: no such file; {repair}")
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
                self._packs[pack] = _rate_hz(opened, self.sample_rate_hz), _keys(opened)
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
