"""dataset.json as a whole: its hash, its weights, and its older version."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asda.config.data import DataConfig
from asda.data.clips import ClipDataset
from asda.data.order import ClipOrder
from asda.data.shards.index import (
    DatasetIndex,
    Duplicates,
    LogMelMoments,
    ShardEntry,
    SplitIndex,
    column,
    hash_dataset_file,
    parse_dataset,
    tagged_hash,
)
from asda.data.shards.read import load_dataset, load_weights
from asda.errors import UserError
from asda.sharding.writer import write_dataset

WEIGHTS = np.array([1.5, 0, 123457.0, 1e-5], np.float32)


@pytest.fixture
def dataset(tmp_path) -> DatasetIndex:
    entry = ShardEntry("train-000000.tar.zst", 4, 10, tagged_hash(b"shard"), 5, tagged_hash(b"index"))
    split = SplitIndex(4, 2.0, (3, 0), LogMelMoments(-1.0, 2.0, 8), (entry,), (1000 / 3.01, 1e5), WEIGHTS)
    index = DatasetIndex(2, 16_000, ("a", "b"), {"train": split}, 0, tmp_path, Duplicates(1, 0, 2, 1), "python x.py")
    return write_dataset(index)


def read(folder: Path) -> DatasetIndex:
    return parse_dataset((folder / "dataset.json").read_bytes(), folder / "dataset.json")


def test_what_is_written_is_read(dataset):
    found = replace(read(dataset.folder), folder=dataset.folder)
    assert found == dataset
    assert found.hash == dataset.hash
    weights = found.splits["train"].sample_weights
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, WEIGHTS)  # six digits hold these numbers


def test_the_hash_is_over_the_file_with_zeros_in_its_place(dataset):
    text = (dataset.folder / "dataset.json").read_text()
    zeroed = text.replace(dataset.hash.removeprefix("xxh3_128:"), "0" * 32)
    assert tagged_hash(zeroed.encode()) == dataset.hash == json.loads(text)["hash"]


def test_200_random_bit_flips_in_dataset_json_are_all_noticed(dataset):
    path, rng = dataset.folder / "dataset.json", random.Random(7)
    clean = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(clean)
        damaged[rng.randrange(len(clean))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|malformed|format version"):
            read(dataset.folder)


def test_version_1_has_neither_weights_nor_hash(dataset):
    path = dataset.folder / "dataset.json"
    old = json.loads(path.read_text()) | {"format_version": 1}
    for name in ("hash", "command", "duplicates"):
        del old[name]
    for name in ("class_weights", "sample_weights"):
        del old["splits"]["train"][name]
    path.write_text(json.dumps(old))
    found = read(dataset.folder)
    assert (found.command, found.duplicates, len(found.splits["train"].sample_weights)) == ("", Duplicates(), 0)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "does not weigh every clip"),
        ([1.0, -1.0, 1.0, 1.0], "a weight is negative"),
        ([1.0, 1e39, 1.0, 1.0], "a weight is negative or not finite"),
        (["1", "1", "1", "1"], "not a list of numbers"),
        ([[1.0], [1.0], [1.0], [1.0]], "not a list of numbers"),
        ({"a": 1}, "not a list of numbers"),
    ],
)
def test_weights_that_are_none_are_refused(dataset, weights, words):
    path = dataset.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["sample_weights"] = weights
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read(dataset.folder)


def test_a_newer_version_is_refused(dataset):
    path = dataset.folder / "dataset.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 4'))
    with pytest.raises(UserError, match="has format version 4, this asda reads 1 to 3; update asda"):
        read(dataset.folder)


# Large splits, whose columns lie in files of their own


@pytest.fixture
def large(dataset, tmp_path, monkeypatch) -> DatasetIndex:
    """A dataset with a split of 10 clips in 3 shards, one number of which is missing, and the small one."""
    monkeypatch.setattr("asda.sharding.writer.LARGE_SPLIT", 4)
    entries = tuple(
        ShardEntry(f"big-{n:06d}.tar.zst", clips, 10 + n, tagged_hash(b"s%d" % n), 5 + n, tagged_hash(b"i%d" % n))
        for n, clips in ((0, 5), (2, 1), (999_999, 4))
    )
    weights = np.random.default_rng(1).uniform(0, 10, 10).astype(np.float32)
    split = SplitIndex(10, 5.0, (9, 1), LogMelMoments(-1.0, 2.0, 20), entries, (1.0, 2.0), weights)
    (tmp_path / "large").mkdir()
    splits = dataset.splits | {"big": split}
    return write_dataset(replace(dataset, splits=splits, folder=tmp_path / "large"))


def opened(dataset: DatasetIndex) -> DatasetIndex:
    return load_dataset(dataset.folder, tolerant=True)


def test_a_large_split_is_read_as_it_was_written(large):
    found, written = opened(large), large.splits["big"]
    split = found.splits["big"]
    assert (found.format_version, found.splits["train"]) == (3, large.splits["train"])
    assert tuple(split.shards) == written.shards
    assert tuple(split.shards[1:]) == written.shards[1:]
    assert split.shards[-1] == written.shards[-1]
    for name in ("name", "clips", "hash"):
        assert (
            list(column(split.shards, name)) == column(written.shards, name) == [getattr(e, name) for e in split.shards]
        )
    np.testing.assert_array_equal(load_weights(found.folder, split), written.sample_weights)
    np.testing.assert_array_equal(load_weights(found.folder, found.splits["train"]), WEIGHTS)
    assert {path.name for path in large.folder.iterdir()} == {"dataset.json", "big.shards.bin", "big.weights.f32"}
    assert write_dataset(found).hash == large.hash  # again from the table


def test_a_small_split_is_written_as_before(dataset):
    assert dataset.format_version == 2
    assert not {"shards_file", "weights_file"} & {
        *json.loads((dataset.folder / "dataset.json").read_text())["splits"]["train"]
    }


def test_any_flipped_or_missing_byte_beside_a_large_split_is_noticed(large):
    split = opened(large).splits["big"]
    for name, read_it in (
        ("shards.bin", lambda: opened(large)),
        ("weights.f32", lambda: load_weights(large.folder, split)),
    ):
        path = large.folder / f"big.{name}"
        clean = path.read_bytes()
        for byte in range(0, len(clean), 7):
            path.write_bytes(clean[:byte] + bytes([clean[byte] ^ 16]) + clean[byte + 1 :])
            with pytest.raises(UserError, match=f"big.{name} is damaged: its hash is"):
                read_it()
        path.write_bytes(clean[:-4])
        with pytest.raises(UserError, match=f"big.{name} has {len(clean) - 4} bytes, not {len(clean)}"):
            read_it()
        path.unlink()
        with pytest.raises(UserError, match=f"big.{name} is missing"):
            read_it()
        path.write_bytes(clean)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("number", 1), 0, "a shard is listed twice"),
        (("clips", 1), 0, "no clip"),
        (("clips", 0), 6, "different numbers"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(large, place, value, words):
    rows = opened(large).splits["big"].shards.rows.copy()  # type: ignore[attr-defined]
    rows[place[0]][place[1]] = value
    text, path = (large.folder / "dataset.json").read_text(), large.folder / "big.shards.bin"
    text = text.replace(tagged_hash(path.read_bytes()), tagged_hash(rows.tobytes()))
    path.write_bytes(rows.tobytes())
    text = text.replace(large.hash, hash_dataset_file(text.encode()))
    (large.folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=f"dataset.json is malformed: .*{words}"):
        opened(large)


@pytest.mark.parametrize("name", ["../big.weights.f32", "big.json", "/etc/passwd", "big.weights.f32\n"])
def test_a_side_file_s_name_is_never_a_path(large, name):
    path = large.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["big"]["weights_file"]["name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"malformed at splits\.big\.weights_file\.name"):
        opened(large)


def test_balanced_draws_of_a_large_split_are_those_of_a_small_one(large, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("asda.sharding.writer.LARGE_SPLIT", 100)
    (tmp_path / "small").mkdir()
    small = write_dataset(replace(dataset, splits={"big": large.splits["big"]}, folder=tmp_path / "small"))
    order = {"mode": "balanced", "draws_per_epoch": 6}
    draws, fingerprints = [], set()
    for folder in (large.folder, small.folder):
        config = DataConfig.model_validate({"train": f"{folder}:big", "order": order})
        clips = ClipDataset(f"{folder}:big", labelled=True, tolerant=True)
        draws.append(ClipOrder(clips.ordered(config), seed=1, group_shards=2).draws(0, 60))
        fingerprints.add((clips.fingerprint, len(clips), clips.locate(5)[0].entry.name, clips.locate(5)[1]))
    assert draws[0] == draws[1]
    assert len(fingerprints) == 1
