"""How a run ends before its last step: because it is asked to, or because another rank has gone.

    with StopSignals() as stop, Heartbeat(processes):
        for step ...:
            ...
            if agree(processes, stop=bool(stop.asked))["stop"]:  # on all ranks in the same step
                save a checkpoint, and wait until all ranks have
                raise Stopped("...")

A signal to one rank stops all of them, each after the same step, so that none enters the checkpoint alone.
"""

import os
import signal
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from asda.engine import Processes
from asda.errors import LOST_PEER_EXIT, Stopped, say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_S = 3.0  # launchers send on what the whole group has got: within this time it is the same wish
WATCH_S = 1.0  # between looks at the launchers
LAUNCHERS = {  # programs and modules that start ranks and wait for them
    "deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip

HEARTBEAT_TIMEOUT_S = 45.0
BEATS_PER_TIMEOUT = 15  # a beat every 3 s
VERDICT = "verdict"  # key of the sentence by which all end
DONE, GONE = "done", "gone"  # in place of the number of the last beat


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGUSR1 and the death of a launcher into a wish that the loop reads: `asked`.

    A second signal ends the process at once, with 128 + its number. A thread hears them, not Python's handlers: those
    wait for the main thread, which may be waiting in turn for a rank that has gone.
    """

    def __init__(self) -> None:
        self.asked = ""  # what asked for the stop: "SIGTERM", or "the end of its launcher"; empty while nothing has
        self._over = threading.Event()
        self._repeats_count = False

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, _do_nothing) for number in STOP_SIGNALS}
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="asda-signals", daemon=True).start()
        if launchers := launchers_above(psutil.Process()):
            threading.Thread(target=self._watch, args=(launchers,), name="asda-launchers", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Hear nothing more. After a stop signals are ignored to the end, which a launcher may want to hasten."""
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.asked else handler)
        self._mouth.close()

    def _listen(self) -> None:
        """Take the numbers of signals as they come, until __exit__ closes the other end."""
        with self._ears:
            while numbers := self._ears.recv(1):
                if numbers[0] in STOP_SIGNALS:
                    self._hear(signal.Signals(numbers[0]))

    def _hear(self, number: signal.Signals) -> None:
        if not self.asked:
            self._ask(number.name)
        elif self._repeats_count:
            say(f"{number.name} again: leaving at once; the last checkpoint stays as it is")
            os._exit(128 + number)

    def _ask(self, what: str) -> None:
        self.asked = what
        waking = threading.Timer(REPEAT_S, lambda: setattr(self, "_repeats_count", True))
        waking.daemon = True
        waking.start()
        say(
            f"{what}: this step will be finished and saved, then the run stops; "
            f"a signal after {REPEAT_S:g} s from now ends it at once"
        )

    def _watch(self, launchers: list[psutil.Process]) -> None:
        while not self._over.wait(WATCH_S):
            if not all(map(_lives, launchers)):
                if not self.asked:
                    self._ask("the end of its launcher")
                return


def launchers_above(process: psutil.Process) -> list[psutil.Process]:
    """The launchers that a process descends from without others in between: deepspeed and its launch.py, torchrun.

    Not the shell above them: under nohup and setsid it ends, and the run goes on.
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
    """What Python was told to run: a module's dotted name, or the last part of a script's path; "" of others."""
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
    """A handler, so that a signal is neither deadly nor ignored: what is ignored wakes no thread."""


def agree(processes: Processes, **flags: bool) -> dict[str, bool]:
    """Whether any rank has raised each flag, the same answer on all ranks. All ranks call this together.

    One exchange of as many bytes as there are flags, between the hosts' memories: no GPU waits for it.
    """
    if processes.world_size == 1:
        return flags
    votes = torch.tensor(list(flags.values()), dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_host_group())
    return dict(zip(flags, map(bool, votes.tolist()), strict=True))


@cache
def _host_group() -> Any:
    """A gloo group of all ranks; made by all in their first call of `agree`."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


class Heartbeat:
    """Ends this process, with LOST_PEER_EXIT and one sentence, when another rank is silent or has failed.

    Every rank writes a number to a store that the first rank keeps, and the first rank gives the verdict when one
    of them stands still. A rank whose store does not answer gives it by itself: then the first rank has gone. NCCL
    would wait for ten minutes, and gloo for as long where a process is frozen or its machine unreachable.

    Silence is counted in own beats, not by the clock: a job that is suspended as a whole wakes with all its ranks.
    """

    def __init__(self, processes: Processes, timeout_s: float = HEARTBEAT_TIMEOUT_S):
        self._rank, self._world_size = processes.rank, processes.world_size
        self._timeout_s, self._interval_s = timeout_s, timeout_s / BEATS_PER_TIMEOUT
        self._ended = threading.Event()  # this process is leaving by itself
        self._farewell = DONE
        self._num_unanswered = 0  # own ticks since the store's last answer
        # What the first rank knows of all: their last beats, and its own since each of them changed.
        self._last_beats = [""] * self._world_size
        self._num_silent = [0] * self._world_size

    def __enter__(self) -> Self:
        """Begin. All ranks call this together."""
        if self._world_size > 1:
            self._store = _shared_store(self._world_size, self._timeout_s)
            self._first_host = self._store.get(_host_key(0)).decode()
            self._store.set(_host_key(self._rank), socket.gethostname())
            self._beating = threading.Thread(target=self._beat, name="asda-heartbeat", daemon=True)
            self._beating.start()
            threading.Thread(target=self._watch, name="asda-heartbeat-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Say goodbye; the first rank, which keeps the store, stays until the others have done so.

        When a rank has failed, the others learn it here. It waits for nobody.
        """
        if self._world_size > 1:
            failed = kind is not None and not issubclass(kind, Stopped)
            self._farewell = GONE if failed else DONE
            self._ended.set()
            self._beating.join(self._interval_s if failed else self._timeout_s)

    def _beat(self) -> None:
        """The thread that talks to the store, which may not answer: nothing else ever waits for it."""
        try:
            number = 0
            while not self._ended.wait(self._interval_s):
                number += 1
                self._store.set(_beat_key(self._rank), str(number))
                verdict = self._judge() if self._rank == 0 else self._store.get(VERDICT).decode()
                self._num_unanswered = 0
                if verdict:
                    self._leave(verdict)
            self._store.set(_beat_key(self._rank), self._farewell)
            self._see_off()
        except RuntimeError:  # of torch's DistNetworkError and others
            self._leave(f"stopped, because rank 0 on {self._first_host} has stopped; its message says why")

    def _judge(self) -> str:
        """The first rank's look at all others; returns the verdict, which is in the store by then, or nothing."""
        for rank, beat in enumerate(self._beats()):
            stands_still = beat == self._last_beats[rank] and beat != DONE
            self._num_silent[rank] = self._num_silent[rank] + 1 if stands_still else 0
            self._last_beats[rank] = beat
            if beat == GONE or self._num_silent[rank] >= BEATS_PER_TIMEOUT:
                host = self._store.get(_host_key(rank)).decode()
                silent = f"gave no sign of life for {self._timeout_s:g} s"
                ending = "has stopped; its message says why" if beat == GONE else silent
                verdict = f"stopped, because rank {rank} on {host} {ending}"
                self._store.set(VERDICT, verdict)
                return verdict
        return ""

    def _beats(self) -> list[str]:
        return [beat.decode() for beat in self._store.multi_get(list(map(_beat_key, range(self._world_size))))]

    def _see_off(self) -> None:
        """Keep the store until everybody has said goodbye; __exit__ does not wait for ever."""
        if self._rank == 0 and self._farewell == DONE:
            pause = threading.Event()
            while not set(self._beats()) <= {DONE, GONE}:
                pause.wait(0.05)

    def _watch(self) -> None:
        """The clock of the thread above, which may wait for a store that never answers."""
        while not self._ended.wait(self._interval_s):
            self._num_unanswered += 1
            if self._num_unanswered >= BEATS_PER_TIMEOUT:
                silence = f"gave no sign of life for {self._timeout_s:g} s"
                self._leave(f"stopped, because rank 0 on {self._first_host} {silence}")

    def _leave(self, sentence: str) -> None:
        """End the process, unless its main thread is about to: it knows more, or has the same reason as all.

        The first rank stays a little longer, until the others have read its verdict.
        """
        if not self._ended.wait(self._interval_s * (1 if self._rank else 2)):
            say(sentence)
            os._exit(LOST_PEER_EXIT)


def _beat_key(rank: int) -> str:
    return f"beat of {rank}"


def _host_key(rank: int) -> str:
    return f"host of {rank}"


def _shared_store(world_size: int, timeout_s: float) -> TCPStore:
    """A store of our own on the first rank's machine: one that is asked by this thread alone."""
    address, port = os.environ["MASTER_ADDR"], [0]
    options = {"wait_for_workers": False, "timeout": timedelta(seconds=timeout_s)}
    server = None
    if dist.get_rank() == 0:
        server = TCPStore(address, 0, is_master=True, **options)
        for key in (VERDICT, *map(_beat_key, range(world_size)), *map(_host_key, range(world_size))):
            server.set(key, "")
        server.set(_host_key(0), socket.gethostname())
        port = [server.port]
    dist.broadcast_object_list(port)
    return server or TCPStore(address, port[0], is_master=False, **options)
