"""The best checkpoint: chosen on data.valid, kept, known after a kill, and evaluated on data.test."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, finetuning, launch
from tiny_checkpoints import ALONE, files_at, state_at, tiny_config

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import best_checkpoint, checkpoints_of, read_state, step_folder
from asda.checkpoint.writer import CheckpointWriter
from asda.config.run import load_config
from asda.data.clips import ClipDataset
from asda.data.datasets import open_held_out
from asda.errors import UserError
from asda.run.log import read_metrics
from asda.run.validation import Best, best_so_far

FINETUNE = ROOT / "configs" / "demo_finetune.json"


def test_the_best_is_the_earliest_of_the_highest_figures_and_never_one_without_a_value() -> None:
    best = Best()
    for step, figure in enumerate([math.nan, 0.25, 0.5, 0.5, 0.375, math.nan, math.inf], 1):
        best.update(step, figure)
    assert best == Best(3, 0.5)
    best.forget(2)
    assert best == Best(3, 0.5)
    best.forget(3)  # its save has failed
    best.update(8, 0.125)
    assert best == Best(8, 0.125)


def test_what_was_chosen_by_something_else_is_forgotten() -> None:
    saved = load_config(FINETUNE, ["run.keep_best=mAP"])
    state = replace(state_at(9), best_step=4, best_figure=0.75)
    assert best_so_far(saved, state, saved, None) == Best(4, 0.75)
    for other in ("run.keep_best=accuracy", "data.valid=elsewhere:test"):
        assert best_so_far(saved, state, load_config(FINETUNE, ["run.keep_best=mAP", other]), None) == Best()


def test_the_choice_goes_on_where_its_clips_have_moved_and_begins_anew_on_others(shards: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(shards, tmp_path / "moved")
    saved = load_config(FINETUNE, ["run.keep_best=mAP", f"data.valid={shards}:test"])
    valid = ClipDataset(f"{shards}:test", labelled=True)
    state = replace(state_at(9), best_step=4, best_figure=0.75, best_on=valid.fingerprint)
    for now, best in ((f"{moved}:test", Best(4, 0.75)), (f"{shards}:train", Best())):
        config = load_config(FINETUNE, ["run.keep_best=mAP", f"data.valid={now}"])
        assert best_so_far(saved, state, config, ClipDataset(now, labelled=True)) == best


def test_clips_that_choose_or_are_learned_do_not_test_in_silence(shards: Path) -> None:
    train = ClipDataset(f"{shards}:train", labelled=True)
    sets = {"valid": f"{shards}:test", "test": f"{shards}/:test+train"}
    config = load_config(FINETUNE, [f"data.{key}={specs}" for key, specs in sets.items()])
    with pytest.raises(UserError, match=r"share shards\. A test set must not select the checkpoint"):
        open_held_out(config, train)
    valid, warnings = open_held_out(load_config(FINETUNE, ["data.valid=", f"data.test={sets['test']}"]), train)
    assert valid is None
    assert [sentence.partition(",")[0] for sentence in warnings] == ["data.test shares shards with data.train"]
    valid, warnings = open_held_out(load_config(FINETUNE, [f"data.valid={sets['valid']}"]), train)
    assert (len(valid or ()), warnings) == (16, [])


@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        ("demo_finetune", ["run.keep_best=mAP", "data.valid="], "needs a validation metric; give data.valid"),
        ("demo_pretrain", ["run.keep_best=mAP"], "run.keep_best 'mAP' is for objective.kind classify"),
        ("demo_pretrain", ["data.test=x:y"], "data.test 'x:y' is for objective.kind classify"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_sentence(config: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(ROOT / "configs" / f"{config}.json", overrides)


def test_the_best_checkpoint_outlives_newer_ones_until_there_is_a_better_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = {}
    with CheckpointWriter(run, tiny_config("run.keep=2"), ALONE) as writer:
        for step, best in enumerate([1, 2, 2, 2, 2, 6, 6, 6, 6], 1):
            writer.save(replace(state_at(step), best_step=best, best_figure=best / 10), files_at(step))
            writer.finish()
            kept[step] = [int(folder.name.removeprefix("step-")) for folder in checkpoints_of(run)]
            assert (run / "checkpoints" / "best").read_text() == f"step-{best:07d}\n"
            assert best_checkpoint(run) == step_folder(run, best)
            assert damage(best_checkpoint(run)) is None
    assert kept == {
        1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6], 7: [6, 7], 8: [6, 7, 8], 9: [6, 8, 9],
    }  # fmt: skip


def steps_of(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoints_of(run)]


@pytest.mark.launch
def test_the_best_step_is_kept_judged_on_test_clips_and_the_same_after_a_kill(shards: Path, tmp_path: Path) -> None:
    run, killed = tmp_path / "run", tmp_path / "killed"
    choice = ["run.keep_best=mAP", f"data.valid={shards}:test", f"data.test={shards}:train", "objective.init_from="]
    choice += ["optimizer.steps=8", "run.eval_every=1", "run.save_every=3", "optimizer.lr=0.03", "run.keep=9"]
    told = launch(2, "train.py", *finetuning(shards, run, *choice))
    figures = [entry["mAP"] for entry in read_metrics(run, "valid")]
    best = figures.index(max(figures)) + 1
    assert 1 < best < 8, "the choice is not the last step, or nothing is tested"
    rising = [step for step in range(1, 9) if figures[step - 1] > max(figures[: step - 1], default=-1)]
    assert steps_of(run) == sorted({*rising, 3, 6, 8}), "each step that was the best so far is saved"
    assert f"best checkpoint on {shards}:test: step {best}, mAP {max(figures):.4f}" in told
    state = read_state(step_folder(run, 8))[1]
    assert (state.best_step, state.best_figure) == (best, max(figures))

    # What was on the disk when a kill came after step 3, and only the newest kept from there on.
    shutil.copytree(run, killed)
    for step in steps_of(killed):
        if step > 3:
            shutil.rmtree(step_folder(killed, step))
    launch(2, "train.py", *finetuning(shards, killed, *choice, "run.keep=1"))
    assert steps_of(killed) == [best, 8]
    assert best_checkpoint(killed) == step_folder(killed, best)
    for kind in ("valid", "test", "test_best"):
        assert read_metrics(killed, kind) == read_metrics(run, kind)

    out = tmp_path / "best.json"
    launch(0, "evaluate.py", "--checkpoint", str(run), "--best", "--data", f"{shards}:train", "--out", str(out))
    (test,), (test_best,) = read_metrics(run, "test"), read_metrics(run, "test_best")
    written = json.loads(out.read_text())
    assert (written["step"], test_best["step"], test_best["best_step"]) == (best, 8, best)
    assert {key: written[key] for key in ("mAP", "accuracy", "clips")} == {
        key: test_best[key] for key in ("mAP", "accuracy", "clips")
    }
    assert test["mAP"] != test_best["mAP"]
