"""The measure of irrelevant context against weights whose share is known, and the tool that prints it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import stats
from tiny_tools import INPUT, TINY, noise, one_core, run, write_pretrained, write_tagger

from asda.checkpoint.weights import read_weights
from asda.config.model import ClassifyConfig, ModelConfig
from asda.config.run import Description
from asda.data.audio.waves import INT16_SCALE
from asda.data.clips import Clip
from asda.data.features.fbank import log_mel
from asda.data.order import Draw
from asda.errors import UserError
from asda.evaluation import attention as measured
from asda.evaluation.attention import (
    ABSOLUTE,
    FIRST,
    ONLY,
    RESAMPLES,
    SECOND,
    SIGNED,
    Mixture,
    Network,
    load_network,
    make_mixtures,
    mean_estimate,
    measure,
    named_maps,
    net_relative_share,
    ratio_estimate,
    relative_share,
)
from asda.models.attention import Attention, differential_attention
from asda.models.encoder import Encoder

pytestmark = pytest.mark.usefixtures(one_core.__name__)
ROUNDING = 1e-12  # of sums of at most some hundred fp64 numbers near 1: a hundred roundings of 1e-16 are far below it
FRAMES = 128


def clip(number: int, *labels: int, seconds: float = 2.0) -> Clip:
    return Clip(Draw(0, number), number, f"clip{number}", noise(seconds, seed=number), labels)


def network(attention_lambda: float | str = 0.1) -> Network:
    torch.manual_seed(0)
    model = TINY.model_copy(update={"attention_lambda": attention_lambda})
    objective = ClassifyConfig(kind="classify", init_from="", loss="ce")
    return Network(Encoder(model).eval(), Description(objective=objective, data=INPUT, model=model))


def halves(num_patches: int) -> torch.Tensor:
    return torch.arange(num_patches) < num_patches // 2


@pytest.mark.parametrize("share", [relative_share, net_relative_share])
def test_uniform_weights_are_exactly_one(share):
    assert share(torch.full((3, 8, 64), 1 / 64, dtype=torch.float64), halves(64)) == 1.0
    few_N = torch.arange(64) < 4
    assert share(torch.full((3, 8, 64), 1 / 64, dtype=torch.float64), few_N) == 1.0


def test_weights_made_by_hand_have_the_share_they_were_given():
    # Head 0: queries give 10 % and 30 % to the irrelevant half; head 1: 50 % and 90 %. Each row adds up to another sum,
    # as where a part goes to CLS.
    given_HQ = torch.tensor([[0.1, 0.3], [0.5, 0.9]], dtype=torch.float64)
    weights_HQN = torch.cat(
        [given_HQ[..., None].expand(2, 2, 5) / 5, (1 - given_HQ)[..., None].expand(2, 2, 5) / 5], -1
    )
    weights_HQN = weights_HQN * torch.tensor([[0.2, 1.0], [0.7, 0.4]])[..., None]
    assert relative_share(weights_HQN, halves(10)) == pytest.approx(0.45 / 0.5, abs=ROUNDING)
    assert relative_share(weights_HQN, ~halves(10)) == pytest.approx(0.55 / 0.5, abs=ROUNDING)


def test_all_of_the_weight_on_the_irrelevant_half_is_two_and_none_is_zero():
    weights_HQN = halves(16).double().expand(2, 4, 16)
    assert relative_share(weights_HQN, halves(16)) == 2.0
    assert relative_share(weights_HQN, ~halves(16)) == 0.0


def test_signed_weights_may_be_negative_and_cancel_out():
    row_N = torch.tensor([-0.1, -0.1, 0.5, 0.5], dtype=torch.float64)  # -0.2 of 0.8 on the first half
    assert net_relative_share(row_N.expand(2, 3, 4), halves(4)) == pytest.approx(-0.25 / 0.5, abs=ROUNDING)
    assert np.isnan(net_relative_share(torch.tensor([[[1.0, -1.0]]]), halves(2)))


@pytest.mark.parametrize("lam", [0.1, "learned"])
def test_the_difference_is_what_mixes_the_values(lam):
    torch.manual_seed(3)
    attention = Attention(ModelConfig(width=16, depth=1, heads=2, attention_lambda=lam), 2)
    tokens_1KD = torch.randn(1, 9, 16)
    with torch.inference_mode():
        q, k = attention._queries_and_keys(tokens_1KD)
        (q1, q2), (k1, k2) = q.chunk(2, dim=1), k.chunk(2, dim=1)
        values_1HKK = torch.eye(9).expand(1, 2, 9, 9)  # of which a map's rows are the mixtures
        expected = differential_attention(q1, k1, q2, k2, values_1HKK, attention.current_lambda())[0]
        maps = named_maps(attention, tokens_1KD)
    tolerance = 4 * torch.finfo(torch.float32).eps  # fp32 here, and there a softmax in fp32: values are at most 1
    assert (maps[SIGNED] - expected).abs().max() < tolerance
    assert (maps[ABSOLUTE] - expected.abs()).abs().max() < tolerance
    assert (maps[FIRST].sum(-1) - 1).abs().max() < 9 * tolerance
    assert list(maps) == [FIRST, SECOND, ABSOLUTE, SIGNED]


@pytest.mark.parametrize(("lam", "maps"), [(0.1, [FIRST, SECOND, ABSOLUTE, SIGNED]), ("absent", [ONLY])])
@pytest.mark.parametrize("query", ["patches", "cls"])
def test_a_network_that_attends_evenly_is_one_in_every_block_and_map(lam, maps, query):
    even = network(lam)
    for block in even.encoder.blocks:
        torch.nn.init.zeros_(block.get_submodule("attn.qk").weight)
        torch.nn.init.zeros_(block.get_submodule("attn.qk").bias)
    (mixture, *_) = make_mixtures([clip(0, 0), clip(1, 1)], [even], "clip", seed=0)
    shares = measure(even, [mixture], query)
    assert list(shares) == maps
    assert all(values.shape == (TINY.depth, 2, 1) for values in shares.values())
    assert all(np.abs(values - 1).max() < ROUNDING for values in shares.values())


@pytest.mark.parametrize(("replaced_first", "expected"), [(True, 2.0), (False, 0.0)])
def test_frames_of_the_first_half_are_the_first_half_of_the_patches(monkeypatch, replaced_first, expected):
    def on_early_frames(attention, tokens_1KD):
        early_K = torch.arange(tokens_1KD.shape[1] - 1) // (TINY.mel_bins // TINY.patch) < FRAMES // TINY.patch // 2
        row_K = torch.cat([torch.tensor([False]), early_K]).double()
        return {ONLY: row_K.expand(2, len(row_K), len(row_K))}

    monkeypatch.setattr(measured, "named_maps", on_early_frames)
    mel_TF = np.zeros((FRAMES, TINY.mel_bins), np.float32)
    shares = measure(network("absent"), [Mixture(mel_TF, mel_TF, replaced_first)])
    assert (shares[ONLY] == expected).all()


def test_a_mixture_keeps_one_half_and_takes_the_other_from_a_clip_without_common_label():
    clips = [clip(0, 0), clip(1, 0, 1), clip(2, 2), clip(3, 0, 3)]
    mixtures = make_mixtures(clips, [network()], "clip", seed=1)
    assert {mixture.replaced_first for mixture in mixtures} == {True, False}
    for number, mixture in enumerate(mixtures):
        halves_of = [slice(FRAMES // 2), slice(FRAMES // 2, FRAMES)]
        replaced, stayed = halves_of if mixture.replaced_first else halves_of[::-1]
        own_TF = log_mel(clips[number].samples)[:FRAMES]
        assert np.array_equal(mixture.own_TF, own_TF)
        assert np.array_equal(mixture.mixed_TF[stayed], own_TF[stayed])
        sources = [
            other
            for other, source in enumerate(clips)
            if np.array_equal(mixture.mixed_TF[replaced], log_mel(source.samples)[:FRAMES][replaced])
        ]
        assert sources == [2] or number == 2
        assert sources != [number]
    again = make_mixtures(clips, [network()], "clip", seed=1)
    assert all(np.array_equal(one.mixed_TF, other.mixed_TF) for one, other in zip(mixtures, again, strict=True))


def test_noise_is_as_loud_as_the_clip():
    one = clip(0, seconds=4.0)
    found = measured._noise_like(one, np.random.default_rng(0))
    # The standard deviation of n samples of noise spreads by 1 / sqrt(2 n); five of those are never met by chance.
    assert found.std() / (one.samples.std() / INT16_SCALE) == pytest.approx(1, abs=5 / np.sqrt(2 * len(found)))


def test_clips_are_cut_to_what_the_shortest_and_every_network_has():
    mixtures = make_mixtures([clip(0, seconds=0.7), clip(1)], [network()], "clip", seed=0)  # 68 frames: 4 patches of 16
    assert {mixture.mixed_TF.shape for mixture in mixtures} == {(64, 128)}
    with pytest.raises(UserError, match="clip0 has 29 frames of 10 ms; a mixture needs 32"):
        make_mixtures([clip(0, seconds=0.31), clip(1)], [network()], "clip", seed=0)
    with pytest.raises(UserError, match="clip0 shares a label with all of the 2 clips"):
        make_mixtures([clip(0, 4), clip(1, 4)], [network()], "clip", seed=0)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(5)
    above_B, below_B = rng.gamma(4.0, size=(2, 40))
    ours = mean_estimate(above_B), ratio_estimate(above_B, below_B)
    statistics = (lambda a, axis: a.mean(axis)), (lambda a, b, axis: a.mean(axis) / b.mean(axis))
    for estimate, samples, statistic in zip(ours, ([above_B], [above_B, below_B]), statistics, strict=True):
        theirs = stats.bootstrap(
            samples, statistic, paired=len(samples) > 1, method="percentile", n_resamples=RESAMPLES, rng=rng
        )
        # A percentile p of R draws is off by sqrt(p (1 - p) / R) / density; at 2.5 % of a normal distribution that is
        # 0.06 standard errors for R = 2000. Two of them differ by five times sqrt(2) of that at most.
        tolerance = 5 * np.sqrt(2) * 0.06 * theirs.standard_error
        assert (estimate.low, estimate.high) == pytest.approx(tuple(theirs.confidence_interval), abs=tolerance)


def test_of_a_pre_training_the_teacher_is_looked_at_and_of_a_classifier_its_encoder(tmp_path: Path):
    pretrained, tagger = write_pretrained(tmp_path / "pretrained"), write_tagger(tmp_path / "tagger")
    for folder, stem, prefix in ((pretrained, "teacher", ""), (tagger, "model", "encoder.")):
        weights = read_weights(folder, stem)
        state = load_network(folder).encoder.state_dict()
        assert all(tensor.equal(weights[prefix + name]) for name, tensor in state.items())


def test_a_network_without_such_maps_is_refused_by_name(tmp_path: Path, monkeypatch):
    tagger = write_tagger(tmp_path / "tagger")
    other = SimpleNamespace(model=SimpleNamespace(kind="another"))
    monkeypatch.setattr(measured, "read_description", lambda folder: other)
    with pytest.raises(UserError, match="tagger holds a network of another kind"):
        load_network(tagger)


def test_the_tool_writes_figures_and_a_picture_of_all_runs(shards: Path, tmp_path: Path):
    runs = [write_pretrained(tmp_path / "pretrained"), write_tagger(tmp_path / "tagger")]
    out = tmp_path / "deep" / "figures.json"
    done = run("attention", *runs, "--data", f"{shards}:test", "--clips", 6, "--out", out)
    assert done.code == 0, done.err
    record = json.loads(out.read_text())
    assert record["paths"] == {"pretrained": str(runs[0]), "tagger": str(runs[1])}
    assert list(record["runs"]) == ["pretrained", "tagger"]
    for maps in record["runs"].values():
        for name, blocks in maps.items():
            assert len(blocks) == TINY.depth
            for cells in blocks:
                assert all(cell["low"] <= cell["value"] <= cell["high"] for cell in cells.values())
                assert ("unrelated / own" in cells) == (name != SIGNED)
    assert imread(out.with_suffix(".png")).ndim == 3
    assert "difference to the first, clip by clip" in done.out


def test_a_figure_that_is_none_is_null_in_the_file(shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measured, "net_relative_share", lambda weights_HQN, irrelevant_N: np.nan)
    out = tmp_path / "figures.json"
    tagger = write_tagger(tmp_path / "tagger")
    assert run("attention", tagger, "--data", f"{shards}:test", "--clips", 4, "--out", out).code == 0
    (maps,) = json.loads(out.read_text(), parse_constant=pytest.fail)["runs"].values()
    assert maps[SIGNED][0]["own"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--query", "cls"), "--query cls needs --context noise"),
        (("--clips", 1), "--clips 1 must be at least 2"),
        (("--seed", -1), "--seed -1 must be from 0 to 1099511627776"),
        (("--out", "maps.png"), "--out maps.png is for the figures"),
        (("--data", "nowhere:test"), "nowhere"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_nothing_is_written(shards, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = run("attention", write_tagger(tmp_path / "tagger"), "--data", f"{shards}:test", *arguments)
    assert done.code == 2
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tagger"]
