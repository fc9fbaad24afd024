"""The table of faults that the tests print at their end: what was done to the data how often, and what became of it."""

import json
from collections.abc import Callable, Iterable, Iterator

import pytest

PROPERTY = "fault"
HEAD = ("row", "fault", "trials", "detected", "lost")
Count = Callable[..., None]


def counter(record_property: Callable[[str, object], None]) -> Count:
    """A function that puts a line into the table, and fails unless every trial was detected and nothing was lost."""

    def count(row: str, fault: str, trials: int, detected: int, lost: int = 0) -> None:
        record_property(PROPERTY, json.dumps([row, fault, trials, detected, lost]))
        assert (detected, lost) == (trials, 0), f"{fault}: {detected} of {trials} detected, {lost} lost"

    return count


def table(reports: Iterable[pytest.TestReport]) -> Iterator[str]:
    """The lines of the table, by the rows' numbers; none where no fault was tried."""
    rows = {value for report in reports for name, value in report.user_properties if name == PROPERTY}
    lines = sorted((json.loads(str(row)) for row in rows), key=lambda line: (int(line[0].rstrip("ab")), line))
    if lines:
        yield "{:>4}  {:<64}{:>8}{:>10}{:>6}".format(*HEAD)
    for line in lines:
        yield "{:>4}  {:<64}{:>8}{:>10}{:>6}".format(*line)
