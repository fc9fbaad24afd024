"""Worker processes that never outlive their work, and their progress."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import numpy as np
from tqdm import tqdm

from asda.errors import UserError
from asda.system import SHARED_MEMORY, complete_environment

REPORT_EVERY_S = 10.0  # between lines of progress where stderr is not a terminal
LOOK_EVERY_S = 0.2  # at the counts
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # workers share the cores

Task = TypeVar("Task")
Result = TypeVar("Result")

_counts: Any = None  # in a worker: units done of each task


@contextmanager
def worker_pool(num_workers: int, num_tasks: int) -> Iterator["Workers"]:
    """Start processes when there is work for them; they end with the block, at once if it fails."""
    complete_environment()
    os.environ.update(ONE_THREAD)  # read when a worker imports numpy
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by other threads
    try:
        _start_tracker()
        counts = context.RawArray("q", max(num_tasks, 1))  # each has one writer, so it needs no lock
        pool = ProcessPoolExecutor(max(1, min(num_workers, num_tasks)), context, _start_worker, (counts,))
    except OSError as error:
        needs = f"cannot start worker processes, which share memory in {SHARED_MEMORY}: {error.strerror}"
        raise UserError(f"{needs}; let it be written, as with docker run --shm-size=64m") from None
    workers = Workers(pool, counts)
    try:
        with workers.ended_by_failure():
            yield workers
    finally:
        pool.shutdown(cancel_futures=True)


def _start_tracker() -> None:
    """Start the process that removes what processes share, deaf to signals that a group gets and it does not foresee.

    It is named `resource_tracker` and ignores only SIGINT and SIGTERM. If another signal ended it, the next one would
    print a traceback for each semaphore that it does not know. A blocked signal stays blocked in a new process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(counts: Any) -> None:
    """Prepare a worker process: leave Ctrl-C and a closed terminal to its parent, and end with it."""
    global _counts
    _counts = counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker would have its parent's handler
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    cast(BaseProcess, multiprocessing.parent_process()).join()
    os._exit(1)


def report_done(task: int, num_units: int) -> None:
    """Report from a worker how many units of a task are done."""
    _counts[task] = num_units


class Workers:
    """Runs a function over tasks in processes."""

    def __init__(self, pool: ProcessPoolExecutor, counts: Any):
        self.pool = pool
        self._counts = np.frombuffer(counts, np.int64)

    @contextmanager
    def ended_by_failure(self) -> Iterator[None]:
        """End all processes before a failure of the block is raised further, so that cleaning up comes after them."""
        try:
            yield
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            self.pool.shutdown(cancel_futures=True)  # waits for them
            if isinstance(error, BrokenProcessPool):
                what = "a worker process was killed, probably because memory ran out"
                raise UserError(f"{what}; use fewer --workers") from None
            raise

    def run(
        self,
        function: Callable[[int, Task], Result],
        tasks: Sequence[Task],
        units: Sequence[int],
        unit: str,
        tell: Callable[[Result], None],
    ) -> list[Result]:
        """Return function(number, task) for all tasks, in their order; show progress on stderr meanwhile.

        `units` counts the work of each task, and `unit` names it in the singular; `function` may report_done(number, n)
        meanwhile. `tell` prints what there is to say about a result, by tqdm.write, as soon as it is there.
        """
        self._counts[:] = 0
        total = sum(units)
        started = reported = time.monotonic()
        futures = {self.pool.submit(function, number, task): number for number, task in enumerate(tasks)}
        waiting: set[Future[Result]] = set(futures)
        with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty()) as bar:
            while waiting:
                done, waiting = wait(waiting, LOOK_EVERY_S, FIRST_COMPLETED)
                for future in done:
                    tell(future.result())
                    self._counts[futures[future]] = units[futures[future]]
                num_done, now = int(self._counts.sum()), time.monotonic()
                bar.update(num_done - bar.n)
                if bar.disable and (not waiting or now - reported > REPORT_EVERY_S):
                    reported = now
                    rate = num_done / max(now - started, 1e-9)
                    print(f"{num_done} of {total} {unit}s, {rate:.0f} {unit}s/s", file=sys.stderr, flush=True)
        return [future.result() for future in futures]
