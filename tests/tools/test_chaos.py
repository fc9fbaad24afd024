"""The driver of random faults: each bad outcome is detected; a few trials of a cheap kind, and its record resumed."""

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_checkpoints import save, tiny_config

ROOT = Path(__file__).resolve().parents[2]
DRIVER = str(ROOT / "tools" / "chaos")

SAVED = "saved /x/run/checkpoints/step-0000004 (0.00 GiB in 0.1 s, while training)\n"
STOPPED = "stopped after step 4 of 10, as SIGTERM asked; a checkpoint is saved, and the same command resumes\n"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DRIVER)


@pytest.fixture
def verdicts() -> Any:
    return importlib.import_module("verdicts")


def command() -> ModuleType:
    """tools/chaos as a module."""
    spec = importlib.util.spec_from_file_location("chaos_command", Path(DRIVER) / "__main__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of the steps 2 and 4."""
    config = tiny_config("run.keep=9")
    for step in (2, 4):
        save(tmp_path / "run", config, step)
    return tmp_path / "run"


def fake(tmp_path: Path, code: str) -> Any:
    """A program under trial that is this Python code."""
    return importlib.import_module("processes").start([sys.executable, "-c", code], tmp_path / "fake")


def test_a_process_that_is_left_behind_is_found_and_killed(tmp_path: Path, verdicts: Any) -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], {})"
    program = fake(tmp_path, child.format("start_new_session=True"))
    code = program.wait(20)
    survivors = program.survivors(0.2)
    assert code == 0
    [complaint] = verdicts.of_ending(code, survivors, 20)
    assert complaint.startswith(verdicts.LEFT)
    program.end()
    assert program.survivors(0) == []


def test_a_hang_is_found(tmp_path: Path, verdicts: Any) -> None:
    program = fake(tmp_path, "import time; time.sleep(60)")
    code = program.wait(0.3)
    assert code is None
    [complaint] = verdicts.of_ending(code, (), 0.3)
    assert complaint.startswith(verdicts.HANG)
    assert verdicts.of_code(code, ()) == []
    program.end()
    assert not program.runs


def test_a_traceback_is_found_but_for_the_launchers_own(tmp_path: Path, verdicts: Any) -> None:
    program = fake(tmp_path, "raise ValueError('no')")
    assert program.wait(20) == 1
    program.end()
    text = program.text(program.stderr)
    assert verdicts.of_tracebacks(text, launcher=False) == [f"{verdicts.TRACEBACK}: ValueError: no"]
    begin = "Traceback (most recent call last):\n"
    launcher = f'{begin}  File "/x/deepspeed/launcher/runner.py", line 1, in main\nKeyboardInterrupt\n'
    ours = f'{begin}  File "{ROOT}/asda/train.py", line 1, in main\nKeyError: 1\n'
    assert verdicts.of_tracebacks(launcher, launcher=True) == []
    assert len(verdicts.of_tracebacks(launcher, launcher=False)) == 1
    assert verdicts.of_tracebacks(launcher + ours, launcher=True) == [f"{verdicts.TRACEBACK}: KeyError: 1"]


def test_an_exit_code_that_is_not_right_for_the_fault_is_found(verdicts: Any) -> None:
    assert verdicts.of_code(0, ()) == verdicts.of_code(137, {137}) == verdicts.of_code(247, {137}) == []
    assert verdicts.of_code(1, {2})[0].startswith(verdicts.CODE)
    assert verdicts.of_done(0, {"a": 1}, {"a": 2})[0].startswith(verdicts.SENTENCE)
    assert verdicts.of_done(2, {"a": 1}, {"a": 2}) == verdicts.of_done(0, {"a": 1}, {"a": 1}) == []


def test_a_false_saved_is_found(run: Path, verdicts: Any) -> None:
    assert verdicts.of_sentences(75, SAVED, STOPPED, run) == []
    assert verdicts.of_sentences(75, "", STOPPED.replace("step 4", "step 5"), run)[0].startswith(verdicts.SENTENCE)
    assert "without a sentence" in verdicts.of_sentences(75, "", "killed", run)[0]
    (run / "checkpoints/step-0000004/state.json").write_text("{}", "utf-8")
    assert len(verdicts.of_sentences(75, SAVED, STOPPED, run)) == 2


def test_lost_and_damaged_checkpoints_are_found(run: Path, verdicts: Any) -> None:
    assert verdicts.of_checkpoints(run, [2, 4], 9) == verdicts.of_checkpoints(run, [2], 2) == []
    shutil.rmtree(run / "checkpoints" / "step-0000002")
    assert verdicts.of_checkpoints(run, [2, 4], 1) == []
    assert verdicts.of_checkpoints(run, [2, 4], 2)[0].startswith(verdicts.LOST)
    (run / "checkpoints/step-0000004/state.json").write_text("{}", "utf-8")
    assert "is damaged" in verdicts.of_checkpoints(run, [4], 9)[0]


def test_a_recovery_to_another_result_is_found(verdicts: Any) -> None:
    assert verdicts.of_recovery(0, {"a": 1}, {"a": 1}) == []
    assert verdicts.of_recovery(2, {"a": 1}, {"a": 1})[0].startswith(verdicts.DIFFERS)
    assert verdicts.of_recovery(0, {"a": 1, "b": 2}, {"a": 1, "b": 3})[0].endswith("another result: b")


def test_a_seed_is_the_same_trial_every_time_and_all_kinds_are_drawn() -> None:
    faults = importlib.import_module("faults")
    drawn = [faults.draw(seed) for seed in range(1, 400)]
    names = [(its.work.name, its.fault.name, its.moment, its.options) for its in drawn]
    assert names == [
        (its.work.name, its.fault.name, its.moment, its.options) for its in map(faults.draw, range(1, 400))
    ]
    assert {its.work.name for its in drawn} == set(faults.WORKS)
    assert {its.fault.family for its in drawn} >= {
        *faults.SIGNALS,
        "folder",
        "disk",
        "streams",
        "locale",
        "user",
        "shm",
    }


@pytest.mark.launch
def test_trials_are_recorded_and_the_record_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, main = tmp_path / "record.jsonl", command()
    argv = ["--only", "shards", "--first-seed", "5", "--work", str(tmp_path / "work"), "--record", str(record)]
    assert main.try_all(main.parsed([*argv, "--trials", "1"])) == 0
    with record.open("a") as file:
        file.write('{"seed": 10, "wor')  # cut off
    capsys.readouterr()
    assert main.try_all(main.parsed([*argv, "--trials", "3"])) == 0
    told = capsys.readouterr().out
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["good"] * 3
    assert len({line["seed"] for line in lines}) == 3
    assert "2/2 seed" in told
    assert "3 trials, 0 bad" in told
