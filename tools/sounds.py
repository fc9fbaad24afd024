"""Eight classes of synthetic sounds that an ear tells apart; `make demo` trains on them if it is given no audio.

Every clip has its own random pitch, rate, timbre and level, in a background of coloured noise; no two are alike.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE_HZ = 16_000
SECONDS = 2.6  # of a clip; 256 log-mel frames need 2.575 s

Synth = Callable[[np.random.Generator, np.ndarray], np.ndarray]  # (rng, time_S in seconds) -> samples_S


def siren(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make a tone that glides up and down."""
    centre_hz, swing, rate_hz = rng.uniform(500, 1200), rng.uniform(0.2, 0.5), rng.uniform(0.4, 1.5)
    return _tone(time_S, centre_hz * (1 + swing * np.sin(_turns(time_S, rate_hz, rng))), harmonics=3)


def bell(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make struck metal: inharmonic partials that die away, high ones first."""
    base_hz, samples_S = rng.uniform(250, 700), np.zeros_like(time_S)
    for strike_s in np.arange(rng.uniform(0, 0.4), SECONDS, rng.uniform(0.8, 1.6)):
        since_S = np.clip(time_S - strike_s, 0, None)
        for ratio in (1.0, 2.0, 2.76, 5.4):
            samples_S += (since_S > 0) * np.exp(-since_S * (1 + ratio)) * np.sin(2 * np.pi * base_hz * ratio * since_S)
    return samples_S


def cricket(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make a high trill in bursts."""
    burst_S = (time_S * rng.uniform(1.2, 3) + rng.random()) % 1 < rng.uniform(0.35, 0.6)
    pulses_S = np.clip(np.sin(_turns(time_S, rng.uniform(25, 45), rng)), 0, None)
    return burst_S * pulses_S * _tone(time_S, np.full_like(time_S, rng.uniform(3000, 5500)), harmonics=1)


def drip(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make drops into water: short plinks that rise in pitch, at irregular times."""
    samples_S = np.zeros_like(time_S)
    for start_s in np.cumsum(rng.uniform(0.15, 0.6, 10)):
        since_S = np.clip(time_S - start_s, 0, None)
        phase_S = 2 * np.pi * rng.uniform(500, 1300) * (since_S + rng.uniform(3, 8) * since_S**2)
        samples_S += (since_S > 0) * np.exp(-since_S * rng.uniform(25, 45)) * np.sin(phase_S)
    return samples_S


def engine(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make a low buzz with a beat."""
    speed_hz = rng.uniform(35, 90) * (1 + 0.1 * np.sin(_turns(time_S, rng.uniform(0.2, 0.6), rng)))
    beat_S = 1 + 0.6 * np.sin(_turns(time_S, rng.uniform(6, 14), rng))
    return _tone(time_S, speed_hz, harmonics=25) * beat_S


def bird(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make short high chirps in groups."""
    samples_S = np.zeros_like(time_S)
    for start_s in np.cumsum(rng.uniform(0.08, 0.3, 12)):
        length_s, from_hz, to_hz = rng.uniform(0.04, 0.1), rng.uniform(2500, 5000), rng.uniform(2500, 6500)
        place_S = (time_S - start_s) / length_s
        inside_S = (place_S > 0) & (place_S < 1)
        envelope_S = np.where(inside_S, np.sin(np.pi * np.clip(place_S, 0, 1)), 0)
        samples_S += envelope_S * _tone(time_S, from_hz + (to_hz - from_hz) * np.clip(place_S, 0, 1), harmonics=1)
    return samples_S


def alarm(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make beeps of one pitch, on and off."""
    on_S = (time_S * rng.uniform(1.5, 4) + rng.random()) % 1 < rng.uniform(0.3, 0.6)
    return _tone(time_S, np.full_like(time_S, rng.uniform(900, 2500)), harmonics=4) * on_S


def footsteps(rng: np.random.Generator, time_S: np.ndarray) -> np.ndarray:
    """Make dull thumps at a walking pace."""
    since_S = (time_S + rng.random()) % rng.uniform(0.4, 0.75)
    thump_S = np.exp(-since_S * 25) * np.sin(2 * np.pi * rng.uniform(60, 130) * since_S)
    return thump_S + 0.3 * np.exp(-since_S * 60) * _noise(rng, time_S.size, slope=0.5)


CLASSES: dict[str, Synth] = {
    synth.__name__: synth for synth in (alarm, bell, bird, cricket, drip, engine, footsteps, siren)
}


def write_dataset(folder: Path, clips_per_class: int, seed: int) -> None:
    """Write <folder>/<class>/<number>.wav, 16-bit mono at 16 kHz."""
    for number_of_class, (name, synth) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(clips_per_class):
            samples_S = synthesise(synth, np.random.default_rng([seed, number_of_class, number]))
            soundfile.write(folder / name / f"{number:03d}.wav", samples_S, SAMPLE_RATE_HZ, subtype="PCM_16")


def synthesise(synth: Synth, rng: np.random.Generator) -> np.ndarray:
    """Make one clip, float [S] in -1 .. 1: the sound in a background, at a random level."""
    time_S = np.arange(int(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    sound_S = _unit(synth(rng, time_S))
    background_S = _unit(_noise(rng, time_S.size, slope=rng.uniform(0, 1)))
    mixed_S = _unit(sound_S + background_S * 10 ** (-rng.uniform(5, 20) / 20))  # signal to noise 5 to 20 dB
    return np.clip(mixed_S * 10 ** (-rng.uniform(18, 32) / 20), -1, 1)


def _unit(samples_S: np.ndarray) -> np.ndarray:
    return samples_S / (np.sqrt(np.mean(samples_S**2)) + 1e-9)


def _turns(time_S: np.ndarray, rate_hz: float, rng: np.random.Generator) -> np.ndarray:
    return 2 * np.pi * (time_S * rate_hz + rng.random())


def _tone(time_S: np.ndarray, pitch_hz_S: np.ndarray, harmonics: int) -> np.ndarray:
    """Make harmonics that fall off as 1/n, for a pitch that may move; none is above the Nyquist frequency."""
    phase_S = 2 * np.pi * np.cumsum(pitch_hz_S) / SAMPLE_RATE_HZ
    audible = [n for n in range(1, harmonics + 1) if n * pitch_hz_S.max() < SAMPLE_RATE_HZ / 2]
    return np.sum([np.sin(n * phase_S) / n for n in audible], axis=0)


def _noise(rng: np.random.Generator, num_samples: int, slope: float) -> np.ndarray:
    """Make noise whose amplitude falls as 1/f**slope."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    spectrum /= np.maximum(1, np.arange(spectrum.size) / 20) ** slope
    return _unit(np.fft.irfft(spectrum, num_samples))
