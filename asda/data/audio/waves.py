"""Bounds of what is read, and the one kind of WAV that shards hold: 16 kHz, mono, int16.

No header is trusted: rates and channels are bounded before a byte is decoded, lengths while it is decoded, and a file
that holds less than it declares is refused. (Ogg, NIST and raw AAC files declare no length: their cut copies pass as
shorter clips.)
"""

import math
import struct
from functools import lru_cache

import numpy as np

from asda.errors import UserError

# What is read, by the names such files bear; what a file is, its content says.
LIBSNDFILE_EXTENSIONS = (
    *(".wav", ".wave", ".bwf", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist"),
)
PYAV_EXTENSIONS = (  # by the extra m4a
    *(".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".3g2", ".aac", ".webm", ".mka", ".mkv"),
    *(".mp2", ".wma", ".wv", ".ac3", ".eac3", ".amr", ".tta", ".ape", ".mpc", ".dsf"),
)
AUDIO_EXTENSIONS = LIBSNDFILE_EXTENSIONS + PYAV_EXTENSIONS
# Sounds that are not read; a folder that holds some is told so.
UNREAD_EXTENSIONS = (
    *(".mid", ".midi", ".kar", ".mod", ".xm", ".it", ".s3m"),  # notes, not sound
    *(".ra", ".ram", ".rm", ".dss", ".ds2", ".dff", ".dts", ".voc", ".vox", ".gsm", ".spx", ".shn", ".tak", ".awb"),
    *(".aa", ".aax", ".m4p", ".avi", ".flv", ".mpg", ".mpeg", ".wmv", ".ts", ".ogv"),
)

SAMPLE_RATE_HZ = 16_000
MIN_SAMPLES = 400  # one 25 ms frame of the log-mel front-end
MAX_SECONDS = 600.0  # of a clip, unless the caller says otherwise
RATE_BOUNDS_HZ = (1_000, 768_000)
MAX_CHANNELS = 64
INT16_SCALE = 32_768  # int16 sample = amplitude x 32768
WAV_HEADER_BYTES = 44  # RIFF, fmt and data headers, and nothing else

LOUDEST = 100.0  # float audio may pass full scale, but not by 40 dB: then it is integers turned into floats
CUT_SLACK_S = 0.5  # a file that is longer than a segment by this much still is that segment: codecs pad, cutters round

# Start and stop in a recording, in seconds; and whether it is cut even from a file that is no longer than the segment.
Segment = tuple[float, float] | tuple[float, float, bool]


class AudioError(UserError, ValueError):
    """The reason, in a few words, why a file or a payload is not usable audio."""


def check_format(rate_hz: int, num_channels: int) -> None:
    """Refuse rates and channels out of bounds."""
    low_hz, high_hz = RATE_BOUNDS_HZ
    if not low_hz <= rate_hz <= high_hz:
        raise AudioError(f"sample rate {rate_hz} Hz is outside {low_hz} to {high_hz} Hz")
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise AudioError(f"{num_channels} channels are more than {MAX_CHANNELS}")


def part_of(num_frames: int, rate_hz: int, segment: Segment | None) -> tuple[int, int]:
    """Return first frame and number of frames of a segment, which ends with the file at the latest.

    A file that lasts no longer than the segment is read whole, unless it is exact: somebody has cut the segment from
    the recording already. An exact segment may end behind the file by what tables round, half a second.
    """
    if segment is None:
        return 0, num_frames
    start_s, stop_s, exact = (*segment, False)[:3]
    if not exact and num_frames <= (stop_s - start_s + CUT_SLACK_S) * rate_hz:
        return 0, num_frames
    first, stop = round(start_s * rate_hz), round(stop_s * rate_hz)
    if first >= num_frames:
        raise AudioError(f"lasts {num_frames / rate_hz:.1f} s and the clip begins at {start_s:g} s")
    if exact and stop > num_frames + CUT_SLACK_S * rate_hz:
        raise AudioError(f"lasts {num_frames / rate_hz:.1f} s and the clip ends at {stop_s:g} s")
    return first, min(stop, num_frames) - first


def check_length(num_frames: int, rate_hz: int, max_seconds: float) -> None:
    """Refuse to read nothing, too much, or less than a frame of the log-mel front-end."""
    if num_frames <= 0:
        raise AudioError("holds no samples")
    if num_frames > max_seconds * rate_hz:
        raise AudioError(f"lasts {num_frames / rate_hz:.1f} s, longer than {max_seconds:g} s")
    num_samples = resampled_length(num_frames, rate_hz)
    if num_samples < MIN_SAMPLES:
        raise AudioError(f"has {num_samples} samples at 16 kHz, shorter than one frame of {MIN_SAMPLES}")


def mean_of_channels(audio_CS: np.ndarray) -> np.ndarray:
    """Average the channels, float32 [S]. Raises AudioError if the mean is not finite, or far beyond full scale."""
    # A sum of rows: numpy's mean over a short axis takes twenty times as long.
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        mean_S = np.asarray(sum(audio_CS[1:], start=audio_CS[0]) / np.float32(len(audio_CS)))
    if complaint := amplitude_complaint(mean_S):
        raise AudioError(complaint)
    return mean_S


def amplitude_complaint(wave_S: np.ndarray) -> str:
    """Return why floats cannot be amplitudes with full scale 1, or ""."""
    peak = max(float(wave_S.max(initial=0)), -float(wave_S.min(initial=0)))  # nan if any of them is
    if not math.isfinite(peak):
        return "holds samples that are not finite"
    too_loud = f"reaches {peak:.0f} where full scale is 1; divide it, or give integers as int16"
    return too_loud if peak > LOUDEST else ""


def resampled_length(num_samples: int, rate_hz: int) -> int:
    """Return how many samples a wave has at 16 kHz, rounded up."""
    return -(-num_samples * SAMPLE_RATE_HZ // rate_hz)


def to_int16(amplitude_S: np.ndarray) -> np.ndarray:
    """Round amplitudes in [-1, 1) to int16; louder ones saturate."""
    scaled_S = amplitude_S * INT16_SCALE
    np.rint(scaled_S, out=scaled_S)
    np.clip(scaled_S, -INT16_SCALE, INT16_SCALE - 1, out=scaled_S)
    return scaled_S.astype(np.int16)


@lru_cache(maxsize=1024)  # most clips of a dataset have one of a few lengths
def wav_header(num_bytes: int) -> bytes:
    """Return the canonical 44-byte header of a 16 kHz mono PCM int16 WAV with this many bytes of samples."""
    riff = struct.pack("<4sI4s", b"RIFF", num_bytes + WAV_HEADER_BYTES - 8, b"WAVE")
    # size of fmt, format 1 = PCM, channels, rate, bytes per second, bytes per frame, bits per sample
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE_HZ, 2 * SAMPLE_RATE_HZ, 2, 16)
    return riff + fmt + struct.pack("<4sI", b"data", num_bytes)


def encode_wav(samples_S: np.ndarray) -> bytes:
    """Return int16 samples [S] at 16 kHz as a WAV with the canonical header."""
    payload = samples_S.astype("<i2", copy=False).tobytes()
    return wav_header(len(payload)) + payload


def decode_wav(wav: bytes | memoryview) -> np.ndarray:
    """Return the int16 samples [S] of a WAV as encode_wav writes it, as a view of its bytes.

    Raises AudioError for any other header: inside a shard there is one kind of WAV, so another one is damage.
    """
    num_bytes = len(wav) - WAV_HEADER_BYTES
    if num_bytes < 0 or num_bytes % 2 or bytes(wav[:WAV_HEADER_BYTES]) != wav_header(num_bytes):
        raise AudioError("is not a 16 kHz mono int16 WAV with the canonical 44-byte header of its length")
    return np.frombuffer(wav, dtype="<i2", offset=WAV_HEADER_BYTES)
