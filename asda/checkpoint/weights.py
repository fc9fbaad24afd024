"""Folders of weights: config.json and safetensors, written whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asda.checkpoint.manifest import MANIFEST, TEMPORARY, Manifest, commit_folder, entry_of
from asda.config.run import Description, dump_config
from asda.errors import UserError
from asda.system import sync

WEIGHTS_FILES = {"config.json", "model.safetensors", "teacher.safetensors", MANIFEST}  # and no more
MOST_KEYS_NAMED = 3  # in a complaint about weights that do not fit


def write_weights(
    folder: Path, description: Description, weights: dict[str, dict[str, Tensor]], replace: bool = False
) -> None:
    """Write a folder of weights that resolve_checkpoint, read_description and read_weights take: whole, or not at all.

    Args:
        folder: where it goes.
        description: becomes config.json.
        weights: file stem ("model", "teacher") -> tensors.
        replace: may replace a folder of weights that is there; never one that holds anything else.

    Raises:
        UserError: the folder exists and may not be replaced.
    """
    check_target(folder, replace)
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_text(dump_config(description))
        for stem, tensors in weights.items():
            save_tensors(temporary / f"{stem}.safetensors", tensors)
        files = sorted(temporary.iterdir())
        for path in files:
            sync(path)
        commit_folder(temporary, folder, Manifest({path.name: entry_of(path) for path in files}))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(folder: Path, replace: bool) -> None:
    """Raise UserError where write_weights would not write; ask it before long work."""
    if not folder.exists():
        return
    if not replace:
        raise UserError(f"{folder} exists; --force replaces it, or choose another --out")
    strangers = [path.name for path in folder.iterdir() if path.name not in WEIGHTS_FILES] if folder.is_dir() else [""]
    if strangers:
        raise UserError(f"{folder} is not a folder of weights alone, so it is not replaced; choose another --out")


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of model.safetensors or teacher.safetensors, on the CPU."""
    path = folder / f"{stem}.safetensors"
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str | None:
    """How weights differ from those expected in names and shapes: the first three; None when they do not."""
    complaints = [f"{named(key, tensor)} is missing" for key, tensor in expected.items() if key not in found]
    complaints += [f"{named(key, value)} is unexpected" for key, value in found.items() if key not in expected]
    for key, tensor in expected.items():
        if key in found and (not isinstance(found[key], Tensor) or found[key].shape != tensor.shape):
            complaints.append(f"{named(key, found[key])} should be {list(tensor.shape)}")
    more = len(complaints) - MOST_KEYS_NAMED
    return ", ".join(complaints[:MOST_KEYS_NAMED]) + (f", and {more} more" if more > 0 else "") or None


def named(key: str, value: object) -> str:
    """A tensor by name and shape, for messages; anything else by name and type."""
    return f"{key} {list(value.shape)}" if isinstance(value, Tensor) else f"{key} ({type(value).__name__})"


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a .safetensors file that may be read by whom its folder lets in; the library keeps it to the owner."""
    save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)
