"""The Python API: the official numbers, features of any length, the tags of evaluation, one sentence for a mistake."""

import json
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import golden
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from small_models import (
    CHUNK,
    FRAMES,
    LABELS,
    MEAN,
    PAD,
    RATE_HZ,
    STD,
    classifying,
    close,
    pretraining,
    sound,
    write_model,
)
from torch import Tensor

import asda
from asda.checkpoint.read import read_state, resolve_checkpoint
from asda.checkpoint.weights import read_weights
from asda.data.audio.read import read_wave
from asda.data.clips import ClipDataset
from asda.data.features import fbank
from asda.data.stream import evaluation_batches, make_patches
from asda.errors import UserError
from asda.inference import Model
from asda.inference import model as inference_model
from asda.models.classifier import Classifier
from asda.models.encoder import Encoder

ROOT = Path(__file__).resolve().parents[2]
POOLINGS = {"cls": "CLS_TOKEN", "mean": "MEAN_POOLING", "linear_softmax": "LIN_SOFTMAX"}
MOST_LOGIT_ERROR = 5e-6  # of fp32 logits of the official tiny models (golden/README.md)


def logits_of_part(model: Model, samples_S: np.ndarray) -> Tensor:
    """Logits [C] of a part of a longer clip: its log-mel, filled up to a whole patch and no further."""
    mel_TM = model.log_mel(samples_S, RATE_HZ)
    stats = model.description.data.log_mel
    padding = (PAD - stats.mean) / (2 * stats.std)
    filled_TM = torch.nn.functional.pad(mel_TM, (0, 0, 0, -len(mel_TM) % 16), value=padding)
    return model.logits_of_log_mel(filled_TM[None])[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A classifier of any number of labels a clip, chunks of 0.64 s."""
    return asda.load(write_model(tmp_path_factory.mktemp("models") / "tagger"), device="cpu")


# ---- What the official models compute


@pytest.fixture(scope="module", params=["asda", "eat"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def converted(family: str, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official fine-tuned checkpoint of a family, as asda convert makes it ours."""
    folder = tmp_path_factory.mktemp("converted") / family
    source = shared / "golden" / f"{family}_finetune_official.pt"
    subprocess.run([sys.executable, "-m", "asda", "convert", source, "--out", folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_converted_official_model_gives_the_official_logits_at_every_length(
    pooling: str, family: str, converted: Path, shared: Path, tmp_path: Path
):
    tree = json.loads((converted / "config.json").read_text())
    tree["objective"]["pooling"] = pooling
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "model.safetensors").symlink_to(converted / "model.safetensors")
    model = asda.load(tmp_path, device="cpu")
    official = golden.load(shared, f"{family}_finetune")
    for frames in (96, 128, 192):
        logits_BC = model.logits_of_log_mel(official[f"input.T{frames}"].squeeze(1))
        expected_BC = official[f"eval.T{frames}.logits.{POOLINGS[pooling]}"]
        assert float((logits_BC - expected_BC).abs().max()) < MOST_LOGIT_ERROR


def test_a_converted_official_model_gives_the_official_tokens_of_every_layer(
    family: str, converted: Path, shared: Path
):
    model = asda.load(converted, device="cpu")
    official = golden.load(shared, f"{family}_finetune")
    mel_BTM = official["input.T128"].squeeze(1)
    expected = [official["eval.T128.tokens"], *(official[f"eval.T128.block{n}.out"] for n in range(model.depth))]
    for layer, expected_BND in enumerate(expected):
        assert close(model.encode_log_mel(mel_BTM, layer), expected_BND), layer
    assert torch.equal(model.encode_log_mel(mel_BTM), model.encode_log_mel(mel_BTM, model.depth))


@pytest.mark.parametrize(
    ("wave", "stage", "rate_hz"),
    [
        ("wave_in_float32", "", 32_000),
        ("syn32000.wave_in", "syn32000.", 32_000),
        ("syn44100.wave_in", "syn44100.", 44_100),
        ("syn16000.wave_in", "syn16000.", 16_000),
    ],
)
def test_the_front_end_is_the_official_one_from_a_wave_to_normalised_log_mel(
    wave: str, stage: str, rate_hz: int, shared: Path, model: Model
):
    official = golden.load(shared, "fbank_test")
    mel_TM = model.log_mel(official[wave], rate_hz)
    assert len(mel_TM) == len(official[f"{stage}fbank"])
    errors = (mel_TM - official[f"{stage}normalized"][: len(mel_TM)]).abs() * 2 * STD  # the bounds are the log-mel's
    assert float(errors.max()) < 2e-3
    assert float(np.quantile(errors.numpy(), 0.999)) < 2e-4


# ---- Features


def chunks_of(samples_S: np.ndarray) -> list[np.ndarray]:
    """The definition, in words of the docstring: whole chunks, then what is left if it has a frame."""
    starts = range(0, len(samples_S), CHUNK)
    chunks = [samples_S[start : start + (FRAMES - 1) * 160 + 400] for start in starts]
    return [chunk_S for chunk_S in chunks if len(chunk_S) >= 400]


def tokens_of(chunk_S: np.ndarray, model: Model, layer: int = 3) -> Tensor:
    """Tokens [1 + N, D] of one chunk, step by step."""
    mel_TM = fbank.log_mel(chunk_S)
    filled_TM = np.full((-(-len(mel_TM) // 16) * 16, 128), PAD)
    filled_TM[: len(mel_TM)] = mel_TM
    corners = [(t, m) for t in range(0, len(filled_TM), 16) for m in range(0, 128, 16)]
    patches_NP = np.array([filled_TM[t : t + 16, m : m + 16].flatten() for t, m in corners])
    tokens_1ND = model.encoder.embed(torch.from_numpy((patches_NP - MEAN) / (2 * STD)).float()[None])
    for block in model.encoder.blocks[:layer]:
        tokens_1ND = block(tokens_1ND)[0]
    return tokens_1ND[0]


# One frame; a part of a patch; one chunk; a rest of a chunk that has no frame; and a frame; several chunks.
LENGTHS = [400, 3_000, CHUNK + 239, CHUNK + 240, CHUNK + 399, CHUNK + 400, 3 * CHUNK + 5_000]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_features_are_those_of_the_chunks_one_after_the_other(num_samples: int, model: Model):
    samples_S = sound(num_samples)
    tokens = [tokens_of(chunk_S, model) for chunk_S in chunks_of(samples_S)]
    features = model.features(samples_S, RATE_HZ)
    assert close(features.patches.flatten(0, 1), torch.cat([tokens_ND[1:] for tokens_ND in tokens]))
    sizes = [len(tokens_ND) - 1 for tokens_ND in tokens]
    utterance_D = sum(size * tokens_ND[0] for size, tokens_ND in zip(sizes, tokens, strict=True)) / sum(sizes)
    assert close(features.utterance, utterance_D)
    assert close(features.frames, features.patches.mean(1))


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_features_of_a_clip_are_the_features_of_its_chunks(num_samples: int, model: Model):
    samples_S = sound(num_samples)
    apart = model.features(chunks_of(samples_S), RATE_HZ)
    assert close(model.features(samples_S, RATE_HZ).patches, torch.cat([part.patches for part in apart]))


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_every_frame_of_a_clip_lies_in_one_step(num_samples: int, model: Model):
    features = model.features(sound(num_samples), RATE_HZ)
    steps = -(-fbank.num_frames(num_samples) // 16)
    assert features.patches.shape == (steps, 8, 32)
    assert features.frames.shape == (steps, 32)
    # A step sees 16 frames: 2,400 samples from the start of the first to the start of the last, and 400 of the last.
    np.testing.assert_allclose(features.times_s, (np.arange(steps) * 2560 + (2400 + 400) / 2) / RATE_HZ, rtol=1e-6)


@pytest.mark.parametrize(("layer", "patches_at_once"), [(0, 2048), (1, 2048), (3, 2048), (3, 100), (3, 1)])
def test_a_clip_has_the_same_features_whatever_is_beside_it(
    layer: int, patches_at_once: int, model: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inference_model, "PATCHES_AT_ONCE", patches_at_once)
    clips = [sound(num_samples, seed) for seed, num_samples in enumerate([*LENGTHS, 400, 2 * CHUNK, 9_999])]
    together = model.features(clips, RATE_HZ, layer)
    for clip, features in zip(clips, together, strict=True):
        alone = model.features(clip, RATE_HZ, layer)
        assert close(features.patches, alone.patches)
        assert close(features.utterance, alone.utterance)


@pytest.mark.parametrize("layer", range(4))
def test_any_layer_can_be_had_and_the_last_is_the_default(layer: int, model: Model):
    samples_S = sound(CHUNK)
    features = model.features(samples_S, RATE_HZ, layer)
    assert close(features.patches.flatten(0, 1), tokens_of(samples_S, model, layer)[1:])
    if layer == model.depth:
        assert torch.equal(features.patches, model.features(samples_S, RATE_HZ).patches)


def test_features_are_fp32_and_a_probe_can_be_trained_on_them(model: Model):
    features = model.features(sound(CHUNK), RATE_HZ)
    probe = torch.nn.Linear(32, 2)
    outputs = [features.patches, features.frames, features.utterance, model.encode_log_mel(torch.zeros(1, 16, 128))]
    for output in outputs:
        assert output.dtype == torch.float32
        probe(output).sum().backward()
    torch.nn.Linear(5, 2)(model.logits(sound(CHUNK), RATE_HZ)).sum().backward()


def test_students_and_teachers_are_different_networks(tmp_path: Path):
    folder = write_model(tmp_path / "pretrained", teacher=True, **pretraining())
    mel_BTM = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0))
    for weights, prefix in (("student", "encoder."), ("teacher", "")):
        model = asda.load(folder, weights=weights)
        stem = "model" if weights == "student" else "teacher"
        expected = Encoder(model.description.model)
        tensors = read_weights(folder, stem)
        expected.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        patches_BNP = golden.patchify(mel_BTM[:, None])
        assert close(model.encode_log_mel(mel_BTM), expected(patches_BNP))
        assert model.labels == ()


# ---- Audio


def test_all_ways_to_hold_the_same_audio_give_the_same(model: Model):
    samples_S = sound(CHUNK)
    float_S = samples_S.astype(np.float32) / 32768
    read_only_S = float_S.copy()
    read_only_S.flags.writeable = False
    ways = [
        torch.from_numpy(samples_S), float_S, float_S.astype(np.float64), torch.from_numpy(float_S), read_only_S,
        float_S[::-1].copy()[::-1], float_S.astype(">f4"), float_S[None], np.stack([float_S, float_S]),
        np.stack([samples_S, samples_S]), torch.from_numpy(float_S).requires_grad_(),
    ]  # fmt: skip
    expected = model.features(samples_S, RATE_HZ)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for audio in ways:
            for rate_hz in (RATE_HZ, float(RATE_HZ), np.int32(RATE_HZ)):
                assert torch.equal(model.features(audio, rate_hz).patches, expected.patches)


def test_channels_are_averaged(model: Model):
    first_S, second_S = (sound(CHUNK, seed) / 32768 for seed in (1, 2))
    apart = model.log_mel(np.stack([first_S, second_S]), RATE_HZ)
    assert torch.equal(apart, model.log_mel((first_S + second_S) / 2, RATE_HZ))


@pytest.mark.parametrize(("rate_hz", "channels"), [(192_000, 8), (44_100, 2), (8_000, 1)])
def test_other_rates_and_many_channels_sound_as_16_khz_mono_does(rate_hz: int, channels: int, model: Model):
    def tones(at_hz: int) -> np.ndarray:
        time_s = np.arange(at_hz) / at_hz
        return sum(0.1 * np.sin(2 * np.pi * hz * time_s) for hz in (220, 700, 1500, 2900))

    mel_TM = model.log_mel(np.stack([tones(rate_hz)] * channels), rate_hz)
    expected_TM = model.log_mel(tones(RATE_HZ), RATE_HZ)
    loud = (expected_TM > expected_TM.max() - 0.5)[5:-5]  # bins within 20 dB of the loudest; the ends ring
    assert loud.sum() > 100
    # torchaudio's filter has a ripple: of 0.031 dB at 2.9 kHz out of 8 kHz, the largest for these tones (an FFT of its
    # impulse response says so). That is 0.031 / 10 ln(10) in the log-mel; rounding adds at most 2e-3.
    assert float((mel_TM - expected_TM)[5:-5][loud].abs().max()) < (0.031 / 10 * np.log(10) + 2e-3) / (2 * STD)


def test_a_file_has_the_features_of_its_array_to_the_bit(model: Model, tmp_path: Path):
    samples_S = sound(CHUNK + 4_000)
    soundfile.write(tmp_path / "clip.wav", samples_S, RATE_HZ)
    ours = model.features(*read_wave(tmp_path / "clip.wav"))
    assert torch.equal(ours.patches, model.features(samples_S, RATE_HZ).patches)


# ---- Tags


def test_tags_are_the_most_probable_classes_in_order(model: Model):
    samples_S = sound(CHUNK)
    probabilities_C = model.logits(samples_S, RATE_HZ).sigmoid()
    tags = model.tags(samples_S, RATE_HZ, top=3)
    expected = sorted(zip(probabilities_C.tolist(), LABELS, strict=True), reverse=True)[:3]
    assert [(tag.probability, tag.label) for tag in tags] == expected
    assert len(model.tags(samples_S, RATE_HZ)) == len(LABELS)


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_a_long_clip_has_the_mean_of_its_chunks_probabilities_weighted_by_their_frames(loss: str, tmp_path: Path):
    model = asda.load(write_model(tmp_path / "weights", **classifying(loss=loss)))
    samples_S = sound(2 * CHUNK + 3_000)
    to_probabilities = {"bce": torch.sigmoid, "ce": lambda logits_C: logits_C.softmax(0)}[loss]
    chunks = chunks_of(samples_S)
    weights = torch.tensor([float(fbank.num_frames(len(chunk_S))) for chunk_S in chunks])
    chunk_logits = [logits_of_part(model, chunk_S) for chunk_S in chunks]
    expected_C = (weights / weights.sum()) @ torch.stack([to_probabilities(logits_C) for logits_C in chunk_logits])
    ours_C = to_probabilities(model.logits(samples_S, RATE_HZ))
    assert close(ours_C, expected_C)
    tags = {tag.label: tag.probability for tag in model.tags(samples_S, RATE_HZ)}
    assert [tags[label] for label in LABELS] == ours_C.tolist()


def test_a_window_that_holds_the_whole_clip_has_its_tags(model: Model):
    samples_S = sound(4_000)
    for window_s in (None, 0.5):
        timeline = model.timeline(samples_S, RATE_HZ, window_s)
        assert torch.equal(timeline.probabilities[0], model.logits(samples_S, RATE_HZ).sigmoid())


def test_certain_chunks_keep_their_log_odds(model: Model):
    """Sigmoids of 40 and -40 are 1 and 4e-18 in fp32; their clip's log-odds are still 40 and -40, exactly enough."""
    certain = [torch.full((5,), 40.0) * torch.tensor([1, 1, 1, -1, -1])] * 2
    merged_C = model._merge([(logits_C, 1) for logits_C in certain])
    torch.testing.assert_close(merged_C, certain[0], rtol=1e-6, atol=0)


@pytest.mark.launch
def test_tags_of_a_run_are_what_evaluation_computes(finetuned: Path, shards: Path):
    model = asda.load(finetuned, device="cpu")
    folder = resolve_checkpoint(finetuned)
    config, state = read_state(folder)
    assert (model.labels, model.chunk_s, model.hop_s) == (state.vocabulary, config.data.frames / 100, 0.16)
    classifier = Classifier(config.model, config.objective, len(state.vocabulary)).eval()
    classifier.load_state_dict(read_weights(folder, "model"))
    dataset = ClipDataset(f"{shards}:test", labelled=True)
    stream = evaluation_batches(dataset, config.data, batch=4, rank=0, world_size=1)
    compared = 0
    patches = make_patches(config, torch.device("cpu"), 4)
    with closing(stream.compose(patches).iterator()) as batches, torch.inference_mode():
        for patches_BNP, batch in batches:
            expected_BC = classifier(patches_BNP)
            seen = [clip.samples[: fbank.num_samples(config.data.frames)] for clip in batch.clips]
            # Evaluation looks at the first chunk of a clip. DALI multiplies by 1 / (2 std) where we divide: 1 bit.
            assert close(torch.stack(model.logits(seen, RATE_HZ)), expected_BC)
            compared += len(seen)
    assert compared == len(dataset)


@pytest.mark.launch
def test_a_run_folder_and_its_newest_checkpoint_are_the_same_model(pretrained: Path):
    samples_S = sound(CHUNK)
    for weights in ("student", "teacher"):
        run, folder = (
            asda.load(path, weights=weights, device="cpu") for path in (pretrained, resolve_checkpoint(pretrained))
        )
        assert torch.equal(run.features(samples_S, RATE_HZ).patches, folder.features(samples_S, RATE_HZ).patches)


# ---- Timelines


@pytest.mark.parametrize(
    ("window_s", "hop_s", "window", "hop"), [(None, None, 64, 64), (0.3, 0.1, 30, 10), (0.5, None, 50, 50)]
)
def test_a_window_is_heard_by_itself_and_filled_up_to_a_whole_patch_only(
    window_s, hop_s, window: int, hop: int, model: Model
):
    samples_S = sound(2 * CHUNK + 3_000)
    timeline = model.timeline(samples_S, RATE_HZ, window_s, hop_s)
    num_frames = fbank.num_frames(len(samples_S))
    starts = [start for start in range(0, num_frames, hop) if start == 0 or start + window - hop < num_frames]
    ends = [min(start + window, num_frames) for start in starts]
    torch.testing.assert_close(timeline.starts_s, torch.tensor(starts).double() / 100)
    torch.testing.assert_close(timeline.ends_s, torch.tensor(ends).double() / 100)
    stretches = [samples_S[160 * start : 160 * (start + window - 1) + 400] for start in starts]
    expected_WC = torch.stack([logits_of_part(model, stretch_S) for stretch_S in stretches]).sigmoid()
    assert close(timeline.probabilities, expected_WC)


def test_a_clip_shorter_than_a_window_has_one(model: Model):
    timeline = model.timeline(sound(400), RATE_HZ, 0.5, 0.1)
    assert timeline.starts_s.tolist() == [0]
    assert timeline.ends_s.tolist() == pytest.approx([0.01])


# ---- Mistakes


def broken(samples: list[float], at: int, value: float) -> np.ndarray:
    audio = np.array(samples, np.float32)
    audio[at] = value
    return audio


@pytest.mark.parametrize(
    ("audio", "sentence"),
    [
        (broken([0.1] * 500, 7, np.nan), "audio holds samples that are not finite"),
        (broken([0.1] * 500, 7, -np.inf), "audio holds samples that are not finite"),
        (np.array([[0.1, np.inf] * 250, [0.1, -np.inf] * 250]), "audio holds samples that are not finite"),
        (np.full(500, 1e300), "audio holds samples that are not finite"),
        (np.zeros(0, np.float32), "audio has shape (0,) and holds no samples"),
        (np.zeros((2, 0), np.float32), "audio has shape (2, 0) and holds no samples"),
        (np.zeros(399), "audio has 399 samples at 16 kHz; the shortest clip has 400 (0.025 s)"),
        (np.zeros((1, 2, 500)), "audio has shape (1, 2, 500); give [S] or [channels, S]"),
        (np.float32(0.5), "audio is a float32; give a path, or an array or a tensor, [S] or [channels, S]"),
        (np.zeros((500, 2)), "audio has shape (500, 2), which looks like [S, channels]; give [channels, S]"),
        (np.zeros((65, 500)), "audio has shape (65, 500), which looks like [S, channels]; give [channels, S]"),
        (np.zeros(500, np.int32), "audio is of int32; give floats with full scale 1, or int16"),
        (torch.zeros(500, dtype=torch.complex64), "audio is of complex64; give floats with full scale 1, or int16"),
        (np.full(500, 3000.0), "audio reaches 3000 where full scale is 1; divide it, or give integers as int16"),
        ("clip.wav", "clip.wav: a file knows its own rate; leave sample_rate_hz out"),
        ([np.zeros(500), np.zeros(3)], "audio[1] has 3 samples at 16 kHz; the shortest clip has 400 (0.025 s)"),
        ([0.1, 0.2], "audio[0] is a float; give a path, or an array or a tensor, [S] or [channels, S]"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_audio_that_is_none_is_refused_in_one_sentence(audio, sentence: str, model: Model):
    for function in (model.features, model.tags):
        with pytest.raises(UserError) as error:
            function(audio, RATE_HZ)
        assert str(error.value) == sentence


@pytest.mark.parametrize("rate", [0, 999, 768_001, 44_100.5, float("nan"), float("inf"), "16000", True, 1j])
def test_a_rate_that_is_none_is_refused(rate, model: Model):
    with pytest.raises(UserError) as error:
        model.features(np.zeros(500), rate)
    assert str(error.value) == f"sample_rate_hz {rate!r} must be a whole number from 1000 to 768000"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.features(sound(400), RATE_HZ, 4), "layer 4 must be a whole number from 0, .* to 3, "),
        (lambda m: m.features(sound(400), RATE_HZ, -1), "layer -1 must be"),
        (lambda m: m.encode_log_mel(torch.zeros(1, 16, 128), 1.0), "layer 1.0 must be"),
        (lambda m: m.tags(sound(400), RATE_HZ, 0), "top 0 must be a whole number, 1 or more"),
        (lambda m: m.timeline(sound(400), RATE_HZ, 0.65), "window_s 0.65 must be from 0.01 to 0.64"),
        (lambda m: m.timeline(sound(400), RATE_HZ, 0.5, 0.6), "hop_s 0.6 must be from 0.01 to 0.5"),
        (lambda m: m.timeline(sound(400), RATE_HZ, 0.5, 0.0), "hop_s 0.0 must be"),
        (lambda m: m.timeline(sound(400), RATE_HZ, float("nan")), "window_s nan must be"),
        (lambda m: m.encode_log_mel(torch.zeros(16, 128)), r"the log-mel has shape \(16, 128\); give \[clips"),
        (lambda m: m.encode_log_mel(torch.zeros(1, 16, 64)), "the log-mel has shape"),
        (lambda m: m.encode_log_mel(torch.zeros(1, 20, 128)), "has 20 frames; give a multiple of a patch's 16, and at"),
        (lambda m: m.logits_of_log_mel(torch.zeros(1, 1040, 128)), "has 1040 frames; .* at most 1024"),
    ],
)
def test_an_argument_out_of_bounds_is_refused(call, sentence: str, model: Model):
    with pytest.raises(UserError, match=sentence):
        call(model)


def test_a_model_without_a_classifier_has_features_and_says_that_it_has_no_tags(tmp_path: Path):
    model = asda.load(write_model(tmp_path / "pretrained", **pretraining()))
    assert model.features([], RATE_HZ) == []
    assert model.features(sound(400), RATE_HZ).utterance.shape == (32,)
    calls = [
        model.tags,
        model.logits,
        model.timeline,
        lambda audio, _: model.logits_of_log_mel(torch.zeros(1, 16, 128)),
    ]
    for call in calls:
        with pytest.raises(UserError, match="has no classifier, only features"):
            call(sound(400), RATE_HZ)


def refusal(path: Path, **arguments: str) -> str:
    with pytest.raises(UserError) as error:
        asda.load(path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path: Path):
    tagger = write_model(tmp_path / "tagger")
    student = write_model(tmp_path / "student", **pretraining())
    assert "there is no checkpoint in" in refusal(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "there is no checkpoint in" in refusal(tmp_path / "empty")
    assert "has no teacher, which only pre-training keeps" in refusal(tagger, weights="teacher")
    assert "has no teacher, which only pre-training keeps" in refusal(student, weights="teacher")
    assert refusal(tagger, weights="ema") == "weights 'ema' must be 'student' or 'teacher'"
    assert refusal(tagger, device="gpu") == "device 'gpu' must be 'auto', 'cpu' or 'cuda'"
    if not torch.cuda.is_available():
        assert "has no CUDA device" in refusal(tagger, device="cuda")


def test_a_classifier_whose_classes_have_no_names_is_refused(tmp_path: Path):
    folder = write_model(tmp_path / "weights")
    (folder / "manifest.json").unlink()
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"labels": []}))
    assert refusal(folder).endswith("names no labels; name the classes there in the order of the logits")


def test_weights_of_another_size_are_named(tmp_path: Path):
    folder = write_model(tmp_path / "weights")
    weights = read_weights(folder, "model")
    weights["head.weight"] = torch.zeros(7, 32)
    del weights["norm.bias"]
    (folder / "manifest.json").unlink()
    save_file(weights, folder / "model.safetensors")
    sentence = refusal(folder)
    assert "do not fit its config.json: " in sentence
    assert "norm.bias [32] is missing" in sentence
    assert "head.weight [7, 32] should be [5, 32]" in sentence


# ---- Memory and imports


def run_python(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=240
    )
    return done.stdout


# VmHWM is the peak of this process alone; getrusage's would begin with that of the process that started it.
PEAK = """
import re, sys, numpy as np, asda
folder, seconds, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = asda.load(folder, device="cpu")
audio = np.random.default_rng(0).integers(-9000, 9000, seconds * 32000, np.int16)
getattr(model, what)(audio, 32000)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("what", ["features", "tags"])
def test_ten_minutes_take_little_more_memory_than_one(what: str, tmp_path: Path):
    sizes = {"width": 96, "depth": 2, "heads": 4}
    folder = write_model(
        tmp_path / "weights", model=sizes, data={"frames": 1024, "log_mel": {"mean": MEAN, "std": STD}}
    )
    one, ten = (1024 * int(run_python(PEAK, folder, seconds, what)) for seconds in (60, 600))
    assert ten < 2 * one
    # Beyond that: 9 minutes of int16 and float32 at 32 kHz (104 MB) and float32 at 16 kHz (35 MB), and of features
    # twice, in parts and joined (2 x 10 MB); a little more for the allocator.
    assert ten - one < 200e6


def test_importing_asda_does_not_import_torch():
    assert run_python("import sys, asda; asda.load; print('torch' in sys.modules)") == "False\n"
