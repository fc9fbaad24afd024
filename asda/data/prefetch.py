"""Loading ahead in threads or processes, and giving out in order; whoever waits knows for what.

Threads suffice to read, verify and decompress, which runs without Python's lock. Where the CPU makes the patches too,
threads wait for that lock between many short steps, and processes do about twice as much.
A stall is named on stderr while the caller waits, and ends the run after `timeout_s`.
"""

import atexit
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset
from webdataset.compat import WebLoader

from asda.errors import UserError, say
from asda.system import keep_freed_memory

STALL_S = 10.0  # between lines about a task that does not come
PR_SET_PDEATHSIG = 1  # of prctl.h
REQUESTS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Python's resource tracker removes what a rank leaves that ends at once, as it may have to; it need not say so.
NO_WORD_ABOUT_SEMAPHORES = "ignore:resource_tracker"
PARTING_S = 1.0  # for a thread to finish what it does; one that hangs is left behind

Task = TypeVar("Task")
Result = TypeVar("Result")
Load = Callable[[Task, Callable[[str], None]], Result]  # (task, note) -> result; note hears what is being read


@dataclass
class _Job(Generic[Task]):
    """A task under way."""

    task: Task
    result: Future[Any] = field(default_factory=Future)
    doing: str = "nothing yet"  # what is being read
    thread: str = "no thread yet"

    def note(self, doing: str) -> None:
        self.doing = doing


def read_ahead(
    tasks: Iterable[Task], load: Load[Task, Result], *, threads: int, ahead: int, timeout_s: float
) -> Iterator[Result]:
    """Load tasks in `threads` threads, at most `ahead` of them at a time, and yield the results in the tasks' order.

    Args:
        tasks: what to load; taken as they are needed.
        load: the work.
        threads: how many; with 0 the work is done in the caller's thread, when it is asked for.
        ahead: most tasks under way or waiting to be taken.
        timeout_s: longest wait for one result.

    Raises:
        UserError: a result takes too long, or memory has run out; the message names what was being read.
        Exception: what `load` raised, in its place of the order.
    """
    if threads == 0:
        yield from (load(task, lambda doing: None) for task in tasks)
        return
    keep_freed_memory()
    todo: queue.SimpleQueue[_Job[Task] | None] = queue.SimpleQueue()
    # Daemons, because a thread that hangs in a read must not keep the process from ending.
    crew = [
        threading.Thread(target=_work, args=(todo, load), name=f"asda-reader-{number}", daemon=True)
        for number in range(threads)
    ]
    for thread in crew:
        thread.start()
    tasks = iter(tasks)
    waiting: deque[_Job[Task]] = deque()
    try:
        while True:
            for task in islice(tasks, ahead - len(waiting)):
                waiting.append(_Job(task))
                todo.put(waiting[-1])
            if not waiting:
                return
            yield _wait_for(waiting.popleft(), timeout_s)
    finally:
        for job in waiting:
            job.result.cancel()
        for _ in crew:
            todo.put(None)
        for thread in crew:
            thread.join(PARTING_S)


def _work(todo: queue.SimpleQueue[_Job | None], load: Load) -> None:
    while (job := todo.get()) is not None:
        if job.result.set_running_or_notify_cancel():
            job.thread = threading.current_thread().name
            try:
                job.result.set_result(load(job.task, job.note))
            except BaseException as error:
                job.result.set_exception(error)


def _wait_for(job: _Job, timeout_s: float) -> Any:
    started = time.monotonic()
    while (left := started + timeout_s - time.monotonic()) > 0:
        try:
            return job.result.result(min(left, STALL_S))
        except FutureTimeoutError:
            if job.result.done():  # the work itself raised it
                raise
            say(f"waiting for data since {time.monotonic() - started:.0f} s: {job.thread} reads {job.doing}")
        except MemoryError:
            raise UserError(
                f"{job.thread} ran out of memory while it read {job.doing}; lower data.prefetch or engine.micro_batch"
            ) from None
    raise UserError(
        f"no data for {timeout_s:g} s: {job.thread} hangs in reading {job.doing}; check the disk or the network, or "
        "raise data.timeout_s"
    )


def read_ahead_in_processes(
    tasks: Iterable[Task],
    load: Load[Task, Result],
    *,
    processes: int,
    ahead_each: int,
    timeout_s: float,
    describe: Callable[[Task], str],
) -> Iterator[Result]:
    """`read_ahead` in worker processes, to which `load` and the tasks are pickled, and from which the results come.

    Args:
        tasks: what to load.
        load: the work.
        processes: how many, at least 1.
        ahead_each: most tasks of a worker under way or waiting to be taken.
        timeout_s: longest wait for one result.
        describe: what a task reads, for the message when it does not come.

    Raises:
        UserError: a result takes too long, a worker was killed or is out of memory, or `load` raised one.
    """
    waiting: deque[Task] = deque()

    def noted() -> Iterator[Task]:
        for task in tasks:
            waiting.append(task)
            yield task

    others = set(multiprocessing.active_children())
    loader = WebLoader(
        _Loads(load),
        sampler=noted(),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=processes,
        prefetch_factor=ahead_each,
        timeout=timeout_s,
        generator=torch.Generator(),  # for a seed that nobody uses: the trainer's numbers must not depend on our start
        multiprocessing_context="spawn",  # a fork would copy the locks that other threads hold
        worker_init_fn=partial(_prepare_worker, threading.current_thread() is threading.main_thread(), os.getpid()),
    )
    results = iter(loader)
    at_exit = partial(_kill_all_but, others)  # they ignore SIGTERM, by which Python would end them
    atexit.register(at_exit)
    try:
        with _deaf_children():
            first = list(islice(results, 1))  # the workers start when it is asked for
        for result in chain(first, results):
            waiting.popleft()
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):  # torch's word on workers that were killed, or are late
            raise
        _kill_all_but(others)
        reason = str(error).split(". ")[0].removeprefix("DataLoader ")
        raise UserError(
            f"no data: {reason}, when it was to read {describe(waiting[0])}; check the memory, the disk and the "
            "network, or change data.workers or data.timeout_s"
        ) from None
    finally:
        atexit.unregister(at_exit)


def _kill_all_but(others: set[BaseProcess]) -> None:
    """End our workers, of which one may hang; torch would wait for that one, and complain that they are killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in set(multiprocessing.active_children()) - others:
        worker.kill()
        worker.join()


class _Loads(Dataset):
    """Tasks as a dataset; their errors as values, since torch would wrap them into its own words."""

    def __init__(self, load: Load):
        self._load = load

    def __getitem__(self, task: Any) -> Any:
        try:
            return self._load(task, lambda doing: None)
        except UserError as error:
            return error
        except MemoryError:
            return UserError("a data worker ran out of memory; lower data.workers, data.prefetch or engine.micro_batch")


def _as_it_is(result: Result) -> Result:
    return result


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Start processes that hear no request to stop, from their first instant: starting takes them seconds.

    A signal to the whole group is the trainer's to handle, and it still needs data to finish its step. Blocked signals
    stay blocked in a child, whatever program it runs; handlers would be lost with the trainer's program.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    if NO_WORD_ABOUT_SEMAPHORES not in sys.warnoptions:
        sys.warnoptions.append(NO_WORD_ABOUT_SEMAPHORES)
    resource_tracker.ensure_running()  # now, because it unblocks SIGTERM and SIGINT, which it ignores itself
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(ends_with_parent: bool, trainer: int, worker: int) -> None:
    """Have a worker process end with the trainer, whatever ends that. Linux watches the thread that started it."""
    keep_freed_memory()
    c_library = ctypes.CDLL(None)
    if ends_with_parent and hasattr(c_library, "prctl"):
        c_library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # else torch looks every five seconds
    if os.getppid() != trainer:  # it ended while this process started: nobody would notice any more, torch neither
        os._exit(1)
