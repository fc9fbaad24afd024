"""Work ahead in threads, and give out the results in order; name whatever keeps the caller waiting.

Reading, hashing and decompressing run without Python's lock, so threads do them side by side. docs/scale.md has the
figures, beside those of worker processes, which cost the training loop more.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from asda.errors import UserError, say
from asda.system import keep_freed_memory

STALL_S = 10.0  # between lines about a task that is late
PARTING_S = 1.0  # for a thread to finish its task at the end; one that hangs is left behind

Task = TypeVar("Task")
Result = TypeVar("Result")
Note = Callable[[str], None]  # is told what a thread does now, for messages: "reads clip 3 of train-000000.tar.zst"
Work = Callable[[Task, Note], Result]


@dataclass
class _Job(Generic[Task]):
    """A task under way."""

    task: Task
    result: Future[Any] = field(default_factory=Future)
    doing: str = "has not begun"
    thread: str = "no thread yet"

    def note(self, doing: str) -> None:
        self.doing = doing


def read_ahead(
    tasks: Iterable[Task], work: Work[Task, Result], *, threads: int, ahead: int, timeout_s: float
) -> Generator[Result]:
    """Work on tasks in threads, and yield the results in the order of the tasks.

    Args:
        tasks: taken as they are needed, in the caller's thread.
        work: what to do with each.
        threads: how many; with 0 the caller's thread works when it asks for a result.
        ahead: most tasks that are under way or wait to be taken.
        timeout_s: longest wait for one result.

    Raises:
        UserError: a result takes too long, or memory has run out; the message names what the thread was doing.
        Exception: what `work` raised, in its place of the order.
    """
    if threads == 0:
        yield from (work(task, lambda doing: None) for task in tasks)
        return
    keep_freed_memory()
    todo: queue.SimpleQueue[_Job[Task] | None] = queue.SimpleQueue()
    # Daemons, because a thread that hangs in a read must not keep the process from ending.
    crew = [
        threading.Thread(target=_work, args=(todo, work), name=f"asda-reader-{number}", daemon=True)
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


def _work(todo: queue.SimpleQueue[_Job | None], work: Work) -> None:
    while (job := todo.get()) is not None:
        if job.result.set_running_or_notify_cancel():
            job.thread = threading.current_thread().name
            try:
                job.result.set_result(work(job.task, job.note))
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
            say(f"waiting for data for {time.monotonic() - started:.0f} s: {job.thread} {job.doing}")
        except MemoryError:
            raise UserError(
                f"out of memory while {job.thread} {job.doing}; lower data.prefetch or engine.micro_batch"
            ) from None
    raise UserError(
        f"no data for {timeout_s:g} s: {job.thread} {job.doing}; check the disk and the network, or raise "
        "data.timeout_s"
    )
