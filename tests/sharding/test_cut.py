"""--cut and --channel: consecutive clips of long recordings, equal to slices of the whole, in one split each."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_sources_tables import listed, sound, table

from asda.data.audio.waves import AudioError
from asda.errors import UserError
from asda.sharding.audio_ref import Place, read_place
from asda.sharding.cut import cut_recordings, with_channel
from asda.sharding.plan import Plan, assign_splits, keyed, parse_split, plan_split
from asda.sharding.sources.listing import Listing, Row

RATE = 16_000


def recording(path: Path, place: Place | None = None) -> Listing:
    return Listing([Row(place or Place(str(path)), path.name, ("dog",), "", str(path))])


@pytest.mark.parametrize(
    ("extension", "num_samples", "pieces", "num_rests"),
    [
        ("wav", 48_000, [16_000, 16_000, 16_000], 0),
        ("flac", 40_000, [16_000, 16_000, 8_000], 0),
        ("aiff", 32_400, [16_000, 16_000, 400], 0),
        ("wav", 32_399, [16_000, 16_000], 1),
        ("ogg", 16_001, [16_000], 1),
        ("wav", 16_000, [], 0),
        ("wav", 500, [], 0),
    ],
)
def test_the_clips_of_a_recording_are_its_consecutive_slices(tmp_path, extension, num_samples, pieces, num_rests):
    path = tmp_path / f"a.{extension}"
    sound(path, 1, num_samples)
    whole_S = read_place(Place(str(path)))
    listing = cut_recordings(recording(path), 1.0, 1)
    clips = [read_place(row.place) for row in listing.rows]
    assert [len(clip_S) for clip_S in clips] == (pieces or [num_samples])
    joined_S = np.concatenate(clips)
    np.testing.assert_array_equal(joined_S, whole_S[: len(joined_S)])
    assert listing.left_out["rests of recordings that are shorter than 25 ms"] == num_rests
    assert {row.labels for row in listing.rows} == {("dog",)}
    names = [f"a:{n}-{(sum(pieces[: n + 1])) / RATE:g}.{extension}" for n in range(len(pieces))]
    assert [row.relative for row in listing.rows] == (names or [path.name])


@pytest.mark.parametrize(("rate", "seconds"), [(44_100, 0.7), (22_050, 1.3), (8_000, 0.1)])
def test_no_sample_is_lost_between_two_cuts_at_any_rate(tmp_path, rate, seconds):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(rate * 5 + 77, np.int16), rate)
    rows = cut_recordings(recording(path), seconds, 1).rows
    edges = [(round(row.place.start_s * rate), round((row.place.stop_s or 0) * rate)) for row in rows]
    assert [stop for _, stop in edges[:-1]] == [start for start, _ in edges[1:]]
    assert edges[0][0] == 0
    assert {stop - start for start, stop in edges[:-1]} == {round(seconds * rate)}
    assert edges[-1][1] > rate * 5 + 77 - rate * 0.025


def test_a_segment_of_a_table_is_cut_within_its_bounds(tmp_path):
    whole_S = sound(tmp_path / "a.wav", 0, 5 * RATE)
    listing = listed("csv", table(tmp_path, "path,start,end", "a.wav,1,3.5", "a.wav,4,4.5"))
    rows = cut_recordings(listing, 1.0, 1).rows
    assert [row.relative for row in rows] == ["a:1-3.5:1-2.wav", "a:1-3.5:2-3.wav", "a:1-3.5:3-3.5.wav", "a:4-4.5.wav"]
    np.testing.assert_array_equal(read_place(rows[2].place), whole_S[3 * RATE : 7 * RATE // 2])


def test_what_cannot_be_read_is_missing_with_its_reason(tmp_path):
    sound(tmp_path / "a.wav", 0, 3 * RATE)
    (tmp_path / "b.wav").write_text("no audio")
    listing = cut_recordings(listed("folder", tmp_path), 1.0, 1)
    assert len(listing.rows) == 3
    assert listing.missing == [("b.wav", "libsndfile: Format not recognised")]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"--cut: none of 1 recordings can be read; the first is b\.wav: libsndfile"):
        cut_recordings(listed("folder", tmp_path), 1.0, 1)
    with pytest.raises(UserError, match="is an HDF5 pack, whose clips are cut already"):
        cut_recordings(recording(tmp_path / "a.h5", Place("a.h5", entry="waveform", row=0)), 1.0, 1)


def test_all_clips_of_a_recording_are_in_one_split(tmp_path):
    for number in range(12):
        sound(tmp_path / f"{'ab'[number % 2]}/{number}.wav", number, RATE * (1 + number % 5))
    rows = cut_recordings(listed("folder", tmp_path), 1.0, 1).rows
    splits = assign_splits(keyed(rows), [parse_split("train=70%"), parse_split("valid=30%")])
    of_split = [{row.place.path for row in part.values()} for part in splits.values()]
    assert not of_split[0] & of_split[1]
    sizes = [len(part) for part in splits.values()]
    assert sum(sizes) == len(rows)
    assert abs(sizes[1] - 0.3 * len(rows)) <= 5  # the longest recording


def test_three_hours_are_planned_by_its_length_alone_and_read_at_any_place(tmp_path):
    path = tmp_path / "long.flac"
    tone_S = (1000 * np.sin(np.arange(RATE) / 7)).astype(np.int16)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for minute in range(180):
            file.write(np.concatenate([tone_S[: minute + 1], np.zeros(60 * RATE - minute - 1, np.int16)]))
    rows = cut_recordings(recording(path), 60.0, 1).rows
    assert len(rows) == 180
    clips = {minute: read_place(rows[minute].place) for minute in (0, 100, 179)}
    for minute, clip_S in clips.items():
        np.testing.assert_array_equal(clip_S[: minute + 1], tone_S[: minute + 1])
        assert not clip_S[minute + 1 :].any()


def test_a_channel_is_chosen_and_belongs_to_the_plan_only_then(tmp_path):
    left_S, right_S = (np.random.default_rng(n).normal(0, 1000, RATE).astype(np.int16) for n in range(2))
    soundfile.write(tmp_path / "a.wav", np.stack([left_S, right_S], 1), RATE)
    listing = recording(tmp_path / "a.wav")
    assert with_channel(listing, None) is listing
    digests = set()
    for channel, samples_S in ((0, left_S), (1, right_S)):
        chosen = with_channel(listing, channel)
        np.testing.assert_array_equal(read_place(chosen.rows[0].place), samples_S)
        tasks = plan_split(tmp_path, "train", keyed(chosen.rows), ("dog",), 4, 600)
        digests.add(Plan(tmp_path, ("dog",), {"train": tasks}).digest)
    assert len(digests) == 2
    with pytest.raises(AudioError, match="has 2 channels, counted from 0, and no channel 2"):
        read_place(with_channel(listing, 2).rows[0].place)
    assert Place("x", 1.0, 2.0, "e", 3, 4).identity == ("", 1.0, 2.0, "e", 3, 4)
    assert Place("x", channel=0).identity == ("", 0.0, None, "", None, 0, False, 0, 0, None)
