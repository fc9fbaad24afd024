"""Configuration of the data: which clips, in which order, with which augmentation."""

from fractions import Fraction as Rational
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from asda.config.base import Count, Decibels, MayChange, NonNegative, Number, PositiveFloat, PositiveInt, Section, Share

Padding = Literal["constant", "masked"]  # of clips that are too short: the network sees it, or does not
DataSpecs = str | Annotated[list[str], Field(min_length=1)]  # "FOLDER:SPLIT" or "FOLDER:SPLIT+SPLIT", or several
MIN_SHARE = 0.001  # of a dataset in a mixture; asda/data/order.py keeps the shares in blocks of 1 / MIN_SHARE visits


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
    """Random changes of training clips (asda/data/features/augment.py); 0, false or null switches one off."""

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
    valid: MayChange[DataSpecs] = ""  # held-out shards of a classifier, evaluated while training; "" evaluates nothing
    test: MayChange[DataSpecs] = ""  # other held-out shards, for the last and the best weights at the end only
    frames: PositiveInt = 1024  # log-mel frames of 10 ms a clip is cut or padded to
    crop: Literal["start", "random"] = "start"  # where a longer clip is cut while training
    log_mel: LogMelStats | Literal["dataset"] = "dataset"  # "dataset" takes the figures of the training shards
    pad_log_mel: Number = 0.0  # raw log-mel of padding; 0 as released, which is far above silence (-15.9)
    padding: Padding = "constant"  # masked: no token takes anything from a patch of padding, nor does the classifier
    augment: AugmentConfig = AugmentConfig()  # while training
    device: MayChange[Literal["auto", "cpu", "gpu"]] = "auto"  # where DALI computes; auto follows the training device
    threads: MayChange[Count] = 2  # that read, verify and decompress, per rank; 0 reads when a batch is asked for
    prefetch: MayChange[PositiveInt] = 4  # micro-batches prepared ahead, per rank
    timeout_s: MayChange[PositiveFloat] = 300.0  # longest wait for a micro-batch before the run ends
    max_damaged: MayChange[Share] = 0.0  # share of damaged clips that are replaced and counted; more end the run
    order: OrderConfig = OrderConfig()
    group_shards: PositiveInt = 16  # shards shuffled together
    # Folder with copies of remote shards; "" is asda/shards in $XDG_CACHE_HOME, ~/.cache or $TMPDIR
    cache: MayChange[str] = ""
    cache_gib: MayChange[PositiveFloat] = 20.0  # bound of that folder; the ranks of a machine share it

    @property
    def datasets(self) -> list[MixedData]:
        """The value of data.train: the datasets of a mixture, or one dataset with all of the share."""
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


class InputConfig(Section):
    """How a clip becomes patches."""

    frames: PositiveInt  # log-mel frames of 10 ms a clip was cut or padded to
    log_mel: LogMelStats
    pad_log_mel: Number = 0.0  # raw log-mel of padding
    padding: Padding = "constant"
