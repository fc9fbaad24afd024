"""The patches of a network by their definition, in torch: cut or pad, normalise, cut into patches, and back.

asda.data.features.cpu and dali do the same faster, and are tested against this.

Shapes: T frames, F mel bins, N patches, P pixels of a patch. Other dimensions may come first.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

NUM_MEL_BINS = 128  # of a log-mel frame


class PatchLayout(NamedTuple):
    """How log-mel frames become patches."""

    frames: int  # of 10 ms, a clip is cut or padded to; a multiple of `patch`
    patch: int  # frames and mel bins of a patch
    mean: float  # of log-mel values
    std: float
    pad_log_mel: float  # log-mel of padding, before normalisation
    mask_first: bool = False  # SpecAug fills log-mel with 0, before normalisation; otherwise mixtures, after it

    @property
    def shape(self) -> tuple[int, int]:
        """Number of patches and of their pixels, N and P."""
        return self.frames // self.patch * (NUM_MEL_BINS // self.patch), self.patch**2


def padded(mel_TF: Tensor, frames: int, value: float) -> Tensor:
    """Cut log-mel [..., T, F] after `frames` frames, or fill it up with a value."""
    return pad(mel_TF[..., :frames, :], (0, 0, 0, max(0, frames - mel_TF.shape[-2])), value=value)


def normalised(mel_TF: Tensor, mean: float, std: float) -> Tensor:
    """Return (log-mel - mean) / (2 std)."""
    return (mel_TF - mean) / (2 * std)


def to_patches(x_TF: Tensor, patch: int) -> Tensor:
    """Cut [..., T, F] into patches [..., N, P].

    Patches are time-major (number = time patch x mel patches + mel patch), pixels row-major (frame, mel bin).
    """
    return x_TF.unflatten(-2, (-1, patch)).unflatten(-1, (-1, patch)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def from_patches(x_NP: Tensor, patch: int) -> Tensor:
    """Join patches [..., N, P] to [..., T, F], the inverse of `to_patches`."""
    blocks = x_NP.unflatten(-2, (-1, NUM_MEL_BINS // patch)).unflatten(-1, (patch, patch))
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
