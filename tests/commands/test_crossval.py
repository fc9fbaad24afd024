"""Runs over held-out splits and seeds: all of them, once, and summed up as the textbook does."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serving
from launching import ROOT, TINY, environment
from scipy import stats

from asda.commands.crossval import claim, make_plan, parse_args, table
from asda.config.run import dump_config
from asda.data.clips import ClipDataset
from asda.data.shards.read import load_dataset
from asda.errors import UserError
from asda.evaluation.folds import (
    RECORD,
    Cell,
    Plan,
    check_same_clips,
    interval,
    paired,
    read_figures,
    split_hashes,
)

CONFIG = ROOT / "configs" / "demo_finetune.json"


def crossval(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "asda", "crossval", "--config", CONFIG, *arguments]
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, env=environment(), check=False)


@pytest.mark.parametrize("number", [2, 3, 12, 40])
def test_the_interval_is_that_of_the_textbook(number: int) -> None:
    values = np.random.default_rng(1).normal(size=number)
    low, high = stats.t.interval(0.95, number - 1, loc=values.mean(), scale=stats.sem(values))
    assert interval(values.tolist()) == pytest.approx((high - low) / 2, rel=1e-9)


def test_the_quantiles_are_those_of_the_tables() -> None:
    for number, quantile in ((2, 12.706), (5, 2.776), (30, 2.045)):  # printed tables give three digits
        values = [0.0] * (number - 1) + [1.0]
        assert interval(values) == pytest.approx(quantile * np.std(values, ddof=1) / number**0.5, rel=5e-4)


def test_folds_are_averaged_over_seeds_before_they_deviate() -> None:
    figures = {Cell(f"fold{fold}", seed): {"mAP": fold / 10 + seed / 100} for fold in (1, 2, 3) for seed in (1, 3)}
    lines = table(figures, "mAP")
    means = {line.split()[0]: line.split()[1] for line in lines}
    assert means == {"fold1": "0.120", "fold2": "0.220", "fold3": "0.320", "mean": "0.220"}
    assert lines[-1].endswith("(deviation over folds 0.100)")


def begun(plan: Plan, fold: str) -> Path:
    """The folder of a training, as asda/train.py leaves it: its statistics of the shards are figures."""
    cell = Cell(fold, 1)
    config = plan.resolved(cell)
    log_mel = ClipDataset(*(part.data for part in config.data.datasets), labelled=False).log_mel
    config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": log_mel})})
    folder = plan.out / cell.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump_config(config))
    return folder


@pytest.fixture
def plan(shards: Path, tmp_path: Path) -> Plan:
    """Of two folds, with a configuration that may be edited."""
    config = tmp_path / "config.json"
    config.write_bytes(CONFIG.read_bytes())
    cells, hashes = (Cell("test", 1), Cell("train", 1)), split_hashes(load_dataset(str(shards)))
    return Plan(config, (), str(shards), ("test", "train"), cells, tmp_path / "all", hashes)


def test_runs_go_on_where_nothing_that_decides_has_changed(plan: Plan) -> None:
    begun(plan, "test")
    claim(plan)
    tree = json.loads(plan.config.read_text())
    tree["run"]["log_every"] = 7
    plan.config.write_text(json.dumps(tree))
    claim(plan)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("optimizer", "lr", 0.25, "optimizer.lr 0.0003 -> 0.25"),
        ("data", "frames", 128, "data.frames 256 -> 128"),
        ("model", "depth", 2, "model.depth 4 -> 2"),
        ("objective", "init_from", "other", 'objective.init_from "demo/pretrained" -> "other"'),
    ],
)
def test_runs_of_a_configuration_that_was_edited_since_are_refused(
    plan: Plan, section: str, key: str, value: object, words: str
) -> None:
    claim(plan)
    folder = begun(plan, "train")
    tree = json.loads(plan.config.read_text())
    tree[section][key] = value
    plan.config.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        claim(plan)
    assert str(caught.value).startswith(f"{folder} was trained with other values: {words}")
    assert "give another --out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_of_shards_that_were_made_anew_since_are_refused(plan: Plan) -> None:
    claim(plan)
    with pytest.raises(UserError, match=f"the shards of {plan.data} have changed since the runs in {plan.out} began"):
        claim(replace(plan, hashes=plan.hashes | {"test": "of other clips"}))


def test_a_hash_of_a_split_changes_with_the_order_of_the_classes(shards: Path, tmp_path: Path) -> None:
    index = load_dataset(str(shards))
    other = split_hashes(replace(index, vocabulary=tuple(reversed(index.vocabulary))))
    assert all(other[name] != hashed for name, hashed in split_hashes(index).items())


@pytest.mark.parametrize("text", ["run.seed=7", "run.folder=x", "data.train=a:b", "data.valid=a:b"])
def test_what_each_run_is_given_cannot_be_overridden(shards: Path, text: str) -> None:
    with pytest.raises(UserError, match=f"{text} would be replaced in every run; give --"):
        make_plan(arguments_of(shards, text))


def test_passwords_are_not_shown(plan: Plan) -> None:
    claim(replace(plan, data="https://user:secret@host/x?sig=secret"))
    with pytest.raises(UserError, match=r'holds runs with data "https://host/x", not') as caught:
        claim(plan)
    assert "secret" not in str(caught.value)


def leave(folder: Path, record: object) -> Path:
    """A crossval.json with this in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_runs_are_compared_with_those_on_the_same_clips_alone(plan: Plan, tmp_path: Path) -> None:
    record = {"data": "elsewhere", "runs": [], "shards": plan.hashes}
    check_same_clips(plan, leave(tmp_path / "against", record))
    for hashes in (plan.hashes | {"train": "of other clips"}, {"test": plan.hashes["test"]}):
        against = leave(tmp_path / "against", record | {"shards": hashes})
        with pytest.raises(UserError, match=f"{against} was evaluated on elsewhere, whose train"):
            check_same_clips(plan, against)
        check_same_clips(replace(plan, cells=(Cell("test", 1),)), against)  # what trained may be something else


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([{"fold": "test", "seed": 1, "mAP": 0.5}], "has no accuracy of test-seed1"),
        ([{"fold": "test", "seed": 1, "mAP": 0.5, "accuracy": None}], "has no accuracy of test-seed1"),
        ([{"fold": "test", "seed": 2, "mAP": 0.5, "accuracy": 0.5}], "has no finished run test-seed1"),
        ([{"seed": 1, "mAP": 0.5}], "is damaged, or not written by asda crossval"),
        ([{"fold": "test", "mAP": 0.5}], "is damaged, or not written by asda crossval"),
        (["test-seed1"], "is damaged, or not written by asda crossval"),
        ({"fold": "test"}, "is damaged, or not written by asda crossval"),
    ],
)
def test_a_record_that_lacks_what_is_compared_is_one_sentence(
    runs: list[object], sentence: str, tmp_path: Path
) -> None:
    against = leave(tmp_path / "against", {"runs": runs})
    with pytest.raises(UserError, match=sentence):
        paired({Cell("test", 1): {"accuracy": 0.5, "mAP": 0.25}}, read_figures(against), against)


def arguments_of(data: object, *more: str) -> Namespace:
    return parse_args(["--config", str(CONFIG), "--data", str(data), "--out", "runs/x", *more])


def test_data_may_lie_elsewhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(shards) as server:
        found = make_plan(arguments_of(server.url))
        assert f"data.train={server.url}:train" in found.arguments(Cell("test", 1))
        with pytest.raises(UserError, match=f"--hold-out nonsense: {server.url} has the splits test, train"):
            make_plan(arguments_of(server.url, "--hold-out", "nonsense"))


@pytest.mark.parametrize(
    ("option", "value", "twice"), [("--hold-out", "test,test", "test"), ("--seeds", "1,2,01", "1")]
)
def test_a_run_that_is_named_twice_would_count_twice(option: str, value: str, twice: str) -> None:
    with pytest.raises(UserError, match=f"{value} names {twice} twice"):
        arguments_of("shards", option, value)


@pytest.mark.launch
def test_every_fold_is_held_out_once_a_seed_and_nothing_is_done_twice(shards: Path, tmp_path: Path) -> None:
    tiny = [*TINY, "optimizer.steps=2", "objective.init_from=", "engine.micro_batch=8"]
    out = tmp_path / "all"
    done = crossval("--data", shards, "--out", out, "--jobs", 2, *tiny)
    assert done.returncode == 0, done.stderr
    cells = {(run["fold"], run["seed"]) for run in json.loads((out / "crossval.json").read_text())["runs"]}
    assert cells == {("test", 1), ("train", 1)}
    used = [json.loads((out / f"{fold}-seed1" / "config.json").read_text())["data"] for fold in ("test", "train")]
    assert [(data["train"][-6:], data["valid"][-6:]) for data in used] == [(":train", "s:test"), ("s:test", ":train")]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    again = crossval("--data", shards, "--out", out, "--against", out, *tiny)
    assert again.returncode == 0, again.stderr
    assert "difference   0.0 % +- 0.0 %  of 2" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before

    other = crossval("--data", shards, "--out", out, *tiny, "optimizer.lr=0.1")
    assert (other.returncode, "holds runs with overrides" in other.stderr) == (2, True)
    unpaired = crossval("--data", shards, "--out", tmp_path / "b", "--against", out, "--hold-out", "nonsense", *tiny)
    assert (unpaired.returncode, "has the splits test, train" in unpaired.stderr) == (2, True)


@pytest.mark.launch
def test_a_training_that_fails_is_one_sentence_with_its_reason(shards: Path, tmp_path: Path) -> None:
    idle = crossval("--data", shards, "--out", tmp_path / "x", "--jobs", 0)
    assert (idle.returncode, idle.stderr) == (2, "error: --jobs 0 must be at least 1\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "crossval.json").write_text('{"config": "a')
    torn = crossval("--data", shards, "--out", tmp_path / "torn")
    assert (torn.returncode, "is damaged, or not written by asda crossval" in torn.stderr) == (2, True)
    failing = ["--hold-out", "test", "objective.init_from=/nowhere", *TINY]
    done = crossval("--data", shards, "--out", tmp_path / "x", *failing)
    assert done.returncode == 2
    assert done.stderr.count("\n") < 4
    assert "test-seed1 ended with exit code 2" in done.stderr
    assert "/nowhere" in done.stderr
