"""Runs `asda convert` inside the test process: starting it anew takes seconds."""

from subprocess import CompletedProcess

from tiny_tools import run


def convert(*arguments: object) -> CompletedProcess[str]:
    """Run it, and return how it ended."""
    done = run("convert", *arguments)
    return CompletedProcess([], done.code, done.out, done.err)
