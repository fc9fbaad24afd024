"""The teacher's weights: an exponential moving average of the student's, in fp32 in any training precision.

Each rank averages the stretches of the encoder whose master weights it holds (partitions.py), so stage 3 gathers no
student, and no work is done twice. The averages are then sent to every rank's teacher module, whose weights have the
training precision; autocast would otherwise round them in every micro-batch.

With W ranks the averages cost 4 / W bytes per parameter and rank, the teacher 4 bytes in fp32 and 2 in bf16 and fp16.
On one rank in fp32 they are the teacher's own weights.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from asda.config.model import EmaConfig
from asda.engine.partitions import CHUNK, Fragment, Stretch, fragments, gathered_layout, read_stretch, whole

PREFIX = "encoder."  # of the followed parameters, in the module that is trained


class Ema:
    """The averages that this rank keeps, and the teacher that all ranks have.

    Args:
        engine: DeepSpeed's, for a module whose part `encoder` is followed.
        teacher: a module like that part, in fp32, the same on all ranks; the averages begin with its weights.
        dtype: type of the teacher's parameters from now on; its buffers do not change.
    """

    def __init__(self, engine: Any, teacher: nn.Module, dtype: torch.dtype):
        self._engine, self._teacher = engine, teacher
        self._followed = [f for f in fragments(engine) if f.name.startswith(PREFIX)]
        self._layout = gathered_layout([_without_prefix(f) for f in self._followed])
        self._parameters = dict(teacher.named_parameters())
        shared = dist.get_world_size() == 1 and dtype == torch.float32
        self.averages = [self._flat(s).to(f.master.device) for s, f in zip(self._mine, self._followed, strict=True)]
        if not shared:
            self.averages = [average.clone() for average in self.averages]
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(dtype)

    @property
    def _mine(self) -> list[Stretch]:
        return self._layout[dist.get_rank()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Follow the current master weights. All ranks call this together."""
        ema_update(self.averages, [fragment.master for fragment in self._followed], decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Send the averages to every rank's teacher, rounded to its precision. All ranks call this together."""
        if dist.get_world_size() == 1:
            for stretch, average in zip(self._mine, self.averages, strict=True):
                own = self._flat(stretch)
                if own.data_ptr() != average.data_ptr():
                    own.copy_(average)
            return
        dtype, device = next((p.dtype, p.device) for p in self._parameters.values())
        for first, last in self._rounds():
            mine = torch.zeros(last - first, dtype=dtype, device=device)
            for place, _, values in _overlaps(self._mine, first, last, self.averages):
                mine[place : place + values.numel()] = values
            everyones = torch.empty(dist.get_world_size() * len(mine), dtype=dtype, device=device)
            dist.all_gather_into_tensor(everyones, mine)
            for theirs, values in zip(self._layout, everyones.chunk(dist.get_world_size()), strict=True):
                for place, stretch, _ in _overlaps(theirs, first, last):
                    self._flat(stretch).copy_(values[place : place + stretch.size])

    def weights(self, everywhere: bool = False) -> dict[str, Tensor]:
        """Return the whole teacher in fp32, on the first rank or on all; {} elsewhere. All ranks call this together."""
        stretches = [fragment.stretch for fragment in self._followed]
        found = whole(stretches, self.averages, self._engine, everywhere)
        return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take the averages from teacher.safetensors, saved by any number of ranks."""
        with safe_open(path, framework="pt") as file:
            for stretch, average in zip(self._mine, self.averages, strict=True):
                average.copy_(read_stretch(file, path, stretch))
        self.publish()

    def _flat(self, stretch: Stretch) -> Tensor:
        """Return a stretch of the teacher's own weights, as a view."""
        return self._parameters[stretch.name].data.view(-1)[stretch.start : stretch.start + stretch.size]

    def _rounds(self) -> list[tuple[int, int]]:
        """Return where the exchanges begin and end, in elements of every rank's stretches laid end to end."""
        longest = max(sum(stretch.size for stretch in theirs) for theirs in self._layout)
        return [(first, min(first + CHUNK, longest)) for first in range(0, longest, CHUNK)]


def _without_prefix(fragment: Fragment) -> Stretch:
    return fragment.stretch._replace(name=fragment.name.removeprefix(PREFIX))


def _overlaps(stretches: list[Stretch], first: int, last: int, pieces: list[Tensor] | None = None):
    """Yield the parts of stretches laid end to end that lie in [first, last): (offset from first, part, its values)."""
    offset = 0
    for number, stretch in enumerate(stretches):
        begin, end = max(offset, first), min(offset + stretch.size, last)
        if begin < end:
            part = Stretch(stretch.name, stretch.start + begin - offset, end - begin)
            values = pieces[number][begin - offset : end - offset] if pieces is not None else torch.empty(0)
            yield begin - first, part, values
        offset += stretch.size


def ema_decay(config: EmaConfig, step: int) -> float:
    """Return the teacher's decay after update number `step` (the first is 1): linear to anneal_steps, then constant."""
    remaining = max(0.0, 1 - step / config.anneal_steps)
    return config.end_decay - (config.end_decay - config.decay) * remaining


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], followed: Iterable[Tensor], decay: float) -> None:
    """Set averages to decay * averages + (1 - decay) * followed, in place: fp32 averages of tensors of any dtype."""
    # One fused call; torch exports the _foreach functions to its own optimizers alone, and pyright knows it.
    torch._foreach_lerp_(list(averages), [tensor.float() for tensor in followed], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
