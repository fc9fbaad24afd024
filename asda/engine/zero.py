"""DeepSpeed, as this project uses it: processes, device, the engine's dictionary, steps that nothing can poison.

A step is applied on all ranks or on none: guarded() makes a loss without a value into gradients without a value, and
whoever finds those among the gradients of all ranks skips the update. DeepSpeed does that in all cases but fp32 without
ZeRO; there CheckedAdamW does.

With weights in bf16 or fp16 the gradient of a micro-batch has their precision. What several micro-batches and several
ranks add up to is fp32 in stages 1 to 3; in stage 0 micro-batches add up in the precision of the weights, because
DeepSpeed has nothing else there, and ranks in fp32.
"""

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from asda.config.run import Config, OptimizerConfig
from asda.engine.partitions import fragments, set_masters, start_moments, whole
from asda.engine.processes import Processes
from asda.errors import UserError

# Elements of gradients that travel at once. Stages 1 to 3 keep a buffer of so many; of DeepSpeed's 5e8 it has 2 GB.
BUCKET = 1 << 25


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


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that clips, and leaves everything as it is when the gradient's norm has no value.

    For fp32 without ZeRO, where DeepSpeed checks nothing. It reads `overflow` and `_global_grad_norm` as of its own.
    """

    overflow = False

    def __init__(self, *args: Any, clip: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update, or none."""
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)
        if not self.overflow:
            if self._clip:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
            super().step()


def make_engine(config: Config, model: nn.Module, lr_scales: dict[str, float], world_size: int):
    """Wrap a module for ZeRO training with AdamW; one parameter group for each lr scale.

    The master weights are the module's weights bit for bit, whatever the training precision, and Adam stands at step 0.

    Raises:
        UserError: this machine does not compute in config.engine.precision.
    """
    accelerator = get_accelerator()
    assert accelerator is not None
    if config.engine.precision == "fp16" and not accelerator.is_fp16_supported():
        raise UserError("engine.precision is fp16, in which this machine does not compute; use bf16 or fp32")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(lr_scales.get(name, 1.0), []).append(parameter)
    settings, low_precision = config.optimizer, config.engine.precision != "fp32"
    given = [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]
    # lr 0, because one of DeepSpeed's optimizers takes a step in its constructor, and weight decay would move weights.
    options = {
        "lr": 0.0,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "fused": True,
    }
    if low_precision or config.engine.zero_stage:
        optimizer = torch.optim.AdamW(given, **options)
    else:
        optimizer = CheckedAdamW(given, clip=settings.clip, **options)
    # DeepSpeed rounds the weights to the training precision first and makes the master weights of that.
    initial = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters() if low_precision}
    with redirect_stdout(StringIO()):  # where it would tell of its memory at every start
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_dict(config, world_size))
    start_moments(engine)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        _refuse_squares_beyond_fp32(engine.optimizer)
    if isinstance(engine.optimizer, BF16_Optimizer):
        _begin_sums_with_the_first_gradient(engine.optimizer)
    if initial:
        set_masters(engine, initial)
    if world_size == 1 and isinstance(engine.optimizer, BF16_Optimizer | FP16_UnfusedOptimizer | CheckedAdamW):
        engine.enable_backward_allreduce = False  # spares two copies of all gradients
    return engine


def _refuse_squares_beyond_fp32(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Have stage 3 refuse what the other stages refuse: finite gradients whose squares Adam cannot hold in fp32.

    It takes their norm in fp64, finds it finite, and without clipping leaves infinite second moments for good.
    """
    norms, largest = optimizer._get_norm_groups, torch.finfo(torch.float32).max
    optimizer._get_norm_groups = lambda: [
        torch.where(norm.double().square() > largest, math.inf, norm) for norm in map(torch.as_tensor, norms())
    ]


def _begin_sums_with_the_first_gradient(optimizer: BF16_Optimizer) -> None:
    """Have bf16 stage 1 write an update's first gradients over its fp32 sums, and add only the others to them.

    It would set the sums to zero, twice, and add an fp32 copy of each gradient: 0.07 s of a step of ASDA-base on two
    cores. `has` tells which sums are of this update.
    """
    sums, has = optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients

    @torch.no_grad()
    def add(lp: nn.Parameter, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        total = sums[group_idx][param_idx]
        gradient = lp.grad.view(total.shape)
        total.add_(gradient) if has[group_idx][param_idx] else total.copy_(gradient)
        has[group_idx][param_idx] = True

    def forget() -> None:
        for of_group in has:
            of_group[:] = [False] * len(of_group)

    def zero_where_no_gradient_came(clear_lp_grads: bool = False) -> None:
        for of_group, its_sums in zip(has, sums, strict=True):
            for number in (number for number, came in enumerate(of_group) if not came):
                its_sums[number].zero_()

    optimizer._update_hp_grad = add
    optimizer.clear_hp_grads = forget
    optimizer.update_hp_grads = zero_where_no_gradient_came  # DeepSpeed calls it after a backward, before the exchange


def guarded(loss: Tensor) -> Tensor:
    """The loss, bit for bit; where it is infinite or nan, one whose gradients are nan."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def was_applied(engine: Any) -> bool:
    """Whether the last engine.step() moved the weights; the same on all ranks."""
    return engine.was_step_applied()


def set_learning_rate(engine: Any, rate_of: Callable[[float], float]) -> None:
    """Set the rate of every parameter group from its scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate_of(group["lr_scale"])


def gradient_norm(engine: Any) -> float:
    """The norm of the last update's gradient over all parameters, before clipping; nan where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def full_weights(engine: Any, everywhere: bool = False) -> dict[str, Tensor]:
    """Every parameter whole, in fp32 from the master weights, on the first rank or on all; {} elsewhere.

    On one rank they are views, which the next step changes; otherwise copies on the CPU. All ranks call this together.
    """
    held = fragments(engine)
    return whole([fragment.stretch for fragment in held], [fragment.master for fragment in held], engine, everywhere)


def replicas_differ(engine: Any, teacher: nn.Module | None, processes: Processes) -> str | None:
    """What differs between weights that all ranks should have alike, in a sentence; None when nothing does.

    Compared are hashes of the weights of the training precision, which stage 3 does not replicate, and the teacher's.
    All ranks call this together.
    """
    modules = {"": engine.module} if engine.zero_optimization_stage() < 3 else {}
    if teacher is not None:
        modules["teacher "] = teacher
    named = [(kind + name, p) for kind, module in modules.items() for name, p in module.named_parameters()]
    mine = torch.tensor([_hash(p) for _, p in named], dtype=torch.int64, device=processes.device)
    everyones = [torch.empty_like(mine) for _ in range(processes.world_size)]
    dist.all_gather(everyones, mine)
    hashes_RP = torch.stack(everyones).cpu()
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
    """The rate of update `step` (0 is the first): linear from 0 to the peak, then as config.schedule says.

    A cosine ends at the floor. In steps the peak is multiplied by step_decay.factor at update `start` and again every
    `every` updates, down to the floor.

    Args:
        config: the schedule.
        step: updates before this one.
        scale: of the layer: its peak is scale * lr. What its floor is, config.lr_floor says.
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
