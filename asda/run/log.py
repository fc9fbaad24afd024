"""The log of a run: a progress bar or plain lines, metrics.jsonl, TensorBoard, Weights & Biases.

Only the first rank logs. metrics.jsonl is the ground truth, from which reports are made. The boards get the same
figures; a board that fails is dropped with a warning, and the run continues.
"""

import importlib.util
import json
import math
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from asda.config.base import MOST
from asda.config.run import RunConfig
from asda.errors import UserError, say
from asda.system import write_whole_file

Figures = dict[str, float | int]
NOT_FINITE = "not_finite"  # names whose values are null in a line of metrics.jsonl: JSON has no nan or infinity
BAD_STEPS = "bad_steps.jsonl"  # in the run folder: the clips of steps that changed nothing
WANDB_FILE = "wandb_run.txt"  # in the run folder: the id with which a run resumes its curves
UNKNOWN_ROWS, UNKNOWN_COLUMNS = 24, 100  # of a terminal whose size is unknown
UNSAID = {"step_s", "tflop_per_s", "data_wait_s"}  # not printed, because they follow from others; the file has them
ALARM_EVERY = 10  # least number of log lines between two alarms


class Board(Protocol):
    """A place that shows curves. To add one, write such a class and name it in RunLog."""

    name: str

    def record(self, kind: str, step: int, figures: Figures) -> None:
        """Take figures; after an OSError the board is dropped."""
        ...

    def close(self) -> None:
        """Flush and end; may raise OSError."""
        ...


class RunLog:
    """The record of one run in its folder.

    metrics.jsonl holds one object a line with at least "step" and "kind" ("train", "valid", "test", "test_best",
    "probe", "warning"), bad_steps.jsonl the clips of steps that changed nothing. A resumed run drops the lines of steps
    that it will do again.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        num_steps: int,
        *,
        enabled: bool,
        wandb: str = "",
        config: dict[str, Any] | None = None,
    ):
        """Open the record.

        Args:
            folder: of the run; made if need be.
            first_step: number of steps already done.
            num_steps: number of steps of the whole run.
            enabled: whether this rank logs.
            wandb: project of Weights & Biases; "" for none.
            config: the resolved configuration, for boards that show one.

        Raises:
            UserError: the folder cannot be made, or Weights & Biases refuses.
        """
        self._enabled = enabled
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give another run.folder") from None
        self._step = first_step
        self._num_alarms, self._lines_since_alarm = 0, ALARM_EVERY
        self._bar = _bar(first_step, num_steps)
        self._metrics, self._bad_steps = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / BAD_STEPS)
        for lines in (self._metrics, self._bad_steps):
            if num_damaged := lines.drop_after(first_step):
                self._print_warning(f"{lines.path} had {num_damaged} damaged lines; they are dropped")
        self._boards: list[Board] = []
        try:
            self._boards.append(TensorBoard(folder, first_step))
        except OSError as error:
            self._print_warning(f"no curves for TensorBoard: {error}; metrics.jsonl has all figures")
        if wandb:
            self._boards.append(curves := WeightsAndBiases(folder, wandb, config or {}))
            self.say(f"curves are at {curves.where}")

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._enabled:
            self._bar.write(line)
            sys.stdout.flush()

    def warn(self, sentence: str) -> None:
        """Print a warning on stderr and keep it in metrics.jsonl."""
        if self._enabled:
            self._print_warning(sentence)
            self._write(self._metrics, {"kind": "warning", "step": self._step, "text": sentence})

    def alarm(self, sentence: str | None) -> None:
        """Warn of a lasting problem: at once, then every ten lines of training, with a count.

        Args:
            sentence: what is wrong; None if nothing is.
        """
        if not self._enabled or sentence is None:
            return
        self._num_alarms += 1
        if self._lines_since_alarm >= ALARM_EVERY:
            times = f" ({self._num_alarms} times so far)" if self._num_alarms > 1 else ""
            self.warn(sentence + times)
            self._lines_since_alarm = 0

    def bad_step(self, step: int, clips: list[str]) -> None:
        """Record the names of the clips in a step that changed nothing."""
        if self._enabled:
            self._write(self._bad_steps, {"kind": "bad_step", "step": step, "clips": clips})

    def advance(self) -> None:
        """Count a step."""
        if self._enabled:
            self._step += 1
            self._bar.update()

    def record(self, kind: str, step: int, figures: Figures, notes: dict[str, str] | None = None) -> None:
        """Write figures to the file, the boards and the terminal, and notes to the file alone.

        A progress bar shows only a few figures of training.
        """
        if not self._enabled:
            return
        self._write(self._metrics, {"kind": kind, "step": step} | _valid(figures) | (notes or {}))
        for board in list(self._boards):
            try:
                board.record(kind, step, figures)
            except OSError as error:
                self._leave_out(board, error)
        self._lines_since_alarm += kind == "train"
        if kind == "train" and not self._bar.disable:
            self._bar.set_postfix(
                {name: _short(figures[name]) for name in ("loss", "clips_per_s", "lr") if name in figures}
            )
            return
        told = "  ".join(f"{name} {_short(value)}" for name, value in figures.items() if _is_worth_saying(name, value))
        self.say(f"{kind} step {step}: {told}")

    def close(self) -> None:
        """Flush and end."""
        if not self._enabled:
            return
        self._bar.close()
        for lines in (self._metrics, self._bad_steps):
            if lines.num_unwritten:
                self._print_warning(f"{lines.num_unwritten} lines could not be written to {lines.path}; they are lost")
        for board in list(self._boards):
            try:
                board.close()
            except OSError as error:
                self._leave_out(board, error)

    def _write(self, lines: "JsonLines", entry: dict[str, Any]) -> None:
        known = lines.num_unwritten > 0
        try:
            lines.write(entry)
        except OSError as error:
            if not known:
                self._print_warning(f"cannot write {lines.path}: {error.strerror}; its lines are kept for the next try")

    def _leave_out(self, board: Board, error: OSError) -> None:
        self._boards.remove(board)
        self.warn(f"{board.name} failed and gets no more figures: {error}; metrics.jsonl has all of them")

    def _print_warning(self, sentence: str) -> None:
        self._bar.write(f"warning: {sentence}", file=sys.stderr)
        sys.stderr.flush()


class JsonLines:
    """A file with a JSON object on every line; only its last line may be incomplete."""

    def __init__(self, path: Path):
        self.path = path
        self._unwritten = b""

    @property
    def num_unwritten(self) -> int:
        """The number of lines that wait for a disk that can be written."""
        return self._unwritten.count(b"\n")

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line, after those that could not be written before; on OSError keep them for the next call."""
        self._unwritten += json.dumps(entry, allow_nan=False).encode() + b"\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._unwritten)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # a full disk may have taken a part
            raise
        self._unwritten = b""

    def drop_after(self, step: int) -> int:
        """Keep the lines of steps up to this one; return how many whole lines were not valid JSON.

        A killed process leaves half a line; a power failure may leave lines of zeros.
        """
        if not self.path.is_file():
            return 0
        *lines, _ = self.path.read_bytes().split(b"\n")  # after the last newline comes nothing, or half a line
        entries = [_parsed(line) for line in lines]
        kept = [line for line, entry in zip(lines, entries, strict=True) if entry is not None and entry["step"] <= step]
        write_whole_file(self.path, b"".join(line + b"\n" for line in kept))
        return entries.count(None)


def read_metrics(folder: Path, kind: str) -> list[dict]:
    """Read the lines of one kind from metrics.jsonl, also of a running one; figures not finite are nan."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; is {folder} the folder of a run?")
    *lines, _ = path.read_bytes().split(b"\n")
    entries = [entry for entry in map(_parsed, lines) if entry is not None and entry["kind"] == kind]
    return [entry | dict.fromkeys(entry.pop(NOT_FINITE, ()), math.nan) for entry in entries]


class TensorBoard:
    """Event files in the folder tensorboard of the run."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int):
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def record(self, kind: str, step: int, figures: Figures) -> None:
        """Add a point to the curve of every figure."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, continued when ours resumes; WANDB_MODE=offline keeps it in the run folder.

    Curves are over our own step. W&B's counter would refuse the steps that a killed run does again; here they show
    twice, with equal values.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, project: str, config: dict[str, Any]):
        import wandb  # an optional extra, which takes seconds to import

        self._error = wandb.Error
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=_kept_id(folder),
                resume="allow",
                dir=str(folder),
                config=config,
                settings=wandb.Settings(console="off", silent=True),  # stdout stays ours
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"run.wandb {project!r}: Weights & Biases refuses: {reason}; set WANDB_MODE=offline to keep its "
                "files in the run folder, or leave run.wandb empty"
            ) from None
        self.where = folder / "wandb" if self._run.offline else self._run.url
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def record(self, kind: str, step: int, figures: Figures) -> None:
        """Add a point to the curve of every figure; it is sent in the background."""
        try:
            self._run.log({"step": step} | {f"{kind}/{name}": value for name, value in figures.items()})
        except self._error as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Send the rest."""
        try:
            self._run.finish()
        except self._error as error:
            raise OSError(str(error)) from error


def check_wandb(project: str) -> None:
    """Raise UserError if a project of Weights & Biases is named and its package is missing; call it first of all."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb {project!r} needs the package wandb: pip install 'asda[wandb]', or leave run.wandb empty"
        )


def collapse_alarm(figures: Figures, config: RunConfig) -> str | None:
    """Return a sentence if targets or predictions hardly differ from patch to patch, else None.

    Students can satisfy a teacher that says the same of every patch; then the loss is low and nothing is learned.

    Args:
        figures: of a log line. "target_variance" and "prediction_variance" are checked if they are there and finite;
            data2vec calls them so, though they are standard deviations.
        config: the thresholds.
    """
    for kind, least in (("target", config.min_target_spread), ("prediction", config.min_prediction_spread)):
        spread = figures.get(f"{kind}_variance", math.inf)
        if spread < least:
            return (
                f"{kind}_variance is {_short(spread)}, less than run.min_{kind}_spread {least:g}: {kind}s are nearly "
                "equal for all patches. If it lasts, training has collapsed: try a lower optimizer.lr, more "
                "optimizer.warmup_steps or a higher objective.ema.decay in another run.folder"
            )
    return None


def _bar(first_step: int, num_steps: int) -> tqdm:
    """Make a progress bar on a terminal, else one that shows nothing."""
    if not sys.stderr.isatty():
        return tqdm(disable=True)
    sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # a container's terminal may be 0 by 0
    rows, columns = (None, None) if sized else (UNKNOWN_ROWS, UNKNOWN_COLUMNS)
    return tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=sized, ncols=columns, nrows=rows)


def _valid(figures: Figures) -> dict[str, Any]:
    """Write figures as JSON can hold them."""
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    return {**figures, **dict.fromkeys(bad), **({NOT_FINITE: bad} if bad else {})}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line; None if no run can have written it: a log may have been edited, or damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not {"kind", "step"} <= entry.keys():
        return None
    absent = entry.get(NOT_FINITE, [])
    may_be = {"step": _is_count, "kind": _is_text, "text": _is_text, "clips": _are_clips, NOT_FINITE: _is_words}
    right = (may_be[k](v) if k in may_be else _is_figure(v) or (v is None and k in absent) for k, v in entry.items())
    return entry if _is_words(absent) and all(right) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_words(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _are_clips(value: object) -> bool:
    return _is_words(value) or _is_count(value)  # their names, a hash of them, or their number


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_figure(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= MOST)


def _kept_id(folder: Path) -> str:
    """Return the id under which a run folder resumes its curves; a copy of a folder gets an id of its own."""
    path, here = folder / WANDB_FILE, _place_of(folder)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept, *origin = lines or [""]
    is_copy = bool(origin) and not set(origin) & set(here)  # a moved folder keeps its number, a restored one its path
    if is_copy:
        say(f"{folder} is a copy of the run folder {origin[0]}: it gets a run of its own in Weights & Biases")
    if is_copy or not kept or origin != here:
        kept = kept if kept and not is_copy else secrets.token_hex(4)
        write_whole_file(path, "\n".join([kept, *here]) + "\n")
    return kept


def _place_of(folder: Path) -> list[str]:
    """Return the path of a folder, and its number on its disk."""
    status = folder.stat()
    return [json.dumps(str(folder.resolve())), f"{status.st_dev}:{status.st_ino}"]


def _is_worth_saying(name: str, value: float | int) -> bool:
    """Return False for a count of 0 and for what follows from other figures."""
    return name not in UNSAID and not (isinstance(value, int) and value == 0)


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"
