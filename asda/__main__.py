"""The command `asda`: find the module of a command and run it. Loads neither torch nor pydantic by itself."""

import importlib
import io
import signal
import sys

from asda.commands import COMMANDS
from asda.errors import UserError, exit_with_sentence

USAGE = "usage: asda COMMAND [arguments]; `asda COMMAND --help` explains one"
SEVERAL_RANKS = """\
`asda train` and `asda evaluate` run one process. To start several, one for each GPU or core:
  deepspeed --module asda.train --config configs/as2m.json
  torchrun --nproc_per_node 2 -m asda.train --config configs/as2m.json"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first argument names; exit with a code of asda/errors.py if it fails."""
    exit_with_sentence(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        from asda import __version__

        print(f"asda {__version__}")
    elif name in COMMANDS:
        _run_module(COMMANDS[name][0], argv[1:])
    else:
        raise UserError(f"unknown command {name!r}; {_nearest(name)}`asda --help` lists all commands")


def _run_module(module: str, argv: list[str]) -> None:
    """Call `main` of a module. SIGTERM ends a command like Ctrl-C, so that it cleans up; a training saves instead."""
    if module.startswith("asda.commands."):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    importlib.import_module(module).main(argv)


def _help() -> str:
    rows = [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([USAGE, "", "commands", *rows, "", SEVERAL_RANKS])


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {close[0]}? " if close else ""


if __name__ == "__main__":
    main()
