"""Runs `asda shards` many times in one test: each run is a fork of a process that has done the imports.

The code is that of a run from the shell, except that its worker processes are forks too. A run begins within
milliseconds, so a test can afford to kill twenty.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from asda.__main__ import main
from asda.sharding.workers import ONE_THREAD

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"
IMPORTED_ONCE = [
    "asda.commands.shards",
    "asda.data.features.fbank",
]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(IMPORTED_ONCE)


def start(folder: Path, log: Path, *args: str) -> BaseProcess:
    """Start the tool in `folder`; what it prints goes to `log`, with stderr in `log`.err."""
    process = _server.Process(target=_run, args=(folder, log, args))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ONE_THREAD.items():  # for the server, from its start on: OpenMP's threads survive no fork
            environment.setenv(name, value)
        process.start()
    return process


def _run(folder: Path, log: Path, args: tuple[str, ...]) -> None:
    os.chdir(folder)
    for stream, path in ((1, log), (2, log.with_suffix(".err"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    main(["shards", *args])
