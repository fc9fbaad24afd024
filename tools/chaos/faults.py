"""Random faults: signals, lost folders, full disks, streams, locales, users, limits; which exit codes each allows.

The clock is left alone: a jump of the wall clock would be one of the machine, and a time namespace shifts only the
monotonic clock, and only for programs that start in it.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from processes import Program, command_line, send
from workloads import WORKS, Work

SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
STREAMS = (
    ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full", "> >(true)", "> >(true) 2> >(true)",
)  # fmt: skip
OTHER_USER = 12345
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a file system, no temporary file)
DONE, REFUSED, STOPPED, PEER, INTERRUPTED, UNREAD = 0, 2, 75, 3, 130, 141  # asda/errors.py

# The disk is in a namespace of its own; what is on it at the end is copied to where others see it.
SMALL_DISK = """
at=$1 && mkdir -p "$at.behind" && mount --make-rprivate / && mount --bind "$at" "$at.behind" &&
mount -t tmpfs -o "$2" none "$at" && shift 2 || exit 99
"$@"; code=$?; cp -a "$at/." "$at.behind/"; exit $code
"""
# As tests/test_surroundings.py: no home, no entry in passwd, nothing but one folder can be written.
CONTAINER = """
python=$(readlink -f "$2") && top=/$(echo "$python" | cut -d/ -f2,3)
mount --make-rprivate / && mount --bind "$1" "$1" || exit 99
case $top in /root/*) aside=$(mktemp -d) && mount --bind "$top" "$aside" && mount -t tmpfs -o mode=755 none /root &&
    mkdir -p "$top" && mount --move "$aside" "$top" || exit 99;; esac
mount -o remount,ro,bind / && shift 2 || exit 99
exec setpriv --reuid 12345 --regid 12345 --clear-groups env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME "$@"
"""
SMALL_MEMORY = f'mount --make-rprivate / && mount -t tmpfs -o size=64k none {SHARED_MEMORY} || exit 99; exec "$@"'
NO_NAMESPACE_EXIT = 99


class NotPossibleError(Exception):
    """The system does not allow this fault."""


@dataclass(frozen=True)
class Scene:
    """The things that a fault may touch.

    Attributes:
        work: what is done.
        place: where its result is.
        folder: the trial's own folder, above the place.
        material: the work folder, for what several trials share.
        programs: those that run.
        rng: its random numbers.
    """

    work: Work
    place: Path
    folder: Path
    material: Path
    programs: list[Program]
    rng: random.Random


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what it is, in words.
        family: the row of the table.
        codes: exit codes that are right, beside 0 for work that is done.
        strike: does it while the programs run; None if they start with it.
        wrap: returns the command line with the fault around it.
        variables: returns changes of the environment.
        folder: where the old result is after the strike; "" if it stays.
    """

    name: str
    family: str
    codes: frozenset[int] = frozenset()
    strike: Callable[[Scene], None] | None = None
    wrap: Callable[[Scene, list[str]], list[str]] = field(default=lambda _, argv: argv)
    variables: Callable[[Scene], dict[str, str]] = field(default=lambda _: {})
    folder: str = ""


@dataclass(frozen=True)
class Moment:
    """When a fault strikes: so many seconds after the start, or after the work has come so far."""

    progress: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s after " + (f"progress {self.progress}" if self.progress else "the start")

    def wait(self, scene: Scene) -> bool:
        """Wait for it; return False if all programs end before."""
        running = [program for program in scene.programs if program.runs]
        while running and scene.work.progress(scene.place) < self.progress:
            time.sleep(0.003)
            running = [program for program in scene.programs if program.runs]
        end = time.monotonic() + self.seconds
        while running and time.monotonic() < end:
            time.sleep(min(0.01, max(0.0, end - time.monotonic())))
            running = [program for program in scene.programs if program.runs]
        return bool(running)


@dataclass(frozen=True)
class Plan:
    """All that follows from a seed."""

    seed: int
    work: Work
    fault: Fault
    moment: Moment
    options: tuple[str, ...]


def draw(seed: int) -> Plan:
    """Return the trial of a seed."""
    rng = random.Random(seed)
    names = {"train-plain": 25, "train-1": 8, "train-2": 14, "train-3": 6, "shards": 15, "parts": 12,
             "evaluate": 8, "features": 12}  # fmt: skip
    work = WORKS[rng.choices(list(names), list(names.values()))[0]]
    makers = {_signal: 50, _folder: 12, _disk: 12, _streams: 9, _locale: 5, _user: 4, _shared_memory: 3, _limit: 5}
    fault = rng.choices(list(makers), list(makers.values()))[0](work, rng)
    if rng.random() < 0.3 and fault.family != "folder":
        moment = Moment(0, rng.uniform(0, 8))
    else:
        moment = Moment(rng.randint(1, work.complete), rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3))))
    options = ()
    if work.trains:
        options = (f"run.on_failed_save={rng.choice(('stop', 'continue'))}", f"run.keep={rng.choice((2, 9))}")
    return Plan(seed, work, fault, moment, options)


def _signal(work: Work, rng: random.Random) -> Fault:
    name, whom = rng.choice(SIGNALS), rng.choice(("one", "first", "all"))
    pause_s = rng.uniform(0.2, 4)

    def strike(scene: Scene) -> None:
        running = [program for program in scene.programs if program.runs]
        program = scene.rng.choice(running or scene.programs)
        targets = {"all": [pid for its in running for pid in its.processes()], "first": [program.process.pid]}
        targets["one"] = [scene.rng.choice(program.processes() or [program.process.pid])]
        for pid in targets[whom]:
            send(pid, signal.Signals[name])
        if name == "SIGSTOP":
            time.sleep(pause_s)
            for pid in targets[whom]:
                send(pid, signal.SIGCONT)

    return Fault(f"{name} to {whom}", name, _codes_of_signal(work, name, whom), strike)


def _codes_of_signal(work: Work, name: str, whom: str) -> frozenset[int]:
    """Return the exit codes that are right after a signal."""
    killed = 128 + signal.Signals[name]
    if name == "SIGSTOP":
        return frozenset()
    if work.ranks:  # deepspeed's own codes: 143 or 130 of the front end, 1 of launch.py, or the first failed rank's
        return frozenset({killed, STOPPED, PEER, 1, 130, 143})
    if work.trains and name != "SIGKILL":
        return frozenset({killed, STOPPED})
    codes = {killed, INTERRUPTED} if name in ("SIGTERM", "SIGHUP") else {killed}
    return frozenset(codes | {REFUSED} if whom == "one" else codes)  # one may be a worker


def _folder(_work: Work, rng: random.Random) -> Fault:
    how = rng.choice(("moved", "removed", "replaced"))

    def strike(scene: Scene) -> None:
        away = scene.place.with_name("away")
        scene.place.rename(away)
        if how == "replaced":
            with suppress(shutil.Error):  # files that the program has removed meanwhile
                shutil.copytree(away, scene.place, dirs_exist_ok=True)
        elif how == "removed":
            shutil.rmtree(away, ignore_errors=True)

    return Fault(f"folder {how}", "folder", frozenset({REFUSED}), strike, folder="away" if how != "removed" else "gone")


def _disk(_work: Work, rng: random.Random) -> Fault:
    size = rng.choice((f"size={int(2 ** rng.uniform(5, 12))}k", f"nr_inodes={rng.randint(3, 80)}"))

    def wrap(scene: Scene, argv: list[str]) -> list[str]:
        return [*_namespace(), "bash", "-c", SMALL_DISK, "bash", str(scene.place.parent), size, *argv]

    return Fault(f"disk of {size}", "disk", frozenset({REFUSED}), wrap=wrap)


def _streams(work: Work, rng: random.Random) -> Fault:
    streams = rng.choice(STREAMS)

    def wrap(_scene: Scene, argv: list[str]) -> list[str]:
        return ["bash", "-c", f'"$@" {streams}', "bash", *argv]

    return Fault(f"streams {streams}", "streams", frozenset({REFUSED, UNREAD} if work.reports else ()), wrap=wrap)


def _locale(_work: Work, rng: random.Random) -> Fault:
    name = rng.choice(("C", "en_US.ISO-8859-1"))

    def variables(scene: Scene) -> dict[str, str]:
        where = {"LOCPATH": str(_latin_1(scene.material))} if name != "C" else {}
        return {"LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | where

    return Fault(f"locale {name}", "locale", variables=variables)


@cache
def _latin_1(material: Path) -> Path:
    """Return the folder of a locale whose text is latin-1."""
    folder = material / "locales"
    folder.mkdir(exist_ok=True)
    argv = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    if shutil.which("localedef"):
        subprocess.run(argv, capture_output=True, check=False)
    if not (folder / "en_US.ISO-8859-1").exists():
        raise NotPossibleError("localedef makes no latin-1 locale")
    return folder


def _user(_work: Work, _rng: random.Random) -> Fault:
    def wrap(scene: Scene, argv: list[str]) -> list[str]:
        above = [scene.folder.absolute(), *scene.folder.absolute().parents]
        if os.geteuid() or not all(path.stat().st_mode & 1 for path in above):
            raise NotPossibleError("another user cannot be made, or cannot enter the work folder")
        os.chown(scene.place.parent, OTHER_USER, OTHER_USER)
        python = next(word for word in argv if "python" in word or word.endswith("deepspeed"))
        python = str(Path(python).with_name("python")) if python.endswith("deepspeed") else python
        return [*_namespace(), "bash", "-c", CONTAINER, "bash", str(scene.place.parent), python, *argv]

    return Fault("a user without entry and home", "user", wrap=wrap)


def _shared_memory(_work: Work, _rng: random.Random) -> Fault:
    def wrap(_scene: Scene, argv: list[str]) -> list[str]:
        return [*_namespace(), "bash", "-c", SMALL_MEMORY, "bash", *argv]

    return Fault("64 KB of shared memory", "shm", frozenset({REFUSED}), wrap=wrap)


def _limit(_work: Work, rng: random.Random) -> Fault:
    what, num_bytes = rng.choice((("file size", int(2 ** rng.uniform(8, 18))), ("memory", rng.randint(0, 64 << 20))))

    def strike(scene: Scene) -> None:
        for pid in (pid for program in scene.programs for pid in program.processes()):
            with suppress(OSError):
                limit = num_bytes
                if what == "memory":
                    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[0])
                    limit += pages * resource.getpagesize()
                which = resource.RLIMIT_AS if what == "memory" else resource.RLIMIT_FSIZE
                if "python" in command_line(pid):
                    resource.prlimit(pid, which, (limit, resource.RLIM_INFINITY))

    return Fault(f"{what} limit, {num_bytes} bytes", f"{what} limit", frozenset({REFUSED}), strike)


@cache
def _namespace() -> tuple[str, ...]:
    """Return the command that gives a program mounts of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        raise NotPossibleError("this system lets nobody mount a file system")
    return ("unshare", "-m")
