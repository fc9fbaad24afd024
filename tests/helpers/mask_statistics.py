"""How two samples of masks differ: statistics with a limit that equal generators exceed once in a thousand comparisons.

Every statistic is made of one number (or vector) a mask, so that the numbers of a sample are independent of each other.

Shapes: S masks of a sample, T time patches, F mel patches.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

Masks = NDArray[np.bool_]

SIGNIFICANCE = 1e-3  # of each difference, shared out among its comparisons (Bonferroni)
SMALLEST_EXPECTED_COUNT = 5  # of a histogram's bin, the usual rule; rarer values are merged with their neighbours


class Difference(NamedTuple):
    """One comparison of two samples; at equal distributions P(statistic > limit) <= SIGNIFICANCE."""

    name: str
    statistic: float
    limit: float


def differences(a: Masks, b: Masks, block: int) -> Iterator[Difference]:
    """Compare samples [S, T, F] of masks, True where visible, made of blocks of block x block patches."""
    yield of_means("visible per time patch", a.sum(2), b.sum(2))
    yield of_means("visible per mel patch", a.sum(1), b.sum(1))
    yield of_means("visible per patch", a.reshape(len(a), -1), b.reshape(len(b), -1))
    yield of_means("visible neighbours", neighbours_of(a), neighbours_of(b))
    yield of_histograms("whole blocks", full_windows_of(a, block), full_windows_of(b, block))
    yield of_histograms("empty time patches", (~a.any(2)).sum(1), (~b.any(2)).sum(1))


def of_means(name: str, a: NDArray, b: NDArray) -> Difference:
    """Welch's test of every column of [S, comparisons]: the largest |t|; with thousands of samples t is a normal."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    standard_error = np.sqrt(a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b))
    t = np.abs(a.mean(0) - b.mean(0)) / np.maximum(standard_error, np.finfo(np.float64).tiny)
    return Difference(name, float(t.max()), float(np.sqrt(2 * np.log(2 * t.size / SIGNIFICANCE))))  # P <= 2 exp(-l^2/2)


def of_histograms(name: str, a: NDArray[np.integer], b: NDArray[np.integer]) -> Difference:
    """The chi-square test of homogeneity of whole numbers [S]."""
    num_values = max(a.max(), b.max()) + 1
    table = _merged(np.array([np.bincount(x, minlength=num_values) for x in (a, b)]))
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = max(1, table.shape[1] - 1)
    return Difference(name, float(((table - expected) ** 2 / expected).sum()), float(chi2.isf(SIGNIFICANCE, freedom)))


def neighbours_of(visible: Masks) -> NDArray[np.int64]:
    """Pairs of visible patches side by side, per mask."""
    return (visible[:, 1:] & visible[:, :-1]).sum((1, 2)) + (visible[:, :, 1:] & visible[:, :, :-1]).sum((1, 2))


def full_windows_of(visible: Masks, block: int) -> NDArray[np.int64]:
    """Windows of block x block visible patches, per mask."""
    windows = np.lib.stride_tricks.sliding_window_view(visible, (block, block), axis=(1, 2))
    return windows.all((-2, -1)).sum((1, 2))


def _merged(table: NDArray) -> NDArray[np.float64]:
    """Neighbouring columns of [2, values] added up until each sum of the smaller row's share is large enough."""
    share = table.sum(1).min() / table.sum()
    merged, pending = [], np.zeros(2)
    for column in table.T:
        pending = pending + column
        if pending.sum() * share >= SMALLEST_EXPECTED_COUNT:
            merged.append(pending)
            pending = np.zeros(2)
    merged[-1] = merged[-1] + pending
    return np.array(merged).T
