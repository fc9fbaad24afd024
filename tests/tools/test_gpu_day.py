"""The day with a GPU, run without one: plumbing, refusals, what is kept when time runs out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_day
import pytest
import torch
from launching import ROOT, environment


def day(tmp_path: Path, seconds: float = 60) -> gpu_day.Day:
    return gpu_day.Day(cpu=True, deadline=time.monotonic() + seconds, work=tmp_path)


def shell(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [ROOT / "tools" / "gpu_day.sh", "--out", tmp_path / "day.json", *arguments]
    return subprocess.run(
        argv, capture_output=True, text=True, env=environment() | {"PYTHON": sys.executable}, check=False, cwd=tmp_path
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it runs")
def test_without_cuda_it_is_one_sentence(tmp_path: Path) -> None:
    done = shell(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torch finds no CUDA device on this machine")
    assert not (tmp_path / "day.json").exists()


@pytest.mark.launch
def test_the_parts_that_compute_here_run_on_a_cpu(tmp_path: Path) -> None:
    done = shell(tmp_path, "--cpu", "--only", "machine", "parity", "gemm", "step", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "day.json").read_text())
    assert [part["status"] for part in found.values()] == ["done"] * 4 + ["skipped"]
    assert found["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["parity"]["passed"]
    assert [row["micro_batch"] for row in found["step"]["rows"]] == [1]
    assert all(0 < row["share_of_gemm"] < 1 for row in found["step"]["rows"])


@pytest.mark.faults
@pytest.mark.timeout(900)  # six launches
def test_the_parts_that_train_run_on_a_cpu(tmp_path: Path) -> None:
    done = shell(tmp_path, "--cpu", "--only", "stages", "resume", "training")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "day.json").read_text())
    assert all(run["passed"] for run in found["stages"]["runs"].values())
    assert found["resume"]["same_run_twice_is_bit_identical"]
    assert found["resume"]["resumed_is_bit_identical"]
    assert found["training"]["clips_per_s"] > 0


def test_a_missing_package_skips_a_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"odd": (gpu_day.machine, ("no_such_package", "nor.this", "json")), "even": (lambda day: {"x": 1}, ())}
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    assert gpu_day.run_parts(day(tmp_path), ["odd", "even"], tmp_path / "day.json")
    found = json.loads((tmp_path / "day.json").read_text())
    assert found["odd"]["status"] == "skipped"
    assert found["odd"]["reason"] == "no_such_package, nor.this not installed"
    assert found["even"]["x"] == 1


def test_what_was_found_before_the_time_was_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(day: gpu_day.Day) -> gpu_day.Found:
        day.found["slow"] = {"rows": [1]}
        day.run("sleep", 60)
        return {}

    monkeypatch.setattr(gpu_day, "PARTS", {"slow": (slow, ()), "next": (lambda day: day.run("true") or {}, ())})
    gpu_day.run_parts(day(tmp_path, seconds=0.5), ["slow", "next"], tmp_path / "day.json")
    found = json.loads((tmp_path / "day.json").read_text())
    assert found["slow"] | {"seconds": 0} == {"rows": [1], "status": "cut", "reason": "out of time", "seconds": 0}
    assert found["next"]["status"] == "cut"


def test_a_failure_is_kept_with_its_last_words_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(day: gpu_day.Day) -> gpu_day.Found:
        day.run("sh", "-c", "echo no such kernel >&2; exit 3")
        return {}

    wrong = {"passed": False}
    for name, part in {"failed": failing, "wrong": lambda day: wrong}.items():
        monkeypatch.setattr(gpu_day, "PARTS", {name: (part, ()), "next": (lambda day: {}, ())})
        assert not gpu_day.run_parts(day(tmp_path), [name, "next"], tmp_path / "day.json")
        found = json.loads((tmp_path / "day.json").read_text())
        assert found["next"]["status"] == "done"
        if name == "failed":
            assert found[name]["reason"] == "exit code 3: no such kernel\n"


def test_memory_that_runs_out_ends_the_search_for_the_largest_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(self: gpu_day.Day, name: str, *argv: object) -> gpu_day.Found:
        if int(str(argv[1])) > 1:
            raise gpu_day.PartFailedError("torch.OutOfMemoryError: CUDA out of memory")
        return {"micro_batch": 1, "flops_per_s": 5.0}

    monkeypatch.setattr(gpu_day.Day, "part", part)
    today = day(tmp_path)
    today.cpu = False  # on the CPU one micro-batch is enough
    today.found["gemm"] = {"bf16_flops_per_s": 10.0}
    found = gpu_day.step(today)
    assert found["rows"] == [{"micro_batch": 1, "flops_per_s": 5.0, "share_of_gemm": 0.5}]
    assert found["stopped"] == "micro-batch 2 is out of memory"
