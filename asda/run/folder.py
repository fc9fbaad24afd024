"""A run folder that all ranks see and no other run writes to."""

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

from asda.checkpoint.writer import FolderLostError
from asda.errors import UserError
from asda.system import FileLock

LOCK_FILE = ".lock"
LOCK_PATIENCE_S = 20.0  # for a run that is about to end: a job that is queued again may begin before its last end
LOOK_EVERY_S = 0.2  # at the lock


def check_folder_is_shared(folder: Path, rank: int, world_size: int) -> None:
    """Refuse a run folder that is not the same one for all ranks. All ranks call this together.

    Raises:
        UserError: on all ranks alike, naming the hosts that do not see what the first rank writes.
    """
    if world_size == 1:
        return
    lineage = [folder.absolute(), *folder.absolute().parents]
    # A refused run must not leave a new folder, so the first rank writes into the nearest one that exists; the others
    # look into the same generation of their own.
    note = [(next(n for n, path in enumerate(lineage) if path.is_dir()), f".asda-{secrets.token_hex(8)}")]
    dist.broadcast_object_list(note)
    generation, name = note[0]
    parent = lineage[generation]
    path, failure = parent / name, None
    if rank == 0:
        try:
            path.touch()
        except OSError as error:
            failure = f"cannot write to {parent}: {error.strerror}; give another run.folder"
    dist.barrier()
    with suppress(OSError):
        os.listdir(path.parent)  # a network file system may remember that the file was not there
    verdicts = [(failure, socket.gethostname(), path.is_file())] * world_size
    dist.all_gather_object(verdicts, verdicts[0])
    if rank == 0:
        path.unlink(missing_ok=True)
    if verdicts[0][0]:
        raise UserError(verdicts[0][0])
    blind = sorted({host for _, host, sees in verdicts if not sees})
    if blind:
        raise UserError(
            f"run.folder {folder} is not one folder for all ranks: what rank 0 on {verdicts[0][1]} writes there is not "
            f"seen on {', '.join(blind)}; give a folder on a disk that all hosts share"
        )


@dataclass(frozen=True)
class Claim:
    """A rank's hold of a run folder. The lock of the first rank ends when its file is closed, or with the process."""

    checkpoints: Path  # the lock lies here: two run folders may be linked to one place
    place: os.stat_result  # of that folder, when it was claimed
    lock: IO[str] | None  # None on other ranks

    def check(self) -> None:
        """Raise FolderLostError if the folder was moved, removed or replaced since, or the lock in it."""
        try:
            same = os.path.samestat(os.stat(self.checkpoints), self.place)
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same or (self.lock is not None and not FileLock(self.lock).is_current):
            raise FolderLostError(
                f"{self.checkpoints} was moved, removed or replaced while this run was training, so nothing more is "
                "written there. Put it back, or give its new place as run.folder; the run then resumes from the newest "
                "checkpoint in it"
            )


def claim_folder(folder: Path, rank: int, *, make: bool) -> Claim | None:
    """Keep other runs out of a run folder. All ranks call this together.

    Args:
        folder: the run folder.
        rank: of this process.
        make: make the folder if it is missing; False does nothing without one.

    Returns:
        The claim, which must be kept. None without a folder; on other ranks, unless the folder is made.

    Raises:
        UserError: on all ranks alike, if another run writes there, or the folder cannot be written.
    """
    lock, failure = None, [""]
    checkpoints = folder / "checkpoints"
    if rank == 0 and (make or checkpoints.is_dir()):
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (checkpoints / LOCK_FILE).open("a+", encoding="utf-8")
            failure = [_lock(lock, folder)]
        except OSError as error:
            failure = [f"cannot write to {checkpoints}: {error.strerror}; give another run.folder"]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise UserError(failure[0])
    if lock is None and (rank == 0 or not make):
        return None
    checkpoints.mkdir(exist_ok=True)  # asks the server: a network disk may still remember that it was not there
    return Claim(checkpoints, os.stat(checkpoints), lock)


def _lock(file: IO[str], folder: Path) -> str:
    """Lock the file and write who holds it; return the complaint if another run does, or ""."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    try:
        while not FileLock(file).take():
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                return f"{folder} is being written to by {holder}; wait for it or stop it, or give another run.folder"
            time.sleep(LOOK_EVERY_S)
    except OSError:
        return ""  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""
