"""Programs under trial: started in a session of their own, with a mark in the environment that their children inherit.

By this mark every process of a trial is found again, whatever its parent or its session has become.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "ASDA_FAULT_TRIAL"
LOOK_EVERY_S = 0.002


def environment() -> dict[str, str]:
    """Return the variables of a trial's programs, before a fault changes them."""
    own = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    return os.environ | own


@dataclass
class Program:
    """A program that was started, its output files, and the mark of its processes."""

    process: subprocess.Popen[bytes]
    mark: str
    stdout: Path
    stderr: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def runs(self) -> bool:
        """Whether the first process has not ended."""
        return self.process.poll() is None

    def wait(self, limit_s: float) -> int | None:
        """Return the exit code; None if the program still runs after so long."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def text(self, path: Path) -> str:
        """Return what it has written to stdout or to stderr."""
        return path.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[int]:
        """Return the numbers of its living processes, children and theirs among them."""
        return marked(self.mark)

    def survivors(self, grace_s: float) -> list[str]:
        """Wait until none of its processes lives; return the command lines of those that still do."""
        end = time.monotonic() + grace_s
        while (living := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return [command_line(pid) for pid in living]

    def end(self) -> None:
        """Kill whatever is left."""
        while living := self.processes():
            for pid in living:
                send(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()


def start(argv: Sequence[str], output: Path, variables: Mapping[str, str] | None = None) -> Program:
    """Start a program with default signal handling; its output goes to OUTPUT.stdout and OUTPUT.stderr."""
    mark = secrets.token_hex(8)
    stdout, stderr = output.with_name(f"{output.name}.stdout"), output.with_name(f"{output.name}.stderr")
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            ["env", "--default-signal", *argv],  # a shell may have started this driver with ignored signals
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env=environment() | {MARK: mark} | dict(variables or {}),
            start_new_session=True,
        )
    return Program(process, mark, stdout, stderr)


def marked(mark: str) -> list[int]:
    """Return the living processes whose environment holds the mark. A zombie has no environment."""
    entry = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended, or is another user's
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return sorted(found)


def command_line(pid: int) -> str:
    """Return the command line of a process, "" if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
