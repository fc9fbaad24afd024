"""One comparison with an official number, and how its error is measured."""

from collections.abc import Iterator
from typing import NamedTuple

import golden
import numpy as np
from torch import Tensor

UNIT_ROUNDING = 2**-24  # relative, of fp32
EXACT_REL = 1e-12  # of decays, schedules and rates: fp64 arithmetic of a few operations, there and here


class Finding(NamedTuple):
    """One comparison: how far ours is from the official number, and how far it may be."""

    group: str
    name: str  # of the tensor or figure
    error: float
    tolerance: float
    measure: str  # what the error is
    run: str = ""  # with which attention and how many threads

    @property
    def share(self) -> float:
        """Error / tolerance; infinite for an error that is no number, or where none is allowed."""
        if np.isnan(self.error):
            return np.inf
        return self.error / self.tolerance if self.tolerance else np.inf * (self.error > 0) if self.error else 0.0


Findings = Iterator[Finding]


def rms(group: str, name: str, ours: Tensor, official: Tensor, tolerance: float = golden.REL_RMS) -> Finding:
    """By the rms of the difference, relative to the rms of the official tensor."""
    return Finding(group, name, golden.rel_rms(ours, official), tolerance, "rel. rms")


def most(group: str, name: str, ours: Tensor, official: Tensor, tolerance: float) -> Finding:
    """By the largest difference."""
    return Finding(group, name, float((ours.detach() - official).abs().max()), tolerance, "largest")


def figure(group: str, name: str, ours: float, official: float, tolerance: float) -> Finding:
    """By the difference of two numbers relative to the official one."""
    return Finding(group, name, abs(ours - official) / (abs(official) or 1.0), tolerance, "relative")
