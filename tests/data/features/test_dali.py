import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from kaldi import MOST, float64_log_mel, kaldi_log_mel
from scipy import stats

from asda.config.data import AugmentConfig
from asda.data.features.augment import ClipAugmentation, draw_augmentation
from asda.data.features.cpu import uniform
from asda.data.features.dali import PatchPipeline
from asda.data.features.fbank import num_samples
from asda.errors import UserError
from asda.models.patches import PatchLayout, from_patches, normalised, padded, to_patches

FRAMES, PATCH, MEAN, STD, PAD = 128, 16, -4.268, 4.569, 0.0
Batches = list[tuple[list[np.ndarray], int]]
BOTH = pytest.mark.parametrize("native", [False, True], ids=["threads", "native"])


def pipeline(source: Iterator, augmentations: Callable | None = None, **changes) -> PatchPipeline:
    """Pairs of clips and an extra, from which `augmentations` makes those of the clips."""
    layout = PatchLayout(FRAMES, PATCH, MEAN, STD, PAD)
    layout = layout._replace(**{name: changes.pop(name) for name in layout._fields if name in changes})
    settings = {"batch_size": 4, "device": "cpu", "threads": 2, "prefetch": 2, "augmented": augmentations is not None}
    triples = ((clips, augmentations and augmentations(extra), extra) for clips, extra in source)
    return PatchPipeline(triples, layout, **(settings | changes))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2000, num_samples).astype(np.int16)


def noise_batches(num_batches: int, clips: int = 2, num_samples: int = 8000) -> Batches:
    return [([noise(num_samples, 100 * n + c) for c in range(clips)], n) for n in range(num_batches)]


def as_patches(x_TM: np.ndarray) -> np.ndarray:
    return to_patches(torch.from_numpy(x_TM), PATCH).numpy()


def expected_patches(mel_TM: np.ndarray, frames: int = FRAMES) -> torch.Tensor:
    """The definition, in float64."""
    padded_TM = padded(torch.from_numpy(mel_TM).double(), frames, PAD)
    return to_patches(normalised(padded_TM, MEAN, STD), PATCH).float()


@pytest.fixture(scope="module")
def real_clips(shared: Path) -> list[np.ndarray]:
    """Twelve clips of 10 s, loud, clipped, quiet and shifted ones among them."""
    paths = sorted((shared / "data" / "pile").rglob("*.ogg"))[5::55]
    return [soundfile.read(path, dtype="int16")[0] for path in paths]


@BOTH
def test_clips_of_any_length_become_torchaudios_patches(native: bool):
    lengths = [400, 559, 560, 8000, 20_720, 20_879, 20_880, 48_000]  # 1, 1, 2, 48, 128, 128, 129 and 298 frames
    clips = [noise(length, seed) for seed, length in enumerate(lengths)]
    with pipeline(iter([(clips[:4], "a"), (clips[4:], "b")]), native=native) as batches:
        patches = torch.cat([patches_BNP for patches_BNP, _ in batches])
    expected = torch.stack([expected_patches(kaldi_log_mel(clip)) for clip in clips])
    assert patches.shape == expected.shape == (8, FRAMES // 16 * 8, 256)
    assert patches.dtype == torch.float32
    assert (patches - expected).abs().max() <= MOST / (2 * STD)


def test_real_clips_become_torchaudios_patches(real_clips: list[np.ndarray]):
    with pipeline(iter([(real_clips[:8], 0), (real_clips[8:], 1)]), frames=1024, batch_size=8) as batches:
        patches = torch.cat([patches_BNP for patches_BNP, _ in batches])
    for patches_NP, clip in zip(patches, real_clips, strict=True):
        assert (patches_NP - expected_patches(kaldi_log_mel(clip), 1024)).abs().max() <= MOST / (2 * STD)


def test_the_native_graph_differs_from_float64_by_rounding_only(real_clips: list[np.ndarray]):
    with pipeline(([[clip], None] for clip in real_clips), frames=1008, mean=0.0, std=0.5, native=True) as batches:
        for clip, (patches_BNP, _) in zip(real_clips, batches, strict=True):
            mel_TM = from_patches(patches_BNP[0], PATCH).numpy()
            exact_TM, slack_TM = float64_log_mel(clip)
            assert (np.abs(mel_TM[: len(exact_TM)] - exact_TM) <= slack_TM).all()
            assert (mel_TM[len(exact_TM) :] == PAD).all()


@BOTH
def test_padding_has_its_value_before_normalisation(native: bool):
    with pipeline(iter([([noise(400)], 0)]), native=native, pad_log_mel=-3.0) as batches:
        patches_NP = next(batches)[0][0]
    assert torch.allclose(patches_NP[8:], torch.full((56, 256), (-3.0 - MEAN) / (2 * STD)))


def hashed(counters: np.ndarray, key: int) -> np.ndarray:
    """MurmurHash3's finaliser of counter * 2^32 / golden ratio + key, as a number in [0, 1); by remainders."""
    bits = (counters.astype(np.uint64) * 0x9E3779B9 + key) % 2**32
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B % 2**32
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 % 2**32
    return ((bits ^ (bits >> 16)) >> 8) / 2**24


def single(clip: np.ndarray, one: ClipAugmentation, mask_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A clip before it is mixed, by the definitions, in float64: normalised values and their slack, [T, M] each."""
    wave_S = clip / 32768 - (clip / 32768).mean()
    rms = np.sqrt((wave_S**2).mean())
    wave_S = np.roll(wave_S, one.wave_shift)[: num_samples(FRAMES)]
    noise_S = (hashed(np.arange(len(wave_S)), one.noise_key) - 0.5) * np.sqrt(12)
    mel_TM, slack_TM = float64_log_mel((wave_S + rms * one.noise_ratio * noise_S) * one.gain * 32768)
    padded_TM, padded_slack_TM = np.full((FRAMES, 128), PAD), np.zeros((FRAMES, 128))
    padded_TM[: len(mel_TM)], padded_slack_TM[: len(mel_TM)] = mel_TM, slack_TM
    if mask_first:
        mask(padded_TM, one)
    x_TM = (padded_TM - MEAN) / (2 * STD)
    x_TM += one.frame_noise * hashed(np.arange(x_TM.size), one.noise_key ^ 0xFFFFFFFF).reshape(x_TM.shape)
    return np.roll(x_TM, one.frame_shift, axis=0), np.roll(padded_slack_TM, one.frame_shift, axis=0) / (2 * STD)


def mask(x_TM: np.ndarray, one: ClipAugmentation) -> None:
    x_TM[:, one.mel_start : one.mel_stop] = 0
    x_TM[one.frame_start : one.frame_stop] = 0


ANYTHING = ClipAugmentation(
    wave_shift=5000, gain=1.3, noise_ratio=0.1, frame_noise=0.09, frame_shift=7, noise_key=0xDEADBEEF,
    mel_start=20, mel_stop=41, frame_start=3, frame_stop=19,
)  # fmt: skip
CASES = {
    "nothing": ClipAugmentation(),
    "roll": ClipAugmentation(wave_shift=3001),
    "roll by nearly all": ClipAugmentation(wave_shift=9_999),
    "gain": ClipAugmentation(gain=0.6),
    "noise": ClipAugmentation(noise_ratio=0.3, noise_key=4_000_000_000),
    "noisy roll": ClipAugmentation(wave_shift=777, gain=1.4, noise_ratio=1.0, noise_key=1),
    "frame noise": ClipAugmentation(frame_noise=0.1, noise_key=2**32 - 1),
    "frame roll": ClipAugmentation(frame_shift=FRAMES - 10),
    "masks": ClipAugmentation(mel_start=0, mel_stop=25, frame_start=100, frame_stop=128),
    "everything": ANYTHING,
}


@BOTH
@pytest.mark.parametrize("mask_first", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [10_000, 30_000])  # shorter and longer than the 20,720 samples that are used
def test_every_augmentation_is_its_definition_in_float64(case: str, length: int, mask_first: bool, native: bool):
    one, clip = CASES[case], noise(length)
    source = iter([([clip], [one])])
    with pipeline(source, augmentations=lambda some: some, mask_first=mask_first, native=native) as batches:
        patches_NP = next(batches)[0][0].double().numpy()
    x_TM, slack_TM = single(clip, one, mask_first)
    if not mask_first:
        mask(x_TM, one)
    # The slack of the log-mel has room for the three roundings more of a sample that is rolled, amplified and noisy;
    # normalising and noise round three times, values of less than 4.
    slack_NP = as_patches(slack_TM) + 3 * 4 * 2.0**-24
    assert (np.abs(patches_NP - as_patches(x_TM)) <= slack_NP).all()


@BOTH
@pytest.mark.parametrize("mask_first", [False, True])
def test_mixtures_are_shares_of_both_clips_and_masked_each_for_itself(mask_first: bool, native: bool):
    clips = [noise(length, length) for length in (10_000, 20_000, 8000, 30_000)]
    some = [ANYTHING._replace(share=share, wave_shift=n, noise_key=n) for n, share in enumerate((0.3, 0.3, 1.0, 1.0))]
    some[1] = some[1]._replace(mel_start=64, mel_stop=70, frame_start=0, frame_stop=0)
    source = iter([(clips, some)])
    with pipeline(source, augmentations=lambda some: some, mask_first=mask_first, native=native) as batches:
        found = next(batches)[0].double().numpy()
    alone = [single(clip, one, mask_first) for clip, one in zip(clips, some, strict=True)]
    for place, (one, partner) in enumerate(zip(some, (1, 0, 2, 3), strict=True)):
        (x_TM, slack_TM), (other_TM, other_slack_TM) = alone[place], alone[partner]
        x_TM, slack_TM = (
            one.share * a + (1 - one.share) * b for a, b in ((x_TM, other_TM), (slack_TM, other_slack_TM))
        )
        if not mask_first:
            mask(x_TM, one)
        # Two products and a sum round once more each.
        assert (np.abs(found[place] - as_patches(x_TM)) <= as_patches(slack_TM) + 6 * 4 * 2.0**-24).all()


def augmented_clips(number: int) -> tuple[list[np.ndarray], list[ClipAugmentation]]:
    config = AugmentConfig.model_validate(
        {
            "roll": True, "magnitude": 10.0, "gain_db": (-6.0, 3.0), "noise_snr_db": (10.0, 30.0), "frame_noise": 0.1,
            "frame_roll": 10, "spec_augment": {"mel_ratio": 0.2, "frame_ratio": 0.2},
        }
    )  # fmt: skip
    clips = [noise(4000 + 3000 * n, n) for n in range(number)]
    shares = [0.3, 0.3, 1.0, 1.0, 0.8, 0.8, 0.5, 0.5]
    rngs = [np.random.default_rng(n) for n in range(number)]
    drawn = [draw_augmentation(rngs[n], config, len(clips[n]), FRAMES, shares[n % 8]) for n in range(number)]
    return clips, drawn


@BOTH
def test_neither_micro_batches_nor_threads_change_a_bit(native: bool):
    clips, drawn = augmented_clips(8)
    results = []
    for size, threads in [(8, 2), (2, 1), (4, 3), (8, 1), (2, 2)]:
        source = ((clips[low : low + size], drawn[low : low + size]) for low in range(0, 8, size))
        settings = {"batch_size": size, "threads": threads, "native": native, "augmentations": lambda some: some}
        with pipeline(source, **settings) as batches:
            results.append(torch.cat([patches_BNP for patches_BNP, _ in batches]))
    assert all(torch.equal(result, results[0]) for result in results)


@BOTH
def test_augmentations_that_do_nothing_change_no_bit(native: bool):
    clips, _ = augmented_clips(4)
    plain, _ = next(pipeline(iter([(clips, None)]), native=native))
    nothing = [ClipAugmentation(noise_key=n) for n in range(4)]
    augmented, _ = next(pipeline(iter([(clips, None)]), native=native, augmentations=lambda _: nothing))
    assert torch.equal(plain, augmented)


def test_an_error_in_the_numbers_comes_out_of_the_iteration():
    clips, drawn = augmented_clips(3)
    with (
        pytest.raises(ValueError, match="its partner does not"),
        pipeline(iter([(clips[:1], drawn[:1])]), augmentations=lambda some: some) as batches,
    ):
        next(batches)


def test_the_noise_is_white_uniform_and_another_for_each_key():
    counters = np.arange(1 << 16)
    noise_KS = np.array([[uniform(np.uint32(i), np.uint32(key)) for i in counters] for key in (0, 1, 2**31, 2**32 - 1)])
    assert np.array_equal(noise_KS[2], hashed(counters, 2**31))
    for noise_S in noise_KS:
        assert stats.kstest(noise_S, "uniform").pvalue > 1e-4
        # Of white noise the spectrum's lines |X|^2 / S are exponential with the mean 1 / 12.
        power_K = np.abs(np.fft.rfft(noise_S - noise_S.mean())[1:-1]) ** 2 / len(noise_S)
        assert stats.kstest(power_K * 12, "expon").pvalue > 1e-4
    correlations = np.corrcoef(noise_KS)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / len(counters) ** 0.5  # five standard errors


@BOTH
def test_batches_of_any_size_come_in_order_with_their_extras(native: bool):
    sizes = [4, 1, 3, 4, 2]
    source = [([noise(4000, n) for _ in range(size)], {"number": n}) for n, size in enumerate(sizes)]
    with pipeline(iter(source), native=native) as batches:
        found = list(batches)
    assert [len(patches_BNP) for patches_BNP, _ in found] == sizes
    assert all(extra is given for (_, extra), (_, given) in zip(found, source, strict=True))
    for n, (patches_BNP, _) in enumerate(found):
        assert (patches_BNP - expected_patches(kaldi_log_mel(noise(4000, n)))).abs().max() <= MOST / (2 * STD)


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3])
def test_sources_shorter_than_the_prefetch_end_as_they_should(num_batches: int):
    batches = pipeline(iter(noise_batches(num_batches)), prefetch=3)
    assert [n for _, n in batches] == list(range(num_batches))
    assert next(batches, "ended") == "ended"


def test_the_source_is_read_lazily_and_in_the_callers_thread():
    taken = []

    def source():
        for batch in noise_batches(10):
            taken.append(threading.current_thread())
            yield batch

    with pipeline(source(), prefetch=3) as batches:
        assert not taken
        for n in range(5):
            next(batches)
            assert len(taken) == n + 3
    assert set(taken) == {threading.main_thread()}


@BOTH
def test_an_error_of_the_source_comes_out_unchanged_after_the_batches_before_it(native: bool):
    damage = UserError("shard train-000003.tar.zst is damaged at key dog-7")

    def source():
        yield from noise_batches(3)
        raise damage

    seen = []
    batches = pipeline(source(), native=native)
    with pytest.raises(UserError) as caught:
        seen.extend(n for _, n in batches)
    assert caught.value is damage
    assert seen == [0, 1, 2]
    assert next(batches, "ended") == "ended"


@BOTH
def test_tensors_own_their_memory(native: bool):
    with pipeline(iter(noise_batches(8)), native=native) as batches:
        kept, copies = [], []
        for patches_BNP, _ in batches:
            kept.append(patches_BNP)
            copies.append(patches_BNP.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_the_source_may_overwrite_its_array_once_the_batch_is_out():
    buffers_2S = np.empty((2, 8000), dtype=np.int16)  # as many as are prefetched

    def source():
        for n in range(6):
            buffers_2S[n % 2] = noise(8000, n)
            yield [buffers_2S[n % 2]], n

    with pipeline(source(), prefetch=2) as batches:
        for patches_BNP, n in batches:
            expected = expected_patches(kaldi_log_mel(noise(8000, n)))
            assert (patches_BNP[0] - expected).abs().max() <= MOST / (2 * STD)


@BOTH
def test_samples_that_nobody_else_holds_last_until_they_are_used(native: bool):
    with pipeline((([noise(8000, n)], n) for n in range(12)), native=native) as batches:
        for patches_BNP, n in batches:
            expected = expected_patches(kaldi_log_mel(noise(8000, n)))
            assert (patches_BNP[0] - expected).abs().max() <= MOST / (2 * STD)


def test_patches_outlive_the_pipeline():
    with pipeline(iter(noise_batches(3))) as batches:
        kept = [patches_BNP for patches_BNP, _ in batches]
    del batches
    again = [patches_BNP for patches_BNP, _ in pipeline(iter(noise_batches(3)))]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_read_only_samples_are_accepted():
    samples_S = np.frombuffer(noise(8000).tobytes(), dtype=np.int16)
    with pipeline(iter([([samples_S], 0)])) as batches:
        assert next(batches)[0].isfinite().all()


@BOTH
def test_a_second_pipeline_works_while_the_first_is_alive(native: bool):
    alone = [patches_BNP for patches_BNP, _ in pipeline(iter(noise_batches(4)))]
    with pipeline(iter(noise_batches(4))) as training:
        found = [next(training)[0]]
        with pipeline(iter(noise_batches(3)), native=native) as evaluation:
            assert len(list(evaluation)) == 3
        found += [patches_BNP for patches_BNP, _ in training]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@BOTH
def test_closing_ends_every_thread_with_work_under_way(native: bool):
    list(pipeline(iter(noise_batches(2)), native=native))  # torch's own threads start here, and stay
    before = num_threads()
    for prefetch in (1, 2, 4):
        with pipeline(iter(noise_batches(50)), native=native, prefetch=prefetch) as batches:
            next(batches)
            assert num_threads() > before
        batches.close()
        assert next(batches, "ended") == "ended"
    deadline = time.monotonic() + 2  # the kernel lists a thread for a moment after it was joined
    while num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_threads() <= before


def test_an_error_of_the_source_ends_every_thread():
    list(pipeline(iter(noise_batches(2))))
    before = num_threads()

    def source():
        yield from noise_batches(1)
        raise UserError("damaged")

    with pytest.raises(UserError) as caught:
        list(pipeline(source()))
    deadline = time.monotonic() + 2
    while num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_threads() <= before
    assert caught.traceback  # alive, and with it the frames of DALI


def test_torch_computes_on_one_core_in_a_thread_of_the_pool_and_as_before_elsewhere():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = []
    with pipeline(iter(noise_batches(2))) as batches:
        next(batches)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        seen.append(torch.get_num_threads())
        pool = batches._cpu_patches._pool  # pyright: ignore[reportOptionalMemberAccess]
        assert set(pool.map(lambda _: torch.get_num_threads(), range(9))) == {1}  # pyright: ignore[reportOptionalMemberAccess]
    torch.set_num_threads(before)
    assert seen == [3, 3]


PROGRAM = """
import itertools, sys, time
import numpy as np
from asda.config.data import AugmentConfig
from asda.data.features.augment import ClipAugmentation, draw_augmentation
from asda.data.features.cpu import uniform
from asda.data.features.fbank import num_samples
from asda.data.features.dali import PatchPipeline
from asda.models.patches import PatchLayout
clip = np.random.default_rng(0).integers(-9000, 9000, 160_000).astype(np.int16)
layout = PatchLayout(frames=1024, patch=16, mean=0.0, std=1.0, pad_log_mel=0.0)
batches = PatchPipeline((([clip] * 4, None, n) for n in itertools.count()), layout, batch_size=4, device="cpu",
                        threads=2, prefetch=4, augmented=False, native={native})
next(batches)
print("ready", flush=True)
{then}
"""


def start(native: bool, then: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(native=native, then=then)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@BOTH
def test_a_program_that_forgets_to_close_still_ends_and_says_nothing(native: bool):
    stdout, stderr = (process := start(native, "next(batches)")).communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "ready\n", "")


@pytest.mark.parametrize("then", ["[None for _ in batches]", "time.sleep(60)"])
def test_ctrl_c_ends_the_program_at_once(then: str):
    process = start(False, then)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert stderr.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_patches_made_on_a_gpu_are_those_of_the_cpu():
    batches = noise_batches(6)
    with pipeline(iter(batches)) as on_cpu, pipeline(iter(batches), device="gpu") as on_gpu:
        for (cpu_BNP, _), (gpu_BNP, _) in zip(on_cpu, on_gpu, strict=True):
            assert gpu_BNP.is_cuda
            assert (gpu_BNP.cpu() - cpu_BNP).abs().max() <= MOST / (2 * STD)
