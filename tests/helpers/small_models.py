"""Small random models with a description, and sounds, for the tests of inference."""

import json
from pathlib import Path

import golden
import numpy as np
import torch
from torch import Tensor

from asda.checkpoint.weights import write_weights
from asda.config.model import ClassifyConfig
from asda.config.presets import filled
from asda.config.run import Description
from asda.models.classifier import Classifier
from asda.models.encoder import Encoder
from asda.models.pretrain import MaskedStudents

RATE_HZ = 16_000
FRAMES = 64  # of a chunk: 0.64 s, 4 x 8 patches
CHUNK = FRAMES * 160  # samples from one chunk to the next
MEAN, STD, PAD = -4.268, 4.569, 0.0
LABELS = [f"class {number}" for number in range(5)]


def close(ours: Tensor, expected: Tensor) -> bool:
    """Equal but for fp32 rounding: in a batch of another shape the matrix products add up in another order.

    golden.REL_RMS is what that may do to networks of three blocks such as the ones here.
    """
    return golden.rel_rms(ours, expected) < golden.REL_RMS


def sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """int16 [S] at 16 kHz whose pitch rises, so that no two stretches are alike; with an offset."""
    time_s = np.arange(num_samples) / RATE_HZ
    tone = np.sin(2 * np.pi * (300 + 250 * time_s) * time_s)
    amplitude = 0.2 * tone + 0.05 * np.random.default_rng(seed).standard_normal(num_samples) + 0.01
    return np.rint(32768 * amplitude).astype(np.int16)


def write_model(folder: Path, *, teacher: bool = False, **changes: object) -> Path:
    """A folder of random weights: of a classifier, or of students and, if wanted, a teacher."""
    torch.manual_seed(3)
    tree = {
        "objective": {"kind": "classify", "init_from": "", "loss": "bce"},
        "data": {"frames": FRAMES, "log_mel": {"mean": MEAN, "std": STD}, "pad_log_mel": PAD},
        "model": {"width": 32, "depth": 3, "heads": 2, "max_time_patches": 64},
        "labels": LABELS,
    }
    description = Description.model_validate_json(json.dumps(filled(tree | changes)))
    weights = {}
    if isinstance(description.objective, ClassifyConfig):
        classifier = Classifier(description.model, description.objective, len(description.labels))
        torch.nn.init.normal_(classifier.head.weight)  # of a trained size: with the initial 0.02 all classes are alike
        weights["model"] = classifier.state_dict()
    else:
        weights["model"] = MaskedStudents(description.model, description.objective).state_dict()
        if teacher:
            weights["teacher"] = Encoder(description.model).state_dict()
    write_weights(folder, description, weights)
    return folder


def pretraining() -> dict[str, object]:
    """What write_model changes for a pre-training checkpoint."""
    decoder = {"layers": 1, "width": 32, "groups": 4}
    return {"objective": {"kind": "pretrain", "target_layers": 3, "decoder": decoder}, "labels": []}


def classifying(**changes: object) -> dict[str, object]:
    return {"objective": {"kind": "classify", "init_from": "", "loss": "bce"} | changes}
