"""One training step of ASDA-base beside a plain implementation of the same: time, arithmetic, memory, saving.

The plain side (tools/bench/plain_asda.py) uses torch.optim.AdamW, clip_grad_norm_, and a loop over the parameters for
the teacher. Each side is a process of its own, and the processes step in turn.

Shapes: M students of a clip, N patches of it, K visible ones, P pixels of a patch.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_asda import PlainStudents, plain_targets
from torch import Tensor, nn

from asda.checkpoint.read import State
from asda.checkpoint.writer import CheckpointWriter
from asda.config.model import PretrainConfig, of_asda
from asda.config.run import Config, load_config
from asda.data.stream import Batch
from asda.engine.partitions import optimizer_file
from asda.engine.processes import join_processes
from asda.engine.zero import guarded, make_engine, set_learning_rate
from asda.models.costs import gemm_rate, network_costs
from asda.models.masks import visible_patches
from asda.objectives import Pretraining, make_objective

CONFIG = Path(__file__).parents[2] / "configs" / "as2m.json"
OVERRIDES = ["optimizer.batch=1", "engine.micro_batch=1"]
WARM_UP, ROUNDS = 2, 7  # steps of each side; the median of the rounds counts
DECAY, LEARNING_RATE = 0.9998, 1e-5
STEPS_AROUND_A_SAVE, SPANS = 10, 3
GIB = 2**30
KIB = 2**10
CLEAR_PEAK = "5"  # what /proc/self/clear_refs takes to set the peak of resident memory to what is resident now
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# Both sides, a step at a time -----------------------------------------------------------------------------------------


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last call to this part."""
        now = time.perf_counter()
        self.seconds[part], self._last = self.seconds.get(part, 0.0) + now - self._last, now


def inputs_of(config: Config) -> tuple[Tensor, Tensor]:
    """Draw patches of a clip [1, N, P], and the visible places of its students [1, M, K]."""
    assert isinstance(config.objective, PretrainConfig)
    grid = (config.data.frames // config.model.patch, config.model.mel_bins // config.model.patch)
    rng = np.random.default_rng(0)
    visible_MK = visible_patches(rng, num_masks=config.objective.students, grid=grid, config=config.objective.mask)
    torch.manual_seed(0)
    return torch.randn(1, grid[0] * grid[1], config.model.patch**2), torch.from_numpy(visible_MK)[None]


class Plain:
    """The plain implementation, a step at a time."""

    def __init__(self, config: Config):
        assert isinstance(config.objective, PretrainConfig)
        self._config, self._objective, settings = config, config.objective, config.optimizer
        self._patches_BNP, self._visible_BMK = inputs_of(config)
        self._students = PlainStudents(of_asda(config.model), config.objective)
        nn.init.normal_(self._students.encoder.cls_token)
        self._teacher = copy.deepcopy(self._students.encoder).requires_grad_(False).eval()
        self._optimizer = torch.optim.AdamW(
            self._students.parameters(),
            lr=LEARNING_RATE,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def step(self) -> Clock:
        """Take a step: targets, losses, backward, clipping, AdamW, teacher."""
        clock, students, teacher = Clock(), self._students, self._teacher
        with torch.autocast("cpu", torch.bfloat16, enabled=self._config.engine.precision == "bf16"):
            with torch.no_grad():
                targets = plain_targets(teacher, self._patches_BNP, self._objective.target_layers)
            total, *_ = students(self._patches_BNP, self._visible_BMK, *targets)
        clock.lap("forward")
        total.backward()
        clock.lap("backward")
        nn.utils.clip_grad_norm_(students.parameters(), self._config.optimizer.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        clock.lap("optimizer")
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), students.encoder.parameters(), strict=True):
                slow.mul_(DECAY).add_(fast, alpha=1 - DECAY)
        clock.lap("ema")
        return clock

    def state(self) -> dict[str, int]:
        """Count the bytes that are kept from step to step; all are fp32."""
        weights, teacher = (4 * _count(module) for module in (self._students, self._teacher))
        return {"weights": weights, "adam": 2 * weights, "teacher": teacher}


class Ours:
    """asda, a step at a time, through the engine and the objective as the trainer runs them."""

    def __init__(self, config: Config):
        self._config, self._processes = config, join_processes()
        objective = make_objective(config, (), self._processes.device)
        assert isinstance(objective, Pretraining)
        self._objective = objective
        self._engine = make_engine(config, objective.module, objective.lr_scales, self._processes.world_size)
        objective.follow(self._engine)
        set_learning_rate(self._engine, lambda scale: LEARNING_RATE)
        self._patches_BNP, visible_BMK = inputs_of(config)
        self._batch, self._num_updates = Batch([], visible_BMK.numpy()), 0
        self._folder = tempfile.TemporaryDirectory()
        self._writer = CheckpointWriter(Path(self._folder.name), config, self._processes)

    def step(self) -> Clock:
        """Take the same step as Plain."""
        clock, engine = Clock(), self._engine
        engine.train()
        loss, _ = self._objective.loss(engine, self._patches_BNP, self._batch)
        clock.lap("forward")
        engine.backward(guarded(loss))
        clock.lap("backward")
        self._writer.wait_until_copied()
        engine.step()
        clock.lap("optimizer")
        self._num_updates += 1
        self._objective.after_update(self._num_updates)
        clock.lap("ema")
        return clock

    def state(self) -> dict[str, int]:
        """Count bytes kept from step to step: fp32; with bf16 also weights and teacher in it, and fp32 gradients."""
        low = self._config.engine.precision == "bf16"
        weights, teacher = _count(self._objective.module), _count(self._objective.teacher.encoder)
        state = {"weights": (6 if low else 4) * weights, "adam": 8 * weights, "teacher": (6 if low else 4) * teacher}
        return state | ({"gradients": 4 * weights} if low else {})

    def span(self, saves: bool) -> dict[str, float]:
        """Time STEPS_AROUND_A_SAVE steps, and the save that starts after the third of them if asked for."""
        started = time.perf_counter()
        for number in range(STEPS_AROUND_A_SAVE):
            if saves and number == 3:
                stem, moments = optimizer_file(self._engine)
                state = State(self._num_updates, (), "", 1, applied_steps=self._num_updates)
                self._writer.save(state, self._objective.weights() | {stem: moments})
            self.step()
        took_s = time.perf_counter() - started
        outcome = self._writer.finish()
        assert outcome is None or outcome.failure is None
        return {"span_s": took_s, "save_s": outcome.seconds if outcome else 0.0}


SIDES = {"plain": Plain, "ours": Ours}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# A process for each side ----------------------------------------------------------------------------------------------


def config_of(precision: str) -> Config:
    """Load configs/as2m.json for one clip on one rank; fp32 without ZeRO, which has nothing to partition there."""
    stage = ["engine.zero_stage=0"] if precision == "fp32" else []
    return load_config(CONFIG, [*OVERRIDES, f"engine.precision={precision}", *stage])


def serve(side: str, precision: str, answers: Any) -> None:
    """Answer each line of standard input with a line of JSON.

    "step" takes a step, "gemm" measures the machine, "plain span" and "saving span" take steps without and with a save.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = config_of(precision)
    before_gib = resident_gib("VmRSS")
    work = SIDES[side](config)
    for line in sys.stdin:
        asked = line.strip()
        if asked == "gemm":
            answer: dict[str, Any] = {"rate": gemm_rate(torch.device("cpu"), DTYPES[precision])}
        elif asked.endswith("span"):
            answer = work.span(asked == "saving span")
        else:
            Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="utf-8")
            started = time.perf_counter()
            parts = work.step().seconds
            took_s, peak_gib = time.perf_counter() - started, resident_gib("VmHWM") - before_gib
            answer = {"step_s": took_s, "parts": parts, "peak_gib": peak_gib, "state": work.state()}
        print(json.dumps(answer), file=answers, flush=True)


def resident_gib(field: str) -> float:
    """Read the resident memory of this process (VmRSS), or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * KIB / GIB


class Side:
    """A process that steps when asked."""

    def __init__(self, side: str, precision: str):
        command = [sys.executable, __file__, side, precision]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.answers: list[dict[str, Any]] = []

    def ask(self, what: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print lines of their own while they are imported
                return json.loads(line)
        raise RuntimeError("a side of the benchmark ended; its error stands above")

    def step(self) -> None:
        """Take a step and keep the answer."""
        self.answers.append(self.ask("step"))

    def median_s(self) -> float:
        """Return the median time of a step."""
        return statistics.median(answer["step_s"] for answer in self.answers)

    def peak_gib(self) -> float:
        """Return the highest peak of any step, above the memory that was resident before the model was built."""
        return max(answer["peak_gib"] for answer in self.answers)

    def shares(self) -> dict[str, float]:
        """Return the median share of each part of the step."""
        names = self.answers[0]["parts"]
        return {name: statistics.median(a["parts"].get(name, 0) / a["step_s"] for a in self.answers) for name in names}

    def state_gib(self) -> dict[str, float]:
        """Return the memory that is kept from step to step, by content."""
        return {name: size / GIB for name, size in self.answers[0]["state"].items()}

    def end(self) -> None:
        """Close the process."""
        self._process.communicate()


def bench_step() -> dict[str, Any]:
    """Measure a training step of ASDA-base on one clip: ours and a plain one, the rate of products, peak memory."""
    sides = {(side, precision): Side(side, precision) for precision in DTYPES for side in SIDES}
    rates: dict[str, list[float]] = {precision: [] for precision in DTYPES}
    for number in range(WARM_UP + ROUNDS):
        for (name, precision), side in sides.items():
            if name == "ours":
                rates[precision].append(side.ask("gemm")["rate"])
            side.step()
            if number < WARM_UP:
                side.answers.clear()
    figures = figures_of(sides, {precision: statistics.median(some) for precision, some in rates.items()})
    figures |= saving_figures(sides["ours", "bf16"])
    for side in sides.values():
        side.end()
    return figures


def figures_of(sides: dict[tuple[str, str], Side], gemm_rates: dict[str, float]) -> dict[str, Any]:
    """Collect names and figures: seconds, GiB, shares of the step, 1e9 operations a second.

    `ratio` is the plain step's time in fp32 / ours in bf16. Memory is compared at equal precision: `peak` counts from
    after the imports, `working` is the peak without the state that is kept from step to step.
    """
    config = config_of("bf16")
    flops = sum(network_costs(config.model, config.objective, config.data.frames, 0).flops.values())
    ours, plain = sides["ours", "bf16"], sides["plain", "fp32"]
    figures = {
        "ours_s": ours.median_s(),
        "baseline_s": plain.median_s(),
        "ratio": plain.median_s() / ours.median_s(),
        "gemm_share": flops / ours.median_s() / gemm_rates["bf16"],
        "floor_s": flops / gemm_rates["bf16"],
        "ours_peak_gib": ours.peak_gib(),
        "baseline_peak_gib": sides["plain", "bf16"].peak_gib(),
        "baseline_bf16_s": sides["plain", "bf16"].median_s(),
        "fp32_ours_s": sides["ours", "fp32"].median_s(),
        "fp32_ratio": plain.median_s() / sides["ours", "fp32"].median_s(),
        "fp32_gemm_share": flops / sides["ours", "fp32"].median_s() / gemm_rates["fp32"],
        "fp32_ours_peak_gib": sides["ours", "fp32"].peak_gib(),
        "fp32_baseline_peak_gib": plain.peak_gib(),
        "gemm_bf16_gflop_per_s": gemm_rates["bf16"] / 1e9,
        "gemm_fp32_gflop_per_s": gemm_rates["fp32"] / 1e9,
        "tflop_a_clip": flops / 1e12,
    }
    shares = ours.shares()
    figures |= {f"{part}_share": share for part, share in shares.items()}
    figures["overhead_share"] = 1 - sum(shares.values())
    figures |= {f"{part}_s": share * ours.median_s() for part, share in shares.items()}
    for name, side in (("ours", ours), ("baseline", sides["plain", "bf16"])):
        state = side.state_gib()
        figures |= {f"{name}_{part}_gib": size for part, size in state.items()}
        figures[f"{name}_working_gib"] = side.peak_gib() - sum(state.values())
    return figures


def saving_figures(ours: Side) -> dict[str, float]:
    """Measure what a save adds to the steps around it, in turn with as many steps without one.

    The first save of a run counts by itself: it allocates the memory that all of them copy to.
    """
    without, saving = [], []
    for _ in range(1 + SPANS):
        without.append(ours.ask("plain span"))
        saving.append(ours.ask("saving span"))
    usual_s = statistics.median(span["span_s"] for span in without)
    return {
        "first_save_share": saving[0]["span_s"] / usual_s - 1,
        "save_share": statistics.median(span["span_s"] for span in saving[1:]) / usual_s - 1,
        "save_s": statistics.median(span["save_s"] for span in saving[1:]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One side of the benchmark; tools/bench/bench.py step runs them all.")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("precision", choices=DTYPES)
    chosen = parser.parse_args()
    # What libraries print goes to standard error, so that only answers come out.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(chosen.side, chosen.precision, answers)
