"""DeepSpeed, as this project uses it: processes, device, the engine's dictionary, full weights out of partitions."""

import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from asda.config import Config, OptimizerConfig
from asda.errors import UserError


@dataclass(frozen=True)
class Processes:
    """Where a process stands among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def join_processes() -> Processes:
    """Join the processes that deepspeed, torchrun or SLURM's srun started; a single one when nobody did."""
    _complete_environment()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    # DeepSpeed would compile a shared-memory all-reduce for CPUs at first use (a C++ compiler, 30 s). Its processes
    # spin without a timeout when a peer has died; gloo needs no compiler and ends with an error.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        raise UserError(
            f"cannot open the port {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']} for the ranks to meet "
            f"({error}); is another run using it? give the launcher another --master_port"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _complete_environment() -> None:
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env.setdefault("RANK", env["SLURM_PROCID"])
        env.setdefault("WORLD_SIZE", env["SLURM_NTASKS"])
        env.setdefault("LOCAL_RANK", env["SLURM_LOCALID"])
        env.setdefault("LOCAL_WORLD_SIZE", env["SLURM_NTASKS_PER_NODE"])
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def micro_batch_of(config: Config, world_size: int) -> int:
    """Clips a rank takes at once: the largest divisor of its share of the batch within engine.micro_batch.

    Where clips are mixed it is even, so that no pair of neighbours is parted.
    """
    batch = config.optimizer.batch
    if batch % world_size:
        raise UserError(f"optimizer.batch {batch} must be a multiple of the number of ranks, {world_size}")
    share, together = batch // world_size, 2 if config.data.augment.mixup.alpha else 1
    if share % together:
        raise UserError(
            f"data.augment.mixup mixes neighbours, so optimizer.batch {batch} must be an even number of clips for each "
            f"of {world_size} ranks; use a batch of {batch + world_size}"
        )
    sizes = range(together, min(share, config.engine.micro_batch) + 1, together)
    return max(size for size in sizes if share % size == 0)


def deepspeed_dict(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, generated: nobody writes it by hand."""
    micro_batch = micro_batch_of(config, world_size)
    return {
        "train_batch_size": config.optimizer.batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.optimizer.batch // world_size // micro_batch,
        "gradient_clipping": config.optimizer.clip,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,  # the run log prints
    }


def make_engine(config: Config, model: nn.Module, lr_scales: dict[str, float], world_size: int):
    """Wrap a module for ZeRO training with AdamW; one parameter group for each lr scale."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(lr_scales.get(name, 1.0), []).append(parameter)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_dict(config, world_size))
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the rate of every parameter group, each by its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(engine: Any) -> float:
    """The norm of the last update's gradient over all parameters, before clipping; nan where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters on every rank while inside; without stage 3 they are whole anyway."""
    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        yield


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, in fp32 from the optimizer's master copy where there is one, on the CPU.

    All ranks must call this together.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        weights[name] = (parameter if master is None else master).detach().float().cpu().clone()
    return weights


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Average named numbers over all ranks."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of update `step` (0 is the first): linear from 0 to lr, then a cosine to min_lr at the end."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
