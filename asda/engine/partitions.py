"""Which part of the fp32 weights and of Adam's moments this rank holds, in any precision and ZeRO stage.

    precision, stage        optimizer of DeepSpeed         what a rank holds
    fp32, 0                 none, AdamW itself             everything
    bf16 or fp16, 0         FP16_UnfusedOptimizer          everything, beside the weights of the training precision
    bf16, 1                 BF16_Optimizer                 an equal stretch of all parameters laid end to end
    others, 1 and 2         DeepSpeedZeroOptimizer         the same
    3                       DeepSpeedZeroOptimizer_Stage3  an equal stretch of every parameter

A checkpoint names what it holds by parameter and offset, so any number of ranks in any stage can read it.

This file alone uses what DeepSpeed keeps private. It is written for version 0.19.8, which pyproject.toml pins. Before
another version is taken, look up each name here, and run tests/engine:

    name                                                    what it is for
    ops.__compatible_ops__ (changed)                        use_gloo: no shared-memory exchange on CPUs
    grad_position, get_param_id, ds_numel, ds_shape,        where stage 3 keeps the master weights of a parameter
    fp32_partitioned_groups_flat
    _hp_mapping, fp32_groups_flat_partition (bf16),         the same in stages 1 and 2
    single_partition_of_fp32_groups (others)
    fp16_groups, fp32_groups                                weights and their master weights in stage 0
    engine.basic_optimizer.state                            Adam's moments and step
    loss_scale_config or loss_scaler                        fp16's loss scale
    update_lp_params; _partition_all_parameters, _post_step, round the master weights to the training precision
    _reassign_or_swap_out_partitioned_parameters (stage 3)
    _get_norm_groups (replaced)                             stage 3 refuses gradients whose squares overflow
    fp32_groups_gradients, fp32_groups_has_gradients;       bf16 stage 1 adds up gradients without copies
    _update_hp_grad, clear_hp_grads, update_hp_grads (replaced)
    enable_backward_allreduce (changed)                     no copy of all gradients on a single rank
    overflow, _global_grad_norm                             what DeepSpeed reads of CheckedAdamW
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from asda.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "adam_step"
# State of DeepSpeed's two kinds of loss scalers; either kind lacks some of it.
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
CHUNK = 1 << 24  # elements that travel between ranks at once


class Stretch(NamedTuple):
    """Elements [start, start + size) of a flattened parameter."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter in fp32, and its moments: flat views of the optimizer's own tensors, not copies."""

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stretch(self) -> Stretch:
        """Return its range in its parameter."""
        return Stretch(self.name, self.start, self.master.numel())


class _Held(NamedTuple):
    stretch: Stretch
    tensor: Tensor  # updated by the optimizer: one parameter, or a partition of many
    offset: int  # of the stretch in that tensor


def fragments(engine: Any) -> list[Fragment]:
    """Return this rank's fragments; all ranks together have every element of every parameter exactly once.

    In stage 0, where every rank holds everything, whole parameters are dealt out.
    """
    held = list(_held(engine))
    if not engine.zero_optimization_stage():
        owners = dealt_out([item.stretch.size for item in held], dist.get_world_size())
        held = [item for item, owner in zip(held, owners, strict=True) if owner == dist.get_rank()]
    return [_fragment(engine, item) for item in held]


class CheckedAdamW(torch.optim.AdamW):
    """AdamW that clips, and changes nothing if the gradient's norm is not finite.

    For fp32 without ZeRO, where DeepSpeed checks nothing; it reads `overflow` and `_global_grad_norm`.
    """

    overflow = False

    def __init__(self, *args: Any, clip: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update, or none."""
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)
        if not self.overflow:
            if self._clip:
                nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
            super().step()


def use_gloo() -> None:
    """Keep DeepSpeed from compiling a shared-memory exchange for CPUs, which takes a C++ compiler and 30 s.

    Its processes would spin without a timeout when a peer has died; gloo ends with an error.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare(engine: Any, initial: dict[str, Tensor]) -> None:
    """Make a new engine ready for its first step.

    Args:
        engine: as deepspeed.initialize returns it.
        initial: whole master weights; empty if the engine has them already, in fp32.
    """
    _start_moments(engine)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        _refuse_squares_beyond_fp32(engine.optimizer)
    if isinstance(engine.optimizer, BF16_Optimizer):
        _begin_sums_with_the_first_gradient(engine.optimizer)
    if initial:
        with torch.no_grad():
            for item in _held(engine):
                flat = initial[item.stretch.name].view(-1)[item.stretch.start :][: item.stretch.size]
                _fragment(engine, item).master.copy_(flat)
        _publish(engine)
    partitions_gradients = isinstance(engine.optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3)
    if dist.get_world_size() == 1 and not partitions_gradients:
        engine.enable_backward_allreduce = False  # spares two copies of all gradients


def _start_moments(engine: Any) -> None:
    """Give Adam its state before the first step, at step 0.

    torch makes the state in the first step. One of DeepSpeed's optimizers takes a step in its constructor, which would
    leave Adam's counter, and so its bias correction, one ahead of the others.
    """
    for tensor in {id(item.tensor): item.tensor for item in _held(engine)}.values():
        fresh = {key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS}
        engine.basic_optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device), **fresh}


def _refuse_squares_beyond_fp32(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let stage 3 refuse what the other stages refuse: finite gradients whose squares overflow in Adam's fp32.

    It takes their norm in fp64 and finds it finite. Without clipping, second moments would stay infinite for ever.
    """
    norms, largest = optimizer._get_norm_groups, torch.finfo(torch.float32).max
    optimizer._get_norm_groups = lambda: [
        torch.where(norm.double().square() > largest, math.inf, norm) for norm in map(torch.as_tensor, norms())
    ]


def _begin_sums_with_the_first_gradient(optimizer: BF16_Optimizer) -> None:
    """Let bf16 stage 1 copy the first gradients of an update into its fp32 sums, and add only the later ones.

    It would set the sums to zero twice, and add an fp32 copy of each gradient: 0.07 s in a step of ASDA-base on two
    cores. `has` tells which sums belong to this update.
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


def optimizer_file(engine: Any) -> tuple[str, dict[str, Tensor]]:
    """Return the stem of this rank's file in a checkpoint, and its tensors; the moments are live views."""
    tensors = {}
    for fragment in fragments(engine):
        for key in MOMENTS:
            tensors[f"{key}:{fragment.start}:{fragment.name}"] = getattr(fragment, key)
    tensors[STEP] = _adam_states(engine)[0]["step"].detach().cpu().clone()
    tensors |= {field: torch.tensor(value, dtype=torch.float64) for field, value in _loss_scaler(engine).items()}
    return f"optimizer-{dist.get_rank():05d}-of-{dist.get_world_size():05d}", tensors


def restore(engine: Any, folder: Path) -> None:
    """Restore model.safetensors and optimizer-*.safetensors, saved in any stage by any number of ranks.

    This restores master weights, moments, Adam's counter, fp16's loss scale and the weights of the training precision.
    All ranks call it together.

    Raises:
        UserError: files are unreadable or incomplete.
    """
    paths = sorted(folder.glob("optimizer-*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no optimizer-*.safetensors; resume from another checkpoint")
    with ExitStack() as stack, torch.no_grad():
        weights = stack.enter_context(_opened(folder / "model.safetensors"))
        states = [stack.enter_context(_opened(path)) for path in paths]
        saved = _saved_moments(states)
        for item in _held(engine):
            fragment = _fragment(engine, item)
            fragment.master.copy_(read_stretch(weights, folder / "model.safetensors", item.stretch))
            for key in MOMENTS:
                _fill(getattr(fragment, key), item.stretch, saved.get((key, item.stretch.name), []), folder)
        for state in _adam_states(engine):
            state["step"].copy_(states[0].get_tensor(STEP))
        for field in _loss_scaler(engine):
            if field in set(states[0].keys()):
                value = states[0].get_tensor(field).item()
                setattr(_scaler(engine), field, value if field == "cur_scale" else int(value))
    _publish(engine)


def whole(stretches: list[Stretch], pieces: list[Tensor], engine: Any, everywhere: bool = False) -> dict[str, Tensor]:
    """Join flat pieces of all ranks. All ranks call this together.

    Args:
        stretches: where this rank's pieces lie.
        pieces: fp32, one for each stretch.
        engine: knows the shapes and the device that communicates.
        everywhere: whether every rank gets the result; otherwise only the first does, and the others get {}.

    Returns:
        Parameter name -> whole tensor: views of the pieces on one rank, new tensors on the CPU on several.
    """
    shapes = _shapes(engine)
    if dist.get_world_size() == 1:
        pairs = zip(stretches, pieces, strict=True)
        found = {stretch.name: piece.view(shapes[stretch.name]) for stretch, piece in pairs}
    else:
        layout = gathered_layout(stretches)
        takes = everywhere or dist.get_rank() == 0
        found = {s.name: torch.empty(shapes[s.name]) for theirs in layout for s in theirs} if takes else {}
        for source, theirs in enumerate(layout):
            for stretch, values in _sent(source, theirs, pieces, engine.device):
                if takes:
                    found[stretch.name].view(-1)[stretch.start : stretch.start + stretch.size] = values
    return {name: found[name] for name in shapes if name in found}


def _sent(
    source: int, stretches: list[Stretch], pieces: list[Tensor], device: torch.device
) -> Iterator[tuple[Stretch, Tensor]]:
    """Send the pieces of one rank to all, in chunks; yield where each lies, and its values."""
    is_mine = dist.get_rank() == source
    for number, stretch in enumerate(stretches):
        for begin in range(0, stretch.size, CHUNK):
            size = min(CHUNK, stretch.size - begin)
            values = pieces[number][begin : begin + size] if is_mine else torch.empty(size, device=device)
            values = values.to(device).contiguous()
            dist.broadcast(values, source)
            yield Stretch(stretch.name, stretch.start + begin, size), values


def _shapes(engine: Any) -> dict[str, torch.Size]:
    """Return the whole shape of every parameter."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def gathered_layout(stretches: list[Stretch]) -> list[list[Stretch]]:
    """Return every rank's stretches, by rank. All ranks call this together."""
    layout: list[list[Stretch]] = [[]] * dist.get_world_size()
    dist.all_gather_object(layout, stretches)
    return layout


def dealt_out(sizes: list[int], num_ranks: int) -> list[int]:
    """Return a rank for each size, so that sums are about even: the largest goes first, to the least loaded rank."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners


def read_stretch(file: Any, path: Path, stretch: Stretch) -> Tensor:
    """Read a stretch of a tensor in an open safetensors file, flat, and only the rows that it needs."""
    if stretch.name not in set(file.keys()):
        raise UserError(f"{path} has no {stretch.name}, so it belongs to another model; resume from another checkpoint")
    rows = file.get_slice(stretch.name)
    shape = rows.get_shape()
    if not shape:
        return file.get_tensor(stretch.name).view(-1)
    per_row = torch.Size(shape[1:]).numel()
    first, last = stretch.start // per_row, -(-(stretch.start + stretch.size) // per_row)
    values = rows[first:last].reshape(-1)
    return values[stretch.start - first * per_row :][: stretch.size]


def _held(engine: Any) -> Iterator[_Held]:
    """Yield everything that this rank's optimizer updates, by parameter."""
    optimizer = engine.optimizer
    named = list(engine.module.named_parameters())
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for name, parameter in named:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * size
            size = min(size, parameter.ds_numel - start)  # the last ranks hold padding, or nothing else
            if size > 0:
                yield _Held(Stretch(name, start, size), optimizer.fp32_partitioned_groups_flat[group], offset)
    elif isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        flat = (
            optimizer.fp32_groups_flat_partition
            if isinstance(optimizer, BF16_Optimizer)
            else optimizer.single_partition_of_fp32_groups
        )
        for name, parameter in named:
            held = parameter._hp_mapping
            if held is not None:
                stretch = Stretch(name, held.lp_fragment_address.start, held.lp_fragment_address.numel)
                yield _Held(stretch, flat[held.param_group_index], held.hp_fragment_address.start)
    else:
        masters = {id(parameter): parameter for _, parameter in named}
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                masters |= {id(a): b for a, b in zip(low, high, strict=True)}
        for name, parameter in named:
            yield _Held(Stretch(name, 0, parameter.numel()), masters[id(parameter)], 0)


def _fragment(engine: Any, held: _Held) -> Fragment:
    state = engine.basic_optimizer.state[held.tensor]
    views = [
        t.detach().view(-1).narrow(0, held.offset, held.stretch.size) for t in (held.tensor, *map(state.get, MOMENTS))
    ]
    return Fragment(held.stretch.name, held.stretch.start, *views)


def _adam_states(engine: Any) -> list[dict[str, Tensor]]:
    """Return the state of every tensor that Adam updates; all count the same steps."""
    return list(engine.basic_optimizer.state.values())


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def _loss_scaler(engine: Any) -> dict[str, float]:
    """Return the state of fp16's loss scale; {} in other precisions."""
    if not engine.fp16_enabled():
        return {}
    scaler = _scaler(engine)
    return {field: float(getattr(scaler, field)) for field in LOSS_SCALER_FIELDS if hasattr(scaler, field)}


def _publish(engine: Any) -> None:
    """Round the master weights to the weights of the training precision, on all ranks."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer._post_step(set())  # gathers the small parameters that every rank keeps
    elif isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master.data)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); resume from another checkpoint") from None


def _saved_moments(files: list[Any]) -> dict[tuple[str, str], list[tuple[int, int, str, Any]]]:
    """Map (moment, parameter) to (start, size, key, file) of all saved pieces."""
    found: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = {}
    for file in files:
        for text in list(file.keys()):
            if ":" in text:
                key, start, name = text.split(":", 2)
                (size,) = file.get_slice(text).get_shape()
                found.setdefault((key, name), []).append((int(start), size, text, file))
    return found


def _fill(target: Tensor, stretch: Stretch, pieces: list[tuple[int, int, str, Any]], folder: Path) -> None:
    """Copy a stretch from the saved pieces that overlap it; raise UserError if some of it is missing."""
    filled = 0
    for start, size, key, file in pieces:
        first, last = max(start, stretch.start), min(start + size, stretch.start + stretch.size)
        if first < last:
            target[first - stretch.start : last - stretch.start] = file.get_slice(key)[first - start : last - start]
            filled += last - first
    if filled != stretch.size:
        raise UserError(
            f"{folder} has the optimizer's state for only {filled} of {stretch.size} elements of {stretch.name}; "
            "resume from another checkpoint"
        )
