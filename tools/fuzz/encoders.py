"""Encode a sound in every format that asda reads, by libsndfile and FFmpeg. Shapes: S samples, C channels."""

import io
from collections.abc import Callable
from typing import NamedTuple

import av
import numpy as np
import soundfile

OGG_CRC, OGG_SERIAL = 0x04C11DB7, 7
BIT_RATES = {"libopencore_amrnb": 12_200, "mp2": 128_000}
LAYOUTS = {1: "mono", 2: "stereo"}


def sound(seconds: float, rate_hz: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return noise [S, C] that is loud and then quiet, so that encoders of variable rate write frames of many sizes."""
    size = (round(seconds * rate_hz), channels)
    loudness_S = np.where(np.arange(size[0]) < 0.3 * size[0], 0.2, 0.0005)
    return np.random.default_rng(seed).normal(0, 1, size) * loudness_S[:, None]


def by_sndfile(audio_SC: np.ndarray, rate_hz: int, kind: str, subtype: str | None = None, **options: object) -> bytes:
    """Encode by libsndfile; the same bytes every time."""
    file = io.BytesIO()
    soundfile.write(file, audio_SC, rate_hz, format=kind, subtype=subtype, **options)  # type: ignore[arg-type]
    content = file.getvalue()
    if (peak := content.find(b"PEAK")) >= 0:  # a chunk that holds the time of writing, behind name, size and version
        content = content[: peak + 12] + bytes(4) + content[peak + 16 :]
    return with_checksums(content, OGG_SERIAL) if kind == "OGG" else content


def by_ffmpeg(audio_SC: np.ndarray, rate_hz: int, container: str, codec: str, **options: str) -> bytes:
    """Encode by FFmpeg; the same bytes every time."""
    file, layout = io.BytesIO(), LAYOUTS[audio_SC.shape[1]]
    with av.open(file, "w", format=container, options={"fflags": "+bitexact", **options}) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = BIT_RATES.get(codec, 64_000)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio_SC.T, np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate_hz, 0
        for each in (frame, None):
            out.mux(stream.encode(each))
    return file.getvalue()


def with_checksums(ogg: bytes, serial: int | None = None) -> bytes:
    """Return an Ogg file whose pages have right checksums, and one serial number if it is given."""
    out, place = bytearray(ogg), 0
    while ogg[place : place + 4] == b"OggS" and place + 27 <= len(ogg):
        stop = place + 27 + ogg[place + 26] + sum(ogg[place + 27 : place + 27 + ogg[place + 26]])
        if serial is not None:
            out[place + 14 : place + 18] = serial.to_bytes(4, "little")
        out[place + 22 : place + 26] = bytes(4)
        out[place + 22 : place + 26] = _crc(out[place:stop]).to_bytes(4, "little")
        place = stop
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (OGG_CRC if value >> 31 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_TABLE = _crc_table()


def _crc(content: bytes | bytearray) -> int:
    value = 0
    for byte in content:
        value = value << 8 & 0xFFFFFFFF ^ _TABLE[value >> 24 ^ byte]
    return value


class Format(NamedTuple):
    """A format, and how a sound is encoded in it."""

    name: str
    extension: str
    rate_hz: int
    channels: int
    encode: Callable[..., bytes]  # (audio_SC, rate_hz, *arguments, **options)
    arguments: tuple[str | None, ...]
    options: dict[str, object] = {}  # noqa: RUF012 (a tuple's default is never changed)

    def bytes_of(self, audio_SC: np.ndarray, rate_hz: int | None = None) -> bytes:
        """Encode a sound [S, C], at the format's usual rate unless another one is given."""
        return self.encode(audio_SC, rate_hz or self.rate_hz, *self.arguments, **self.options)


VARIABLE = {"bitrate_mode": "VARIABLE", "compression_level": 0.3}
CONSTANT = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
FORMATS = (
    Format("wav pcm 16", "wav", 16_000, 1, by_sndfile, ("WAV", "PCM_16")),
    Format("wav pcm 24", "wav", 44_100, 2, by_sndfile, ("WAVEX", "PCM_24")),
    Format("wav float", "wav", 22_050, 1, by_sndfile, ("WAV", "FLOAT")),
    Format("wav mu-law", "wav", 8_000, 2, by_sndfile, ("WAV", "ULAW")),
    Format("wav ima adpcm", "wav", 16_000, 1, by_sndfile, ("WAV", "IMA_ADPCM")),
    Format("wav ms adpcm", "wav", 22_050, 2, by_sndfile, ("WAV", "MS_ADPCM")),
    Format("wav gsm", "wav", 8_000, 1, by_sndfile, ("WAV", "GSM610")),
    Format("rf64", "wav", 48_000, 2, by_sndfile, ("RF64", "PCM_16")),
    Format("w64", "w64", 32_000, 1, by_sndfile, ("W64", "PCM_24")),
    Format("aiff", "aiff", 44_100, 2, by_sndfile, ("AIFF", "PCM_16")),
    Format("aifc float", "aifc", 16_000, 1, by_sndfile, ("AIFF", "FLOAT")),
    Format("au", "au", 8_000, 1, by_sndfile, ("AU", "ULAW")),
    Format("nist", "sph", 16_000, 1, by_sndfile, ("NIST", "PCM_16")),
    Format("caf pcm", "caf", 44_100, 1, by_sndfile, ("CAF", "PCM_16")),
    Format("caf alac", "caf", 44_100, 2, by_sndfile, ("CAF", "ALAC_16")),
    Format("flac 16", "flac", 16_000, 1, by_sndfile, ("FLAC", "PCM_16")),
    Format("flac 24", "flac", 48_000, 2, by_sndfile, ("FLAC", "PCM_24")),
    Format("ogg vorbis", "ogg", 22_050, 1, by_sndfile, ("OGG", "VORBIS")),
    Format("ogg opus", "opus", 48_000, 2, by_sndfile, ("OGG", "OPUS")),
    Format("ogg flac", "oga", 44_100, 1, by_ffmpeg, ("ogg", "flac")),
    Format("mp3 mpeg-1 vbr", "mp3", 44_100, 2, by_sndfile, ("MP3", None), VARIABLE),
    Format("mp3 mpeg-2 cbr", "mp3", 16_000, 1, by_sndfile, ("MP3", None), CONSTANT),
    Format("mp2", "mp2", 48_000, 1, by_ffmpeg, ("mp2", "mp2")),
    Format("adts aac", "aac", 16_000, 1, by_ffmpeg, ("adts", "aac")),
    Format("m4a aac", "m4a", 44_100, 2, by_ffmpeg, ("ipod", "aac")),
    Format("m4a alac", "m4a", 44_100, 1, by_ffmpeg, ("ipod", "alac")),
    Format("mp4 in fragments", "mp4", 16_000, 1, by_ffmpeg, ("mp4", "aac"), {"movflags": "frag_keyframe+empty_moov"}),
    Format("mov pcm", "mov", 48_000, 2, by_ffmpeg, ("mov", "pcm_s16le")),
    Format("3gp amr", "3gp", 8_000, 1, by_ffmpeg, ("3gp", "libopencore_amrnb")),
    Format("amr", "amr", 8_000, 1, by_ffmpeg, ("amr", "libopencore_amrnb")),
    Format("webm opus", "webm", 48_000, 1, by_ffmpeg, ("webm", "libopus")),
    Format("mka flac", "mka", 32_000, 2, by_ffmpeg, ("matroska", "flac")),
    Format("wma", "wma", 44_100, 1, by_ffmpeg, ("asf", "wmav2")),
    Format("wavpack", "wv", 44_100, 2, by_ffmpeg, ("wv", "wavpack")),
    Format("tta", "tta", 16_000, 1, by_ffmpeg, ("tta", "tta")),
    Format("ac-3", "ac3", 48_000, 2, by_ffmpeg, ("ac3", "ac3")),
    Format("e-ac-3", "eac3", 48_000, 1, by_ffmpeg, ("eac3", "eac3")),
)
