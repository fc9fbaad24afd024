"""The attention maps of a trained encoder, and how much of its attention falls on irrelevant context.

docs/attention_measure.md defines the measure. Half of each clip is replaced by half of an unrelated clip, or by noise.
The measure is the weight that the patches of the other half (or CLS) put on the replaced half, relative to uniform
attention. Attention also falls with distance, so it is compared with the weight that they put on the same half before.

Shapes: T frames, F mel bins or mel patches, N patches, D width, H heads, Q queries, K = 1 + N tokens with CLS first,
B clips, L blocks, R bootstrap samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import load_encoder
from asda.config.model import ModelConfig, of_asda
from asda.config.run import Description
from asda.data.audio.waves import INT16_SCALE
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.features.fbank import log_mel, num_frames, num_samples
from asda.data.order import Draw
from asda.errors import UserError
from asda.models.attention import Attention
from asda.models.encoder import Encoder
from asda.models.patches import normalised, padded, to_patches

ONLY, FIRST, SECOND = "A", "A1", "A2"
ABSOLUTE, SIGNED = "|A1 - lambda A2|", "A1 - lambda A2"
RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)

Context = Literal["clip", "noise"]
Query = Literal["patches", "cls"]


@dataclass(frozen=True)
class Network:
    """An encoder, and the description of its input."""

    encoder: Encoder
    description: Description

    @property
    def model(self) -> ModelConfig:
        """The sizes and the lambda of the encoder."""
        return of_asda(self.description.model)

    @property
    def main_map(self) -> str:
        """The name of the map by which the network mixes values, without its sign."""
        return ONLY if self.model.attention_lambda == "absent" else ABSOLUTE


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


def load_network(path: Path) -> Network:
    """Load the encoder of a run, a checkpoint or converted weights; the teacher, if there is one.

    Raises:
        UserError: there is no intact checkpoint, or its network has no such attention.
    """
    folder = resolve_checkpoint(path)
    description = read_description(folder)
    if not isinstance(description.model, ModelConfig):
        raise UserError(f"{path} holds a network of another kind, whose attention cannot be shown; leave it out")
    encoder = Encoder(description.model)
    which = "teacher" if (folder / "teacher.safetensors").is_file() else "student"
    load_encoder(encoder, description.model, folder, which)
    return Network(encoder.eval().requires_grad_(False), description)


def clip_log_mel(clip: Clip, description: Description) -> np.ndarray:
    """Return the raw log-mel of a clip, [T, F], padded or cut to the frames that the network was trained on."""
    data = description.data
    return padded(torch.from_numpy(log_mel(clip.samples)), data.frames, data.pad_log_mel).numpy()


@torch.inference_mode()
def block_inputs(network: Network, mel_TF: np.ndarray) -> list[Tensor]:
    """Return the tokens that enter each block, depth x [1, K, D], for raw log-mel; T is a multiple of the patch."""
    stats, patch = network.description.data.log_mel, network.description.model.patch
    normal_TF = normalised(torch.from_numpy(mel_TF), stats.mean, stats.std)
    return [tokens_1KD for tokens_1KD, _ in network.encoder.steps(to_patches(normal_TF[None], patch))]


@torch.inference_mode()
def named_maps(attention: Attention, tokens_1KD: Tensor) -> dict[str, Tensor]:
    """Return the maps of one block by name, each [H, K, K] in fp64: A, or A1, A2 and their difference.

    Rows of A, A1 and A2 sum to 1, rows of the signed difference to 1 - lambda; the absolute one is not normalised.
    """
    first, *second = (map_1HKK[0].double() for map_1HKK in attention.maps(tokens_1KD))
    if not second:
        return {ONLY: first}
    difference = first - float(attention.current_lambda()) * second[0]
    return {FIRST: first, SECOND: second[0], ABSOLUTE: difference.abs(), SIGNED: difference}


def attention_of(network: Network, block: int) -> Attention:
    """Return the attention of a block; -1 is the last."""
    attention = network.encoder.blocks[block].get_submodule("attn")
    assert isinstance(attention, Attention)
    return attention


def on_patches(row_N: Tensor, network: Network) -> np.ndarray:
    """Return the weights of patches as multiples of their mean, in the grid of the clip: [time, mel] patches."""
    columns = network.description.model.mel_bins // network.description.model.patch
    return (row_N / row_N.mean()).reshape(-1, columns).numpy()


def relative_share(weights_HQN: Tensor, irrelevant_N: Tensor) -> float:
    """Return the share of the weight that lies on irrelevant patches, over their share of all patches.

    1 is uniform attention, 0 no weight on them, and N / irrelevant patches all of it. Every query of every head counts
    alike. Weights are not negative, and their rows need not sum to 1: the weight on CLS does not count.
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


def measure(network: Network, mixtures: Sequence[Mixture], query: Query = "patches") -> dict[str, np.ndarray]:
    """Return relative shares by map, each [L, 2, B]: on the replaced half, after and before it was replaced."""
    found: dict[str, list[np.ndarray]] = {}
    for mixture in mixtures:
        after, before = (_shares(network, mel_TF, mixture, query) for mel_TF in (mixture.mixed_TF, mixture.own_TF))
        for name, after_L in after.items():
            found.setdefault(name, []).append(np.stack([after_L, before[name]], axis=1))
    return {name: np.stack(each, axis=-1) for name, each in found.items()}


def _shares(network: Network, mel_TF: np.ndarray, mixture: Mixture, query: Query) -> dict[str, list[float]]:
    """Return the relative shares of one clip by map, L of each."""
    found: dict[str, list[float]] = {}
    for block, tokens_1KD in enumerate(block_inputs(network, mel_TF)):
        num_patches = tokens_1KD.shape[1] - 1
        irrelevant_N = (torch.arange(num_patches) < num_patches // 2) == mixture.replaced_first
        for name, map_HKK in named_maps(attention_of(network, block), tokens_1KD).items():
            rows_HQN = map_HKK[:, :1, 1:] if query == "cls" else map_HKK[:, 1:, 1:][:, ~irrelevant_N]
            share = net_relative_share if name == SIGNED else relative_share
            found.setdefault(name, []).append(share(rows_HQN, irrelevant_N))
    return found


def mean_estimate(values_B: np.ndarray) -> Estimate:
    """Estimate the mean over clips."""
    return ratio_estimate(values_B, np.ones_like(values_B))


def ratio_estimate(above_B: np.ndarray, below_B: np.ndarray) -> Estimate:
    """Estimate the ratio of two means over the same clips, which are resampled together."""
    draws_RB = np.random.default_rng(0).integers(len(above_B), size=(RESAMPLES, len(above_B)))
    ratios_R = above_B[draws_RB].mean(1) / below_B[draws_RB].mean(1)
    return Estimate(float(above_B.mean() / below_B.mean()), *np.percentile(ratios_R, INTERVAL_PERCENT).tolist())


def choose_clips(dataset: ClipDataset, num_clips: int, seed: int) -> list[Clip]:
    """Choose so many clips at random, or all if there are fewer."""
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:num_clips]
    return read_clips(dataset, [Draw(0, int(number)) for number in chosen])


def make_mixtures(clips: Sequence[Clip], networks: Sequence[Network], context: Context, seed: int) -> list[Mixture]:
    """Make a mixture of each clip, with another one that shares no label with it or with white noise as loud.

    All have as many frames as the shortest clip, and at most as many as the networks were trained on. Halves meet at
    the border of a patch, so that no patch holds both.

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
