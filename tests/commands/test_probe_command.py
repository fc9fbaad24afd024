"""asda probe: the probe of pre-training on encoders that are there already, against scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serving
from launching import environment
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from tiny_tools import INPUT, write_pretrained, write_tagger

import asda
from asda.commands.probe import main, parse_args
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.clips import ClipDataset, read_clips
from asda.data.features.fbank import num_samples
from asda.data.order import Draw
from asda.data.shards.read import load_dataset
from asda.errors import UserError
from asda.evaluation.probe import PENALTIES
from asda.inference import Model


def arguments_of(shards: Path, *more: object) -> list[str]:
    return ["--train", f"{shards}:train", "--test", f"{shards}:test", *map(str, more)]


def judged(out: Path) -> dict[str, dict[str, float]]:
    """The figures of the only two sets that were named."""
    (figures,) = json.loads(out.read_text())["judged"]
    return figures


def run_probe(*arguments: str, ranks: int = 0) -> str:
    from asda.engine.processes import free_port  # here, because DeepSpeed takes seconds to import

    launcher = [sys.executable]
    if ranks:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
        launcher += ["--master_port", str(free_port())]
    argv = [*launcher, "--module" if ranks else "-m", "asda.commands.probe", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def features(model: Model, shards: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """By the public interface: the mean patch of the first 1.28 s of each clip, which are longer; and the classes."""
    dataset = ClipDataset(f"{shards}:{split}", labelled=True)
    clips = read_clips(dataset, [Draw(0, number) for number in range(len(dataset))])
    starts = [clip.samples[: num_samples(INPUT.frames)] for clip in clips]
    assert {len(samples_S) for samples_S in starts} == {num_samples(INPUT.frames)}, "no padding"
    means = [one.patches.mean((0, 1)).double().numpy() for one in model.features(starts, SAMPLE_RATE_HZ)]
    return np.stack(means), np.array([clip.labels[0] for clip in clips])


def expected_figures(model: Model, shards: Path, neighbours: int = 10) -> dict[str, float]:
    (train_ND, train_N), (test_TD, test_T) = (features(model, shards, split) for split in ("train", "test"))
    scaler = StandardScaler().fit(train_ND)
    train_ND, test_TD = scaler.transform(train_ND), scaler.transform(test_TD)
    knn = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute").fit(train_ND, train_N)
    ridge = RidgeCV([len(train_ND) * penalty for penalty in PENALTIES]).fit(train_ND, np.eye(8)[train_N])
    linear_T = ridge.predict(test_TD).argmax(1)
    return {
        "knn_accuracy": float((knn.predict(test_TD) == test_T).mean()),
        "linear_accuracy": float((linear_T == test_T).mean()),
    }


@pytest.mark.launch
def test_frozen_encoders_are_judged_as_scikit_learn_does_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    folder, out = write_pretrained(tmp_path / "weights"), tmp_path / "new" / "probe.json"
    arguments = arguments_of(shards, "--checkpoint", folder, "--random", "--out", out)
    told = run_probe(*arguments)
    figures = judged(out)
    # The features are equal to the rounding of fp32, and with so few clips the decisions are.
    assert figures["teacher"] == expected_figures(asda.load(folder, "teacher", "cpu"), shards)
    assert f"knn_accuracy {figures['teacher']['knn_accuracy']:.4f}" in told
    assert figures["random"].keys() == figures["teacher"].keys()
    run_probe(*arguments, ranks=2)
    assert judged(out) == figures
    # Held out in turn: the sets of above are those of the split "test"; the mean stands below
    splits = load_dataset(shards).splits
    rest = "+".join(name for name in splits if name != "test")
    held_out = ["--data", str(shards), "--hold-out", "test,train", "--checkpoint", str(folder), "--out", str(out)]
    told = run_probe(*held_out)
    first, second = json.loads(out.read_text())["judged"]
    assert (first["train"], first["test"]) == (f"{shards}:{rest}", f"{shards}:test")
    run_probe("--train", first["train"], "--test", first["test"], "--checkpoint", str(folder), "--out", str(out))
    assert judged(out)["teacher"] == first["teacher"]
    mean = (first["teacher"]["knn_accuracy"] + second["teacher"]["knn_accuracy"]) / 2
    assert f"knn_accuracy {mean:.4f} +- " in told.splitlines()[-1]


@pytest.mark.launch
def test_the_encoder_of_a_classifier_is_judged_too(shards: Path, tmp_path: Path) -> None:
    tagger, out = write_tagger(tmp_path / "tagger"), tmp_path / "probe.json"
    run_probe(*arguments_of(shards, "--checkpoint", tagger, "--neighbours", 3, "--out", out))
    assert judged(out)["student"] == expected_figures(asda.load(tagger, "student", "cpu"), shards, 3)


def test_data_may_lie_elsewhere(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asda.commands.probe_encoders import list_sets

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(shards) as server:
        sets = list_sets(parse_args(["--checkpoint", "x", "--data", server.url, "--hold-out", "test"]))
    assert sets == [(f"{server.url}:train", f"{server.url}:test", (f"{server.url}:train",))]


def test_splits_of_one_label_a_clip_and_of_several_have_no_mean() -> None:
    from asda.commands.probe_encoders import Sets, words

    sets = [Sets("x:a", "x:b", ("x:a",)), Sets("x:b", "x:a", ("x:b",))]
    accuracy, others = {"knn_accuracy": 0.5, "linear_accuracy": 0.75}, {"knn_mAP": 0.25, "linear_mAP": 0.5}
    told = list(words(sets, {"student": [accuracy, others]}))
    assert "  student   knn_mAP 0.2500  linear_mAP 0.5000" in told
    assert told[-1].startswith("no mean over the sets: ")
    assert "+-" in list(words(sets, {"student": [accuracy, accuracy]}))[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "nowhere"], "there is no checkpoint in nowhere"),
        (["--checkpoint", "{tagger}", "--weights", "teacher"], "has no teacher, which only pre-training keeps"),
        (["--checkpoint", "{tagger}", "--neighbours", "0"], "--neighbours 0 must be at least 1"),
        (["--checkpoint", "{tagger}", "--data", "shards"], "name --train and --test, or else --data, to which"),
        (["--checkpoint", "{tagger}", "--hold-out", "test"], "name --train and --test, or else --data, to which"),
        (["--checkpoint", "{tagger}", "--hold-out", "a,b,a"], "a,b,a names a twice"),
        (["--checkpoint", "{tagger}", "--seed", "-1"], "--seed -1 must be from 0 to 1099511627776"),
        (["--checkpoint", "{tagger}", "--seed", f"{2**70}"], f"--seed {2**70} must be from 0 to "),
        (["--checkpoint", "{tagger}", "--neighbours", "99"], r"probe.neighbours 99 exceeds the 48 clips"),
    ],
)
def test_wrong_probes_are_one_sentence(arguments: list[str], sentence: str, shards: Path, tmp_path: Path) -> None:
    tagger = write_tagger(tmp_path / "tagger")
    with pytest.raises(UserError, match=sentence):
        main(arguments_of(shards, *[text.format(tagger=tagger) for text in arguments]))
