"""runs/*.sh: every command that they would give is one that its program takes; runs/tables.py reads what they leave.

The scripts train for hours, so here they run with a `python` that only writes down how it was called.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

from asda.commands import COMMANDS
from asda.config.model import ClassifyConfig
from asda.config.run import load_config

RECORDER = (
    'record() { printf "%s\\0" "$@" >> "$CALLS"; printf "\\n" >> "$CALLS"; }; python() { record "$@"; }; '
    'asda() { record asda "$@"; }; export -f record python asda; exec bash "$0"'
)
PARSERS = {"evaluate": "asda.evaluate", "shards": "asda.commands.shards"} | {
    name: f"asda.commands.{name}" for name in ("probe", "attention")
}
SCRIPTS = sorted(path.name for path in (ROOT / "runs").glob("*.sh") if path.name not in ("common.sh", "ham_grid.sh"))


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """The arguments of every python that the script starts, in a checkout that has nothing but scripts."""
    shutil.copytree(ROOT / "runs", folder / "runs", ignore=lambda _, names: [n for n in names if not n.endswith(".sh")])
    calls = folder / "calls"
    variables = environment() | {"CALLS": str(calls), "AUDIO": "audio", "JOBS": "1"}  # or lines would mix
    command = ["bash", "-c", RECORDER, f"runs/{script}"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not finished" not in done.stderr, done.stderr
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


def value_of(option: str, arguments: list[str]) -> str:
    return arguments[arguments.index(option) + 1]


def overrides_of(arguments: list[str]) -> list[str]:
    return [text for text in arguments if "=" in text and not text.startswith("-")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_of_a_script_is_one_that_its_program_takes(script: str, tmp_path: Path) -> None:
    commands = commands_of(script, tmp_path)
    assert commands
    made = {value_of("--out", words) for words in commands if words[:2] == ["asda", "shards"]}
    for program, *arguments in commands:
        if program == "asda":
            assert arguments[0] in COMMANDS
        else:
            assert (ROOT / program).is_file()
        name = arguments.pop(0) if program == "asda" else Path(program).stem
        if name in PARSERS:
            importlib.import_module(PARSERS[name]).parse_args(arguments)
        if program == "asda/train.py":
            config = load_config(ROOT / value_of("--config", arguments), overrides_of(arguments))
            assert config.run.folder.startswith("runs/exp/")
        if name == "crossval":
            filled = [text.replace("{seed}", "1") for text in overrides_of(arguments)]
            config = load_config(ROOT / value_of("--config", arguments), filled)
            assert isinstance(config.objective, ClassifyConfig)
            assert value_of("--data", arguments) in made
            assert value_of("--seeds", arguments) == "1,2,3"


def record(folder: Path, shares: list[float]) -> None:
    """As asda crossval leaves it: two folds, two seeds."""
    cells = [{"fold": fold, "seed": seed} for seed in (1, 2) for fold in ("fold1", "fold2")]
    runs = [cell | {"accuracy": share, "mAP": 0.5} for cell, share in zip(cells, shares, strict=True)]
    folder.mkdir(parents=True)
    (folder / "crossval.json").write_text(json.dumps({"runs": runs}))


def test_tables_tell_the_difference_run_by_run_and_what_was_not_run(tmp_path: Path) -> None:
    record(tmp_path / "runs/exp/us8k-pretrained", [0.5, 0.6, 0.7, 0.8])
    record(tmp_path / "runs/exp/us8k-scratch", [0.4, 0.5, 0.7, 0.6])
    command = [sys.executable, str(ROOT / "runs/tables.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    # By hand: deviations 0.129, 0.129 and 0.0816 of 4 values; Student's quantile with 3 degrees of freedom is 3.182
    assert "| us8k | 65.0 +- 20.5 | 55.0 +- 20.5 | 10.0 +- 13.0 | 4 |" in done.stdout
    assert "| esc10 | not run | not run |  | 0 |" in done.stdout


def test_the_picture_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    record(tmp_path / "runs/exp/us8k-pretrained", [0.5, 0.6, 0.7, 0.8])
    record(tmp_path / "runs/exp/us8k-scratch", [0.4, 0.5, 0.7, 0.6])
    record(tmp_path / "runs/exp/esc10-base", [0.4, 0.5, 0.7, 0.6])
    record(tmp_path / "runs/exp/esc10-lambda_0.3", [0.5, 0.5, 0.7, 0.7])
    (tmp_path / "docs").mkdir()
    command = [sys.executable, str(ROOT / "runs/figures.py")]
    subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    picture = (tmp_path / "docs/results.svg").read_text()
    assert ">us8k<" in picture
    assert ">esc10<" not in picture, "not run"
    assert ">lambda 0.3<" in picture


def test_frozen_features_are_compared_seed_by_seed(tmp_path: Path) -> None:
    (tmp_path / "runs/exp").mkdir(parents=True)
    for name, shares in (("base", (0.5, 0.6, 0.7)), ("lambda_0", (0.4, 0.4, 0.7))):
        for seed, share in zip((1, 2, 3), shares, strict=True):
            judged = [{"teacher": {"linear_accuracy": share + of_fold}} for of_fold in (0.1, -0.1)]
            (tmp_path / f"runs/exp/probe-us8k-{name}-{seed}.json").write_text(json.dumps({"judged": judged}))
    command = [sys.executable, str(ROOT / "runs/tables.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    # By hand: deviations 0.1, 0.1732 and 0.1 of 3 values; Student's quantile with 2 degrees of freedom is 4.303
    assert "| base | 60.0 +- 24.8 |  | not run |  |" in done.stdout
    assert "| lambda_0 | 50.0 +- 43.0 | -10.0 +- 24.8 | not run |  |" in done.stdout


def test_the_one_map_of_a_network_without_lambda_has_a_row_of_attention_too(tmp_path: Path) -> None:
    names = ("lambda_0", "base", "lambda_0.3", "lambda_0.5", "lambda_learned")
    (tmp_path / "runs/exp").mkdir(parents=True)
    for seed, ratio in ((1, 0.9), (2, 0.8)):
        block = [{"unrelated / own": {"value": ratio}}]
        two = {"A1": block, "A2": block, "|A1 - lambda A2|": block, "A1 - lambda A2": [{"own": {"value": 1.0}}]}
        runs = {f"{name}-{seed}": two for name in names} | {f"one_map-{seed}": {"A": block}}
        (tmp_path / f"runs/exp/attention-{seed}.json").write_text(json.dumps({"runs": runs}))
    command = [sys.executable, str(ROOT / "runs/tables.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    # By hand: a deviation of 0.0707 of 2 values; Student's quantile with 1 degree of freedom is 12.71
    assert "| one_map | 0.850 +- 0.635 |  |  |  |" in done.stdout
    assert "| base | 0.850 +- 0.635 | 0.850 +- 0.635 |  |  |" in done.stdout
