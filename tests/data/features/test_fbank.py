from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.compliance.kaldi as torchaudio_kaldi
from hypothesis import given
from hypothesis import strategies as st
from kaldi import MOST, PERCENTILE_99_9, float64_log_mel, kaldi_log_mel
from safetensors.torch import load_file

from asda.data.features import fbank

FLOOR = np.log(np.float32(fbank.MIN_ENERGY))


@pytest.fixture(autouse=True, scope="module")
def _one_core() -> Iterator[None]:
    """As in the pipeline's threads; on a busy machine, waiting for a second core costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def real_clips(shared: Path) -> list[np.ndarray]:
    """Every 20th clip of each folder: loud, quiet, clipped, shifted, digitally silent, 1 to 10 s."""
    paths = [path for name in ("pile", "env", "kws") for path in sorted((shared / "data" / name).rglob("*.ogg"))[::20]]
    return [soundfile.read(path, dtype="int16")[0] for path in paths]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    errors = np.abs(ours - theirs)
    assert errors.max() <= MOST
    assert np.quantile(errors, 0.999) <= PERCENTILE_99_9


def test_log_mel_is_torchaudios_on_real_audio(real_clips: list[np.ndarray]):
    for samples_S in real_clips:
        assert_close(fbank.log_mel(samples_S), kaldi_log_mel(samples_S))


def test_log_mel_differs_from_float64_by_rounding_only(real_clips: list[np.ndarray]):
    for samples_S in real_clips[::2]:
        exact_TM, slack_TM = float64_log_mel(samples_S)
        assert (np.abs(fbank.log_mel(samples_S) - exact_TM) <= slack_TM).all()


@pytest.mark.parametrize("name", ["", "syn16000.", "syn32000.", "syn44100."])
def test_log_mel_is_the_official_front_ends(shared: Path, name: str):
    golden = load_file(shared / "golden" / "fbank_test.safetensors")
    assert_close(fbank.log_mel_of_wave(golden[name + "wave16k"]).numpy(), golden[name + "fbank"].numpy())


def test_int16_samples_are_amplitudes_times_32768():
    samples_S = np.random.default_rng(1).integers(-32768, 32768, 16000).astype(np.int16)
    wave_S = torch.from_numpy(samples_S / 32768).float()
    assert np.array_equal(fbank.log_mel(samples_S), fbank.log_mel_of_wave(wave_S).numpy())


def test_mel_filters_are_torchaudios_to_the_last_bit():
    theirs_MK = torchaudio_kaldi.get_mel_banks(128, 512, 16000.0, 20.0, 0.0, 100.0, -500.0, 1.0)[0]
    ours_KM = fbank.mel_filters()
    assert torch.equal(ours_KM[:-1].T, theirs_MK)
    assert not ours_KM[-1].any()


def test_two_filters_a_line_hold_every_weight():
    dense_KM = np.zeros((fbank.NUM_LINES, fbank.NUM_MEL_BINS), np.float32)
    lines_K, (filter_K, weights_K2) = np.arange(fbank.NUM_LINES), fbank.LINE_FILTERS
    for neighbour in (0, 1):
        dense_KM[lines_K, filter_K + neighbour] = weights_K2[:, neighbour]
    assert np.array_equal(dense_KM, fbank.mel_filters().numpy())


def test_frames_are_torchaudios_to_the_last_bit(real_clips: list[np.ndarray]):
    for samples_S in real_clips[::10]:
        wave_S = torch.from_numpy(samples_S / 32768).float()
        theirs_TN, _ = torchaudio_kaldi._get_window(
            wave_S, 512, 400, 160, "hanning", 0.42, True, True, 1.0, 0.0, True, 0.97
        )
        ours_TN = np.zeros_like(theirs_TN.numpy())
        one, zero = np.float32(1), np.float32(0)
        window_W = fbank.WINDOW_W.numpy()
        fbank._windowed_frames(wave_S.numpy(), one, zero, one, np.float32(fbank.PRE_EMPHASIS), window_W, ours_TN)
        assert np.array_equal(ours_TN, theirs_TN.numpy())


@pytest.mark.parametrize("gain", [0.5, 1.37])
def test_gain_is_a_factor_on_the_wave_without_its_mean(gain: float):
    samples_S = np.random.default_rng(4).normal(500, 3000, 16000).astype(np.int16)
    wave_S = samples_S / 32768
    louder_S = ((wave_S - wave_S.mean()) * gain).astype(np.float32)
    assert_close(fbank.log_mel(samples_S, gain), fbank.log_mel(louder_S))


@pytest.mark.parametrize("extra_frames", [-1, 0, 1, fbank.FRAMES_AT_ONCE + 7])
def test_a_clip_computed_in_parts_has_torchaudios_frames(extra_frames: int):
    length = fbank.num_samples(fbank.FRAMES_AT_ONCE + extra_frames)
    samples_S = np.random.default_rng(2).normal(0, 3000, length).astype(np.int16)
    assert_close(fbank.log_mel(samples_S), kaldi_log_mel(samples_S))


@given(st.integers(1, 10_000), st.integers(0, fbank.FRAME_SHIFT - 1))
def test_a_frame_needs_a_whole_window(frames: int, spare: int):
    assert fbank.num_frames(fbank.num_samples(frames) + spare) == frames


def test_the_shortest_clip_is_one_frame():
    samples_S = np.arange(400, dtype=np.int16)
    assert_close(fbank.log_mel(samples_S), kaldi_log_mel(samples_S))
    assert fbank.log_mel(samples_S).shape == (1, 128)


@pytest.mark.parametrize("level", [0, 1, 32767, -32768])
def test_a_constant_wave_is_silence(level: int):
    assert (fbank.log_mel(np.full(1600, level, dtype=np.int16)) == FLOOR).all()


def test_full_scale_square_wave_agrees():
    samples_S = np.tile(np.repeat(np.array([32767, -32768], dtype=np.int16), 40), 200)
    exact_TM, slack_TM = float64_log_mel(samples_S)
    assert (np.abs(fbank.log_mel(samples_S) - exact_TM) <= slack_TM).all()


def test_threads_do_not_disturb_one_another():
    rng = np.random.default_rng(3)
    clips = [rng.integers(-9000, 9000, length).astype(np.int16) for length in rng.integers(400, 30_000, 40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(fbank.log_mel, clips))
    assert all(np.array_equal(fbank.log_mel(clip), mel) for clip, mel in zip(clips, together, strict=True))


def test_the_samples_are_left_as_they_were():
    samples_S = np.arange(-800, 800, dtype=np.int16)
    samples_S.flags.writeable = False
    fbank.log_mel(samples_S)
    wave_S = torch.linspace(0.1, 0.9, 1600)
    fbank.log_mel_of_wave(wave_S)
    assert torch.equal(wave_S, torch.linspace(0.1, 0.9, 1600))
