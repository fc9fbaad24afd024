"""What a run learns: masked students against their teacher, or labels. The loop knows both by the same names:

    module             what DeepSpeed trains
    lr_scales          parameter name -> factor of its learning rate
    masks()            draws what the students of a clip see, if there are students
    loss(...)          one micro-batch -> the loss to differentiate, and its terms for the log
    follow(engine)     once DeepSpeed has taken the module over
    after_update(...)  once the weights have moved
    weights()          file stem -> tensors, what a checkpoint publishes, on the first rank
    restore(...)       takes back what the engine does not hold

What both share lies in asda/train.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import misfit, read_weights
from asda.config.model import AstConfig, ClassifyConfig, ModelConfig, PretrainConfig, of_asda
from asda.config.run import Config
from asda.data.batches import Batch
from asda.data.stream import MaskMaker
from asda.engine.ema import Ema, ema_decay
from asda.engine.zero import full_weights
from asda.errors import UserError
from asda.models.ast import fitted_positions
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier, classification_loss, lr_scales
from asda.models.masks import visible_patches
from asda.models.pretrain import MaskedStudents, Teacher

# Keys of the model section that may differ between an encoder and the checkpoint that it starts from
NOT_OF_THE_ENCODER = ("max_time_patches", "frames", "conformer", "channel_attention")
Terms = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by engine.precision


class Pretraining:
    """Students that see a fifth of a clip predict what the teacher makes of all of it."""

    def __init__(self, config: Config, objective: PretrainConfig, device: torch.device):
        self._config, self._objective = config, objective
        self.module = MaskedStudents(of_asda(config.model), objective)
        set_attention_path(self.module, config.engine.attention)
        self.module.encoder.recompute = config.engine.activation_checkpointing
        self.teacher = Teacher(self.module.encoder, objective.target_layers).to(device)
        self.lr_scales: dict[str, float] = {}
        self._dtype = DTYPES[config.engine.precision]

    def follow(self, engine: Any) -> None:
        """From now on the teacher averages this engine's master weights."""
        self._engine = engine
        self._ema = Ema(engine, self.teacher.encoder, self._dtype)

    def masks(self) -> MaskMaker:
        """Draws the visible patches of all students of one clip: rng -> [M, K] int64."""
        patch = self._config.model.patch
        grid = (self._config.data.frames // patch, self._config.model.mel_bins // patch)
        return partial(visible_patches, num_masks=self._objective.students, grid=grid, config=self._objective.mask)

    def loss(self, engine: Any, patches_BNP: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """Teacher targets once a clip, then all students of all clips."""
        assert batch.visible_BMK is not None
        visible_BMK = torch.from_numpy(batch.visible_BMK).to(patches_BNP.device, non_blocking=True)
        with torch.autocast(patches_BNP.device.type, self._dtype, enabled=self._dtype != torch.float32):
            targets = self.teacher.targets(patches_BNP)
        losses = engine(patches_BNP, visible_BMK, targets.tokens, targets.cls)
        terms = {
            "loss": losses.total,
            "frame_loss": losses.frame,
            "utterance_loss": losses.utterance,
            "prediction_variance": losses.pred_var,
            "target_variance": targets.target_var,
        }
        return losses.total, terms

    def after_update(self, num_updates: int) -> dict[str, float]:
        """The teacher follows the student; num_updates counts applied steps."""
        decay = ema_decay(self._objective.ema, num_updates)
        self._ema.update(decay)
        return {"ema_decay": decay}

    def weights(self, everywhere: bool = False) -> dict[str, dict[str, Tensor]]:
        """The students' module and the teacher, fp32; see engine.full_weights for who gets them and what they are."""
        return {"model": full_weights(self._engine, everywhere), "teacher": self._ema.weights(everywhere)}

    def restore(self, folder: Path) -> None:
        """Take the teacher from a checkpoint; asda/engine/partitions.py restores the rest."""
        self._ema.restore(folder / "teacher.safetensors")


class Classification:
    """Labels from the CLS token."""

    def __init__(self, config: Config, objective: ClassifyConfig, vocabulary: tuple[str, ...], *, goes_on: bool):
        if not vocabulary:
            raise UserError(f"{config.data.train} has no labels; objective.kind classify needs shards made with labels")
        self._config, self._objective, self._num_classes = config, objective, len(vocabulary)
        self.module = Classifier(config.model, objective, len(vocabulary))
        if objective.init_from and not goes_on:
            _load_encoder(self.module, objective, config.model)
        set_attention_path(self.module, config.engine.attention)
        self.module.set_recompute(config.engine.activation_checkpointing)
        self.lr_scales = lr_scales(self.module, objective.layer_decay)

    def follow(self, engine: Any) -> None:
        """Nothing follows a classifier."""
        self._engine = engine

    def masks(self) -> None:
        """A classifier sees everything."""

    def loss(self, engine: Any, patches_BNP: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """Cross-entropy or binary cross-entropy over the clips."""
        targets_BC = torch.from_numpy(batch.targets(self._num_classes)).to(patches_BNP.device)
        present_BN = batch.present(self._config, patches_BNP.device)
        loss = classification_loss(engine(patches_BNP, present_BN), targets_BC, self._objective)
        return loss, {"loss": loss}

    def after_update(self, num_updates: int) -> dict[str, float]:
        """Nothing follows a classifier."""
        return {}

    def weights(self, everywhere: bool = False) -> dict[str, dict[str, Tensor]]:
        """The classifier; see engine.full_weights for who gets it and what it is."""
        return {"model": full_weights(self._engine, everywhere)}

    def restore(self, folder: Path) -> None:
        """The engine holds everything."""


Objective = Pretraining | Classification


def make_objective(
    config: Config, vocabulary: tuple[str, ...], device: torch.device, *, goes_on: bool = False
) -> Objective:
    """The objective that the configuration asks for, freshly initialised from run.seed.

    Args:
        config: the run.
        vocabulary: the labels of its clips.
        device: where a teacher is made.
        goes_on: whether a checkpoint will replace all weights; then objective.init_from need not be there any more.
    """
    torch.manual_seed(config.run.seed)
    if isinstance(config.objective, PretrainConfig):
        return Pretraining(config, config.objective, device)
    return Classification(config, config.objective, vocabulary, goes_on=goes_on)


def _load_encoder(classifier: Classifier, objective: ClassifyConfig, model: ModelConfig | AstConfig) -> None:
    """Start from a pre-trained encoder: the students' weights as published recipes do, or the teacher's.

    A classifier gives its encoder too. The longest clip may differ: ASDA's positions are computed, and AST's learned
    ones are fitted. What HAM-AST puts on the encoder starts from scratch.
    """
    folder = resolve_checkpoint(Path(objective.init_from))
    saved = read_description(folder).model
    theirs, ours = saved.model_dump(), model.model_dump()
    differing = [name for name in ours if ours[name] != theirs.get(name) and name not in NOT_OF_THE_ENCODER]
    if differing:
        name = differing[0]
        raise UserError(
            f"objective.init_from {folder} was trained with model.{name} {theirs.get(name)}, this run has "
            f"{ours[name]}; use the same model section"
        )
    stem = "model" if objective.init_weights == "student" else "teacher"
    if stem == "teacher" and not (folder / "teacher.safetensors").is_file():
        raise UserError(
            f"objective.init_weights is teacher, but {folder} holds no teacher (classifiers and some published "
            "checkpoints have none); use objective.init_weights=student"
        )
    weights = read_weights(folder, stem)
    if stem == "model":
        prefix = "encoder."
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    if isinstance(model, AstConfig) and isinstance(saved, AstConfig) and "positions" in weights:
        weights["positions"] = fitted_positions(weights["positions"], saved.grid, model.grid)
    complaint = misfit(classifier.encoder.state_dict(), weights)
    if complaint:
        raise UserError(f"{folder}/{stem}.safetensors does not fit its config.json: {complaint}")
    classifier.encoder.load_state_dict(weights)
