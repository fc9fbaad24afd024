"""The stream: every clip as it was written, in the order asked for, on any number of ranks; or an error."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asda.config import Config, DataConfig, load_config
from asda.data.fbank import log_mel, num_samples
from asda.data.order import Draw
from asda.data.stream import (
    Batch,
    ClipDataset,
    evaluation_batches,
    fetch_clips,
    training_batches,
    with_patches,
)
from asda.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "demo_finetune.json"


def data_config(**values: object) -> DataConfig:
    return DataConfig(train="unused:train", frames=256, **values)  # type: ignore[arg-type]


def batches_of(
    dataset: ClipDataset, config: DataConfig, rank: int = 0, ranks: int = 1, first: int = 0
) -> Iterator[Batch]:
    return training_batches(
        dataset, config, seed=1, first_step=first, batch=12, micro_batch=3, rank=rank, world_size=ranks, masks=None
    )


def test_clips_come_back_bit_by_bit_with_their_labels(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train+test", labelled=True)
    assert len(dataset) == 64
    for clip in fetch_clips(dataset, [Draw(0, number) for number in range(64)]):
        name, number = clip.key.split("_")
        expected, _ = soundfile.read(shards.parent / "audio" / name / f"{number}.wav", dtype="int16")
        assert np.array_equal(clip.samples, expected)
        assert [dataset.vocabulary[label] for label in clip.labels] == [name]


def test_the_order_asked_for_is_the_order_given_also_with_repeats(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    numbers = [7, 3, 3, 40, 7, 0, 0, 0, 20]
    clips = fetch_clips(dataset, [Draw(0, number) for number in numbers])
    assert [clip.key for clip in clips] == [fetch_clips(dataset, [Draw(0, number)])[0].key for number in numbers]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_threads_do_not_change_what_a_step_sees(shards: Path, ranks: int, threads: int) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    config = data_config(threads=threads, crop="random")

    def steps(ranks: int, threads: int) -> list[list[tuple[str, bytes]]]:
        config = data_config(threads=threads, crop="random")
        parts = []
        for rank in range(ranks):
            clips = [c for b in islice(batches_of(dataset, config, rank, ranks), 8 * 4 // ranks) for c in b.clips]
            parts.append([clips[i : i + 12 // ranks] for i in range(0, len(clips), 12 // ranks)])
        return [[(c.key, c.samples.tobytes()) for part in step for c in part] for step in zip(*parts, strict=True)]

    assert steps(ranks, threads) == steps(1, config.threads)


def test_a_stream_started_in_mid_epoch_continues_the_same_sequence(shards: Path) -> None:
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    whole = [clip.draw for batch in islice(batches_of(dataset, data_config()), 40) for clip in batch.clips]
    for first in (1, 4, 7):  # 48 clips, 12 a step: steps 4 and 7 lie in the second epoch
        rest = [
            c.draw for b in islice(batches_of(dataset, data_config(), first=first), 40 - 4 * first) for c in b.clips
        ]
        assert rest == whole[12 * first :]
    assert sorted(whole[:48]) == [Draw(0, n) for n in range(48)]


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
    whole = {clip.draw.clip: clip.samples for clip in fetch_clips(dataset, [Draw(0, n) for n in range(48)])}
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
    with with_patches(stream, config, 5, torch.device("cpu")) as batches:
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
    values = [log_mel(c.samples) for p in parts for c in fetch_clips(p, [Draw(0, n) for n in range(len(p))])]
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
    fetch_clips(dataset, [Draw(0, 29), Draw(0, 31)])
    config = load_config(CONFIG, ['data.log_mel={"mean": 0, "std": 1}', "data.device=cpu"])
    stream = evaluation_batches(dataset, config.data, batch=4, rank=0, world_size=1)
    with (
        pytest.raises(UserError, match=f"{shard.entry.name} is damaged at key {shard.index.keys[number]}"),
        with_patches(stream, config, 4, torch.device("cpu")) as batches,
    ):
        for _ in batches:
            pass


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("no-colon", "write FOLDER:SPLIT"),
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
