"""HDF5 packs as PANNs writes them: audio_name [N], waveform [N, S], target [N, classes].

Kong et al., "PANNs: large-scale pretrained audio neural networks for audio pattern recognition", 2020.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asda.data.audio.find import walk
from asda.errors import UserError
from asda.sharding.audio_ref import Place, open_pack
from asda.sharding.sources.listing import Classes, Listing, Row, SourceOptions

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
            rate_hz = pack_rate_hz(pack, options.sample_rate_hz)
        places = (Place(whole, entry=WAVEFORM, row=row, sample_rate_hz=rate_hz) for row in range(len(clips)))
        rows += [Row(*row, group, whole) for row in zip(places, clips, labels, strict=True)]
    return Listing(rows, vocabulary=names)


def _packs(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [path / name for name in sorted(walk(path)) if name.endswith(PACK_EXTENSIONS)]
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
        raise UserError(
            f"{pack.filename}: {TARGET} has the shape {target_NK.shape}, not ({num_clips}, {len(names)}) for its clips "
            "and the classes; give the table of its classes as --class-labels, or --no-labels"
        )
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


def pack_rate_hz(pack: "h5py.File", given: int | None) -> int:
    """Return the sample rate that a pack names, else the given one, else 32 kHz. Raises UserError if they differ."""
    named = pack.attrs.get(RATE)
    if named is None:
        return given or DEFAULT_RATE_HZ
    if given not in (None, int(named)):
        says = f"{pack.filename} says that it has {int(named)} Hz"
        raise UserError(f"--sample-rate {given}: {says}; leave --sample-rate out")
    return int(named)


def pack_keys(pack: "h5py.File") -> dict[str, tuple[str, int | None]]:
    """Return key -> (data set, row) for the clips in a pack: PANNs' rows by name, else one data set each."""
    if NAMES in pack:
        return {name: (WAVEFORM, row) for row, name in enumerate(_clip_names(pack))}
    return {str(name): (str(name), None) for name in pack}
