"""dataset.json as a whole: its hash, its weights, and its older version."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asda.data.shards.index import (
    DatasetIndex,
    Duplicates,
    LogMelMoments,
    ShardEntry,
    SplitIndex,
    parse_dataset,
    tagged_hash,
)
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
