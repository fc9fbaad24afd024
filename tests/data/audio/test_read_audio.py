"""Reading audio: exact where it can be, as libsndfile and torchaudio have it elsewhere, and safe from hostile files."""

import io
import math
import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file
from torchaudio.functional import resample as torchaudio_resample

from asda.data.audio import resampling, sndfile
from asda.data.audio.read import read_audio, read_wave
from asda.data.audio.resampling import resample
from asda.data.audio.waves import AudioError, decode_wav, encode_wav, resampled_length


def noise(num_samples: int = 16_000) -> np.ndarray:
    return (3000 * np.random.default_rng(7).standard_normal(num_samples)).astype(np.int16)


def reason(path: Path, max_seconds: float = 600) -> str:
    reasons = []
    for read in (read_audio, read_wave):
        with pytest.raises(AudioError) as error:
            read(path, max_seconds)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]
    return reasons[0]


@pytest.mark.parametrize(("extension", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("aiff", "PCM_16")])
def test_16_khz_mono_16_bit_audio_comes_out_bit_for_bit(tmp_path, extension, subtype):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, noise(), 16_000, subtype=subtype)
    np.testing.assert_array_equal(read_audio(path), noise())


def test_a_wav_without_an_extension_is_read_by_its_content(tmp_path):
    path = tmp_path / "clip.raw"
    path.write_bytes(encode_wav(noise()))
    np.testing.assert_array_equal(read_audio(path), noise())


def test_vorbis_at_16_khz_is_the_decoded_float_rounded_to_int16(shared):
    path = shared / "data/env/esc/1-100032-A-0.ogg"
    decoded, rate = soundfile.read(path, dtype="float64")
    assert rate == 16_000
    np.testing.assert_array_equal(read_audio(path), np.clip(np.round(decoded * 32768), -32768, 32767))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_and_stereo_are_the_mean_of_the_channels_through_torchaudio(tmp_path, rate):
    stereo = np.random.default_rng(1).uniform(-0.7, 0.7, (10 * rate, 2)).astype(np.float32)
    path = tmp_path / "clip.wav"
    soundfile.write(path, stereo, rate, subtype="FLOAT")
    mono = (stereo[:, 0] + stereo[:, 1]) / 2
    official = torchaudio_resample(torch.from_numpy(mono), rate, 16_000).numpy()
    np.testing.assert_array_equal(read_audio(path), np.clip(np.rint(official * 32768), -32768, 32767))


@pytest.mark.parametrize(("stage", "rate"), [("", 32_000), ("syn32000.", 32_000), ("syn44100.", 44_100)])
def test_resampled_waves_are_the_official_ones(shared, stage, rate):
    official = load_file(shared / "golden" / "fbank_test.safetensors")
    wave = official["wave_in_float32" if not stage else f"{stage}wave_in"].numpy()
    # To the bit on a like machine; on others the 28 products of a sum, together below 1.6, may add up in another order.
    np.testing.assert_allclose(resample(wave, rate), official[f"{stage}wave16k"], rtol=0, atol=28 * 2**-24 * 1.6)


@pytest.mark.parametrize("rate", [11_127, 22_255, 16_001])
def test_rates_for_which_torchaudio_s_kernel_would_be_huge_go_through_soxr(tmp_path, rate):
    mono = np.random.default_rng(1).uniform(-0.7, 0.7, rate).astype(np.float32)
    path = tmp_path / "clip.wav"
    soundfile.write(path, mono, rate, subtype="FLOAT")
    expected = soxr.resample(mono.astype(np.float64), rate, 16_000, quality="HQ") * 32768
    ours = read_audio(path)
    # soxr ends a sample earlier. Our float32 chain errs by 24-bit rounding: 1e-6 x 32768 < 0.1 steps, and the rounding
    # to a step; and the silence behind the wave is in the last samples' reach.
    assert len(ours) == resampled_length(rate, rate) == 16_000
    assert np.abs(ours[: len(expected)] - np.clip(expected, -32768, 32767))[:-100].max() < 0.6


@pytest.mark.parametrize("num_samples", [441, 442, 44_099, 44_100, 123_457])
def test_the_end_of_a_wave_counts_as_a_whole_sample(num_samples):
    for rate in (22_050, 44_100, 48_000, 11_127):
        assert len(resample(np.zeros(num_samples, np.float32), rate)) == math.ceil(Fraction(num_samples * 16_000, rate))


@pytest.mark.parametrize("rate", [1_000, 8_000, 32_000, 44_100, 47_952, 192_000])
@pytest.mark.parametrize("at_once", [6_000, 50_001])
def test_a_long_wave_resampled_in_blocks_is_the_whole_wave_resampled(monkeypatch, rate, at_once):
    wave_S = np.random.default_rng(2).uniform(-0.7, 0.7, 3 * at_once + 17).astype(np.float32)
    whole_S = torchaudio_resample(torch.from_numpy(wave_S), rate, 16_000).numpy()
    monkeypatch.setattr(resampling, "RESAMPLE_AT_ONCE", at_once)
    blocks_S = resample(wave_S, rate)
    assert len(blocks_S) == resampled_length(len(wave_S), rate)
    # Two sums of the same products in another order: each is off by at most 2^-24 x terms x the sum of magnitudes.
    kernel = resampling._resampler(rate).kernel
    terms, magnitude = int((kernel != 0).sum(-1).max()), float(kernel.abs().sum(-1).max()) * 0.7
    common = min(len(whole_S), len(blocks_S))
    assert common >= len(blocks_S) - 1  # torchaudio rounds the length in float32
    assert np.abs(blocks_S[:common] - whole_S[:common]).max() <= 2 * 2**-24 * terms * magnitude


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_a_wave_is_the_mean_of_the_channels_at_the_file_s_own_rate_however_it_is_read(tmp_path, monkeypatch, extension):
    path = tmp_path / f"clip.{extension}"
    stereo = np.stack([noise(44_100), noise(44_100)[::-1]], axis=1)
    soundfile.write(path, stereo, 44_100)
    decoded, _ = soundfile.read(path, dtype="float32")
    monkeypatch.setattr(sndfile, "READ_AT_ONCE", 5_001)
    wave_S, rate = read_wave(path)
    assert (rate, wave_S.dtype) == (44_100, np.float32)
    np.testing.assert_array_equal(wave_S, (decoded[:, 0] + decoded[:, 1]) / 2)


def test_16_khz_mono_16_bit_audio_is_the_same_as_a_wave_and_as_int16(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(encode_wav(noise()))
    wave_S, rate = read_wave(path)
    assert rate == 16_000
    np.testing.assert_array_equal(wave_S * 32768, read_audio(path))


def test_reading_many_channels_takes_the_memory_of_one(tmp_path):
    path = tmp_path / "clip.wav"
    num_frames = 20 * 192_000
    soundfile.write(path, np.zeros((num_frames, 8), np.int16), 192_000)
    tracemalloc.start()
    read_wave(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The result, and a few blocks: the values read, their sum over the channels, its quotient.
    assert peak < 4 * num_frames + 4 * 4 * sndfile.READ_AT_ONCE


def test_samples_beyond_full_scale_saturate(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.repeat([2.0, -2.0], 400), 16_000, subtype="FLOAT")
    assert read_audio(path).tolist() == [32767] * 400 + [-32768] * 400


def test_24_bit_audio_is_rounded_to_the_nearest_step(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.full(400, (1000 * 256 + 200) << 8, dtype=np.int32), 16_000, subtype="PCM_24")
    assert set(read_audio(path)) == {1001}


def test_python_s_own_wave_module_reads_what_encode_wav_writes():
    with wave.open(io.BytesIO(encode_wav(noise()))) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 16_000)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(16_000), "<i2"), noise())


def test_decode_wav_is_a_view_and_the_inverse_of_encode_wav():
    wav = encode_wav(noise())
    samples = decode_wav(wav)
    np.testing.assert_array_equal(samples, noise())
    assert samples.base is not None
    assert decode_wav(memoryview(wav)).tobytes() == samples.tobytes()


@pytest.mark.parametrize("byte", range(44))
def test_decode_wav_refuses_every_other_header(byte):
    wav = bytearray(encode_wav(noise(400)))
    wav[byte] ^= 1
    with pytest.raises(AudioError, match="canonical"):
        decode_wav(bytes(wav))


@pytest.mark.parametrize("length", [0, 43, 45, 843])
def test_decode_wav_refuses_a_cut_payload(length):
    with pytest.raises(AudioError, match="canonical"):
        decode_wav(encode_wav(noise(400))[:length])


def test_a_flac_that_declares_2_to_the_36_frames_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "clip.flac"
    soundfile.write(path, noise(), 16_000)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # STREAMINFO: the 36 bits of the number of samples begin in the low half of byte 13
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)
    assert "longer than 600 s" in reason(path)


@pytest.mark.parametrize("extension", ["wav", "flac", "aiff", "au", "w64", "rf64", "mp3"])
def test_a_truncated_file_is_refused_and_not_read_as_a_shorter_clip(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, noise(160_000), 16_000, format=extension.upper())
    data = path.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])
    assert "truncated" in reason(path) or "libsndfile" in reason(path)


def test_a_wav_streamed_without_knowing_its_length_is_accepted(tmp_path):
    wav = bytearray(encode_wav(noise()))
    wav[4:8] = wav[40:44] = b"\xff\xff\xff\xff"
    path = tmp_path / "clip.wav"
    path.write_bytes(wav)
    np.testing.assert_array_equal(read_audio(path), noise())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, value):
    samples = noise() / 32768
    samples[9000] = value
    path = tmp_path / "clip.wav"
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    assert reason(path) == "holds samples that are not finite"


def test_integers_that_are_stored_as_floats_are_refused_and_not_saturated(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.clip(noise().astype(np.float64), -11_698, 11_698), 16_000, subtype="FLOAT")
    assert reason(path) == "reaches 11698 where full scale is 1; divide it, or give integers as int16"


@pytest.mark.parametrize(("rate", "channels", "words"), [(1, 1, "1 Hz"), (16_000, 65, "65 channels")])
def test_absurd_rates_and_channels_are_refused(tmp_path, rate, channels, words):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.zeros((500, channels), np.int16), rate)
    assert words in reason(path)


def test_what_is_not_audio_is_refused_with_its_reason(tmp_path):
    contents = {"empty.wav": b"", "page.wav": b"<!DOCTYPE html><html>404</html>", "none.wav": encode_wav(noise(0))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert reason(tmp_path / "empty.wav") == "the file is empty"
    assert reason(tmp_path / "page.wav") == "libsndfile: Format not recognised"
    assert reason(tmp_path / "none.wav") == "holds no samples"
    assert reason(tmp_path / "gone.wav") == "no such file"
    assert reason(tmp_path) == "is not a regular file"
    assert reason(tmp_path / f"{'x' * 300}.wav") == "cannot be read: File name too long"


def test_clips_shorter_than_a_frame_or_longer_than_allowed_are_refused(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(399), 16_000)
    assert "399 samples" in reason(path)
    soundfile.write(path, noise(400), 16_000)
    assert len(read_audio(path, max_seconds=0.025)) == 400
    soundfile.write(path, noise(401), 16_000)
    assert "longer than 0.025 s" in reason(path, max_seconds=0.025)
