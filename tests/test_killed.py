"""Rows 14 and 15: a run is killed again and again, at any step and inside saves, and becomes the run that never was."""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from fault_table import Count
from forked_ranks import Rank, RankServer
from tiny_runs import EVERY, TinyRun, assert_same_runs, wait_until

Strike = Callable[[TinyRun, list[Rank], int, np.random.Generator], None]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankServer, shards: Path) -> Callable[[int, int], TinyRun]:
    """Runs of so many steps on so many ranks, from beginning to end."""

    @cache
    def finished(steps: int, world_size: int) -> TinyRun:
        run = TinyRun(ranks, shards, shards.parent / f"uninterrupted-{steps}-{world_size}", steps, world_size)
        run.finish()
        return run

    return finished


def at_any_moment(run: TinyRun, ranks: list[Rank], session: int, rng: np.random.Generator) -> None:
    """A few steps on, between two instructions of a step."""
    target = int(rng.integers(1, 2 * EVERY))
    wait_until(lambda: run.steps_begun(session) > target, ranks)
    time.sleep(rng.uniform(0, 0.03))  # a step takes as long


def inside_a_save(run: TinyRun, ranks: list[Rank], session: int, rng: np.random.Generator) -> None:
    """While the first or the second checkpoint from now is being written."""
    folder, steps = run.folder / "checkpoints", EVERY * int(rng.integers(1, 3))
    name = f"step-{run.newest_step() + steps:07d}"
    wait_until(lambda: run.steps_begun(session) >= steps, ranks)
    wait_until(lambda: (folder / f".tmp-{name}").exists() or (folder / name).exists(), ranks)
    time.sleep(rng.uniform(0, 0.02))  # a save takes as long


def saves_under_way(run: TinyRun) -> list[Path]:
    return list((run.folder / "checkpoints").glob(".tmp-step-*"))


def check_session(run: TinyRun, reference: TinyRun, session: int, began_at: int) -> None:
    """What was trained on, and what came of it, was the same as without interruption."""
    figures, expected = run.figures(), reference.figures()
    assert figures == {step: expected[step] for step in figures}
    draws = run.draws(session)
    assert draws == reference.draws()[began_at : began_at + len(draws)]


def check_checkpoints(run: TinyRun, newest_before: int, steps_begun: int) -> None:
    """Nothing verified is gone, and at most the checkpoint that was due last is missing.

    A save runs beside the next steps; the save after it waits for its end. So what is lost is less than an interval
    and the steps beside one save, which are fewer than another interval.
    """
    due = (steps_begun - 1) // EVERY * EVERY  # the last step may have been half done
    assert run.newest_step() >= max(newest_before, due - EVERY)


MANY = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("row", "strike", "world_size", "trials"),
    [
        ("14", at_any_moment, 0, 3),
        ("15", inside_a_save, 2, 3),
        pytest.param("14", at_any_moment, 0, 20, marks=MANY),
        pytest.param("15", inside_a_save, 0, 20, marks=MANY),
        pytest.param("14", at_any_moment, 2, 5, marks=MANY),
        pytest.param("15", inside_a_save, 2, 5, marks=MANY),
    ],
)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(
    row: str,
    strike: Strike,
    world_size: int,
    trials: int,
    uninterrupted: Callable[[int, int], TinyRun],
    tmp_path: Path,
    count_fault: Count,
) -> None:
    reference = uninterrupted(4 * EVERY * trials, world_size)
    run = replace(reference, folder=tmp_path / "run")
    rng = np.random.default_rng(int(row))
    session = struck = began_at = 0
    while struck < trials:
        assert run.newest_step() < run.steps, "saves are too quick to be struck"
        ranks = run.start(session)
        strike(run, ranks, session, rng)
        newest_before = run.newest_step()
        for rank in rng.permutation(len(ranks)):
            ranks[rank].kill(signal.SIGKILL)
        assert [rank.wait(10) for rank in ranks] == [-signal.SIGKILL] * len(ranks)
        struck += row == "14" or bool(saves_under_way(run))
        check_session(run, reference, session, began_at)
        check_checkpoints(run, newest_before, began_at + run.steps_begun(session))
        session, began_at = session + 1, run.newest_step()
    run.finish(session)
    check_session(run, reference, session, began_at)
    assert_same_runs(run, reference)
    where = f"SIGKILL {strike.__name__.replace('_', ' ')}, {max(1, world_size)} ranks"
    count_fault(row, where, trials=trials, detected=trials, recovered=trials)
