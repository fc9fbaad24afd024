"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from sounds_dataset import make_dataset

ROOT = Path(__file__).resolve().parent.parent


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
    """Shards of 8 classes x 8 synthetic clips: train (48 clips, 3 shards) and test (16, 1 shard); ../audio has the files."""
    return make_dataset(tmp_path_factory.mktemp("sounds"), clips_per_class=8)
