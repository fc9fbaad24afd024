"""Throughput between two log lines: mean loss terms, clips per second, waiting for data, use of the machine, memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from asda.engine.processes import Processes

GIB = 2**30
KIB = 2**10
Item = TypeVar("Item")


class Throughput:
    """Sums of the steps since the last figures, on the device, so that nothing waits for the device in between.

    A step that was not applied (its loss or gradient was not finite, or fp16's scale was too large) takes time and is
    counted. Its terms stay out of the means: one nan would spoil them all.
    """

    def __init__(self, processes: Processes, flops_per_clip: int, gemm_rate: float, skipped_steps: int = 0):
        """Start the clock.

        Args:
            processes: all ranks.
            flops_per_clip: useful operations of a training step for one clip, from costs.network_costs.
            gemm_rate: operations per second of this rank's share of the machine, from costs.gemm_rate.
            skipped_steps: of the run so far.
        """
        self._processes, self._flops_per_clip, self._gemm_rate = processes, flops_per_clip, gemm_rate
        self.skipped_steps = skipped_steps  # of the run
        if processes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(processes.device)  # the matrices of gemm_rate are not the run's
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._of_step: dict[str, Tensor] = {}
        self._num_summed = self._num_in_step = 0  # micro-batches
        self._num_steps = self._num_clips = 0
        self._waited_s = 0.0
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of an evaluation or a save."""
        paused = time.monotonic()
        yield
        self._started += time.monotonic() - paused

    def wait_for(self, batches: Iterator[Item]) -> Item:
        """Return the next batch, and count how long it took to come."""
        asked = time.monotonic()
        item = next(batches)
        self._waited_s += time.monotonic() - asked
        return item

    def add(self, terms: dict[str, Tensor], num_clips: int) -> None:
        """Add a micro-batch of this rank to the step; terms are scalars, with the same names on all ranks."""
        for name, value in terms.items():
            value = value.detach().double()
            self._sums.setdefault(name, torch.zeros_like(value))
            self._of_step[name] = self._of_step.get(name, 0) + value
        self._num_in_step += 1
        self._num_clips += num_clips

    def end_step(self, *, applied: bool) -> None:
        """Count a step, and whether it changed the weights."""
        if applied:
            for name, value in self._of_step.items():
                self._sums[name] += value
            self._num_summed += self._num_in_step
        self.skipped_steps += not applied
        self._num_steps += 1
        self._num_in_step, self._of_step = 0, {}

    def figures(self) -> dict[str, float]:
        """Return the figures since the last call, over all ranks. All ranks call this together.

        Terms are means over the micro-batches of applied steps; nan if there was none. `tflop_per_s` counts useful
        operations of all ranks, and `gemm_share` relates them to what the ranks could do. `rss_gib` and `cuda_gib` are
        peaks since the start, of the rank that has the highest.
        """
        count = self._num_summed or float("nan")
        means = {name: value / count for name, value in zip(self._sums, _to_host(self._sums), strict=True)}
        elapsed_s = time.monotonic() - self._started  # after _to_host, which waited for the device
        clips_per_s, world_size = self._num_clips / elapsed_s, self._processes.world_size
        means["step_s"] = elapsed_s / max(1, self._num_steps)
        means["clips_per_s"] = clips_per_s * world_size
        means["tflop_per_s"] = clips_per_s * world_size * self._flops_per_clip / 1e12
        means["gemm_share"] = clips_per_s * self._flops_per_clip / self._gemm_rate
        means["data_wait_s"] = self._waited_s
        means["data_wait_share"] = self._waited_s / elapsed_s
        self._begin()
        means, peaks = self._over_ranks(means, dist.ReduceOp.SUM), self._over_ranks(self._peaks(), dist.ReduceOp.MAX)
        return {n: v / world_size for n, v in means.items()} | peaks | {"skipped_steps": self.skipped_steps}

    def _peaks(self) -> dict[str, float]:
        peaks = {"rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB}
        if self._processes.device.type == "cuda":
            peaks["cuda_gib"] = torch.cuda.max_memory_allocated(self._processes.device) / GIB
        return peaks

    def _over_ranks(self, values: dict[str, float], operation: dist.ReduceOp.RedOpType) -> dict[str, float]:
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self._processes.device)
        dist.all_reduce(packed, operation)
        return dict(zip(values, packed.tolist(), strict=True))


def _to_host(values: dict[str, Tensor]) -> list[float]:
    """Copy all values in one transfer."""
    return torch.stack(list(values.values())).tolist() if values else []
