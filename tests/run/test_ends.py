"""Ends and edges of a run: row 32 of the fault matrix. That a finished run says so is in test_train.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fault_table import Count
from launching import ROOT, environment
from sounds_dataset import make_shards, write_dataset

from asda.config.run import load_config
from asda.data.clips import ClipDataset
from asda.data.datasets import check_one_label
from asda.errors import UserError
from asda.evaluation.metrics import summary
from asda.trainer import train

LABELLED = ("alarm", "bird")  # the classes of split some

# One process evaluates a classifier with random weights on each split: what is said does not depend on the weights.
EVALUATE = """
import json, sys
import torch
from asda.data.datasets import check_one_label
from asda.config.run import load_config
from asda.data.clips import ClipDataset
from asda.engine.processes import join_processes
from asda.errors import UserError
from asda.evaluation.loop import evaluate_weights
from asda.models.classifier import Classifier

config_file, shards, *splits = sys.argv[1:]
overrides = ["model.width=32", "model.depth=2", "model.heads=2", "data.frames=64", "engine.precision=fp32"]
overrides.append('data.log_mel={"mean": -4, "std": 4}')
processes = join_processes()
vocabulary = tuple(open(f"{shards}/../labels.txt").read().split())
for split in splits:
    config = load_config(config_file, [*overrides, f"data.valid={shards}:{split}"])
    weights = Classifier(config.model, config.objective, len(vocabulary)).state_dict()
    try:
        print(json.dumps(evaluate_weights(config, weights, vocabulary, processes, config.data.valid)))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def odd_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with the splits some (two classes of eight), bare (no labels), uneven (two labels on one of two clips,
    none on the other) and empty (make_shards writes none such).
    """
    folder = tmp_path_factory.mktemp("odd")
    write_dataset(folder / "audio", 2, seed=5)
    clips = sorted((folder / "audio").glob("*/*.wav"))
    rows = [f"{p},{p.parent.name},some" if p.parent.name in LABELLED else f"{p},,bare" for p in clips[:-2]]
    rows += [f"{clips[-2]},{';'.join(LABELLED)},uneven", f"{clips[-1]},,uneven"]
    (folder / "clips.csv").write_text("\n".join(["path,label,split", *rows]))
    (folder / "labels.txt").write_text("\n".join(sorted({path.parent.name for path in clips})) + "\n")
    tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "csv", "--input", folder / "clips.csv"]
    tool += [
        "--labels",
        folder / "labels.txt",
        "--out",
        folder / "shards",
        "--split",
        "some",
        "--split",
        "bare",
        "--split",
        "uneven",
    ]
    subprocess.run(tool, check=True, capture_output=True)
    index = json.loads((folder / "shards" / "dataset.json").read_text())
    nothing = {"clips": 0, "seconds": 0.0, "shards": [], "class_counts": [0] * len(index["vocabulary"])}
    index["splits"]["empty"] = nothing | {"log_mel": index["splits"]["some"]["log_mel"]}
    index |= {"format_version": 1, "hash": ""}  # version 1 has no hash of its own
    (folder / "shards" / "dataset.json").write_text(json.dumps(index))
    return folder / "shards"


@pytest.mark.launch
def test_held_out_clips_without_labels_or_without_some_classes_are_said(odd_splits: Path, count_fault: Count) -> None:
    splits = ("some", "bare", "empty")
    argv = [sys.executable, "-c", EVALUATE, ROOT / "configs" / "demo_finetune.json", odd_splits, *splits]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    some, bare, empty = [json.loads(line) for line in done.stdout.splitlines() if line[0] in '{"']
    assert (some["clips"], some["classes"], some["classes_without_positives"]) == (4, 8, 6)
    assert 0 < some["mAP"] <= 1
    assert f"{odd_splits}:bare has no labels on its 10 clips" in bare
    assert f"{odd_splits}:empty has no labels on its 0 clips" in empty
    count_fault("32", "held-out clips: none, none labelled, of some classes only", 3, 3)


def test_an_accuracy_chooses_among_clips_of_one_label_only(odd_splits: Path, shards: Path) -> None:
    config = load_config(ROOT / "configs" / "demo_finetune.json", ["run.keep_best=accuracy"])
    check_one_label(config, "data.valid", "x:test", ClipDataset(f"{shards}:test", labelled=True))
    with pytest.raises(UserError, match=r"x:bare: clip bare-000000\.tar\.zst:.* has no labels\. .*=mAP"):
        check_one_label(config, "data.valid", "x:bare", ClipDataset(f"{odd_splits}:bare", labelled=True))
    uneven = ClipDataset(f"{odd_splits}:uneven", labelled=True)
    assert uneven.num_labels == len(uneven) == 2
    with pytest.raises(UserError, match=r"x:uneven: clip uneven-000000\.tar\.zst:.* has (2|no) labels\. .*=mAP"):
        check_one_label(config, "data.valid", "x:uneven", uneven)


@pytest.mark.parametrize("same", ["{0}:test+test", ["{0}:test", "{0}:train+test"]])
def test_a_split_that_is_named_twice_is_refused(shards: Path, same: str | list[str]) -> None:
    sources = same.format(shards) if isinstance(same, str) else [text.format(shards) for text in same]
    with pytest.raises(UserError, match=r":test and .*:test hold the same clips, which would count twice"):
        ClipDataset(sources, labelled=True)


def test_silence_alone_is_one_sentence(tmp_path: Path) -> None:
    silence = tmp_path / "audio" / "nothing"
    silence.mkdir(parents=True)
    for number in range(4):
        soundfile.write(silence / f"{number}.wav", np.zeros(16_000, np.int16), 16_000)
    shards = make_shards(tmp_path / "audio", tmp_path / "shards")
    with pytest.raises(UserError, match=r"all log-mel values of the clips are -15\.9\d\d: all of them are silent"):
        ClipDataset(f"{shards}:train", labelled=True)


@pytest.mark.parametrize(
    ("split", "loss", "sentence"),
    [
        ("bare", "bce", "data.train .*bare has no labels on its 10 clips; name a split of labelled clips"),
        ("uneven", "ce", r"labels\. objective\.loss ce needs exactly one label on every clip"),
    ],
)
def test_clips_that_teach_nothing_are_refused(odd_splits: Path, split: str, loss: str, sentence: str) -> None:
    overrides = [f"data.train={odd_splits}:{split}", f"objective.loss={loss}", "objective.label_smoothing=0"]
    with pytest.raises(UserError, match=sentence):
        train(load_config(ROOT / "configs" / "demo_finetune.json", overrides))


def test_the_mean_is_over_the_classes_that_have_a_clip() -> None:
    # Two classes of three: the first ranks its one clip first (AP 1), the second its one clip last of four (AP 1/4).
    scores_NC = np.array([[0.9, 0.4, 0], [0.1, 0.3, 0], [0.2, 0.2, 0], [0.3, 0.1, 0]])
    targets_NC = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]])
    figures = summary(scores_NC, targets_NC)
    assert figures["mAP"] == pytest.approx((1 + 1 / 4) / 2)
    assert figures["classes_without_positives"] == 1


def test_a_run_of_no_steps_is_refused(count_fault: Count) -> None:
    with pytest.raises(UserError, match=r"optimizer\.steps is 0: input should be greater than 0"):
        load_config(ROOT / "configs" / "demo_pretrain.json", ["optimizer.steps=0"])
    count_fault("32", "a run of no steps", 1, 1)
