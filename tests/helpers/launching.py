"""Starts the main programs as a user does, at a size of seconds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY = [
    "model.width=32", "model.depth=2", "model.heads=2", "data.frames=64", "engine.precision=fp32",
    "optimizer.batch=8", "optimizer.warmup_steps=2", "run.log_every=1",
]  # fmt: skip
TINY_PRETRAIN = [
    *TINY,
    "objective.target_layers=2",
    "objective.students=2",
    "objective.decoder.width=32",
    "objective.decoder.layers=1",
]


def pretraining(shards: Path, run: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "demo_pretrain.json")
    run_keys = ["optimizer.steps=6", "run.save_every=2", "run.keep=9", f"run.folder={run}"]
    return ["--config", config, f"data.train={shards}:train", *TINY_PRETRAIN, *run_keys, *more]


def finetuning(shards: Path, run: Path, *more: str) -> list[str]:
    config = str(ROOT / "configs" / "demo_finetune.json")
    data = [f"data.train={shards}:train", f"data.valid={shards}:test", f"run.folder={run}"]
    return ["--config", config, *data, *TINY, "optimizer.steps=4", "run.eval_every=2", "run.save_every=4", *more]


def command(ranks: int, script: str, *arguments: str) -> list[str]:
    """Ranks 0: plain python."""
    from asda.engine.processes import free_port

    deepspeed = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    launcher = deepspeed if ranks else [sys.executable]
    return [*launcher, str(ROOT / "asda" / script), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=240, check=False)


def launch(ranks: int, script: str, *arguments: str) -> str:
    done = start(command(ranks, script, *arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
