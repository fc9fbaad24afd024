"""Duplicates: copies are found, unlike clips are not, and neither time nor table explodes."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from asda.data.audio.read import read_audio
from asda.data.audio.waves import to_int16
from asda.data.features.fbank import log_mel
from asda.sharding.duplicates import (
    FINGERPRINT_BYTES,
    HASH_BYTES,
    MAX_DIFFERING_BITS,
    NO_FINGERPRINT,
    clip_prints,
    find_pairs,
    fingerprint,
)


def prints_of(samples: np.ndarray) -> bytes:
    return clip_prints(samples, log_mel(samples))


def differing_bits(a: np.ndarray, b: np.ndarray) -> int:
    first, second = (np.frombuffer(fingerprint(log_mel(samples)), np.uint8) for samples in (a, b))
    return int(np.bitwise_count(first ^ second).sum())


def through(codec: str, subtype: str | None, samples: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=codec, subtype=subtype)
    file.seek(0)
    return to_int16(soundfile.read(file, dtype="float32")[0])


@pytest.fixture(scope="module")
def real(shared) -> list[np.ndarray]:
    """Every fourth clip of the pile, 10 s each, of all kinds."""
    return [read_audio(path) for path in sorted((shared / "data/pile").rglob("*.ogg"))[::4]]


def test_most_copies_with_another_gain_codec_or_faint_noise_are_alike(real):
    rng = np.random.default_rng(1)
    changes = {
        # Measured over 299 clips of all kinds: 100, 99, 97 and 99 in 100. With a true share of 0.95, fewer than 16 of
        # 20 happen once in 400 such tests.
        "gain": lambda clip: to_int16(clip * np.float32(0.7 / 32768)),
        "mp3": lambda clip: through("MP3", None, clip),
        "vorbis": lambda clip: through("OGG", "VORBIS", clip),
        "noise at -40 dB": lambda clip: to_int16((clip + rng.normal(0, clip.std() / 100, len(clip))) / 32768),
    }
    for name, change in changes.items():
        found = [differing_bits(clip, change(clip)) <= MAX_DIFFERING_BITS for clip in real[:20]]
        assert sum(found) >= (20 if name == "gain" else 16), name


def test_unlike_clips_are_not_alike(real):
    # 160 clips make 12,720 pairs; of independent bits none would come below 128 - 8 * 8 = 64 in 10^15 pairs.
    pairs = find_pairs([prints_of(clip) for clip in real])
    assert pairs == []


def test_padding_takes_none_of_the_bits():
    rng = np.random.default_rng(2)
    barks = [to_int16(rng.normal(0, 0.1, 16_000).astype(np.float32)) for _ in range(2)]
    padded = [np.concatenate([np.zeros(32_000, np.int16), bark, np.zeros(32_000, np.int16)]) for bark in barks]
    assert differing_bits(*padded) > 90
    # The window of 25 ms reaches over the seam, so up to two frames of a hundred join at each end.
    assert differing_bits(padded[0], barks[0]) <= MAX_DIFFERING_BITS


@pytest.mark.parametrize("samples", [np.zeros(16_000, np.int16), np.full(400, 7, np.int16), np.ones(4000, np.int16)])
def test_silence_and_what_is_too_short_have_no_fingerprint(samples):
    assert fingerprint(log_mel(samples)) == NO_FINGERPRINT


@given(st.lists(st.integers(0, 6), max_size=30))
@settings(max_examples=50, deadline=None)
def test_k_equal_clips_make_k_minus_1_exact_pairs_with_the_first(numbers):
    prints = [bytes([number]) * HASH_BYTES + NO_FINGERPRINT for number in numbers]
    pairs = [(pair.kind, pair.first, pair.second) for pair in find_pairs(prints)]
    assert pairs == [("exact", numbers.index(n), i) for i, n in enumerate(numbers) if numbers.index(n) != i]


def test_near_pairs_connect_what_a_comparison_of_all_with_all_connects():
    rng = np.random.default_rng(3)
    families = rng.integers(0, 256, (40, FINGERPRINT_BYTES), dtype=np.uint8)
    family = rng.integers(0, 40, 300)
    flips = np.packbits(rng.random((300, 8 * FINGERPRINT_BYTES)) < 0.05, axis=1)  # 13 of 256 bits on average
    marked = families[family] ^ flips
    prints = [rng.bytes(HASH_BYTES) + row.tobytes() for row in marked]
    pairs = find_pairs(prints)
    assert all(pair.kind == "near" and family[pair.first] == family[pair.second] for pair in pairs)
    bits = [int(np.bitwise_count(marked[pair.first] ^ marked[pair.second]).sum()) for pair in pairs]
    assert [pair.differing_bits for pair in pairs] == bits
    assert len(pairs) == 300 - len(set(family))  # a tree for every family


def test_ten_thousand_clips_that_are_all_alike_make_a_table_of_their_length():
    rng = np.random.default_rng(4)
    row = rng.integers(0, 256, FINGERPRINT_BYTES, dtype=np.uint8).tobytes()
    pairs = find_pairs([rng.bytes(HASH_BYTES) + row for _ in range(10_000)])
    assert len(pairs) == 9_999


def test_no_clips_make_no_pairs():
    assert find_pairs([]) == []
