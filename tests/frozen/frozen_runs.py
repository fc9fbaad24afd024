"""The frozen commands, and what is read from what they leave behind. Commands and files only: nothing imports asda.

All commands run in a folder of their own and name everything relative to it, so no stored file knows a machine:

    tones/ mixed/                       the committed shards
    pretrained/ finetuned/ ast/         the committed run folders
    pretrain_fp32/ finetune_bf16/ ...   what a test runs, a folder for each name of RUNS
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).resolve().parent
ROOT = FROZEN.parent.parent
GOLDEN = FROZEN / "golden"
RETIRED = FROZEN / "retired.json"  # key -> override that uses it, and what the refusal must name
TRAIN = ROOT / "asda" / "train.py"
TIMEOUT_S = 1100  # of a command; seconds are usual, but see BF16_IS_SLOW in test_frozen_runs.py

SHARDING = {  # dataset -> arguments of tools/make_shards.py
    "tones": [
        "--source=folder", "--input=sounds", "--out=tones", "--split=train=75%", "--split=test=25%",
        "--clips-per-shard=8",
    ],
    "mixed": ["--source=csv", "--input=table/table.csv", "--out=mixed", "--clips-per-shard=6"],
}  # fmt: skip

MIXTURE = [
    {"data": "tones:train", "share": 0.7},
    {"data": "mixed:train", "share": 0.3, "order": {"mode": "balanced", "draws_per_epoch": 6}},
]
BALANCED = ["data.order.mode=balanced", "data.order.replacement=true"]
# The learning rates of fp32 are high: a random network attends to everything alike, so at a low one another lambda
# would change nothing that is larger than a tolerance. Those of bf16 are low: its errors grow with what is learned.
RUNS = {  # name and run folder -> configuration, overrides
    "pretrain_fp32": ("pretrain", ["engine.precision=fp32"]),
    "pretrain_bf16": (
        "pretrain",
        ["engine.precision=bf16", "optimizer.lr=0.0005", f"data.train={json.dumps(MIXTURE)}"],
    ),
    "finetune_fp32": ("finetune", ["engine.precision=fp32", *BALANCED]),
    "finetune_bf16": ("finetune", ["engine.precision=bf16", "optimizer.lr=0.001", *BALANCED]),
    "ast": ("ast", ["engine.precision=fp32"]),
}
# The mixture on two ranks, with a probe, whose keys are frozen too; the order of clips is all that is compared.
TWO_RANKS = [
    "engine.precision=fp32", f"data.train={json.dumps(MIXTURE)}", "optimizer.steps=8",
    "probe.train=tones:train", "probe.test=tones:test", "probe.neighbours=3",
]  # fmt: skip
FIGURES = ("loss", "frame_loss", "utterance_loss", "lr", "grad_norm", "ema_decay")


def run(argv: list[Any], place: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; what it prints is kept."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [str(word) for word in argv]
    return subprocess.run(words, cwd=place, capture_output=True, text=True, env=env, timeout=TIMEOUT_S, check=False)


def succeed(argv: list[Any], place: Path) -> str:
    """Run a command that must end well; returns what it prints."""
    done = run(argv, place)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_shards(dataset: str, place: Path) -> Path:
    """Shard place/sounds or place/table, which frozen_sounds.py writes; returns the new folder."""
    succeed([sys.executable, ROOT / "tools" / "make_shards.py", *SHARDING[dataset], "--workers=1"], place)
    return place / dataset


def training(config: str, folder: str, overrides: list[str]) -> list[Any]:
    """Return the arguments of a training."""
    return ["--config", FROZEN / "configs" / f"{config}.json", f"run.folder={folder}", *overrides]


def train(name: str, place: Path, *, folder: str = "", program: Path = TRAIN) -> Path:
    """Train a run of RUNS on one rank, by plain python; returns its folder."""
    config, overrides = RUNS[name]
    succeed([sys.executable, program, *training(config, folder or name, overrides)], place)
    return place / (folder or name)


def train_on_two_ranks(place: Path) -> Path:
    """Train TWO_RANKS by the DeepSpeed launcher; returns its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators=2", f"--master_port={port}"]
    succeed([*launcher, TRAIN, *training("pretrain", "two_ranks", TWO_RANKS)], place)
    return place / "two_ranks"


def evaluate(checkpoint: str, place: Path) -> dict[str, Any]:
    """Evaluate a run folder on tones:test; returns its evaluation.json."""
    succeed([sys.executable, ROOT / "asda" / "evaluate.py", "--checkpoint", checkpoint, "--data=tones:test"], place)
    return json.loads((place / checkpoint / "evaluation.json").read_text())


def copy_golden(place: Path, *names: str) -> None:
    """Copy committed shards and run folders to where a test may write to them."""
    for name in names:
        shutil.copytree(GOLDEN / name, place / name)


def golden(name: str) -> Any:
    """Return the content of golden/NAME.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def figures_of(run: Path) -> dict[str, list[float]]:
    """Return the frozen figures of every step in a run's metrics.jsonl: name -> [steps]."""
    lines = _lines_of_steps(run)
    return {name: [line[name] for line in lines] for name in FIGURES if name in lines[0]}


def clips_of(run: Path) -> list[str]:
    """Return the digest of every step's set of clips."""
    return [line["clips"] for line in _lines_of_steps(run)]


def keys_of(run: Path) -> list[str]:
    """Return the sorted dotted keys of a run's config.json; what holds for every item of a list is "list[].key"."""
    return sorted(set(_dotted(json.loads((run / "config.json").read_text()))))


def _lines_of_steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a line for every step"
    return lines


def _dotted(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict) and prefix != "_about":  # whose keys are the user's
        return [key for name, part in value.items() for key in _dotted(part, f"{prefix}.{name}" if prefix else name)]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [key for item in value for key in _dotted(item, f"{prefix}[]")]
    return [prefix]
