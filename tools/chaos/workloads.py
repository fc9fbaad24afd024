"""Kinds of work that are put under faults: their commands, their material, their results, and how to compare them.

Material and uninterrupted references are made once, when a trial first needs them, and kept in the work folder.
"""

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from processes import BIN, ROOT, start

if str(ROOT / "tools") not in sys.path:
    sys.path.append(str(ROOT / "tools"))
from sounds import write_dataset

from asda.engine.processes import free_port
from asda.run.log import read_metrics

# As tests/helpers/launching.py: runs of seconds.
TINY = [
    "model.width=32", "model.depth=2", "model.heads=2", "data.frames=64", "engine.precision=fp32",
    "optimizer.batch=8", "optimizer.warmup_steps=2", "run.log_every=1",
]  # fmt: skip
TINY_PRETRAIN = [
    *TINY, "objective.target_layers=2", "objective.students=2", "objective.decoder.width=32",
    "objective.decoder.layers=1",
]  # fmt: skip
STEPS, EVERY = 10, 2
COMPARED = (
    "loss", "frame_loss", "utterance_loss", "prediction_variance", "target_variance", "ema_decay", "lr", "grad_norm",
    "clips",
)  # fmt: skip
ACCENT = "José"
PREPARE_S = 300.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        name: the kind.
        ranks: processes that deepspeed starts; 0 is plain python.
        programs: how many are started at once, as parts of one job.
        argv: returns the command of one program: (material, place of the result, number of the program, options).
        result: returns what is compared, from the place of the result.
        progress: returns how far the work has come, and at what number it is complete.
        reports: whether the result is also printed, so that a stdout that cannot be written is an error.
    """

    name: str
    ranks: int
    programs: int
    argv: Callable[["Material", Path, int, Sequence[str]], list[str]]
    result: Callable[[Path], Result]
    progress: Callable[[Path], int]
    complete: int
    reports: bool = False

    @property
    def trains(self) -> bool:
        """Whether it makes checkpoints."""
        return self.name.startswith("train")


@dataclass(frozen=True)
class Material:
    """The work folder: sounds, shards, configurations, checkpoints, references."""

    folder: Path

    @property
    def audio(self) -> Path:
        """The folder of sounds, one class named with an accent."""
        return self._made("audio", _make_audio)

    @property
    def shards(self) -> Path:
        """The shards of these sounds."""
        return self._made("shards", lambda at: _finish(self, _shards_argv(self.audio, at, "16")))

    @property
    def config(self) -> Path:
        """A pre-training configuration with an accent in its name and its notes."""
        return self._made(f"{ACCENT}.json", _make_config)

    @property
    def pretrained(self) -> Path:
        """A finished pre-training."""
        return self._made("pretrained", lambda at: _finish(self, _train_argv(self, at, 0, (), ranks=0)))

    @property
    def finetuned(self) -> Path:
        """A finished fine-tuning."""
        return self._made("finetuned", lambda at: _finish(self, _finetune_argv(self, at)))

    def reference(self, work: Work) -> Result:
        """Return the result of the uninterrupted work."""
        return _reference(self, work.name)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return a part of the material; make it if it is missing. A part that was interrupted is made anew."""
        path, done = self.folder / name, self.folder / f".{name}.done"
        with _lock(str(path)):
            if not done.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(path, ignore_errors=True)
                make(path)
                done.touch()
        return path


_LOCKS: dict[str, threading.Lock] = {}
_LOCKS_LOCK = threading.Lock()


def _lock(name: str) -> threading.Lock:
    """Return the lock of this name, the same for all threads."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(name, threading.Lock())


@cache
def _reference(material: Material, name: str) -> Result:
    work = WORKS[name]

    def make(place: Path) -> None:
        for number in range(work.programs):
            _finish(material, work.argv(material, place, number, ()))

    return work.result(material._made(f"reference-{name}", make))


def _finish(material: Material, argv: list[str]) -> None:
    """Run a command of the preparation to its end."""
    program = start(argv, material.folder / f"preparing-{threading.get_ident()}")
    code = program.wait(PREPARE_S)
    program.end()
    if code != 0:
        raise RuntimeError(f"preparing failed with {code}: {argv}\n{program.text(program.stderr)}")


def _make_audio(place: Path) -> None:
    write_dataset(place, clips_per_class=8, seed=5)
    sorted(place.iterdir())[0].rename(place / ACCENT)


def _make_config(place: Path) -> None:
    """Write the demo's pre-training with notes that only UTF-8 holds."""
    found = json.loads((ROOT / "configs" / "demo_pretrain.json").read_text(encoding="utf-8"))
    place.write_text(json.dumps({"_about": {"who": f"{ACCENT}, \u97f3"}} | found, ensure_ascii=False), encoding="utf-8")


def _train_argv(material: Material, place: Path, _number: int, options: Sequence[str], *, ranks: int) -> list[str]:
    run = [f"optimizer.steps={STEPS}", f"run.save_every={EVERY}", "run.keep=9", f"run.folder={place}", *options]
    batch = ["optimizer.batch=12", "engine.micro_batch=2"]  # divides among 1, 2 and 3 ranks
    data = f"data.train={material.shards}:train"
    return [*_launcher(ranks, "train.py"), "--config", str(material.config), data, *TINY_PRETRAIN, *batch, *run]


def _launcher(ranks: int, script: str) -> list[str]:
    port = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*([str(BIN / "deepspeed"), *port] if ranks else [sys.executable]), str(ROOT / "asda" / script)]


def _finetune_argv(material: Material, place: Path) -> list[str]:
    data = [f"data.train={material.shards}:train", f"data.valid={material.shards}:test", f"run.folder={place}"]
    more = ["optimizer.steps=2", f"objective.init_from={material.pretrained}"]
    config = str(ROOT / "configs" / "demo_finetune.json")
    return [*_launcher(0, "train.py"), "--config", config, *data, *TINY, *more]


def _shards_argv(audio: Path, place: Path, most: str) -> list[str]:
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--source", "folder", "--input", str(audio)]
    splits = ["--split", "train=75%", "--split", "test=25%", "--clips-per-shard", most, "--workers", "2"]
    return [*tool, "--out", str(place), *splits]


def _whole_shards_argv(material: Material, place: Path, _number: int, _options: Sequence[str]) -> list[str]:
    return _shards_argv(material.audio, place, "2")


def _part_argv(material: Material, place: Path, number: int, _options: Sequence[str]) -> list[str]:
    return [*_shards_argv(material.audio, place, "2"), "--part", f"{number + 1}/{PARTS}"]


def _evaluate_argv(material: Material, place: Path, _number: int, _options: Sequence[str]) -> list[str]:
    out = ["--out", str(place / "evaluation.json")]
    return [*_launcher(0, "evaluate.py"), "--checkpoint", str(material.finetuned), *out]


def _features_argv(material: Material, place: Path, _number: int, _options: Sequence[str]) -> list[str]:
    program = [sys.executable, str(ROOT / "asda" / "__main__.py"), "features"]
    return [*program, "--model", str(material.pretrained), "--out", str(place), str(material.audio)]


def _files(place: Path) -> Result:
    """Return the hash of every file below a folder."""
    paths = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _trained(place: Path) -> Result:
    """Return the figures of every step, and the hashes of the tensors in the last checkpoint."""
    last = place / "checkpoints" / f"step-{STEPS:07d}"
    figures = {f"step {e['step']}": {key: e[key] for key in COMPARED if key in e} for e in read_metrics(place, "train")}
    return figures | {name: its for name, its in _files(last).items() if name.endswith(".safetensors")}


def _count_files(place: Path) -> int:
    return sum(not path.name.startswith(".") for path in place.rglob("*") if path.suffix in (".zst", ".npz"))


def _count_steps(place: Path) -> int:
    metrics = place / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


PARTS = 3


def _training(ranks: int) -> Work:
    def argv(material: Material, place: Path, number: int, options: Sequence[str]) -> list[str]:
        return _train_argv(material, place, number, options, ranks=ranks)

    return Work(f"train-{ranks or 'plain'}", ranks, 1, argv, _trained, _count_steps, STEPS)


_ALL = (
    *map(_training, (0, 1, 2, 3)),
    Work("shards", 0, 1, _whole_shards_argv, _files, _count_files, 32),
    Work("parts", 0, PARTS, _part_argv, _files, _count_files, 32),
    Work("evaluate", 0, 1, _evaluate_argv, _files, lambda place: len(list(place.glob("*"))), 2, reports=True),
    Work("features", 0, 1, _features_argv, _files, _count_files, 64, reports=True),
)
WORKS = {work.name: work for work in _ALL}
