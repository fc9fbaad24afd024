"""Odd files by the hundred: the short half of `make fuzz`. Nothing crashes, hangs, grows or is lost in silence."""

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from encoders import CONSTANT, FORMATS, VARIABLE, by_ffmpeg, by_sndfile, sound, with_checksums
from mutants import fields_of, mutant, original
from odd_files import KINDS, counted
from reading import READ, REFUSED, WRONG, Reader, read_in_all_ways

from asda.data.audio import read, sndfile
from asda.data.audio.read import count_frames, read_wave, wave_blocks
from asda.data.audio.waves import AudioError

ROOT = Path(__file__).parents[3]
MUTANTS = 25 * len(FORMATS)


def fuzz_command():
    spec = importlib.util.spec_from_file_location("fuzz_command", ROOT / "tools" / "fuzz" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutants_of_all_formats_are_read_or_refused_in_a_sentence():
    found = dict(fuzz_command().outcomes(17, range(MUTANTS), 2, minutes=2))
    assert len(found) == MUTANTS
    wrong = {number: reason for number, (what, reason) in found.items() if what == WRONG}
    assert not wrong, f"python tools/fuzz mutants --seed 17 --only N: {wrong}"
    whats = [what for what, _ in found.values()]
    assert whats.count(READ) > MUTANTS / 10
    assert whats.count(REFUSED) > MUTANTS / 10


@pytest.mark.parametrize("kind", KINDS)
def test_odd_files_of_a_kind_are_read_whole_or_refused(kind):
    count = counted(kind)
    assert count.tried >= 3
    assert not count.wrong, "\n".join(count.wrong)


def test_a_mutant_is_the_same_bytes_every_time():
    before = [mutant(3, number) for number in range(2 * len(FORMATS))]
    original.cache_clear()
    assert [mutant(3, number) for number in range(2 * len(FORMATS))] == before
    assert mutant(4, 0) != before[0]


@pytest.mark.parametrize("its", FORMATS, ids=lambda its: its.name)
def test_the_fields_of_a_header_lie_in_the_file(its):
    content = its.bytes_of(sound(0.3, its.rate_hz, its.channels))
    assert sum(field.place + field.size <= len(content) for field in fields_of(content)) >= 5


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError("no"), AudioError(""), AudioError("a\nb")])
def test_what_the_reader_must_not_raise_is_a_finding(tmp_path, monkeypatch, error):
    def broken(*_arguments):
        raise error

    (tmp_path / "a.wav").write_bytes(by_sndfile(sound(1, 16_000), 16_000, "WAV"))
    assert read_in_all_ways(tmp_path / "a.wav")[0] == READ
    monkeypatch.setattr(read, "read_audio", broken)
    what, reason = read_in_all_ways(tmp_path / "a.wav")
    assert what == WRONG
    assert type(error).__name__ in reason or "short sentence" in reason


def test_a_count_that_the_blocks_do_not_hold_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(by_sndfile(sound(1, 16_000), 16_000, "WAV"))
    monkeypatch.setattr(read, "count_frames", lambda _path: (17, 16_000))
    assert read_in_all_ways(tmp_path / "a.wav") == (WRONG, "counts 17 frames and yields 16000")


def test_a_process_that_ends_or_hangs_is_a_finding_and_a_new_one_reads_the_rest():
    reader = Reader(0)
    try:
        reader._process.kill()
        reader._process.join()
        what, reason = reader.outcome(0)
        assert (what, "SIGKILL" in reason) == (WRONG, True)
        assert reader.outcome(0)[0] in (READ, REFUSED)
    finally:
        reader.close()


# What the mutants have found.


@pytest.mark.parametrize(("kind", "rate"), [("WAV", 8_000), ("WAV", 16_000), ("W64", 11_025), ("AIFF", 8_000)])
def test_codecs_that_cannot_seek_are_read_whole_and_in_part(tmp_path, kind, rate):
    path = tmp_path / "clip"
    path.write_bytes(by_sndfile(sound(3, rate), rate, kind, "GSM610"))
    with soundfile.SoundFile(path.open("rb")) as file:
        assert not file.seekable()
        expected_S = file.read(file.frames, dtype="float32")
    np.testing.assert_array_equal(read_wave(path)[0], expected_S)
    np.testing.assert_array_equal(read_wave(path, segment=(1, 2))[0], expected_S[rate : 2 * rate])


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 1)])
def test_flac_in_ogg_is_read_bit_for_bit(tmp_path, rate, channels):
    audio_SC = np.rint(sound(2, rate, channels) * 32_767).clip(-32_768, 32_767) / 32_768
    (tmp_path / "clip.flac").write_bytes(by_sndfile(audio_SC, rate, "FLAC", "PCM_16"))
    (tmp_path / "clip.oga").write_bytes(by_ffmpeg(audio_SC, rate, "ogg", "flac"))
    assert count_frames(tmp_path / "clip.oga") == (2 * rate, rate)
    difference_S = read_wave(tmp_path / "clip.oga")[0] - read_wave(tmp_path / "clip.flac")[0]
    assert np.abs(difference_S).max() <= 2**-15  # FFmpeg rounds the floats that it is given by itself


SMALL_SEEKS = [its for its in FORMATS if its.encode is by_ffmpeg or its.extension in ("ogg", "opus", "mp3")]


@pytest.mark.parametrize("its", SMALL_SEEKS, ids=lambda its: its.name)
def test_a_part_lies_where_it_lies_in_the_whole(tmp_path, its):
    path, time_S = tmp_path / "clip", np.arange(6 * its.rate_hz) / its.rate_hz
    tone_S = 0.3 * np.sin(2 * np.pi * (200 + 150 * time_S) * time_S)  # rising, so that it is alike nowhere
    path.write_bytes(its.bytes_of(np.stack([tone_S] * its.channels, 1)))
    whole_S, rate = read_wave(path)
    slack = rate // 1000 if its.extension in ("webm", "mka") else 0  # Matroska's time stamps are milliseconds
    for start_s in (0.3, 1.7, 3.33, 5.2):
        part_S, _ = read_wave(path, segment=(start_s, start_s + 0.25))
        first = round(start_s * rate)
        assert len(part_S) == round((start_s + 0.25) * rate) - first
        errors = [
            np.abs(whole_S[first + shift : first + shift + len(part_S)] - part_S).max()
            for shift in range(-slack, slack + 1)
        ]
        assert min(errors) < 0.02, its.name  # AAC and AMR add noise of their own


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (48_000, 1)])
@pytest.mark.parametrize("mode", [VARIABLE, CONSTANT], ids=["vbr", "cbr"])
def test_an_mp3_read_in_blocks_is_that_read_at_once(tmp_path, monkeypatch, rate, channels, mode):
    time_S = np.arange(8 * rate) / rate
    tone_S = 0.3 * np.sin(2 * np.pi * (200 + 150 * time_S) * time_S)  # small frames that refer to those before
    content = by_sndfile(np.stack([tone_S] * channels, 1), rate, "MP3", None, **mode)
    (tmp_path / "clip.mp3").write_bytes(content)
    at_once_SC = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0]
    monkeypatch.setattr(sndfile, "READ_AT_ONCE", 7000)
    np.testing.assert_allclose(read_wave(tmp_path / "clip.mp3")[0], at_once_SC.mean(1), atol=1e-6)
    part_S, _ = read_wave(tmp_path / "clip.mp3", segment=(4, 6))
    np.testing.assert_allclose(part_S, at_once_SC[4 * rate : 6 * rate].mean(1), atol=1e-6)


@pytest.mark.parametrize("its", FORMATS, ids=lambda its: its.name)
def test_small_blocks_give_what_large_ones_give(tmp_path, monkeypatch, its):
    (tmp_path / "clip").write_bytes(its.bytes_of(sound(2, its.rate_hz, its.channels)))
    large_S, _ = read_wave(tmp_path / "clip")
    monkeypatch.setattr(sndfile, "READ_AT_ONCE", 3001)
    np.testing.assert_allclose(read_wave(tmp_path / "clip")[0], large_S, atol=1e-6)


@pytest.mark.parametrize(("rate", "seconds"), [(8_000, 10), (16_000, 3), (44_100, 10)])
def test_parts_of_a_vorbis_are_those_of_the_whole_to_the_bit(tmp_path, rate, seconds):
    rng = np.random.default_rng(3)
    loudness_S = np.repeat([0.2, 0.001, 0.1], seconds * rate // 3)
    content = by_sndfile((rng.normal(0, 1, len(loudness_S)) * loudness_S)[:, None], rate, "OGG", "VORBIS")
    (tmp_path / "clip.ogg").write_bytes(content)
    whole_S, _ = read_wave(tmp_path / "clip.ogg")
    for first in rng.integers(0, len(whole_S) - rate // 2, 30):
        part_S, _ = read_wave(tmp_path / "clip.ogg", segment=(first / rate, first / rate + 0.1))
        np.testing.assert_array_equal(part_S, whole_S[first : first + len(part_S)])


@pytest.mark.parametrize(("rate", "seconds"), [(22_050, 0.6), (44_100, 2), (16_000, 5)])
def test_a_part_of_a_vorbis_whose_setup_is_damaged_is_refused(tmp_path, rate, seconds):
    content = bytearray(by_sndfile(sound(seconds, rate), rate, "OGG", "VORBIS"))
    place = content.index(b"\x05vorbis")
    content[place + 1642 : place + 1682] = b"\xff" * 40
    (tmp_path / "clip.ogg").write_bytes(with_checksums(bytes(content)))
    code = (
        "import sys; from pathlib import Path; from asda.data.audio.read import read_wave\n"
        "try: read_wave(Path(sys.argv[1]), segment=(0.1, 0.2))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "clip.ogg"], capture_output=True, text=True)
    assert done.returncode == 0, "libsndfile has ended the process"
    assert re.match(r"holds no samples|is truncated|libsndfile", done.stdout)


@pytest.mark.parametrize("magic", [b"fLaC\x00\x00\x00\x21", b"fLaC\x04\x00\x00\x22", b"fLaC" + bytes(60)])
def test_a_flac_without_its_first_block_is_refused(tmp_path, magic):
    content = by_sndfile(sound(1, 16_000), 16_000, "FLAC")
    (tmp_path / "clip.flac").write_bytes(magic + content[len(magic) :])
    with pytest.raises(AudioError, match=r"^libsndfile: .*\w$"):
        read_wave(tmp_path / "clip.flac")


@pytest.mark.parametrize("share", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("codec", ["flac", "libopus", "aac"])
def test_a_matroska_of_one_track_that_is_cut_off_is_refused(tmp_path, codec, share):
    content = by_ffmpeg(sound(4, 48_000), 48_000, "matroska", codec)
    (tmp_path / "clip.mka").write_bytes(content[: round(share * len(content))])
    with pytest.raises(AudioError, match=r"truncated|FFmpeg"):
        read_wave(tmp_path / "clip.mka")


@pytest.mark.parametrize("name", ["mp3 mpeg-1 vbr", "mp3 mpeg-2 cbr", "wma"])
def test_decoders_of_damaged_files_write_nothing_to_stderr(tmp_path, capfd, name):
    its = next(its for its in FORMATS if its.name == name)
    content = its.bytes_of(sound(1, its.rate_hz, its.channels))
    for number in range(30):
        start = 60 + number * len(content) // 40
        (tmp_path / f"{number}").write_bytes(content[:start] + bytes(number * 20) + content[start + number * 30 :])
        try:
            for _ in wave_blocks(tmp_path / f"{number}"):
                pass
        except AudioError:
            pass
    assert capfd.readouterr().err == ""
