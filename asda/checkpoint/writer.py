"""Write checkpoints while training continues. asda/checkpoint/read.py says what a checkpoint is.

    with CheckpointWriter(run, config, processes) as writer:
        loop:
            loss.backward()
            writer.wait_until_copied()     # from here on, weights, moments and teacher may change
            optimizer step
            if outcome := writer.poll():   # once, on every rank
                log(outcome)
            if save is due:
                writer.save(state, files)  # returns at once
        writer.finish()

One thread on every rank copies the tensors, writes and hashes its files, and tells the first rank, which commits:

    1  every rank: copy, write, sync and hash each file in .tmp-step-N/
    2  first rank: collect sizes and hashes, write and sync config.json and state.json
    3  first rank: write and sync manifest.json, sync the folder
    4  first rank: rename .tmp-step-N to step-N, sync their folder
    5  first rank: replace the file `latest`; remove what is older than the newest intact run.keep, except the best
    6  first rank: tell all ranks how it ended

A process may die anywhere in this. Before step 4 there is no new checkpoint; after it there is a whole one. The thread
talks to the other ranks in its own gloo group, so it never mixes with what the training exchanges.
"""

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from asda.checkpoint.manifest import TEMPORARY, FileEntry, Manifest, commit_folder, damage, entry_of, remove
from asda.checkpoint.read import State, checkpoints_of, read_state, step_folder
from asda.checkpoint.safetensors_file import FileImage
from asda.config.run import Config, dump_config
from asda.errors import UserError
from asda.system import TEMPORARY_SUFFIX, sync, write_whole_file

if TYPE_CHECKING:
    from asda.engine.processes import Processes  # that imports DeepSpeed, which takes seconds

Files = dict[str, dict[str, Tensor]]  # file stem -> tensor name -> tensor
POINTER, BEST_POINTER = "latest", "best"
NICENESS = 15  # of the writing thread: on busy cores it gets 36 parts of 1024, 3.4 % of one (sched(7))


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on all ranks."""

    step: int
    folder: Path
    seconds: float  # from save() to the end of the commit
    bytes: int  # of all files of all ranks
    failure: str | None = None  # one sentence; None if the checkpoint is saved
    folder_lost: bool = False  # whatever run.on_failed_save says, the run must end


class FolderLostError(UserError):
    """The run folder is no longer this run's: nothing may be written there, and nothing removed."""


class CheckpointWriter:
    """Saves checkpoints of a run in the background. All ranks construct it, and call save, together.

    Args:
        run: the run folder, on a disk that all ranks see; only this makes it, a save never does.
        config: the resolved run, with run.keep and run.on_failed_save.
        processes: this rank among all.
        check_folder: raises FolderLostError if another run may use the folder by now.

    An error of the disk becomes an Outcome. Any other error of the thread (a lost rank) is raised by the next call.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        processes: "Processes",
        check_folder: Callable[[], None] = lambda: None,
    ):
        self._run, self._config, self._processes = run, config, processes
        self._check_folder = check_folder
        self._group: Any = None
        if processes.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.engine.timeout_s))
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=os.nice, initargs=(NICENESS,))
        self._stream = torch.cuda.Stream(processes.device) if processes.device.type == "cuda" else None
        self._images: dict[str, FileImage] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._save: Future[Outcome] | None = None
        self._untold: deque[Outcome] = deque()
        self.num_failed = 0  # saves of this process's run
        self.failure: str | None = None  # of a save that must end the run; ranks may see it at different steps
        self.last_failure: str | None = None  # of the last save that has ended; None if that is saved
        if processes.is_first:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            sweep(run)
        self._gather(None)  # no rank writes before that is done

    def save(self, state: State, files: Files) -> None:
        """Begin a save, after waiting for the one under way.

        Args:
            state: the state of the run; the first rank's is saved.
            files: file stem -> tensors of this rank, on any device. They must not change before wait_until_copied.
        """
        self._wait()
        self._copied.clear()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._processes.device))
        self._save = self._thread.submit(self._run_save, state, files, ready)

    def wait_until_copied(self) -> None:
        """Wait until the tensors that were given to save may change."""
        self._copied.wait()

    def poll(self) -> Outcome | None:
        """Return how a save ended, once; None if there is nothing new."""
        if self._save is not None and self._save.done():
            self._wait()
        return self._untold.popleft() if self._untold else None

    def finish(self) -> Outcome | None:
        """Wait for the save under way; return how it ended, unless poll has."""
        self._wait()
        return self.poll()

    def close(self) -> None:
        """Wait for the save under way, and end the thread."""
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _wait(self) -> None:
        if self._save is None:
            return
        save, self._save = self._save, None
        outcome = save.result()
        self._untold.append(outcome)
        self.last_failure = outcome.failure
        if outcome.failure:
            self.num_failed += 1
            if outcome.folder_lost or self._config.run.on_failed_save == "stop":
                self.failure = outcome.failure

    # From here on everything runs in the thread.

    def _run_save(self, state: State, files: Files, ready: Any) -> Outcome:
        started = time.monotonic()
        try:
            self._images = _images(files, self._images, self._stream, ready)
        finally:
            self._copied.set()
        folder = step_folder(self._run, state.step)
        temporary = folder.with_name(TEMPORARY + folder.name)
        reports = self._gather(_result_or_error(lambda: self._write(temporary)))
        outcome = None
        if self._processes.is_first:
            found = _result_or_error(lambda: self._commit(temporary, folder, state, reports))
            if isinstance(found, UserError):
                found = _result_or_error(self._check_folder) or found  # a lost folder is the reason for all others
            outcome = Outcome(
                state.step, folder, time.monotonic() - started, 0 if isinstance(found, UserError) else found
            )
            if isinstance(found, UserError):
                lost = isinstance(found, FolderLostError)
                outcome = replace(outcome, failure=str(found), folder_lost=lost)
                if not lost:
                    shutil.rmtree(temporary, ignore_errors=True)
        return self._from_first(outcome)

    def _write(self, temporary: Path) -> dict[str, FileEntry]:
        """Do step 1 of the protocol: write this rank's files. Raises UserError."""
        self._check_folder()
        return _write_files(temporary, self._images)

    def _commit(self, temporary: Path, folder: Path, state: State, reports: list[Any]) -> int:
        """Do steps 2 to 5 of the protocol; return the number of bytes of all files. Raises UserError."""
        for rank, report in enumerate(reports):
            if isinstance(report, UserError):
                raise type(report)(f"rank {rank}: {report}" if self._processes.world_size > 1 else str(report))
        files: dict[str, FileEntry] = {name: entry for report in reports for name, entry in report.items()}
        with _told_as_sentence(temporary):
            _refuse_files_elsewhere(temporary, files)
            files |= _write_state(temporary, self._config, state)
            _read_back(temporary, self._config, state)
            manifest = Manifest(
                files,
                step=state.step,
                world_size=self._processes.world_size,
                config_hash=files["config.json"].xxh3_128,
                data_state={"fingerprint": state.data_fingerprint, "order_version": state.order_version},
            )
            self._check_folder()
            if damage(folder) is None:  # it was saved before, at the same step of the same run
                remove(temporary)
            else:
                commit_folder(temporary, folder, manifest)
                sync(self._run)  # of which `checkpoints` may be new
            point_to(folder)
            best = step_folder(self._run, state.best_step) if state.best_step else None
            if best == folder:
                point_to(folder, BEST_POINTER)
            prune(self._run, self._config.run.keep, just_written=folder, spare=best)
        return sum(entry.bytes for entry in files.values())

    def _gather(self, value: Any) -> list[Any]:
        """Return every rank's value on the first rank, and [] on the others."""
        if self._group is None:
            return [value]
        values = [None] * self._processes.world_size if self._processes.is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def _from_first(self, value: Any) -> Any:
        """Return the first rank's value on all ranks."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group, device=torch.device("cpu"))
        return values[0]


def sweep(run: Path) -> None:
    """Remove what interrupted saves left."""
    checkpoints = run / "checkpoints"
    for leftover in [*checkpoints.glob(f"{TEMPORARY}*"), *checkpoints.glob(f"*{TEMPORARY_SUFFIX}")]:
        remove(leftover)


def point_to(folder: Path, name: str = POINTER) -> None:
    """Write the name of a checkpoint into a file beside it, `latest` or `best`."""
    write_whole_file(folder.with_name(name), folder.name + "\n")


def prune(run: Path, keep: int, just_written: Path | None = None, spare: Path | None = None) -> None:
    """Remove checkpoints older than the newest `keep` intact ones, except the one to spare.

    Those that stay are read back first. A hash that was right when they were written says nothing about them now, and
    the last intact one may never go because a newer one looked intact. Only what was written, read back and hashed a
    moment ago is trusted.
    """
    found = checkpoints_of(run)
    if len(found) <= keep:
        return
    num_intact = 0
    for folder in reversed(found):
        if num_intact == keep:
            if folder != spare:
                remove(folder)
        elif folder == just_written or damage(folder, from_disk=True) is None:
            num_intact += 1


def _images(files: Files, last: dict[str, FileImage], stream: Any, ready: Any) -> dict[str, FileImage]:
    """Copy tensors, into the memory of the last save if it fits, when the event `ready` says that they are computed."""
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        if stream is not None:
            stream.wait_event(ready)
        images = {
            stem: last[stem] if stem in last and last[stem].is_of(tensors) else FileImage(tensors)
            for stem, tensors in files.items()
        }
        for stem, image in images.items():
            image.copy_from(files[stem])
    if stream is not None:
        stream.synchronize()
    return images


def _write_files(temporary: Path, images: dict[str, FileImage]) -> dict[str, FileEntry]:
    entries = {}
    with _told_as_sentence(temporary):
        temporary.mkdir(exist_ok=True)
    for stem, image in images.items():
        path = temporary / f"{stem}.safetensors"
        with _told_as_sentence(path, image.num_bytes):
            entries[path.name] = image.write(path)
    return entries


def _write_state(temporary: Path, config: Config, state: State) -> dict[str, FileEntry]:
    """Do step 2: write what the first rank adds."""
    texts = {"config.json": dump_config(config), "state.json": json.dumps(asdict(state), indent=2) + "\n"}
    for name, text in texts.items():
        (temporary / name).write_text(text, encoding="utf-8")
        sync(temporary / name)
    return {name: entry_of(temporary / name) for name in texts}


def _read_back(temporary: Path, config: Config, state: State) -> None:
    """Refuse to commit what could not be resumed: a hash proves the bytes, not that they can be read."""
    if read_state(temporary) != (config, state):
        raise UserError(f"{temporary} reads back as another run than was written; please report this")


def _refuse_files_elsewhere(temporary: Path, files: dict[str, FileEntry]) -> None:
    for name, entry in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise UserError(
                f"another rank has written {path}, but the first rank does not see it; put run.folder on a disk that "
                "all machines share"
            )


def _result_or_error(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or its UserError."""
    try:
        return work()
    except UserError as error:
        return error


@contextmanager
def _told_as_sentence(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn an error of the file system (space, quota, rights) into a UserError with the file and the bytes."""
    try:
        yield
    except OSError as error:
        needed = f" ({num_bytes:,} bytes)" if num_bytes else ""
        where = error.filename or path
        run = next(folder.parent for folder in path.parents if folder.name == "checkpoints")
        earlier = checkpoints_of(run)
        resumes = f"resumes from {earlier[-1].name}" if earlier else "begins anew, because there is no checkpoint yet"
        raise UserError(
            f"cannot write {where}{needed}: {error.strerror or error}; {_room(path)}. Free space or lower run.keep, "
            f"then start the same command again; it {resumes}"
        ) from None


def _room(path: Path) -> str:
    """Say what is free on the disk of a path: bytes, and files if there are none."""
    disk = os.statvfs(next(folder for folder in path.absolute().parents if folder.is_dir()))
    num_bytes = f"{disk.f_bavail * disk.f_frsize:,} bytes are free there"
    return f"{num_bytes}, but it has room for no more files" if disk.f_files and not disk.f_favail else num_bytes
