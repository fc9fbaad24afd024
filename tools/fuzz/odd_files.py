"""Make files that hold other than they declare, in many formats, rates and numbers of channels, with what is right."""

import io
import itertools
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from encoders import FORMATS, VARIABLE, by_ffmpeg, by_sndfile, sound

RATES_HZ = (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000)
MPEG_DELAY = 529 + 1105  # samples: a decoder's delay, and what LAME adds, which only its own header tells
CODEC_SLACK_S = 0.1  # of what encoders pad
UNTOLD = ("ogg vorbis", "ogg opus", "ogg flac", "nist", "mp2", "adts aac", "amr", "ac-3", "e-ac-3", "mp4 in fragments")


class Odd(NamedTuple):
    """An odd file."""

    name: str
    content: bytes
    frames: int | None  # that are to be read; None if the file must be refused
    slack: int = 0  # frames that may be missing, or too many


class Count(NamedTuple):
    """A kind, and how many of its files were read or refused."""

    kind: str
    tried: int
    whole: int
    refused: int
    wrong: list[str]
    lost_s: float


def mp3_without_count() -> Iterator[Odd]:
    """MP3s as streams and recorders write them: no Xing frame, or one without a count, or one that counts too few."""
    for rate, channels, mode in itertools.product(RATES_HZ, (1, 2), ("VARIABLE", "CONSTANT")):
        whole = _mp3(3, rate, channels, bitrate_mode=mode, compression_level=0.3)
        frame = 1152 if rate >= 32_000 else 576
        frames = _num_frames(whole) * frame
        name = f"{rate} Hz, {channels} channels, {mode.lower()}"
        yield Odd(f"{name}, no frame", whole[_first_frame(whole) :], frames, MPEG_DELAY)
        place = _info(whole) + 4
        for told, flags, count in (("no count", 0, 0), ("counts 3", 1, 3)):
            field = struct.pack(">II", flags, count)
            yield Odd(f"{name}, {told}", whole[:place] + field + whole[place + 8 :], frames, MPEG_DELAY)


def mp3_joined() -> Iterator[Odd]:
    """MP3s one behind another, with and without tags or zeros between them, and behind zeros."""
    between = {
        "nothing": b"",
        "a tag": b"ID3\4\0\0\0\0\2\0" + bytes(256),
        "an old tag": b"TAG" + bytes(125),
        "zeros": bytes(3000),
    }
    for rate, (name, gap) in itertools.product((16_000, 24_000, 44_100), between.items()):
        one, two = _mp3(1, rate), _mp3(2, rate, 1, **VARIABLE)
        yield Odd(f"{rate} Hz, {name} between two", one + gap + two, 3 * rate, MPEG_DELAY)
        yield Odd(f"{rate} Hz, {name} between three", one + gap + two + gap + one, 4 * rate, MPEG_DELAY)
    for size in (1, 417, 4096, 60_000):
        yield Odd(f"behind {size} zeros", bytes(size) + _mp3(1, 22_050), 22_050, MPEG_DELAY)


def ogg_chained() -> Iterator[Odd]:
    """Ogg files one behind another."""
    codecs = [("OPUS", 16_000), ("OPUS", 48_000), *(("VORBIS", rate) for rate in RATES_HZ)]
    for (codec, rate), links in itertools.product(codecs, (2, 3)):
        pieces = [by_sndfile(sound(1 + n, rate, 1, n), rate, "OGG", codec) for n in range(links)]
        yield Odd(f"{links} x {codec.lower()} {rate} Hz", b"".join(pieces), sum(range(1, links + 1)) * rate, links)


def flac_totals() -> Iterator[Odd]:
    """FLACs whose header counts no samples, or fewer or more than there are; and joined ones."""
    for rate, channels, bits in itertools.product((8_000, 44_100, 96_000), (1, 2), ("PCM_S8", "PCM_16", "PCM_24")):
        frames = 2 * rate
        data = by_sndfile(sound(2, rate, channels), rate, "FLAC", bits)
        for share, right in ((0, frames), (0.5, frames), (1.5, None)):
            total = round(share * frames)
            out = bytearray(data)
            out[21], out[22:26] = out[21] & 0xF0, total.to_bytes(4, "big")
            yield Odd(f"{rate} Hz, {channels} channels, {bits}, counts {share}", bytes(out), right)
        yield Odd(f"{rate} Hz, {channels} channels, {bits}, joined", 2 * data, 2 * frames)


def wav_sizes() -> Iterator[Odd]:
    """WAVs whose writer died: sizes of 0, of an earlier moment, unknown; and RF64 as BW64."""
    kinds = [("WAV", its) for its in ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "ULAW")] + [("WAVEX", "PCM_32")]
    for (kind, subtype), rate, channels in itertools.product(kinds, (16_000, 44_100), (1, 2)):
        data = by_sndfile(sound(1, rate, channels), rate, kind, subtype)
        place = data.index(b"data") + 4
        frame = int.from_bytes(data[32:34], "little")
        for told, size in (("0", 0), ("stale", 4000 * frame), ("unknown", 0xFFFFFFFF), ("7FFFFFFF", 0x7FFFFFFF)):
            out = bytearray(data)
            out[place : place + 4] = size.to_bytes(4, "little")
            out[4:8] = min(0xFFFFFFFF, size + place - 4).to_bytes(4, "little")
            yield Odd(f"{kind} {subtype}, {rate} Hz, {channels} channels, size {told}", bytes(out), rate)
        if kind == "WAV":
            rf64 = by_sndfile(sound(1, rate, channels), rate, "RF64", subtype)
            yield Odd(f"BW64 {subtype}, {rate} Hz, {channels} channels", b"BW64" + rf64[4:], rate)


def other_sizes() -> Iterator[Odd]:
    """AIFF, CAF and AU whose sizes are 0, stale or unknown."""
    for rate, channels, subtype in itertools.product((16_000, 44_100), (1, 2), ("PCM_16", "PCM_24")):
        name = f"{rate} Hz, {channels} channels, {subtype}"
        audio = sound(1, rate, channels)
        aiff = bytearray(by_sndfile(audio, rate, "AIFF", subtype))
        count, size = aiff.index(b"COMM") + 10, aiff.index(b"SSND") + 4
        for told, frames in (("0", 0), ("stale", 4000)):
            num_bytes = frames * channels * int(subtype[4:]) // 8 + 8
            aiff[4:8] = (size + 4 + num_bytes - 8).to_bytes(4, "big")
            aiff[count : count + 4], aiff[size : size + 4] = frames.to_bytes(4, "big"), num_bytes.to_bytes(4, "big")
            yield Odd(f"AIFF {told}, {name}", bytes(aiff), rate)
        caf = by_sndfile(audio, rate, "CAF", subtype)
        place = caf.index(b"data") + 4
        yield Odd(f"CAF unknown, {name}", caf[:place] + b"\xff" * 8 + caf[place + 8 :], rate)
        au = by_sndfile(audio, rate, "AU", subtype)
        yield Odd(f"AU unknown, {name}", au[:8] + b"\xff" * 4 + au[12:], rate)


def cut_off() -> Iterator[Odd]:
    """Files that end early, in the formats that declare a length: refused, because a part of the sound is missing."""
    for its in FORMATS:
        if its.name in UNTOLD:
            continue
        whole = its.bytes_of(sound(10, its.rate_hz, its.channels))
        for share in (0.6, 0.8, 0.95):
            yield Odd(f"{its.name} cut at {share}", whole[: round(share * len(whole))], None)


def whole_files() -> Iterator[Odd]:
    """Files with nothing odd, in every format: they must stay readable."""
    for its, seconds in itertools.product(FORMATS, (0.5, 3)):
        audio = sound(seconds, its.rate_hz, its.channels)
        yield Odd(f"{its.name}, {seconds} s", its.bytes_of(audio), len(audio), round(CODEC_SLACK_S * its.rate_hz))


def tracks() -> Iterator[Odd]:
    """Containers whose codec nobody knows, alone and before a track that can be decoded."""
    for container, codec in (("webm", "libopus"), ("matroska", "libopus"), ("matroska", "flac")):
        name = {"libopus": b"A_OPUS", "flac": b"A_FLAC"}[codec]
        content = by_ffmpeg(sound(1, 48_000), 48_000, container, codec)
        yield Odd(f"{container} {codec}", content.replace(name, name[:3] + b"Q" + name[4:]), None)
    content = by_ffmpeg(sound(1, 44_100), 44_100, "ipod", "alac")
    place = content.index(b"stsd") + 16  # of the codec's name
    yield Odd("m4a alac", content[:place] + b"qqqq" + content[place + 4 :], None)
    for other in ("libopus", "flac"):
        yield Odd(f"two tracks, {other}", _two_tracks(other), 48_000, round(CODEC_SLACK_S * 48_000))


def cancelling() -> Iterator[Odd]:
    """Channels that cancel each other in their mean."""
    for rate, subtype, gain in itertools.product((16_000, 44_100), ("PCM_16", "FLOAT"), (-1, -0.98, -1.01, -0.5)):
        audio = sound(1, rate)
        content = by_sndfile(np.hstack([audio, gain * audio]), rate, "WAV", subtype)
        yield Odd(f"{rate} Hz, {subtype}, {gain}", content, rate if gain == -0.5 else None)


KINDS: dict[str, Callable[[], Iterable[Odd]]] = {
    "nothing odd": whole_files,
    "MP3 without a count of its frames, or with a wrong one": mp3_without_count,
    "MP3s joined, or behind zeros": mp3_joined,
    "chained Ogg": ogg_chained,
    "FLAC that counts no samples, too few, too many; joined": flac_totals,
    "WAV whose writer died; BW64": wav_sizes,
    "AIFF, CAF and AU whose writer died": other_sizes,
    "files cut off": cut_off,
    "codecs that nobody knows": tracks,
    "channels that cancel each other": cancelling,
}


def counted(kind: str) -> Count:
    """Read the files of a kind and compare with what is right."""
    from asda.data.audio.read import read_wave
    from asda.data.audio.waves import AudioError

    tried = whole = refused = 0
    wrong, lost_s = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for tried, odd in enumerate(KINDS[kind](), start=1):
            path = Path(folder) / f"{tried}.bin"
            path.write_bytes(odd.content)
            try:
                wave_S, rate_hz = read_wave(path)
            except AudioError as error:
                refused += 1
                if odd.frames is not None:
                    wrong.append(f"{odd.name}: {error}")
                continue
            whole += 1
            if odd.frames is None:
                wrong.append(f"{odd.name}: {len(wave_S)} frames are read in place of a refusal")
            elif abs(len(wave_S) - odd.frames) > odd.slack:
                wrong.append(f"{odd.name}: {len(wave_S)} frames are read, {odd.frames} are there")
                lost_s += max(0, odd.frames - len(wave_S)) / rate_hz
    return Count(kind, tried, whole, refused, wrong, lost_s)


def _two_tracks(second: str) -> bytes:
    """Encode one second twice into one Matroska file; the codec of the first track is called by another name."""
    file, audio = io.BytesIO(), np.ascontiguousarray(sound(1, 48_000).T, np.float32)
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as out:
        streams = [out.add_stream(codec, rate=48_000, layout="mono") for codec in ("pcm_f32le", second)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(audio, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48_000, 0
            for each in (frame, None):
                out.mux(stream.encode(each))  # type: ignore[union-attr]
    return file.getvalue().replace(b"A_PCM/FLOAT/IEEE", b"A_QCM/FLOAT/IEEE")


def _mp3(seconds: float, rate: int, channels: int = 1, **options: Any) -> bytes:
    return by_sndfile(sound(seconds, rate, channels), rate, "MP3", **options)


def _num_frames(mp3: bytes) -> int:
    """Count the frames with sound, as FFmpeg's parser finds them."""
    with av.open(io.BytesIO(mp3), "r", format="mp3") as container:
        return sum(packet.size > 0 for packet in container.demux(audio=0))


def _first_frame(mp3: bytes) -> int:
    """Return the size of the frame that describes the others: FFmpeg's first packet is the one behind it."""
    with av.open(io.BytesIO(mp3), "r", format="mp3") as container:
        return next(packet.pos for packet in container.demux(audio=0)) or 0


def _info(mp3: bytes) -> int:
    return max(mp3[:200].find(b"Xing"), mp3[:200].find(b"Info"))
