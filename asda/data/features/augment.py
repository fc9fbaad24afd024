"""Random changes of a clip as numbers: drawn before its audio is touched, applied by asda.data.features.dali.

    wave, minus its mean   rolled forward by `wave_shift`, times `gain`, plus white noise of `noise_ratio` times its rms
    log-mel                padded to T frames; with SpecAug of order before_normalisation, the box becomes 0, and both
                           clips of a mixture have the same box, noise and roll of the frames
    normalised             plus `frame_noise` times a uniform number for each value; rolled forward by `frame_shift`
    mixed                  `share` of it and 1 - `share` of its partner; clips 2k and 2k + 1 of a batch are partners
    masked                 with SpecAug of order after_mixup, the box becomes 0, which is the mean

The numbers follow from a generator that belongs to one visit of one clip, so they do not depend on the rank, the
micro-batch or an interruption.

Shapes: B clips, T frames, N patches, C classes, K fields of ClipAugmentation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asda.config.data import AugmentConfig, DataConfig, MixupConfig
from asda.data.features.fbank import NUM_MEL_BINS, num_frames, num_samples
from asda.data.order import Draw, clip_rng

NUM_CHANCES = 9  # uniform numbers of a clip, each with one use: switching one augmentation on leaves the others alone


class ClipAugmentation(NamedTuple):
    """The random changes of one clip; the defaults do nothing. All values travel exactly in float64."""

    wave_shift: int = 0  # samples by which the wave is rolled forward, 0 <= wave_shift < S
    gain: float = 1.0  # factor on the amplitude
    noise_ratio: float = 0.0  # rms of the white noise / rms of the clip
    frame_noise: float = 0.0  # most that is added to a normalised value
    frame_shift: int = 0  # frames by which the spectrogram is rolled forward, 0 <= frame_shift < T
    noise_key: int = 0  # 32 bits from which both noises follow
    mel_start: int = 0  # first masked mel bin
    mel_stop: int = 0  # and the first that is not
    frame_start: int = 0
    frame_stop: int = 0
    share: float = 1.0  # of the clip itself in the mixture with its partner


OF_FRAMES = ("frame_noise", "frame_shift", "noise_key", "mel_start", "mel_stop", "frame_start", "frame_stop")


def draw_augmentations(
    draws: Sequence[Draw], clip_samples: Sequence[int], config: DataConfig, seed: int
) -> list[ClipAugmentation] | None:
    """Draw the changes of the clips of a micro-batch; None if the configuration asks for nothing.

    The draws are neighbours in the order of the run, the first at an even position, so that their pairs are the same in
    every micro-batch. Mixing needs an even number of them.
    """
    augment = config.augment
    if augment == AugmentConfig():
        return None
    first_of_pair = [draw for draw in draws[::2] for _ in range(2)][: len(draws)]
    shares = [draw_share(clip_rng(seed, draw, "mixup"), augment.mixup) for draw in first_of_pair]
    drawn = [
        draw_augmentation(clip_rng(seed, draw, "augment"), augment, samples, config.frames, share)
        for draw, samples, share in zip(draws, clip_samples, shares, strict=True)
    ]
    return drawn if augment.spec_augment.order == "after_mixup" else frames_alike(drawn)


def used_parts(
    waves: Sequence[np.ndarray], augmentations: Sequence[ClipAugmentation] | None, frames: int
) -> list[np.ndarray]:
    """Return the part of each wave [S] that the kept frames need: all of it if its end or its loudness is needed."""
    pairs = zip(waves, augmentations or [ClipAugmentation()] * len(waves), strict=True)
    return [wave_S if one.wave_shift or one.noise_ratio else wave_S[: num_samples(frames)] for wave_S, one in pairs]


def frames_alike(augmentations: Sequence[ClipAugmentation]) -> list[ClipAugmentation]:
    """Give the frames of both clips of a mixed pair the box, noise and roll of the first.

    AST mixes waves and then blanks, makes noisy and rolls the mixture. Changing both parts of a mean alike does the
    same: blanks stay blank, and the noise is not averaged away.
    """
    firsts = [augmentations[min(place, partner)] for place, partner in enumerate(partners(augmentations))]
    return [
        one._replace(**{name: getattr(first, name) for name in OF_FRAMES})
        for one, first in zip(augmentations, firsts, strict=True)
    ]


def draw_augmentation(
    rng: np.random.Generator, config: AugmentConfig, num_samples: int, frames: int, share: float = 1.0
) -> ClipAugmentation:
    """Draw everything that happens to one visit of one clip, whose generator is `rng`.

    The published recipes (EAT's and ASDA's code) roll by any offset and multiply by Beta(10, 10) + 0.5; Speech Commands
    also has the frame noise, U(0, 1) / 10 times a uniform number for each value, and rolls the frames by up to 10.
    """
    chance = rng.random(NUM_CHANCES)
    noise_key = int(rng.integers(1 << 32))
    # Last, because a beta variate takes as much of the generator as it likes.
    magnitude = rng.beta(config.magnitude, config.magnitude) + 0.5 if config.magnitude else 1.0
    mel_start, mel_stop = masked_range(chance[0], chance[1], config.spec_augment.mel_ratio, NUM_MEL_BINS)
    frame_start, frame_stop = masked_range(chance[2], chance[3], config.spec_augment.frame_ratio, frames)
    return ClipAugmentation(
        wave_shift=int(chance[4] * num_samples) if config.roll else 0,
        gain=float(magnitude * 10 ** (_between(config.gain_db, chance[5]) / 20)),
        noise_ratio=float(10 ** (-_between(config.noise_snr_db, chance[6]) / 20)) if config.noise_snr_db else 0.0,
        frame_noise=float(config.frame_noise * chance[7]),
        frame_shift=(int(chance[8] * (2 * config.frame_roll + 1)) - config.frame_roll) % frames,
        noise_key=noise_key,
        mel_start=mel_start,
        mel_stop=mel_stop,
        frame_start=frame_start,
        frame_stop=frame_stop,
        share=share,
    )


def draw_share(rng: np.random.Generator, config: MixupConfig) -> float:
    """Draw how much of itself a clip keeps in its mixture; its partner keeps as much. `rng` belongs to the first clip.

    The published code draws one share for a batch and mixes clip i with clip B - 1 - i. In a shuffled order that is a
    random partner and a share from Beta(alpha, alpha), as here. But neighbours lie in one micro-batch of one rank
    however the batch is cut, and a share for each pair needs no communication between the ranks.
    """
    is_mixed = rng.random() < config.probability
    return float(rng.beta(config.alpha, config.alpha)) if config.alpha and is_mixed else 1.0


def masked_range(width_chance: float, place_chance: float, ratio: float, size: int) -> tuple[int, int]:
    """Return a masked range of up to ratio * size out of `size`: first index, and first index after it.

    It has a real width and a real place, both uniform, each rounded down, as torchaudio.functional.mask_along_axis.
    """
    width = width_chance * ratio * size
    start = int(place_chance * (size - width))
    return (start, start + int(width)) if width >= 1 else (0, 0)


def packed(augmentations: Sequence[ClipAugmentation]) -> np.ndarray:
    """Return the augmentations as DALI passes them on: float64 [B, K + 1], the K fields in order, then the partner."""
    pairs = zip(augmentations, partners(augmentations), strict=True)
    return np.array([[*one, partner] for one, partner in pairs], np.float64)


def unpacked(numbers_K: np.ndarray) -> tuple[ClipAugmentation, int]:
    """Return an augmentation and the partner of a row of `packed`."""
    *fields, partner = numbers_K.tolist()
    typed = [type(none)(field) for none, field in zip(ClipAugmentation(), fields, strict=True)]
    return ClipAugmentation._make(typed), int(partner)


def partners(augmentations: Sequence[ClipAugmentation]) -> list[int]:
    """Return each clip's partner: its neighbour in the pair (2k, 2k + 1), or itself if it is not mixed.

    Raises ValueError if a clip that is to be mixed has no neighbour, or one that keeps another share.
    """
    found = [place if one.share == 1 else place ^ 1 for place, one in enumerate(augmentations)]
    for one, place in zip(augmentations, found, strict=True):
        if place >= len(found) or augmentations[place].share != one.share:
            raise ValueError(f"clip {place ^ 1} of {len(found)} keeps {one.share:g}, its partner does not")
    return found


def mixed_targets(targets_BC: np.ndarray, augmentations: Sequence[ClipAugmentation]) -> np.ndarray:
    """Return the labels of mixed clips: share * own + (1 - share) * partner's, float32 [B, C]."""
    share_B1 = np.array([[one.share] for one in augmentations], dtype=np.float32)
    return share_B1 * targets_BC + (1 - share_B1) * targets_BC[partners(augmentations)]


def present_patches(
    clip_samples: Sequence[int], augmentations: Sequence[ClipAugmentation] | None, frames: int, patch: int
) -> np.ndarray:
    """Mark patches with audio, bool [B, N]: a patch is present if any of its frames is; the others are padding.

    A mixture is present where either clip is. Each clip has at least 400 samples, and is padded or cut to `frames`.
    """
    present_BT = np.arange(frames) < np.array([num_frames(samples) for samples in clip_samples])[:, None]
    if augmentations is not None:
        rolled = [np.roll(row_T, one.frame_shift) for row_T, one in zip(present_BT, augmentations, strict=True)]
        present_BT = np.stack(rolled) | np.stack(rolled)[partners(augmentations)]
    by_time_patch = present_BT.reshape(len(present_BT), -1, patch).any(axis=2)
    return by_time_patch.repeat(NUM_MEL_BINS // patch, axis=1)


def _between(limits: tuple[float, float], chance: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * chance
