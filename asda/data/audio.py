"""Audio in one form: 16 kHz, mono, int16. Reads what libsndfile reads, and speaks one kind of WAV.

Nothing here trusts a header: lengths, rates and channels are bounded before a byte is allocated, and a file that
holds less than it declares is refused. (Ogg and NIST files declare no length: their cut copies pass as shorter clips.)
"""

import re
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000
MIN_SAMPLES = 400  # one 25 ms frame of the log-mel front-end
MAX_SECONDS = 600.0  # of a clip, unless the caller says otherwise
RATE_BOUNDS_HZ = (1_000, 768_000)
MAX_CHANNELS = 64
MAX_DECODED_VALUES = 1 << 28  # frames x channels; 1 GiB of float32, 10 minutes of stereo at 192 kHz fit
INT16_SCALE = 32_768  # int16 sample = amplitude x 32768
WAV_HEADER_BYTES = 44  # RIFF, fmt and data headers, and nothing else

# libsndfile shortens a truncated file's header to what is there; only its log knows: "data : 900 (should be 600)".
SIZE_CORRECTION = re.compile(r": (\d+) \(should be (\d+)\)")
SIZE_SLACK_BYTES = 8  # writers that forget a pad byte or count the RIFF header itself are off by this much at most
UNKNOWN_SIZE_BYTES = 0x7FFF_0000  # from here on a declared size is a streaming writer's "unknown"


class AudioError(ValueError):
    """The reason, in a few words, why a file or a payload is not usable audio."""


def read_audio(path: Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read a file as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio comes out bit for bit. Anything else is decoded to float32, averaged over its channels,
    resampled by soxr (HQ) and rounded with saturation. Raises AudioError when the file cannot be used.
    """
    if not path.is_file():
        raise AudioError("is not a regular file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise AudioError("the file is empty")
    try:
        # By descriptor, because soundfile would judge a path by its extension.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            check_header(sound, max_seconds)
            samples_S = decode(sound)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"libsndfile: {error.error_string.rstrip('.') or f'error {error.code}'}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error
    if len(samples_S) < MIN_SAMPLES:
        raise AudioError(f"has {len(samples_S)} samples at 16 kHz, shorter than one frame of {MIN_SAMPLES}")
    return samples_S


def check_header(sound: soundfile.SoundFile, max_seconds: float) -> None:
    """Refuse a header whose promise is empty, out of bounds, or larger than the file."""
    low_hz, high_hz = RATE_BOUNDS_HZ
    if not low_hz <= sound.samplerate <= high_hz:
        raise AudioError(f"sample rate {sound.samplerate} Hz is outside {low_hz} to {high_hz} Hz")
    if not 1 <= sound.channels <= MAX_CHANNELS:
        raise AudioError(f"{sound.channels} channels are more than {MAX_CHANNELS}")
    if sound.frames <= 0:
        raise AudioError("holds no samples")
    if sound.frames > max_seconds * sound.samplerate:
        raise AudioError(f"lasts {sound.frames / sound.samplerate:.1f} s, longer than {max_seconds:g} s")
    if sound.frames * sound.channels > MAX_DECODED_VALUES:
        raise AudioError(f"{sound.frames} x {sound.channels} values are more than {MAX_DECODED_VALUES}")
    for declared, present in SIZE_CORRECTION.findall(sound.extra_info):
        if int(present) + SIZE_SLACK_BYTES < int(declared) < UNKNOWN_SIZE_BYTES:
            raise AudioError(f"is truncated: a chunk declares {declared} bytes and {present} are there")


def decode(sound: soundfile.SoundFile) -> np.ndarray:
    """Decode an open file to int16 samples [S] at 16 kHz."""
    exact = (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
    audio_SC = sound.read(dtype="int16" if exact else "float32", always_2d=True)
    if len(audio_SC) != sound.frames:
        raise AudioError(f"is truncated: its header declares {sound.frames} frames and {len(audio_SC)} are there")
    if exact:
        return audio_SC[:, 0]
    # A sum of columns: numpy's mean over a short axis takes twenty times as long.
    mono_S = sum(audio_SC.T[1:], start=audio_SC[:, 0]) / np.float32(sound.channels)
    if not np.isfinite(mono_S).all():
        raise AudioError("holds samples that are not finite")
    if sound.samplerate != SAMPLE_RATE_HZ:
        mono_S = soxr.resample(mono_S, sound.samplerate, SAMPLE_RATE_HZ, quality="HQ")
    return to_int16(mono_S)


def to_int16(amplitude_S: np.ndarray) -> np.ndarray:
    """Round amplitudes in [-1, 1) to int16; louder ones saturate."""
    return np.clip(np.rint(amplitude_S * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


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
