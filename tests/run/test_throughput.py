"""What a log line says: means without the steps that were not applied, rates by hand, nothing of what was paused."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from asda.engine.processes import Processes
from asda.run.throughput import Throughput

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("asda.run.throughput.time.monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_terms_are_means_over_the_micro_batches_of_the_steps_since_the_last_line(clock: Clock) -> None:
    meter = Throughput(ALONE, flops_per_clip=1, gemm_rate=1)
    for step in ([1.0, 2.0], [3.0, 6.0]):
        for loss in step:
            meter.add(terms(loss=loss, spread=10 * loss), 4)
        meter.end_step(applied=True)
    clock.now_s += 2
    figures = meter.figures()
    assert (figures["loss"], figures["spread"]) == (3.0, 30.0)
    meter.add(terms(loss=7.0, spread=0.0), 4)
    meter.end_step(applied=True)
    clock.now_s += 1
    assert meter.figures()["loss"] == 7.0, "what a line has said is not in the next one"


def test_a_mean_of_many_small_terms_keeps_the_digits_of_fp64(clock: Clock) -> None:
    meter = Throughput(ALONE, 1, 1)
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + 1e4
    for value in values:
        meter.add({"loss": value}, 1)
    meter.end_step(applied=True)
    clock.now_s += 1
    # Sums of n terms in fp64 are off by n 2^-53 of their size at most; in fp32 it would be 6e-4.
    assert meter.figures()["loss"] == pytest.approx(values.double().mean().item(), rel=10_000 * 2**-53)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_step_that_was_not_applied_is_counted_and_stays_out_of_the_means(bad: float, clock: Clock) -> None:
    meter = Throughput(ALONE, 1, 1, skipped_steps=5)
    for loss, applied in ((2.0, True), (bad, False), (4.0, True)):
        meter.add(terms(loss=1.0 if applied else bad), 1)
        meter.add(terms(loss=loss), 1)
        meter.end_step(applied=applied)
    clock.now_s += 3
    figures = meter.figures()
    assert figures["loss"] == (1 + 2 + 1 + 4) / 4
    assert figures["skipped_steps"] == meter.skipped_steps == 6, "of the whole run"
    assert figures["clips_per_s"] == 2, "the machine has worked for them all the same"


def test_a_line_about_skipped_steps_alone_has_every_figure_and_nan_for_the_terms(clock: Clock) -> None:
    meter = Throughput(ALONE, 1, 1)
    meter.add(terms(loss=math.nan), 1)
    meter.end_step(applied=False)
    clock.now_s += 1
    figures = meter.figures()
    assert math.isnan(figures["loss"])
    assert all(math.isfinite(value) for name, value in figures.items() if name != "loss")


def test_rates_are_those_of_the_clock_and_pauses_are_left_out(clock: Clock) -> None:
    meter = Throughput(ALONE, flops_per_clip=3 * 10**12, gemm_rate=8e12)
    for _ in range(2):
        for _ in range(3):
            meter.add(terms(loss=1.0), 5)
            clock.now_s += 2.5
        meter.end_step(applied=True)
    with meter.paused():
        clock.now_s += 1000
    figures = meter.figures()
    assert figures["step_s"] == 7.5
    assert figures["clips_per_s"] == 30 / 15
    assert figures["tflop_per_s"] == 2 * 3
    assert figures["gemm_share"] == 6 / 8


def test_waiting_for_data_is_a_time_and_a_share(clock: Clock) -> None:
    def slow() -> Iterator[int]:
        for number in range(2):
            clock.now_s += 3
            yield number

    meter, batches = Throughput(ALONE, 1, 1), slow()
    assert [meter.wait_for(batches), meter.wait_for(batches)] == [0, 1]
    clock.now_s += 18
    figures = meter.figures()
    assert (figures["data_wait_s"], figures["data_wait_share"]) == (6, 0.25)


def test_the_peak_of_memory_rises_with_what_the_process_has_touched() -> None:
    meter = Throughput(ALONE, 1, 1)
    before = meter.figures()["rss_gib"]
    touched = torch.ones(2**27)  # 0.5 GiB
    assert meter.figures()["rss_gib"] >= before
    assert 0.5 < meter.figures()["rss_gib"] < 64
    del touched
    assert "cuda_gib" not in meter.figures(), "there is no such device"


def measured(processes: Processes) -> dict[str, float]:
    """One step of a rank: losses and clips differ, the pace does not."""
    meter = Throughput(processes, flops_per_clip=10**12, gemm_rate=1e12)
    meter.add(terms(loss=1.0 + 2 * processes.rank), 4)
    meter.end_step(applied=True)
    meter._started -= 1000  # so that milliseconds do not count
    return meter.figures()


@pytest.mark.launch
def test_figures_are_over_all_ranks_and_the_same_on_each() -> None:
    figures, others = run_ranks(2, measured)
    assert figures == others
    assert figures["loss"] == 2
    # 8 clips of all ranks in 1000 s, 4 of each; the launch may sleep for a few seconds in between.
    assert figures["clips_per_s"] == pytest.approx(8 / 1000, rel=0.05)
    assert figures["tflop_per_s"] == pytest.approx(8 / 1000, rel=0.05)
    assert figures["gemm_share"] == pytest.approx(4 / 1000, rel=0.05)
