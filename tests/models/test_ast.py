"""AST against the one of Hugging Face's transformers: tokens, logits, every layer, gradients; and its positions."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conversion import convert
from launching import ROOT
from overfitting import losses_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification
from transformers.utils import logging

import asda
from asda.checkpoint.read import read_description
from asda.checkpoint.weights import read_weights
from asda.config.model import AstConfig, ClassifyConfig
from asda.config.run import Config, load_config
from asda.data.features.fbank import log_mel_of_wave
from asda.errors import UserError
from asda.models.ast import fitted_positions
from asda.models.classifier import Classifier, lr_scales
from asda.models.costs import network_costs
from asda.objectives import make_objective
from asda.official.fairseq import Wishes
from asda.official.huggingface_ast import from_hugging_face

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

CONFIG = ROOT / "configs" / "esc50_ast.json"
LAYER = "audio_spectrogram_transformer.encoder.layer."
CLASSES = 5
FRAMES = 208  # 20 time patches of 16 frames, 10 apart
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
# What fp32 can be apart: an output of the last norm is at most sqrt(48) = 7, the sums before it have up to 256 terms in
# any order, each rounded by 2^-24, and about 20 such sums follow each other: 7 x sqrt(256 x 20) x 2^-24 = 3e-5 if they
# all pointed one way, and a third of it as random signs have it. fp64 below shows that it is rounding and nothing else.
FP32 = 1e-5
FP64 = 1e-12  # the same sum with 2^-53 is 6e-14; tables of the two programs are equal to the bit


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Without a bar for each saved file."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def theirs(seed: int = 0, classes: int = CLASSES, **changes: object) -> ASTForAudioClassification:
    """A network of Hugging Face with random values in every parameter, norms, biases and positions too.

    With torch's fused attention, because its own computes the softmax in fp32 even where everything else is fp64.
    """
    torch.manual_seed(seed)
    config = ASTConfig(
        **(SIZES | {"max_length": FRAMES, "num_labels": classes, "attn_implementation": "sdpa"} | changes)
    )
    network = ASTForAudioClassification(config).eval()
    for name, parameter in network.named_parameters():
        is_weight_of_norm = "layernorm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(is_weight_of_norm), std=0.2)
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as Hugging Face saves it, in hf/, and as the tool converts it, in ours/."""
    folder = tmp_path_factory.mktemp("ast")
    theirs().save_pretrained(folder / "hf")
    done = convert(folder / "hf", "--out", folder / "ours", "--mean", -4.25, "--std", 4.5)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ours(folders: Path) -> Classifier:
    return classifier_of(folders / "ours")


def published(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors under the names of published files, which transformers gives other names in memory."""
    names = {
        r"layers\.": "encoder.layer.",
        r"attention\.o_proj\.": "attention.output.dense.",
        r"attention\.([qkv])_proj\.": r"attention.attention.\1.",
        r"attention\.q\.": "attention.query.",
        r"attention\.k\.": "attention.key.",
        r"attention\.v\.": "attention.value.",
        r"mlp\.fc1\.": "intermediate.dense.",
        r"mlp\.fc2\.": "output.dense.",
    }
    found = {}
    for name, tensor in tensors.items():
        assert tensor is not None, name
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def classifier_of(folder: Path) -> Classifier:
    description = read_description(folder)
    assert isinstance(description.objective, ClassifyConfig)
    classifier = Classifier(description.model, description.objective, len(description.labels)).eval()
    classifier.load_state_dict(read_weights(folder, "model"))
    return classifier


def mels(frames: int = FRAMES) -> Tensor:
    """Two spectrograms [2, frames, mel bins] of normalised values."""
    return torch.randn(2, frames, 128, generator=torch.Generator().manual_seed(3)) / 2


def patches_of(mel_BTM: Tensor) -> Tensor:
    return golden.patchify(mel_BTM[:, None])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.float64, FP64)])
def test_tokens_and_logits_are_those_of_hugging_face(dtype: torch.dtype, tolerance: float, folders: Path):
    reference, classifier = theirs().to(dtype), classifier_of(folders / "ours").to(dtype)
    mel_BTM = mels().to(dtype)
    expected = reference.audio_spectrogram_transformer(mel_BTM)
    tokens_BSD = classifier.encoder(patches_of(mel_BTM))
    assert tokens_BSD.shape == (2, 2 + 20 * 12, 48)
    assert (tokens_BSD - expected.last_hidden_state).abs().max() <= tolerance
    assert (tokens_BSD[:, :2].mean(1) - expected.pooler_output).abs().max() <= tolerance
    logits_BC = classifier(patches_of(mel_BTM))  # fp32 at the end
    assert (logits_BC - reference(mel_BTM).logits).abs().max() <= max(tolerance, 2 * 2**-24 * logits_BC.abs().max())


@torch.no_grad()
def test_every_layer_is_that_of_hugging_face(folders: Path, ours: Classifier):
    hidden = theirs().audio_spectrogram_transformer(mels(), output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    for depth, expected_BSD in enumerate(hidden[:-1]):
        found_BSD = ours.encoder(patches_of(mels()), depth=depth)
        torch.testing.assert_close(found_BSD, expected_BSD, rtol=FP32, atol=FP32)


def test_every_gradient_is_that_of_hugging_face(folders: Path, ours: Classifier):
    reference, targets_BC = theirs().double(), torch.rand(2, CLASSES).double()
    classifier = classifier_of(folders / "ours").double()
    for logits_BC in (reference(mels().double()).logits, classifier(patches_of(mels()).double()).double()):
        torch.nn.functional.binary_cross_entropy_with_logits(logits_BC, targets_BC).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    config = json.loads((folders / "hf" / "config.json").read_text())
    expected = from_hugging_face(published(gradients), config, {}, Wishes(), "gradients").weights["model"]
    found = {name: parameter.grad for name, parameter in classifier.named_parameters()}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        # Both sides pass through fp32 once (our logits, their conversion): 2^-24 of the largest, a few times over.
        theirs_is = gradient.double()
        assert found[name] is not None, name
        assert (found[name] - theirs_is).abs().max() <= 4 * 2**-24 * theirs_is.abs().max().clamp(min=1e-3), name


@torch.no_grad()
def test_a_loaded_ast_tags_and_has_features_of_any_clip(folders: Path):
    model = asda.load(folders / "ours")
    found_BC = model.logits_of_log_mel(mels())
    torch.testing.assert_close(found_BC, theirs()(mels()).logits, rtol=FP32, atol=FP32)
    # 3.5 s are a chunk of 208 frames (2.08 s) and one of 140 frames (348 in all), filled up to 208
    wave_S = torch.randn(56_000, generator=torch.Generator().manual_seed(1)) / 10
    features = model.features(wave_S, 16_000)
    assert features.patches.shape == model.features_shape(wave_S, 16_000) == (20 + 14, 12, 48)
    assert model.features_shape(wave_S[:33_520], 16_000) == (20, 12, 48)
    assert model.features_shape(torch.zeros(66_720), 16_000)[0] == 20 + 20  # 415 frames
    assert model.hop_s == 0.1
    steps_s = features.times_s.diff()
    expected_s = torch.full((33,), 0.1)
    expected_s[19] = 2.08 - 1.9  # from the last patch of a chunk to the first of the next
    torch.testing.assert_close(steps_s, expected_s, rtol=0, atol=1e-6)
    assert [len(tag.label) > 0 for tag in model.tags(wave_S, 16_000, top=3)] == [True] * 3
    first = model.features(wave_S[: 16_000 * 2 + 1_520], 16_000)  # exactly the first chunk
    torch.testing.assert_close(first.patches, features.patches[:20], rtol=FP32, atol=FP32)
    hidden_BSD = theirs().audio_spectrogram_transformer(model.log_mel(wave_S[:33_520], 16_000)[None]).last_hidden_state
    by_time_TFD = hidden_BSD[0, 2:].unflatten(0, (12, 20)).transpose(0, 1)
    torch.testing.assert_close(first.patches, by_time_TFD, rtol=FP32, atol=FP32)
    torch.testing.assert_close(first.utterance, hidden_BSD[0, :2].mean(0), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("size", [208, 200, 192, 64])
def test_a_log_mel_of_another_length_is_refused(size: int, folders: Path):
    model = asda.load(folders / "ours")
    if size == FRAMES:
        assert model.encode_log_mel(mels(size)).shape == (2, 242, 48)
    else:
        with pytest.raises(UserError, match=f"has {size} frames; this AST takes exactly 208"):
            model.encode_log_mel(mels(size))


# ---- the converter


def copied(folders: Path, folder: Path, config: dict[str, object] | None = None) -> Path:
    """The network as Hugging Face saves it, with other values in config.json."""
    shutil.copytree(folders / "hf", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return folder


def test_labels_sizes_statistics_and_the_loss_come_from_the_files_beside_the_weights(folders: Path, tmp_path: Path):
    names = {str(number): name for number, name in enumerate(["dog", "cat", "rain", "wind", "siren"])}
    changes = {"id2label": names, "problem_type": "multi_label_classification", "layer_norm_eps": 1e-6}
    copied(folders, tmp_path / "hf", changes)
    statistics = {"mean": -6.5, "std": 5.25, "max_length": FRAMES}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(statistics))
    printed = convert(tmp_path / "hf", "--out", tmp_path / "ours").stdout
    assert "AST, fine-tuned" in printed
    assert "note" not in printed, "nothing is assumed"
    description = read_description(tmp_path / "ours")
    assert description.labels == ("dog", "cat", "rain", "wind", "siren")
    assert (description.data.frames, description.data.log_mel.mean, description.data.log_mel.std) == (
        FRAMES,
        -6.5,
        5.25,
    )
    model, objective = description.model, description.objective
    assert isinstance(model, AstConfig)
    assert (model.width, model.depth, model.heads, model.mlp_ratio, model.norm_eps) == (48, 2, 3, 4.0, 1e-6)
    assert isinstance(objective, ClassifyConfig)
    assert objective.loss == "bce"


def test_without_a_config_everything_assumed_is_said_and_the_weights_are_the_same(folders: Path, tmp_path: Path):
    shutil.copy(folders / "hf" / "model.safetensors", tmp_path / "model.safetensors")
    printed = convert(tmp_path / "model.safetensors", "--out", tmp_path / "ours", "--heads", 3).stdout
    assert "cross-entropy is assumed" in printed
    assert "log-mel mean -4.2677393 and std 4.5689974 are assumed" in printed
    assert 'are called "class 0"' in printed
    for name, tensor in read_weights(folders / "ours", "model").items():
        assert torch.equal(read_weights(tmp_path / "ours", "model")[name], tensor)
    assert read_description(tmp_path / "ours").data.frames == FRAMES


def test_heads_that_no_config_tells_are_assumed_and_it_is_said(folders: Path, tmp_path: Path):
    hf = copied(folders, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    del config["num_attention_heads"]
    (hf / "config.json").write_text(json.dumps(config))
    printed = convert(hf, "--out", tmp_path / "ours").stdout
    assert "heads of 64 features are assumed, no config.json says num_attention_heads (--heads)" in printed
    assert read_description(tmp_path / "ours").model.heads == 1


def test_a_preset_is_refused_where_the_network_has_no_lambda(folders: Path, tmp_path: Path):
    done = convert(folders / "hf", "--out", tmp_path / "ours", "--preset", "paper")
    assert done.returncode == 2
    assert "--preset paper is for an ASDA, whose lambda no file tells, and hf is a network of preset ast" in done.stderr
    assert not (tmp_path / "ours").exists()


def test_a_pickled_file_and_a_network_without_a_classifier_are_read_too(folders: Path, tmp_path: Path):
    network = theirs().audio_spectrogram_transformer
    network.save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    printed = convert(tmp_path / "hf", "--out", tmp_path / "ours").stdout
    assert "it has no classifier: good for features and fine-tuning" in printed
    model = asda.load(tmp_path / "ours")
    with torch.no_grad():
        expected_BSD = network(mels()).last_hidden_state
    torch.testing.assert_close(model.encode_log_mel(mels()), expected_BSD, rtol=FP32, atol=FP32)
    objective = make_objective(tiny(f"objective.init_from={tmp_path / 'ours'}"), ("a", "b"), torch.device("cpu"))
    assert torch.equal(objective.module.encoder.state_dict()["positions"], network.embeddings.position_embeddings[0])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"hidden_act": "relu"}, "was made with hidden_act relu; asda's AST has gelu"),
        ({"num_mel_bins": 64}, "was made with num_mel_bins 64; asda's AST has 128"),
        ({"qkv_bias": False}, "was made with qkv_bias False; asda's AST has True"),
        ({"max_length": 1024}, "embeddings.position_embeddings [1, 242, 48] should be [1, 1214, 48]"),
        ({"max_length": 200}, "model.frames 200 must be a multiple of model.patch 16"),
        ({"num_attention_heads": 5}, "model.width 48 must be a multiple of model.heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 in the config.json of hf must be a whole number"),
        ({"num_attention_heads": "3"}, 'num_attention_heads "3" in the config.json of hf must be a whole number'),
        ({"num_attention_heads": 3.0}, "num_attention_heads 3.0 in the config.json of hf must be a whole number"),
        ({"time_stride": True}, "time_stride true in the config.json of hf must be a whole number"),
        ({"max_length": None}, "max_length null in the config.json of hf must be a whole number"),
        ({"layer_norm_eps": "small"}, "(model.norm_eps: Input should be a valid number)"),
    ],
)
def test_an_ast_that_ours_is_not_is_one_sentence(
    config: dict[str, object], sentence: str, folders: Path, tmp_path: Path
):
    done = convert(copied(folders, tmp_path / "hf", config), "--out", tmp_path / "ours")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("classifier.dense.bias"), "classifier.dense.bias [5] is missing"),
        (lambda s: s.pop(f"{LAYER}1.output.dense.bias"), "encoder.layer.1.output.dense.bias [48] is missing"),
        (lambda s: s.pop(f"{LAYER}0.intermediate.dense.weight"), "layer.0.intermediate.dense.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra [1] is unexpected"),
        (lambda s: s["classifier.dense.bias"].fill_(torch.nan), "are not finite numbers; the checkpoint is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], sentence: str, folders: Path, tmp_path: Path
):
    copied(folders, tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "hf" / "model.safetensors")
    done = convert(tmp_path / "hf", "--out", tmp_path / "ours")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "ours").exists()


def test_an_ast_is_not_written_in_the_layout_of_eat(folders: Path, tmp_path: Path):
    done = convert(folders / "ours", "--to", "official", "--out", tmp_path / "ast.pt")
    assert done.returncode == 2
    assert "the official layout is that of EAT and ASDA, and this model is an AST" in done.stderr


# ---- positions


def test_a_shorter_clip_takes_the_middle_of_the_table_as_ast_does():
    table_SD = torch.randn(2 + 12 * 101, 8)
    for time in (100, 50, 12, 1):
        first = int(101 / 2) - int(time / 2)
        expected_FTD = table_SD[2:].view(12, 101, 8)[:, first : first + time]
        found_SD = fitted_positions(table_SD, (101, 12), (time, 12))
        assert torch.equal(found_SD[:2], table_SD[:2])
        assert torch.equal(found_SD[2:], expected_FTD.reshape(-1, 8))


def test_a_longer_clip_stretches_the_table_linearly():
    table_SD = torch.randn(2 + 3 * 10, 4).double()
    found_SD = fitted_positions(table_SD, (10, 3), (25, 3))
    places = (np.arange(25) + 0.5) * 10 / 25 - 0.5  # centres of the new steps among the old ones
    for band in range(3):
        for feature in range(4):
            row_T = table_SD[2:].view(3, 10, 4)[band, :, feature].numpy()
            expected_T = np.interp(places, np.arange(10), row_T)
            found_T = found_SD[2:].view(3, 25, 4)[band, :, feature].numpy()
            assert np.abs(found_T - expected_T).max() <= 1e-12  # places up to 10, rounded with 2^-53, times slopes


def test_fine_tuning_starts_from_a_converted_ast_of_another_length(folders: Path, ours: Classifier):
    config = tiny(f"objective.init_from={folders / 'ours'}", "data.frames=128")
    objective = make_objective(config, ("a", "b"), torch.device("cpu"))
    weights, started = ours.encoder.state_dict(), objective.module.encoder.state_dict()
    expected_SD = fitted_positions(weights.pop("positions"), (20, 12), (12, 12))
    assert torch.equal(started.pop("positions"), expected_SD)
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def test_a_checkpoint_of_another_architecture_is_one_sentence(folders: Path):
    config = load_config(ROOT / "configs" / "demo_finetune.json", [f"objective.init_from={folders / 'ours'}"])
    with pytest.raises(UserError, match=r"was trained with model\.architecture ast, this run has asda"):
        make_objective(config, ("a", "b"), torch.device("cpu"))


# ---- the network in training


def tiny(*overrides: str) -> Config:
    sizes = [f"model.{key}={value}" for key, value in {"width": 48, "depth": 2, "heads": 3}.items()]
    return load_config(CONFIG, [*sizes, "objective.init_from=", "data.frames=208", *overrides])


def network(*overrides: str, classes: int = CLASSES) -> Classifier:
    config = tiny(*overrides)
    assert isinstance(config.objective, ClassifyConfig)
    torch.manual_seed(1)
    return Classifier(config.model, config.objective, classes)


def test_ast_base_has_the_published_number_of_parameters():
    config = load_config(CONFIG, ["data.frames=1024"])
    with torch.device("meta"):
        theirs_has = sum(p.numel() for p in ASTForAudioClassification(ASTConfig(num_labels=50)).parameters())
    parameters = network_costs(config.model, config.objective, 1024, 50).parameters
    assert sum(parameters.values()) == theirs_has


def test_the_arithmetic_is_the_closed_form():
    config, width, tokens = tiny(), 48, 2 + 12 * 20
    block = 2 * tokens * (12 * width * width + 2 * tokens * width)
    embedding = 2 * 240 * 256 * width
    head = 2 * width * CLASSES
    # A backward costs two forwards, but for the embedding, whose input has no gradient.
    expected = 3 * (2 * block + head) + 2 * embedding
    assert sum(network_costs(config.model, config.objective, 208, CLASSES).flops.values()) == expected


def test_one_batch_is_learned_by_heart():
    classifier, patches_BNP = network("data.frames=64"), patches_of(torch.randn(5, 64, 128))
    assert losses_of(classifier, patches_BNP)[-1] < 0.05  # from log(5) = 1.6


def test_recomputed_blocks_give_the_same_gradients():
    kept, again = network(), network()
    again.set_recompute(True)
    for classifier in (kept, again):
        classifier(patches_of(mels())).square().sum().backward()
    for (name, one), (_, other) in zip(kept.named_parameters(), again.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name


def test_layer_decay_scales_blocks_and_drop_path_acts_in_training():
    scales = lr_scales(network(), 0.5)
    assert scales["encoder.blocks.0.attn.v.weight"] == 0.25
    assert scales["encoder.blocks.1.norm1.weight"] == 0.5
    assert scales["encoder.positions"] == scales["encoder.norm.weight"] == scales["head.weight"] == 1
    classifier = network("objective.drop_path=0.9").train()
    patches_BNP = patches_of(mels())
    assert not torch.equal(classifier(patches_BNP), classifier(patches_BNP))
    assert torch.equal(classifier.eval()(patches_BNP), classifier(patches_BNP))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.padding=masked"], "data.padding masked is for model.architecture asda"),
        (["model.frames=128"], "data.frames 208 must equal model.frames 128"),
        (
            ["model.attention_lambda=0.1"],
            "unknown key model.attention_lambda; it belongs to another model.architecture",
        ),
        (["model.architecture=vit"], "model.architecture is 'vit'; it must be one of 'asda', 'ast'"),
        (["model.heads=5"], "model.width 48 must be a multiple of model.heads 5"),
        (["model.conformer.heads=5"], "model.width 48 must be a multiple of model.conformer.heads 5"),
        (["model.conformer.kernel=30"], "model.conformer.kernel 30 must be odd"),
        (
            ["model.channel_attention.enabled=true", "model.channel_attention.reduction=49"],
            "model.channel_attention.reduction 49 must not exceed model.width 48",
        ),
        (["model.time_strid=10"], "unknown key model.time_strid; did you mean model.time_stride?"),
    ],
)
def test_what_ast_cannot_be_is_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(UserError) as caught:
        tiny(*overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ast_is_not_pre_trained_here():
    with pytest.raises(UserError, match=r"model\.architecture ast is for objective\.kind classify"):
        load_config(ROOT / "configs" / "as2m.json", ["preset=ast"])


def test_the_mean_of_the_wave_is_all_that_the_front_ends_differ_in():
    """ASTFeatureExtractor keeps the wave's mean, AST's own code and ours remove it; Kaldi removes each frame's."""
    wave_S = torch.randn(16_000, generator=torch.Generator().manual_seed(5)) / 20 + 0.01
    extractor = ASTFeatureExtractor(mean=-4.25, std=4.5, max_length=112)
    (expected_TM,) = extractor(wave_S.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    found_TM = (log_mel_of_wave(wave_S) + 4.25) / 9
    # log-mel is within 2e-3 of torchaudio's (test_fbank.py); normalising divides it by 9.
    assert (expected_TM[:98] - found_TM).abs().max() <= 2e-3 / 9
    torch.testing.assert_close(expected_TM[98:], torch.full((14, 128), 4.25 / 9), rtol=1e-6, atol=0)
