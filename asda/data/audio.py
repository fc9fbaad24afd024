"""Audio files as waves: in float at their own rate, or as shards hold them, 16 kHz, mono, int16, in one kind of WAV.

Reads what libsndfile reads, and nothing here trusts a header: lengths, rates and channels are bounded before a byte is
decoded, and a file that holds less than it declares is refused. (Ogg and NIST files declare no length: their cut copies
pass as shorter clips.)
"""

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torchaudio.transforms import Resample

SAMPLE_RATE_HZ = 16_000
MIN_SAMPLES = 400  # one 25 ms frame of the log-mel front-end
MAX_SECONDS = 600.0  # of a clip, unless the caller says otherwise
RATE_BOUNDS_HZ = (1_000, 768_000)
MAX_CHANNELS = 64
MAX_FRAMES = 1 << 29  # of a file, one sample per channel each; as mono float32 2 GiB, 3 hours at 48 kHz
INT16_SCALE = 32_768  # int16 sample = amplitude x 32768
WAV_HEADER_BYTES = 44  # RIFF, fmt and data headers, and nothing else

READ_AT_ONCE = 1 << 20  # values of all channels, 4 MiB of float32: only their mean is kept
RESAMPLE_AT_ONCE = 1 << 19  # samples: 10 s at 48 kHz in one piece; torchaudio takes up to 60 bytes for each
# Values of torchaudio's resampling kernel: it holds 16000 / g filters of about rate / g taps, where g is the greatest
# common divisor of the two. 22.05 and 44.1 kHz take 0.1 M values, 11127 Hz would take 178 M (0.7 GB).
MAX_KERNEL_VALUES = 1 << 22
LOWPASS_ZEROS, LOWPASS_ROLLOFF = 6, 0.99  # torchaudio's defaults: zero crossings each side, share of the Nyquist band

# libsndfile shortens a truncated file's header to what is there; only its log knows: "data : 900 (should be 600)".
SIZE_CORRECTION = re.compile(r": (\d+) \(should be (\d+)\)")
SIZE_SLACK_BYTES = 8  # writers that forget a pad byte or count the RIFF header itself are off by this much at most
UNKNOWN_SIZE_BYTES = 0x7FFF_0000  # from here on a declared size is a streaming writer's "unknown"


class AudioError(ValueError):
    """The reason, in a few words, why a file or a payload is not usable audio."""


def read_audio(path: Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read a file as int16 samples [S] at 16 kHz, S >= 400.

    16 kHz mono 16-bit audio comes out bit for bit. Anything else is decoded as by read_wave, resampled as by `resample`
    and rounded with saturation. Raises AudioError when the file cannot be used.
    """
    with _opened(path, max_seconds) as sound:
        exact = (sound.samplerate, sound.channels, sound.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
        return _decode_int16(sound) if exact else to_int16(resample(_decode_mono(sound), sound.samplerate))


def read_wave(path: Path, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """Read a file as amplitudes at its own rate: float32 [S], full scale 1, the mean of its channels; and that rate.

    At 16 kHz they make 400 samples or more. Memory is that of the result. Raises AudioError when the file cannot be
    used, for the same reasons as read_audio.
    """
    with _opened(path, max_seconds) as sound:
        return _decode_mono(sound), sound.samplerate


@contextmanager
def _opened(path: Path, max_seconds: float) -> Iterator[soundfile.SoundFile]:
    """An audio file whose header is plausible; what libsndfile says against it in the block is an AudioError too."""
    if not path.is_file():
        raise AudioError("is not a regular file" if path.exists() else "no such file")
    if path.stat().st_size == 0:
        raise AudioError("the file is empty")
    try:
        # By descriptor, because soundfile would judge a path by its extension.
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            check_header(sound, max_seconds)
            yield sound
    except soundfile.LibsndfileError as error:
        raise AudioError(f"libsndfile: {error.error_string.rstrip('.') or f'error {error.code}'}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


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
    if sound.frames > MAX_FRAMES:
        raise AudioError(f"{sound.frames} samples per channel are more than {MAX_FRAMES}")
    for declared, present in SIZE_CORRECTION.findall(sound.extra_info):
        if int(present) + SIZE_SLACK_BYTES < int(declared) < UNKNOWN_SIZE_BYTES:
            raise AudioError(f"is truncated: a chunk declares {declared} bytes and {present} are there")
    num_samples = resampled_length(sound.frames, sound.samplerate)
    if num_samples < MIN_SAMPLES:
        raise AudioError(f"has {num_samples} samples at 16 kHz, shorter than one frame of {MIN_SAMPLES}")


def _decode_int16(sound: soundfile.SoundFile) -> np.ndarray:
    """All samples of a mono 16-bit file, int16 [S]."""
    samples_S = sound.read(dtype="int16")
    _check_whole(sound, len(samples_S))
    return samples_S


def _decode_mono(sound: soundfile.SoundFile) -> np.ndarray:
    """The mean over the channels of an open file, float32 [S] at its own rate."""
    mono_S = np.empty(sound.frames, np.float32)
    block = READ_AT_ONCE // sound.channels
    for start in range(0, sound.frames, block):
        audio_SC = sound.read(block, dtype="float32", always_2d=True)
        _check_whole(sound, start + len(audio_SC), min(start + block, sound.frames))
        # A sum of columns: numpy's mean over a short axis takes twenty times as long.
        mean_S = sum(audio_SC.T[1:], start=audio_SC[:, 0]) / np.float32(sound.channels)
        if not np.isfinite(mean_S).all():
            raise AudioError("holds samples that are not finite")
        mono_S[start : start + block] = mean_S
    return mono_S


def _check_whole(sound: soundfile.SoundFile, num_read: int, expected: int | None = None) -> None:
    if num_read != (sound.frames if expected is None else expected):
        raise AudioError(f"is truncated: its header declares {sound.frames} frames and {num_read} are there")


def resampled_length(num_samples: int, rate_hz: int) -> int:
    """Samples at 16 kHz that so many at another rate become: the end of the wave counts as a whole sample."""
    return -(-num_samples * SAMPLE_RATE_HZ // rate_hz)


def resample(wave_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to 16 kHz, float32 [S] to float32 [resampled_length(S, rate_hz)].

    By torchaudio (a sinc of 6 zero crossings under a Hann window), to the bit as the official feature extraction calls
    torchaudio.functional.resample, which may lose the last sample to the rounding of its length. Rates whose kernel
    would be huge (MAX_KERNEL_VALUES) are left to soxr (HQ).
    """
    if rate_hz == SAMPLE_RATE_HZ:
        return wave_S
    if _kernel_values(rate_hz) > MAX_KERNEL_VALUES:
        return _resample_by_soxr(wave_S, rate_hz)
    if max(len(wave_S), resampled_length(len(wave_S), rate_hz)) > RESAMPLE_AT_ONCE:
        return _resample_in_blocks(wave_S, rate_hz)
    return _resampler(rate_hz)(torch.from_numpy(wave_S)).numpy()


def _resample_in_blocks(wave_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """`resample` of a long wave by torchaudio, whose own memory is several times the wave's.

    `old` samples become `new`, and the outputs n * new to (n + 1) * new are dot products of samples around group n of
    the input. So a block of whole groups, with as many groups around it as the filter reaches over, gives what the
    whole wave gives.
    """
    resampler = _resampler(rate_hz)
    old, new = rate_hz // resampler.gcd, SAMPLE_RATE_HZ // resampler.gcd
    reach = math.ceil(resampler.width / old)  # groups
    num_groups, block = math.ceil(len(wave_S) / old), RESAMPLE_AT_ONCE // max(old, new)
    out_S = np.empty(resampled_length(len(wave_S), rate_hz), np.float32)
    for start in range(0, num_groups, block):
        before = min(reach, start)
        piece_S = torch.from_numpy(wave_S[(start - before) * old : (start + block + reach) * old])
        whole_S = torch.nn.functional.pad(piece_S, (0, -len(piece_S) % old))  # the last group may be a part of one
        block_S = out_S[start * new : (start + block) * new]
        block_S[:] = resampler(whole_S).numpy()[before * new :][: len(block_S)]
    return out_S


def _resample_by_soxr(wave_S: np.ndarray, rate_hz: int) -> np.ndarray:
    """`resample` by soxr, which rounds the length to the nearest: silence behind the wave brings it up to ours."""
    silence_S = np.zeros(rate_hz // SAMPLE_RATE_HZ + 1, np.float32)
    resampled_S = soxr.resample(np.concatenate([wave_S, silence_S]), rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return resampled_S[: resampled_length(len(wave_S), rate_hz)]


def _kernel_values(rate_hz: int) -> int:
    gcd = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    old, new = rate_hz // gcd, SAMPLE_RATE_HZ // gcd
    width = math.ceil(LOWPASS_ZEROS * old / (min(old, new) * LOWPASS_ROLLOFF))
    return new * (2 * width + old)


@lru_cache(maxsize=8)
def _resampler(rate_hz: int) -> Resample:
    """Holds the kernel, computed in float32 as the function does for float32 waves; the class would take float64."""
    return Resample(rate_hz, SAMPLE_RATE_HZ, dtype=torch.float32)


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
