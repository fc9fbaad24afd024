"""asda: pre-train audio encoders, fine-tune them as sound classifiers, and use them.

import asda
model = asda.load("runs/x")
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from asda.inference import File, Model, Stream

__all__ = ["File", "Stream", "load"]
__version__ = "0.1.0"


def load(
    path: str | Path,
    weights: Literal["student", "teacher"] = "student",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "Model":
    """Load a trained or converted model, for features and tags; asda.inference describes both.

    Args:
        path: a run folder (its newest checkpoint is taken), a checkpoint, or a folder of converted weights.
        weights: "teacher" takes the EMA teacher of a pre-training checkpoint.
        device: where the network computes; "auto" takes a GPU if there is one. Results are always on the CPU.

    Raises:
        asda.errors.UserError: there is no model at the path, or its weights do not fit its config.json.
    """
    from asda.inference import load  # imports torch, which takes a second

    return load(path, weights, device)


def __getattr__(name: str) -> object:
    """Import asda.File and asda.Stream when they are asked for: torch takes a second."""
    if name in ("File", "Stream"):
        from asda import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'asda' has no attribute {name!r}")
