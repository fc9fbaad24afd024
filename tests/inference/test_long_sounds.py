"""Sound of any length: from files, as blocks and as a stream, equal to the whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small_models import CHUNK, FRAMES, RATE_HZ, close, pretraining, sound, write_model

import asda
from asda.errors import UserError
from asda.inference import Model
from asda.inference.results import Timeline
from asda.inference.windows import cut


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A classifier with chunks of 0.64 s."""
    return asda.load(write_model(tmp_path_factory.mktemp("models") / "tagger"), device="cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A pre-trained network."""
    return asda.load(write_model(tmp_path_factory.mktemp("models") / "encoder", **pretraining()), device="cpu")


def same(ours: Timeline, expected: Timeline) -> bool:
    """Equal times, and probabilities but for the rounding of batches of another size."""
    times = torch.equal(ours.starts_s, expected.starts_s) and torch.equal(ours.ends_s, expected.ends_s)
    return times and close(ours.probabilities, expected.probabilities)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("window_s", "hop_s"), [(None, None), (0.5, 0.5), (0.5, 0.13), (0.2, 0.01)])
@pytest.mark.parametrize("seconds", [0.05, 0.64, 1.7])
def test_a_stream_in_blocks_of_any_size_is_the_timeline_of_the_whole(model: Model, rate, window_s, hop_s, seconds):
    rng = np.random.default_rng(rate)
    whole_S = sound(round(seconds * rate))
    stream, place, parts = asda.Stream(model, window_s, hop_s), 0, []
    while place < len(whole_S):
        size = int(rng.integers(1, rate // 2))
        parts.append(stream.push(whole_S[place : place + size], rate))
        place += size
    joined = Timeline.joined([*parts, stream.flush()])
    assert same(joined, model.timeline(whole_S, rate, window_s, hop_s))


def test_a_window_is_scored_as_soon_as_a_frame_behind_it_has_arrived(model: Model):
    stream = asda.Stream(model, 0.5, 0.25)
    samples_S = sound(16_000)
    window = 400 + 49 * 160
    assert len(stream.push(samples_S[: window + 159], RATE_HZ).starts_s) == 0
    assert stream.push(samples_S[window + 159 : window + 160], RATE_HZ).ends_s.tolist() == [0.5]


def test_misuse_of_a_stream_is_one_sentence(model: Model, encoder: Model):
    stream = asda.Stream(model)
    stream.push(sound(100), 16_000)
    with pytest.raises(UserError, match="sample_rate_hz 44100 differs from 16000"):
        stream.push(sound(100), 44_100)
    with pytest.raises(UserError, match="100 samples at 16 kHz; the shortest clip has 400"):
        stream.flush()
    with pytest.raises(UserError, match="window_s 3 must be"):
        asda.Stream(model, 3)
    with pytest.raises(UserError, match="no classifier"):
        asda.Stream(encoder)


@pytest.mark.parametrize(("rate", "extension"), [(16_000, "wav"), (44_100, "flac"), (48_000, "ogg"), (8_000, "mp3")])
def test_a_file_gives_what_its_samples_give(model: Model, tmp_path: Path, rate, extension):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, sound(round(2.3 * rate)), rate)
    samples_S, _ = soundfile.read(path, dtype="float32")
    ours, expected = model.features(path), model.features(samples_S, rate)
    assert close(ours.patches, expected.patches)
    assert torch.equal(ours.times_s, expected.times_s)
    assert close(model.logits(str(path)), model.logits(samples_S, rate))
    assert same(model.timeline(path, None, 0.5, 0.1), model.timeline(samples_S, rate, 0.5, 0.1))
    assert close(model.log_mel(path), model.log_mel(samples_S, rate))
    assert [len(tags) for tags in model.tags([path, path], top=3)] == [3, 3]


@pytest.mark.parametrize("num_samples", [400, CHUNK, CHUNK + 240, 3 * CHUNK + 5_000])
def test_blocks_of_features_joined_are_the_features(encoder: Model, num_samples):
    samples_S = sound(num_samples)
    whole, parts = encoder.features(samples_S, RATE_HZ), list(encoder.feature_blocks(samples_S, RATE_HZ))
    for name in ("patches", "frames", "times_s"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    weights = torch.tensor([float(len(part.frames)) for part in parts])
    assert close((weights / weights.sum()) @ torch.stack([part.utterance for part in parts]), whole.utterance)
    shape = encoder.features_shape(samples_S, RATE_HZ)
    assert shape == tuple(whole.patches.shape)
    out = torch.empty(shape)
    assert encoder.features(samples_S, RATE_HZ, out=out).patches.data_ptr() == out.data_ptr()
    assert torch.equal(out, whole.patches)
    with pytest.raises(UserError, match="not that of the clip; see features_shape"):
        encoder.features(samples_S, RATE_HZ, out=torch.empty(1, 2, 3))


def test_a_bad_file_is_one_sentence_with_its_name(model: Model, tmp_path: Path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    for call in (model.features, model.tags, model.timeline, model.log_mel):
        with pytest.raises(UserError, match=r"nowhere.wav: no such file"):
            call(tmp_path / "nowhere.wav")
        with pytest.raises(UserError, match=r"bad.wav: libsndfile"):
            call(tmp_path / "bad.wav")


@pytest.mark.parametrize(("window", "hop"), [(64, 64), (50, 13), (20, 1)])
@pytest.mark.parametrize("num_samples", [400, 10_000, 10_640, 31_337])
def test_cutting_follows_its_definition(window, hop, num_samples):
    wave_S = torch.arange(num_samples, dtype=torch.float32)
    frames = 1 + (num_samples - 400) // 160
    count = 1 + max(0, -(-(frames - window) // hop))
    expected = [wave_S[w * hop * 160 :][: 400 + (window - 1) * 160] for w in range(count)]
    blocks = wave_S.split(777)
    ours = list(cut(blocks, window, hop))
    assert len(ours) == count
    for one_S, other_S in zip(ours, expected, strict=True):
        assert torch.equal(one_S[: len(other_S)], other_S)
        assert (len(one_S) - 400) // 160 == (len(other_S) - 400) // 160
    assert FRAMES == 64


def test_the_live_example_of_the_docs_prints_the_timeline_of_what_comes_through_its_pipe(model: Model, tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "usage.md").read_text(encoding="utf-8")
    program = text[text.index("# live.py") :].partition("```")[0].replace("window_s=1.0", "window_s=0.6")
    (tmp_path / "live.py").write_text(program)
    samples_S = sound(3 * RATE_HZ + 123)
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, tmp_path / "live.py", model.folder]
    done = subprocess.run(command, input=samples_S.tobytes(), capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    timeline = model.timeline(samples_S, RATE_HZ, 0.6, 0.5)
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [float(words[0]) for words in lines] == timeline.starts_s.tolist()
    assert [int(words[2]) for words in lines] == pytest.approx((100 * timeline.probabilities.amax(1)).tolist(), abs=0.6)
