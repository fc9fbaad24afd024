"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fault_table import Count, counter, table
from launching import finetuning, launch, pretraining
from sounds_dataset import make_dataset

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or the programs that tests interrupt would ignore it too


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of faults, of this process's tests or of all workers'."""
    reports = (r for some in terminalreporter.stats.values() for r in some if isinstance(r, pytest.TestReport))
    if lines := list(table(reports)):
        terminalreporter.section("faults and what became of them")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def count_fault(record_property: Callable[[str, object], None]) -> Count:
    """Puts a line into the table of faults: row of the matrix, fault, trials, detected, lost."""
    return counter(record_property)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Memory that torch gives out without a value holds NaN, so that whoever reads it before writing is found out."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real audio (data/) and the official models' numbers (golden/), which is not part of the project.

    It lies beside the checkout, or where ASDA_SHARED says. Without it the tests that need it are skipped; under CI
    its absence is a failure, because nothing else would check what they check.
    """
    folder = Path(os.environ.get("ASDA_SHARED", ROOT.parent / "shared"))
    if not (folder / "golden").is_dir():
        reason = f"needs real audio and golden numbers in {folder} (set ASDA_SHARED to their folder)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 8 classes x 8 synthetic clips: train (48 clips, 3 shards), test (16, 1 shard); files in ../audio."""
    return make_dataset(tmp_path_factory.mktemp("sounds"), clips_per_class=8)


@pytest.fixture(scope="session")
def pretrained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six uninterrupted pre-training steps on two ranks, with a checkpoint every two."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    launch(2, "train.py", *pretraining(shards, run))
    return run


@pytest.fixture(scope="session")
def finetuned(shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four fine-tuning steps from `pretrained` on one rank, with its evaluation.json."""
    run = tmp_path_factory.mktemp("runs") / "finetuned"
    launch(0, "train.py", *finetuning(shards, run, f"objective.init_from={pretrained}"))
    launch(0, "evaluate.py", "--checkpoint", str(run))
    return run
