"""Notice a rank that is silent or has failed, and end the others with one sentence."""

import os
import socket
import threading
from datetime import timedelta
from typing import Self

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from asda.engine.processes import Processes
from asda.errors import LOST_PEER_EXIT, Stopped, end_at_once

HEARTBEAT_TIMEOUT_S = 45.0
BEATS_PER_TIMEOUT = 15  # a beat every 3 s
VERDICT = "verdict"  # key of the sentence by which all end
DONE, GONE = "done", "gone"  # in place of the number of the last beat


class Heartbeat:
    """Ends this process, with LOST_PEER_EXIT and one sentence, when another rank is silent or has failed.

    Every rank writes a number to a store that the first rank keeps. If the number of a rank stands still, the first
    rank decides that all end. If the store does not answer a rank, it ends by itself: the first rank has gone. NCCL
    would wait for ten minutes, and so would gloo if a process is frozen or its machine unreachable.

    Silence is counted in own beats, not by the clock: a job that was suspended as a whole wakes with all its ranks.
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
        """Start beating. All ranks call this together."""
        if self._world_size > 1:
            self._store = _shared_store(self._world_size, self._timeout_s)
            self._first_host = self._store.get(_host_key(0)).decode()
            self._store.set(_host_key(self._rank), socket.gethostname())
            self._beating = threading.Thread(target=self._beat, name="asda-heartbeat", daemon=True)
            self._beating.start()
            threading.Thread(target=self._watch, name="asda-heartbeat-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Sign off. The first rank keeps the store until the others have signed off too.

        If this rank has failed, the others learn it here, and it waits for nobody.
        """
        if self._world_size > 1:
            failed = kind is not None and not issubclass(kind, Stopped)
            self._farewell = GONE if failed else DONE
            self._ended.set()
            self._beating.join(self._interval_s if failed else self._timeout_s)

    def _beat(self) -> None:
        """Talk to the store, in a thread that may wait for its answer; nothing else ever does."""
        try:
            number = 0
            while not self._ended.wait(self._interval_s):
                number += 1
                self._store.set(_beat_key(self._rank), str(number))
                verdict = self._verdict() if self._rank == 0 else self._store.get(VERDICT).decode()
                self._num_unanswered = 0
                if verdict:
                    self._leave(verdict)
            self._store.set(_beat_key(self._rank), self._farewell)
            self._see_off()
        except RuntimeError:  # of torch's DistNetworkError and others
            self._leave(f"stopped, because rank 0 on {self._first_host} has stopped; see its message")

    def _verdict(self) -> str:
        """Look at all ranks, on the first; put the sentence by which all end into the store and return it, or ""."""
        for rank, beat in enumerate(self._beats()):
            stands_still = beat == self._last_beats[rank] and beat != DONE
            self._num_silent[rank] = self._num_silent[rank] + 1 if stands_still else 0
            self._last_beats[rank] = beat
            if beat == GONE or self._num_silent[rank] >= BEATS_PER_TIMEOUT:
                host = self._store.get(_host_key(rank)).decode()
                silent = f"did not respond for {self._timeout_s:g} s"
                ending = "has stopped; see its message" if beat == GONE else silent
                verdict = f"stopped, because rank {rank} on {host} {ending}"
                self._store.set(VERDICT, verdict)
                return verdict
        return ""

    def _beats(self) -> list[str]:
        return [beat.decode() for beat in self._store.multi_get(list(map(_beat_key, range(self._world_size))))]

    def _see_off(self) -> None:
        """Keep the store until every rank has signed off; __exit__ limits the wait."""
        if self._rank == 0 and self._farewell == DONE:
            pause = threading.Event()
            while not set(self._beats()) <= {DONE, GONE}:
                pause.wait(0.05)

    def _watch(self) -> None:
        """End this process if the store does not answer the other thread in time."""
        while not self._ended.wait(self._interval_s):
            self._num_unanswered += 1
            if self._num_unanswered >= BEATS_PER_TIMEOUT:
                silence = f"did not respond for {self._timeout_s:g} s"
                self._leave(f"stopped, because rank 0 on {self._first_host} {silence}")

    def _leave(self, sentence: str) -> None:
        """End the process, unless its main thread is about to: it knows more.

        The first rank stays a little longer, so that the others can read the sentence in its store.
        """
        if not self._ended.wait(self._interval_s * (1 if self._rank else 2)):
            end_at_once(sentence, LOST_PEER_EXIT)


def _beat_key(rank: int) -> str:
    return f"beat of {rank}"


def _host_key(rank: int) -> str:
    return f"host of {rank}"


def _shared_store(world_size: int, timeout_s: float) -> TCPStore:
    """Open a store of our own on the first rank's machine, which only this thread uses."""
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
