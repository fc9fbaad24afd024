"""Measure how much attention falls on irrelevant context; docs/attention_measure.md defines the measure.

Half of each clip is replaced by half of an unrelated clip, or by noise. The measure is the weight that the patches of
the other half (or CLS) put on the replaced half, relative to uniform attention. Attention also falls with distance, so
it is compared with the weight that they put on the same half before.

Shapes: T frames, F mel bins, N patches, H heads, Q queries, K = 1 + N tokens with CLS first, B clips, L blocks,
R bootstrap samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from asda.data.audio.waves import INT16_SCALE
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.features.fbank import log_mel, num_frames, num_samples
from asda.data.order import Draw
from asda.errors import UserError
from asda.evaluation.attention_maps import SIGNED, Network, attention_of, block_inputs, named_maps

Context = Literal["clip", "noise"]
Query = Literal["patches", "cls"]
RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)


class Mixture(NamedTuple):
    """A clip, and the same clip with one half replaced; raw log-mel."""

    own_TF: np.ndarray
    mixed_TF: np.ndarray
    replaced_first: bool  # whether the first half of the frames was replaced; otherwise the second was


@dataclass(frozen=True)
class Estimate:
    """A figure of some clips, with its 95 % bootstrap interval over them."""

    value: float
    low: float
    high: float


def relative_share(weights_HQN: Tensor, irrelevant_N: Tensor) -> float:
    """Return the share of the weight that lies on irrelevant patches, over their share of all patches.

    1 is uniform attention, 0 no weight on them, and N / irrelevant patches all of it. Every query of every head counts
    alike.

    Args:
        weights_HQN: not negative; rows need not sum to 1: the weight on CLS does not count.
        irrelevant_N: True where a patch is irrelevant.
    """
    share_HQ = weights_HQN[..., irrelevant_N].sum(-1) / weights_HQN.sum(-1)
    return float(share_HQ.mean() / irrelevant_N.double().mean())


def net_relative_share(weights_HQN: Tensor, irrelevant_N: Tensor) -> float:
    """Return the relative share of signed weights, which may cancel out: a ratio of sums over all queries and heads.

    It is negative if more is subtracted than added, and nan if the sum over all patches is not positive.
    """
    total = float(weights_HQN.sum())
    share = float(weights_HQN[..., irrelevant_N].sum()) / total if total > 0 else math.nan
    return share / float(irrelevant_N.double().mean())


def clip_shares(network: Network, mixture: Mixture, query: Query = "patches") -> dict[str, np.ndarray]:
    """Return relative shares of one mixture by map, each [L, 2]: on the replaced half, after and before."""
    after, before = (_shares(network, mel_TF, mixture, query) for mel_TF in (mixture.mixed_TF, mixture.own_TF))
    return {name: np.stack([after[name], before[name]], axis=1) for name in after}


def _shares(network: Network, mel_TF: np.ndarray, mixture: Mixture, query: Query) -> dict[str, np.ndarray]:
    """Return relative shares by map, each [L]."""
    found: dict[str, list[float]] = {}
    for block, tokens_1KD in enumerate(block_inputs(network, mel_TF)):
        num_patches = tokens_1KD.shape[1] - 1
        irrelevant_N = tokens_1KD.new_zeros(num_patches).bool()
        half = slice(0, num_patches // 2) if mixture.replaced_first else slice(num_patches // 2, None)
        irrelevant_N[half] = True
        for name, map_HKK in named_maps(attention_of(network, block), tokens_1KD).items():
            rows_HQN = map_HKK[:, :1, 1:] if query == "cls" else map_HKK[:, 1:, 1:][:, ~irrelevant_N]
            share = net_relative_share if name == SIGNED else relative_share
            found.setdefault(name, []).append(share(rows_HQN, irrelevant_N))
    return {name: np.array(values) for name, values in found.items()}


def measure(network: Network, mixtures: Sequence[Mixture], query: Query = "patches") -> dict[str, np.ndarray]:
    """Return the clip_shares of all mixtures: by map [L, 2, B]."""
    each = [clip_shares(network, mixture, query) for mixture in mixtures]
    return {name: np.stack([shares[name] for shares in each], axis=-1) for name in each[0]}


def mean_estimate(values_B: np.ndarray) -> Estimate:
    """Estimate the mean over clips, with the percentile interval of RESAMPLES bootstrap samples."""
    means_R = values_B[_resampled(len(values_B))].mean(1)
    return Estimate(float(values_B.mean()), *np.percentile(means_R, INTERVAL_PERCENT).tolist())


def ratio_estimate(above_B: np.ndarray, below_B: np.ndarray) -> Estimate:
    """Estimate the ratio of two means over the same clips, which are resampled together."""
    draws_RB = _resampled(len(above_B))
    ratios_R = above_B[draws_RB].mean(1) / below_B[draws_RB].mean(1)
    return Estimate(float(above_B.mean() / below_B.mean()), *np.percentile(ratios_R, INTERVAL_PERCENT).tolist())


def _resampled(num_clips: int) -> np.ndarray:
    return np.random.default_rng(0).integers(num_clips, size=(RESAMPLES, num_clips))


def choose_clips(dataset: ClipDataset, num_clips: int, seed: int) -> list[Clip]:
    """Choose so many clips at random, or all if there are fewer."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:num_clips]
    return read_clips(dataset, [Draw(0, int(number)) for number in chosen])


def make_mixtures(clips: Sequence[Clip], networks: Sequence[Network], context: Context, seed: int) -> list[Mixture]:
    """Make a mixture of each clip that all networks can take.

    All have as many frames as the shortest clip, and at most as many as the networks were trained on. Halves meet at
    the border of a patch, so that no patch holds both.

    Args:
        clips: each is mixed with another one of them that shares no label with it.
        networks: the networks to compare.
        context: another clip, or white noise as loud as the clip.
        seed: of the choices and of the noise.

    Raises:
        UserError: a clip is too short, or no other clip is unrelated to it.
    """
    frames = _common_frames(clips, networks)
    rng = np.random.default_rng(seed)
    mixtures = []
    for number, clip in enumerate(clips):
        other_S = _noise_like(clip, rng) if context == "noise" else _unrelated(clips, number, rng).samples
        own_TF, other_TF = (log_mel(samples_S)[:frames] for samples_S in (clip.samples, other_S))
        replaced_first = bool(rng.integers(2))
        halves = (other_TF, own_TF) if replaced_first else (own_TF, other_TF)
        mixed_TF = np.concatenate([halves[0][: frames // 2], halves[1][frames // 2 :]])
        mixtures.append(Mixture(own_TF, mixed_TF, replaced_first))
    return mixtures


def _common_frames(clips: Sequence[Clip], networks: Sequence[Network]) -> int:
    """Return the frames of every mixture: two halves of whole patches."""
    unit = 2 * math.lcm(*(network.description.model.patch for network in networks))
    shortest = min(clips, key=lambda clip: len(clip.samples))
    have, taken = num_frames(len(shortest.samples)), min(network.description.data.frames for network in networks)
    if min(have, taken) < unit:
        short = f"clip {shortest.key} has {have}" if have < unit else f"a network's data.frames is {taken}"
        raise UserError(f"{short} frames of 10 ms; a mixture needs {unit}, two halves of a patch")
    return min(have, taken) // unit * unit


def _unrelated(clips: Sequence[Clip], number: int, rng: np.random.Generator) -> Clip:
    labels = set(clips[number].labels)
    others = [clip for other, clip in enumerate(clips) if other != number and labels.isdisjoint(clip.labels)]
    if not others:
        raise UserError(
            f"clip {clips[number].key} shares a label with all of the {len(clips)} clips chosen, so none is unrelated; "
            "take more clips, data of several classes, or --context noise"
        )
    return others[rng.integers(len(others))]


def _noise_like(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """Return white noise of the clip's length and mean energy, float32 of full scale 1."""
    num = num_samples(num_frames(len(clip.samples)))
    return (rng.standard_normal(num) * clip.samples.std() / INT16_SCALE).astype(np.float32)
