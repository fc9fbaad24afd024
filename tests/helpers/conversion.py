"""Runs `asda convert` inside the test process: starting it anew takes seconds."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from asda.commands import convert as command
from asda.errors import exit_with_sentence


@dataclass(frozen=True)
class Done:
    """What a program left behind."""

    returncode: int
    stdout: str
    stderr: str


def convert(*arguments: object) -> Done:
    """Run it, and return how it ended."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            exit_with_sentence(lambda: command.main(list(map(str, arguments))))
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
