"""What the networks are fed with against the official numbers: log-mel patches and masks.

Shapes: S samples or masks, T frames or time patches, F mel bins or mel patches, N patches, P pixels, C block centres.
"""

import golden
import mask_statistics
import numpy as np
import torch
from golden import Table
from golden_findings import EXACT_REL, UNIT_ROUNDING, Finding, Findings, figure, most
from kaldi import MOST, PERCENTILE_99_9
from torch import Tensor

from asda.config.model import MaskConfig
from asda.data.audio.resampling import resample
from asda.data.features import fbank
from asda.data.features.augment import ClipAugmentation
from asda.data.features.cpu import CpuPatches
from asda.models import masks
from asda.models.patches import PatchLayout

# Ours is the official resampler; its sums of 34 products (44.1 kHz) may be added in another order: at most 34 x 2^-24
# of a sum of magnitudes that stays under 2 at full scale.
RESAMPLED_ABS = 34 * UNIT_ROUNDING * 2
NUM_OUR_MASKS = 8000
NOT_NORMALISED = {"mean": 0.0, "std": 0.5}  # (x - 0) / (2 x 0.5)


def check_front_end(official: Table, numbers: Table) -> Findings:
    """From samples to normalised log-mel: each stage from the official input, then all of them in one go."""
    clips = sorted({name.partition(".")[0] for name in official if name.startswith("syn")})
    yield from waveform("", official["wave_in_float32"], numbers["sample_rate"], official)
    centred_S = official["wave16k"] - official["wave16k"].mean()
    yield most("waveform", "wave16k_zero_mean", centred_S, official["wave16k_zero_mean"], RESAMPLED_ABS)
    yield from log_mel("", official["fbank"], fbank.log_mel_of_wave(official["wave16k"]))
    stats = {"mean": numbers["norm_mean"], "std": numbers["norm_std"]}
    padded_TF = as_trained(official["fbank"], len(official["padded"]), **NOT_NORMALISED)
    yield most("padded", "padded", padded_TF, official["padded"], 0.0)
    for name in ("normalized", "normalized_T512", "normalized_T256", "dataset_normalized"):
        if name in official:
            normalised_TF = as_trained(official["fbank"], len(official[name]), **stats)
            # A difference and a quotient round twice, here and there; DALI multiplies by the reciprocal of 2 std.
            tolerance = 5 * UNIT_ROUNDING * float(official[name].abs().max())
            yield most("normalised", name, normalised_TF, official[name], tolerance)
    yield from per_clip("", official["wave_in_float32"], numbers["sample_rate"], official["normalized"], stats)
    for clip in clips:
        wave_S, rate = official[f"{clip}.wave_in"], int(clip.removeprefix("syn"))
        yield from waveform(f"{clip}.", wave_S, rate, official)
        yield from log_mel(f"{clip}.", official[f"{clip}.fbank"], fbank.log_mel_of_wave(official[f"{clip}.wave16k"]))
        yield from per_clip(f"{clip}.", wave_S, rate, official[f"{clip}.normalized"], stats)


def resampled(wave_S: Tensor, rate: int) -> Tensor:
    """To 16 kHz, as audio files are."""
    return torch.from_numpy(resample(wave_S.numpy(), rate))


def waveform(clip: str, wave_S: Tensor, rate: int, official: Table) -> Findings:
    """One clip's samples at 16 kHz."""
    yield most("waveform", f"{clip}wave16k", resampled(wave_S, rate), official[f"{clip}wave16k"], RESAMPLED_ABS)


def log_mel(clip: str, theirs_TF: Tensor, ours_TF: Tensor) -> Findings:
    """One clip's log-mel: the largest error, and what one value in a thousand exceeds."""
    yield most("fbank", f"{clip}fbank", ours_TF, theirs_TF, MOST)
    rare = float(np.percentile((ours_TF - theirs_TF).abs().numpy(), 99.9))
    yield Finding("fbank: 99.9 %", f"{clip}fbank", rare, PERCENTILE_99_9, "percentile")


def per_clip(clip: str, wave_S: Tensor, rate: int, theirs_TF: Tensor, stats: dict[str, float]) -> Findings:
    """Samples to normalised log-mel through all stages."""
    ours_TF = as_trained(fbank.log_mel_of_wave(resampled(wave_S, rate)), len(theirs_TF), **stats)
    tolerance = MOST / (2 * stats["std"])
    yield most("per clip, samples to patches", f"{clip}normalized", ours_TF, theirs_TF, tolerance)


def as_trained(mel_TF: Tensor, frames: int, mean: float, std: float) -> Tensor:
    """Padded and normalised by the function that training runs, [frames, F]."""
    layout = PatchLayout(frames, golden.PATCH, mean, std, pad_log_mel=0.0)
    x_TF = np.empty((frames, golden.MEL_BINS), np.float32)
    x_TF[: len(mel_TF)] = mel_TF[:frames]
    (maker := CpuPatches(layout, 1, threads=1))._finish(x_TF, min(len(mel_TF), frames), ClipAugmentation())
    maker.close()
    return torch.from_numpy(x_TF)


def check_masks(official: Table, numbers: Table) -> Findings:
    """8,000 masks of ours against the official ones, at each grid that the file has.

    tests/models/test_masks.py states what the statistics would notice and what they would miss.
    """
    for case in sorted({name.partition(".")[0] for name in official}):
        yield from check_masks_of(case, official, numbers[case])


def check_masks_of(case: str, official: Table, numbers: Table) -> Findings:
    """One grid and configuration."""
    grid = (numbers["grid"][0], numbers["grid"][1])
    config = MaskConfig(ratio=numbers["mask_prob"], adjust=numbers["mask_prob_adjust"], block=numbers["mask_length"])
    theirs_SN, centres_SC = official[f"{case}.mask"].numpy() == 0, official[f"{case}.centres"].numpy().astype(np.int64)
    ours_SN = masks.inverse_block_masks(np.random.default_rng(1), NUM_OUR_MASKS, grid, config)
    count = numbers["visible_exact"][0]
    wrong = int((ours_SN.sum(1) != count).sum() + (theirs_SN.sum(1) != count).sum())
    yield Finding(f"{case}: exact counts", f"masks without {count} visible", wrong, 0, "masks")
    yield from blocks_of_official_centres(case, theirs_SN, masks.block_union(centres_SC, grid, config.block), numbers)
    our_centres_SC = masks.draw_centres(np.random.default_rng(2), NUM_OUR_MASKS, grid[0] * grid[1], config)
    drawn = [
        mask_statistics.of_histograms("centres", our_centres_SC.ravel(), centres_SC.ravel()),
        mask_statistics.of_histograms("distinct centres", distinct(our_centres_SC), distinct(centres_SC)),
    ]
    yield Finding(f"{case}: exact counts", "centres", abs(our_centres_SC.shape[1] - centres_SC.shape[1]), 0, "centres")
    samples = (visible_SN.reshape(-1, *grid) for visible_SN in (ours_SN, theirs_SN))
    for name, statistic, limit in (*drawn, *mask_statistics.differences(*samples, block=config.block)):
        yield Finding(f"{case}: distribution", name, statistic, limit, "statistic")


def blocks_of_official_centres(case: str, visible_SN: np.ndarray, union_SN: np.ndarray, numbers: Table) -> Findings:
    """A union that is too small lies within its mask, one that is too large contains it."""
    group, num_union, num_visible = f"{case}: blocks", union_SN.sum(1), visible_SN.sum(1)
    hidden = int((union_SN & ~visible_SN)[num_union <= num_visible].sum())
    added = int((visible_SN & ~union_SN)[num_union >= num_visible].sum())
    yield Finding(group, "patches out of place", hidden + added, 0, "patches")
    expected = numbers["block_union_before_adjust"]
    for name in ("mean", "min", "max"):
        yield figure(group, f"union {name}", float(getattr(num_union, name)()), expected[name], EXACT_REL)


def distinct(centres_SC: np.ndarray) -> np.ndarray:
    """How many different centres each mask has."""
    return np.array([len(set(centres_C)) for centres_C in centres_SC.tolist()])
