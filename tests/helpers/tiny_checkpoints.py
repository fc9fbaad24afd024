"""Checkpoints of a few kilobytes, saved by the writer itself."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from asda.checkpoint.read import State
from asda.checkpoint.writer import CheckpointWriter, Files, Outcome
from asda.config.run import Config, load_config

CONFIG = Path(__file__).parents[2] / "configs" / "demo_pretrain.json"
ALONE: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), is_first=True)  # Processes


@dataclass(frozen=True)
class Part:
    """Which rank of how many a file is of."""

    rank: int = 0
    world_size: int = 1


def tiny_config(*overrides: str) -> Config:
    return load_config(CONFIG, list(overrides))


def state_at(step: int, world_size: int = 1) -> State:
    return State(step, ("cat", "dog"), "fingerprint", world_size, applied_steps=step)


def files_at(step: int, part: Part = Part()) -> Files:
    """Tensors that tell the step; only the first rank has the whole weights."""
    optimizer = {"exp_avg:0:w": torch.full((16,), float(step)), "adam_step": torch.tensor(float(step))}
    files: dict[str, dict[str, Tensor]] = {f"optimizer-{part.rank:05d}-of-{part.world_size:05d}": optimizer}
    if part.rank == 0:
        files["model"] = {"w": torch.full((4, 4), float(step))}
        files["teacher"] = {"w": torch.full((4, 4), -float(step))}
    return files


def try_to_save(run: Path, config: Config, step: int, files: Files | None = None) -> Outcome:
    with CheckpointWriter(run, config, ALONE) as writer:
        writer.save(state_at(step), files or files_at(step))
        outcome = writer.finish()
    assert outcome is not None
    return outcome


def save(run: Path, config: Config, step: int, files: Files | None = None) -> Path:
    outcome = try_to_save(run, config, step, files)
    assert outcome.failure is None, outcome.failure
    return outcome.folder
