"""Events of a timeline, beside a definition that looks at one class and every rule by itself, and their tables."""

import csv
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asda.errors import UserError
from asda.inference.events import Event, EventRule, find_events, write_events, write_header
from asda.inference.results import Timeline

LABELS = ("dog", "cat", "car")


def timeline(probabilities_WC: np.ndarray, window_s: float, hop_s: float, first: int = 0) -> Timeline:
    starts_W = (first + torch.arange(len(probabilities_WC), dtype=torch.float64)) * hop_s
    return Timeline(starts_W, starts_W + window_s, torch.from_numpy(probabilities_WC))


def by_definition(probabilities_W: np.ndarray, window_s: float, hop_s: float, rule: EventRule) -> list[tuple]:
    """One class, rule by rule over whole arrays: hysteresis, spans, merging, least length."""
    low = rule.threshold if rule.low is None else rule.low
    active_W = np.zeros(len(probabilities_W), bool)
    for w, probability in enumerate(probabilities_W):
        active_W[w] = probability >= rule.threshold or (w > 0 and active_W[w - 1] and probability >= low)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active_W, [0]])))
    spans = [
        (start * hop_s, (stop - 1) * hop_s + window_s, probabilities_W[start:stop].max())
        for start, stop in edges.reshape(-1, 2)
    ]
    merged: list[tuple] = []
    for span in spans:
        if merged and span[0] - merged[-1][1] <= rule.merge_s:
            last = merged.pop()
            span = (last[0], max(last[1], span[1]), max(last[2], span[2]))
        merged.append(span)
    return [span for span in merged if span[1] - span[0] >= rule.min_s]


@given(
    seed=st.integers(0, 10**6),
    num_windows=st.integers(0, 40),
    hops=st.sampled_from([(1.0, 1.0), (2.0, 0.5), (0.25, 0.25)]),
    threshold=st.sampled_from([0.5, 0.7]),
    low=st.sampled_from([None, 0.2, 0.5]),
    min_s=st.sampled_from([0.0, 1.0, 2.5]),
    merge_s=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    part=st.integers(1, 7),
)
def test_events_are_those_of_the_definition_in_whatever_parts_they_come(
    seed, num_windows, hops, threshold, low, min_s, merge_s, part
):
    window_s, hop_s = hops
    rule = EventRule(threshold, low, min_s, merge_s)
    probabilities_WC = np.random.default_rng(seed).random((num_windows, len(LABELS)))
    parts = [
        timeline(probabilities_WC[start : start + part], window_s, hop_s, start)
        for start in range(0, num_windows, part)
    ]
    found = list(find_events(parts, LABELS, rule))
    for c, label in enumerate(LABELS):
        ours = sorted((e.onset_s, e.offset_s, e.score) for e in found if e.label == label)
        np.testing.assert_allclose(ours, by_definition(probabilities_WC[:, c], window_s, hop_s, rule))
    assert all(event.onset_s < event.offset_s for event in found)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threshold": 0.0}, "threshold 0 must be above 0"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"low": 0.6}, "low 0.6 must be from 0 to the threshold, 0.5"),
        ({"min_s": -1.0}, "min_s -1 must be 0 s or more"),
        ({"merge_s": float("nan")}, "merge_s nan"),
    ],
)
def test_rules_out_of_range_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        EventRule(**values)


def table(kind: str, path: str, events: list[Event]) -> str:
    file = io.StringIO()
    write_header(file, kind)
    write_events(file, kind, path, events)
    return file.getvalue()


def test_the_tables_are_those_of_the_other_programs():
    events = [Event(0.5, 2.0, 'dog, "bark"', 0.91234), Event(3.0, 4.25, "cat\there", 0.5)]
    rows = list(csv.DictReader(io.StringIO(table("csv", "a, b.wav", events))))
    assert rows[0] == {
        "file": "a, b.wav",
        "onset_s": "0.500",
        "offset_s": "2.000",
        "label": 'dog, "bark"',
        "score": "0.9123",
    }
    assert table("audacity", "a.wav", events) == '0.500000\t2.000000\tdog, "bark"\n3.000000\t4.250000\tcat here\n'
    header, first, second = table("raven", "a.wav", events).splitlines()
    assert header.split("\t")[:4] == ["Selection", "View", "Channel", "Begin Time (s)"]
    assert first.split("\t") == [
        "1",
        "Spectrogram 1",
        "1",
        "0.500000",
        "2.000000",
        "0",
        "8000",
        'dog, "bark"',
        "0.9123",
    ]
    assert second.startswith("2\t")
