"""Audio files made of integers alone, so that every machine writes the same bytes.

No sine and no float: the last bit of those may differ between processors. Four classes of sounds lie on a faint noise,
without which a log-mel would be the logarithm of rounding errors between the harmonics.
"""

import csv
import wave
from pathlib import Path

import numpy as np

SAMPLE_RATE_HZ = 16_000
CLASSES = ("buzz", "clicks", "hiss", "ramp")
CLIPS_PER_CLASS = 6
SHORTEST_SAMPLES = 10_800  # of a clip: 64 log-mel frames need 63 * 160 + 400 = 10,480


def random_numbers(seed: int, count: int) -> np.ndarray:
    """Hash (seed, 0), (seed, 1), ... to 64 bits each by splitmix64's finaliser; uint64 [count]."""
    z = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    z *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))


def sound(name: str, seed: int, num_samples: int) -> np.ndarray:
    """A clip of a class, int16 [num_samples]; the seed draws its pitch, its level and its noise."""
    pitch, level, *_ = (int(number) for number in random_numbers(seed + 1000, 2))
    pitch_hz, level = 150 + pitch % 700, 600 + level % 2400
    time = np.arange(num_samples, dtype=np.int64)
    noise = random_numbers(seed, num_samples).astype(np.int64) >> 8  # the sign is kept: both sides of 0
    shape = {
        "buzz": level * (2 * time * pitch_hz // SAMPLE_RATE_HZ % 2),
        "clicks": level >> np.minimum(time % (3 * pitch_hz) // (4 + level % 29), 12),
        "hiss": (noise // 4 % 8) * (level // 8),
        "ramp": (time * pitch_hz % SAMPLE_RATE_HZ) // 1000 * (level // 16),
    }[name]
    return (shape + noise % 4).astype(np.int16)


def write_wav(path: Path, samples: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> None:
    """Write mono PCM int16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples.astype("<i2").tobytes())


def write_folder(folder: Path) -> None:
    """Write one folder a class, for --source folder."""
    for class_number, name in enumerate(CLASSES):
        for number in range(CLIPS_PER_CLASS):
            seed = 100 * class_number + number
            write_wav(folder / name / f"{number}.wav", sound(name, seed, SHORTEST_SAMPLES + 160 * (seed % 7)))


def write_table(folder: Path) -> None:
    """Write clips of one or two classes and table.csv, for --source csv.

    Among them are a clip that is there twice and once more at half its level, one that is too short to be kept, one
    without a label, and one at 8 kHz, alone in its split because resampling sums floats.
    """
    rows = [("path", "labels", "split")]
    for number in range(12):
        first, second = CLASSES[number % 4], CLASSES[(number + 1 + number // 4) % 4]
        samples = sound(first, 500 + number, SHORTEST_SAMPLES) + sound(second, 600 + number, SHORTEST_SAMPLES) // 2
        write_wav(folder / f"clips/{number}.wav", samples)
        rows.append((f"clips/{number}.wav", f"{first};{second}", "test" if number % 4 == 3 else "train"))
    again = sound("clicks", 500, 12_000)
    for name, samples, labels in (
        ("again", again, "clicks"),
        ("copy", again, ""),
        ("half", again // 2, "clicks"),
        ("short", again[:399], "hiss"),  # a log-mel frame needs 400 samples
    ):
        write_wav(folder / f"clips/{name}.wav", samples)
        rows.append((f"clips/{name}.wav", labels, "train"))
    write_wav(folder / "clips/low_rate.wav", sound("ramp", 502, 6_000), rate_hz=8_000)
    rows.append(("clips/low_rate.wav", "ramp", "resampled"))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
