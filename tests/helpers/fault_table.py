"""The table of faults that the tests print at their end: what was done to the data how often, and what became of it."""

import json
from collections.abc import Callable, Iterable, Iterator

import pytest

PROPERTY = "fault"
HEAD = ("row", "fault", "trials", "detected", "recovered", "lost")
Count = Callable[..., None]


def counter(record_property: Callable[[str, object], None]) -> Count:
    """A function that puts a line into the table, and fails unless every trial was detected and nothing was lost.

    Recovered: runs that went on, or were continued, as if the fault had not been; None where a refusal is right.
    Lost: clips in rows 1 to 13 and 33; from 14 on optimizer steps beyond those since the last checkpoint, or verified
    checkpoints.
    """

    def count(row: str, fault: str, trials: int, detected: int, lost: int = 0, recovered: int | None = None) -> None:
        went_on = "-" if recovered is None else recovered
        record_property(PROPERTY, json.dumps([row, fault, trials, detected, went_on, lost]))
        assert (detected, lost) == (trials, 0), f"{fault}: {detected} of {trials} detected, {lost} lost"
        assert recovered in (None, trials), f"{fault}: {recovered} of {trials} recovered"

    return count


def table(reports: Iterable[pytest.TestReport]) -> Iterator[str]:
    """The lines of the table, by the rows' numbers, with the sums of equal faults; none where no fault was tried."""
    told = (
        json.loads(str(v)) for r in reports if r.when == "call" for name, v in r.user_properties if name == PROPERTY
    )
    sums: dict[tuple[str, str], list] = {}
    for row, fault, *counts in told:
        before = sums.get((row, fault), [0, 0, "-", 0])
        sums[row, fault] = [new if old == "-" else old + new for old, new in zip(before, counts, strict=True)]
    lines = sorted(((*k, *v) for k, v in sums.items()), key=lambda line: (int(line[0].rstrip("abcdef")), line[1]))
    if lines:
        yield "{:>4}  {:<78}{:>8}{:>10}{:>11}{:>6}".format(*HEAD)
    for line in lines:
        yield "{:>4}  {:<78}{:>8}{:>10}{:>11}{:>6}".format(*line)
