"""The command `asda`: find the module of a command and run it. Loads neither torch nor pydantic by itself."""

import difflib
import importlib
import signal
import sys

from asda.commands import COMMANDS, MAKING_FILES
from asda.errors import UserError, exit_with_sentence

USAGE = "usage: asda COMMAND [arguments]; `asda COMMAND --help` explains one"
SEVERAL_RANKS = """\
`asda train` and `asda evaluate` run one process. To start several, one for each GPU or core:
  deepspeed --module asda.train --config configs/as2m.json
  torchrun --nproc_per_node 2 -m asda.train --config configs/as2m.json"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names; exit with a code of asda/errors.py if it fails."""
    argv = sys.argv[1:] if argv is None else argv
    exit_with_sentence(lambda: _run(argv), prints=not argv or argv[0] not in MAKING_FILES)


def _run(argv: list[str]) -> None:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        rows = [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
        print(USAGE, "", "commands", *rows, "", SEVERAL_RANKS, sep="\n")
    elif name == "--version":
        from asda import __version__

        print(f"asda {__version__}")
    elif name in COMMANDS:
        module = COMMANDS[name][0]
        if module.startswith("asda.commands."):  # signals end it like Ctrl-C, so that it cleans up; a training saves
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup
                signal.signal(signal.SIGHUP, signal.default_int_handler)
        importlib.import_module(module).main(argv[1:])
    else:
        close = "".join(f"did you mean {other}? " for other in difflib.get_close_matches(name, COMMANDS, n=1))
        raise UserError(f"unknown command {name!r}; {close}`asda --help` lists all commands")


if __name__ == "__main__":
    main()
