"""Checkpoints that are whole or not there.

    <run>/checkpoints/step-0001000/
        config.json           the resolved run
        state.json            format, step, order version, vocabulary
        model.safetensors     all trained weights, fp32
        teacher.safetensors   the EMA teacher, fp32 (pre-training only)
        engine/               DeepSpeed's partitions: optimizer, master weights. Pickles: open only your own
        manifest.json         bytes and xxh3_128 of every file above; written last

A checkpoint is written to a temporary folder, every file is synced to the disk, then the folder gets its name in one
rename. So a name exists only for whole checkpoints, and the newest whose files match its manifest is the one to use.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asda.config import Config, Description, InputConfig, dump_config, load_config, load_description
from asda.data.order import ORDER_VERSION
from asda.errors import UserError

FORMAT = 1
TEMPORARY = ".tmp-"
WEIGHTS_FILES = {
    "config.json",
    "model.safetensors",
    "teacher.safetensors",
    "manifest.json",
}  # and no more
MOST_KEYS_NAMED = 3  # in a complaint about weights that do not fit


@dataclass(frozen=True)
class State:
    """What a run needs besides weights to go on: its place in the data and the schedules follow from the step."""

    step: int  # updates done
    vocabulary: tuple[str, ...]  # empty in pre-training
    data_fingerprint: str  # of the training shards
    world_size: int
    damaged_clips: tuple[int, ...] = ()  # by number, those that others stood in for (data.max_damaged)
    order_version: int = ORDER_VERSION
    format: int = FORMAT


def save(
    run: Path,
    config: Config,
    state: State,
    weights: dict[str, dict[str, Tensor]],
    save_engine: Callable[[Path], None],
    is_first: bool,
) -> Path:
    """Write a checkpoint. All ranks call this together.

    Args:
        run: the run folder.
        config: the resolved configuration.
        state: where the run stands.
        weights: file stem -> tensors, written by the first rank ("model", "teacher").
        save_engine: writes this rank's share of the engine's state into a folder.
        is_first: whether this is the first rank.

    Returns:
        The checkpoint's folder. Older checkpoints beyond run.keep are gone when it returns.
    """
    folder = run / "checkpoints" / f"step-{state.step:07d}"
    temporary = folder.with_name(TEMPORARY + folder.name)
    if is_first:
        _sweep(folder.parent)
        (temporary / "engine").mkdir(parents=True)
    dist.barrier()
    save_engine(temporary / "engine")
    if is_first:
        (temporary / "config.json").write_text(dump_config(config))
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        _save_tensors(temporary, weights)
    dist.barrier()
    if is_first:
        _commit(temporary, folder)
        _prune(folder.parent, config.run.keep)
    dist.barrier()
    return folder


def newest(run: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run whose files match their manifest; None when the run has no checkpoint.

    Raises:
        UserError: there are checkpoints, but none is intact. A run never starts afresh over them in silence.
    """
    folders = _checkpoints(run / "checkpoints")
    for folder in reversed(folders):
        complaint = damage(folder)
        if complaint is None:
            return folder
        warn(f"checkpoint {folder} is damaged ({complaint}); looking at the one before it")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {run / 'checkpoints'} is intact; restore one, "
            "or start in another run.folder"
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when they match the manifest."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest.json cannot be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
        if _hash(path) != expected["xxh3_128"]:
            return f"the hash of {name} differs from the manifest's"
    return None


def resolve(path: Path) -> Path:
    """A checkpoint folder or a folder of weights as given, or the newest intact checkpoint of a run folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / "manifest.json").is_file():
        complaint = damage(path)
        if complaint:
            raise UserError(f"checkpoint {path} is damaged: {complaint}; use another one of its run")
        return path
    if (path / "model.safetensors").is_file():  # published weights need no manifest
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise UserError(
            f"there is no checkpoint in {path}; give a run folder, or one of its checkpoints/step-... folders"
        )
    return found


def read_state(folder: Path, *, to_continue: bool = False) -> tuple[Config, State]:
    """The configuration and state of a checkpoint of a run.

    Args:
        folder: the checkpoint.
        to_continue: whether the run is to go on from here, for which its clips must come in the order that it began in.

    Raises:
        UserError: it is no checkpoint of a run, or another version of asda wrote it.
    """
    if not (folder / "state.json").is_file():
        raise UserError(
            f"{folder} holds weights and no run (it has no state.json): predict.py, extract_features.py and "
            "objective.init_from take it, evaluating and continuing need a checkpoint that train.py saved"
        )
    fields = json.loads((folder / "state.json").read_text())
    if fields["format"] != FORMAT:
        raise UserError(f"checkpoint {folder} has format {fields['format']}; this version of asda reads {FORMAT}")
    if to_continue and fields["order_version"] != ORDER_VERSION:
        raise UserError(
            f"{folder} was trained in data order {fields['order_version']}, this version of asda draws in order "
            f"{ORDER_VERSION}; continue with the version that began the run, or start another run.folder from it"
        )
    return load_config(folder / "config.json"), State(**{name: _immutable(value) for name, value in fields.items()})


def _immutable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_description(folder: Path) -> Description:
    """The network, its input and its labels, of a checkpoint or of converted weights."""
    if not (folder / "state.json").is_file():
        return load_description(folder / "config.json")
    config, state = read_state(folder)
    assert config.data.log_mel != "dataset", "a run resolves it before it saves"
    return Description(
        _about=config.about,
        preset=config.preset,
        size=config.size,
        objective=config.objective,
        data=InputConfig(
            frames=config.data.frames,
            log_mel=config.data.log_mel,
            pad_log_mel=config.data.pad_log_mel,
            padding=config.data.padding,
        ),
        model=config.model,
        labels=state.vocabulary,
    )


def write_weights(
    folder: Path, description: Description, weights: dict[str, dict[str, Tensor]], replace: bool = False
) -> None:
    """Write a folder of weights that resolve, read_description and read_weights take: whole, or not at all.

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
        _save_tensors(temporary, weights)
        _commit(temporary, folder)
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


def _save_tensors(folder: Path, weights: dict[str, dict[str, Tensor]]) -> None:
    for stem, tensors in weights.items():
        save_file(tensors, folder / f"{stem}.safetensors")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save left."""
    for leftover in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(leftover)


def _commit(temporary: Path, folder: Path) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "xxh3_128": _hash(path)} for path in files
    }
    manifest = temporary / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=2) + "\n")
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [*files, manifest, *folders, temporary]:
        _sync(path)
    if folder.exists():  # the same step, saved again after a resume from an older checkpoint
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


def _prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep`. What _commit has just renamed is the newest and whole, so it always stays."""
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
