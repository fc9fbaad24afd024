"""What chance does to a clip: the right distributions, independent of each other, and nothing unasked."""

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio.functional
from scipy import stats

from asda.config.data import AugmentConfig
from asda.config.run import load_config
from asda.data.clips import ClipDataset
from asda.data.features.augment import (
    ClipAugmentation,
    draw_augmentation,
    draw_augmentations,
    draw_share,
    frames_alike,
    masked_range,
    mixed_targets,
    packed,
    partners,
    present_patches,
)
from asda.data.features.cpu import CpuPatches
from asda.data.features.fbank import num_samples
from asda.data.order import Draw
from asda.data.stream import evaluation_batches, make_patches, training_batches
from asda.engine.zero import micro_batch_of
from asda.errors import UserError
from asda.models.patches import PatchLayout, from_patches

CONFIG = Path(__file__).parents[3] / "configs" / "demo_finetune.json"
S, T = 32_000, 200
LEAST_P = 1e-4  # of a test of a distribution; the seeds are fixed, so a right program that passes once always does
EVERYTHING = {
    "roll": True,
    "magnitude": 10.0,
    "gain_db": [-6.0, 3.0],
    "noise_snr_db": [10.0, 30.0],
    "frame_noise": 0.1,
    "frame_roll": 10,
    "spec_augment": {"mel_ratio": 0.2, "frame_ratio": 0.4},
    "mixup": {"alpha": 0.8, "probability": 0.9},
}


def augment(**values: object) -> AugmentConfig:
    return AugmentConfig.model_validate_json(json.dumps(values))


def drawn(field: str, number: int = 4000, **values: object) -> np.ndarray:
    config = augment(**values)
    return np.array([getattr(draw_augmentation(np.random.default_rng(n), config, S, T), field) for n in range(number)])


def test_without_augmentation_nothing_happens_to_a_clip():
    one = draw_augmentation(np.random.default_rng(0), augment(), S, T)
    assert one._replace(noise_key=0) == ClipAugmentation()


def test_the_same_generator_gives_the_same_augmentation_and_another_one_another():
    config = augment(**EVERYTHING)
    first, again, other = (draw_augmentation(np.random.default_rng(n), config, S, T, 0.3) for n in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first[:-5], other[:-5], strict=True))  # masks and shares may coincide
    assert first.share == 0.3


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "mixup"])
def test_switching_one_augmentation_on_leaves_the_others_alone(name: str):
    def changed(values: dict) -> dict:
        one = draw_augmentation(np.random.default_rng(5), augment(**values), S, T)
        return {k: v for k, v in one._asdict().items() if v != getattr(ClipAugmentation(), k)}

    alone, together = changed({name: EVERYTHING[name]}), changed(EVERYTHING)
    assert set(alone) <= set(together)
    if name not in ("magnitude", "gain_db"):  # two factors of one gain
        assert all(together[key] == value for key, value in alone.items())


def test_the_roll_is_uniform_over_the_whole_clip():
    shifts = drawn("wave_shift", roll=True)
    assert shifts.min() >= 0
    assert shifts.max() < S
    assert stats.kstest(shifts / S, "uniform").pvalue > LEAST_P


def test_the_magnitude_is_a_beta_variate_plus_a_half():
    assert stats.kstest(drawn("gain", magnitude=10.0) - 0.5, stats.beta(10, 10).cdf).pvalue > LEAST_P


def test_the_gain_is_uniform_in_decibel():
    gain_db = 20 * np.log10(drawn("gain", gain_db=[-12.0, 6.0]))
    assert stats.kstest(gain_db, stats.uniform(-12, 18).cdf).pvalue > LEAST_P


def test_the_noise_is_uniform_in_decibel_below_the_clip():
    snr_db = -20 * np.log10(drawn("noise_ratio", noise_snr_db=[5.0, 40.0]))
    assert stats.kstest(snr_db, stats.uniform(5, 35).cdf).pvalue > LEAST_P


def test_the_amount_of_frame_noise_is_uniform():
    assert stats.kstest(drawn("frame_noise", frame_noise=0.1) / 0.1, "uniform").pvalue > LEAST_P


def test_the_frames_are_rolled_both_ways_by_every_number_up_to_the_most():
    shifts = (drawn("frame_shift", frame_roll=10) + 10) % T
    assert stats.chisquare(np.bincount(shifts, minlength=21)).pvalue > LEAST_P
    assert len(np.unique(shifts)) == 21


@pytest.mark.parametrize(("ratio", "size"), [(0.2, 128), (0.4, 128), (0.2, 1024), (48 / 128, 128)])
def test_a_masked_range_is_that_of_torchaudio(ratio: float, size: int):
    for seed in range(300):
        torch.manual_seed(seed)
        masked = torchaudio.functional.mask_along_axis(torch.ones(1, size, 1), ratio * size, 0.0, axis=1)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        start, stop = masked_range(torch.rand(1).item(), torch.rand(1).item(), ratio, size)
        expected = torch.ones(1, size, 1)
        expected[:, start:stop] = 0
        assert torch.equal(masked, expected)


def test_a_mask_is_as_wide_and_stands_where_specaugment_says():
    config = augment(spec_augment={"mel_ratio": 0.2, "frame_ratio": 0.4})
    boxes = [draw_augmentation(np.random.default_rng(n), config, S, T) for n in range(8000)]
    # Widths 0 .. 24 have 1 / 25.6 of the chance each, the width 25 has what is left: 0.6 / 25.6.
    widths = np.bincount([one.mel_stop - one.mel_start for one in boxes], minlength=26)
    assert stats.chisquare(widths, 8000 * np.array([1.0] * 25 + [0.6]) / 25.6).pvalue > LEAST_P
    widths = np.bincount([one.frame_stop - one.frame_start for one in boxes], minlength=80)
    assert stats.chisquare(widths, np.full(80, 100)).pvalue > LEAST_P
    assert max(one.mel_stop for one in boxes) <= 128
    assert max(one.frame_stop for one in boxes) <= T
    both = np.corrcoef(
        [[one.mel_stop - one.mel_start, one.frame_stop - one.frame_start] for one in boxes], rowvar=False
    )
    assert abs(both[0, 1]) < 5 / 8000**0.5  # the standard error of no correlation is 1 / sqrt(n)


def test_shares_are_beta_variates_for_the_pairs_that_are_mixed():
    mixup = augment(mixup={"alpha": 0.8, "probability": 0.9}).mixup
    shares = np.array([draw_share(np.random.default_rng(n), mixup) for n in range(4000)])
    assert stats.binomtest(int((shares < 1).sum()), 4000, 0.9).pvalue > LEAST_P
    assert stats.kstest(shares[shares < 1], stats.beta(0.8, 0.8).cdf).pvalue > LEAST_P
    assert draw_share(np.random.default_rng(0), augment().mixup) == 1


def test_partners_are_the_neighbours_in_the_pairs_that_are_mixed():
    shares = [0.3, 0.3, 1.0, 1.0, 0.9, 0.9]
    assert partners([ClipAugmentation(share=share) for share in shares]) == [1, 0, 2, 3, 5, 4]


@pytest.mark.parametrize("shares", [[0.3], [0.3, 0.4], [1.0, 0.3], [0.3, 0.3, 0.2]])
def test_a_clip_without_its_partner_is_not_mixed_in_silence(shares: list[float]):
    with pytest.raises(ValueError, match="its partner does not"):
        partners([ClipAugmentation(share=share) for share in shares])


def test_labels_are_mixed_as_their_clips_are():
    targets_BC = np.eye(6, dtype=np.float32)[[0, 1, 2, 3]]
    mixed_BC = mixed_targets(targets_BC, [ClipAugmentation(share=share) for share in (0.25, 0.25, 1.0, 1.0)])
    expected = [[0.25, 0.75, 0, 0, 0, 0], [0.75, 0.25, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert mixed_BC.dtype == np.float32
    assert mixed_BC.tolist() == expected


def test_packed_numbers_come_back_exactly():
    some = [ClipAugmentation(159_999, 1.1, 0.2, 0.3, 1023, 2**32 - 1, 3, 9, 5, 77, 0.1)] * 2
    assert [ClipAugmentation(*row[:-1]) for row in packed(some)] == some
    assert packed(some)[:, -1].tolist() == [1, 0]


def test_an_augmentation_belongs_to_the_visit_and_a_share_to_the_pair():
    config = load_config(CONFIG, [f"data.augment={json.dumps(EVERYTHING)}"]).data
    draws = [Draw(epoch=n // 10, clip=7 * n % 10, repeat=0) for n in range(16)]
    lengths = [S + n for n in range(16)]
    whole = draw_augmentations(draws, lengths, config, seed=3)
    assert whole is not None
    for size in (2, 4, 8):
        parts = [draw_augmentations(draws[n : n + size], lengths[n : n + size], config, 3) for n in range(0, 16, size)]
        assert [one for part in parts for one in part or []] == whole
    assert len({one.noise_key for one in whole}) == 16
    assert [one.share for one in whole[::2]] == [one.share for one in whole[1::2]]
    mixed = [one.share for one in whole[::2] if one.share < 1]
    assert len(set(mixed)) == len(mixed) >= 4
    assert draw_augmentations(draws, lengths, config, seed=4) != whole
    assert draw_augmentations(draws, lengths, load_config(CONFIG).data, seed=3) is None


def test_in_the_order_of_ast_a_mixture_is_blanked_made_noisy_and_rolled_as_one_clip():
    settings = EVERYTHING | {"spec_augment": {"mel_ratio": 0.4, "frame_ratio": 0.4, "order": "before_normalisation"}}
    config = load_config(CONFIG, [f"data.augment={json.dumps(settings)}"]).data
    draws = [Draw(epoch=0, clip=n, repeat=0) for n in range(40)]
    some = draw_augmentations(draws, [S] * 40, config, seed=3)
    assert some is not None
    pairs = list(zip(some[::2], some[1::2], strict=True))
    alike = {name for name in ClipAugmentation._fields if all(getattr(a, name) == getattr(b, name) for a, b in pairs)}
    mixed = [pair for pair in pairs if pair[0].share < 1]
    assert alike == {"share"}, "a pair that is not mixed is two clips"
    for a, b in mixed:
        of_waves = ("wave_shift", "gain", "noise_ratio")
        assert a == b._replace(**{name: getattr(a, name) for name in of_waves})
        assert all(getattr(a, name) != getattr(b, name) for name in of_waves)
    # Both patches of a pair, with clips that have nothing in common: what is blank in the mixture is the blank value.
    waves = [(np.random.default_rng(n).standard_normal(S) * 3000).astype(np.int16) for n in range(2)]
    one = mixed[0][0]._replace(frame_noise=0.0, frame_shift=0)
    both = frames_alike([one, mixed[0][1]])
    layout = PatchLayout(T // 16 * 16, 16, -4.0, 4.0, 0.0, mask_first=True)
    with closing(CpuPatches(layout, batch_size=2, threads=1)) as maker:
        patches = maker.make(waves, list(packed(both)))
        bins = from_patches(torch.from_numpy(np.stack(patches)), 16).numpy()
    box = bins[:, :, one.mel_start : one.mel_stop]
    assert one.mel_stop - one.mel_start > 8
    assert np.abs(box - 0.5).max() <= 2.0**-23  # (0 + 4) / 8, times a share and the rest of it


@pytest.mark.parametrize(("ranks", "micro_batch", "threads"), [(1, 4, 1), (1, 8, 2), (2, 4, 3), (4, 2, 1)])
def test_a_step_is_the_same_however_it_is_cut(shards: Path, ranks: int, micro_batch: int, threads: int):
    def steps(ranks: int, micro_batch: int, threads: int, first_step: int = 0) -> list[torch.Tensor]:
        overrides = [f"data.augment={json.dumps(EVERYTHING)}", 'data.log_mel={"mean": -4, "std": 3}', "data.device=cpu"]
        config = load_config(CONFIG, [*overrides, f"data.threads={threads}", "data.padding=masked"])
        dataset = ClipDataset(f"{shards}:train", labelled=True)
        per_rank = []
        for rank in range(ranks):
            stream = training_batches(
                dataset, config.data, seed=1, first_step=first_step, batch=8, micro_batch=micro_batch, rank=rank,
                world_size=ranks, masks=None,
            )  # fmt: skip
            found = []
            stage = make_patches(config, torch.device("cpu"), micro_batch, training=True)
            with closing(stream.compose(stage).iterator()) as batches:
                for patches_BNP, batch in islice(batches, (16 - 8 * first_step) // ranks // micro_batch):
                    present_BN = batch.present(config, torch.device("cpu"))
                    assert present_BN is not None
                    targets_BC = torch.from_numpy(batch.targets(8))
                    found.append(torch.cat([patches_BNP.flatten(1), present_BN.float(), targets_BC], dim=1))
            per_rank.append(torch.cat(found).unflatten(0, (-1, 8 // ranks)))
        return list(torch.cat(per_rank, dim=1))

    expected = steps(1, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(steps(ranks, micro_batch, threads), expected, strict=True))
    assert torch.equal(steps(ranks, micro_batch, threads, first_step=1)[0], expected[1])  # as after a resume


def test_evaluation_changes_nothing_and_the_masks_of_students_ignore_augmentation(shards: Path):
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    configs = [load_config(CONFIG, [f"data.augment={json.dumps(values)}"]).data for values in ({}, EVERYTHING)]
    one_rank = {"seed": 1, "first_step": 0, "batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1}
    masks = lambda rng: rng.integers(100, size=(2, 5))  # noqa: E731
    plain, augmented = (next(iter(training_batches(dataset, config, **one_rank, masks=masks))) for config in configs)
    assert plain.augmentations is None
    assert augmented.augmentations is not None
    assert np.array_equal(plain.visible_BMK, augmented.visible_BMK)  # type: ignore[arg-type]
    assert [clip.samples.tobytes() for clip in plain.clips] == [clip.samples.tobytes() for clip in augmented.clips]
    assert next(iter(evaluation_batches(dataset, configs[1], batch=4, rank=0, world_size=1))).augmentations is None


def test_mixing_wants_an_even_share_of_the_batch_on_every_rank():
    config = load_config(CONFIG, ["data.augment.mixup.alpha=0.8", "optimizer.batch=24", "engine.micro_batch=5"])
    assert [micro_batch_of(config, ranks) for ranks in (1, 2, 3, 4, 6)] == [4, 4, 4, 2, 4]
    with pytest.raises(UserError, match=r"an even number of clips for each of 8 ranks; use a batch of 32"):
        micro_batch_of(config, 8)


@pytest.mark.parametrize("frame_shift", [0, 5, 60])
def test_a_patch_is_present_where_one_of_its_frames_is(frame_shift: int):
    frames, patch, lengths = 64, 16, [num_samples(n) for n in (1, 16, 17, 40, 64, 500)]
    present_BN = present_patches(lengths, [ClipAugmentation(frame_shift=frame_shift)] * 6, frames, patch)
    for present_N, real in zip(present_BN, (1, 16, 17, 40, 64, 64), strict=True):
        heard = {(frame + frame_shift) % frames // patch for frame in range(real)}
        assert present_N.reshape(4, 8).tolist() == [[time in heard] * 8 for time in range(4)]


def test_without_rolling_a_patch_is_present_if_its_first_frame_is():
    lengths = [num_samples(n) for n in range(1, 65)]
    present_BN = present_patches(lengths, None, 64, 16)
    assert present_BN[:, ::8].tolist() == [[16 * time < real for time in range(4)] for real in range(1, 65)]


def test_a_mixture_is_present_where_either_clip_is():
    pair = [ClipAugmentation(share=0.5)] * 2
    present_BN = present_patches([num_samples(16), num_samples(48)], pair, 64, 16)
    assert present_BN[:, ::8].tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.augment.mixup.alpha=0.8", "optimizer.batch=15"], "optimizer.batch 15 must be even"),
        (["data.augment.mixup.alpha=0.8", "engine.micro_batch=1"], "engine.micro_batch 1 at least 2"),
        (["data.augment.noise_snr_db=[30, 10]"], r"noise_snr_db \[30.0, 10.0\] must give the least value first"),
        (["data.augment.noise_snr_db=[-7000, 0]"], "greater than or equal to -200"),
        (["data.augment.gain_db=[1, -1]"], r"gain_db \[1.0, -1.0\] must give the least value first"),
        (["data.augment.frame_roll=100000"], "frame_roll 100000 must be less than data.frames"),
        (["data.augment.spec_augment.mel_ratio=1.5"], "data.augment.spec_augment.mel_ratio is 1.5"),
        (["data.augment.mixup.probability=-1"], "data.augment.mixup.probability is -1"),
        (["data.augment.rol=true"], "did you mean data.augment.roll"),
        (["data.padding=ignored"], "data.padding is"),
    ],
)
def test_a_wrong_augmentation_is_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        load_config(CONFIG, overrides)


def test_pre_training_refuses_masked_padding_which_its_targets_do_not_know():
    with pytest.raises(UserError, match=r"data\.padding masked is for objective\.kind classify"):
        load_config(CONFIG.parent / "demo_pretrain.json", ["data.padding=masked"])
