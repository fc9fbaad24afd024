"""Results of a model: embeddings, tags, and tags over time; on the CPU, in fp32 but for times."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Embeddings of one clip, or of a part of it."""

    patches: Tensor  # [T, F, D], one per patch of 16 frames x 16 mel bins (AST's overlap); low frequencies first
    frames: Tensor  # [T, D], means over the mel patches
    utterance: Tensor  # [D], the CLS token; for AST the mean of CLS and DIST
    times_s: Tensor  # [T], the centre of each time patch


def mean_utterance(chunks: list[Tensor], steps: list[int]) -> Tensor:
    """Return the utterance embedding of a clip: the mean of its chunks', [D], weighted by their time patches."""
    weight_K = torch.tensor(steps, dtype=torch.float32)
    return (weight_K / weight_K.sum()) @ torch.stack(chunks)


@dataclass(frozen=True)
class Tag:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """Probabilities in consecutive windows of one clip, or of a part of it."""

    starts_s: Tensor  # [W], float64
    ends_s: Tensor  # [W], float64; the last window ends with the clip's last frame
    probabilities: Tensor  # [W, C], classes in the order of Model.labels

    @staticmethod
    def joined(parts: "Iterable[Timeline]") -> "Timeline":
        """Join at least one part, in their order."""
        columns = zip(*([getattr(part, field.name) for field in fields(Timeline)] for part in parts), strict=True)
        return Timeline(*(torch.cat(column) for column in columns))
