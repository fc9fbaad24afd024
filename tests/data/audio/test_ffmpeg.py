"""AAC, ALAC and Opus in MP4, WebM, Matroska and ADTS: what FFmpeg decodes, cut where asked, and safe from bad files."""

import contextlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from asda.data.audio.read import read_audio, read_wave
from asda.data.audio.waves import AudioError
from asda.sharding.audio_ref import Place, read_place

KINDS = {
    "a.m4a": ("ipod", "aac", 44_100),
    "b.mp4": ("mp4", "libopus", 48_000),
    "c.webm": ("webm", "libopus", 48_000),
    "d.aac": ("adts", "aac", 32_000),
    "e.mkv": ("matroska", "aac", 22_050),
    "f.m4a": ("ipod", "alac", 16_000),
}
SECONDS = 12


def chirps(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Two channels of rising tones, float32 [2, S]: every place sounds different."""
    time_S = np.arange(round(seconds * rate)) / rate
    phases_S = 2 * np.pi * time_S * (300 + 50 * time_S)
    return np.stack([0.3 * np.sin(phases_S), 0.2 * np.sin(1.5 * phases_S)]).astype(np.float32)


def encode(path: Path, container: str, codec: str, rate: int, audio_CS: np.ndarray) -> None:
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="stereo")
        assert isinstance(stream, av.AudioStream)
        for start in range(0, audio_CS.shape[1], 1024):
            samples_CS = np.ascontiguousarray(audio_CS[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(samples_CS, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    for name, (container, codec, rate) in KINDS.items():
        encode(folder / name, container, codec, rate, chirps(rate))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_compressed_wave_is_near_the_wave_that_was_compressed(files, name):
    wave_S, rate = read_wave(files / name)
    original_S = chirps(KINDS[name][2]).mean(0)
    assert (rate, wave_S.dtype) == (KINDS[name][2], np.float32)
    assert 0 <= len(wave_S) - len(original_S) <= 4096  # the end is padded to whole frames, where nothing says so
    # Raw AAC does not say how many samples its encoder put before the first: one frame of 1024.
    original_S = np.concatenate([np.zeros(1024 * (name == "d.aac"), np.float32), original_S])
    common = min(len(wave_S), len(original_S))
    error_S = wave_S[:common] - original_S[:common]
    # Lossy codecs promise no bound. A shift by one sample alone would give -30 dB at these frequencies or more.
    assert np.sqrt(np.mean(error_S**2)) < 0.1 * np.sqrt(np.mean(original_S**2))


def test_lossless_audio_at_16_khz_arrives_to_the_bit(files):
    decoded = np.rint(chirps(16_000) * 2**15).clip(-(2**15), 2**15 - 1)
    ours = read_audio(files / "f.m4a")
    # The encoder rounds each channel to 16 bits, so their mean is off by half a step, and the mean is rounded again.
    assert len(ours) == decoded.shape[1]
    assert np.abs(ours - decoded.mean(0)).max() <= 1.0


@pytest.mark.parametrize("name", KINDS)
def test_a_segment_is_a_slice_of_the_whole(files, name):
    whole_S, rate = read_wave(files / name)
    start_s, stop_s = 7.25, 9.5
    segment_S, _ = read_wave(files / name, segment=(start_s, stop_s))
    assert len(segment_S) == round(stop_s * rate) - round(start_s * rate)
    # Matroska counts milliseconds, and rounds both a packet's time and its codec's delay.
    shifts = range(-rate // 1000, rate // 1000 + 1) if name.endswith(("webm", "mkv")) else [0]
    first = round(start_s * rate)
    errors = [np.abs(whole_S[first + shift :][: len(segment_S)] - segment_S).max() for shift in shifts]
    # A decoder that began elsewhere has another past. After half a second its traces are below 16 bits.
    assert min(errors) < 2**-15


@pytest.mark.parametrize("name", KINDS)
def test_a_compressed_file_no_longer_than_its_segment_is_taken_whole(files, name):
    whole = read_place(Place(str(files / name)))
    np.testing.assert_array_equal(read_place(Place(str(files / name), 30, 30 + SECONDS)), whole)


@pytest.mark.parametrize("name", KINDS)
def test_bounds_hold_for_compressed_files_too(files, name):
    with pytest.raises(AudioError, match=r"lasts 12\.\d s and the clip begins at 30 s"):
        read_place(Place(str(files / name), 30, 33))
    with pytest.raises(AudioError, match="longer than 5 s"):
        read_place(Place(str(files / name)), max_seconds=5)
    assert len(read_place(Place(str(files / name), 1, 4), max_seconds=3)) == 48_000


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.66, 0.9])
def test_a_truncated_compressed_file_is_refused(files, tmp_path, name, share):
    whole = (files / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    if name == "d.aac":  # declares no length, so only the last, broken frame tells
        with contextlib.suppress(AudioError):
            assert len(read_audio(tmp_path / name)) < 16_000 * SECONDS
    else:
        with pytest.raises(AudioError, match=r"truncated|FFmpeg"):
            read_audio(tmp_path / name)


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits_never_crash_the_decoder(files, tmp_path, name):
    rng = np.random.default_rng(3)
    whole = np.frombuffer((files / name).read_bytes(), np.uint8)
    for _ in range(20):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=8)] ^= np.uint8(1) << rng.integers(8, size=8, dtype=np.uint8)
        (tmp_path / name).write_bytes(damaged.tobytes())
        with contextlib.suppress(AudioError):
            samples_S = read_audio(tmp_path / name, max_seconds=SECONDS + 2)
            assert 400 <= len(samples_S) <= 16_000 * (SECONDS + 3)


def test_content_and_not_the_name_chooses_the_decoder(files, tmp_path):
    (tmp_path / "x.wav").write_bytes((files / "a.m4a").read_bytes())
    np.testing.assert_array_equal(read_audio(tmp_path / "x.wav"), read_audio(files / "a.m4a"))
    soundfile.write(tmp_path / "x.mp3", chirps(16_000)[0], 16_000)
    (tmp_path / "y.m4a").write_bytes((tmp_path / "x.mp3").read_bytes())
    np.testing.assert_array_equal(read_audio(tmp_path / "y.m4a"), read_audio(tmp_path / "x.mp3"))


def test_a_playlist_that_names_other_files_is_opened_by_nobody(files, tmp_path):
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXTINF:12,\n{files / 'a.m4a'}\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioError, match="libsndfile"):
        read_audio(tmp_path / "list.m4a")


def test_a_film_without_sound_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 16
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        file.mux(stream.encode(None))
    with pytest.raises(AudioError, match="holds no audio track"):
        read_audio(tmp_path / "a.mp4")


def test_without_pyav_the_reason_names_the_extra(files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AudioError, match=r"needs PyAV \(mov\): pip install 'asda\[m4a\]'"):
        read_audio(files / "a.m4a")
