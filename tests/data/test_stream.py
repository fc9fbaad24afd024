"""The stream: every clip as it was written, in the order asked for, on any number of ranks; or an error."""

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asda.config.data import DataConfig
from asda.config.run import Config, load_config
from asda.data.clips import Clip, ClipDataset, read_clips
from asda.data.features.fbank import log_mel, num_samples
from asda.data.order import Draw
from asda.data.stream import Batch, evaluation_batches, make_patches, training_batches
from asda.errors import UserError

BATCH = 12
SHARES = {"train": 2.0, "test": 1.0}
CONFIG = Path(__file__).parents[2] / "configs" / "demo_finetune.json"


def data_config(**values: object) -> DataConfig:
    return DataConfig.model_validate({"train": "unused:train", "frames": 256, **values})


def batches_of(
    dataset: ClipDataset, config: DataConfig, rank: int = 0, ranks: int = 1, first: int = 0
) -> Iterator[Batch]:
    batches = training_batches(
        dataset, config, seed=1, first_step=first, batch=BATCH, micro_batch=3, rank=rank, world_size=ranks, masks=None
    )
    return iter(batches)


def test_clips_come_back_bit_by_bit_with_their_labels(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train+test", labelled=True)
    assert len(dataset) == 64
    for clip in read_clips(dataset, [Draw(0, number) for number in range(64)]):
        name, number = clip.key.split("_")
        expected, _ = soundfile.read(shards.parent / "audio" / name / f"{number}.wav", dtype="int16")
        assert np.array_equal(clip.samples, expected)
        assert [dataset.vocabulary[label] for label in clip.labels] == [name]


def test_the_order_asked_for_is_the_order_given_also_with_repeats(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    numbers = [7, 3, 3, 40, 7, 0, 0, 0, 20]
    clips = read_clips(dataset, [Draw(0, number) for number in numbers])
    assert [clip.key for clip in clips] == [read_clips(dataset, [Draw(0, number)])[0].key for number in numbers]


def clips_of(dataset: ClipDataset, config: DataConfig, ranks: int, first_step: int, last_step: int) -> list[Clip]:
    """What all ranks together see of some steps, step after step and rank after rank."""
    by_rank: list[list[Clip]] = []
    for rank in range(ranks):
        share = (last_step - first_step) * BATCH // ranks
        clips = (clip for b in batches_of(dataset, config, rank, ranks, first_step) for clip in b.clips)
        by_rank.append(list(islice(clips, share)))
    size = BATCH // ranks
    return [
        clip
        for start in range(0, (last_step - first_step) * size, size)
        for clips in by_rank
        for clip in clips[start : start + size]
    ]


@pytest.mark.parametrize("threads", [0, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_threads_do_not_change_what_a_step_sees(shards: Path, ranks: int, threads: int) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    expected = clips_of(dataset, data_config(crop="random", threads=1), 1, 0, 8)  # two epochs
    found = clips_of(dataset, data_config(crop="random", threads=threads), ranks, 0, 8)
    assert [(c.draw, c.key, c.samples.tobytes()) for c in found] == [
        (c.draw, c.key, c.samples.tobytes()) for c in expected
    ]


@pytest.mark.parametrize("order", [{}, {"mode": "balanced", "draws_per_epoch": 30}, {"mode": "sequential"}])
def test_a_run_stopped_anywhere_goes_on_the_same_with_other_ranks_and_threads(shards: Path, order: dict) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    rng = random.Random(6)
    num_steps = 2 * 48 // BATCH
    whole = [clip.key for clip in clips_of(dataset, data_config(order=order), 1, 0, num_steps)]
    for _ in range(20):
        stop = rng.randrange(1, num_steps)
        parts = [
            clips_of(dataset, data_config(order=order, threads=rng.choice([0, 2, 3])), rng.choice([1, 2, 3]), *steps)
            for steps in ((0, stop), (stop, num_steps))
        ]
        assert [clip.key for part in parts for clip in part] == whole


def test_the_dataset_of_a_mixture_is_drawn_by_its_share(shards: Path) -> None:
    config = data_config(train=[{"data": f"{shards}:{name}", "share": share} for name, share in SHARES.items()])
    dataset = ClipDataset(*[part.data for part in config.datasets], labelled=True)
    assert len(dataset) == 64
    clips = clips_of(dataset, config, 1, 0, 250)  # 3,000 positions, three blocks of the mixture
    assert sum(clip.draw.clip < 48 for clip in clips) == 2000
    assert {clip.draw.epoch for clip in clips if clip.draw.clip >= 48} == set(range(63))  # 1,000 visits of 16 clips


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_evaluation_sees_every_clip_exactly_once(shards: Path, ranks: int) -> None:
    dataset = ClipDataset(f"{shards}:test", labelled=True)
    seen = []
    for rank in range(ranks):
        for batch in evaluation_batches(dataset, data_config(), batch=3, rank=rank, world_size=ranks):
            seen += [clip.draw.clip for clip in batch.clips]
    assert seen == list(range(len(dataset)))


def test_a_random_crop_makes_exactly_the_frames_asked_for_and_moves(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    config = DataConfig(train="unused:train", frames=64, crop="random")
    clips = [clip for batch in islice(batches_of(dataset, config), 64) for clip in batch.clips]
    whole = {clip.draw.clip: clip.samples for clip in read_clips(dataset, [Draw(0, n) for n in range(48)])}
    for clip in clips:
        assert len(clip.samples) == num_samples(64)
        assert len(log_mel(clip.samples)) == 64
        assert clip.samples.tobytes() in whole[clip.draw.clip].tobytes()
    first = {clip.draw.clip: clip.samples.tobytes() for clip in clips if clip.draw.epoch == 0}
    again = {clip.draw.clip: clip.samples.tobytes() for clip in clips if clip.draw.epoch == 1}
    assert all(first[number] != again[number] for number in first)


def test_patches_belong_to_their_clips(shards: Path) -> None:
    config: Config = load_config(
        CONFIG, ['data.log_mel={"mean": -4.0, "std": 3.0}', "data.device=cpu", "data.crop=start"]
    )
    dataset = ClipDataset(f"{shards}:test", labelled=True)
    stream = evaluation_batches(dataset, config.data, batch=5, rank=0, world_size=1)
    num_clips = 0
    with closing(stream.compose(make_patches(config, torch.device("cpu"), 5)).iterator()) as batches:
        for patches_BNP, batch in batches:
            for patches_NP, clip in zip(patches_BNP, batch.clips, strict=True):
                # patch (t, f), pixel (frame, bin): the first pixels of all patches are every 16th value
                corner = (log_mel(clip.samples)[:256:16, ::16] + 4.0) / 6.0
                # the promise is 2e-3 in log-mel; the pipeline cuts a clip before it subtracts the clip's mean
                np.testing.assert_allclose(patches_NP[:, 0].reshape(16, 8), corner, rtol=0, atol=2e-3 / 6)
                num_clips += 1
    assert num_clips == len(dataset)


def test_statistics_of_several_splits_are_pooled(shards: Path) -> None:
    parts = [ClipDataset(f"{shards}:{name}", labelled=False) for name in ("train", "test")]
    values = [log_mel(c.samples) for p in parts for c in read_clips(p, [Draw(0, n) for n in range(len(p))])]
    pooled = ClipDataset([f"{shards}:train", f"{shards}:test"], labelled=False).log_mel
    together = np.concatenate(values).astype(np.float64)
    assert (pooled.mean, pooled.std) == pytest.approx((together.mean(), together.std()), abs=1e-6)


def test_a_flipped_byte_names_the_shard_and_the_key(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    dataset = ClipDataset(f"{copy}:train", labelled=True)
    shard, number = dataset.locate(30)
    damaged = bytearray(shard.path.read_bytes())
    damaged[shard.index.offsets[number] + 1000] ^= 4
    shard.path.write_bytes(damaged)
    read_clips(dataset, [Draw(0, 29), Draw(0, 31)])
    config = load_config(CONFIG, ['data.log_mel={"mean": 0, "std": 1}', "data.device=cpu"])
    stream = evaluation_batches(dataset, config.data, batch=4, rank=0, world_size=1)
    with (
        pytest.raises(UserError, match=f"{shard.entry.name} is damaged at key {shard.index.keys[number]}"),
        closing(stream.compose(make_patches(config, torch.device("cpu"), 4)).iterator()) as batches,
    ):
        for _ in batches:
            pass


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("no-colon", "write FOLDER:SPLIT"),
        ("https://host/path", "write FOLDER:SPLIT"),
        ("http://user:secret@host:8080/path", "the data 'http://host:8080/path'; write FOLDER:SPLIT"),
        (":train", "write FOLDER:SPLIT"),
        ("nowhere:train", "nowhere holds no dataset.json"),
        ("{shards}:validation", "has no split 'validation'; it has test, train"),
    ],
)
def test_wrong_data_is_one_sentence(shards: Path, spec: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        ClipDataset(spec.format(shards=shards), labelled=True)
    assert sentence in str(caught.value)


def test_different_vocabularies_are_refused_where_labels_are_used(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards.parent / "audio" / "bell", tmp_path / "audio" / "bell")
    tool = CONFIG.parent.parent / "tools" / "make_shards.py"
    command = [sys.executable, tool, "--source", "folder", "--input", tmp_path / "audio", "--out", tmp_path / "other"]
    subprocess.run(command, check=True, capture_output=True)
    both = [f"{shards}:train", f"{tmp_path / 'other'}:train"]
    assert len(ClipDataset(both, labelled=False)) == 56
    with pytest.raises(UserError, match="different vocabularies"):
        ClipDataset(both, labelled=True)


def test_a_stage_of_ones_own_is_composed_behind_the_others(shards: Path) -> None:
    def first_keys(batches: Iterator[Batch]) -> Iterator[str]:
        for batch in batches:
            yield batch.clips[0].key

    dataset = ClipDataset(f"{shards}:test", labelled=True)
    batches = evaluation_batches(dataset, data_config(), batch=5, rank=0, world_size=1)
    assert list(batches.compose(first_keys)) == [batch.clips[0].key for batch in batches]


def test_closing_the_stream_ends_its_threads_at_once(shards: Path) -> None:
    config = load_config(CONFIG, ['data.log_mel={"mean": 0, "std": 1}', "data.device=cpu"])
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    batches = training_batches(
        dataset, config.data, seed=1, first_step=0, batch=4, micro_batch=4, rank=0, world_size=1, masks=None
    )

    before = set(threading.enumerate())

    def our_threads() -> int:
        return sum(thread.name.startswith("asda-") for thread in set(threading.enumerate()) - before)

    with closing(batches.compose(make_patches(config, torch.device("cpu"), 4, training=True)).iterator()) as stream:
        next(stream)
        assert our_threads() == 2 * config.data.threads  # they read, or make the log-mel
    assert our_threads() == 0
