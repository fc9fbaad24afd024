"""Time the metrics of AudioSet's evaluation, 20,000 clips x 527 classes: ours, torchmetrics and scikit-learn.

All three compute average precision from every score, without bins, on one thread. Ours also gives AUC, d-prime and the
counts.
"""

import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MultilabelAveragePrecision

from asda.evaluation.metrics import summary

CLIPS, CLASSES, LABELS_A_CLIP = 20_000, 527, 2
ROUNDS = 3


def bench_metrics() -> dict[str, float]:
    """Return seconds for 20,000 x 527 scores: all our metrics, and the exact mAP of torchmetrics and scikit-learn."""
    torch.set_num_threads(1)  # like ours; on two busy cores torchmetrics' many short sorts take five times as long
    rng = np.random.default_rng(0)
    targets_NC = (rng.random((CLIPS, CLASSES)) < LABELS_A_CLIP / CLASSES).astype(np.float32)
    scores_NC = rng.standard_normal((CLIPS, CLASSES), dtype=np.float32) + 2 * targets_NC
    scores, targets = torch.from_numpy(scores_NC).sigmoid(), torch.from_numpy(targets_NC).long()

    def theirs() -> float:
        metric = MultilabelAveragePrecision(CLASSES, average="macro", thresholds=None, validate_args=False)
        metric.update(scores, targets)
        return float(metric.compute())

    works: dict[str, Callable[[], float]] = {
        "ours": lambda: float(summary(scores.numpy(), targets_NC)["mAP"]),
        "torchmetrics": theirs,
        "sklearn": lambda: float(average_precision_score(targets_NC, scores.numpy())),
    }
    values, seconds = _in_turn(works)
    return {
        **{f"{name}_s": taken for name, taken in seconds.items()},
        "ratio_torchmetrics": seconds["torchmetrics"] / seconds["ours"],
        "ratio_sklearn": seconds["sklearn"] / seconds["ours"],
        "differs_torchmetrics": abs(values["ours"] - values["torchmetrics"]),
        "differs_sklearn": abs(values["ours"] - values["sklearn"]),
    }


def _in_turn(works: dict[str, Callable[[], float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the value and the median seconds of each, run in turns after one unmeasured round."""
    values: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(ROUNDS + 1):
        for name, work in works.items():
            started = time.perf_counter()
            with warnings.catch_warnings(action="ignore"):
                values[name] = work()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return values, {name: median(taken) for name, taken in seconds.items()}
