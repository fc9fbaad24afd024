"""Read files in a process of its own, which may crash, hang or grow without harm; and name what must not happen."""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from encoders import sound
from mutants import mutant

LIMIT_S = 10.0  # of a processor, for one file that is read in four ways
HANGS_S = 60.0  # by the clock: other programs may have the processor
LIMIT_BYTES = 1 << 30  # resident, of the whole process
LONGEST_SENTENCE = 400  # characters
START_S = 120.0  # for a process to import torch on a busy machine
READ, REFUSED, WRONG = "read", "refused", "wrong"
Outcome = tuple[str, str]  # one of the three, and the reason


class Reader:
    """A process that reads mutants of one seed, one after another; a new one follows one that was lost."""

    def __init__(self, seed: int):
        self._seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take the memory of this process with it
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._seed), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            raise RuntimeError("a reading process does not start")
        self._pipe.recv()

    def outcome(self, number: int) -> Outcome:
        """Read one mutant. What ends the process is a finding too."""
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            self._pipe.send(number)
            if self._pipe.poll(HANGS_S):
                return self._pipe.recv()
            self._lose()
            return WRONG, f"is not done after {HANGS_S:g} s"
        code = self._lose()
        return WRONG, f"ends the process: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def _lose(self) -> int:
        self._process.join(1)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._start()
        return code or 0

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(2)
        self._process.kill()


def _serve(pipe: Connection, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)  # what a decoder writes to stderr is a finding
        _warm_up(Path(folder))
        pipe.send("ready")
        with suppress(EOFError):
            while True:
                number = pipe.recv()
                pipe.send(_outcome_of(number, seed, Path(folder), said.fileno()))


def _warm_up(folder: Path) -> None:
    """Import what reading imports, so that no file is charged with it."""
    import soundfile

    soundfile.write(folder / "first.wav", sound(0.5, 8_000), 8_000)
    read_in_all_ways(folder / "first.wav")


def _outcome_of(number: int, seed: int, folder: Path, stderr: int) -> Outcome:
    its = mutant(seed, number)
    path = folder / f"{number}.{its.extension}"  # a new name each time: the reader remembers files
    path.write_bytes(its.content)
    os.ftruncate(stderr, 0)
    os.lseek(stderr, 0, os.SEEK_SET)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: the peak starts anew
    started_s = time.process_time()
    try:
        outcome = read_in_all_ways(path)
    finally:
        path.unlink()
    if (seconds := time.process_time() - started_s) > LIMIT_S:
        return WRONG, f"takes {seconds:.0f} s"
    sys.stderr.flush()
    if os.fstat(stderr).st_size:
        text = os.pread(stderr, 200, 0).decode(errors="replace")
        return WRONG, f"writes to stderr: {' '.join(text.split())}"
    peak = peak_bytes()
    return (WRONG, f"takes {peak >> 20} MiB") if peak > LIMIT_BYTES else outcome


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return max(psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


def read_in_all_ways(path: Path) -> Outcome:
    """Read a file whole, in blocks and in part, and count its frames; return the outcome."""
    from asda.data.audio.read import count_frames, read_audio  # here, so that a finding is not lost in an import
    from asda.data.audio.waves import AudioError, Segment

    def length_in_blocks(segment: Segment | None = None) -> int:
        from asda.data.audio.read import open_audio

        with open_audio(path, segment) as recording:
            return sum(len(block_S) for block_S in recording.blocks())

    found: dict[str, int | str] = {}
    for name, read in {
        "whole": lambda: len(read_audio(path)),
        "count": lambda: count_frames(path)[0],
        "blocks": length_in_blocks,
        "part": lambda: length_in_blocks((0.1, 0.2)),
    }.items():
        try:
            found[name] = read()
        except AudioError as error:
            found[name] = sentence = str(error)
            if not sentence or "\n" in sentence or len(sentence) > LONGEST_SENTENCE:
                return WRONG, f"{name}: is refused in other than a short sentence: {sentence!r}"
        except Exception as error:
            return WRONG, f"{name}: {type(error).__name__}: {error}"
    return _compared(path, found)


def _compared(path: Path, found: dict[str, int | str]) -> Outcome:
    count, blocks, whole = found["count"], found["blocks"], found["whole"]
    if isinstance(blocks, int) and isinstance(count, int) and not _may_estimate(path) and blocks != count:
        return WRONG, f"counts {count} frames and yields {blocks}"
    if isinstance(blocks, int) and not isinstance(count, int):
        return WRONG, f"yields {blocks} frames and cannot count them: {count}"
    return (REFUSED, whole) if isinstance(whole, str) else (READ, f"{whole} samples")


def _may_estimate(path: Path) -> bool:
    """Return whether the file's container only estimates its length."""
    from asda.data.audio.ffmpeg import demuxer_of

    with path.open("rb") as file:
        return bool(demuxer_of(file.read(64)))
