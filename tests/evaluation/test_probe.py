"""The probe against scikit-learn, on any number of ranks, and on an encoder that knows nothing."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, tiny_config
from sklearn.linear_model import RidgeCV
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from asda.config.data import LogMelStats
from asda.config.run import Config, ProbeConfig
from asda.data.clips import ClipDataset, read_clips
from asda.data.datasets import open_probe_data
from asda.data.features.fbank import log_mel
from asda.data.order import Draw
from asda.engine.processes import Processes
from asda.errors import UserError
from asda.evaluation.probe import (
    PENALTIES,
    LabelledFeatures,
    features_of,
    linear_scores,
    neighbour_scores,
    probe_encoder,
    probe_figures,
    standardised,
)
from asda.models.encoder import Encoder

CHANCE = 1 / 8  # of the eight classes of the fixture `shards`


def clusters(num_clips: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] of five overlapping classes, on axes of very different scale, and their classes [N]."""
    centres = np.random.default_rng(0).standard_normal((5, width))
    rng = np.random.default_rng(seed)
    classes = rng.integers(5, size=num_clips)
    noise = 0.4 * width**0.5 * rng.standard_normal((num_clips, width))
    return (3 + (centres[classes] + noise) * 10.0 ** np.linspace(-2, 2, width)).astype(np.float32), classes


@pytest.fixture
def alone() -> Iterator[Processes]:
    """A run of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def one_hot(classes: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.eye(5, dtype=np.float32)[classes])


@pytest.mark.parametrize(("num_clips", "width"), [(300, 16), (60, 128)])
def test_neighbours_and_linear_layer_are_those_of_scikit_learn(num_clips: int, width: int) -> None:
    train, train_classes = clusters(num_clips, width, 1)
    test, test_classes = clusters(2000, width, 2)  # more than are compared at once
    ours_train, ours_test = standardised(torch.from_numpy(train), torch.from_numpy(test))
    scaler = StandardScaler().fit(train.astype(np.float64))
    train64, test64 = scaler.transform(train.astype(np.float64)), scaler.transform(test.astype(np.float64))
    # fp64 on both sides; a feature's spread is 1e-3 of its mean at least, which leaves 13 digits.
    np.testing.assert_allclose(ours_test.numpy(), test64, rtol=0, atol=1e-9)

    neighbours = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(train64, train_classes)
    shares = neighbour_scores(ours_train, one_hot(train_classes), ours_test, 10)
    np.testing.assert_allclose(shares.numpy(), neighbours.predict_proba(test64), rtol=0, atol=1e-6)  # of tenths in fp32
    assert 0.3 < (shares.numpy().argmax(1) == test_classes).mean() < 0.99, "neither at chance nor too easy"

    ridge = RidgeCV([num_clips * p for p in PENALTIES]).fit(train64, one_hot(train_classes).double().numpy())
    scores = linear_scores(ours_train, one_hot(train_classes), ours_test)
    # The least eigenvalue is that of the penalty, N 1e-4, against N D: a condition of 1e7 costs 7 of 16 digits.
    np.testing.assert_allclose(scores.numpy(), ridge.predict(test64), rtol=0, atol=1e-7)
    assert PENALTIES[0] < ridge.alpha_ / num_clips < PENALTIES[-1], "the best lies within the penalties"


def test_a_feature_that_never_changes_says_nothing_and_breaks_nothing() -> None:
    train, classes = clusters(50, 8, 1)
    train[:, 3] = 7.25
    ours_train, ours_test = standardised(torch.from_numpy(train), torch.from_numpy(train + 1))
    assert (ours_train[:, 3] == 0).all()
    assert (ours_test[:, 3] == 0).all()
    assert linear_scores(ours_train, one_hot(classes), ours_test).isfinite().all()
    same = torch.zeros(50, 8, dtype=torch.float64)
    assert neighbour_scores(same, one_hot(classes), same, 10).isfinite().all()
    assert torch.allclose(linear_scores(same, one_hot(classes), same), one_hot(classes).double().mean(0))


def config_with_probe(shards: Path, *overrides: str, train: str = "train", test: str = "test") -> Config:
    config = tiny_config(*overrides)
    stats = LogMelStats(mean=-7.0, std=4.5)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"log_mel": stats}),
            "probe": ProbeConfig(train=f"{shards}:{train}", test=f"{shards}:{test}"),
        }
    )


def encoder_of(config: Config) -> Encoder:
    torch.manual_seed(3)
    return Encoder(config.model).requires_grad_(False).eval()


def judged(processes: Processes, config: Config) -> tuple[dict[str, Any], bool]:
    """The figures of an untrained encoder, and whether torch's generator and the encoder are as before."""
    encoder = encoder_of(config)
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    generator = torch.get_rng_state()
    figures = probe_encoder(encoder, config, open_probe_data(config), processes)
    same = all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
    return figures, same and not encoder.training and torch.equal(torch.get_rng_state(), generator)


@pytest.mark.launch
def test_any_number_of_ranks_judges_alike_and_leaves_generator_and_teacher_alone(
    shards: Path, alone: Processes
) -> None:
    config = config_with_probe(shards)
    figures, untouched = judged(alone, config)
    assert untouched
    assert list(figures) == ["knn_accuracy", "linear_accuracy"]
    # Even an untrained encoder tells synthetic sounds apart, because their spectra do.
    assert all(CHANCE < figure <= 1 for figure in figures.values())
    # 48 and 16 clips in batches of other sizes: features are equal to rounding, and decisions are.
    assert run_ranks(2, judged, config) == [(figures, True)] * 2


class Echo(nn.Module):
    """Tokens that are the patches themselves, and a CLS token that would spoil their mean."""

    def forward(self, patches_BNP: torch.Tensor, present_BN: torch.Tensor | None = None) -> torch.Tensor:
        assert present_BN is None
        return torch.cat([torch.full_like(patches_BNP[:, :1], 1e9), patches_BNP], dim=1)


def test_a_clips_feature_is_the_mean_over_the_tokens_that_hold_audio(shards: Path, alone: Processes) -> None:
    config = config_with_probe(shards, "data.frames=512")  # 5.12 s, longer than the clips
    dataset = ClipDataset(f"{shards}:test", labelled=True)
    features_ND, targets_NC = features_of(Echo().eval(), dataset, config, alone)
    for number, clip in enumerate(read_clips(dataset, [Draw(0, number) for number in range(len(dataset))])):
        spectrum_TF = (log_mel(clip.samples) + 7.0) / (2 * 4.5)  # as config_with_probe says
        assert len(spectrum_TF) < 512
        padding_TF = np.full((-len(spectrum_TF) % 16, 128), 7.0 / (2 * 4.5))  # a log-mel of 0
        patches = np.concatenate([spectrum_TF, padding_TF]).reshape(-1, 16, 8, 16).swapaxes(1, 2).reshape(-1, 256)
        # The front-end's own tests allow 2e-4 of log-mel between the two; a mean over patches is no farther off.
        np.testing.assert_allclose(features_ND[number].numpy(), patches.mean(0), rtol=0, atol=2e-4)
        assert targets_NC[number].nonzero().flatten().tolist() == list(clip.labels)


def test_several_labels_a_clip_are_judged_by_the_mean_of_the_average_precisions() -> None:
    sets = []
    for features, classes in (clusters(200, 16, 1), clusters(300, 16, 2)):
        also = one_hot(np.where(features[:, 0] > 3, 0, classes))  # a second label that a feature tells
        sets.append(LabelledFeatures(torch.from_numpy(features), one_hot(classes).maximum(also)))
    train, test = sets
    figures = probe_figures(train, test, neighbours=10)
    train_ND, test_TD = standardised(train.of_clips_ND, test.of_clips_ND)
    scores = linear_scores(train_ND, train.targets_NC, test_TD)
    assert list(figures) == ["knn_mAP", "linear_mAP"]
    assert figures["linear_mAP"] == pytest.approx(
        average_precision_score(test.targets_NC.numpy(), scores.numpy()), abs=1e-12
    )
    assert 0.3 < figures["knn_mAP"] < 1


def test_features_that_tell_nothing_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    (train, _), (test, test_classes) = clusters(500, 16, 1), clusters(4000, 16, 2)
    given = standardised(torch.from_numpy(train), torch.from_numpy(test))
    labels = one_hot(rng.permutation(np.arange(500) % 5))
    for scores in (neighbour_scores(given[0], labels, given[1], 10), linear_scores(given[0], labels, given[1])):
        share = (scores.numpy().argmax(1) == rng.permutation(test_classes)).mean()
        assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5  # five standard deviations of the count


def test_features_without_a_value_give_figures_without_a_value(shards: Path, alone: Processes) -> None:
    config = config_with_probe(shards)
    encoder = encoder_of(config)
    encoder.cls_token.fill_(float("nan"))
    figures = probe_encoder(encoder, config, open_probe_data(config), alone)
    assert list(figures) == ["knn_accuracy", "linear_accuracy"]
    assert all(math.isnan(figure) for figure in figures.values())


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({"train": "{}:nothing"}, "nothing"),
        ({"train": "{}:train+test"}, "share shards, so a clip would be its own neighbour"),
        ({"neighbours": 49}, "probe.neighbours 49 exceeds the 48 clips"),
    ],
)
def test_a_probe_that_cannot_work_is_one_sentence_before_the_first_step(
    probe: dict[str, Any], words: str, shards: Path
) -> None:
    config = config_with_probe(shards)
    assert config.probe is not None
    filled = {key: value.format(shards) if isinstance(value, str) else value for key, value in probe.items()}
    with pytest.raises(UserError, match=words):
        open_probe_data(config.model_copy(update={"probe": config.probe.model_copy(update=filled)}))


def test_sets_with_other_classes_are_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ClipDataset.__init__

    def renamed(self: ClipDataset, *sources: Any, **options: Any) -> None:
        opened(self, *sources, **options)
        if ":test" in str(sources):
            self.vocabulary = (*self.vocabulary[1:], "unheard of")

    monkeypatch.setattr(ClipDataset, "__init__", renamed)
    with pytest.raises(UserError, match=r"probe.test .* and probe.train .* have different classes; .* --labels FILE"):
        open_probe_data(config_with_probe(shards))
