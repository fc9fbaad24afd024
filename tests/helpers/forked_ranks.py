"""Ranks without a launcher, each a fork of a process that has imported everything, so that 20 kills take a minute.

    with RankServer() as ranks:
        rank = ranks.start(0, 2, port, log, "asda/train.py", *arguments)
        rank.kill(signal.SIGKILL)
        assert rank.wait(30) == -signal.SIGKILL

A rank runs its script as Python would, in a group of its own; only the seconds of importing DeepSpeed are gone.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launching import ROOT, environment

IMPORTED_ONCE = ["asda.trainer", "torch.utils.data", "webdataset.compat"]


@dataclass(frozen=True)
class Rank:
    """A process, which the server has started and reaps."""

    pid: int
    log: Path  # stdout and stderr
    exit_file: Path  # the exit code, once it has ended

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """The exit code; -9 after SIGKILL."""
        deadline = time.monotonic() + timeout_s
        while not self.exit_file.exists():
            assert time.monotonic() < deadline, f"rank still runs after {timeout_s} s:\n{self.text()}"
            time.sleep(0.005)
        return int(self.exit_file.read_text())

    @property
    def runs(self) -> bool:
        return not self.exit_file.exists()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class RankServer:
    """Starts ranks; kills those that are left at its end."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self._ranks: list[Rank] = []
        return self

    def __exit__(self, *exception: object) -> None:
        for rank in self._ranks:
            if rank.runs:
                os.killpg(rank.pid, signal.SIGKILL)
        self._server.communicate()

    def start(self, rank: int, world_size: int, port: int, log: Path, script: str, *arguments: str) -> Rank:
        """Start one rank of `world_size`; 0: plain python, without an environment of ranks."""
        given = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in (given | meeting).items()} if world_size else {}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        exit_file = log.with_suffix(".exit")
        exit_file.unlink(missing_ok=True)
        order = {"env": variables, "argv": [str(ROOT / script), *arguments], "log": str(log), "exit": str(exit_file)}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self._ranks.append(Rank(int(self._server.stdout.readline()), log, exit_file))
        return self._ranks[-1]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints while it is imported
    for name in IMPORTED_ONCE:
        __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "threads survive no fork"
    children: dict[int, str] = {}
    signal.signal(signal.SIGCHLD, lambda *_: _reap(children))
    for line in sys.stdin:
        order = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it may end before we know its name
        pid = os.fork()
        if pid == 0:
            _become_rank(order)
        children[pid] = order["exit"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        print(pid, file=answers, flush=True)


def _reap(children: dict[int, str]) -> None:
    for pid in list(children):
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # two ended at once: a call inside this one has reaped it
            continue
        if done:
            path = Path(children.pop(pid))
            path.with_suffix(".tmp").write_text(str(os.waitstatus_to_exitcode(status)))
            path.with_suffix(".tmp").rename(path)


def _become_rank(order: dict) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["env"])
        sys.argv = order["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
