"""Metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score

from asda.metrics import accuracy, average_precision, summary


@pytest.mark.parametrize("levels", [3, 20, None])
def test_average_precision_equals_scikit_learn_also_with_ties(levels: int | None) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.random(200).astype(np.float32)
        scores = scores if levels is None else np.floor(scores * levels)
        targets = (rng.random(200) < 0.1).astype(np.float32)
        targets[0] = 1
        # both sum at most 200 terms of at most 1 in double precision
        assert average_precision(scores, targets) == pytest.approx(average_precision_score(targets, scores), abs=1e-12)


def test_accuracy_equals_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.random((300, 7)), rng.integers(7, size=300)
    assert accuracy(scores, np.eye(7)[labels]) == accuracy_score(labels, scores.argmax(axis=1))


def test_classes_without_positives_are_counted_and_left_out_of_the_mean() -> None:
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.4]])
    targets = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    figures = summary(scores, targets, single_label=False)
    assert figures == {"clips": 2, "classes": 3, "mAP": 1.0, "classes_without_positives": 1}


def test_no_positive_at_all_is_nan_and_not_zero() -> None:
    assert np.isnan(summary(np.zeros((2, 2)), np.zeros((2, 2)), single_label=False)["mAP"])
