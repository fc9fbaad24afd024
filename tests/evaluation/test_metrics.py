"""Metrics against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, roc_auc_score

from asda.evaluation.metrics import accuracy, by_class, confusion, d_prime, summary

# Both sides take means of at most N quotients of exact counts in float64, and the sums of ours run in another order:
# N roundings of 2^-53 of values of at most 1, and N <= 2000 here.
ROUNDING = 2000 * 2.0**-53

FEW_LEVELS = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 2.0**-100, 1.0, 3.0])


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties (in float32 or float64) and targets, some classes without positives or negatives."""
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 4)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    values = draw(st.sampled_from([FEW_LEVELS, st.floats(-(2.0**100), 2.0**100, width=32)]))
    scores_NC = draw(arrays.arrays(dtype, shape, elements=values))
    return scores_NC, draw(arrays.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0])))


def expected_precision(targets_N: np.ndarray, scores_N: np.ndarray) -> float:
    return average_precision_score(targets_N, finite(scores_N)) if targets_N.any() else math.nan


def expected_auc(targets_N: np.ndarray, scores_N: np.ndarray) -> float:
    return roc_auc_score(targets_N, finite(scores_N)) if 0 < targets_N.sum() < len(targets_N) else math.nan


def finite(scores_N: np.ndarray) -> np.ndarray:
    """In float64, in which -1e300 stands for -inf: scikit-learn refuses that, and only the order counts."""
    return np.maximum(scores_N.astype(np.float64), -1e300)


@given(predictions())
@settings(max_examples=200, deadline=None)
def test_every_class_equals_scikit_learn_with_ties_and_without_positives_or_negatives(
    predicted: tuple[np.ndarray, np.ndarray],
) -> None:
    scores_NC, targets_NC = predicted
    classes = by_class(scores_NC, targets_NC)
    pairs = list(zip(targets_NC.T, scores_NC.T, strict=True))
    assert classes.clips_C.tolist() == targets_NC.sum(0).tolist()
    for ours_C, theirs in ((classes.average_precision_C, expected_precision), (classes.auc_C, expected_auc)):
        np.testing.assert_allclose(ours_C, [theirs(*pair) for pair in pairs], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("levels", [3, 100, None])
def test_the_means_of_thousands_of_clips_equal_scikit_learn(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    scores_NC = rng.random((2000, 11)).astype(np.float32)
    scores_NC = scores_NC if levels is None else np.floor(scores_NC * levels)
    targets_NC = (rng.random((2000, 11)) < 0.05).astype(np.float32)
    targets_NC[:, 4] = 0
    kept = [c for c in range(11) if c != 4]
    figures = summary(scores_NC, targets_NC)
    precision = average_precision_score(targets_NC[:, kept], scores_NC[:, kept])
    assert figures["mAP"] == pytest.approx(precision, abs=ROUNDING)
    assert figures["mAUC"] == pytest.approx(roc_auc_score(targets_NC[:, kept], scores_NC[:, kept]), abs=ROUNDING)
    assert figures["classes_without_positives"] == 1


def test_accuracy_and_confusion_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    scores_NC, labels_N = rng.random((300, 7)), rng.integers(6, size=300)
    targets_NC = np.eye(7, dtype=np.float32)[labels_N]
    assert accuracy(scores_NC, targets_NC) == accuracy_score(labels_N, scores_NC.argmax(axis=1))
    expected_CC = confusion_matrix(labels_N, scores_NC.argmax(axis=1), labels=np.arange(7))
    assert (confusion(scores_NC, targets_NC) == expected_CC).all()


@pytest.mark.parametrize("auc", [1e-6, 0.2, 0.5, 0.965, 1 - 1e-9])
def test_d_prime_is_the_normal_quantile_of_scipy(auc: float) -> None:
    # NormalDist computes it to 1e-16 of relative error in the AUC's tail, as SciPy: some ulps of a value below 10
    assert d_prime(auc) == pytest.approx(math.sqrt(2) * norm.ppf(auc), rel=1e-12, abs=1e-12)


def test_d_prime_of_a_perfect_ranking_is_infinite_and_of_none_is_nan() -> None:
    assert d_prime(1.0) == math.inf
    assert d_prime(0.0) == -math.inf
    assert math.isnan(d_prime(math.nan))


def test_classes_without_positives_are_counted_and_left_out_of_the_mean() -> None:
    scores_NC = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]])
    targets_NC = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    figures = summary(scores_NC, targets_NC)
    assert figures == {
        "clips": 2, "classes": 3, "accuracy": 1.0, "mAP": 1.0, "mAUC": 1.0, "d_prime": math.inf,
        "classes_without_positives": 1,
    }  # fmt: skip


def test_no_positive_at_all_is_nan_and_not_zero() -> None:
    figures = summary(np.zeros((2, 2)), np.zeros((2, 2)))
    assert all(math.isnan(figures[name]) for name in ("mAP", "mAUC", "d_prime"))


@pytest.mark.parametrize("place", [(0, 0), (3, 1), (7, 0)])
def test_one_score_without_a_value_leaves_no_mean_with_a_value(place: tuple[int, int]) -> None:
    scores_NC = np.random.default_rng(2).random((8, 2)).astype(np.float32)
    targets_NC = np.eye(2)[[0, 1] * 4]
    scores_NC[place] = math.nan
    figures = summary(scores_NC, targets_NC)
    assert all(math.isnan(figures[name]) for name in ("accuracy", "mAP", "mAUC", "d_prime"))
    assert math.isfinite(by_class(scores_NC, targets_NC).average_precision_C[1 - place[1]]), "the other class has one"
