"""One kind of error for everything a user can mend, and the one place that prints it."""

import os
import sys
from collections.abc import Callable

USER_ERROR_EXIT = 2  # the exit code of every UserError, as argparse uses for bad arguments
LOST_PEER_EXIT = 3  # another rank has ended; the reason stands in its message
INTERRUPTED_EXIT = 130  # Ctrl-C, by the shells' convention

# How gloo and NCCL say that the process at the other end has gone.
LOST_PEER_WORDS = ("closed by peer", "reset by peer", "broken pipe", "remote process exited")


class UserError(Exception):
    """Says in one sentence what is wrong, where (file, shard, key, byte), the rule, and the fix."""


def say(line: str) -> None:
    """Print a line on stderr, with the rank where there are several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    print(f"[rank {os.environ['RANK']}] {line}" if several else line, file=sys.stderr, flush=True)


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Run `main`; turn a UserError, or a file that cannot be opened, into one line on stderr and exit code 2.

    A rank that only notices that another one has gone says so in one line too, and exits with 3.
    """
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", USER_ERROR_EXIT)
    except OSError as error:
        if error.filename is None:
            raise
        _leave(f"error: {error.filename}: {error.strerror}", USER_ERROR_EXIT)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in LOST_PEER_WORDS):
            raise
        _leave("stopped, because another rank has stopped; its message says why", LOST_PEER_EXIT)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_EXIT)


def _leave(line: str, code: int) -> None:
    say(line)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # peers may be waiting in a collective; an orderly exit would wait for them
    sys.exit(code)
