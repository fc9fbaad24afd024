"""Metrics of predictions: accuracy, average precision, area under the ROC curve, d-prime. See docs/evaluation.md.

Higher scores are likelier. Equal scores share a threshold, so no metric depends on the order of ties (scikit-learn's
definitions). A score that is nan makes the metrics that depend on it nan.

Shapes: N clips, C classes, P positives of a class.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class ByClass(NamedTuple):
    """Metrics of each class; nan where they are not defined."""

    clips_C: np.ndarray  # int64, number of positives
    average_precision_C: np.ndarray  # not defined without a positive
    auc_C: np.ndarray  # not defined without a positive or without a negative


def by_class(scores_NC: np.ndarray, targets_NC: np.ndarray) -> ByClass:
    """Compute the metrics of each class from scores in float32 (sorted fastest) or float64; targets are 0 or 1."""
    rows = [_one_class(scores_NC[:, c], targets_NC[:, c] > 0) for c in range(scores_NC.shape[1])]
    clips, precisions, aucs = zip(*rows, strict=True)
    return ByClass(np.array(clips), np.array(precisions), np.array(aucs))


def _one_class(scores_N: np.ndarray, is_positive_N: np.ndarray) -> tuple[int, float, float]:
    """Return the number of positives, the average precision and the AUC.

    Both are means over the positives: of the precision at the positive's own score (the area under precision over
    recall, as a sum over thresholds), and of the share of negatives below it, where equal ones count half
    (Mann-Whitney). So scores are sorted by value, which is several times faster than finding their order, and only
    positives are looked up, a few in a thousand of AudioSet's targets. All counts are exact.
    """
    ranked_N, hits_P = np.sort(scores_N), np.sort(scores_N[is_positive_N])
    positives, negatives = len(hits_P), len(ranked_N) - len(hits_P)
    if not positives or np.isnan(ranked_N[-1]):  # nan is sorted last
        return positives, math.nan, math.nan
    below_P, not_above_P = (np.searchsorted(ranked_N, hits_P, side) for side in ("left", "right"))
    hits_below_P, hits_not_above_P = (np.searchsorted(hits_P, hits_P, side) for side in ("left", "right"))
    precision_P = (positives - hits_below_P) / (len(ranked_N) - below_P)
    doubled_P = (below_P - hits_below_P) + (not_above_P - hits_not_above_P)
    auc = float(doubled_P.mean()) / (2 * negatives) if negatives else math.nan
    return positives, float(precision_P.mean()), auc


def accuracy(scores_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    """Return the share of clips whose highest score is at one of their labels."""
    if np.isnan(scores_NC).any():
        return math.nan
    return float(targets_NC[np.arange(len(scores_NC)), scores_NC.argmax(axis=1)].mean(dtype=np.float64))


def confusion(scores_NC: np.ndarray, targets_NC: np.ndarray) -> np.ndarray:
    """Count the clips of each class by the class of their highest score: int64 [C of the label, C of the score].

    Clips must have one label each, and scores must be finite.
    """
    classes = scores_NC.shape[1]
    pairs = targets_NC.argmax(axis=1) * classes + scores_NC.argmax(axis=1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def d_prime(mean_auc: float) -> float:
    """Return the distance of two normal distributions of variance 1 with this AUC: sqrt(2) times its normal quantile.

    AudioSet's papers compute it from the mean AUC of the classes (Hershey et al., 2017). It is infinite at 0 and 1.
    """
    if not 0 < mean_auc < 1:
        return math.nan if math.isnan(mean_auc) else math.copysign(math.inf, mean_auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(mean_auc)


def have_one_label(targets_NC: np.ndarray) -> bool:
    """Return whether every clip has one label. The loss does not tell: Speech Commands is trained with bce."""
    return bool((targets_NC.sum(axis=1) == 1).all())


def summary(scores_NC: np.ndarray, targets_NC: np.ndarray) -> dict[str, float | int]:
    """Compute the figures of an evaluation; targets are 1 where a clip has the label, else 0.

    Returns:
        "accuracy" only if every clip has one label. "mAP" is the mean over classes that have a positive
        ("classes_without_positives" counts the others), "mAUC" over those that have a negative too. Both are nan
        without such a class, or if a score is nan.
    """
    classes = by_class(scores_NC, targets_NC)
    has_positive_C, has_negative_C = classes.clips_C > 0, classes.clips_C < len(scores_NC)
    figures: dict[str, float | int] = {"clips": len(scores_NC), "classes": len(classes.clips_C)}
    if have_one_label(targets_NC):
        figures["accuracy"] = accuracy(scores_NC, targets_NC)
    figures["mAP"] = _mean(classes.average_precision_C[has_positive_C])
    figures["mAUC"] = _mean(classes.auc_C[has_positive_C & has_negative_C])
    figures["d_prime"] = d_prime(figures["mAUC"])
    figures["classes_without_positives"] = int((~has_positive_C).sum())
    return figures


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
