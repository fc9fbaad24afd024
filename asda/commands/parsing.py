"""Parts that the command lines share: one kind of parser, lists between commas, and numbers with limits."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from asda.errors import UserError

Part = TypeVar("Part", str, int)
CHECKPOINT_HELP = "a run, a checkpoint, or converted weights"


def make_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples, as they are written; options cannot be abbreviated."""
    return argparse.ArgumentParser(
        prog=f"asda {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def check_range(option: str, value: float, low: float, high: float | None = None) -> None:
    """Refuse a number outside low..high. Raises UserError."""
    if value < low or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{option} {value} must be {rule}")


def comma_list(kind: Callable[[str], Part]) -> Callable[[str], list[Part]]:
    """Return a function that reads parts between commas; it refuses a repeated one, whose figures would count twice."""

    def parse(text: str) -> list[Part]:
        parts = [kind(part) for part in text.split(",")]
        if repeated := [part for part in parts if parts.count(part) > 1]:
            raise UserError(f"{text} names {repeated[0]} twice; name each once")
        return parts

    parse.__name__ = f"list of {kind.__name__}"  # as argparse words it: invalid list of int value
    return parse
