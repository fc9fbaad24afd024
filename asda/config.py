"""A run as data: one JSON file, checked once against one tree.

    load_config("configs/as2m.json", ["engine.zero_stage=2"]) -> Config

Every level refuses unknown keys and names the nearest known one. Values carry their unit in the name or in the
comment beside them. Where a default stands, it is the released ASDA recipe; a preset and a size (asda/presets.py)
replace it, and the config.json of a run spells all values out.
"""

import json
from fractions import Fraction as Rational
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from asda.config_file import apply_override, explain, read_json_object
from asda.errors import UserError
from asda.presets import DEFAULT_PRESET, DEFAULT_SIZE, filled

MOST = 1 << 40  # of anything that is counted or measured here: more is a slip of the keyboard, or would overflow

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[float, Field(ge=-MOST, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decibels = Annotated[float, Field(ge=-200, le=200)]  # more than float32 and any sound have
Preset = Literal["released", "paper", "learned", "eat", "ast"]  # asda/presets.py
Size = Literal["tiny", "small", "base", "large"]
Padding = Literal["constant", "masked"]  # of clips that are too short: seen as it is, or not seen
Kind = TypeVar("Kind", "Config", "Description")
DataSpecs = str | Annotated[list[str], Field(min_length=1)]  # "FOLDER:SPLIT" or "FOLDER:SPLIT+SPLIT", or several
MIN_SHARE = 0.001  # of a dataset in a mixture; asda/data/order.py keeps the shares in blocks of 1 / MIN_SHARE visits


class Section(BaseModel):
    """A part of the tree: immutable, without silent conversions, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True)


class ModelConfig(Section):
    """The encoder of ASDA and EAT (ASDA-base: 92 M parameters)."""

    architecture: Literal["asda"] = "asda"
    width: PositiveInt = 768  # features per token
    depth: PositiveInt = 12  # blocks
    heads: PositiveInt = 12  # heads of each of the two attention maps
    mlp_ratio: PositiveFloat = 3.5  # hidden width of the MLP / width
    # A = softmax(q1 k1) - lambda softmax(q2 k2): a number, "learned" per block, or "absent", which leaves one softmax
    attention_lambda: Number | Literal["learned", "absent"] = 0.1
    attention_norm: Literal["joint", "per_head", "none"] = "joint"  # LayerNorm over all heads, RMSNorm of each, nothing
    attention_scale: PositiveFloat | Literal["by_depth"] = 0.95  # after the norm; by_depth is 0.2 + 0.6 exp(-0.3 block)
    patch: PositiveInt = 16  # frames and mel bins per patch
    mel_bins: Literal[128] = 128  # what the front-end makes
    max_time_patches: PositiveInt = 768  # rows of the position table; 768 x 16 frames = 123 s

    @model_validator(mode="after")
    def divides(self) -> Self:
        """Refuse sizes that do not divide."""
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} must be a multiple of model.heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"model.width {self.width} must be a multiple of 4 (sine and cosine on two axes)")
        _check_hidden("model.mlp_ratio", self.mlp_ratio, self.width)
        if self.mel_bins % self.patch:
            raise ValueError(f"model.patch {self.patch} must divide model.mel_bins {self.mel_bins}")
        return self


class ConformerConfig(Section):
    """Conformer blocks on AST's tokens, as HAM-AST has them; its paper gives their number alone (docs/ham_ast.md)."""

    blocks: Count = 0  # 0, 3 or 6 in the paper
    heads: PositiveInt | None = None  # of the attention; null: as many as AST's
    mlp_ratio: PositiveFloat = 4.0  # hidden width of each of the two feed-forward modules / width
    kernel: PositiveInt = 31  # tokens under the depthwise convolution; odd
    # What the convolution runs along and relative positions are measured on: the time patches of a mel band, or all
    # tokens one after the other, CLS and DIST first
    axis: Literal["time", "sequence"] = "time"
    norm: Literal["layer", "group"] = "layer"  # after the depthwise convolution: of each token, or of each clip
    dropout: Fraction = 0.1

    @model_validator(mode="after")
    def centred(self) -> Self:
        """Refuse a convolution that would shift the tokens."""
        if self.kernel % 2 == 0:
            raise ValueError(f"model.conformer.kernel {self.kernel} must be odd, to keep the tokens in their places")
        return self


class ChannelAttentionConfig(Section):
    """A weight for each feature, from the maximum and the mean over tokens, as HAM-AST has it (docs/ham_ast.md)."""

    enabled: bool = False
    tokens: Literal["patches", "all"] = "patches"  # what is pooled; all: CLS and DIST as well
    reduction: PositiveInt = 16  # width / hidden width of the layers between the pooled features and their weights
    combine: Literal["sum", "concat"] = "sum"  # each pooling through the same layers, then added; or side by side
    normalize: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax is multiplied by the width: its mean weight is 1


class AstConfig(Section):
    """The Audio Spectrogram Transformer (AST-base: 86 M parameters), and what HAM-AST puts on top of it."""

    architecture: Literal["ast"]
    width: PositiveInt = 768  # features per token
    depth: PositiveInt = 12  # blocks
    heads: PositiveInt = 12
    mlp_ratio: PositiveFloat = 4.0  # hidden width of the MLP / width
    patch: PositiveInt = 16  # frames and mel bins per patch
    time_stride: PositiveInt = 10  # frames from a patch to the next
    mel_stride: PositiveInt = 10  # mel bins from a patch to the next
    mel_bins: Literal[128] = 128  # what the front-end makes
    frames: PositiveInt  # of the clips that the learned positions are for; data.frames where it is not given
    norm_eps: PositiveFloat = 1e-12  # of every LayerNorm; as the published weights have it in their configuration
    conformer: ConformerConfig = ConformerConfig()
    channel_attention: ChannelAttentionConfig = ChannelAttentionConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Overlapping patches along time and along mel."""
        return tuple(
            (size - self.patch) // stride + 1
            for size, stride in ((self.frames, self.time_stride), (self.mel_bins, self.mel_stride))
        )  # pyright: ignore[reportReturnType]

    @model_validator(mode="after")
    def divides(self) -> Self:
        """Refuse sizes that do not divide."""
        for name, heads in (("model.heads", self.heads), ("model.conformer.heads", self.conformer.heads)):
            if heads and self.width % heads:
                raise ValueError(f"model.width {self.width} must be a multiple of {name} {heads}")
        if self.width % 4:
            raise ValueError(f"model.width {self.width} must be a multiple of 4 (sines and cosines of positions)")
        _check_hidden("model.mlp_ratio", self.mlp_ratio, self.width)
        _check_hidden("model.conformer.mlp_ratio", self.conformer.mlp_ratio, self.width)
        if self.mel_bins % self.patch:
            raise ValueError(f"model.patch {self.patch} must divide model.mel_bins {self.mel_bins}")
        if self.frames % self.patch:
            raise ValueError(f"model.frames {self.frames} must be a multiple of model.patch {self.patch}")
        if self.channel_attention.enabled and self.channel_attention.reduction > self.width:
            raise ValueError(
                f"model.channel_attention.reduction {self.channel_attention.reduction} must not exceed model.width "
                f"{self.width}"
            )
        return self


AnyModelConfig = Annotated[ModelConfig | AstConfig, Field(discriminator="architecture")]


class DecoderConfig(Section):
    """The convolutional decoder that predicts the teacher's targets."""

    layers: PositiveInt = 6
    width: PositiveInt = 768
    kernel: PositiveInt = 3  # odd
    groups: PositiveInt = 16
    noise_std: NonNegative = 0.01  # what stands at masked positions

    @model_validator(mode="after")
    def shaped(self) -> Self:
        """Refuse convolutions that do not keep the grid."""
        if self.kernel % 2 == 0:
            raise ValueError(f"objective.decoder.kernel {self.kernel} must be odd, to keep the patch grid")
        if self.width % self.groups:
            raise ValueError(f"objective.decoder.width {self.width} must be a multiple of groups {self.groups}")
        return self


class MaskConfig(Section):
    """Inverse block masks: a few blocks stay visible, the rest is hidden."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.8  # hidden share of the patches
    adjust: Annotated[float, Field(ge=0, lt=1)] = 0.07  # extra share when the number of blocks is chosen
    block: PositiveInt = 5  # patches along each side

    def visible(self, num_patches: int) -> int:
        """How many patches of a clip a student sees."""
        return int(num_patches * (1 - self.ratio))

    def blocks(self, num_patches: int) -> int:
        """How many blocks are drawn for that; of short clips none, and then single patches are."""
        return int(num_patches * ((1 - self.ratio) + self.adjust) / self.block**2)


class EmaConfig(Section):
    """The teacher's decay, linear from `decay` to `end_decay` over `anneal_steps` steps."""

    decay: Annotated[float, Field(ge=0, le=1)] = 0.9998
    end_decay: Annotated[float, Field(ge=0, le=1)] = 0.99999
    anneal_steps: PositiveInt = 100_000


class PretrainConfig(Section):
    """Masked students learn to predict what an EMA teacher sees without a mask."""

    kind: Literal["pretrain"]
    students: PositiveInt = 16  # masked views of every clip in every step
    utterance_weight: NonNegative = 96.0  # total = frame_mean + weight * utterance_mean; 0.5 x 12 clips x 16 students
    target_layers: PositiveInt = 12  # the last this many blocks are averaged into the target
    mask: MaskConfig = MaskConfig()
    decoder: DecoderConfig = DecoderConfig()
    ema: EmaConfig = EmaConfig()


class ClassifyConfig(Section):
    """A classifier on the encoder, pre-trained or from scratch."""

    kind: Literal["classify"]
    init_from: str  # a run folder or one checkpoint of it; "" starts from scratch
    init_weights: Literal["student", "teacher"] = "student"
    loss: Literal["ce", "bce"]  # one label a clip, or any number
    # What stands for a clip: the CLS token, as the published recipes; the mean over patch tokens; or their mean after a
    # sigmoid, weighted by itself
    pooling: Literal["cls", "mean", "linear_softmax"] = "cls"
    label_smoothing: Fraction = 0.0  # only with ce
    drop_path: Fraction = 0.0  # of the last block; linear from 0 at the first
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # lr of block i is multiplied by decay ** (depth - i)

    @model_validator(mode="after")
    def smooths_only_ce(self) -> Self:
        """Refuse a value that would do nothing."""
        if self.loss == "bce" and self.label_smoothing:
            raise ValueError(f"objective.label_smoothing {self.label_smoothing} must be 0 with loss bce")
        return self


class LogMelStats(Section):
    """Patches are (log-mel - mean) / (2 std)."""

    mean: Number
    std: PositiveFloat


class SpecAugmentConfig(Section):
    """One band of mel bins and one stretch of frames of every clip are blanked (SpecAugment, Park et al., 2019)."""

    mel_ratio: Share = 0.0  # of the widest band to all mel bins; widths are uniform up to it
    frame_ratio: Share = 0.0  # of the longest stretch to all frames
    # EAT blanks mixtures with 0 in normalised space, the mean; AST with a log-mel of 0, before normalising, and its
    # mixtures have one box, one noise and one roll of the frames
    order: Literal["after_mixup", "before_normalisation"] = "after_mixup"


class MixupConfig(Section):
    """Pairs of clips and of their labels are averaged, with a weight from Beta(alpha, alpha)."""

    alpha: NonNegative = 0.0  # 0 mixes nothing
    probability: Share = 1.0  # that a pair is mixed


class AugmentConfig(Section):
    """What chance does to the clips of training (asda/data/augment.py); 0, false or null is without."""

    roll: bool = False  # the wave, by any offset; what leaves at the end comes in at the start
    magnitude: NonNegative = 0.0  # a of the factor Beta(a, a) + 0.5 on the amplitude; 10 in the published recipes
    gain_db: tuple[Decibels, Decibels] = (0.0, 0.0)  # least and most of a gain that is uniform in dB
    noise_snr_db: tuple[Decibels, Decibels] | None = None  # least and most dB of the clip over white noise
    frame_noise: NonNegative = 0.0  # most that is added to a normalised value; 0.1 for Speech Commands
    frame_roll: Count = 0  # most frames by which the padded spectrogram is rolled, both ways; 10 for Speech Commands
    spec_augment: SpecAugmentConfig = SpecAugmentConfig()
    mixup: MixupConfig = MixupConfig()

    @model_validator(mode="after")
    def ordered(self) -> Self:
        """Refuse ranges that end before they begin."""
        for name, limits in (("gain_db", self.gain_db), ("noise_snr_db", self.noise_snr_db)):
            if limits is not None and limits[0] > limits[1]:
                raise ValueError(f"data.augment.{name} {list(limits)} must give the least value first, then the most")
        return self


class OrderConfig(Section):
    """Which clips an epoch visits, and in which order (asda/data/order.py)."""

    # shuffled: every clip once; balanced: drawn by the dataset's sample weights; sequential: every clip once, as listed
    mode: Literal["shuffled", "balanced", "sequential"] = "shuffled"
    draws_per_epoch: PositiveInt | None = None  # of balanced: EAT 200,000 of AudioSet's 2 M; null: as many as clips
    replacement: bool = False  # of balanced: whether an epoch may visit a clip twice (AST: yes, EAT: no)

    @model_validator(mode="after")
    def balances(self) -> Self:
        """Refuse values that would do nothing."""
        if self.mode != "balanced" and (self.draws_per_epoch is not None or self.replacement):
            raise ValueError(
                f"data.order.draws_per_epoch and replacement are of mode balanced; in mode {self.mode} an epoch is "
                "every clip once, leave them out"
            )
        if self.mode == "balanced" and self.draws_per_epoch is None and not self.replacement:
            raise ValueError(
                "data.order.draws_per_epoch must be given in mode balanced without replacement: as many draws as clips "
                "would visit every clip once, which balances nothing"
            )
        return self


class MixedData(Section):
    """One dataset of a mixture, which has epochs of its own."""

    data: DataSpecs
    share: PositiveFloat  # of the run's visits, relative to the shares of the others
    order: OrderConfig | None = None  # null: as data.order says


def _kind_of_train(value: Any) -> str:
    """Which of the types of data.train a value means, so that errors are about that type alone."""
    if isinstance(value, list) and any(isinstance(item, dict | MixedData) for item in value):
        return "list[MixedData]"
    return "list[str]" if isinstance(value, list) else "str"


TrainData = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[str], Field(min_length=1), Tag("list[str]")]
    | Annotated[list[MixedData], Tag("list[MixedData]")],
    Discriminator(_kind_of_train),
]


class DataConfig(Section):
    """Which shards, and what becomes of a clip."""

    train: TrainData  # as DataSpecs, joined to one dataset; or a mixture: [{"data": "FOLDER:SPLIT", "share": 0.7}, ...]
    valid: DataSpecs = ""  # held-out shards of a classifier, evaluated while training; "" evaluates nothing
    test: DataSpecs = ""  # others, evaluated at the end only: the last weights, and the ones that run.keep_best chose
    frames: PositiveInt = 1024  # log-mel frames of 10 ms a clip is cut or padded to
    crop: Literal["start", "random"] = "start"  # where a longer clip is cut while training
    log_mel: LogMelStats | Literal["dataset"] = "dataset"  # "dataset" takes the figures of the training shards
    pad_log_mel: Number = 0.0  # raw log-mel of padding; 0 as released, which is far above silence (-15.9)
    padding: Padding = "constant"  # masked: no token takes anything from a patch of padding, nor does the classifier
    augment: AugmentConfig = AugmentConfig()  # while training
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where DALI computes; auto follows the training device
    workers: Count = 0  # processes that read, and on the CPU make the patches, per rank; 0 leaves it to threads
    threads: Count = 2  # that read, verify and decompress, per rank; 0 reads when a batch is asked for
    prefetch: PositiveInt = 4  # micro-batches prepared ahead, per rank
    timeout_s: PositiveFloat = 300.0  # longest wait for a micro-batch before the run ends
    max_damaged: Share = 0.0  # of all clips: so many damaged ones are replaced by others and counted; 0 ends the run
    order: OrderConfig = OrderConfig()
    group_shards: PositiveInt = 16  # shards shuffled together
    cache: str = ""  # folder that keeps copies of remote shards; "" is asda/shards below $XDG_CACHE_HOME or ~/.cache
    cache_gib: PositiveFloat = 20.0  # bound of that folder; the ranks of a machine share it

    @property
    def datasets(self) -> list[MixedData]:
        """What data.train says: the datasets of a mixture, or one dataset with all of the share."""
        if isinstance(self.train, str):
            return [MixedData(data=self.train, share=1.0)]
        mixed = [part for part in self.train if isinstance(part, MixedData)]
        return mixed or [MixedData(data=[spec for spec in self.train if isinstance(spec, str)], share=1.0)]

    @model_validator(mode="after")
    def shares_are_kept(self) -> Self:
        """Refuse a share so small that the order cannot keep it."""
        total = sum(Rational(part.share) for part in self.datasets)
        for part in self.datasets:
            if Rational(part.share) / total < MIN_SHARE:
                raise ValueError(
                    f"data.train: {part.data} has {part.share / float(total):.2g} of all shares, less than "
                    f"{MIN_SHARE}; give it a larger share, or leave it out"
                )
        return self


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
    # Of a layer whose rate objective.layer_decay scales, the floor is scaled alike, or the same for all ("absolute", as
    # fairseq has it: where that is above a layer's peak, the layer's rate is constant)
    lr_floor: Literal["scaled", "absolute"] = "scaled"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.05
    clip: NonNegative = 4.0  # global gradient norm; 0 does not clip
    batch: PositiveInt  # clips per step, over all ranks

    @model_validator(mode="after")
    def falls(self) -> Self:
        """Refuse a floor above the peak, to which the rate would rise."""
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr {self.min_lr:g} must not be above optimizer.lr {self.lr:g}; lower it")
        return self

    @model_validator(mode="after")
    def has_its_decay(self) -> Self:
        """Refuse steps without their sizes, and sizes that would do nothing."""
        if (self.schedule == "steps") != (self.step_decay is not None):
            raise ValueError(
                f"optimizer.schedule is {self.schedule}: optimizer.step_decay (factor, every, start) is given with "
                "schedule steps, and with it alone"
            )
        return self


class EngineConfig(Section):
    """How DeepSpeed runs it: what may change between machines without changing the recipe."""

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and activations; the master weights are fp32
    attention: Literal["auto", "explicit", "sdpa", "triton"] = "auto"  # how it is computed; auto takes the fastest
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1  # partitioned over ranks: 1 optimizer, 2 gradients, 3 weights
    micro_batch: PositiveInt = 12  # most clips a rank takes at once; gradients are accumulated up to optimizer.batch
    activation_checkpointing: bool = False  # keep only the input of each block, and compute it again in the backward
    offload_optimizer: bool = False  # the optimizer's state in the host's memory; stages 1 to 3
    timeout_s: PositiveFloat = 600.0  # longest that a rank waits for the others in one exchange


class RunConfig(Section):
    """The run's folder and its rhythm, in steps."""

    folder: Annotated[str, Field(min_length=1)]
    seed: Count = 1
    log_every: PositiveInt = 20
    save_every: PositiveInt = 1000
    eval_every: PositiveInt = 1000
    keep: PositiveInt = 2  # newest checkpoints kept
    # By which figure on data.valid a checkpoint is saved and kept beside them as the best; "" keeps none
    keep_best: Literal["", "accuracy", "mAP"] = ""
    on_failed_save: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written (disk full)
    max_bad_steps: PositiveInt = 10  # in a row, without a finite loss and gradient; then the run ends
    check_replicas_every: Count = 1000  # steps between comparisons of all ranks' weights; 0 compares never
    min_target_spread: NonNegative = 0.1  # a smaller spread of the teacher's targets is said aloud: collapse
    min_prediction_spread: NonNegative = 0.01  # the same of the students' predictions
    wandb: str = ""  # project of Weights & Biases that is told as well; needs the extra wandb


class ProbeConfig(Section):
    """Labelled shards on which the teacher's features are judged while pre-training, every run.eval_every steps."""

    train: DataSpecs  # neighbours and the linear layer come from these
    test: DataSpecs  # held out
    neighbours: PositiveInt = 10


class Config(Section):
    """One run."""

    about: dict[str, str] = Field(default={}, alias="_about")  # the story: source, expected metric, hardware, command
    preset: Preset = DEFAULT_PRESET  # with the size it sets what is not given
    size: Size = DEFAULT_SIZE
    objective: PretrainConfig | ClassifyConfig = Field(discriminator="kind")
    data: DataConfig
    model: AnyModelConfig
    optimizer: OptimizerConfig
    engine: EngineConfig = EngineConfig()
    run: RunConfig
    probe: ProbeConfig | None = None  # in pre-training only
    resume: Literal["auto", "never"] = "auto"  # auto continues from run.folder's newest checkpoint, if any

    @model_validator(mode="after")
    def fits(self) -> Self:
        """Check what concerns several sections."""
        _check_frames(self.data.frames, self.model)
        _check_architecture(self.model, self.objective, self.data)
        if self.optimizer.warmup_steps > self.optimizer.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} must not exceed "
                f"optimizer.steps {self.optimizer.steps}"
            )
        if self.data.augment.frame_roll >= self.data.frames:
            raise ValueError(
                f"data.augment.frame_roll {self.data.augment.frame_roll} must be less than "
                f"data.frames {self.data.frames}"
            )
        if self.data.augment.mixup.alpha and (self.optimizer.batch % 2 or self.engine.micro_batch < 2):
            raise ValueError(
                f"optimizer.batch {self.optimizer.batch} must be even and engine.micro_batch "
                f"{self.engine.micro_batch} at least 2, because data.augment.mixup mixes neighbours"
            )
        if isinstance(self.objective, PretrainConfig):
            _check_pretraining(self.objective, self.data, of_asda(self.model))
        elif self.probe:
            raise ValueError("probe is for objective.kind pretrain; a classifier is judged on data.valid")
        if self.engine.offload_optimizer and not self.engine.zero_stage:
            raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3; DeepSpeed has none for 0")
        if self.engine.precision == "fp16" and not self.engine.zero_stage:
            # Measured with DeepSpeed 0.19.8: the first moments after a step are smaller by the loss scale.
            raise ValueError(
                "engine.precision fp16 needs engine.zero_stage 1, 2 or 3; in stage 0 DeepSpeed divides gradients by a "
                "loss scale that it has not multiplied the loss with"
            )
        return self


class InputConfig(Section):
    """How a clip becomes patches."""

    frames: PositiveInt  # log-mel frames of 10 ms a clip was cut or padded to
    log_mel: LogMelStats
    pad_log_mel: Number = 0.0  # raw log-mel of padding
    padding: Padding = "constant"


class Description(Section):
    """The network of a folder of weights, its input and its labels: config.json where no run of ours made the weights.

    Keys are as in a run's configuration.
    """

    about: dict[str, str] = Field(default={}, alias="_about")
    preset: Preset = DEFAULT_PRESET
    size: Size = DEFAULT_SIZE
    objective: PretrainConfig | ClassifyConfig = Field(discriminator="kind")
    data: InputConfig
    model: AnyModelConfig
    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits

    @model_validator(mode="after")
    def fits(self) -> Self:
        """Check what concerns several sections."""
        _check_frames(self.data.frames, self.model)
        _check_architecture(self.model, self.objective, self.data)
        return self


def _check_architecture(
    model: ModelConfig | AstConfig, objective: PretrainConfig | ClassifyConfig, data: "DataConfig | InputConfig"
) -> None:
    """Refuse of AST what it is not made for."""
    if not isinstance(model, AstConfig):
        return
    if isinstance(objective, PretrainConfig):
        raise ValueError(
            "model.architecture ast is for objective.kind classify: students and teacher are of architecture asda; "
            "use that, or fine-tune an AST"
        )
    if data.padding == "masked":
        raise ValueError(
            "data.padding masked is for model.architecture asda: AST's patches overlap the padding and it was trained "
            "to see it; use constant"
        )


def _check_hidden(name: str, ratio: float, width: int) -> None:
    """Refuse a feed-forward layer without features."""
    if int(width * ratio) < 1:
        raise ValueError(f"{name} {ratio:g} times model.width {width} must be at least 1, the hidden width")


def _check_pretraining(objective: PretrainConfig, data: DataConfig, model: ModelConfig) -> None:
    """Refuse what students, teacher and decoder cannot do."""
    if data.padding == "masked":
        raise ValueError(
            "data.padding masked is for objective.kind classify: the targets of pre-training know no padding; "
            "use constant, and crop or choose clips that fill data.frames"
        )
    if data.valid:
        raise ValueError(f"data.valid {data.valid!r} must be empty in pre-training; probe judges it by labels")
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
            f"{num_patches} patches of a clip visible; one at least must be, and one must not: change it, or "
            "data.frames"
        )


def _check_frames(frames: int, model: ModelConfig | AstConfig) -> None:
    """Refuse a clip that is no whole number of patches, or that the table of positions is not for."""
    if frames % model.patch:
        raise ValueError(f"data.frames {frames} must be a multiple of model.patch {model.patch}")
    if isinstance(model, AstConfig):
        if frames != model.frames:
            raise ValueError(
                f"data.frames {frames} must equal model.frames {model.frames}, for which AST learns its positions; "
                "leave model.frames out"
            )
        return
    if frames > model.max_time_patches * model.patch:
        raise ValueError(
            f"data.frames {frames} must fit model.max_time_patches {model.max_time_patches} x model.patch {model.patch}"
        )


def of_asda(model: ModelConfig | AstConfig) -> ModelConfig:
    """A model section that is known to be ASDA's, because pre-training and the official layout have no other."""
    assert isinstance(model, ModelConfig)
    return model


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run from a JSON file and dotted overrides; what neither gives comes from the preset and the size.

    Args:
        path: the JSON file.
        overrides: "key.key=value", where value is JSON, or a plain string when it does not parse as JSON.

    Raises:
        UserError: naming the file or the key, the value, the rule and, for unknown keys, the nearest known one.
    """
    tree = read_json_object(Path(path))
    for override in overrides or []:
        apply_override(tree, override)
    return _checked(tree, Config, path)


def load_description(path: Path) -> Description:
    """Read the config.json of a folder of weights; raises UserError as load_config does."""
    return _checked(read_json_object(path), Description, path)


def dump_config(config: Config | Description) -> str:
    """The resolved tree as JSON text; load_config or load_description reads it back to an equal tree."""
    return config.model_dump_json(by_alias=True, indent=2) + "\n"


def _checked(tree: dict[str, Any], kind: type[Kind], path: str | Path) -> Kind:
    try:
        return kind.model_validate_json(json.dumps(filled(tree)))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None
    except RecursionError:
        raise UserError(f"{path}: values are nested deeper than a config ever is") from None
