"""Reading ahead: results in order, and errors in their place."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import pytest

from asda.data.prefetch import read_ahead
from asda.errors import UserError


def slow_square(task: int, note: Callable[[str], None]) -> int:
    time.sleep(random.random() / 100)
    return task * task


def refuse_five(task: int, note: Callable[[str], None]) -> int:
    if task == 5:
        raise UserError("five is refused")
    return task


READERS = {
    "here": partial(read_ahead, threads=0, ahead=4, timeout_s=60.0),
    "threads": partial(read_ahead, threads=3, ahead=4, timeout_s=60.0),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_results_come_in_the_order_of_the_tasks(reader: Callable[..., Iterator[int]]) -> None:
    assert list(reader(range(40), slow_square)) == [n * n for n in range(40)]
    assert list(islice(reader(iter(int, 1), slow_square), 3)) == [0, 0, 0]  # without end


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_an_error_comes_in_its_place(reader: Callable[..., Iterator[int]]) -> None:
    found = []
    with pytest.raises(UserError, match="five is refused"):
        found.extend(reader(range(9), refuse_five))
    assert found == [0, 1, 2, 3, 4]


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    results = READERS["threads"](iter(int, 1), slow_square)
    next(results)
    assert threading.active_count() == before + 3
    results.close()
    assert threading.active_count() == before
