"""Train with DeepSpeed: its configuration, the engine, steps on all ranks or on none, whole weights, the learning rate.

guarded() turns a loss that is not finite into gradients of nan. DeepSpeed finds those among the gradients of all ranks
and skips the update everywhere. For fp32 without ZeRO, where it checks nothing, CheckedAdamW does.

With weights in bf16 or fp16 the gradient of a micro-batch has their precision. Micro-batches and ranks are added up in
fp32 in stages 1 to 3. In stage 0 DeepSpeed adds micro-batches in the precision of the weights, and ranks in fp32.
"""

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
import xxhash
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from asda.config.run import Config, OptimizerConfig
from asda.engine.partitions import CheckedAdamW, fragments, prepare, whole
from asda.engine.processes import Processes, from_all_ranks
from asda.errors import UserError

# Elements of gradients that ranks exchange at once. Stages 1 to 3 keep such a buffer; DeepSpeed's 5e8 need 2 GB.
BUCKET = 1 << 25


def micro_batch_of(config: Config, world_size: int) -> int:
    """Return how many clips a rank takes at once: the largest divisor of its share of the batch, at most micro_batch.

    With mixup it is even, so that both clips of a pair are in one micro-batch.
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
    """Generate DeepSpeed's own configuration."""
    micro_batch = micro_batch_of(config, world_size)
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": BUCKET}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    checked_by_us = engine.precision == "fp32" and not engine.zero_stage
    generated = {
        "train_batch_size": config.optimizer.batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.optimizer.batch // world_size // micro_batch,
        "gradient_clipping": 0.0 if checked_by_us else config.optimizer.clip,
        "bf16": {
            "enabled": engine.precision == "bf16",
            "check_grad_overflow": True,
            "immediate_grad_update": True,  # in stage 1 a bf16 gradient goes as soon as the fp32 sum has it
        },
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that one needs a compiler
        "communication_data_type": "fp32",  # DeepSpeed would round sums in fp32 to bf16 before ranks exchange them
        "steps_per_print": 1 << 62,  # the run log prints
    }
    if engine.zero_stage:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return generated


def make_engine(config: Config, model: nn.Module, lr_scales: dict[str, float], world_size: int):
    """Wrap a module for ZeRO training with AdamW; one parameter group for each lr scale.

    The master weights equal the module's weights bit for bit in any training precision, and Adam is at step 0.

    Raises:
        UserError: this machine cannot compute in config.engine.precision.
    """
    accelerator = get_accelerator()
    assert accelerator is not None
    if config.engine.precision == "fp16" and not accelerator.is_fp16_supported():
        raise UserError("engine.precision is fp16, in which this machine cannot compute; use bf16 or fp32")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(lr_scales.get(name, 1.0), []).append(parameter)
    settings, low_precision = config.optimizer, config.engine.precision != "fp32"
    given = [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]
    # lr 0: one of DeepSpeed's optimizers takes a step in its constructor, in which weight decay would change weights.
    options = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if low_precision or config.engine.zero_stage:
        optimizer = torch.optim.AdamW(given, fused=True, **options)
    else:
        optimizer = CheckedAdamW(given, clip=settings.clip, fused=True, **options)
    # DeepSpeed rounds the weights to the training precision, and makes the master weights of the rounded ones.
    initial = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters() if low_precision}
    with redirect_stdout(StringIO()):  # it would print about its memory at every start
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_dict(config, world_size))
    prepare(engine, initial)
    return engine


def guarded(loss: Tensor) -> Tensor:
    """Return the loss bit for bit if it is finite, else a loss whose gradients are nan."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def was_applied(engine: Any) -> bool:
    """Return whether the last engine.step() changed the weights; the same on all ranks."""
    return engine.was_step_applied()


def set_learning_rate(engine: Any, rate_of: Callable[[float], float]) -> None:
    """Set the learning rate of every parameter group from its lr scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate_of(group["lr_scale"])


def gradient_norm(engine: Any) -> float:
    """Return the norm of the last update's gradient before clipping; nan if DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def full_weights(engine: Any, everywhere: bool = False) -> dict[str, Tensor]:
    """Return every master weight whole, in fp32, on the first rank or on all; {} elsewhere.

    On one rank they are views, which the next step changes; otherwise copies on the CPU. All ranks call this together.
    """
    held = fragments(engine)
    return whole([fragment.stretch for fragment in held], [fragment.master for fragment in held], engine, everywhere)


def replicas_differ(engine: Any, teacher: nn.Module | None, processes: Processes) -> str | None:
    """Name what differs between weights that all ranks should have alike; return None if nothing does.

    Hashes are compared: of the weights in the training precision, which stage 3 does not replicate, and of the
    teacher's. All ranks call this together.
    """
    modules = {"": engine.module} if engine.zero_optimization_stage() < 3 else {}
    if teacher is not None:
        modules["teacher "] = teacher
    named = [(kind + name, p) for kind, module in modules.items() for name, p in module.named_parameters()]
    hashes_RP = torch.tensor(from_all_ranks([_hash(p) for _, p in named]), dtype=torch.int64)
    usual_P = hashes_RP.mode(0).values  # what most ranks have
    differs_RP = hashes_RP != usual_P
    if not differs_RP.any():
        return None
    ranks = differs_RP.any(1).nonzero().flatten().tolist()
    first = named[int(differs_RP.any(0).nonzero()[0])][0]
    which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    others = "most others" if processes.world_size > 2 else "the other rank"
    return f"the weights of {which} differ from those of {others}, first in {first}"


def _hash(parameter: Tensor) -> int:
    raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(raw.data) - (1 << 63)  # as a signed number


def learning_rate(config: OptimizerConfig, step: int, scale: float = 1.0) -> float:
    """Return the rate of update `step` (0 is the first): linear from 0 to the peak, then as config.schedule says.

    A cosine ends at the floor. In steps the peak is multiplied by step_decay.factor at update `start` and again every
    `every` updates, down to the floor.

    Args:
        config: the schedule.
        step: updates before this one.
        scale: of the layer, whose peak is scale * lr; config.lr_floor says what its floor is.
    """
    peak = config.lr * scale
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    floor = config.min_lr * scale if config.lr_floor == "scaled" else min(config.min_lr, peak)
    if config.step_decay:
        decays = max(0, (step - config.step_decay.start) // config.step_decay.every + 1)
        return max(floor, peak * config.step_decay.factor**decays)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
