"""The synthetic sounds of the demo: audible, different, the same every time."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile
from sounds import CLASSES, SAMPLE_RATE_HZ, SECONDS, synthesise, write_dataset


@pytest.mark.parametrize("name", CLASSES)
def test_every_clip_is_audible_unclipped_and_its_own(name: str) -> None:
    clips = [synthesise(CLASSES[name], np.random.default_rng(seed)) for seed in range(5)]
    for clip_S in clips:
        assert clip_S.shape == (int(SECONDS * SAMPLE_RATE_HZ),)
        assert -35 < 10 * np.log10(np.mean(clip_S**2)) < -10  # dB of full scale
        assert np.mean(np.abs(clip_S) >= 1) < 1e-3
    assert not np.array_equal(clips[0], clips[1])
    assert np.array_equal(clips[0], synthesise(CLASSES[name], np.random.default_rng(0)))


def test_files_are_16_bit_mono_at_16_khz(tmp_path: Path) -> None:
    write_dataset(tmp_path, clips_per_class=1, seed=0)
    files = sorted(tmp_path.glob("*/*.wav"))
    assert [path.parent.name for path in files] == sorted(CLASSES)
    rate, samples = wavfile.read(files[0])
    assert (rate, samples.dtype, samples.ndim) == (16_000, np.int16, 1)
