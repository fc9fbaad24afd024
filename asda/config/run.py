"""A run as data: one tree of sections, checked once. asda/config/load.py reads it from a JSON file.

Every level refuses unknown keys and names the nearest known one. Values carry their unit in the name or in the comment
beside them. Defaults are the released ASDA recipe; a preset and a size replace them (asda/config/presets.py), and the
config.json of a run has every value.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from asda.config.base import Count, Fraction, MayChange, NonNegative, PositiveFloat, PositiveInt, Preset, Section, Size
from asda.config.data import DataConfig, DataSpecs, InputConfig
from asda.config.load import apply_override, explain, pop_retired_keys, read_json_object, wrong_text
from asda.config.model import AnyModelConfig, ClassifyConfig, ModelConfig, PretrainConfig, of_asda
from asda.config.presets import DEFAULT_PRESET, DEFAULT_SIZE, filled
from asda.errors import UserError, say

Kind = TypeVar("Kind", "Config", "Description")
Data = TypeVar("Data", DataConfig, InputConfig)


class StepDecayConfig(Section):
    """The learning rate is multiplied by `factor` at update `start`, and again every `every` updates (AST)."""

    factor: Annotated[float, Field(gt=0, le=1)]
    every: PositiveInt
    start: Count


class OptimizerConfig(Section):
    """AdamW and its schedule: linear warm-up from 0, then a cosine or steps. A step is one update of the weights."""

    steps: PositiveInt
    warmup_steps: Count
    lr: PositiveFloat
    min_lr: NonNegative = 0.0  # at the end of a cosine, and the least in steps
    schedule: Literal["cosine", "steps"] = "cosine"  # after the warm-up
    step_decay: StepDecayConfig | None = None  # of schedule steps
    # The floor of a layer whose rate objective.layer_decay scales: scaled too, or the same for all ("absolute", as in
    # fairseq: a layer whose peak is below it has a constant rate)
    lr_floor: Literal["scaled", "absolute"] = "scaled"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.05
    clip: NonNegative = 4.0  # global gradient norm; 0 does not clip
    batch: PositiveInt  # clips per step, over all ranks

    @model_validator(mode="after")
    def fits(self) -> Self:
        """Refuse a rate that would rise, the schedule steps without step_decay, and step_decay without steps."""
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr {self.min_lr:g} must not be above optimizer.lr {self.lr:g}; lower it")
        if (self.schedule == "steps") != (self.step_decay is not None):
            raise ValueError(
                f"optimizer.schedule is {self.schedule}: schedule steps needs optimizer.step_decay (factor, every, "
                "start), and no other schedule takes it"
            )
        return self


class EngineConfig(Section):
    """How DeepSpeed runs it; most of it may differ between machines without changing the recipe."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and activations; the master weights are fp32
    attention: MayChange[Literal["auto", "explicit", "sdpa", "triton"]] = "auto"  # auto takes the fastest
    # What is partitioned over ranks: 1 optimizer, 2 gradients too, 3 weights too
    zero_stage: MayChange[Annotated[int, Field(ge=0, le=3)]] = 1
    micro_batch: MayChange[PositiveInt] = 12  # most clips per rank at once; the rest of a batch is accumulated
    activation_checkpointing: MayChange[bool] = False  # keep only the input of each block, recompute it in backward
    offload_optimizer: MayChange[bool] = False  # the optimizer's state in the host's memory; stages 1 to 3
    timeout_s: MayChange[PositiveFloat] = 600.0  # longest that a rank waits for the others in one exchange


class RunConfig(Section):
    """The folder of the run, and how often it logs, saves and evaluates, in steps."""

    folder: MayChange[Annotated[str, Field(min_length=1)]]
    seed: Count = 1
    log_every: MayChange[PositiveInt] = 20
    save_every: MayChange[PositiveInt] = 1000
    eval_every: MayChange[PositiveInt] = 1000
    keep: MayChange[PositiveInt] = 2  # newest checkpoints kept
    keep_best: MayChange[Literal["", "accuracy", "mAP"]] = ""  # metric on data.valid whose best checkpoint is kept too
    on_failed_save: MayChange[Literal["stop", "continue"]] = "stop"  # when a checkpoint cannot be written (disk full)
    max_bad_steps: MayChange[PositiveInt] = 10  # in a row, without a finite loss and gradient; then the run ends
    check_replicas_every: MayChange[Count] = 1000  # steps between comparisons of all ranks' weights; 0: never
    min_target_spread: MayChange[NonNegative] = 0.1  # a smaller spread of the targets is warned of: collapse
    min_prediction_spread: MayChange[NonNegative] = 0.01  # the same of the students' predictions
    wandb: MayChange[str] = ""  # project of Weights & Biases that gets the figures too; needs the extra wandb


class ProbeConfig(Section):
    """Labelled shards on which the teacher's features are evaluated in pre-training, every run.eval_every steps."""

    train: DataSpecs  # neighbours and the linear layer come from these
    test: DataSpecs  # held out
    neighbours: PositiveInt = 10


class Network(Section, Generic[Data]):
    """Base of a run and of its weights: the network, its objective and its input."""

    # The story of the run: source, expected metric, hardware, command
    about: MayChange[dict[str, str]] = Field(default={}, alias="_about")
    preset: MayChange[Preset] = DEFAULT_PRESET  # preset and size set what is not given
    size: MayChange[Size] = DEFAULT_SIZE
    objective: PretrainConfig | ClassifyConfig = Field(discriminator="kind")
    data: Data
    model: AnyModelConfig

    @model_validator(mode="after")
    def takes_its_input(self) -> Self:
        """Refuse clips of a length that the network does not take, and what AST cannot do."""
        data, model = self.data, self.model
        if data.frames % model.patch:
            raise ValueError(f"data.frames {data.frames} must be a multiple of model.patch {model.patch}")
        if isinstance(model, ModelConfig):
            if data.frames > model.max_time_patches * model.patch:
                raise ValueError(
                    f"data.frames {data.frames} must fit model.max_time_patches {model.max_time_patches} x model.patch "
                    f"{model.patch}"
                )
            return self
        if data.frames != model.frames:
            raise ValueError(
                f"data.frames {data.frames} must equal model.frames {model.frames}, for which AST learns its "
                "positions; leave out model.frames"
            )
        if isinstance(self.objective, PretrainConfig):
            raise ValueError(
                "model.architecture ast is for objective.kind classify; pre-training needs model.architecture asda"
            )
        if data.padding == "masked":
            raise ValueError(
                "data.padding masked is for model.architecture asda: AST's patches overlap the padding, and it was "
                "trained with it; use data.padding=constant"
            )
        return self


class Config(Network[DataConfig]):
    """One run."""

    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    run: RunConfig
    probe: MayChange[ProbeConfig | None] = None  # in pre-training only
    resume: MayChange[Literal["auto", "never"]] = "auto"  # auto resumes from the newest checkpoint in run.folder

    @model_validator(mode="after")
    def fits(self) -> Self:
        """Check what concerns several sections."""
        data, augment, optimizer, engine = self.data, self.data.augment, self.optimizer, self.engine
        if optimizer.warmup_steps > optimizer.steps:
            raise ValueError(
                f"optimizer.warmup_steps {optimizer.warmup_steps} must not exceed optimizer.steps {optimizer.steps}"
            )
        if (roll := augment.frame_roll) >= data.frames:
            raise ValueError(f"data.augment.frame_roll {roll} must be less than data.frames {data.frames}")
        if augment.mixup.alpha and (optimizer.batch % 2 or engine.micro_batch < 2):
            raise ValueError(
                f"optimizer.batch {optimizer.batch} must be even and engine.micro_batch {engine.micro_batch} at least "
                "2, because data.augment.mixup mixes neighbours"
            )
        if isinstance(self.objective, PretrainConfig):
            _check_pretraining(self.objective, data, of_asda(self.model), self.run.keep_best)
        elif self.probe:
            raise ValueError("probe is for objective.kind pretrain; a classifier is evaluated on data.valid")
        elif (metric := self.run.keep_best) and not data.valid:
            raise ValueError(f"run.keep_best {metric} needs a validation metric; give data.valid=FOLDER:SPLIT")
        if engine.offload_optimizer and not engine.zero_stage:
            raise ValueError(
                "engine.offload_optimizer needs engine.zero_stage 1, 2 or 3; DeepSpeed cannot do it in stage 0"
            )
        if engine.precision == "fp16" and not engine.zero_stage:
            # Measured with DeepSpeed 0.19.8: the first moments after a step are smaller by the loss scale.
            raise ValueError(
                "engine.precision fp16 needs engine.zero_stage 1, 2 or 3; in stage 0 DeepSpeed divides gradients by a "
                "loss scale that it has not multiplied the loss with"
            )
        return self


class Description(Network[InputConfig]):
    """The network, its input and its labels: config.json of a folder of weights. Keys are those of a run."""

    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits


def _check_pretraining(objective: PretrainConfig, data: DataConfig, model: ModelConfig, keep_best: str) -> None:
    """Refuse what students, teacher and decoder cannot do."""
    if data.padding == "masked":
        raise ValueError(
            "data.padding masked is for objective.kind classify, because the targets of pre-training include padding; "
            "use data.padding=constant, and clips that fill data.frames"
        )
    for key, value in (("data.valid", data.valid), ("data.test", data.test), ("run.keep_best", keep_best)):
        if value:
            raise ValueError(
                f"{key} {value!r} is for objective.kind classify; leave it empty in pre-training, where the section "
                "probe evaluates the teacher"
            )
    if objective.target_layers > model.depth:
        raise ValueError(f"objective.target_layers {objective.target_layers} must not exceed model.depth {model.depth}")
    if model.width % objective.decoder.groups:
        raise ValueError(
            f"model.width {model.width} must be a multiple of objective.decoder.groups {objective.decoder.groups}, "
            "because the decoder's first convolution takes the encoder's features"
        )
    num_patches = (data.frames // model.patch) * (model.mel_bins // model.patch)
    if not 0 < objective.mask.visible(num_patches) < num_patches:
        raise ValueError(
            f"objective.mask.ratio {objective.mask.ratio:g} leaves {objective.mask.visible(num_patches)} of the "
            f"{num_patches} patches of a clip visible; at least one must be visible and one hidden: change the ratio, "
            "or data.frames"
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run from a JSON file and overrides; what neither gives comes from the preset and the size.

    An override is "key.key=value", where value is JSON, or a plain string when it does not parse as JSON. Raises
    UserError naming the file or the key, the value, the rule and, for unknown keys, the nearest known one.
    """
    tree = read_json_object(Path(path))
    for override in overrides or []:
        apply_override(tree, override)
    for assignment, instead in pop_retired_keys(tree):
        raise UserError(f"{path}: {assignment} is no longer a key: {instead}")
    return _checked(tree, Config, path)


def load_stored_config(path: Path) -> Config:
    """Read the config.json that a run or a checkpoint has stored, without keys that are retired since."""
    tree = read_json_object(path)
    for assignment, instead in pop_retired_keys(tree):
        say(f"{path}: ignoring {assignment}, which an earlier version wrote: {instead}")
    return _checked(tree, Config, path)


def load_description(path: Path) -> Description:
    """Read the config.json of a folder of weights."""
    return _checked(read_json_object(path), Description, path)


def dump_config(config: Config | Description) -> str:
    """Write the resolved tree as JSON text; load_config or load_description reads back an equal tree."""
    return config.model_dump_json(by_alias=True, indent=2) + "\n"


def _checked(tree: dict[str, Any], kind: type[Kind], path: str | Path) -> Kind:
    try:
        if complaint := wrong_text(tree):
            raise UserError(f"{path}: {complaint}")
        return kind.model_validate_json(json.dumps(filled(tree)))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None
    except RecursionError:
        raise UserError(f"{path}: values are nested deeper than a config ever is") from None
