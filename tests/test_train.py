"""The main job from the outside: launched processes, killed and continued runs, wrong input, every ZeRO stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_table import Count
from launching import BIN, ROOT, command, environment, finetuning, launch, pretraining, start
from safetensors.torch import load_file
from sounds_dataset import make_shards

from asda.config.run import OptimizerConfig, load_config
from asda.engine.zero import deepspeed_dict, learning_rate, micro_batch_of
from asda.errors import STOPPED_EXIT, USER_ERROR_EXIT, UserError
from asda.run.log import read_metrics


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_metrics(run, "train")}


def weights(run: Path, step: int, stem: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / f"{stem}.safetensors")


@pytest.mark.launch
def test_pretraining_on_two_ranks_falls_and_does_not_collapse(pretrained: Path) -> None:
    entries = read_metrics(pretrained, "train")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[-1]["frame_loss"] < entries[0]["frame_loss"]
    assert all(entry["target_variance"] > 0.5 for entry in entries)
    resolved = load_config(pretrained / "config.json")
    assert resolved.data.log_mel != "dataset", "the run folder has every value resolved"


@pytest.mark.launch
def test_the_teacher_is_the_moving_average_of_the_recorded_students(pretrained: Path) -> None:
    # Between two checkpoints lie two updates; the student in between is not recorded, but it is bounded by the lr:
    # fp32 weights move by at most about 2 lr = 2e-3 a step, and the teacher by 1 - decay = 0.01 of the distance.
    teachers = [weights(pretrained, step, "teacher") for step in (4, 6)]
    student = weights(pretrained, 6)
    for name, before in teachers[0].items():
        moved = teachers[1][name] - before
        predicted = (1 - 0.99**2) * (student[f"encoder.{name}"] - before)
        assert (moved - predicted).abs().max() < 0.02 * 2e-3 + 1e-6
    assert any((teachers[1][name] != teachers[0][name]).any() for name in teachers[0])


@pytest.mark.launch
def test_a_run_killed_at_any_moment_continues_to_the_same_losses(
    shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    argv = command(2, "train.py", *pretraining(shards, run))
    process = subprocess.Popen(
        argv, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-0000002").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "checkpoints" / "step-0000006").exists(), "killed too late to test anything"
    assert "resuming from" in launch(2, "train.py", *pretraining(shards, run))
    assert losses(run) == losses(pretrained)
    for stem in ("model", "teacher"):
        for name, tensor in weights(pretrained, 6, stem).items():
            assert torch.equal(weights(run, 6, stem)[name], tensor), name


def times_of(run: Path) -> dict[Path, int]:
    """When each file of the checkpoints changed, apart from the lock, which names its holder."""
    return {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if path.name != ".lock"}


@pytest.mark.launch
def test_a_finished_run_says_so_and_changes_nothing(shards: Path, pretrained: Path, count_fault: Count) -> None:
    before = times_of(pretrained)
    assert "6 of 6 steps are done" in launch(2, "train.py", *pretraining(shards, pretrained))
    assert times_of(pretrained) == before
    assert sorted(losses(pretrained)) == [1, 2, 3, 4, 5, 6]
    count_fault("32", "a finished run started again: says so, ends with 0, changes nothing", 1, 1)


@pytest.mark.launch
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_in_bf16_trains_like_the_others(stage: int, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / str(stage)
    launch(
        0,
        "train.py",
        *pretraining(shards, run, f"engine.zero_stage={stage}", "engine.precision=bf16"),
    )
    # The same seed gives the same first loss, before any update, whatever the stage. Later ones differ by rounding in
    # bf16 (relative 2**-9 a weight), of which a mean over hundreds of terms shows less.
    launch(0, "train.py", *pretraining(shards, tmp_path / "fp32"))
    assert losses(run) == pytest.approx(losses(tmp_path / "fp32"), rel=2**-8)
    assert losses(run)[6] < losses(run)[1] * (1 - 2**-6)  # by far more than rounding


@pytest.mark.launch
def test_two_ranks_accumulation_and_one_rank_give_the_same_losses_in_fp32(
    shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    # Decoder noise is drawn per rank; without it the arithmetic is the same sum in another order: 1e-5 relative in
    # fp32, times the growth over six steps of Adam, whose first steps divide by small second moments.
    for name, ranks, micro_batch in (("two", 2, 4), ("one", 0, 2)):
        arguments = pretraining(
            shards, tmp_path / name, "objective.decoder.noise_std=0", f"engine.micro_batch={micro_batch}"
        )
        launch(ranks, "train.py", *arguments, "optimizer.steps=3")
    for step, loss in losses(tmp_path / "two").items():
        assert losses(tmp_path / "one")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.launch
def test_evaluation_agrees_on_any_number_of_ranks_and_with_training(finetuned: Path, tmp_path: Path) -> None:
    figures = {0: json.loads((finetuned / "evaluation.json").read_text())}
    for ranks in (2, 3):
        out = tmp_path / f"{ranks}.json"
        assert "16 clips of" in launch(ranks, "evaluate.py", "--checkpoint", str(finetuned), "--out", str(out))
        figures[ranks] = json.loads(out.read_text())
    assert figures[0] == figures[2] == figures[3]
    valid = read_metrics(finetuned, "valid")
    assert [entry["step"] for entry in valid] == [2, 4]
    assert {key: figures[0][key] for key in ("accuracy", "mAP", "clips")} == {
        key: valid[-1][key] for key in ("accuracy", "mAP", "clips")
    }


@pytest.mark.launch
def test_finetuning_starts_from_the_pretrained_encoder(pretrained: Path, finetuned: Path) -> None:
    # Four steps of AdamW at a rate of 5e-4 or less move a weight by about 2e-3; fresh ones would lie 0.02 apart.
    start, end = weights(pretrained, 6), weights(finetuned, 4)
    for name, tensor in start.items():
        if name.startswith("encoder."):
            assert (end[name] - tensor).abs().max() < 5e-3, name


@pytest.mark.launch
def test_a_run_goes_on_with_other_ranks_stages_and_threads_through_the_same_batches(
    shards: Path, pretrained: Path, tmp_path: Path, count_fault: Count
) -> None:
    run = shutil.copytree(pretrained, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:07d}")
    uninterrupted = read_metrics(pretrained, "train")
    one_rank = command(0, "train.py", *pretraining(shards, run, "engine.zero_stage=3", "data.threads=1"))
    with subprocess.Popen(one_rank, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = ""
        while "train step" not in told:
            told += process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert "changed since step-0000002: ranks 2 -> 1" in told
        assert process.wait() == STOPPED_EXIT
    assert not (run / "checkpoints" / "step-0000006").exists(), "stopped too late to test anything"
    told = launch(2, "train.py", *pretraining(shards, run, "engine.zero_stage=0", "data.threads=0"))
    assert "ranks 1 -> 2" in told
    entries = read_metrics(run, "train")
    equal = [entry["clips"] for entry in entries] == [entry["clips"] for entry in uninterrupted]
    # Noise in the decoder is drawn by each rank for its own clips, so the losses differ by what it does to them.
    assert [entry["loss"] for entry in entries] == pytest.approx([e["loss"] for e in uninterrupted], rel=2**-6)
    count_fault("24", "other ranks and stages: 2 ranks, then 1, then 2", 2, 2, lost=0, recovered=2 * equal)
    count_fault("25", "other threads: 2, 1, none", 2, 2, lost=0, recovered=2 * equal)


@pytest.mark.launch
def test_steps_without_a_finite_loss_are_counted_and_end_the_run_with_the_names_of_their_clips(
    shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    run = tmp_path / "run"
    # The first step has the rate 0; the second moves weights so far that squares of predictions exceed fp32.
    absurd = ["optimizer.lr=1e12", "optimizer.warmup_steps=1", "run.max_bad_steps=3", "run.save_every=1"]
    done = start(command(2, "train.py", *pretraining(shards, run, *absurd)))
    assert "3 steps in a row, up to step 5, had a loss or gradient that is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    steps = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [3, 4, 5]
    assert all(len(entry["clips"]) == 8 for entry in steps)
    assert all(name.startswith("train-00000") for entry in steps for name in entry["clips"])
    entries = read_metrics(run, "train")
    assert [entry["skipped_steps"] for entry in entries] == [0, 0, 1, 2]
    assert entries[2]["lr"] == entries[3]["lr"], "the schedule follows from updates, and there was none"
    state = json.loads((run / "checkpoints" / "step-0000004" / "state.json").read_text())
    assert (state["step"], state["applied_steps"], state["bad_steps_in_a_row"]) == (4, 2, 2)
    for stem in ("model", "teacher"):
        for name, tensor in weights(run, 4, stem).items():
            assert torch.equal(weights(run, 2, stem)[name], tensor), name
    again = start(command(2, "train.py", *pretraining(shards, run, *absurd)))
    assert "resume with a larger run.max_bad_steps" in again.stderr
    assert [json.loads(line)["step"] for line in (run / "bad_steps.jsonl").read_text().splitlines()] == [3, 4, 5]
    count_fault("27", "bad steps in a row in the trainer: counted, then the run ends with their clips", 3, len(steps))


@pytest.mark.launch
def test_a_fine_tuning_goes_on_where_its_pre_training_has_gone(shards: Path, pretrained: Path, tmp_path: Path) -> None:
    start_from, run = tmp_path / "pretrained", tmp_path / "run"
    shutil.copytree(pretrained, start_from)
    arguments = finetuning(shards, run, f"objective.init_from={start_from}", "run.save_every=2", "run.keep=9")
    launch(0, "train.py", *arguments)
    ended = weights(run, 4, "model")
    shutil.rmtree(start_from)
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    launch(0, "train.py", *arguments)
    for name, tensor in weights(run, 4, "model").items():
        assert torch.equal(ended[name], tensor), name

    # The same audio in shards of another order of the classes is in shards of the same hashes.
    (tmp_path / "labels.txt").write_text("\n".join(sorted(os.listdir(shards.parent / "audio"), reverse=True)) + "\n")
    other = make_shards(shards.parent / "audio", tmp_path / "shards", "--labels", tmp_path / "labels.txt")
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    done = start(command(0, "train.py", *arguments, f"data.train={other}:train", f"data.valid={other}:test"))
    assert done.returncode == USER_ERROR_EXIT, done.stderr
    assert "have other classes, or the same in another order, than those that" in done.stderr


@pytest.mark.launch
def test_torchrun_starts_it_as_well(shards: Path, tmp_path: Path) -> None:
    script = str(ROOT / "asda" / "train.py")
    argv = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", script]
    done = start([*argv, *pretraining(shards, tmp_path / "run", "optimizer.steps=2")])
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.launch
def test_a_flipped_byte_stops_training_with_the_shard_and_the_key(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    shard = copy / "train-000001.tar.zst"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    done = start(command(2, "train.py", *pretraining(copy, tmp_path / "run")))
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if "error:" in line]
    assert sentences
    assert all("train-000001.tar.zst is damaged at key" in line for line in sentences)
    assert "Traceback" not in done.stderr


@pytest.mark.launch
def test_damage_within_the_budget_is_counted_over_ranks_and_kept_in_the_checkpoint(
    shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    shard = tmp_path / "shards" / "train-000001.tar.zst"
    shard.write_bytes(bytes(shard.stat().st_size))
    run = tmp_path / "run"
    launch(2, "train.py", *pretraining(tmp_path / "shards", run, "data.max_damaged=0.4", "optimizer.batch=16"))
    state = json.loads((run / "checkpoints" / "step-0000006" / "state.json").read_text())
    assert state["damaged_clips"] == list(range(16, 32))  # all of the shard: six steps are two epochs
    counted = [entry["damaged_clips"] for entry in read_metrics(run, "train")]
    assert counted == sorted(counted)
    assert counted[-1] == 16
    # Either rank meets about half of them, which is within this budget; together they are not.
    shutil.rmtree(run)
    arguments = pretraining(tmp_path / "shards", run, "data.max_damaged=0.26", "optimizer.batch=16")
    stopped = subprocess.run(command(2, "train.py", *arguments), capture_output=True, text=True, env=environment())
    assert stopped.returncode != 0
    assert "clips are damaged, data.max_damaged allows 12" in stopped.stderr


def wrong(name: str, shards: Path, pretrained: Path, tmp_path: Path) -> list[str]:
    """Arguments of train.py with one thing wrong."""
    run = tmp_path / "run"
    cut = tmp_path / "cut"
    if name == "cut shard":
        shutil.copytree(shards, cut)
        os.truncate(cut / "train-000000.tar.zst", 1000)
    if name == "two labels":
        clips = [f"{path},{path.parent.name};loud" for path in sorted((shards.parent / "audio").glob("*/000.wav"))]
        (tmp_path / "two.csv").write_text("\n".join(["path,label", *clips]))
        tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "csv", "--input", tmp_path / "two.csv"]
        subprocess.run([*tool, "--out", tmp_path / "two"], check=True, capture_output=True)
    return {
        "two labels": finetuning(tmp_path / "two", run, "objective.init_from=", "data.valid="),
        "unknown key": pretraining(shards, run, "optimizer.lrr=1"),
        "no shards": pretraining(tmp_path / "nowhere", run),
        "no split": pretraining(shards, run, f"data.train={shards}:nosplit"),
        "cut shard": pretraining(cut, run),
        "batch": pretraining(shards, pretrained, "optimizer.batch=16"),
        "seed": pretraining(shards, pretrained, "run.seed=2"),
        "never": pretraining(shards, pretrained, "resume=never"),
        "init": finetuning(shards, run, "objective.init_from=nowhere"),
        "size": finetuning(shards, run, f"objective.init_from={pretrained}", "model.width=64"),
    }[name]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unknown key", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("no shards", "holds no dataset.json"),
        ("two labels", "000 has 2 labels. objective.loss ce needs exactly one label on every clip"),
        ("no split", "has no split 'nosplit'; it has test, train"),
        ("cut shard", "train-000000.tar.zst has 1000 bytes"),
        ("batch", "these decide what is learned: optimizer.batch 8 -> 16"),
        ("seed", "these decide what is learned: run.seed 1 -> 2"),
        ("never", "already has a checkpoint, and resume is never"),
        ("init", "there is no checkpoint in nowhere"),
        ("size", "was trained with model.width 32, this run has 64"),
    ],
)
def test_wrong_input_is_one_sentence_and_no_run(
    name: str, sentence: str, shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    done = start(command(0, "train.py", *wrong(name, shards, pretrained, tmp_path)))
    assert done.returncode == USER_ERROR_EXIT, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "nowhere"], "there is no checkpoint in nowhere"),
        (["--checkpoint", "{pretrained}"], "is a pre-training checkpoint and has no classes"),
    ],
)
def test_wrong_evaluations_are_one_sentence(arguments: list[str], sentence: str, pretrained: Path) -> None:
    done = start(command(0, "evaluate.py", *[text.format(pretrained=pretrained) for text in arguments]))
    assert done.returncode == USER_ERROR_EXIT
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_learning_rate_is_the_official_schedule(shared: Path) -> None:
    # golden/asda_trajectory.json: lr of each of 8 updates, warm-up 3, peak 5e-4; float64 there and here
    updates = json.loads((shared / "golden" / "asda_trajectory.json").read_text())["updates"]
    config = OptimizerConfig(steps=8, warmup_steps=3, lr=5e-4, batch=2)
    assert [learning_rate(config, update["update"]) for update in updates] == pytest.approx(
        [update["lr"] for update in updates], rel=1e-12
    )


@pytest.mark.parametrize(
    ("batch", "ranks", "limit", "expected"), [(48, 4, 12, 12), (48, 1, 12, 12), (48, 2, 10, 8), (6, 2, 9, 3)]
)
def test_the_micro_batch_is_the_largest_that_divides(batch: int, ranks: int, limit: int, expected: int) -> None:
    config = load_config(ROOT / "configs" / "as2m.json", [f"optimizer.batch={batch}", f"engine.micro_batch={limit}"])
    assert micro_batch_of(config, ranks) == expected
    generated = deepspeed_dict(config, ranks)
    parts = generated["train_micro_batch_size_per_gpu"] * generated["gradient_accumulation_steps"] * ranks
    assert parts == generated["train_batch_size"] == batch


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.batch 48 must be a multiple of the number of ranks, 5"):
        micro_batch_of(load_config(ROOT / "configs" / "as2m.json"), 5)
