"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

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
