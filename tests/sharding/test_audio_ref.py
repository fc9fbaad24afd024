"""Where a clip lies: segments of long recordings, files that were cut before, rows of HDF5 packs."""

import pickle
import time

import h5py
import numpy as np
import pytest
import soundfile

from asda.data.audio.waves import CUT_SLACK_S, AudioError
from asda.sharding.audio_ref import Place, read_place

RATE = 16_000
SECONDS = 30


def noise(seconds: float = SECONDS) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 3000, round(seconds * RATE)).astype(np.int16)


def written(path, samples_S=None, rate=RATE) -> str:
    soundfile.write(path, noise() if samples_S is None else samples_S, rate)
    return str(path)


@pytest.mark.parametrize("extension", ["wav", "flac", "aiff"])
def test_a_segment_of_a_lossless_file_is_a_slice_to_the_bit(tmp_path, extension):
    path = written(tmp_path / f"a.{extension}")
    for start_s, stop_s in [(0, 10), (12.3456, 13.5), (20, 30), (29.9, 30)]:
        expected = noise()[round(start_s * RATE) : round(stop_s * RATE)]
        np.testing.assert_array_equal(read_place(Place(path, start_s, stop_s)), expected)


@pytest.mark.parametrize(("extension", "atol"), [("ogg", 0), ("mp3", 1)])
def test_a_segment_of_a_lossy_file_is_a_slice_of_the_whole(tmp_path, extension, atol):
    path = written(tmp_path / f"a.{extension}", (noise() / 32768).astype(np.float32))
    whole = read_place(Place(path))
    ours = read_place(Place(path, 12.5, 14.0))
    # Vorbis begins anywhere without a trace; MP3 overlaps frames in float, whose rounding may tip one of 65536 steps.
    np.testing.assert_allclose(ours, whole[round(12.5 * RATE) : 14 * RATE], rtol=0, atol=atol)


def test_a_segment_is_cut_at_the_file_s_own_rate_and_then_resampled(tmp_path):
    samples_S = np.random.default_rng(1).normal(0, 3000, 20 * 44_100).astype(np.int16)
    path = written(tmp_path / "a.wav", samples_S, 44_100)
    cut = written(tmp_path / "cut.wav", samples_S[5 * 44_100 : 15 * 44_100], 44_100)
    np.testing.assert_array_equal(read_place(Place(path, 5, 15)), read_place(Place(cut)))


def test_a_file_no_longer_than_its_segment_was_cut_before_and_is_taken_whole(tmp_path):
    for seconds in (8, 10, 10 + CUT_SLACK_S):
        path = written(tmp_path / "a.wav", noise(seconds))
        np.testing.assert_array_equal(read_place(Place(path, 420, 430)), noise(seconds))
    longer = written(tmp_path / "b.wav", noise(10 + CUT_SLACK_S + 0.1))
    assert len(read_place(Place(longer, 0, 10))) == 10 * RATE
    with pytest.raises(AudioError, match=r"lasts 10\.6 s and the clip begins at 420 s"):
        read_place(Place(longer, 420, 430))


def test_a_segment_ends_with_its_file(tmp_path):
    np.testing.assert_array_equal(read_place(Place(written(tmp_path / "a.wav"), 25, 35)), noise()[25 * RATE :])
    with pytest.raises(AudioError, match="shorter than one frame"):
        read_place(Place(str(tmp_path / "a.wav"), 29.99, 35))


def test_the_longest_clip_bounds_the_segment_and_not_its_recording(tmp_path):
    path = written(tmp_path / "a.wav")
    assert len(read_place(Place(path, 2, 5), max_seconds=3)) == 3 * RATE
    with pytest.raises(AudioError, match=r"lasts 4\.0 s, longer than 3 s"):
        read_place(Place(path, 2, 6), max_seconds=3)


def test_a_segment_of_a_truncated_file_is_refused(tmp_path):
    for extension in ("wav", "flac"):
        path = tmp_path / f"a.{extension}"
        whole = path.read_bytes() if path.exists() else (written(path), path.read_bytes())[1]
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AudioError, match=r"truncated|libsndfile"):
            read_place(Place(str(path), 20, 25))


def test_cutting_does_not_decode_what_lies_before(tmp_path):
    path = written(tmp_path / "a.flac", np.tile(noise(), 19))  # 9.5 minutes
    started = time.process_time()
    read_place(Place(path))
    whole_s = time.process_time() - started
    started = time.process_time()
    read_place(Place(path, 500, 510))
    assert time.process_time() - started < whole_s / 4  # a 57th is asked for


def test_rows_and_data_sets_of_packs_are_clips(tmp_path):
    samples_S = noise(1)
    with h5py.File(tmp_path / "a.h5", "w") as pack:
        pack["waveform"] = np.stack([0 * samples_S, samples_S])
        pack["float"], pack["half"] = (samples_S / 32768).astype(np.float32), np.zeros(RATE, np.float16)
        pack["text"], pack["wide"], pack["nan"] = b"x", np.zeros(RATE, np.int64), np.full(RATE, np.nan)
    path = str(tmp_path / "a.h5")
    for entry, row in (("waveform", 1), ("float", None)):
        np.testing.assert_array_equal(read_place(Place(path, entry=entry, row=row, sample_rate_hz=RATE)), samples_S)
    assert not read_place(Place(path, entry="half", sample_rate_hz=RATE)).any()
    reasons = {
        ("gone", None, RATE): "the pack has no data set 'gone'",
        ("waveform", None, RATE): r"has the shape \(2, 16000\), which is not one clip",
        ("waveform", 2, RATE): "has 2 rows, and no row 2",
        ("text", None, RATE): "not one clip",
        ("wide", None, RATE): "holds int64, neither int16 nor floats",
        ("nan", None, RATE): "not finite",
        ("float", None, 0): "sample rate 0 Hz",
        ("float", None, 1000): "longer than 10 s",
    }
    for (entry, row, rate), words in reasons.items():
        with pytest.raises(AudioError, match=words):
            read_place(Place(path, entry=entry, row=row, sample_rate_hz=rate), max_seconds=10)
    with pytest.raises(AudioError, match="cannot be opened as HDF5"):
        read_place(Place(str(tmp_path / "gone.h5"), entry="waveform"))


def test_places_travel_to_other_processes_and_into_sets():
    place = Place("a.h5", 1.5, 2.5, "waveform", 3, 32_000)
    assert pickle.loads(pickle.dumps(place)) == place  # noqa: S301
    assert len({place, Place("a.h5", 1.5, 2.5, "waveform", 3, 32_000)}) == 1
