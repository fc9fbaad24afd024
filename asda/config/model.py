"""Configuration of the networks and of their objectives."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from asda.config.base import Count, Fraction, NonNegative, Number, PositiveFloat, PositiveInt, Section, Share


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
        num_mel_patches = (self.mel_bins - self.patch) // self.mel_stride + 1
        return (self.frames - self.patch) // self.time_stride + 1, num_mel_patches

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
        reduction = self.channel_attention.reduction
        if self.channel_attention.enabled and reduction > self.width:
            raise ValueError(f"model.channel_attention.reduction {reduction} must not exceed model.width {self.width}")
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
    adjust: Fraction = 0.07  # extra share when the number of blocks is chosen
    block: PositiveInt = 5  # patches along each side

    def visible(self, num_patches: int) -> int:
        """Return how many patches of a clip a student sees."""
        return int(num_patches * (1 - self.ratio))

    def blocks(self, num_patches: int) -> int:
        """Return how many blocks are drawn for that; 0 for short clips, for which single patches are drawn."""
        return int(num_patches * ((1 - self.ratio) + self.adjust) / self.block**2)


class EmaConfig(Section):
    """The teacher's decay, linear from `decay` to `end_decay` over `anneal_steps` steps."""

    decay: Share = 0.9998
    end_decay: Share = 0.99999
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
        """Refuse a value that has no effect."""
        if self.loss == "bce" and self.label_smoothing:
            raise ValueError(f"objective.label_smoothing {self.label_smoothing} must be 0 with loss bce")
        return self


def _check_hidden(name: str, ratio: float, width: int) -> None:
    """Refuse a feed-forward layer without hidden features."""
    if int(width * ratio) < 1:
        raise ValueError(f"{name} {ratio:g} times model.width {width} must be at least 1, the hidden width")


def of_asda(model: ModelConfig | AstConfig) -> ModelConfig:
    """Return a model section that is known to be ASDA's; pre-training and the official layout have no other."""
    assert isinstance(model, ModelConfig)
    return model
