"""Test and measure asda on a CUDA machine: first whether everything is right, then how fast it is.

    tools/gpu_day.sh                            everything
    tools/gpu_day.sh --minutes 20 --out x.json  what fits; the file names what did not
    tools/gpu_day.sh --only machine gemm step   only some parts
    tools/gpu_day.sh --cpu                      a dry run: every part at a tiny size on the CPU

Needs no network and no data: sounds are synthesised. The JSON file is written after every part, so that nothing is lost
if the machine is taken away. docs/gpu.md says what the parts do and how to read the file.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asda.errors import UserError, exit_with_sentence
from asda.system import write_whole_file

ROOT = Path(__file__).resolve().parents[2]
CUDA_TESTS = ("tests/models/test_triton_attention.py", "tests/data/features/test_dali.py")
STEPS, SAVED_AT = 12, 6  # of the short runs, and where the resumed one begins
# Losses of the same run computed in another order: each value is rounded by 2^-24 (fp32) or 2^-9 (bf16). A mean over
# many terms shows less of it; Adam's first steps enlarge it.
MOST_DIFFERENCE = {"fp32": 1e-3, "bf16": 2**-7}
MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
TINY = ["data.frames=64", "model.depth=2", "objective.target_layers=2", "objective.students=2", "optimizer.batch=8"]
LAUNCH_S = 600  # longest time of a single program
TAIL_CHARS = 2000  # kept of a failed program's output
Found = dict[str, Any]


class OutOfTimeError(Exception):
    """No time is left."""


class PartFailedError(Exception):
    """A program of a part failed; holds its output."""


@dataclass
class Day:
    """State that all parts share."""

    cpu: bool
    deadline: float  # time.monotonic()
    work: Path  # a temporary folder
    gpus: int = 0
    found: Found = field(default_factory=dict)  # by part

    def run(self, *argv: object, env: dict[str, str] | None = None) -> str:
        """Run a program and return its output. Raises PartFailedError and OutOfTimeError."""
        left_s = min(self.deadline - time.monotonic(), LAUNCH_S)
        if left_s <= 0:
            raise OutOfTimeError
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | (env or {})
        command = [str(argument) for argument in argv]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=left_s,
                check=False,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            raise OutOfTimeError from None
        if done.returncode:
            raise PartFailedError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-TAIL_CHARS:]}")
        return done.stdout

    def python(self, *argv: object, env: dict[str, str] | None = None) -> str:
        """Run a script on this interpreter, and return its output."""
        return self.run(sys.executable, *argv, env=env)

    def part(self, name: str, *argv: object) -> Found:
        """Run a part of gpu_parts.py, and return its findings."""
        return json.loads(
            self.python("tools/bench/gpu_parts.py", name, *(["--cpu"] if self.cpu else []), *argv).splitlines()[-1]
        )

    def train(self, run: Path, ranks: int, *overrides: str, config: str = "demo_pretrain") -> dict[int, float]:
        """Train briefly on synthetic sounds, and return the losses by step. TF32 is off, so that fp32 is fp32."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        common = ["objective.decoder.noise_std=0", "optimizer.warmup_steps=2", "run.log_every=1", f"run.folder={run}"]
        common += [f"optimizer.steps={STEPS}", f"run.save_every={SAVED_AT}", "run.keep=9"]
        if self.cpu:
            common += TINY
        what = ["--config", f"configs/{config}.json", f"data.train={self.sounds()}:train"]
        self.python(*launcher, "asda/train.py", *what, *common, *overrides, env={"NVIDIA_TF32_OVERRIDE": "0"})
        return {entry["step"]: entry["loss"] for entry in self.metrics(run)}

    def metrics(self, run: Path) -> list[Found]:
        """Return the training lines of a run's metrics."""
        entries = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [entry for entry in entries if entry.get("kind", "train") == "train" and "loss" in entry]

    def sounds(self) -> Path:
        """Return shards of synthetic sounds; make them on the first call."""
        shards = self.work / "shards"
        if not shards.exists():
            clips = 8 if self.cpu else 64  # in each of eight classes
            code = (
                "import sys, pathlib, sounds; sounds.write_dataset(pathlib.Path(sys.argv[1]), int(sys.argv[2]), seed=5)"
            )
            self.python("-c", code, self.work / "audio", clips, env={"PYTHONPATH": str(ROOT / "tools")})
            source = ("--source", "folder", "--input", self.work / "audio", "--split", "train=100%")
            self.python("tools/make_shards.py", *source, "--out", shards)
        return shards


def machine(day: Day) -> Found:
    """Describe the machine and the packages."""
    return day.part("machine")


def tests(day: Day) -> Found:
    """Run the tests that need a GPU: Triton's kernels against their definition, DALI on the GPU against the CPU."""
    if day.cpu:
        return {"status": "skipped", "reason": "these tests need CUDA"}
    lines = day.python("-m", "pytest", "-q", "-rA", "-k", "on_a_gpu", *CUDA_TESTS).splitlines()
    ran = [line.removeprefix("PASSED ") for line in lines if line.startswith("PASSED ")]
    return {"passed": bool(ran), "gpu_tests": ran, "summary": lines[-1]}


def parity(day: Day) -> Found:
    """Compare loss and gradients in fp32 and bf16 with fp64 on the CPU."""
    return day.part("parity")


def stages(day: Day) -> Found:
    """Train in every ZeRO stage, on one GPU and on all; compare the losses with fp32 without ZeRO on one GPU."""
    reference = day.train(day.work / "reference", 1, "engine.precision=fp32", "engine.zero_stage=0")
    found: Found = {"passed": True, "reference_losses": list(reference.values()), "runs": {}}
    for ranks in sorted({1, max(day.gpus, 1)}):
        for precision in ("fp32",) if day.cpu else ("fp32", "bf16"):
            for stage in (1,) if day.cpu else (0, 1, 2, 3):
                label = f"{ranks} x stage {stage}, {precision}"
                losses = day.train(
                    day.work / label, ranks, f"engine.precision={precision}", f"engine.zero_stage={stage}"
                )
                difference = largest_difference(losses, reference)
                right = difference <= MOST_DIFFERENCE[precision]
                found["runs"][label] = {"largest_relative_difference": difference, "passed": right}
                found["passed"] &= right
                day.found["stages"] = found
    return found


def resume(day: Day) -> Found:
    """Compare a run resumed from its middle with the uninterrupted one, and that one with a repetition."""
    whole, again, resumed_run = (day.work / name for name in ("whole", "again", "resumed"))
    losses = day.train(whole, 1)
    repeated = day.train(again, 1)
    checkpoint = f"checkpoints/step-{SAVED_AT:07d}"
    shutil.copytree(whole / checkpoint, resumed_run / checkpoint)
    resumed = day.train(resumed_run, 1)
    return {
        "passed": sorted(resumed) == list(range(SAVED_AT + 1, STEPS + 1))
        and largest_difference(resumed, losses) <= MOST_DIFFERENCE["bf16"],
        "same_run_twice_is_bit_identical": repeated == losses,
        "resumed_is_bit_identical": all(resumed[step] == losses[step] for step in resumed),
        "resumed_largest_relative_difference": largest_difference(resumed, losses),
    }


def gemm(day: Day) -> Found:
    """Measure the rate of a large matrix product in bf16."""
    return day.part("gemm")


def step(day: Day) -> Found:
    """Time one step of configs/as2m.json on one GPU, with larger and larger micro-batches, up to what fits."""
    rows: list[Found] = []
    day.found["step"] = found = {"rows": rows}
    rate = day.found.get("gemm", {}).get("bf16_flops_per_s")
    for micro_batch in MICRO_BATCHES[: 1 if day.cpu else None]:
        try:
            row = day.part("step", "--micro-batch", micro_batch)
        except PartFailedError as failure:
            if "out of memory" not in str(failure).lower() or not rows:
                raise
            return found | {"stopped": f"micro-batch {micro_batch} is out of memory"}
        rows.append(row | {"share_of_gemm": row["flops_per_s"] / rate if rate else None})
    return found


def training(day: Day) -> Found:
    """Train the network of configs/as2m.json on all GPUs, from shards: the throughput of the whole."""
    if day.cpu:
        day.train(day.work / "training", 1, "optimizer.steps=3")
    else:
        # Twelve clips a GPU, as published; sounds are padded to 10 s.
        longer = [f"optimizer.batch={12 * day.gpus}", "optimizer.steps=60", "run.log_every=10", "run.save_every=1000"]
        day.train(day.work / "training", day.gpus, *longer, config="as2m")
    last = day.metrics(day.work / "training")[-1]
    keys = ("step", "clips_per_s", "data_wait_share", "tflop_per_s", "gemm_share", "cuda_gib", "loss")
    return {key: last[key] for key in keys if key in last}


def data(day: Day) -> Found:
    """Measure the host's time per clip: tools/bench/bench.py data."""
    return _benchmark(day, "data")


def attention(day: Day) -> Found:
    """Time the ways to compute attention: tools/bench/bench.py attention."""
    return _benchmark(day, "attention")


def _benchmark(day: Day, name: str) -> Found:
    if day.cpu:
        return {"status": "skipped", "reason": "takes minutes on a CPU"}
    return json.loads(day.python("tools/bench/bench.py", name, "--json").splitlines()[-1])


def largest_difference(losses: dict[int, float], others: dict[int, float]) -> float:
    """Return the largest relative difference over the steps of the first."""
    return max(abs(losses[number] / others[number] - 1) for number in losses)


# In this order: first correctness, then speed; short parts first.
PARTS: dict[str, tuple[Callable[[Day], Found], tuple[str, ...]]] = {
    "machine": (machine, ("torch",)),
    "parity": (parity, ("torch",)),
    "tests": (tests, ("torch", "pytest", "triton", "nvidia.dali")),
    "gemm": (gemm, ("torch",)),
    "step": (step, ("torch", "deepspeed")),
    "stages": (stages, ("deepspeed", "nvidia.dali", "soundfile")),
    "resume": (resume, ("deepspeed", "nvidia.dali", "soundfile")),
    "training": (training, ("deepspeed", "nvidia.dali", "soundfile")),
    "attention": (attention, ("torch",)),
    "data": (data, ("nvidia.dali", "soundfile", "torchaudio", "webdataset")),
}


def run_parts(day: Day, names: list[str], out: Path) -> bool:
    """Run parts one after another, and write the file after each. Return whether all passed."""
    for name in names:
        function, packages = PARTS[name]
        started = time.monotonic()
        found = attempt(day, name, function, packages)
        seconds = time.monotonic() - started
        day.found[name] = {"status": "done", **found, "seconds": round(seconds, 1)}
        if name == "machine":
            day.gpus = len(found.get("gpus", []))
        write(out, day.found)
        status = "WRONG" if found.get("passed") is False else day.found[name]["status"]
        print(f"{name:10} {status:8} {seconds:6.0f} s  {found.get('reason', '')}", flush=True)
    return not any(part["status"] == "failed" or part.get("passed") is False for part in day.found.values())


def attempt(day: Day, name: str, function: Callable[[Day], Found], packages: tuple[str, ...]) -> Found:
    """Run a part and return its findings; if it failed or ran out of time, those so far and the reason."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        return {"status": "skipped", "reason": f"{', '.join(missing)} not installed"}
    try:
        return function(day)
    except OutOfTimeError:
        return day.found.get(name, {}) | {"status": "cut", "reason": "out of time"}
    except PartFailedError as failure:
        return day.found.get(name, {}) | {"status": "failed", "reason": str(failure)}


def installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def write(out: Path, found: Found) -> None:
    """Write the whole file, or leave the one that was there."""
    write_whole_file(out, json.dumps(found, indent=2) + "\n")


def has_cuda() -> bool:
    """Say whether torch finds a CUDA device. Another process looks, so that this one holds no device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main() -> None:
    """Parse the command line and run the day."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_day.json"), help="the file (default: gpu_day.json)")
    parser.add_argument("--minutes", type=float, default=240, help="most time in all (default: 240)")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"parts to run: {', '.join(PARTS)}"
    )
    parser.add_argument("--cpu", "--dry-run", action="store_true", help="run everything on the CPU, at a tiny size")
    args = parser.parse_args()
    if not args.cpu and not has_cuda():
        raise UserError("torch finds no CUDA device on this machine; add --cpu for a dry run without one")
    with tempfile.TemporaryDirectory(prefix="gpu_day-") as work:
        day = Day(args.cpu, time.monotonic() + 60 * args.minutes, Path(work))
        right = run_parts(day, args.only or list(PARTS), args.out.resolve())
    print(f"written to {args.out}")
    if not right:
        raise UserError(f"some parts failed on this machine; {args.out} says which and why")


if __name__ == "__main__":
    exit_with_sentence(main)
