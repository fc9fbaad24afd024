"""The objectives of a run: masked students follow their teacher, or a classifier learns labels.

The training loop (asda/trainer.py) knows both as an Objective and asks neither what it is.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asda.checkpoint.read import resolve_checkpoint
from asda.checkpoint.weights import load_encoder
from asda.config.model import ClassifyConfig, PretrainConfig, of_asda
from asda.config.run import Config
from asda.data.stream import Batch, MaskMaker
from asda.engine.ema import Ema, ema_decay
from asda.engine.zero import full_weights
from asda.errors import UserError
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier, classification_loss, lr_scales
from asda.models.masks import visible_patches
from asda.models.pretrain import MaskedStudents, Teacher

Terms = dict[str, Tensor]
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by engine.precision


class Objective:
    """The interface for the training loop; its defaults fit an objective without students and teacher.

    Other objectives are classes like those below, named in make_objective. They set `module`, which DeepSpeed trains,
    and `lr_scales`: parameter name -> factor of its learning rate; 1 if it is missing.
    """

    module: nn.Module
    lr_scales: dict[str, float]

    @property
    def teacher(self) -> Teacher | None:
        """The network that follows the trained one, whole on every rank; None if there is none."""
        return None

    def follow(self, engine: Any) -> None:
        """Take note of the engine that trains `module` from now on."""
        self._engine = engine

    def masks(self) -> MaskMaker | None:
        """Return what draws the patches that the students of a clip see: rng -> [M, K] int64. None: no students."""
        return None

    def loss(self, engine: Any, patches_BNP: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """Return the loss of a micro-batch, a scalar to differentiate, and its terms for the log."""
        raise NotImplementedError

    def after_update(self, num_updates: int) -> dict[str, float]:
        """Do what follows update number `num_updates` of the weights; return figures for the log."""
        return {}

    def weights(self, everywhere: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint publishes: file stem -> whole tensors, fp32, as engine.zero.full_weights does."""
        return {"model": full_weights(self._engine, everywhere)}

    def restore(self, folder: Path) -> None:
        """Take from a checkpoint what the engine does not hold; by default, it holds everything."""


class Pretraining(Objective):
    """Students that see a fifth of a clip predict what the teacher makes of the whole clip."""

    def __init__(self, config: Config, objective: PretrainConfig, device: torch.device):
        self._config, self._objective = config, objective
        students = MaskedStudents(of_asda(config.model), objective)
        set_attention_path(students, config.engine.attention)
        students.encoder.recompute = config.engine.activation_checkpointing
        self._teacher = Teacher(students.encoder, objective.target_layers).to(device)
        self.module, self.lr_scales = students, {}
        self._dtype = PRECISIONS[config.engine.precision]

    @property
    def teacher(self) -> Teacher:
        """The EMA of the students' encoder."""
        return self._teacher

    def follow(self, engine: Any) -> None:
        """Let the teacher average this engine's master weights from now on."""
        super().follow(engine)
        self._ema = Ema(engine, self.teacher.encoder, self._dtype)

    def masks(self) -> MaskMaker:
        """Return what draws the visible patches of all students of one clip: rng -> [M, K] int64."""
        patch = self._config.model.patch
        grid = (self._config.data.frames // patch, self._config.model.mel_bins // patch)
        return partial(visible_patches, num_masks=self._objective.students, grid=grid, config=self._objective.mask)

    def loss(self, engine: Any, patches_BNP: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """Compute the teacher's targets once a clip, then the loss of all students of all clips."""
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
        """Let the teacher follow the students."""
        decay = ema_decay(self._objective.ema, num_updates)
        self._ema.update(decay)
        return {"ema_decay": decay}

    def weights(self, everywhere: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return the students' module and the teacher."""
        return super().weights(everywhere) | {"teacher": self._ema.weights(everywhere)}

    def restore(self, folder: Path) -> None:
        """Take the teacher from a checkpoint."""
        self._ema.restore(folder / "teacher.safetensors")


class Classification(Objective):
    """A classifier on the encoder, pre-trained or from scratch."""

    def __init__(self, config: Config, objective: ClassifyConfig, vocabulary: tuple[str, ...], *, resumed: bool):
        if not vocabulary:
            raise UserError(f"{config.data.train} has no labels; objective.kind classify needs shards made with labels")
        self._config, self._objective, self._num_classes = config, objective, len(vocabulary)
        self.module = Classifier(config.model, objective, len(vocabulary))
        if objective.init_from and not resumed:
            folder = resolve_checkpoint(Path(objective.init_from))
            load_encoder(self.module.encoder, config.model, folder, objective.init_weights)
        set_attention_path(self.module, config.engine.attention)
        self.module.set_recompute(config.engine.activation_checkpointing)
        self.lr_scales = lr_scales(self.module, objective.layer_decay)

    def loss(self, engine: Any, patches_BNP: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """Compute the cross-entropy or binary cross-entropy of the clips."""
        targets_BC = torch.from_numpy(batch.targets(self._num_classes)).to(patches_BNP.device)
        present_BN = batch.present(self._config, patches_BNP.device)
        loss = classification_loss(engine(patches_BNP, present_BN), targets_BC, self._objective)
        return loss, {"loss": loss}


def make_objective(
    config: Config, vocabulary: tuple[str, ...], device: torch.device, *, resumed: bool = False
) -> Objective:
    """Make the objective that the configuration asks for, freshly initialised from run.seed.

    If `resumed`, a checkpoint will replace all weights, and objective.init_from need not exist any more.

    Raises:
        UserError: labels are missing, or objective.init_from does not fit.
    """
    torch.manual_seed(config.run.seed)
    if isinstance(config.objective, PretrainConfig):
        return Pretraining(config, config.objective, device)
    return Classification(config, config.objective, vocabulary, resumed=resumed)
