"""Stop a run before its last step, because a signal asks for it or because its launcher has ended.

    with StopSignals() as stop:
        for step ...:
            ...
            if agree(processes, stop=bool(stop.asked))["stop"]:  # on all ranks in the same step
                save a checkpoint, wait until all ranks have, raise Stopped("...")

A signal to one rank stops all of them after the same step, so that none saves alone.
"""

import os
import signal
import socket
import threading
from contextlib import suppress
from functools import cache
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from asda.engine.processes import Processes
from asda.errors import end_at_once, say_aside

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # SIGHUP: its terminal was closed
REPEAT_S = 3.0  # launchers forward signals that the whole group has got: within this time they are the same request
WATCH_S = 1.0  # between looks at the launchers
LAUNCHERS = {  # programs and modules that start ranks and wait for them
    "deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGUSR1, SIGHUP and the death of a launcher into a request that the loop reads: `asked`.

    A SIGHUP that is ignored at the start, as under nohup, stays ignored.
    A second signal ends the process at once, with 128 + its number. A thread receives them. Python's handlers would
    wait for the main thread, which may itself be waiting for a rank that has gone.
    """

    def __init__(self) -> None:
        self.asked = ""  # what asked for a stop: "SIGTERM", or "the end of its launcher"; empty until then
        self._over = threading.Event()
        self._repeats_count = False

    def __enter__(self) -> Self:
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, _do_nothing) for number in heard}
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="asda-signals", daemon=True).start()
        if launchers := launchers_above(psutil.Process()):
            threading.Thread(target=self._watch, args=(launchers,), name="asda-launchers", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening. After a stop, signals are ignored to the end, which a launcher may want to hasten."""
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.asked else handler)
        self._sent.close()

    def _listen(self) -> None:
        """Read the numbers of signals until __exit__ closes the other end."""
        with self._received:
            while numbers := self._received.recv(1):
                if numbers[0] in STOP_SIGNALS:
                    self._receive(signal.Signals(numbers[0]))

    def _receive(self, number: signal.Signals) -> None:
        if not self.asked:
            self._ask(number.name)
        elif self._repeats_count:
            end_at_once(f"{number.name} again: stopping at once; the last checkpoint is not touched", 128 + number)

    def _ask(self, what: str) -> None:
        self.asked = what
        waking = threading.Timer(REPEAT_S, lambda: setattr(self, "_repeats_count", True))
        waking.daemon = True
        waking.start()
        say_aside(
            f"{what}: the run finishes this step, saves a checkpoint and stops; "
            f"a second signal after {REPEAT_S:g} s ends it at once"
        )

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self._over.wait(WATCH_S):
            if not all(map(_lives, launchers)):
                if not self.asked:
                    self._ask("the end of its launcher")
                return


def launchers_above(process: psutil.Process) -> list[psutil.Process]:
    """Return the launchers directly above a process: deepspeed and its launch.py, torchrun.

    The shell above them does not count: under nohup and setsid it ends, and the run continues.
    """
    launchers = []
    for ancestor in process.parents():
        with suppress(psutil.Error):
            if program_of(ancestor.cmdline()) in LAUNCHERS:
                launchers.append(ancestor)
                continue
        break
    return launchers


def program_of(command_line: list[str]) -> str:
    """Return what Python runs: a module's dotted name, or a script's file name; "" for other programs."""
    python, *others = command_line or [""]
    words = iter(others if "python" in os.path.basename(python) else [])
    for word in words:
        if word == "-m":
            return next(words, "")
        if not word.startswith("-"):
            return os.path.basename(word)
    return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _do_nothing(*signal_and_frame: object) -> None:
    """Handle a signal, so that it neither kills nor is ignored: an ignored signal wakes no thread."""


def agree(processes: Processes, **flags: bool) -> dict[str, bool]:
    """Return for each flag whether any rank has raised it. All ranks call this together.

    They exchange a byte for each flag, between the hosts' memories: no GPU waits for it.
    """
    if processes.world_size == 1:
        return flags
    votes = torch.tensor(list(flags.values()), dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_host_group())
    return dict(zip(flags, map(bool, votes.tolist()), strict=True))


@cache
def _host_group() -> Any:
    """Return a gloo group of all ranks; all make it in their first call of `agree`."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
