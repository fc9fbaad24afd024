"""Find and read checkpoints, which are whole or absent.

    <run>/checkpoints/step-0001000/
        config.json                          the resolved run
        state.json                           how far the run has come: step, counters, data (State)
        model.safetensors                    all trained weights, whole, fp32
        teacher.safetensors                  the EMA teacher, whole, fp32 (pre-training only)
        optimizer-00000-of-00002.safetensors each rank's part of Adam's moments, fp32
        manifest.json                        sizes and hashes of all of them; written last
    <run>/checkpoints/latest, best           the names of the newest and of the best, for people and scripts

A checkpoint is written to a temporary folder, every file is synced to the disk, then the folder gets its name in one
rename (asda/checkpoint/writer.py). So only whole checkpoints have a name, and the newest whose files match its manifest
is the one to use. asda never reads `latest` and `best`, which could be damaged: the folders themselves tell the newest,
and its state tells the best. Nothing is a pickle, and reading a checkpoint runs no code from it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from asda.checkpoint.manifest import FORMAT, MANIFEST, READABLE_FORMATS, STRICT, damage
from asda.config.data import InputConfig
from asda.config.run import Config, Description, load_description, load_stored_config
from asda.data.order import ORDER_VERSION
from asda.errors import UserError

Result = TypeVar("Result")

STEP_NAME = re.compile(r"step-(\d{7,})")
MAX_STATE_BYTES = 64 << 20  # 2 million damaged clips need 16 MiB


@dataclass(frozen=True)
class State:
    """State to resume a run besides tensors; its position in the data and its schedules follow from counters."""

    __pydantic_config__ = STRICT

    step: int  # attempted steps; the position in the data follows from it
    vocabulary: tuple[str, ...]  # empty in pre-training
    data_fingerprint: str  # of the training shards
    world_size: int  # ranks that saved it
    damaged_clips: tuple[int, ...] = ()  # numbers of damaged clips that others replaced (data.max_damaged)
    applied_steps: int = 0  # updates of the weights; the schedules follow from it
    skipped_steps: int = 0  # attempted, but loss or gradient was not finite
    bad_steps_in_a_row: int = 0  # skipped steps since the last update
    best_step: int = 0  # its checkpoint is the best by run.keep_best; 0: none
    best_figure: float | None = None  # its validation metric
    best_on: str = ""  # fingerprint of the shards of data.valid that chose it
    order_version: int = ORDER_VERSION
    format: int = FORMAT


def newest_checkpoint(run: Path, warn: Callable[[str], None] = print) -> Path | None:
    """Return the newest checkpoint of a run whose files match their manifest; None if the run has no checkpoint.

    Raises:
        UserError: there are checkpoints, but none is intact. A run never silently starts over them.
    """
    found = checkpoints_of(run)
    newest = _newest_of(run, found, damage, warn)
    if newest is None and found:  # the run has removed them meanwhile, for newer ones
        return newest_checkpoint(run, warn)
    return newest


def newest_for_all_ranks(run: Path, warn: Callable[[str], None] = print) -> Path | None:
    """Do the same on all ranks together: each hashes a share of the files, and all refuse what one refuses.

    Only the first rank warns; the error is the same sentence on all ranks.
    """
    found = [checkpoints_of(run)]
    dist.broadcast_object_list(found)
    return _newest_of(run, found[0], _damage_on_any_rank, warn if dist.get_rank() == 0 else lambda _: None)


def _newest_of(
    run: Path, folders: list[Path], complaint_about: Callable[[Path], str | None], warn: Callable[[str], None]
) -> Path | None:
    for folder in reversed(folders):
        complaint = complaint_about(folder)
        if complaint is None:
            return folder
        if not folder.exists():
            return None
        warn(f"checkpoint {folder} is damaged ({complaint}); trying the one before it")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {run / 'checkpoints'} is intact; restore one from a backup, or "
            "start in another run.folder"
        )
    return None


def _damage_on_any_rank(folder: Path) -> str | None:
    complaints: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(complaints, damage(folder, dist.get_rank(), dist.get_world_size()))
    found = ((rank, complaint) for rank, complaint in enumerate(complaints) if complaint)
    return next((f"{complaint}, says rank {rank}" for rank, complaint in found), None)


def best_checkpoint(run: Path) -> Path:
    """Return the best checkpoint of a run, intact or not, which its newest intact checkpoint names.

    Raises:
        UserError: the run has no checkpoint, or none is the best.
    """
    _, state = read_state(resolve_checkpoint(run))
    if not state.best_step:
        raise UserError(
            f"{run} has no best checkpoint; train with data.valid, and run.keep_best=accuracy or run.keep_best=mAP"
        )
    return step_folder(run, state.best_step)


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def from_checkpoint(path: Path, read: Callable[[Path], Result]) -> Result:
    """Return what `read` finds in the checkpoint that `path` names.

    A run may remove the newest checkpoint while it is being read, because it keeps only a few; then the run has a newer
    one, which is read instead.
    """
    while True:
        folder = resolve_checkpoint(path)
        try:
            return read(folder)
        except (UserError, FileNotFoundError):
            if folder == path or folder.exists():
                raise


def resolve_checkpoint(path: Path) -> Path:
    """Return a checkpoint or a folder of weights as given, or the newest intact checkpoint of a run folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (path / MANIFEST).is_file() or (path / "state.json").is_file():
        complaint = damage(path)
        if complaint:
            raise UserError(f"checkpoint {path} is damaged: {complaint}; use another checkpoint of the run")
        return path
    if (path / "model.safetensors").is_file():  # published weights need no manifest
        return path
    found = newest_checkpoint(path) if path.is_dir() else None
    if found is None:
        raise UserError(
            f"there is no checkpoint in {path}; give a run folder, or one of its checkpoints/step-... folders"
        )
    return found


def read_state(folder: Path, *, to_resume: bool = False) -> tuple[Config, State]:
    """Read the configuration and the state of a checkpoint of a run.

    Args:
        folder: the checkpoint.
        to_resume: whether the run resumes from it; then its clips must come in the same order as before.

    Raises:
        UserError: it is not a checkpoint of a run, or another version of asda wrote it.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has weights but no run (state.json is missing). asda predict, asda features and "
            "objective.init_from accept it; evaluating and resuming need a checkpoint that asda train saved"
        )
    state = _parse_state(path)
    if to_resume and state.format < FORMAT:
        raise UserError(
            f"{folder} has format {state.format}, whose optimizer state is in pickles that this version of asda does "
            "not open; resume with the version that began the run, or start another run.folder from its weights"
        )
    if to_resume and state.order_version != ORDER_VERSION:
        raise UserError(
            f"{folder} was trained in data order {state.order_version}, this version of asda uses order "
            f"{ORDER_VERSION}; resume with the version that began the run, or start another run.folder from it"
        )
    return load_stored_config(folder / "config.json"), state


def _parse_state(path: Path) -> State:
    if path.stat().st_size > MAX_STATE_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a state has at most {MAX_STATE_BYTES}")
    text = path.read_bytes()
    try:
        found = TypeAdapter(dict[str, Any]).validate_json(text).get("format")
        if found not in READABLE_FORMATS:
            raise UserError(f"checkpoint {path.parent} has format {found}; this version of asda reads {FORMAT}")
        return TypeAdapter(State).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top"
        raise UserError(f"{path} is malformed at {where}: {first['msg']}; use another checkpoint") from None


def read_description(folder: Path) -> Description:
    """Read the network, its input and its labels, from a checkpoint or from converted weights."""
    if not (folder / "state.json").is_file():
        return load_description(folder / "config.json")
    config, state = read_state(folder)
    return description_of(config, state.vocabulary)


def description_of(config: Config, labels: tuple[str, ...]) -> Description:
    """Return the part of a run's configuration that describes its network."""
    assert config.data.log_mel != "dataset", "a run resolves it before it saves"
    return Description(
        _about=config.about,
        preset=config.preset,
        size=config.size,
        objective=config.objective,
        data=InputConfig(**{name: getattr(config.data, name) for name in InputConfig.model_fields}),
        model=config.model,
        labels=labels,
    )


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run by step, the oldest first, with damaged ones."""
    named = [(STEP_NAME.fullmatch(path.name), path) for path in (run / "checkpoints").glob("step-*")]
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name)]
