"""How good predictions are: accuracy and mean average precision."""

import numpy as np


def accuracy(scores_NC: np.ndarray, targets_NC: np.ndarray) -> float:
    """Share of clips whose highest score is at one of their labels."""
    return float(targets_NC[np.arange(len(scores_NC)), scores_NC.argmax(axis=1)].mean())


def average_precision(scores_N: np.ndarray, targets_N: np.ndarray) -> float:
    """Area under precision over recall of one class, as a sum over thresholds; nan without a positive.

    Equal scores share a threshold, so the order of ties does not matter (as in scikit-learn's definition).
    """
    order = np.argsort(-scores_N, kind="stable")
    hits = np.cumsum(targets_N[order])
    last_of_tie = np.flatnonzero(np.append(np.diff(scores_N[order]) != 0, True))
    if hits[-1] == 0:
        return float("nan")
    precision = hits[last_of_tie] / (last_of_tie + 1)
    recall_gain = np.diff(hits[last_of_tie], prepend=0) / hits[-1]
    return float((precision * recall_gain).sum())


def summary(scores_NC: np.ndarray, targets_NC: np.ndarray, *, single_label: bool) -> dict[str, float | int]:
    """The figures of an evaluation.

    Args:
        scores_NC: [clips, classes] higher is likelier.
        targets_NC: [clips, classes] 1 where the clip has the label.
        single_label: whether every clip has one label; then accuracy is reported too.

    Returns:
        "mAP" is the mean over classes that have a positive; "classes_without_positives" counts the others.
    """
    per_class = np.array([average_precision(scores_NC[:, c], targets_NC[:, c]) for c in range(scores_NC.shape[1])])
    empty = int(np.isnan(per_class).sum())
    figures: dict[str, float | int] = {"clips": len(scores_NC), "classes": len(per_class)}
    if single_label:
        figures["accuracy"] = accuracy(scores_NC, targets_NC)
    figures["mAP"] = float(np.nanmean(per_class)) if empty < len(per_class) else float("nan")
    figures["classes_without_positives"] = empty
    return figures
