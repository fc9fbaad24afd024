"""One kind of error for everything a user can mend, the one place that prints it, and what an exit code says.

    0    done
    1    a mistake of ours, with its traceback
    2    a mistake of the user's, in one sentence
    3    another rank has gone; what it said, or its last checkpoint, tells more
    75   stopped as it was asked to, with a checkpoint; the same command goes on (EX_TEMPFAIL of sysexits.h)
    130, 138, 143   left at once: interrupted before training, or by a second SIGINT, SIGUSR1, SIGTERM
    141  nobody reads what it prints any more (| head), as the shells count SIGPIPE

So ends a rank, and with it plain python and srun. `deepspeed` hands on the code of the first rank that fails, so all
ranks of a stopped run leave with the same one; but it ends with 143 or 130 when it gets the signal itself (the ranks
see that it has gone, save, and leave) and with 1 when its launch.py does. With torchrun every code but 0 becomes 1.
"""

import errno
import os
import select
import sys
from collections.abc import Callable

USER_ERROR_EXIT = 2  # the exit code of every UserError, as argparse uses for bad arguments
LOST_PEER_EXIT = 3
STOPPED_EXIT = 75
INTERRUPTED_EXIT = 130  # Ctrl-C, by the shells' convention
UNREAD_EXIT = 141

# How a write fails that nobody but the user can help. It bears no file name.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# How gloo and NCCL say that the process at the other end has gone, or does not answer.
LOST_PEER_WORDS = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "timed out waiting",
)


class UserError(Exception):
    """Says in one sentence what is wrong, where (file, shard, key, byte), the rule, and the fix."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Says why a run ends before its last step, after all ranks have saved it."""


def say(line: str) -> None:
    """Print a line on stderr, with the rank where there are several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    print(f"[rank {os.environ['RANK']}] {line}" if several else line, file=sys.stderr, flush=True)


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Run `main`; turn what may be expected to end it into one line on stderr and an exit code of the list above."""
    try:
        main()
        sys.stdout.flush()  # or Python does it when it ends, where nothing can be caught
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
            raise
        _give_up_stdout()
        _leave(f"error: {error.strerror}; free space, or choose another place to write to", USER_ERROR_EXIT)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in LOST_PEER_WORDS):
            raise
        _leave("stopped, because another rank has gone; its message says why, unless it was killed", LOST_PEER_EXIT)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_EXIT)


def _nobody_reads() -> bool:
    """Whether the pipe that broke is stdout; what is still to be written there goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    gone = any(events & select.POLLERR for _, events in watch.poll(0))
    if gone:
        _discard_stdout()
    return gone


def _give_up_stdout() -> None:
    """Where stdout is what cannot be written, drop the rest: Python would try again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(line: str, code: int) -> None:
    say(line)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # peers may be waiting in a collective; an orderly exit would wait for them
    sys.exit(code)
