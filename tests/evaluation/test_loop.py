"""Evaluation against definitions written out here: chunks, averages, ensembles, tables, and what the command says.

Runs are made of random weights by the checkpoint writer, because what is measured does not depend on training.
"""

import csv
import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fault_table import Count
from launching import ROOT, TINY, launch
from ranks import run_ranks
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support, roc_auc_score
from tiny_checkpoints import ALONE
from tiny_tools import noise, wav

from asda import evaluate as command
from asda.checkpoint.read import State, checkpoints_of, step_folder
from asda.checkpoint.writer import CheckpointWriter
from asda.config.model import ClassifyConfig
from asda.config.run import Config, load_config
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.features.fbank import FRAME_SHIFT, log_mel, num_samples
from asda.data.order import Draw
from asda.engine.processes import Processes, leave_processes
from asda.errors import UserError
from asda.evaluate import combined_logits
from asda.evaluation import report as evaluation_files
from asda.evaluation.combine import Member, averaged, members, read_together
from asda.evaluation.loop import logits_of_clips
from asda.evaluation.metrics import summary
from asda.evaluation.report import write_evaluation
from asda.models.classifier import Classifier

CLASSES = ("clock", "dog", "rain", "siren")
CHUNK = 64  # frames, as TINY says
SECONDS = (0.3, 0.655, 0.665, 1.29, 1.31, 2.0, 3.2)  # a part of a chunk, one, one and a frame, two, ...
MEAN, STD = -7.0, 4.0

# fp32 with sums of at most 512 terms of magnitude 1 in another order (one clip at a time, batches of several), through
# two blocks: 1e-5 of logits of about 1. The log-mel is the same function on both sides.
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 14 clips in four classes, from less than a chunk to five of them; split test, in two shards."""
    folder = tmp_path_factory.mktemp("lengths")
    rows = ["path,label"]
    for number, seconds in enumerate(SECONDS * 2):
        path = wav(folder / "audio" / f"{number:02}.wav", noise(seconds, seed=number))
        rows.append(f"{path},{CLASSES[number % 4]}")
    (folder / "clips.csv").write_text("\n".join(rows))
    (folder / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "csv", "--input", folder / "clips.csv"]
    tool += ["--labels", folder / "labels.txt", "--out", folder / "shards", "--split", "test", "--clips-per-shard", "9"]
    subprocess.run(tool, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture
def alone() -> Iterator[Processes]:
    """A run of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def config_of(shards: Path, *overrides: str) -> Config:
    own = [
        "run.folder=nowhere",
        f"data.valid={shards}:test",
        "engine.micro_batch=3",
        "run.keep=9",
        "objective.pooling=mean",
    ]
    stats = f'data.log_mel={{"mean": {MEAN}, "std": {STD}}}'
    return load_config(ROOT / "configs" / "demo_finetune.json", [*TINY, *own, stats, *overrides])


def weights_of(config: Config, seed: int) -> dict[str, torch.Tensor]:
    assert isinstance(config.objective, ClassifyConfig)
    torch.manual_seed(seed)
    model = Classifier(config.model, config.objective, len(CLASSES))
    torch.nn.init.normal_(model.head.weight, std=0.3)  # so that clips differ
    return model.state_dict()


def write_run(run: Path, config: Config, *seeds: int, **state: object) -> Path:
    """A run with a checkpoint for each seed, at steps 1, 2, ..."""
    with CheckpointWriter(run, config, ALONE) as writer:
        for step, seed in enumerate(seeds, 1):
            writer.save(replace(State(step, CLASSES, "", 1), **state), {"model": weights_of(config, seed)})
            outcome = writer.finish()
            assert outcome is not None
            assert outcome.failure is None
    return run


def probabilities(config: Config, weights: dict[str, torch.Tensor], clip: Clip) -> np.ndarray:
    """By definition: the mean over chunks, weighted by frames; a chunk of a longer clip ends with its last patch."""
    assert isinstance(config.objective, ClassifyConfig)
    model = Classifier(config.model, config.objective, len(CLASSES)).eval()
    model.load_state_dict(weights)
    starts = range(0, max(1, len(clip.samples) - num_samples(1) + 1), CHUNK * FRAME_SHIFT)
    chunks = [log_mel(clip.samples[start : start + num_samples(CHUNK)]) for start in starts]
    rows = []
    for mel_TM in chunks:
        is_filled = len(chunks) == 1 and config.data.padding == "constant"
        frames = CHUNK if is_filled else -(-len(mel_TM) // 16) * 16
        x_TM = (np.pad(mel_TM, [(0, frames - len(mel_TM)), (0, 0)]) - MEAN) / (2 * STD)  # padding is a log-mel of 0
        patches_NP = x_TM.reshape(-1, 16, 8, 16).swapaxes(1, 2).reshape(-1, 256)
        with torch.inference_mode():
            logits_C = model(torch.from_numpy(patches_NP.astype(np.float32))[None])[0].double()
        rows.append((logits_C.softmax(0) if config.objective.loss == "ce" else logits_C.sigmoid()).numpy())
    return np.average(rows, axis=0, weights=[len(mel_TM) for mel_TM in chunks])


def clips_of(shards: Path) -> list[Clip]:
    dataset = ClipDataset(f"{shards}:test", labelled=True)
    return read_clips(dataset, [Draw(0, number) for number in range(len(dataset))])


def heard_whole(processes: Processes, jobs: list[tuple[Config, dict[str, torch.Tensor]]]) -> list[np.ndarray]:
    """Logits of all clips by several networks."""
    logits = []
    for config, weights in jobs:
        dataset = ClipDataset(config.data.valid, labelled=True)
        logits_NC, targets_NC = logits_of_clips(config, weights, dataset, processes, chunks=True)
        assert targets_NC.sum(0).tolist() == [4, 4, 3, 3]
        logits.append(logits_NC)
    return logits


def to_probabilities(config: Config, logits_NC: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(logits_NC).double()
    assert isinstance(config.objective, ClassifyConfig)
    return (logits.softmax(1) if config.objective.loss == "ce" else logits.sigmoid()).numpy()


@pytest.mark.launch
def test_long_clips_by_chunks_on_two_ranks_equal_one_clip_at_a_time(lengths: Path) -> None:
    bce = ["objective.loss=bce", "objective.label_smoothing=0"]
    kinds = (["data.threads=1"], bce, [*bce, "data.padding=masked"])
    jobs = [(config := config_of(lengths, *overrides), weights_of(config, 1)) for overrides in kinds]
    on_ranks = run_ranks(2, heard_whole, jobs)
    for number, (config, weights) in enumerate(jobs):
        expected_NC = np.stack([probabilities(config, weights, clip) for clip in clips_of(lengths)])
        assert expected_NC.std(axis=0).min() > 100 * CLOSE["atol"], "clips differ"
        for logits in on_ranks:
            np.testing.assert_allclose(to_probabilities(config, logits[number]), expected_NC, **CLOSE)


def test_a_clip_that_fits_into_one_chunk_has_the_same_probabilities_with_and_without_chunks(
    lengths: Path, alone: Processes
) -> None:
    config = config_of(lengths)
    weights, dataset = weights_of(config, 1), ClipDataset(f"{lengths}:test", labelled=True)
    whole_NC, starts_NC = (
        to_probabilities(config, logits_of_clips(config, weights, dataset, alone, chunks=chunks)[0])
        for chunks in (True, False)
    )
    fits_N = np.array([len(clip.samples) < num_samples(CHUNK + 1) for clip in clips_of(lengths)])
    assert fits_N.sum() == 4
    np.testing.assert_allclose(whole_NC[fits_N], starts_NC[fits_N], **CLOSE)
    assert (np.abs(whole_NC - starts_NC)[~fits_N].max(axis=1) > 10 * CLOSE["atol"]).all(), "the rest of a clip counts"


def test_averaged_weights_are_the_mean_and_an_ensemble_the_mean_of_probabilities(
    lengths: Path, alone: Processes, tmp_path: Path
) -> None:
    config = config_of(lengths)
    three = members([write_run(tmp_path / "run", config, 4, 5, 6)], last=3)
    assert [one.state.step for one in three] == [1, 2, 3]
    mean = averaged(three)
    for name, tensor in mean.items():
        expected = np.mean([weights_of(config, seed)[name].double().numpy() for seed in (4, 5, 6)], axis=0)
        assert (tensor.numpy() == expected.astype(np.float32)).all(), name
    dataset = ClipDataset(f"{lengths}:test", labelled=True)
    each = [logits_of_clips(config, weights_of(config, seed), dataset, alone)[0] for seed in (4, 5, 6)]
    expected_NC = np.mean([to_probabilities(config, logits_NC) for logits_NC in each], axis=0)
    logits_NC, _ = combined_logits(three, None, dataset, alone, chunks=False)
    np.testing.assert_allclose(np.exp(logits_NC), expected_NC, rtol=0, atol=1e-12)  # fp64 on both sides
    logits_NC, _ = combined_logits(three, averaged(three), dataset, alone, chunks=False)
    assert (logits_NC == logits_of_clips(config, mean, dataset, alone)[0]).all()


def test_a_checkpoint_that_is_kept_only_as_the_best_is_none_of_the_last(lengths: Path, tmp_path: Path) -> None:
    def steps(run: Path, last: int) -> list[int]:
        return [one.state.step for one in members([run], last=last)]

    few = config_of(lengths, "run.keep=2")
    old = write_run(tmp_path / "old", few, 1, 2, 3, 4, best_step=1)
    assert [folder.name[-1] for folder in checkpoints_of(old)] == ["1", "3", "4"]
    assert steps(old, 2) == [3, 4]
    sentence = "old has 2 checkpoints \\(besides step-0000001, kept only as its best\\), --last asks for 3; ask"
    with pytest.raises(UserError, match=sentence):
        members([old], last=3)
    assert steps(write_run(tmp_path / "young", few, 1, 2, 3, 4, best_step=3), 2) == [3, 4]
    assert steps(write_run(tmp_path / "all", config_of(lengths), 1, 2, 3, best_step=1), 3) == [1, 2, 3]


@pytest.mark.launch
def test_the_command_on_two_ranks_leaves_figures_table_and_picture(lengths: Path, tmp_path: Path) -> None:
    config = config_of(lengths)
    run = write_run(tmp_path / "run", config, 13, 14)
    told = launch(2, "evaluate.py", "--checkpoint", str(run), "--last", "2", "--average", "--chunks")
    figures = json.loads((run / "evaluation_average.json").read_text())
    assert f"mAUC      {figures['mAUC']:.4f}" in told
    folders = [run / "checkpoints" / f"step-000000{step}" for step in (1, 2)]
    assert f"average of 2 checkpoints\n  step 1  {folders[0]}\n  step 2  {folders[1]}\n14 clips of " in told
    assert figures["of"] == [str(folder) for folder in folders]
    assert (figures["clips"], figures["classes"], figures["combined"], figures["step"]) == (14, 4, "average", 2)
    mean = averaged(members([run], last=2))
    expected_NC = np.stack([probabilities(config, mean, clip) for clip in clips_of(lengths)])
    targets_NC = np.stack([np.eye(4)[clip.labels[0]] for clip in clips_of(lengths)])
    # No two of these few probabilities are as near as the rounding: then clips are in the same order.
    assert np.diff(np.sort(expected_NC, axis=0), axis=0).min() > 2 * CLOSE["atol"]
    expected = summary(expected_NC, targets_NC)
    assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    rows = list(csv.DictReader((run / "evaluation_average_classes.csv").open()))
    assert [(row["class"], row["clips"]) for row in rows] == list(zip(CLASSES, "4433", strict=True))
    assert (run / "evaluation_average_confusion.png").read_bytes()[:4] == b"\x89PNG"
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("folder", "way", "expected"),
    [
        ("run/checkpoints/step-0000005", "", "run/evaluation.json"),
        ("run/checkpoints/step-0000005", "average", "run/evaluation_average.json"),
        ("copies/good", "", "copies/good_evaluation.json"),
        ("copies/good", "ensemble", "copies/good_evaluation_ensemble.json"),
        ("copies/other/../good", "", "copies/good_evaluation.json"),
    ],
)
def test_figures_lie_in_the_folder_of_the_run_and_else_beside_the_checkpoint(
    folder: str, way: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert command.default_out(tmp_path / folder, way).resolve() == tmp_path / expected


def test_figures_of_the_checkpoint_that_one_stands_in_lie_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints" / "step-0000005").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    assert command.default_out(Path("step-0000005"), "") == tmp_path / "run" / "evaluation.json"
    monkeypatch.chdir("step-0000005")
    assert command.default_out(Path("."), "") == tmp_path / "run" / "evaluation.json"


def evaluated_while_the_run_goes_on(processes: Processes, run: Path, out: Path) -> None:
    """The newest checkpoint was step 1 when the first rank looked, and step 2 when the other did."""
    seen = step_folder(run, processes.rank + 1)
    command.evaluate(lambda: members([seen]), None, out, way="", chunks=False)


@pytest.mark.launch
def test_all_ranks_judge_the_checkpoint_that_the_first_one_found(
    lengths: Path, tmp_path: Path, alone: Processes
) -> None:
    config, out = config_of(lengths), tmp_path / "e.json"
    run = write_run(tmp_path / "run", config, 1, 2)
    run_ranks(2, evaluated_while_the_run_goes_on, run, out)
    dataset = ClipDataset(f"{lengths}:test", labelled=True)
    expected = summary(*logits_of_clips(config, weights_of(config, 1), dataset, alone))
    figures = json.loads(out.read_text())
    assert figures["step"] == 1
    assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-12)


def test_a_checkpoint_that_the_run_prunes_meanwhile_is_looked_for_again(
    lengths: Path, tmp_path: Path, alone: Processes, count_fault: Count
) -> None:
    config, looks = config_of(lengths), []
    run = write_run(tmp_path / "run", config, 1, 2, 3)

    def find() -> list[Member]:
        looks.append(members([run])[0])
        return looks[-1:]

    first = members([step_folder(run, 1)])
    shutil.rmtree(step_folder(run, 1))
    several, weights = read_together(first, find, "")
    assert len(looks) == 1
    assert [one.folder for one in several] == [step_folder(run, 3)]
    assert weights is not None
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_of(config, 3).items())
    count_fault("47", "a checkpoint pruned while it is evaluated", 1, 1, recovered=1)


def test_a_checkpoint_that_is_damaged_is_not_looked_for_again(lengths: Path, tmp_path: Path, alone: Processes) -> None:
    run = write_run(tmp_path / "run", config_of(lengths), 1)
    found = members([run])
    next(step_folder(run, 1).glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read"):
        read_together(found, lambda: pytest.fail("it looks again"), "")


def test_where_a_run_computed_its_patches_and_attention_does_not_bind_its_evaluation(
    lengths: Path, tmp_path: Path, alone: Processes
) -> None:
    config = config_of(lengths, "data.device=gpu", "engine.attention=triton")
    (one,) = members([write_run(tmp_path / "run", config, 1)])
    assert one.config == config_of(lengths)
    dataset = ClipDataset(f"{lengths}:test", labelled=True)
    logits_NC, _ = combined_logits([one], one.weights(), dataset, alone, chunks=False)
    assert (logits_NC == logits_of_clips(config_of(lengths), weights_of(config, 1), dataset, alone)[0]).all()


def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Scores and one label a clip, of 40 clips and five classes; the last class has no clip, but is predicted."""
    rng = np.random.default_rng(3)
    labels_N = rng.integers(4, size=40)
    return rng.standard_normal((40, 5)) + 1.5 * np.eye(5)[labels_N], np.eye(5)[labels_N]


def test_the_table_of_classes_equals_scikit_learn(tmp_path: Path) -> None:
    scores_NC, targets_NC = predictions()
    figures = summary(scores_NC, targets_NC)
    out = tmp_path / "new" / "figures.json"
    lines = write_evaluation(out, {"data": "x"}, figures, scores_NC, targets_NC, (*CLASSES, "a, comma"))
    assert len(lines) == 3
    written, pairs = json.loads(out.read_text()), (targets_NC.argmax(1), scores_NC.argmax(1))
    assert written["mAP"] == figures["mAP"]
    assert written["labels"] == [*CLASSES, "a, comma"]
    assert written["confusion"] == confusion_matrix(*pairs, labels=range(5)).tolist()
    rows = list(csv.DictReader((tmp_path / "new" / "figures_classes.csv").open()))
    precision_C, recall_C, _, clips_C = precision_recall_fscore_support(
        targets_NC.argmax(1), scores_NC.argmax(1), labels=range(5), zero_division=0
    )
    for c, row in enumerate(rows[:4]):
        expected = {
            "average_precision": average_precision_score(targets_NC[:, c], scores_NC[:, c]),
            "auc": roc_auc_score(targets_NC[:, c], scores_NC[:, c]),
            "recall": recall_C[c],
            "precision": precision_C[c],
        }
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, abs=5e-7)  # six digits
        assert int(row["clips"]) == clips_C[c]
    assert rows[4] | {"precision": ""} == dict.fromkeys(rows[4], "") | {"class": "a, comma", "clips": "0"}


def test_several_labels_a_clip_have_a_table_and_no_picture(tmp_path: Path) -> None:
    scores_NC, targets_NC = predictions()
    targets_NC = np.maximum(targets_NC, np.roll(targets_NC, 1, axis=1))
    figures = summary(scores_NC, targets_NC)
    assert len(write_evaluation(tmp_path / "e.json", {}, figures, scores_NC, targets_NC, (*CLASSES, "e"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e_classes.csv"]
    assert (tmp_path / "e_classes.csv").read_text().startswith("class,clips,average_precision,auc\n")


def test_without_matplotlib_the_evaluation_says_so_and_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scores_NC, targets_NC = predictions()
    figures = summary(scores_NC, targets_NC)
    lines = write_evaluation(tmp_path / "e.json", {}, figures, scores_NC, targets_NC, (*CLASSES, "e"))
    assert lines[-1] == "no picture of the confusions: it needs matplotlib; pip install 'asda[report]'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e_classes.csv"]


def test_a_class_may_be_called_anything_in_the_picture(tmp_path: Path) -> None:
    scores_NC, targets_NC = predictions()
    names = ("US$ and A$^", "$x^$", r"$\frac$", "a_b", "50 %")  # mathtext, if they were read as such
    write_evaluation(tmp_path / "e.json", {}, summary(scores_NC, targets_NC), scores_NC, targets_NC, names)
    assert json.loads((tmp_path / "e.json").read_text())["labels"] == list(names)
    assert (tmp_path / "e_confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_fails_costs_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "e_confusion.png")

    monkeypatch.setattr(evaluation_files, "_draw", fail)
    scores_NC, targets_NC = predictions()
    figures = summary(scores_NC, targets_NC)
    with pytest.raises(OSError, match="No space left"):
        write_evaluation(tmp_path / "e.json", {}, figures, scores_NC, targets_NC, (*CLASSES, "e"))
    assert json.loads((tmp_path / "e.json").read_text())["mAP"] == figures["mAP"]
    assert (tmp_path / "e_classes.csv").is_file()


@pytest.fixture
def parted() -> Iterator[None]:
    """For a command that ends in the middle: its process leaves the group, as it would at its end."""
    yield
    leave_processes()


def test_figures_are_printed_before_anything_is_written(
    lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device", "evaluation.json")

    monkeypatch.setattr(command, "write_evaluation", fail)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--checkpoint", str(write_run(tmp_path / "run", config_of(lengths), 1))]
    )
    with pytest.raises(OSError, match="No space left"):
        command.main()
    assert "14 clips of" in (told := capsys.readouterr().out)
    assert "mAUC" in told


@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (".", r"\. is a folder, but --out names the JSON file to write; add a file name: evaluation\.json"),
        ("{run}", "run is a folder, but --out names the JSON file to write; add a file name: .*run/evaluation.json"),
        ("{run}/taken.json", "taken_classes.csv is a folder, .*; give another file in --out"),
        ("{run}/checkpoints/latest/e.json", "checkpoints/latest is not a writable folder, .* --out"),
        ("{run}/checkpoints/latest/new/e.json", "checkpoints/latest is not a writable folder, .* --out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_evaluation(
    out: str, sentence: str, lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", config_of(lengths), 1)
    (run / "taken_classes.csv").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(command, "combined_logits", lambda *_, **__: pytest.fail("evaluated"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(run), "--out", out.format(run=run)])
    with pytest.raises(UserError, match=sentence):
        command.main()
    assert sorted(tmp_path.rglob("*")) == before


def test_figures_without_a_value_are_null_in_the_file(tmp_path: Path) -> None:
    scores_NC = np.array([[1.0, 0.0], [0.0, 1.0]])
    figures = summary(scores_NC, np.eye(2))
    write_evaluation(tmp_path / "e.json", {}, figures, scores_NC, np.eye(2), ("a", "b"))
    written = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)
    assert (written["mAUC"], written["d_prime"]) == (1.0, None)  # infinite


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{a}", "{b}"], "2 checkpoints are named; combine them with --average .* or --ensemble"),
        (["{a}", "--average"], "--average combines several checkpoints, but 1 is named; give --last N .* --checkpoint"),
        (["{a}", "--last", "1", "--ensemble"], "--ensemble combines several checkpoints, but 1 is named; give --last"),
        (["{a}", "{wide}", "--average"], r"they differ in model\.width, model\.heads; choose"),
        (["{a}", "{other}", "--average"], r"they differ in data\.log_mel; choose"),
        (["{a}", "{bce}", "--ensemble"], "they differ in loss; choose"),
        (["{a}", "--last", "2", "--average"], "has 1 checkpoint, --last asks for 2; ask for fewer"),
        (["{a}", "{b}", "--last", "2", "--average"], "--last 2 is for one run, but --checkpoint names 2 folders"),
        (["{a}", "--best"], "has no best checkpoint; train with data.valid, and run.keep_best"),
        (["{nan}"], r"step-0000001 gives nan for 14 of 14 clips, so there are no figures"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    arguments: list[str], sentence: str, lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {
        "a": [], "b": [], "wide": ["model.width=64", "model.heads=4"], "nan": [],
        "bce": ["objective.loss=bce", "objective.label_smoothing=0"],
        "other": ['data.log_mel={"mean": -6.0, "std": 4.0}'],
    }  # fmt: skip
    needed = [name for name in overrides if f"{{{name}}}" in arguments]
    if needed == ["nan"]:
        monkeypatch.setattr(sys.modules[__name__], "weights_of", nan_weights)
    runs = {name: write_run(tmp_path / name, config_of(lengths, *overrides[name]), 1) for name in needed}
    argv = ["evaluate.py", "--checkpoint", *[text.format(**runs) for text in arguments]]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=sentence):
        command.main()
    assert not list(tmp_path.glob("*/*evaluation*"))


def nan_weights(config: Config, seed: int) -> dict[str, torch.Tensor]:
    assert isinstance(config.objective, ClassifyConfig)
    weights = Classifier(config.model, config.objective, len(CLASSES)).state_dict()
    weights["head.bias"].fill_(float("nan"))
    return weights
