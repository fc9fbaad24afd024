"""tools/make_shards.py writes the same bytes as when golden/ was recorded."""

import csv
import hashlib
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import frozen_runs as runs
import numpy as np
import pytest
import zstandard
from frozen_sounds import write_folder, write_table

RESAMPLED = "resampled-"  # how the names of shards begin whose bytes may differ in what floats were rounded to
MOST_LSB = 1  # a sample before rounding differs by some 1e-6 of full scale between processors, 0.03 steps of int16
# Means of fp32 log-mels, each wrong by some 1e-6 where sums are taken in another order; the mean is not wrong by more.
LOG_MEL_TOLERANCE = 1e-5
WAV_HEADER_BYTES = 44


def test_a_folder_of_classes_becomes_the_same_shards_to_the_byte(tmp_path: Path) -> None:
    write_folder(tmp_path / "sounds")
    check_dataset(runs.make_shards("tones", tmp_path), "tones")


def test_a_table_with_several_labels_becomes_the_same_shards_to_the_byte(tmp_path: Path) -> None:
    write_table(tmp_path / "table")
    made = runs.make_shards("mixed", tmp_path)
    check_dataset(made, "mixed")
    check_resampled(made, runs.GOLDEN / "mixed")
    # rejected.csv and duplicates.csv are among the files of equal bytes; this says that they hold what they should.
    assert [row["path"] for row in table(made / "rejected.csv")] == ["clips/short.wav"]
    assert [(row["kind"], row["other_key"]) for row in table(made / "duplicates.csv")] == [
        ("exact", "clips_copy"), ("near", "clips_half"),
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", runs.SHARDING)
def test_stored_shards_verify(dataset: str) -> None:
    command = [sys.executable, runs.ROOT / "tools" / "make_shards.py", "--verify", "--out", dataset, "--workers=1"]
    assert "are right, to the last bit" in runs.succeed(command, runs.GOLDEN)


def check_dataset(made: Path, dataset: str) -> None:
    """Compare all files: bytes by their sha256, dataset.json field by field."""
    expected = runs.golden("shards_sha256")[dataset]
    names = sorted(path.name for path in made.iterdir() if path.name != "dataset.json")
    assert names == sorted(expected)
    for name in names:
        if not name.startswith(RESAMPLED):
            assert hashlib.sha256((made / name).read_bytes()).hexdigest() == expected[name], name
    ours, golden = (json.loads((folder / "dataset.json").read_text()) for folder in (made, runs.GOLDEN / dataset))
    assert hash_is_well_formed(ours.pop("hash"))
    assert hash_is_well_formed(golden.pop("hash"))  # of this very file, and so of floats; reading checks it
    assert arguments(ours.pop("command")) == arguments(golden.pop("command"))
    assert without_resampled_files(ours) == approximately(without_resampled_files(golden))


def check_resampled(made: Path, golden: Path) -> None:
    """Compare the clip of another rate: its JSON exactly, its samples up to a rounding."""
    ours, theirs = (members(folder / f"{RESAMPLED}000000.tar.zst") for folder in (made, golden))
    assert list(ours) == list(theirs)
    for name, content in ours.items():
        if name.endswith(".json"):
            assert content == theirs[name]
            continue
        assert content[:WAV_HEADER_BYTES] == theirs[name][:WAV_HEADER_BYTES]
        samples, expected = (np.frombuffer(wav[WAV_HEADER_BYTES:], "<i2") for wav in (content, theirs[name]))
        assert np.abs(samples.astype(int) - expected).max() <= MOST_LSB


def hash_is_well_formed(text: str) -> bool:
    """Whether this is the name of the hash and 32 hex digits."""
    name, _, digits = text.partition(":")
    return name == "xxh3_128" and len(digits) == 32


def arguments(command: str) -> str:
    """Return a command without the name of the program, which may change."""
    return command[command.index(" --") :]


def without_resampled_files(dataset: dict[str, Any]) -> dict[str, Any]:
    """Leave out what depends on the bytes of the resampled shard: sizes and hashes."""
    for shard in (shard for split in dataset["splits"].values() for shard in split["shards"]):
        if shard["name"].startswith(RESAMPLED):
            for key in ("bytes", "hash", "index_bytes", "index_hash"):
                shard.pop(key)
    return dataset


def approximately(tree: Any) -> Any:
    """Give the log-mel figures in a tree their tolerance; all else stays exact."""
    if isinstance(tree, dict):
        return {
            key: pytest.approx(value, rel=LOG_MEL_TOLERANCE) if key in ("mean", "std") else approximately(value)
            for key, value in tree.items()
        }
    return [approximately(value) for value in tree] if isinstance(tree, list) else tree


def members(shard: Path) -> dict[str, bytes]:
    """Return the content of every member of a shard, in order."""
    with shard.open("rb") as file:
        plain = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
