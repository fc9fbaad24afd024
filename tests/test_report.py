"""The report page: pictures that are there, of the runs that were given."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

TOOL = ROOT / "tools" / "report.py"


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.launch
def test_the_page_holds_its_table_and_three_pictures(pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    done = report("--pretrained", pretrained, "--finetuned", finetuned, "--scratch", finetuned, "--out", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    pictures = [base64.b64decode(data) for data in re.findall("data:image/png;base64,([^']+)", text)]
    assert len(pictures) == 3
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 10_000 for picture in pictures)
    assert "<td>16</td><td>8</td><td>12.5 %</td>" in text
    assert "http" not in text, "the page needs nothing from outside"


@pytest.mark.launch
def test_runs_that_do_not_fit_are_one_sentence(pretrained: Path, finetuned: Path, tmp_path: Path) -> None:
    swapped = report("--pretrained", finetuned, "--finetuned", pretrained, "--scratch", finetuned)
    assert (swapped.returncode, "is not a pre-training run" in swapped.stderr) == (2, True)
    unevaluated = report("--pretrained", pretrained, "--finetuned", pretrained, "--scratch", finetuned)
    assert (unevaluated.returncode, "evaluation.json is missing" in unevaluated.stderr) == (2, True)
    assert "Traceback" not in swapped.stderr + unevaluated.stderr
