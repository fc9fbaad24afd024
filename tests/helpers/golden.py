"""The official models' numbers: their files, their sizes, their parameter names in ours.

A folder of them is described in golden/README.md of the shared folder. A correct fp32 implementation agrees with the
tensors to a relative rms of 1e-5: the official code's own rounding, measured against its fp64 run, reaches 2.2e-6
(json key fp32_vs_fp64), a second implementation rounds as much in another order, and 1e-5 is 3.2 times the sqrt(2) of
both together. tests/golden_check.py compares everything; here is what it and other tests share.

Shapes: B clips, M students of each, S = B * M sequences, N patches of a clip, K visible ones, P pixels of a patch, D
width, T frames, F mel bins.
"""

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from asda.config.base import Section
from asda.config.model import ClassifyConfig, DecoderConfig, MaskConfig, ModelConfig, PretrainConfig
from asda.config.presets import PRESETS
from asda.errors import UserError
from asda.models import attention
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier
from asda.models.masks import visible_indices
from asda.models.pretrain import MaskedStudents, Teacher

REL_RMS = 1e-5
FAMILIES = {"asda": "released", "eat": "eat"}  # the presets that compute what the official code computes
TINY = ModelConfig(width=96, depth=3, heads=4)
TINY_PRETRAIN = PretrainConfig(
    kind="pretrain",
    students=4,
    utterance_weight=0.5 * 2 * 4,  # cls_loss x clips x students
    target_layers=3,
    mask=MaskConfig(block=3),
    decoder=DecoderConfig(layers=2, width=96, groups=4),
)
PATCH = TINY.patch
MEL_BINS = TINY.mel_bins
OFFICIAL_TO_OURS = [
    ("model.", ""),
    ("modality_encoders.IMAGE.extra_tokens", "encoder.cls_token"),
    ("modality_encoders.IMAGE.local_encoder.proj.", "encoder.patch_embed."),
    ("modality_encoders.IMAGE.context_encoder.norm.", "encoder.norm."),
    ("modality_encoders.IMAGE.decoder.blocks.", "decoder.convs."),
    ("modality_encoders.IMAGE.decoder.", "decoder."),
    ("blocks.", "encoder.blocks."),
    ("fc_norm.", "norm."),
]

Checked = TypeVar("Checked", bound=Section)
Loaded = TypeVar("Loaded", bound=nn.Module)


class Table(dict[str, Any]):
    """A golden file, or an object inside one: a missing key is the user's to mend, and what was read is remembered."""

    def __init__(self, content: Mapping[str, Any], source: str):
        super().__init__({k: Table(v, source) if isinstance(v, dict) else v for k, v in content.items()})
        self.source = source
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return super().__getitem__(key)

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.source} has no {key!r}; write the file again with the official model's numbers")

    def under(self, prefix: str) -> "Table":
        """The entries whose names begin with `prefix`, without it."""
        return Table({key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}, self.source)


class Folder:
    """A folder laid out like the shared golden/: NAME.json, NAME.safetensors and, for checkpoints, NAME_official.pt."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give one with golden numbers, such as ../shared/golden")
        self.path = path
        self._tables: dict[str, Table] = {}

    def absent(self, name: str) -> list[str]:
        """Which of the two files of a name are not there."""
        return [file for file in (f"{name}.json", f"{name}.safetensors") if not (self.path / file).is_file()]

    def tensors(self, name: str) -> Table:
        """All tensors of one file, which is read once."""
        if name not in self._tables:
            path = self.path / f"{name}.safetensors"
            try:
                self._tables[name] = Table(load_file(path), path.name)
            except SafetensorError as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
        return self._tables[name]

    def numbers(self, name: str) -> Table:
        """The json beside it: sizes, scalar sums, notes."""
        path = self.path / f"{name}.json"
        try:
            return Table(json.loads(path.read_text()), path.name)
        except ValueError as error:
            raise UserError(f"{path} is not whole JSON ({error}); copy it again") from None

    def checkpoint(self, name: str) -> Table:
        """The official checkpoint's ['model']: parameters, and under "_ema" the teacher's."""
        path = self.path / f"{name}_official.pt"
        try:
            return Table(torch.load(path, weights_only=True)["model"], path.name)
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is not a whole official checkpoint ({reason}); copy it again") from None

    def weights(self, name: str) -> Table:
        """The same parameters from the checkpoint or, where there is none, from the keys state.* of the tensors."""
        if (self.path / f"{name}_official.pt").is_file():
            return self.checkpoint(name)
        state = self.tensors(name).under("state.")
        student = {key: tensor for key, tensor in state.items() if not key.startswith("_ema.")}
        teacher = {key.removeprefix("_ema."): tensor for key, tensor in state.items() if key not in student}
        return Table(student | {"_ema": teacher}, f"{name}.safetensors")


def load(shared: Path, name: str) -> Table:
    """All tensors of one golden file of the shared folder."""
    return Folder(shared / "golden").tensors(name)


def numbers(shared: Path, name: str) -> Table:
    """The json beside a golden file of the shared folder."""
    return Folder(shared / "golden").numbers(name)


def checkpoint(shared: Path, name: str) -> Table:
    """The official checkpoint's parameters, of the shared folder."""
    return Folder(shared / "golden").checkpoint(name)


def our_name(official: str) -> str:
    """A parameter's name in MaskedStudents or Classifier."""
    for theirs, ours in OFFICIAL_TO_OURS:
        if official.startswith(theirs):
            official = ours + official.removeprefix(theirs)
            if ours:
                break
    return official.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "convs" in official else official


def our_parameters(official: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The official tensors that begin with `prefix`, under our names and in our shapes.

    The patch embedding's convolution becomes the matrix that it is, and EAT's q, k and v are parted; the position
    table, which ours computes, is left out, and so is the teacher nested in a checkpoint.
    """
    ours = {}
    for name in official:
        if not name.startswith(prefix) or name.endswith(("positions", "_ema")) or "._ema." in name:
            continue
        tensor, ours_name = official[name], our_name(name.removeprefix(prefix))
        if ".attn.qkv." in ours_name:
            q, k, v = tensor.chunk(3)
            ours[ours_name.replace(".qkv.", ".qk.")] = torch.cat([q, k])
            ours[ours_name.replace(".qkv.", ".v.")] = v
        else:
            ours[ours_name] = tensor.flatten(1) if "patch_embed.weight" in ours_name else tensor
    return ours


def encoder_parameters(official: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The encoder's part of our_parameters, without "encoder." before the names."""
    ours = our_parameters(official, prefix)
    return {name.removeprefix("encoder."): t for name, t in ours.items() if name.startswith("encoder.")}


def patchify(source_B1TF: Tensor) -> Tensor:
    """Log-mel [B, 1, T, F] as patches [B, N, P], time-major, the pixels of a patch frame by frame."""
    blocks = source_B1TF.squeeze(1).unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, time, frame, mel, bin]
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def rel_rms(ours: Tensor, golden: Tensor) -> float:
    """rms(ours - golden) / rms(golden), in fp64."""
    if ours.shape != golden.shape:
        raise UserError(f"a golden tensor has the shape {tuple(golden.shape)} where ours has {tuple(ours.shape)}")
    exact = golden.detach().double()
    return float((ours.detach().double() - exact).norm() / exact.norm())


def without_key_biases(name: str, tensor: Tensor) -> Tensor:
    """`tensor` of parameter `name` without the rows whose true gradient is zero.

    A bias of the keys, the second half of the rows of a qk layer, adds the same number to all logits of a query, so
    softmax ignores it; Adam makes steps of rounding noise there, up to 0.11 of the learning rate.
    """
    return tensor[: len(tensor) // 2] if name.endswith("qk.bias") else tensor


def model_of(family: str, spec: Table, weights: Table) -> ModelConfig:
    """The network of a golden file: its sizes from the json and the weights, the rest from the published preset."""
    prefix = "model." if "model.modality_encoders.IMAGE.extra_tokens" in weights else ""
    image = f"{prefix}modality_encoders.IMAGE."
    patch = weights[image + "local_encoder.proj.weight"].shape[-1]
    num_positions = weights[image + "fixed_positional_encoder.positions"].shape[1]
    return _checked(
        ModelConfig,
        spec,
        width=spec["embed_dim"],
        depth=spec["depth"],
        heads=spec["heads"],
        patch=patch,
        max_time_patches=num_positions * patch // MEL_BINS,
        **PRESETS[FAMILIES[family]]["model"],
    )


@dataclass(frozen=True)
class Pretraining:
    """A pre-training file: what the official students and teacher compute, and how to make ours that compute it."""

    official: Table
    numbers: Table
    weights: Table
    model: ModelConfig
    config: PretrainConfig
    path: attention.AttentionPath = "auto"

    @classmethod
    def read(cls, folder: Folder, family: str, path: attention.AttentionPath = "auto") -> "Pretraining":
        """Read the files `family`_pretrain; attention is to be computed by `path`."""
        name = f"{family}_pretrain"
        numbers, weights = folder.numbers(name), folder.weights(name)
        spec, cfg = numbers["spec"], numbers["model_cfg"]
        image, size = cfg["modalities"]["image"], cfg["modalities"]["image"]["decoder"]
        decoder = _checked(
            DecoderConfig,
            spec,
            layers=size["decoder_layers"],
            width=size["decoder_dim"],
            kernel=size["decoder_kernel"],
            groups=size["decoder_groups"],
            noise_std=image["mask_noise_std"],
        )
        config = _checked(
            PretrainConfig,
            spec,
            kind="pretrain",
            students=spec["clones"],
            utterance_weight=cfg["cls_loss"] * spec["clips"] * spec["clones"],  # theirs is a sum, ours a mean
            target_layers=cfg["average_top_k_layers"],
            decoder=decoder,
        )
        return cls(folder.tensors(name), numbers, weights, model_of(family, spec, weights), config, path)

    @property
    def patches(self) -> Tensor:
        """The clips, [B, N, P]."""
        return patchify(self.official["input.source"])

    @property
    def masked(self) -> Tensor:
        """True where a student must predict, [S, N]."""
        return self.official["input.mask"].bool()

    @property
    def noise(self) -> Tensor:
        """The official noise at the masked patches, [S, N, D]; nothing else of it may be read."""
        noise_SND = torch.full((*self.masked.shape, self.model.width), math.nan)
        noise_SND[self.masked] = self.official["fwd.decoder.mask_noise_by_position"]
        return noise_SND

    def visible_of(self, mask_SN: Tensor) -> Tensor:
        """Official masks, 1 = masked, as our indices [B, M, K]."""
        visible_SK = visible_indices(mask_SN.numpy() == 0)
        return torch.from_numpy(visible_SK).unflatten(0, (-1, self.config.students))

    def students(self) -> MaskedStudents:
        """Ours with the official weights."""
        students = MaskedStudents(self.model, self.config)
        return loaded(students, our_parameters(self.weights), self.weights.source, self.path)

    def teacher(self, students: MaskedStudents) -> Teacher:
        """Ours with the official teacher's weights, which were drawn independently of the students'."""
        teacher = Teacher(students.encoder, self.config.target_layers)
        loaded(teacher.encoder, encoder_parameters(self.weights["_ema"]), self.weights.source, self.path)
        return teacher

    def losses(self, students: MaskedStudents):
        """The losses of `students` on the official input, targets and noise."""
        return students(
            self.patches,
            self.visible_of(self.official["input.mask"]),
            self.official["fwd.targets.y"],
            self.official["fwd.targets.cls"],
            self.noise,
        )


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning file: logits, losses and gradients of an official classifier, and how to make ours."""

    official: Table
    numbers: Table
    weights: Table
    model: ModelConfig
    path: attention.AttentionPath = "auto"

    @classmethod
    def read(cls, folder: Folder, family: str, path: attention.AttentionPath = "auto") -> "Finetuning":
        """Read the files `family`_finetune; attention is to be computed by `path`."""
        name = f"{family}_finetune"
        numbers, weights = folder.numbers(name), folder.weights(name)
        return cls(folder.tensors(name), numbers, weights, model_of(family, numbers["spec"], weights), path)

    def classifier(self, **changes: object) -> Classifier:
        """Ours with the official weights, in evaluation mode; `changes` to its ClassifyConfig."""
        classifier = Classifier(self.model, classify_config(**changes), self.numbers["num_classes"])
        return loaded(classifier, our_parameters(self.weights), self.weights.source, self.path).eval()


def classify_config(**changes: object) -> ClassifyConfig:
    """A classifier's configuration from scratch with bce, and `changes`."""
    return ClassifyConfig.model_validate({"kind": "classify", "init_from": "", "loss": "bce"} | changes)


def loaded(module: Loaded, parameters: dict[str, Tensor], source: str, path: attention.AttentionPath) -> Loaded:
    """`module` with these parameters, its attention computed by `path`; strict about names and shapes."""
    try:
        module.load_state_dict(parameters)
    except RuntimeError as error:
        raise UserError(f"the weights of {source} do not fit: {' '.join(str(error).split())[:300]}") from None
    set_attention_path(module, path)
    return module


def _checked(section: type[Checked], spec: Table, **values: Any) -> Checked:
    try:
        return section(**values)
    except ValidationError as error:
        raise UserError(f"{spec.source} describes no {section.__name__}: {error.errors()[0]['msg']}") from None
