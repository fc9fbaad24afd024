"""Verdicts on what a program has left: exit codes, tracebacks, sentences, checkpoints, living processes.

Every function returns complaints, each "CATEGORY: what was seen"; none is good.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from faults import DONE, STOPPED
from processes import BIN, ROOT

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import checkpoints_of, newest_checkpoint, read_state
from asda.errors import UserError

HANG, TRACEBACK, CODE, SENTENCE, LEFT, LOST, DIFFERS = CATEGORIES = (
    "hang", "traceback", "exit code", "false sentence", "left behind", "lost", "not recovered",
)  # fmt: skip
BEGIN = "Traceback (most recent call last)"
STOP_SENTENCE = re.compile(r"stopped after step (\d+) of \d+, .*a checkpoint is saved")
SAVED_LINE = re.compile(r"^(?:\[rank \d+\] )?saved .*/step-(\d{7,}) \(", re.MULTILINE)


def steps_named(run: Path) -> list[int]:
    """Return the steps of all checkpoints in a run folder, intact or not."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints_of(run)]


def of_ending(code: int | None, survivors: Iterable[str], limit_s: float) -> list[str]:
    """Complain about a program that does not end, or leaves processes."""
    found = [f"{HANG}: it still ran after {limit_s:g} s"] if code is None else []
    return found + [f"{LEFT}: {its[:300]}" for its in survivors]


def tracebacks(text: str, *, launcher: bool) -> list[str]:
    """Return the tracebacks in a text; those of deepspeed's launcher are not counted if `launcher` is set."""
    blocks = []
    for block in text.split(BEGIN)[1:]:
        first, *lines = block.splitlines()
        inside = [line for line in lines if line.startswith((" ", "["))]
        last = next((line for line in lines if line and not line.startswith(" ")), first)
        own = f'File "{ROOT}/asda/' in "\n".join(inside)
        # Ranks are scripts: what runs as a module, or as the program deepspeed, is its launcher.
        its = any(words in block for words in ("deepspeed/launcher/", f"{BIN}/deepspeed", "<frozen runpy>"))
        if not launcher or own or not its:
            blocks.append(last.strip())
    return blocks


def of_tracebacks(text: str, *, launcher: bool) -> list[str]:
    """Complain about every traceback."""
    return [f"{TRACEBACK}: {its}" for its in tracebacks(text, launcher=launcher)]


def of_code(code: int | None, allowed: Iterable[int]) -> list[str]:
    """Complain about an exit code that is not right for the fault; 256 - n is deepspeed's code for signal n."""
    if code is None:
        return []
    seen = 128 + 256 - code if code > 240 else code
    return [] if seen in {DONE, *allowed} else [f"{CODE}: {code}, not 0 or one of {sorted(allowed)}"]


def of_done(code: int | None, result: object, reference: object) -> list[str]:
    """Complain about exit code 0 without the whole result."""
    return (
        [f"{SENTENCE}: exit code 0, but the result is not the reference's"] if not code and result != reference else []
    )


def of_sentences(code: int | None, stdout: str, stderr: str, *places: Path) -> list[str]:
    """Complain about checkpoints that are called saved but cannot be opened in any place of the run folder."""
    newest = max(map(_newest, places))
    called = max(map(int, SAVED_LINE.findall(stdout + stderr)), default=0)
    found = [f"{SENTENCE}: step {called} is called saved, the newest is {newest}"] if called > newest else []
    stops = [int(step) for step in STOP_SENTENCE.findall(stderr)]
    if any(step != newest for step in stops):
        found.append(f"{SENTENCE}: stopped and saved at step {stops[-1]}, but the newest checkpoint is of {newest}")
    if code == STOPPED and not stops and stderr:
        found.append(f"{SENTENCE}: exit code {STOPPED} without a sentence that tells the step")
    return found


def of_checkpoints(run: Path, before: list[int], keep: int) -> list[str]:
    """Complain about checkpoints that are damaged or gone, compared with those before the fault."""
    folders = checkpoints_of(run)
    found = [f"{LOST}: {path.name} is damaged: {complaint}" for path in folders if (complaint := damage(path))]
    intact = [step for step in steps_named(run)[-keep:] if step <= _newest(run)]
    if before and (not intact or intact[-1] < before[-1] or len(intact) < min(keep, len(before))):
        found.append(f"{LOST}: the steps {before} were saved before, {intact} are after")
    return found


def of_recovery(code: int | None, result: object, reference: object) -> list[str]:
    """Complain if the same command does not end with the uninterrupted result."""
    if code != DONE:
        return [f"{DIFFERS}: the same command without the fault ended with {code}"]
    if result == reference:
        return []
    keys = _different(result, reference)
    return [f"{DIFFERS}: the same command without the fault gave another result: {', '.join(keys[:5])}"]


def _different(one: object, other: object) -> list[str]:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return ["everything"]
    return [str(key) for key in {**one, **other} if one.get(key) != other.get(key)]


def _newest(run: Path) -> int:
    """Return the step of the newest checkpoint that opens; 0 if there is none."""
    try:
        newest = newest_checkpoint(run, lambda _: None)
        return read_state(newest)[1].step if newest else 0
    except UserError:
        return 0
