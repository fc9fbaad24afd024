"""Which part of the fp32 weights and of Adam's moments this rank holds, whatever the precision and the ZeRO stage.

    precision, stage        optimizer of DeepSpeed         what a rank holds
    fp32, 0                 none, AdamW itself             everything
    bf16 or fp16, 0         FP16_UnfusedOptimizer          everything, beside the weights of the training precision
    bf16, 1                 BF16_Optimizer                 an equal stretch of all parameters laid end to end
    others, 1 and 2         DeepSpeedZeroOptimizer         the same
    3                       DeepSpeedZeroOptimizer_Stage3  an equal stretch of every parameter

A checkpoint names what it holds by parameter and offset, so any number of ranks in any stage can read it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asda.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "adam_step"
# What DeepSpeed's two kinds of loss scalers remember; a kind that lacks one of them leaves it out.
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
CHUNK = 1 << 24  # elements that travel between ranks at once


class Stretch(NamedTuple):
    """Where a fragment lies: elements [start, start + size) of the flattened parameter."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter in fp32 and its moments: flat views of the optimizer's own tensors, never copies."""

    name: str
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stretch(self) -> Stretch:
        """Where it lies in its parameter."""
        return Stretch(self.name, self.start, self.master.numel())


class _Held(NamedTuple):
    stretch: Stretch
    tensor: Tensor  # that the optimizer updates: a parameter, or a partition of many
    offset: int  # of the stretch in that tensor


def fragments(engine: Any) -> list[Fragment]:
    """What this rank answers for: over all ranks every element of every parameter exactly once.

    Where every rank holds everything (stage 0), whole parameters are dealt out.
    """
    held = list(_held(engine))
    if not engine.zero_optimization_stage():
        owners = dealt_out([item.stretch.size for item in held], dist.get_world_size())
        held = [item for item, owner in zip(held, owners, strict=True) if owner == dist.get_rank()]
    return [_fragment(engine, item) for item in held]


def start_moments(engine: Any) -> None:
    """Give Adam its state before the first step, at step 0; engine.make_engine calls it.

    torch makes the state in the first step. One of DeepSpeed's optimizers takes a step in its constructor, which would
    leave Adam's counter, and so its bias correction, one ahead of the others.
    """
    for tensor in {id(item.tensor): item.tensor for item in _held(engine)}.values():
        fresh = {key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS}
        engine.basic_optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device), **fresh}


def set_masters(engine: Any, weights: dict[str, Tensor]) -> None:
    """Set all master weights, and the weights of the training precision with them, from whole tensors."""
    with torch.no_grad():
        for item in _held(engine):
            flat = weights[item.stretch.name].view(-1)[item.stretch.start :][: item.stretch.size]
            _fragment(engine, item).master.copy_(flat)
    _publish(engine)


def optimizer_file(engine: Any) -> tuple[str, dict[str, Tensor]]:
    """The stem of this rank's file in a checkpoint, and what it holds: moments as live views, and a few numbers."""
    tensors = {}
    for fragment in fragments(engine):
        for key in MOMENTS:
            tensors[f"{key}:{fragment.start}:{fragment.name}"] = getattr(fragment, key)
    tensors[STEP] = _adam_states(engine)[0]["step"].detach().cpu().clone()
    tensors |= {field: torch.tensor(value, dtype=torch.float64) for field, value in _loss_scaler(engine).items()}
    return f"optimizer-{dist.get_rank():05d}-of-{dist.get_world_size():05d}", tensors


def restore(engine: Any, folder: Path) -> None:
    """Continue from model.safetensors and optimizer-*.safetensors, of any stage and any number of ranks.

    Master weights, moments, Adam's counter, fp16's loss scale and the weights of the training precision are as they
    were. All ranks call this together.

    Raises:
        UserError: the files cannot be read, or lack something.
    """
    paths = sorted(folder.glob("optimizer-*.safetensors"))
    if not paths:
        raise UserError(f"{folder} holds no optimizer-*.safetensors; continue from another checkpoint")
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
    """Put flat pieces of all ranks together again.

    Args:
        stretches: where this rank's pieces lie.
        pieces: fp32, one for each stretch.
        engine: knows the shapes and the device that communicates.
        everywhere: whether every rank needs the result; otherwise only the first gets it and the others {}.

    Returns:
        Parameter name -> whole tensor: on one rank views of the pieces where those are whole, else new ones on the CPU.
    """
    shapes = shapes_of(engine)
    if dist.get_world_size() == 1:
        found = {
            stretch.name: piece.view(shapes[stretch.name]) for stretch, piece in zip(stretches, pieces, strict=True)
        }
        return {name: found[name] for name in shapes if name in found}
    takes = everywhere or dist.get_rank() == 0
    layout = gathered_layout(stretches)
    result = {s.name: torch.empty(shapes[s.name]) for some in layout for s in some} if takes else {}
    for source, theirs in enumerate(layout):
        if everywhere or source:  # the first rank takes its own pieces without sending them
            mine = pieces if source == dist.get_rank() else None
            for stretch, values in _sent(source, theirs, mine, engine.device, everywhere):
                result[stretch.name].view(-1)[stretch.start : stretch.start + stretch.size] = values
        elif takes:
            for stretch, piece in zip(stretches, pieces, strict=True):
                result[stretch.name].view(-1)[stretch.start : stretch.start + stretch.size] = piece
    return {name: result[name] for name in shapes if name in result}


def shapes_of(engine: Any) -> dict[str, torch.Size]:
    """The shape of every parameter, whole."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.module.named_parameters()}


def gathered_layout(stretches: list[Stretch]) -> list[list[Stretch]]:
    """Every rank's stretches, by rank. All ranks call this together."""
    layout: list[list[Stretch]] = [[]] * dist.get_world_size()
    dist.all_gather_object(layout, stretches)
    return layout


def dealt_out(sizes: list[int], num_ranks: int) -> list[int]:
    """A rank for each size, so that the sums come out about even: the largest goes first, to the least loaded rank."""
    loads, owners = [0] * num_ranks, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners


def read_stretch(file: Any, path: Path, stretch: Stretch) -> Tensor:
    """A stretch of a tensor in an open safetensors file, flat; reads only the rows that it touches."""
    if stretch.name not in set(file.keys()):
        raise UserError(f"{path} lacks {stretch.name}; it is not of this model, continue from another checkpoint")
    rows = file.get_slice(stretch.name)
    shape = rows.get_shape()
    if not shape:
        return file.get_tensor(stretch.name).view(-1)
    per_row = torch.Size(shape[1:]).numel()
    first, last = stretch.start // per_row, -(-(stretch.start + stretch.size) // per_row)
    values = rows[first:last].reshape(-1)
    return values[stretch.start - first * per_row :][: stretch.size]


def _held(engine: Any) -> Iterator[_Held]:
    """Everything that this rank's optimizer updates, by parameter."""
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
    """The state of every tensor that Adam updates; all count the same steps."""
    return list(engine.basic_optimizer.state.values())


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def _loss_scaler(engine: Any) -> dict[str, float]:
    """fp16's loss scale and what decides its next change; {} in other precisions."""
    if not engine.fp16_enabled():
        return {}
    scaler = _scaler(engine)
    return {field: float(getattr(scaler, field)) for field in LOSS_SCALER_FIELDS if hasattr(scaler, field)}


def _publish(engine: Any) -> None:
    """Bring the weights of the training precision, on all ranks, to the master weights."""
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
        raise UserError(f"cannot read {path} ({error}); continue from another checkpoint") from None


def _saved_moments(files: list[Any]) -> dict[tuple[str, str], list[tuple[int, int, str, Any]]]:
    """(moment, parameter) -> (start, size, key, file) of all pieces that were saved."""
    found: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = {}
    for file in files:
        for text in list(file.keys()):
            if ":" in text:
                key, start, name = text.split(":", 2)
                (size,) = file.get_slice(text).get_shape()
                found.setdefault((key, name), []).append((int(start), size, text, file))
    return found


def _fill(target: Tensor, stretch: Stretch, pieces: list[tuple[int, int, str, Any]], folder: Path) -> None:
    """Copy what overlaps a stretch out of saved pieces, and see that nothing of it is missing."""
    filled = 0
    for start, size, key, file in pieces:
        first, last = max(start, stretch.start), min(start + size, stretch.start + stretch.size)
        if first < last:
            target[first - stretch.start : last - stretch.start] = file.get_slice(key)[first - start : last - start]
            filled += last - first
    if filled != stretch.size:
        raise UserError(
            f"{folder} holds the optimizer's state for {filled} of {stretch.size} elements of {stretch.name}; "
            "continue from another checkpoint"
        )


def _sent(
    source: int, stretches: list[Stretch], pieces: list[Tensor] | None, device: torch.device, everywhere: bool
) -> Iterator[tuple[Stretch, Tensor]]:
    """The pieces of one rank, in chunks, to all ranks or to the first; yields what arrives at this one."""
    rank = dist.get_rank()
    for number, stretch in enumerate(stretches):
        for begin in range(0, stretch.size, CHUNK):
            size = min(CHUNK, stretch.size - begin)
            if pieces is not None:
                values = pieces[number][begin : begin + size].to(device).contiguous()
            else:
                values = torch.empty(size, device=device)
            if everywhere:
                dist.broadcast(values, source)
            elif rank == source:
                dist.send(values, 0)
                continue
            elif rank == 0:
                dist.recv(values, source)
            else:
                continue
            yield Stretch(stretch.name, stretch.start + begin, size), values
