"""Kills a save before each of its calls that change the disk, in turn: python killed_saves.py FOLDER

A save is a fork of this process, so that a trial takes milliseconds. Prints a JSON list with one entry for each trial:
the call, what was found afterwards, and what a second save made of it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_checkpoints import save, tiny_config

from asda.checkpoint.read import newest_checkpoint
from asda.checkpoint.writer import POINTER

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_before(place: int, folder: Path) -> Callable[..., Any]:
    """Count calls that change something in `folder`; end the process before the one at `place`, and note its name."""
    seen, really_write = 0, os.write

    def count(name: str, path: object) -> None:
        nonlocal seen
        if seen == place:
            really_write(1, f"{name} {Path(str(path)).name}\n".encode())
            os._exit(9)
        seen += 1

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        reads = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if event in CHANGES and str(arguments[0]).startswith(str(folder)) and not reads:
            count(event, arguments[0])

    sys.addaudithook(on_event)
    return count


def counted(really: Callable[..., Any], count: Callable[..., Any]) -> Callable[..., Any]:
    """A function of os that takes a descriptor, and has its calls counted."""

    def counting(descriptor: int, *arguments: Any) -> Any:
        count(really.__name__, os.readlink(f"/proc/self/fd/{descriptor}"))
        return really(descriptor, *arguments)

    return counting


def killed_save(run: Path, config: Any, step: int, place: int) -> str:
    """Save in a fork that dies; the call before which it did, or "" when it came to its end before."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        count = kill_before(place, run)
        os.fsync, os.write = counted(os.fsync, count), counted(os.write, count)
        save(run, config, step)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        call = told.read().strip()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if call else 0)
    return call


def trial(folder: Path, before: Path, config: Any, place: int) -> dict[str, Any]:
    run = folder / f"{place}"
    shutil.copytree(before, run)
    call = killed_save(run, config, 3, place)
    warnings: list[str] = []
    found = newest_checkpoint(run, warnings.append)
    save(run, config, 4)
    after = run / "checkpoints"
    return {
        "call": call,
        "found": found.name if found else None,
        "warnings": warnings,
        "kept": sorted(path.name for path in after.glob("step-*")),
        "newest": getattr(newest_checkpoint(run, warnings.append), "name", None),
        "leftovers": [path.name for path in after.iterdir() if ".tmp" in path.name],
        "pointer": (after / POINTER).read_text().strip(),
    }


def main() -> None:
    folder, config = Path(sys.argv[1]), tiny_config("run.keep=2")
    before = folder / "before"
    for step in (1, 2):
        save(before, config, step)
    trials = [trial(folder, before, config, 0)]
    while trials[-1]["call"]:
        trials.append(trial(folder, before, config, len(trials)))
    print(json.dumps(trials))


if __name__ == "__main__":
    main()
