"""Runs a function on several ranks, and makes the tiny pre-training runs on which tests of the engine are made."""

import math
import os
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, TINY_PRETRAIN

STAGES = (0, 1, 2, 3)
HAS_FP16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()  # what DeepSpeed asks
PRECISIONS = ("fp32", "bf16", "fp16") if HAS_FP16 else ("fp32", "bf16")
FP16 = pytest.param(
    "fp16", marks=[pytest.mark.faults, pytest.mark.skipif(not HAS_FP16, reason="this CPU cannot compute in fp16")]
)
BATCH, FRAMES, PATCH = 8, 64, 16  # clips per step, frames, side of a patch
NUM_PATCHES = (FRAMES // PATCH) * (128 // PATCH)
NUM_VISIBLE = 6  # patches that a student sees


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call function(processes, *arguments) in new processes that have joined; returns what each rank returned."""
    from asda.engine.processes import free_port

    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, free_port(), function, arguments, folder)
        torch.multiprocessing.spawn(_enter, job, nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]  # noqa: S301


def _enter(rank: int, world_size: int, port: int, function: Any, arguments: tuple[Any, ...], folder: str) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from asda.engine.processes import join_processes, leave_processes

    result = function(join_processes(timeout_s=60), *arguments)
    leave_processes()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))


def tiny_config(*overrides: str):
    """Two students in 32 dimensions; decoder noise off, because each rank would draw its own."""
    from asda.config.run import load_config

    run = ["data.train=nowhere:train", "run.folder=nowhere", "optimizer.steps=20", "optimizer.lr=1e-3"]
    quiet = ["objective.decoder.noise_std=0", "objective.ema.decay=0.9", "objective.ema.end_decay=0.9"]
    return load_config(ROOT / "configs" / "demo_pretrain.json", [*TINY_PRETRAIN, *run, *quiet, *overrides])


def stages_of(precision: str) -> tuple[int, ...]:
    """The stages in which a precision is allowed: fp16 not in 0."""
    return STAGES[1:] if precision == "fp16" else STAGES


def make_run(config: Any, processes: Any):
    """An objective and its engine, freshly initialised."""
    from asda.engine.zero import make_engine
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
    """A rank's share of the batch of a step, in as many parts as gradients are accumulated."""
    patches, visible = clips(step)
    size = BATCH // world_size // accumulation
    for part in range(accumulation):
        begin = (rank * accumulation + part) * size
        yield patches[begin : begin + size], SimpleNamespace(visible_BMK=visible[begin : begin + size])


def train_step(objective: Any, engine: Any, processes: Any, step: int, applied: int, bad: str = "") -> bool:
    """One step as asda/train.py takes it; returns whether it was applied.

    `bad` spoils the last micro-batch of this rank: "input" makes its clips nan, "loss" its loss infinite, "gradient"
    gives a finite loss one parameter with a gradient of nan, "norm" gives finite gradients whose squares overflow.
    """
    from asda.engine.zero import guarded, learning_rate, set_learning_rate, was_applied

    set_learning_rate(engine, partial(learning_rate, objective._config.optimizer, applied + 1))
    accumulation = engine.gradient_accumulation_steps()
    for part, (patches, batch) in enumerate(micro_batches(step, processes.rank, processes.world_size, accumulation), 1):
        kind = bad if part == accumulation else ""
        loss, _ = objective.loss(engine, patches * math.nan if kind == "input" else patches, batch)
        loss = loss + math.inf if kind == "loss" else loss
        hook = None
        if kind == "gradient":
            hook = engine.module.decoder.proj.bias.register_hook(lambda gradient: gradient * math.nan)
        if kind == "norm":
            loss.register_hook(lambda gradient: gradient * 1e30)
        engine.backward(guarded(loss))
        if hook:
            hook.remove()
        engine.step()
    if was_applied(engine):
        objective.after_update(applied + 1)
    return was_applied(engine)


def lower_the_loss_scale(engine: Any) -> None:
    """fp16 begins with a search for its loss scale, in which no step is applied; this is the scale it would find."""
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler.cur_scale = 256.0


def everything(objective: Any, engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments, Adam's counters and the teacher, whole, and what each rank computes with; copies."""
    from asda.engine.partitions import fragments, whole

    held = fragments(engine)
    counters = torch.stack([state["step"].cpu() for state in engine.basic_optimizer.state.values()])
    found = {"adam step": counters.unique()}  # one value, however many tensors a stage makes of the parameters
    for key in ("master", "exp_avg", "exp_avg_sq"):
        parts = whole([f.stretch for f in held], [getattr(f, key) for f in held], engine, everywhere=True)
        found |= {f"{key} {name}": tensor.cpu().clone() for name, tensor in parts.items()}
    averages = objective.weights(everywhere=True)["teacher"]
    found |= {f"average {name}": tensor.cpu().clone() for name, tensor in averages.items()}
    found |= {f"teacher {name}": p.detach().cpu().clone() for name, p in objective.teacher.named_parameters()}
    if engine.zero_optimization_stage() < 3:
        found |= {f"student {name}": p.detach().cpu().clone() for name, p in engine.module.named_parameters()}
    return found


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not equal bit for bit, of those that both have."""
    return [name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])]
