"""What a run tells: a progress bar or plain lines, metrics.jsonl, TensorBoard. Only the first rank tells anything."""

import json
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from asda.errors import UserError


class RunLog:
    """The record of one run in its folder.

    metrics.jsonl holds one object a line with at least "step" and "kind" ("train", "valid"); it is the ground truth
    that reports are made from. A resumed run drops the lines of steps that it will do again.
    """

    def __init__(self, folder: Path, first_step: int, num_steps: int, *, enabled: bool):
        self._enabled = enabled
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give another run.folder") from None
        self._metrics_path = folder / "metrics.jsonl"
        _drop_later_lines(self._metrics_path, first_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._enabled:
            self._bar.write(line)
            sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        if self._enabled:
            self._bar.update()

    def record(self, kind: str, step: int, figures: dict[str, float | int]) -> None:
        """Write figures to the file, the board and the terminal."""
        if not self._enabled:
            return
        with self._metrics_path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        self.say(f"{kind} step {step}: " + "  ".join(f"{name} {_short(value)}" for name, value in figures.items()))

    def close(self) -> None:
        """Flush and end."""
        if self._enabled:
            self._bar.close()
            self._board.close()


def read_metrics(folder: Path, kind: str) -> list[dict]:
    """The lines of one kind of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; is {folder} the folder of a run?")
    return [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["kind"] == kind]


def _drop_later_lines(path: Path, first_step: int) -> None:
    if not path.is_file():
        return
    # A killed process may have left half a line; everything after the last newline is dropped with it.
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
