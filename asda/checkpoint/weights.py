"""Folders of weights (config.json and safetensors): write them whole or not at all, and load them into modules."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asda.checkpoint.manifest import MANIFEST, TEMPORARY, Manifest, commit_folder, entry_of
from asda.checkpoint.read import read_description
from asda.config.model import AstConfig, ModelConfig
from asda.config.run import Description, dump_config, load_description
from asda.errors import UserError
from asda.models.ast import fitted_positions
from asda.system import sync

WEIGHTS_FILES = {"config.json", "model.safetensors", "teacher.safetensors", MANIFEST}  # and no more
MOST_KEYS_NAMED = 3  # in a complaint about weights that do not fit
ENCODER = "encoder."  # prefix of the encoder's tensors in model.safetensors
# Keys of the model section that may differ between an encoder and the checkpoint that it starts from
NOT_OF_THE_ENCODER = ("max_time_patches", "frames", "conformer", "channel_attention")
Which = Literal["student", "teacher"]


def write_weights(
    folder: Path, description: Description, weights: dict[str, dict[str, Tensor]], replace: bool = False
) -> None:
    """Write a folder of weights, whole or not at all; resolve_checkpoint and read_weights accept it.

    Args:
        folder: where it goes.
        description: becomes config.json.
        weights: file stem ("model", "teacher") -> tensors.
        replace: whether an existing folder of weights may be replaced; a folder with other files never is.

    Raises:
        UserError: the folder exists and may not be replaced.
    """
    check_target(folder, replace)
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_text(dump_config(description), encoding="utf-8")
        if load_description(temporary / "config.json") != description:
            raise UserError(f"the description of {folder} does not read back as it was written; please report this")
        for stem, tensors in weights.items():
            save_tensors(temporary / f"{stem}.safetensors", {name: t.contiguous() for name, t in tensors.items()})
        files = sorted(temporary.iterdir())
        for path in files:
            sync(path)
        commit_folder(temporary, folder, Manifest({path.name: entry_of(path) for path in files}))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(folder: Path, replace: bool) -> None:
    """Raise UserError if write_weights would refuse this folder; call it before long work."""
    if not folder.exists():
        return
    if not replace:
        raise UserError(f"{folder} exists; --force replaces it, or choose another --out")
    strangers = [path.name for path in folder.iterdir() if path.name not in WEIGHTS_FILES] if folder.is_dir() else [""]
    if strangers:
        raise UserError(f"{folder} is not a folder of weights alone, so it is not replaced; choose another --out")


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors or teacher.safetensors, on the CPU."""
    path = folder / f"{stem}.safetensors"
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def load_encoder(encoder: nn.Module, model: ModelConfig | AstConfig, folder: Path, which: Which) -> None:
    """Load the encoder of a checkpoint or of a folder of weights into a module.

    Clips may be longer or shorter than those of the folder: ASDA computes its positions, and AST's learned ones are
    fitted. What HAM-AST puts on the encoder is not loaded.

    Args:
        encoder: an Encoder or AstEncoder that was made of `model`.
        model: the sizes of `encoder`.
        folder: as resolve_checkpoint returns it.
        which: "student" is the trained encoder, of a classifier too; "teacher" the EMA of pre-training.

    Raises:
        UserError: the folder has no teacher, its network has other sizes, or its weights do not fit its config.json.
    """
    saved = read_description(folder).model
    theirs, ours = saved.model_dump(), model.model_dump()
    differing = [name for name in ours if ours[name] != theirs.get(name) and name not in NOT_OF_THE_ENCODER]
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} was trained with model.{name} {theirs.get(name)}, this run has {ours[name]}; use the same "
            "model section"
        )
    weights = _encoder_weights(folder, which)
    if isinstance(model, AstConfig) and isinstance(saved, AstConfig) and "positions" in weights:
        weights["positions"] = fitted_positions(weights["positions"], saved.grid, model.grid)
    load_into(encoder, weights, folder)


def _encoder_weights(folder: Path, which: Which) -> dict[str, Tensor]:
    if which == "student":
        weights = read_weights(folder, "model")
        return {name.removeprefix(ENCODER): w for name, w in weights.items() if name.startswith(ENCODER)}
    if not (folder / "teacher.safetensors").is_file():
        raise UserError(
            f"{folder} has no teacher, which only pre-training keeps; choose the student instead "
            "(objective.init_weights=student, --weights student, or weights='student' in Python)"
        )
    return read_weights(folder, "teacher")


def load_into(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Load weights into a module; raise UserError if their names or shapes do not fit it."""
    if complaint := misfit(module.state_dict(), weights):
        raise UserError(f"the weights in {folder} do not fit its config.json: {complaint}")
    module.load_state_dict(weights)


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str | None:
    """Name the first three differences in names and shapes; return None if the weights fit."""
    complaints = [f"{named(key, tensor)} is missing" for key, tensor in expected.items() if key not in found]
    complaints += [f"{named(key, value)} is unexpected" for key, value in found.items() if key not in expected]
    for key, tensor in expected.items():
        if key in found and (not isinstance(found[key], Tensor) or found[key].shape != tensor.shape):
            complaints.append(f"{named(key, found[key])} should be {list(tensor.shape)}")
    more = len(complaints) - MOST_KEYS_NAMED
    return ", ".join(complaints[:MOST_KEYS_NAMED]) + (f", and {more} more" if more > 0 else "") or None


def named(key: str, value: object) -> str:
    """Describe a tensor by name and shape, anything else by name and type; for messages."""
    return f"{key} {list(value.shape)}" if isinstance(value, Tensor) else f"{key} ({type(value).__name__})"


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a .safetensors file with the rights of its folder; the library would let only the owner read it."""
    save_file(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)
