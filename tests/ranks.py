"""Runs a function on several ranks, and makes the tiny pre-training runs on which tests of the engine are made."""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from launching import ROOT, TINY_PRETRAIN

STAGES = (0, 1, 2, 3)
BATCH, FRAMES, PATCH = 8, 64, 16  # clips per step, frames, side of a patch
NUM_PATCHES = (FRAMES // PATCH) * (128 // PATCH)
NUM_VISIBLE = 6  # patches that a student sees


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call function(processes, *arguments) in new processes that have joined; returns what each rank returned."""
    from asda.engine import free_port

    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, free_port(), function, arguments, folder)
        torch.multiprocessing.spawn(_enter, job, nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]  # noqa: S301


def _enter(rank: int, world_size: int, port: int, function: Any, arguments: tuple[Any, ...], folder: str) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from asda.engine import join_processes, leave_processes

    result = function(join_processes(timeout_s=60), *arguments)
    leave_processes()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


def tiny_config(*overrides: str):
    """Two students in 32 dimensions; decoder noise off, because each rank would draw its own."""
    from asda.config import load_config

    run = ["data.train=nowhere:train", "run.folder=nowhere", "optimizer.steps=20", "optimizer.lr=1e-3"]
    quiet = ["objective.decoder.noise_std=0", "objective.ema.decay=0.9", "objective.ema.end_decay=0.9"]
    return load_config(ROOT / "configs" / "demo_pretrain.json", [*TINY_PRETRAIN, *run, *quiet, *overrides])


def make_run(config: Any, processes: Any):
    """An objective and its engine, freshly initialised."""
    from asda.engine import make_engine
    from asda.objectives import make_objective

    objective = make_objective(config, (), processes.device)
    engine = make_engine(config, objective.module, objective.lr_scales, processes.world_size)
    objective.follow(engine)
    return objective, engine


def clips(step: int) -> tuple[torch.Tensor, np.ndarray]:
    """The whole batch of a step: patches [B, N, P] and what two students of each clip see [B, 2, K]."""
    rng = np.random.default_rng(step)
    visible = [[rng.permutation(NUM_PATCHES)[:NUM_VISIBLE] for _ in range(2)] for _ in range(BATCH)]
    patches = rng.standard_normal((BATCH, NUM_PATCHES, PATCH**2), dtype=np.float32)
    return torch.from_numpy(patches), np.array(visible)


def micro_batches(step: int, rank: int, world_size: int, accumulation: int = 1):
    """This rank's share of the batch of a step, in as many parts as gradients are accumulated."""
    patches, visible = clips(step)
    size = BATCH // world_size // accumulation
    for part in range(accumulation):
        begin = (rank * accumulation + part) * size
        yield patches[begin : begin + size], SimpleNamespace(visible_BMK=visible[begin : begin + size])


def train_step(objective: Any, engine: Any, processes: Any, step: int, applied: int, poison: bool = False) -> bool:
    """One step as asda/train.py takes it; returns whether it was applied. `poison` makes this rank's clips nan."""
    from asda.engine import guarded, learning_rate, set_learning_rate, was_applied

    set_learning_rate(engine, learning_rate(objective._config.optimizer, applied + 1))
    accumulation = engine.gradient_accumulation_steps()
    for patches, batch in micro_batches(step, processes.rank, processes.world_size, accumulation):
        loss, _ = objective.loss(engine, patches * (float("nan") if poison else 1.0), batch)
        engine.backward(guarded(loss))
        engine.step()
    if was_applied(engine):
        objective.after_update(applied + 1)
    return was_applied(engine)
