"""Tiny runs that are stopped and continued: how to start them, and how to compare them bit for bit."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from forked_ranks import Rank, RankServer
from launching import pretraining
from safetensors.torch import load_file

from asda.checkpoint.read import newest_checkpoint
from asda.engine.processes import free_port
from asda.run.log import read_metrics

EVERY = 5  # steps between checkpoints
COMPARED = (  # what the log says of a step, without times and rates
    "loss", "frame_loss", "utterance_loss", "prediction_variance", "target_variance", "ema_decay", "lr", "grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class TinyRun:
    """A pre-training run of a tiny model, each of its sessions on forked ranks."""

    ranks: RankServer
    shards: Path
    folder: Path
    steps: int
    world_size: int = 0  # 0: plain python
    more: tuple[str, ...] = ()

    def start(self, session: int = 0) -> list[Rank]:
        """Begin, or go on; one process a rank."""
        port = free_port()
        return [
            self.ranks.start(
                rank,
                self.world_size,
                port,
                self.folder.with_suffix(f".{session}.{rank}.log"),
                "tests/helpers/recording_train.py",
                "--draws",
                str(self._draws(session, rank)),
                *self.arguments(),
            )
            for rank in range(max(1, self.world_size))
        ]

    def arguments(self) -> list[str]:
        own = [f"optimizer.steps={self.steps}", f"run.save_every={EVERY}", "run.keep=2"]
        return pretraining(self.shards, self.folder, *own, *self.more)

    def finish(self, session: int = 0) -> None:
        """Train to the last step."""
        for rank in self.start(session):
            assert rank.wait(120) == 0, rank.text()

    def figures(self) -> dict[int, dict[str, float]]:
        """What metrics.jsonl says of each step; nothing while it is being written anew."""
        if not (self.folder / "metrics.jsonl").is_file():
            return {}
        return {e["step"]: {key: e[key] for key in COMPARED} for e in read_metrics(self.folder, "train")}

    def draws(self, session: int = 0) -> list[list[list[int]]]:
        """What was trained on in a session: for each micro-batch the draws of all ranks, in the order of the ranks."""
        paths = [self._draws(session, rank) for rank in range(max(1, self.world_size))]
        texts = [path.read_text() if path.exists() else "" for path in paths]
        whole = [text[: text.rfind("\n") + 1].splitlines() for text in texts]  # without the line of a dying process
        return [list(chain(*map(json.loads, lines))) for lines in zip(*whole, strict=False)]

    def newest_step(self) -> int:
        """Of the newest intact checkpoint; 0 when there is none."""
        newest = newest_checkpoint(self.folder)
        return int(newest.name.removeprefix("step-")) if newest else 0

    def tensors(self) -> dict[str, dict]:
        """All tensors of the last checkpoint, by file."""
        last = self.folder / "checkpoints" / f"step-{self.steps:07d}"
        return {path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))}

    def steps_begun(self, session: int) -> int:
        """How many steps a session has begun; a step is one micro-batch here."""
        path = self._draws(session, 0)
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _draws(self, session: int, rank: int) -> Path:
        return self.folder.with_suffix(f".{session}.{rank}.draws")


def wait_until(condition: Callable[[], bool], ranks: Iterable[Rank], timeout_s: float = 60.0) -> None:
    """Look often, so that what follows happens at once; fails when a rank has ended."""
    ranks, deadline = list(ranks), time.monotonic() + timeout_s
    while not condition():
        assert all(rank.runs for rank in ranks), "".join(rank.text() for rank in ranks)
        assert time.monotonic() < deadline, "".join(rank.text() for rank in ranks)
        time.sleep(0.001)


def assert_same_runs(one: TinyRun, other: TinyRun) -> None:
    """Same figures of every step, same tensors at the end, bit for bit."""
    assert one.figures() == other.figures()
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        assert all(tensor.equal(theirs[file][name]) for name, tensor in tensors.items()), file
