"""The parts that gpu_day.py computes itself, each in its own process, so that none inherits another's memory.

    python tools/bench/gpu_parts.py parity [--cpu]

prints its findings as one JSON object on the last line.

Shapes: B clips, M students, N patches, K visible patches, P pixels, D width.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.cuda import nccl

from asda.config.model import PretrainConfig, of_asda
from asda.config.run import Config, load_config
from asda.models.attention import AttentionPath, set_attention_path
from asda.models.costs import gemm_rate, network_costs
from asda.models.masks import visible_patches
from asda.models.pretrain import MaskedStudents

ROOT = Path(__file__).resolve().parents[2]
STATS = 'data.log_mel={"mean": -4, "std": 4}'
PACKAGES = ("torch", "deepspeed", "triton", "nvidia-dali-cuda130", "numpy")
# Sums in another order are rounded differently, by about as much. An error so many times that of the definition on the
# CPU is not rounding.
MOST_TIMES_THE_CPUS_ERROR = 4
WARM_UP, TIMED = {"cuda": 3, "cpu": 1}, {"cuda": 10, "cpu": 2}  # calls
TINY = ["objective.students=2", "data.frames=64", "model.depth=2", "objective.target_layers=2"]
Found = dict[str, Any]


def machine(device: str) -> Found:
    """Describe the machine and the packages."""
    found: Found = {
        "python": platform.python_version(),
        "host": {"cpus": len(os.sched_getaffinity(0)), "ram_gib": _ram_gib()},
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "device": device,
    }
    if device == "cuda":
        properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        found["gpus"] = [
            {"name": p.name, "memory_gib": p.total_memory / 2**30, "capability": f"{p.major}.{p.minor}"}
            for p in properties
        ]
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def parity(device: str) -> Found:
    """Compare loss and gradients of the students, by precision and attention path, with fp64 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    frames = 512 if device == "cuda" else 128
    config = _config("demo_pretrain.json", ["objective.decoder.noise_std=0", f"data.frames={frames}"])
    paths: tuple[AttentionPath, ...] = ("sdpa", "triton") if device == "cuda" else ("sdpa",)
    exact, found = _loss_and_gradients(config, torch.float64, "cpu", "explicit"), {}
    for dtype in (torch.float32, torch.bfloat16):
        allowed = _error(_loss_and_gradients(config, dtype, "cpu", "explicit"), exact) * MOST_TIMES_THE_CPUS_ERROR
        for path in paths:
            error = _error(_loss_and_gradients(config, dtype, device, path), exact)
            label = f"{str(dtype).removeprefix('torch.')}, {path}"
            found[label] = {"relative_error": error, "allowed": allowed, "passed": error <= allowed}
    return {"passed": all(row["passed"] for row in found.values()), "paths": found}


def gemm(device: str) -> Found:
    """Measure FLOP/s of a large matrix product in bf16: the reference of all other rates."""
    return {"bf16_flops_per_s": gemm_rate(torch.device(device), torch.bfloat16)}


def step(device: str, micro_batch: int, tiny: bool, overrides: list[str]) -> Found:
    """Time a training step on one device: teacher, students, losses, backward, clipping, optimizer, EMA."""
    from asda.engine.processes import join_processes, leave_processes  # here: DeepSpeed takes seconds
    from asda.engine.zero import guarded, make_engine
    from asda.objectives import Pretraining, make_objective

    sizes = [f"optimizer.batch={micro_batch}", f"engine.micro_batch={micro_batch}", *overrides]
    config = _config("demo_pretrain.json", [*TINY, *sizes]) if tiny else _config("as2m.json", sizes)
    processes = join_processes()
    objective = make_objective(config, (), processes.device)
    assert isinstance(objective, Pretraining)
    engine = make_engine(config, objective.module, objective.lr_scales, 1)
    objective.follow(engine)
    patches_BNP, visible_BMK = _inputs(config, micro_batch)
    batch: Any = SimpleNamespace(visible_BMK=visible_BMK.numpy())
    patches_BNP = patches_BNP.to(processes.device)

    def work() -> None:
        loss, _ = objective.loss(engine, patches_BNP, batch)
        engine.backward(guarded(loss))
        engine.step()
        objective.after_update(1)

    seconds = _seconds(work, device)
    flops = micro_batch * sum(network_costs(config.model, config.objective, config.data.frames, 0).flops.values())
    found = {"micro_batch": micro_batch, "step_s": seconds, "clips_per_s": micro_batch / seconds}
    found |= {"flops_per_step": flops, "flops_per_s": flops / seconds}
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    leave_processes()
    return found


def _config(name: str, overrides: list[str]) -> Config:
    return load_config(ROOT / "configs" / name, [STATS, "data.train=none:none", *overrides])


def _inputs(config: Config, clips: int) -> tuple[Tensor, Tensor]:
    """Return noise as patches [B, N, P], and masks [B, M, K]; the same in every process."""
    assert isinstance(config.objective, PretrainConfig)
    rng, patch, objective = np.random.default_rng(0), config.model.patch, config.objective
    grid = (config.data.frames // patch, config.model.mel_bins // patch)
    draws = [visible_patches(rng, num_masks=objective.students, grid=grid, config=objective.mask) for _ in range(clips)]
    patches_BNP = rng.normal(size=(clips, math.prod(grid), patch**2)).astype(np.float32)
    return torch.from_numpy(patches_BNP), torch.from_numpy(np.stack(draws))


def _loss_and_gradients(config: Config, dtype: torch.dtype, device: str, path: AttentionPath) -> Tensor:
    """Return the loss and all gradients as one vector, in fp64 on the CPU."""
    assert isinstance(config.objective, PretrainConfig)
    torch.manual_seed(0)
    students = MaskedStudents(of_asda(config.model), config.objective).to(dtype=dtype, device=device)
    set_attention_path(students, path)
    patches_BNP, visible_BMK = (tensor.to(device) for tensor in _inputs(config, clips=2))
    targets_BND = torch.randn(*patches_BNP.shape[:2], config.model.width, generator=torch.Generator().manual_seed(1))
    targets_BND = targets_BND.to(device)
    loss = students(patches_BNP.to(dtype), visible_BMK, targets_BND, targets_BND[:, 0]).total
    gradients = torch.autograd.grad(loss, list(students.parameters()))
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in (loss, *gradients)])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _seconds(work: Callable[[], object], device: str) -> float:
    """Return the median seconds of a call, after some warm-up calls."""
    taken = []
    for number in range(WARM_UP[device] + TIMED[device]):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP[device]:
            taken.append(time.perf_counter() - started)
    return median(taken)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _ram_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def main() -> None:
    """Parse the command line, compute one part, and print it."""
    parser = argparse.ArgumentParser(prog="tools/bench/gpu_parts.py", description=__doc__)
    parser.add_argument("part", choices=("machine", "parity", "gemm", "step"))
    parser.add_argument("--cpu", action="store_true", help="on the CPU, at a tiny size")
    parser.add_argument("--micro-batch", type=int, default=1, help="clips in a step")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that replace those of the step's configuration",
    )
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    parts = {"machine": machine, "parity": parity, "gemm": gemm}
    found = (
        step(device, args.micro_batch, args.cpu, args.overrides) if args.part == "step" else parts[args.part](device)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
