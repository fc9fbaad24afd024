"""One trial of chaos: real work, a random fault at a random moment, and a verdict from outside.

The seed decides everything that is drawn. The moment is a share of the time that the undisturbed work takes, so a trial
that is repeated hits about the same place, not the same instruction.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import checkpoints_of, newest_checkpoint
from asda.run.log import read_metrics
from tools.sounds import write_dataset

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 120.0  # of a piece of work that takes seconds
GRACE_S = 8.0  # for processes of a group whose first process has ended
TAG = "ASDA_CHAOS"  # in the environment of all processes of a trial
STEPS = 12
COMPARED = ("loss", "lr", "grad_norm", "ema_decay", "target_variance")

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGSTOP")
STREAMS = {"closed": ">&- 2>&-", "full": ">/dev/full 2>/dev/full", "unread": "> >(true) 2> >(true)"}
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FAULTS = {
    "train": [*SIGNALS, "moved", "removed", "streams", "locale", "disk", "inodes", "file size", "shared memory"],
    "shards": [*SIGNALS, "moved", "removed", "streams", "locale", "disk", "inodes", "shared memory"],
}
ENDS = {  # exit codes that are right for a fault; 0 is right if the work is done
    "SIGKILL": {-9}, "SIGTERM": {75, 143, -15}, "SIGINT": {75, 130, -2}, "SIGHUP": {75, 129, -1},
    "SIGUSR1": {75, 138, -10}, "SIGSTOP": {0}, "moved": {2}, "removed": {2}, "streams": {0}, "locale": {0},
    "disk": {2}, "inodes": {2}, "file size": {2}, "shared memory": {2},
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A piece of work, a fault and its moment, as a seed draws them."""

    seed: int
    work: str
    fault: str
    moment: float  # share of the undisturbed work
    policy: str  # run.on_failed_save
    stream: str


@dataclass
class Verdict:
    """Findings of a trial; `wrong` is empty if everything was right."""

    code: int | None
    seconds: float
    last: str
    wrong: list[str] = field(default_factory=list)


def draw(seed: int, only: str = "") -> Trial:
    """Draw a trial; `only` keeps the work to one kind."""
    rng = random.Random(seed)
    work = rng.choice([only] if only else list(FAULTS))
    fault = rng.choice(FAULTS[work])
    return Trial(seed, work, fault, rng.random(), rng.choice(["stop", "continue"]), rng.choice(list(STREAMS)))


class Bench:
    """Sounds, shards, and undisturbed work to compare with, made once in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sounds, self.shards = folder / "sounds", folder / "shards"
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not self.shards.exists():
            write_dataset(self.sounds, clips_per_class=6, seed=5)
            _run(self.command("shards", self.shards), {}, HANG_S)
        for work in FAULTS:
            shutil.rmtree(folder / f"whole-{work}", ignore_errors=True)
            started = time.monotonic()
            code, _, err = _run(self.command(work, folder / f"whole-{work}"), {}, HANG_S)
            if code:
                raise SystemExit(f"undisturbed {work} ends with {code}: {err}")
            self.seconds[work] = time.monotonic() - started

    def command(self, work: str, out: Path, policy: str = "stop") -> list[str]:
        """Return the command of a piece of work."""
        if work == "shards":
            source = ["--source", "folder", "--input", str(self.sounds), "--clips-per-shard", "4"]
            return [sys.executable, "tools/make_shards.py", *source, "--out", str(out), "--workers", "2"]
        tiny = [
            "model.width=64", "model.depth=2", "model.heads=2", "data.frames=64", "engine.precision=fp32",
            "optimizer.batch=8", "optimizer.warmup_steps=2", f"optimizer.steps={STEPS}", "objective.target_layers=2",
            "objective.students=2", "objective.decoder.width=32", "objective.decoder.layers=1",
        ]  # fmt: skip
        run = ["run.log_every=1", "run.save_every=2", "run.keep=3", f"run.on_failed_save={policy}", f"run.folder={out}"]
        config = ["--config", "configs/demo_pretrain.json", f"data.train={self.shards}:train"]
        return [sys.executable, "asda/train.py", *config, *tiny, *run]


def attempt(trial: Trial, bench: Bench, folder: Path) -> Verdict:
    """Do a trial in an empty folder; the same command then finishes the work, and is compared."""
    folder.mkdir(parents=True)
    out = folder / "out"
    command = bench.command(trial.work, out, trial.policy)
    started = time.monotonic()
    code, told, wrong = _disturbed(trial, command, out, trial.moment * bench.seconds[trial.work])
    last = told.rstrip().splitlines()[-1] if told.strip() else ""
    verdict = Verdict(code, time.monotonic() - started, last, wrong)
    _judge_end(trial, verdict, told, out)
    _put_back(trial, folder, out)
    whole = trial.work == "shards" and (out / "dataset.json").exists()  # finished shards are refused, which is right
    again, err = 0, ""
    if not whole:
        again, _, err = _run(bench.command(trial.work, out, trial.policy), {}, HANG_S)
    if again != 0:
        verdict.wrong.append(f"not recovered: the same command ends with {again}: {err.rstrip()[-300:]}")
    else:
        verdict.wrong += differences(trial.work, out, bench.folder / f"whole-{trial.work}")
    return verdict


def _disturbed(trial: Trial, command: list[str], out: Path, moment_s: float) -> tuple[int | None, str, list[str]]:
    """Run a command with its fault; return its exit code (None: it hung), its stderr, and what was wrong."""
    shell, variables = _surroundings(trial, out)
    argv = [*shell, *command]
    log = out.with_suffix(".log")
    with log.open("wb") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1", TAG: str(out)} | variables
        process = subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file, env=env, start_new_session=True
        )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment_s)
    _strike(trial, process, out)
    try:
        code: int | None = process.wait(HANG_S)
    except subprocess.TimeoutExpired:
        code = None
    wrong = [] if code is not None else ["hang"]
    if left := _left_alive(str(out)):
        wrong.append(f"{len(left)} processes live on")
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    return code, log.read_text(encoding="utf-8", errors="replace"), wrong


def _surroundings(trial: Trial, out: Path) -> tuple[list[str], dict[str, str]]:
    """Return the shell around a command, and variables of its environment."""
    mounted = {"disk": "size=1500k", "inodes": "nr_inodes=24"}
    if trial.fault in mounted:
        out.mkdir()
        mount = f'mount -t tmpfs -o {mounted[trial.fault]} none "{out}" && "$@"; code=$?; '
        keep = f'mkdir "{out}.kept" && cp -a "{out}/." "{out}.kept/"; exit $code'
        return ["unshare", "-m", "bash", "-c", mount + keep, "bash"], {}
    if trial.fault == "shared memory":
        mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
        return ["unshare", "-m", "bash", "-c", mount, "bash"], {}
    if trial.fault == "streams":
        return ["bash", "-c", f'exec "$@" {STREAMS[trial.stream]}', "bash"], {}
    if trial.fault == "file size":
        return ["bash", "-c", 'ulimit -f 60 && exec "$@"', "bash"], {}
    return [], LOCALE if trial.fault == "locale" else {}


def _strike(trial: Trial, process: subprocess.Popen, out: Path) -> None:
    """Do what the fault does at its moment; nothing if the work has ended."""
    if process.poll() is not None:
        return
    if trial.fault == "SIGSTOP":
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
    elif trial.fault in SIGNALS:
        process.send_signal(signal.Signals[trial.fault])
    elif trial.fault in ("moved", "removed") and out.exists():
        with contextlib.suppress(OSError):
            out.rename(out.with_name("moved"))
            if trial.fault == "removed":
                shutil.rmtree(out.with_name("moved"))


def _left_alive(tag: str) -> list[psutil.Process]:
    """Return the processes of a trial that live longer than a moment after its end."""
    deadline = time.monotonic() + GRACE_S
    while found := [one for one in psutil.process_iter() if _is_tagged(one, tag)]:
        if time.monotonic() > deadline:
            return found
        time.sleep(0.1)
    return []


def _is_tagged(process: psutil.Process, tag: str) -> bool:
    try:
        return process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _judge_end(trial: Trial, verdict: Verdict, told: str, out: Path) -> None:
    """Add to a verdict what was wrong with the way in which the work ended."""
    code, right = verdict.code, ENDS[trial.fault] | {0}
    if code is not None and code not in right:
        verdict.wrong.append(f"exit code {code}, not one of {sorted(right)}")
    if "Traceback (most recent call last)" in told and code not in (130, -2):
        verdict.wrong.append("traceback")
    place = next((p for p in (Path(f"{out}.kept"), out.with_name("moved"), out) if p.exists()), out)
    if trial.work != "train":
        return
    newest = newest_checkpoint(place) if place.exists() else None
    if any(damage(folder) for folder in checkpoints_of(place)):
        verdict.wrong.append("a checkpoint under its final name is damaged")
    if code == 75 and newest is None:
        verdict.wrong.append("false sentence: stopped with exit code 75, and no checkpoint opens")
    if code == 0 and (newest is None or newest.name != f"step-{STEPS:07d}"):
        verdict.wrong.append(f"false end: exit code 0, and the newest checkpoint is {newest}")


def _put_back(trial: Trial, folder: Path, out: Path) -> None:
    """Undo what a user would undo: a folder that was moved, a disk that was too small."""
    for kept in (Path(f"{out}.kept"), folder / "moved"):
        if kept.exists():
            shutil.rmtree(out, ignore_errors=True)
            kept.rename(out)


def differences(work: str, out: Path, whole: Path) -> list[str]:
    """Return how finished work differs from that which nothing disturbed."""
    if work == "shards":
        return [] if _bytes_of(out) == _bytes_of(whole) else ["lost: the shards are not equal byte for byte"]
    ours, theirs = ({e["step"]: [e[k] for k in COMPARED] for e in read_metrics(f, "train")} for f in (out, whole))
    wrong = [] if ours == theirs else ["lost: the figures of steps are not equal"]
    last = f"checkpoints/step-{STEPS:07d}"
    tensors = [{p.name: p.read_bytes() for p in (f / last).glob("*.safetensors")} for f in (out, whole)]
    return wrong if tensors[0] == tensors[1] else [*wrong, "lost: the last weights are not equal"]


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _run(argv: list[str], variables: dict[str, str], limit_s: float) -> tuple[int, str, str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", env=env, timeout=limit_s, check=False
    )
    return done.returncode, done.stdout, done.stderr
