"""Reading audio: exact where it can be, checked against libsndfile and soxr elsewhere, and safe from hostile files."""

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from asda.data.audio import AudioError, decode_wav, encode_wav, read_audio


def noise(num_samples: int = 16_000) -> np.ndarray:
    return (3000 * np.random.default_rng(7).standard_normal(num_samples)).astype(np.int16)


def reason(path: Path, max_seconds: float = 600) -> str:
    with pytest.raises(AudioError) as error:
        read_audio(path, max_seconds)
    return str(error.value)


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
def test_other_rates_and_stereo_are_the_mean_of_the_channels_through_soxr(tmp_path, rate):
    stereo = np.random.default_rng(1).uniform(-0.7, 0.7, (rate, 2)).astype(np.float32)
    path = tmp_path / "clip.wav"
    soundfile.write(path, stereo, rate, subtype="FLOAT")
    expected = soxr.resample(stereo.astype(np.float64).mean(axis=1), rate, 16_000, quality="HQ") * 32768
    # Against float64 our float32 chain errs by 24-bit rounding: about 1e-6 x 32768 < 0.1 steps before the rounding.
    assert np.abs(read_audio(path) - np.clip(expected, -32768, 32767)).max() < 0.6


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


def test_a_huge_number_of_values_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "clip.wav"
    data_bytes = 64 * 2 * (1 << 23)  # 2^29 values; the file is sparse
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 64, 768_000, 768_000 * 128, 128, 16)
    head = struct.pack("<4sI4s", b"RIFF", data_bytes + 36, b"WAVE") + fmt + struct.pack("<4sI", b"data", data_bytes)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + data_bytes)
    assert "values are more than" in reason(path)


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


def test_clips_shorter_than_a_frame_or_longer_than_allowed_are_refused(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(399), 16_000)
    assert "399 samples" in reason(path)
    soundfile.write(path, noise(400), 16_000)
    assert len(read_audio(path, max_seconds=0.025)) == 400
    soundfile.write(path, noise(401), 16_000)
    assert "longer than 0.025 s" in reason(path, max_seconds=0.025)
