"""Files that hold other than they declare: read whole, or refused in a sentence with both numbers."""

import io
import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from asda.data.audio.parts import parts_of
from asda.data.audio.read import count_frames, open_audio, read_audio, read_wave, wave_blocks
from asda.data.audio.resampling import Resampler, resample
from asda.data.audio.waves import AudioError, to_int16

DECODER_DELAY = 529  # samples that libmpg123 takes off an MP3 with a count and without LAME's own delay
rng = np.random.default_rng(7)


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Loud and then quiet, so that an encoder of variable rate writes small frames for most of it."""
    size = (round(seconds * rate), channels)
    return rng.normal(0, 1, size) * np.where(np.arange(size[0]) < 0.2 * size[0], 0.2, 0.0005)[:, None]


def encoded(kind: str, audio: np.ndarray, rate: int, subtype: str | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=kind, subtype=subtype, **options)
    return file.getvalue()


def counted_by_ffmpeg(data: bytes) -> int:
    """Samples that FFmpeg decodes, of all frames; it takes no delay off when asked not to."""
    with av.open(io.BytesIO(data), options={"flags2": "+skip_manual"}) as container:
        return sum(packet.duration for packet in container.demux(audio=0) if packet.size)


def length_of(data: bytes, path: Path) -> int:
    path.write_bytes(data)
    return len(read_wave(path, max_seconds=3600)[0])


def first_frame_bytes(mp3: bytes) -> int:
    """Length of the first frame, from FFmpeg's parser."""
    with av.open(io.BytesIO(mp3), format="mp3") as container:
        places = [packet.pos for packet in itertools.islice(container.demux(audio=0), 2)]
    return places[0]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 24_000, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_every_frame_of_an_mp3_without_a_count_is_read(tmp_path, rate, channels, mode):
    whole = encoded("MP3", sound(5, rate, channels), rate, bitrate_mode=mode, compression_level=0.3)
    stripped = whole[first_frame_bytes(whole) :]
    assert b"Xing" not in stripped[:200]
    assert b"Info" not in stripped[:200]
    num_samples = num_frames(stripped) * (1152 if rate >= 32_000 else 576)
    assert 0 <= num_samples - length_of(stripped, tmp_path / "clip.mp3") <= DECODER_DELAY


def num_frames(mp3: bytes) -> int:
    """Frames as FFmpeg's parser finds them."""
    with av.open(io.BytesIO(mp3), format="mp3") as container:
        return sum(packet.size > 0 for packet in container.demux(audio=0))


@pytest.mark.parametrize("tags", ["none", "id3v2", "ape and id3v1", "zeros between"])
def test_joined_mp3s_are_read_whole_whatever_stands_between(tmp_path, tags):
    rate = 44_100
    one, two = (encoded("MP3", sound(seconds, rate), rate) for seconds in (2, 3))
    between = {
        "none": b"",
        "id3v2": b"ID3\4\0\0\0\0\2\0" + bytes(256),
        "ape and id3v1": b"APETAGEX" + struct.pack("<IIII", 2000, 8, 0, 0) + bytes(8) + b"TAG" + bytes(125),
        "zeros between": bytes(5000),
    }[tags]
    alone = sum(length_of(each, tmp_path / "one.mp3") for each in (one, two))
    assert length_of(one + between + two, tmp_path / "both.mp3") == alone == 5 * rate


def test_joined_mp3s_without_counts_and_with_wrong_ones_are_read_whole(tmp_path):
    rate = 22_050
    one, two = (encoded("MP3", sound(seconds, rate), rate) for seconds in (2, 3))
    bare = two[first_frame_bytes(two) :]
    found = length_of(one + bare, tmp_path / "clip.mp3")
    assert 0 <= (num_frames(one) - 1 + num_frames(bare)) * 576 - found <= 1105 + DECODER_DELAY  # LAME's delays
    place = one.index(b"Info" if b"Info" in one[:200] else b"Xing") + 8
    too_few = one[:place] + (10).to_bytes(4, "big") + one[place + 4 :]
    assert length_of(too_few, tmp_path / "few.mp3") == length_of(one, tmp_path / "one.mp3")
    (tmp_path / "many.mp3").write_bytes(one[:place] + (900).to_bytes(4, "big") + one[place + 4 :])
    with pytest.raises(AudioError, match=r"truncated: its header declares \d+ frames and \d+ are there"):
        read_audio(tmp_path / "many.mp3")


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("OGG", "FLAC")])
@pytest.mark.parametrize("links", [2, 3])
def test_all_links_of_a_chain_are_read(tmp_path, kind, subtype, links):
    if subtype == "FLAC":
        pytest.skip("libsndfile writes no FLAC in Ogg") if "FLAC" not in soundfile.available_subtypes("OGG") else None
    rate = 48_000
    pieces = [encoded(kind, sound(1 + number, rate), rate, subtype) for number in range(links)]
    lengths = [length_of(piece, tmp_path / "one.ogg") for piece in pieces]
    assert length_of(b"".join(pieces), tmp_path / "chain.ogg") == sum(lengths)
    whole_S, _ = read_wave(tmp_path / "chain.ogg")
    (tmp_path / "last.ogg").write_bytes(pieces[-1])
    np.testing.assert_array_equal(whole_S[-lengths[-1] :], read_wave(tmp_path / "last.ogg")[0])


def test_a_chain_of_two_rates_is_refused_with_both(tmp_path):
    data = encoded("OGG", sound(1, 16_000), 16_000, "VORBIS") + encoded("OGG", sound(1, 22_050), 22_050, "VORBIS")
    (tmp_path / "clip.ogg").write_bytes(data)
    with pytest.raises(AudioError, match="joins sounds of 16000 Hz, 1 channels and of 22050 Hz"):
        read_audio(tmp_path / "clip.ogg")


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"), [(16_000, 1, "PCM_16"), (44_100, 2, "PCM_24"), (96_000, 1, "PCM_S8")]
)
@pytest.mark.parametrize("declared", [0, 1, 0.5, 3])
def test_a_flac_is_read_whole_if_it_declares_less_and_refused_if_it_declares_more(
    tmp_path, rate, channels, subtype, declared
):
    audio = sound(3, rate, channels)
    data = bytearray(encoded("FLAC", audio, rate, subtype))
    total = round(declared * len(audio)) if declared != 1 else len(audio)
    data[21] = data[21] & 0xF0 | total >> 32
    data[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    if declared > 1:
        (tmp_path / "clip.flac").write_bytes(data)
        with pytest.raises(AudioError, match=r"truncated|libsndfile"):
            read_audio(tmp_path / "clip.flac")
        return
    assert length_of(bytes(data), tmp_path / "clip.flac") == len(audio)
    (tmp_path / "right.flac").write_bytes(encoded("FLAC", audio, rate, subtype))
    np.testing.assert_array_equal(read_audio(tmp_path / "clip.flac"), read_audio(tmp_path / "right.flac"))


def test_joined_flacs_are_read_whole_and_segments_fall_where_they_should(tmp_path):
    rate = 32_000
    pieces = [
        np.rint(sound(seconds, rate) * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16) for seconds in (1, 2, 1.5)
    ]
    (tmp_path / "clip.flac").write_bytes(b"".join(encoded("FLAC", piece, rate, "PCM_16") for piece in pieces))
    whole_S, _ = read_wave(tmp_path / "clip.flac")
    (tmp_path / "clip.wav").write_bytes(encoded("WAV", np.concatenate(pieces), rate, "PCM_16"))
    np.testing.assert_array_equal(whole_S, read_wave(tmp_path / "clip.wav")[0])
    part_S, _ = read_wave(tmp_path / "clip.flac", segment=(0.75, 3.25))
    np.testing.assert_array_equal(part_S, whole_S[24_000:104_000])


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAVEX", "FLOAT"), ("WAV", "ULAW")]
)
@pytest.mark.parametrize("sizes", ["zero", "stale", "all ones"])
def test_a_wav_whose_writer_died_is_read_to_its_end(tmp_path, kind, subtype, sizes):
    audio = sound(2, 22_050, 2)
    data = bytearray(encoded(kind, audio, 22_050, subtype))
    (tmp_path / "right.wav").write_bytes(data)
    place = data.index(b"data") + 4
    frame = int.from_bytes(data[32:34], "little")
    size = {"zero": 0, "stale": 4000 * frame, "all ones": 0xFFFFFFFF}[sizes]
    data[place : place + 4] = size.to_bytes(4, "little")
    data[4:8] = min(0xFFFFFFFF, size + place + 4 - 8).to_bytes(4, "little")
    assert length_of(bytes(data), tmp_path / "clip.wav") == len(audio)
    np.testing.assert_array_equal(read_wave(tmp_path / "clip.wav")[0], read_wave(tmp_path / "right.wav")[0])


@pytest.mark.parametrize("behind", ["LIST", "ID3 tag", "zeros", "one byte", "bext uncounted"])
def test_what_follows_the_samples_of_a_wav_is_not_taken_for_sound(tmp_path, behind):
    audio = sound(1, 16_000)
    data = bytearray(encoded("WAV", audio, 16_000, "PCM_16"))
    rest = {
        "LIST": b"LIST\x0c\0\0\0INFOINAM\0\0\0\0",
        "ID3 tag": b"ID3\4\0\0\0\0\0\x20" + bytes(range(32)),
        "zeros": bytes(4096),
        "one byte": b"\7",
        "bext uncounted": b"bext\x10\0\0\0" + bytes(range(16)),
    }[behind]
    if behind == "LIST":
        data[4:8] = (len(data) + len(rest) - 8).to_bytes(4, "little")
    assert length_of(bytes(data) + rest, tmp_path / "clip.wav") == len(audio)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_bw64_is_read_as_rf64_is(tmp_path, subtype):
    data = encoded("RF64", sound(1, 48_000, 2), 48_000, subtype)
    assert data[:4] == b"RF64"
    (tmp_path / "right.wav").write_bytes(data)
    assert length_of(b"BW64" + data[4:], tmp_path / "clip.wav") == 48_000
    np.testing.assert_array_equal(read_wave(tmp_path / "clip.wav")[0], read_wave(tmp_path / "right.wav")[0])


def test_a_wav_beyond_4_gib_whose_size_has_wrapped_is_read_to_its_end(tmp_path):
    num_bytes, rate = (1 << 32) + 64_000, 96_000  # the file is sparse
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    head = b"RIFF" + struct.pack("<I", (num_bytes + 36) % (1 << 32)) + b"WAVE" + fmt
    head += b"data" + struct.pack("<I", num_bytes % (1 << 32))
    end_S = rng.integers(-1000, 1000, 20_000).astype("<i2")
    with (tmp_path / "clip.wav").open("wb") as file:
        file.write(head)
        file.seek(len(head) + num_bytes - 40_000)
        file.write(end_S.tobytes())
    assert count_frames(tmp_path / "clip.wav") == (num_bytes // 2, rate)
    last_S, _ = read_wave(tmp_path / "clip.wav", segment=((num_bytes // 2 - 20_000) / rate, num_bytes // 2 / rate))
    np.testing.assert_array_equal(last_S * 32_768, end_S)


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"), [(16_000, 1, "PCM_16"), (44_100, 2, "PCM_24"), (8_000, 1, "PCM_S8")]
)
def test_an_aiff_whose_writer_died_is_read_to_its_end(tmp_path, rate, channels, subtype):
    audio = sound(1, rate, channels)
    data = bytearray(encoded("AIFF", audio, rate, subtype))
    (tmp_path / "right.aiff").write_bytes(data)
    common, samples = data.index(b"COMM") + 8, data.index(b"SSND") + 4
    data[4:8] = (samples + 8).to_bytes(4, "big")
    data[common + 2 : common + 6] = bytes(4)
    data[samples : samples + 4] = (8).to_bytes(4, "big")
    assert length_of(bytes(data), tmp_path / "clip.aiff") == len(audio)
    np.testing.assert_array_equal(read_wave(tmp_path / "clip.aiff")[0], read_wave(tmp_path / "right.aiff")[0])


def test_a_caf_of_unknown_size_is_read_to_its_end(tmp_path):
    data = bytearray(encoded("CAF", sound(1, 44_100), 44_100, "PCM_16"))
    place = data.index(b"data") + 4
    data[place : place + 8] = b"\xff" * 8
    assert length_of(bytes(data), tmp_path / "clip.caf") == 44_100


@pytest.mark.parametrize(("rate", "layout"), [(16_000, "mono"), (44_100, "stereo"), (48_000, "mono")])
def test_mpeg_layer_2_is_read_to_its_last_frame(tmp_path, rate, layout):
    path = tmp_path / "clip.mp2"
    audio_CS = np.ascontiguousarray(sound(2, rate, 1 + (layout == "stereo")).T.astype(np.float32))
    with av.open(str(path), "w", format="mp2") as file:
        stream = file.add_stream("mp2", rate=rate, layout=layout)
        resampler = av.AudioResampler(format="s16", layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(audio_CS, format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    assert len(read_wave(path)[0]) == num_frames(path.read_bytes()) * 1152


def test_good_files_are_read_as_they_are(tmp_path):
    others = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
    for kind, subtype in [(kind, "PCM_16") for kind in ("WAV", "FLAC", "AIFF", "CAF", "AU", "W64", "RF64")] + others:
        path = tmp_path / f"clip.{kind.lower()}"
        path.write_bytes(encoded(kind, sound(1, 16_000), 16_000, subtype))
        assert parts_of(path) == (), kind


# Tracks, channels and messages.


def test_a_track_that_can_be_decoded_is_taken_and_without_one_it_is_said(tmp_path):
    path = tmp_path / "clip.mka"
    with av.open(str(path), "w", format="matroska") as file:
        streams = [
            file.add_stream("libopus", rate=48_000, layout="mono"),
            file.add_stream("flac", rate=48_000, layout="mono"),
        ]
        for number in range(50):
            for stream in streams:
                audio = np.full((1, 960), 0.25 * (stream is streams[1]), np.float32)
                frame = av.AudioFrame.from_ndarray(audio, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48_000, number * 960
                for part in av.AudioResampler(format=stream.codec_context.format.name).resample(frame):
                    file.mux(stream.encode(part))
        for stream in streams:
            file.mux(stream.encode(None))
    data = path.read_bytes().replace(b"A_OPUS", b"A_QPUS")
    path.write_bytes(data)
    wave_S, _ = read_wave(path)
    assert np.abs(wave_S[1000:40_000] - 0.25).max() < 1e-3
    path.write_bytes(data.replace(b"A_FLAC", b"A_XLAC"))
    with pytest.raises(AudioError, match=r"no decoder for its audio \(2 tracks\)"):
        read_audio(path)


@pytest.mark.parametrize("channels", [[1, -1], [1, -0.98], [0.5, 0.5, -1]])
def test_channels_that_cancel_are_named_and_one_is_read_on_request(tmp_path, channels):
    mono = sound(1, 16_000)
    path = tmp_path / "clip.wav"
    soundfile.write(path, mono * np.array(channels), 16_000, subtype="FLOAT")
    with pytest.raises(
        AudioError, match=r"cancel each other: their mean is (\d+ dB below the loudest|silence); .* --channel 0"
    ):
        read_audio(path)
    second_S, _ = read_wave(path, channel=1)
    np.testing.assert_array_equal(second_S, (mono[:, 0] * channels[1]).astype(np.float32))
    with pytest.raises(AudioError, match="counted from 0, and no channel 5"):
        read_audio(path, channel=5)


@pytest.mark.parametrize(("channels", "level"), [([1, 0], 0.5), ([0, 0, 1, 0], 1), ([0, 1, 1, 0, 0, 0], 1 / 3)])
def test_one_channel_with_sound_among_several_keeps_its_level(tmp_path, channels, level):
    mono = sound(1, 16_000)
    path = tmp_path / "clip.wav"
    soundfile.write(path, mono * np.array(channels), 16_000, subtype="FLOAT")
    wave_S, _ = read_wave(path)
    np.testing.assert_allclose(wave_S, mono[:, 0] * level, rtol=1e-6, atol=1e-9)


def test_decoders_write_nothing_to_stderr(tmp_path):
    rate = 16_000
    whole = encoded("MP3", sound(3, rate), rate, bitrate_mode="VARIABLE", compression_level=0.2)
    (tmp_path / "a.mp3").write_bytes(whole[first_frame_bytes(whole) :])
    (tmp_path / "b.mp3").write_bytes(whole + whole)
    soundfile.write(tmp_path / "c.wav", np.tile([[np.inf, -np.inf]], (1000, 1)), rate, subtype="FLOAT")
    code = (
        "import sys; from pathlib import Path; from asda.data.audio.read import read_audio\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(len(read_audio(Path(name))))\n"
        "    except ValueError as error: print(error)\n"
    )
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env={**os.environ})
    assert done.stderr == ""
    assert "not finite" in done.stdout


# Any length.


@pytest.mark.parametrize("rate", [8_000, 11_127, 16_000, 22_050, 44_100, 48_000, 192_000])
def test_a_wave_resampled_block_by_block_is_the_whole_wave_resampled(rate):
    wave_S = rng.uniform(-0.7, 0.7, 1_200_000).astype(np.float32)
    whole_S = to_int16(resample(wave_S, rate)).astype(int)
    resampler, pieces, place = Resampler(rate), [], 0
    while place < len(wave_S):
        size = int(rng.integers(1, 200_000))
        pieces.append(resampler.push(wave_S[place : place + size]))
        place += size
    blocks_S = to_int16(np.concatenate([*pieces, resampler.flush()])).astype(int)
    assert len(blocks_S) == len(whole_S)
    assert np.abs(blocks_S - whole_S).max() <= 1


def test_an_hour_at_192_khz_is_read_in_blocks_of_bounded_memory(tmp_path):
    path = tmp_path / "clip.wav"
    num_bytes, rate = 2 * 3600 * 192_000, 192_000  # the file is sparse
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    head = b"RIFF" + struct.pack("<I", num_bytes + 36) + b"WAVE" + fmt + b"data" + struct.pack("<I", num_bytes)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + num_bytes)
    with open_audio(path) as recording:
        sizes = [len(block_S) for block_S in itertools.islice(recording.blocks(), 4)]
    assert max(sizes) <= 1 << 20
    assert sum(map(len, wave_blocks(path, segment=(3590, 3600)))) == 160_000
