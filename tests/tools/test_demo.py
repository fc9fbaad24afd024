"""tools/demo.py without its training: which folders it takes for its own, and what it leaves alone."""

import json
from pathlib import Path

import pytest

from asda.errors import UserError


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    """tools/demo.py whose steps only make their folders."""
    import demo

    def step(*arguments: object) -> None:
        for text in map(str, arguments):
            if text.startswith("run.folder="):
                Path(text.removeprefix("run.folder=")).mkdir()  # a run of an older demo would be in the way
        if "--checkpoint" in arguments:
            figures = {"accuracy": 0.5, "mAP": 0.5, "classes": 2, "clips": 4}
            (Path(str(arguments[-1])) / "evaluation.json").write_text(json.dumps(figures))

    monkeypatch.setattr(demo, "_run", step)
    monkeypatch.setattr(demo, "CLIPS_PER_CLASS", 1)
    return demo


@pytest.mark.parametrize("name", ["audio", "pretrained", "finetuned", "scratch"])
def test_a_folder_that_the_demo_has_not_made_is_refused_and_left_as_it_is(demo, tmp_path, name):
    mine = tmp_path / "mine" / name / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(UserError, match=r"--out .*mine holds files that this demo has not written; .*another --out"):
        demo.demo(None, tmp_path / "mine")
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [mine]


def test_a_file_as_the_folder_of_the_demo_is_refused(demo, tmp_path):
    (tmp_path / "notes").write_text("")
    with pytest.raises(UserError, match=r"--out .*notes is not a folder"):
        demo.demo(None, tmp_path / "notes")


def test_the_demo_runs_again_in_its_own_folder_with_and_without_audio_of_the_user(demo, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is nobody's
    for _ in range(2):
        demo.demo(None, tmp_path / "out")
        demo.demo(tmp_path / "recordings", tmp_path / "out")


def test_a_cpu_without_fast_bf16_trains_in_fp32(demo):
    assert demo.precision_for("flags: fpu avx2 fma") == ["engine.precision=fp32"]
    assert demo.precision_for("flags: fpu avx2 avx512f avx512bw") == []
