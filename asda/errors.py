"""The error for everything that a user can repair, the place that prints it, and the exit codes.

    0    done
    1    a bug of ours, with its traceback
    2    an error that the user can repair, in one sentence
    3    another rank has ended; its message or the last checkpoint tells more
    75   stopped on request, with a checkpoint; the same command resumes (EX_TEMPFAIL of sysexits.h)
    129, 130, 138, 143   ended at once: interrupted before training, or by a second SIGHUP, SIGINT, SIGUSR1, SIGTERM
    141  stdout was closed by its reader (| head); shells give this code to SIGPIPE

A rank ends with these codes, and so do plain python and srun. `deepspeed` returns the code of the first rank that
fails, so all ranks of a stopped run end with the same one. If `deepspeed` itself gets the signal, it ends with 143 or
130 (the ranks notice, save and end); if its launch.py gets it, with 1. torchrun turns every code but 0 into 1.
"""

import errno
import io
import locale
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

USER_ERROR_EXIT = 2  # the exit code of every UserError, as argparse uses for bad arguments
BUG_EXIT = 1
LOST_PEER_EXIT = 3
STOPPED_EXIT = 75
INTERRUPTED_EXIT = 130  # Ctrl-C, by the shells' convention
UNREAD_EXIT = 141

TELLING_S = 2.0  # for the last sentence of a process that must end: stderr may be a pipe that nobody reads

# Failures of a write that only the user can repair. These errors carry no file name.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# How gloo and NCCL say that the process at the other end has ended, or does not answer.
LOST_PEER_WORDS = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "timed out waiting",
)


# How torch, CUDA and the loader of libraries say that memory has run out.
NO_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
    "can't start new thread",
    "resource temporarily unavailable",  # the same in DALI's words
)


class UserError(Exception):
    """One sentence: what is wrong, where (file, shard, key, byte), the rule, and the fix."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Why a run ends before its last step, after all ranks have saved it."""


def failure_of(error: Exception) -> str:
    """Return the reason why one of many files failed; what nobody expected names its type.

    Raises the error itself if it is not the file's: a disk is full, or nobody reads stdout any more.
    """
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        raise error
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message} (unexpected; please report it with this file)"


def say(line: str) -> None:
    """Print a line on stderr, with the rank if there are several. Never raises: no work ends because of a message."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with suppress(OSError, ValueError):  # a full disk, a pipe whose reader has ended, a closed stream
        print(f"[rank {os.environ['RANK']}] {line}" if several else line, file=sys.stderr, flush=True)


def say_aside(line: str) -> None:
    """Print a line on stderr from a thread of its own, so that the caller continues even if stderr blocks."""
    threading.Thread(target=say, args=(line,), daemon=True).start()


def end_at_once(line: str, code: int) -> None:
    """Print a line on stderr and end the process without waiting for anything else, even if stderr blocks."""
    _say_for_a_moment(line, code)
    os._exit(code)


def _say_for_a_moment(line: str, code: int) -> None:
    """Print a line on stderr; if that takes longer than TELLING_S, end the process with this code."""
    end = threading.Timer(TELLING_S, os._exit, (code,))
    end.daemon = True
    with suppress(RuntimeError):  # without memory no thread can start
        end.start()
    say(line)
    end.cancel()


class Told:
    """A text stream of messages: what it cannot write is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if the stream can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if the stream can be written."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_with_sentence(main: Callable[[], None], *, prints: bool = True) -> None:
    """Run `main`; turn the errors that may be expected into one line on stderr and an exit code of the list above.

    If the result of `main` is what it `prints`, a stdout that cannot be written ends it. Otherwise its result is in
    files, and stdout only tells of them.
    """
    _restart_in_utf_8()
    _prepare_streams(prints)
    threading.excepthook = _tell_of_thread
    logging.raiseExceptions = False  # a library's line that cannot be written is no reason for a traceback
    try:
        main()
        sys.stdout.flush()  # or Python does it at its end, when nothing can be caught
    except UserError as error:
        _leave(f"error: {error}", USER_ERROR_EXIT)
    except Stopped as stop:
        _leave(str(stop), STOPPED_EXIT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(UNREAD_EXIT)
        if error.filename is not None:
            _leave(f"error: {error.filename}: {error.strerror}", USER_ERROR_EXIT)
        if error.errno not in NO_ROOM:
            _leave_with_traceback()
        _give_up_stdout()
        _leave(f"error: {error.strerror}; free space, or choose another place to write to", USER_ERROR_EXIT)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_EXIT)
    except Exception as error:
        if _is_lack_of_memory(error):
            _leave_for_memory(error)
        if not isinstance(error, RuntimeError) or not any(words in str(error).lower() for words in LOST_PEER_WORDS):
            _leave_with_traceback()
        _leave("stopped, because another rank has ended; its message says why, unless it was killed", LOST_PEER_EXIT)


def _is_lack_of_memory(error: Exception) -> bool:
    """Return whether memory has run out, of the host or a GPU; torch raises RuntimeErrors, libraries ImportErrors."""
    told = isinstance(error, (RuntimeError, ImportError)) and any(w in str(error).lower() for w in NO_MEMORY_WORDS)
    return told or isinstance(error, MemoryError)


def _restart_in_utf_8() -> None:
    """Start the program anew in Python's UTF-8 mode if the locale is of another encoding: names of files are UTF-8."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", locale.getencoding())  # the terminal's
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 (the same program again)


def _prepare_streams(prints: bool) -> None:
    """Open what the caller has closed, let any name be printed in any locale, and let messages fail quietly."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get its number, and the messages of libraries
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Told(sys.stderr)
    if not prints:
        sys.stdout = Told(sys.stdout)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Print what ended a thread that nobody waits for, as one that writes TensorBoard's files; a bug's traceback."""
    if isinstance(failed.exc_value, OSError):
        say(f"warning: a thread has ended: {failed.exc_value}")
    else:
        threading.__excepthook__(failed)


def _leave_with_traceback() -> None:
    """End the process for the exception that is being handled, without waiting for its threads and workers."""
    traceback.print_exc()
    _end_without_waiting(BUG_EXIT)


def _leave_for_memory(error: Exception) -> None:
    """End the process with a sentence, because it cannot have the memory that it needs."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    line = f"error: memory has run out ({why}); lower engine.micro_batch or --workers, or give the job more memory"
    _say_for_a_moment(line, USER_ERROR_EXIT)
    _end_without_waiting(USER_ERROR_EXIT)


def _end_without_waiting(code: int) -> None:
    """End the process and its workers; threads may wait for something that never comes."""
    import multiprocessing  # most commands need none

    for process in multiprocessing.active_children():
        process.terminate()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _nobody_reads() -> bool:
    """Return whether the broken pipe is stdout; if so, discard the rest of the output."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    gone = any(events & select.POLLERR for _, events in watch.poll(0))
    if gone:
        _discard_stdout()
    return gone


def _give_up_stdout() -> None:
    """Discard the rest of the output if stdout cannot be written: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(line: str, code: int) -> None:
    _say_for_a_moment(line, code)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # peers may be waiting in a collective; an orderly exit would wait for them
    sys.exit(code)
