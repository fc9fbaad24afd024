"""The attention maps of a trained encoder for one clip; a pre-training's encoder is its teacher.

Shapes: T frames, F mel bins or mel patches, N patches, P pixels of a patch, D width, H heads, K = 1 + N tokens with
CLS first.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import read_weights
from asda.config.model import ModelConfig, of_asda
from asda.config.run import Description
from asda.data.clips import Clip
from asda.data.features.fbank import log_mel
from asda.errors import UserError
from asda.models.attention import Attention
from asda.models.encoder import Encoder

ONLY, FIRST, SECOND = "A", "A1", "A2"
ABSOLUTE, SIGNED = "|A1 - lambda A2|", "A1 - lambda A2"


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
    encoder.load_state_dict(_weights(folder))
    return Network(encoder.eval().requires_grad_(False), description)


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "teacher.safetensors").is_file():
        return read_weights(folder, "teacher")
    prefix = "encoder."
    tensors = read_weights(folder, "model")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def clip_log_mel(clip: Clip, description: Description) -> np.ndarray:
    """Return the raw log-mel of a clip, [T, F], padded or cut to the frames that the network was trained on."""
    mel_TF = np.full((description.data.frames, description.model.mel_bins), description.data.pad_log_mel, np.float32)
    found_TF = log_mel(clip.samples)[: len(mel_TF)]
    mel_TF[: len(found_TF)] = found_TF
    return mel_TF


@torch.inference_mode()
def block_inputs(network: Network, mel_TF: np.ndarray) -> list[Tensor]:
    """Return the tokens that enter each block, depth x [1, K, D], for raw log-mel; T is a multiple of the patch."""
    stats, patch = network.description.data.log_mel, network.description.model.patch
    normal_TF = torch.from_numpy((mel_TF - np.float32(stats.mean)) / np.float32(2 * stats.std))
    patches_1NP = normal_TF.unfold(0, patch, patch).unfold(1, patch, patch).reshape(1, -1, patch**2)
    return network.encoder.layers(patches_1NP)[:-1]


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
