"""asda predict from the outside: what it says of audio, and of what is no audio."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import torchaudio
from matplotlib.image import imread
from safetensors.torch import load_file
from tiny_tools import LABELS, Done, noise, one_core, run, wav, write_broken, write_pretrained, write_tagger

import asda
from asda.checkpoint.read import read_description
from asda.checkpoint.weights import read_weights, write_weights
from asda.config.data import InputConfig, LogMelStats
from asda.config.model import ClassifyConfig
from asda.config.run import Description
from asda.data.audio.find import audio_files
from asda.errors import UserError
from asda.inference import Model
from asda.inference.events import EventRule, find_events
from asda.models.classifier import Classifier

pytestmark = pytest.mark.usefixtures(one_core.__name__)
MOST_LOG_MEL_ERROR = 2e-3  # of a front-end that is right; golden/README.md
FP32_LOGITS = 5e-6  # absolute, of two programs on the same log-mel; golden/README.md
TAGS = ClassifyConfig(kind="classify", init_from="", loss="bce")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("weights") / "tagger")


@pytest.fixture(scope="module")
def model(tagger: Path) -> Model:
    return asda.load(tagger)


def predict(*arguments: object) -> Done:
    return run("predict", *arguments)


def records(done: Done) -> list[dict]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_json_holds_the_tags_of_the_api_in_stable_keys(tagger: Path, model: Model, tmp_path: Path):
    samples_S = noise(3.3)
    path = wav(tmp_path / "a.wav", samples_S)
    (record,) = records(predict("--model", tagger, "--json", "--top", 3, path))
    assert list(record) == ["file", "duration_s", "tags"]
    assert (record["file"], record["duration_s"]) == (str(path), 3.3)
    expected = [{"label": tag.label, "probability": tag.probability} for tag in model.tags(samples_S, 16_000, top=3)]
    assert record["tags"] == expected


def test_more_tags_than_classes_are_all_classes(tagger: Path, tmp_path: Path):
    (record,) = records(predict("--model", tagger, "--json", "--top", 99, wav(tmp_path / "a.wav", noise(1))))
    assert sorted(tag["label"] for tag in record["tags"]) == sorted(LABELS)


def test_a_folder_is_read_with_all_below_it_in_order(tagger: Path, tmp_path: Path):
    for name in ("b.wav", "a/z.wav", "a/b/y.wav", ".hidden/x.wav"):
        wav(tmp_path / name, noise(0.5))
    (tmp_path / "notes.txt").write_text("not audio")
    found = [record["file"] for record in records(predict("--model", tagger, "--json", tmp_path))]
    assert found == [str(tmp_path / name) for name in ("a/b/y.wav", "a/z.wav", "b.wav")]


def test_the_timeline_is_that_of_the_api(tagger: Path, model: Model, tmp_path: Path):
    samples_S = noise(3)
    path = wav(tmp_path / "a.wav", samples_S)
    (record,) = records(predict("--model", tagger, "--json", "--timeline", "--window", 1, "--hop", 0.5, path))
    expected = model.timeline(samples_S, 16_000, 1.0, 0.5)
    assert list(record["timeline"]) == ["starts_s", "ends_s", "labels", "probabilities"]
    assert record["timeline"]["starts_s"] == expected.starts_s.tolist()
    assert record["timeline"]["ends_s"] == expected.ends_s.tolist()
    assert record["timeline"]["labels"] == list(LABELS)
    assert record["timeline"]["probabilities"] == expected.probabilities.tolist()


def test_the_table_shows_percent_bars_and_the_strongest_tag_of_each_window(tagger: Path, model: Model, tmp_path: Path):
    samples_S = noise(3)
    path = wav(tmp_path / "a.wav", samples_S)
    done = predict("--model", tagger, "--top", 2, "--timeline", "--window", 1, path)
    lines = done.out.splitlines()
    first = model.tags(samples_S, 16_000, top=1)[0]
    assert lines[0] == f"{path}  (3.00 s)"
    assert lines[1].split() == [f"{100 * first.probability:.1f}", "%", "#" * round(25 * first.probability), first.label]
    timeline = model.timeline(samples_S, 16_000, 1.0)
    strongest = [LABELS[c] for c in timeline.probabilities.argmax(1)]
    assert [line.split()[-1] for line in lines[4:]] == strongest
    assert lines[5].split()[:4] == ["1.00", "to", "2.00", "s"]


def test_a_broken_file_among_several_is_named_and_the_others_are_done(tagger: Path, tmp_path: Path):
    paths = [wav(tmp_path / f"{name}.wav", noise(1, seed=name)) for name in range(3)]
    paths[1].write_text("this is no sound")
    done = predict("--model", tagger, "--json", *paths)
    assert done.code == 2
    assert [json.loads(line)["file"] for line in done.out.splitlines()] == [str(paths[0]), str(paths[2])]
    first, last = done.err.splitlines()
    assert first.startswith(f"error: {paths[1]}: libsndfile")
    assert last == "error: 1 of 3 files cannot be used"


def test_a_path_that_cannot_be_looked_at_is_named_and_the_others_are_done(tagger: Path, tmp_path: Path):
    good, long = wav(tmp_path / "a.wav", noise(1)), tmp_path / f"{'x' * 300}.wav"
    done = predict("--model", tagger, "--json", long, good)
    assert done.code == 2
    assert [json.loads(line)["file"] for line in done.out.splitlines()] == [str(good)]
    assert done.err.splitlines()[0] == f"error: {long}: cannot be read: File name too long"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def scandir(path: str):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot list the folder .*closed: Permission denied"):
        audio_files([tmp_path])


def test_every_kind_of_broken_audio_is_one_sentence(tagger: Path, tmp_path: Path):
    for path, words in write_broken(tmp_path / "broken").values():
        done = predict("--model", tagger, "--json", path)
        assert (done.code, done.out) == (2, ""), path
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: {path}: "), line
        assert words in line


def test_what_is_no_audio_or_no_tagger_is_one_sentence(tagger: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    pretrained = write_pretrained(tmp_path / "pretrained")
    sound = wav(tmp_path / "a.wav", noise(1))
    cases = {
        "holds no audio file": ("--model", tagger, tmp_path / "empty"),
        "there is no checkpoint in": ("--model", tmp_path / "nowhere", sound),
        "has no classes": ("--model", pretrained, sound),
        "--top 0 must be at least 1": ("--model", tagger, "--top", 0, sound),
        "add --timeline, --events or --picture": ("--model", tagger, "--hop", 1, sound),
        "--window 30 must be from 0.01 to 1.28 s": ("--model", tagger, "--timeline", "--window", 30, sound),
        "--hop 0 must be from 0.01 s to a window": ("--model", tagger, "--timeline", "--hop", 0, sound),
        "draws one file": ("--model", tagger, "--picture", tmp_path / "a.png", sound, sound),
        "--threshold is for a table of events": ("--model", tagger, "--threshold", 0.3, sound),
        "--shortest -1.0 must be at least 0": ("--model", tagger, "--events", tmp_path / "e", "--shortest", -1, sound),
        "threshold 2 must be above 0": ("--model", tagger, "--events", tmp_path / "e", "--threshold", 2, sound),
        "must end in .png": ("--model", tagger, "--picture", tmp_path / "a.jpg", sound),
    }
    for words, arguments in cases.items():
        done = predict(*arguments)
        assert (done.code, done.out) == (2, ""), words
        (line,) = done.err.splitlines()
        assert words in line


def test_192_khz_and_8_channels_give_the_tags_of_their_mean_at_16_khz(tagger: Path, model: Model, tmp_path: Path):
    """The mean in float64 and torchaudio's resampling, as the official front-end; one chunk of the model."""
    loud_C = np.random.default_rng(3).uniform(0.2, 1, 8)
    many_SC = (noise(1.25, rate_hz=192_000)[:, None] * loud_C / 2).astype(np.int16)
    path = wav(tmp_path / "many.wav", many_SC, rate_hz=192_000)
    mean_S = torch.from_numpy((many_SC / 32768).mean(1)).float()
    plain_S = torchaudio.functional.resample(mean_S, 192_000, 16_000)

    (record,) = records(predict("--model", tagger, "--json", "--top", len(LABELS), path))
    found = {tag["label"]: tag["probability"] for tag in record["tags"]}
    expected_C = model.logits(plain_S, 16_000).sigmoid()
    gain_CTM = gains(classifier_of(tagger), padded(model, model.log_mel(plain_S, 16_000)))
    most_C = probability_bound(gain_CTM, torch.tensor(MOST_LOG_MEL_ERROR / (2 * 4.0)))
    errors_C = (torch.tensor([found[label] for label in LABELS]) - expected_C).abs()
    print(f"largest error {errors_C.max():.1e}, bounds {most_C.min():.1e} to {most_C.max():.1e}")
    assert record["duration_s"] == 1.25
    assert (errors_C <= most_C).all()


def pcm(golden_wave_S: torch.Tensor) -> np.ndarray:
    """Amplitudes of a 16-bit recording as its int16 samples."""
    samples_S = (golden_wave_S * 32768).round()
    assert torch.equal(samples_S / 32768, golden_wave_S)
    return samples_S.to(torch.int16).numpy()


def test_the_official_clip_as_a_wav_gives_what_the_official_log_mel_gives(shared: Path, tmp_path: Path):
    """The 32 kHz recording through the tool, against the official front-end's `normalized` through the network.

    data.frames is 1024, as there: one chunk, whose last 26 frames are padding.
    """
    state = golden.our_parameters(golden.checkpoint(shared, "asda_finetune"))
    labels = tuple(f"class {number}" for number in range(len(state["head.bias"])))
    data = InputConfig(frames=1024, log_mel=LogMelStats(mean=-4.268, std=4.569))
    description = Description(objective=TAGS, data=data, model=golden.TINY, labels=labels)
    write_weights(tmp_path / "official", description, {"model": state})
    front_end = load_file(shared / "golden" / "fbank_test.safetensors")
    samples_S = pcm(front_end["wave_in_float32"])

    arguments = ("--model", tmp_path / "official", "--json", "--top", len(labels))
    (record,) = records(predict(*arguments, wav(tmp_path / "test.wav", samples_S, rate_hz=32_000)))
    found = {tag["label"]: tag["probability"] for tag in record["tags"]}

    official = asda.load(tmp_path / "official")
    expected_C = official.logits_of_log_mel(front_end["normalized"][None])[0].sigmoid()
    error_TF = (padded(official, official.log_mel(samples_S, 32_000)) - front_end["normalized"]).abs()
    assert error_TF.max() <= MOST_LOG_MEL_ERROR / (2 * data.log_mel.std)
    most_C = probability_bound(gains(classifier_of(tmp_path / "official"), front_end["normalized"]), error_TF)
    errors_C = (torch.tensor([found[label] for label in labels]) - expected_C).abs()
    print(f"largest error {errors_C.max():.1e}, bounds {most_C.min():.1e} to {most_C.max():.1e}")
    assert (errors_C <= most_C).all()


def padded(model: Model, mel_TF: torch.Tensor) -> torch.Tensor:
    """A normalised log-mel, filled up to the model's frames with a raw log-mel of 0."""
    data = model.description.data
    padding = (data.pad_log_mel - data.log_mel.mean) / (2 * data.log_mel.std)
    return torch.nn.functional.pad(mel_TF, (0, 0, 0, data.frames - len(mel_TF)), value=padding)


def classifier_of(folder: Path) -> Classifier:
    description = read_description(folder)
    classifier = Classifier(description.model, TAGS, len(description.labels))
    classifier.load_state_dict(read_weights(folder, "model"))
    return classifier.eval()


def gains(classifier: Classifier, mel_TF: torch.Tensor) -> torch.Tensor:
    """|d logit / d log-mel| of every class and value, [C, T, M]."""
    source = mel_TF[None, None].clone().requires_grad_()
    logits_C = classifier(golden.patchify(source))[0]
    return torch.stack([torch.autograd.grad(logit, source, retain_graph=True)[0][0, 0].abs() for logit in logits_C])


def probability_bound(gain_CTM: torch.Tensor, error_TF: torch.Tensor) -> torch.Tensor:
    """How far a class's probability may move, [C], when the normalised log-mel is wrong by so much.

    To first order a logit moves by at most the sum of |derivative| x |error|, and by the rounding of the network; a
    probability by a quarter of that, the steepest slope of the sigmoid. fp32 rounds the probability to 6e-8.
    """
    return ((gain_CTM * error_TF).sum((1, 2)) + FP32_LOGITS) / 4 + 6e-8


def test_events_are_a_table_of_all_files_or_a_table_for_each(tagger: Path, model: Model, tmp_path: Path):
    sounds = [wav(tmp_path / "in" / f"{name}.wav", noise(4, seed=seed)) for seed, name in enumerate("ab")]
    options = ("--window", 1, "--hop", 0.5, "--threshold", 0.6, "--low", 0.3, "--merge", 0.5, "--shortest", 1)
    found = {
        path: list(find_events(model.timeline(path, None, 1.0, 0.5), LABELS, EventRule(0.6, 0.3, 1.0, 0.5)))
        for path in sounds
    }
    assert all(found.values())
    done = predict("--model", tagger, "--json", "--events", tmp_path / "out" / "all.csv", *options, tmp_path / "in")
    for record, (path, events) in zip(records(done), found.items(), strict=True):
        assert (record["file"], record["events"]) == (str(path), [asdict(event) for event in events])
    rows = list(csv.DictReader((tmp_path / "out" / "all.csv").open()))
    expected = [
        (str(path), f"{event.onset_s:.3f}", f"{event.offset_s:.3f}", event.label, f"{event.score:.4f}")
        for path, events in found.items()
        for event in events
    ]
    assert [tuple(row.values()) for row in rows] == expected
    for kind, header_lines in (("audacity", 0), ("raven", 1)):
        folder = tmp_path / kind
        done = predict("--model", tagger, "--events", folder, "--events-format", kind, *options, tmp_path / "in")
        assert (done.code, done.err) == (0, "")
        for path, events in found.items():
            assert len((folder / f"{path.name}.txt").read_text().splitlines()) == len(events) + header_lines
            assert f"{len(events)} events" in done.out


def test_a_broken_file_has_no_rows_and_no_table_among_the_events(tagger: Path, tmp_path: Path):
    good, bad = wav(tmp_path / "in" / "a.wav", noise(2)), tmp_path / "in" / "b.wav"
    bad.write_bytes(good.read_bytes()[:30_000])
    options = ("--threshold", 0.01, "--events")
    assert predict("--model", tagger, *options, tmp_path / "all.csv", good, bad).code == 2
    assert {row["file"] for row in csv.DictReader((tmp_path / "all.csv").open())} == {str(good)}
    assert predict("--model", tagger, *options, tmp_path / "out", "--events-format", "raven", good, bad).code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.wav.txt"]


def test_one_channel_is_chosen_and_channels_that_cancel_are_named(tagger: Path, model: Model, tmp_path: Path):
    left_S, right_S = noise(2, seed=1), noise(2, seed=2)
    path = wav(tmp_path / "a.wav", np.stack([left_S, right_S], axis=1))
    (record,) = records(predict("--model", tagger, "--json", "--channel", 1, path))
    expected = [{"label": tag.label, "probability": tag.probability} for tag in model.tags(right_S, 16_000, top=5)]
    assert record["tags"] == expected
    assert "no channel 2" in predict("--model", tagger, "--channel", 2, path).err
    cancels = wav(tmp_path / "b.wav", np.stack([left_S, -left_S], axis=1))
    assert "cancel each other" in predict("--model", tagger, cancels).err
    assert predict("--model", tagger, "--channel", 0, cancels).code == 0


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), MemoryError(), KeyError("x")])
def test_an_error_that_nobody_expected_costs_one_file(tagger: Path, tmp_path: Path, monkeypatch, error: Exception):
    bad, good = wav(tmp_path / "a.wav", noise(1)), wav(tmp_path / "b.wav", noise(1))
    tags = Model.tags

    def failing(self: Model, audio: asda.File, **options: int):
        if audio.path == bad:
            raise error
        return tags(self, audio, **options)

    monkeypatch.setattr(Model, "tags", failing)
    done = predict("--model", tagger, "--json", bad, good)
    assert done.code == 2
    assert [json.loads(line)["file"] for line in done.out.splitlines()] == [str(good)]
    assert done.err.startswith(f"error: {bad}: {type(error).__name__}")
    assert "please report it" in done.err


def test_the_picture_is_drawn_and_its_frequency_axis_is_that_of_the_log_mel(tagger: Path, model: Model, tmp_path: Path):
    out = tmp_path / "deep" / "a.png"
    path = wav(tmp_path / "a.wav", noise(4))
    done = predict("--model", tagger, "--picture", out, "--hop", 0.5, path)
    assert (done.code, done.err) == (0, "")
    picture = imread(out)
    assert picture.shape[1] > 1000
    assert picture.std() > 0.1  # not blank
    from asda.commands.pictures import mel_bin

    for hz in (300.0, 1000.0, 3000.0):
        tone_S = 0.5 * np.sin(2 * np.pi * hz * np.arange(16_000) / 16_000)
        loudest = int(model.log_mel(tone_S, 16_000).mean(0).argmax())
        # Half a bin to either side, and the width of a spectral line of 31.25 Hz, in which the FFT cannot tell.
        line = mel_bin(hz + 31.25) - mel_bin(hz)
        assert abs(loudest - mel_bin(hz)) <= 0.5 + line


def test_no_name_of_a_class_or_file_is_special_in_a_picture(tmp_path: Path):
    tagger = write_tagger(tmp_path / "tagger", labels=("a $\\frac{ of", "$", "wind"))
    path = wav(tmp_path / "a.wav", noise(1)).rename(tmp_path / "$x^{\udcff.wav")
    done = predict("--model", tagger, "--picture", tmp_path / "a.png", path)
    assert (done.code, done.err) == (0, "")
    assert imread(tmp_path / "a.png").std() > 0.1  # not blank


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("without_matplotlib")
def test_a_picture_without_matplotlib_is_one_sentence(tagger: Path, tmp_path: Path):
    sound = wav(tmp_path / "a.wav", noise(1))
    done = predict("--model", tagger, "--picture", tmp_path / "a.png", sound)
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --picture needs matplotlib; install it with: pip install 'asda[report]'\n"
    assert predict("--model", tagger, sound).code == 0


def test_the_command_line_works_and_ends_quietly_when_its_reader_has_gone(tagger: Path, tmp_path: Path):
    wav(tmp_path / "a.wav", noise(1)).rename(tmp_path / "\udcff.wav")  # a name that is no UTF-8
    command = [sys.executable, "-m", "asda", "predict", "--model", tagger, tmp_path]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff.wav" in done.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
