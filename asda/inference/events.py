"""Find events in probabilities over time, and write them as the tables that other programs open.

An event of a class begins with the first window whose probability reaches `threshold` and lasts while it stays at `low`
or above (hysteresis). Then events of a class that are at most `merge_s` apart become one, and then those shorter than
`min_s` are dropped. An event spans its windows, from the start of the first to the end of the last.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TextIO

from asda.errors import UserError
from asda.inference.results import Timeline

HIGHEST_HZ = 8000  # the network hears 16 kHz


@dataclass(frozen=True)
class Event:
    """A sound of a class, in one recording."""

    onset_s: float
    offset_s: float  # above the onset
    label: str
    score: float  # the highest probability


@dataclass(frozen=True)
class EventRule:
    """Settings by which windows become events. Raises UserError if a value is out of range."""

    threshold: float = 0.5
    low: float | None = None  # None: the threshold
    min_s: float = 0.0
    merge_s: float = 0.0

    def __post_init__(self) -> None:
        low = self.threshold if self.low is None else self.low
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold {self.threshold:g} must be above 0 and at most 1")
        if not 0 <= low <= self.threshold:
            raise UserError(f"low {low:g} must be from 0 to the threshold, {self.threshold:g}")
        for name in ("min_s", "merge_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise UserError(f"{name} {seconds:g} must be 0 s or more")


def find_events(timelines: Timeline | Iterable[Timeline], labels: tuple[str, ...], rule: EventRule) -> Iterator[Event]:
    """Yield the events of a timeline, or of one that comes in parts, in the order in which they end.

    Memory is that of a part: a day needs no more than a minute.

    Args:
        timelines: of one recording, with a column for each label.
        labels: the classes.
        rule: by which windows become events.
    """
    low = rule.threshold if rule.low is None else rule.low
    open_events: dict[int, Event] = {}
    waiting: dict[int, Event] = {}  # ended, and perhaps merged with the next of its class
    for timeline in [timelines] if isinstance(timelines, Timeline) else timelines:
        rows = zip(timeline.starts_s.tolist(), timeline.ends_s.tolist(), timeline.probabilities, strict=True)
        for start_s, end_s, probabilities_C in rows:
            lasting = {c for c in open_events if float(probabilities_C[c]) >= low}
            for c in sorted(open_events.keys() - lasting):
                waiting[c] = open_events.pop(c)
            beginning = set((probabilities_C >= rule.threshold).nonzero()[:, 0].tolist())
            for c in sorted(lasting | beginning):
                score = float(probabilities_C[c])
                before = open_events.get(c)
                if before is None and c in waiting and start_s - waiting[c].offset_s <= rule.merge_s:
                    before = waiting.pop(c)
                open_events[c] = _longer(before, start_s, end_s, labels[c], score)
            for c in [c for c, event in waiting.items() if start_s - event.offset_s > rule.merge_s]:
                yield from _long_enough(waiting.pop(c), rule)
    for event in sorted([*waiting.values(), *open_events.values()], key=lambda event: (event.offset_s, event.label)):
        yield from _long_enough(event, rule)


def _longer(before: Event | None, start_s: float, end_s: float, label: str, score: float) -> Event:
    if before is None:
        return Event(start_s, end_s, label, score)
    return replace(before, offset_s=max(before.offset_s, end_s), score=max(before.score, score))


def _long_enough(event: Event, rule: EventRule) -> Iterator[Event]:
    if event.offset_s - event.onset_s >= rule.min_s:
        yield event


def write_header(file: TextIO, kind: str) -> None:
    """Begin a table of a kind of TABLES; labels of Audacity have no header."""
    if TABLES[kind].header:
        _write_rows(file, kind, [TABLES[kind].header])


def write_events(file: TextIO, kind: str, path: str, events: Iterable[Event]) -> None:
    """Write the events of a recording as rows of a table."""
    _write_rows(file, kind, (TABLES[kind].row(number, path, event) for number, event in enumerate(events, start=1)))


def _write_rows(file: TextIO, kind: str, rows: Iterable[tuple]) -> None:
    if kind == "csv":
        csv.writer(file, lineterminator="\n").writerows(rows)
    else:  # Audacity and Raven know no quotes
        file.writelines("\t".join(re.sub(r"[\t\r\n]", " ", str(cell)) for cell in row) + "\n" for row in rows)


def _csv_row(_: int, path: str, event: Event) -> tuple:
    return path, f"{event.onset_s:.3f}", f"{event.offset_s:.3f}", event.label, f"{event.score:.4f}"


def _audacity_row(_: int, __: str, event: Event) -> tuple:
    return f"{event.onset_s:.6f}", f"{event.offset_s:.6f}", event.label


def _raven_row(number: int, _: str, event: Event) -> tuple:
    place = (number, "Spectrogram 1", 1, f"{event.onset_s:.6f}", f"{event.offset_s:.6f}", 0, HIGHEST_HZ)
    return *place, event.label, f"{event.score:.4f}"


class Table(NamedTuple):
    """A kind of table of events."""

    header: tuple[str, ...]
    row: Callable[[int, str, Event], tuple]  # of the number of an event, the path of the recording, and the event


RAVEN_PLACE = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)")
TABLES = {
    "csv": Table(("file", "onset_s", "offset_s", "label", "score"), _csv_row),
    "audacity": Table((), _audacity_row),
    "raven": Table((*RAVEN_PLACE, "Species", "Score"), _raven_row),
}
