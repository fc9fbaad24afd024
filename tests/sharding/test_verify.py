"""What --verify finds in damaged datasets and in tars that other programs made."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import forked_tool
import pytest
import zstandard

from asda.data.shards.index import WEIGHTS_SUFFIX
from asda.data.shards.read import load_dataset
from asda.sharding.journal import _owned
from asda.sharding.verify import tar_problems
from asda.sharding.writer import write_dataset


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def verify(folder: Path) -> tuple[int, str, str]:
    command = [sys.executable, forked_tool.TOOL, "--verify", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_sound_dataset_is_right(shards):
    code, shown, _ = verify(shards)
    assert code == 0
    assert shown.startswith(f"{shards}: 64 clips in 4 shards, ")
    assert shown.endswith(" MiB, are right, to the last bit\n")


def test_the_files_of_a_large_split_are_verified_and_replaced_with_it(copy, monkeypatch):
    monkeypatch.setattr("asda.sharding.writer.LARGE_SPLIT", 10)
    dataset = write_dataset(load_dataset(copy))
    assert dataset.format_version == 3
    code, shown, _ = verify(copy)
    assert (code, shown.partition(",")[0]) == (0, f"{copy}: 64 clips in 4 shards")
    assert set(_owned(copy)) == set(copy.iterdir()) - {copy / "dataset.json"}, "--overwrite removes them too"
    weights = copy / f"{next(iter(dataset.splits))}{WEIGHTS_SUFFIX}"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, shown, _ = verify(copy)
    assert code == 2
    assert f"{weights} is damaged: its hash is" in shown


def test_all_that_is_wrong_is_said_not_only_the_first(copy):
    dataset = load_dataset(copy)
    first, second, third = dataset.splits["train"].shards
    keys = []
    data = bytearray((copy / first.name).read_bytes())
    index = json.loads((copy / first.index_name).read_text())
    for number in (1, 4):
        data[index["offsets"][number] + 20] ^= 1
        keys.append(index["keys"][number])
    (copy / first.name).write_bytes(data)
    (copy / second.name).unlink()
    text = (copy / third.index_name).read_text()
    (copy / third.index_name).write_text(text.replace("0", "1", 1))
    (copy / "train-000009.tar.zst").write_bytes((copy / first.name).read_bytes())
    code, shown, err = verify(copy)
    assert code == 2
    for key in keys:
        assert f"damaged at key {key} " in shown
    assert re.search(rf"{second.name} is missing", shown)
    assert re.search(rf"shard index .*/{third.index_name} is damaged: its hash is", shown)
    assert "train-000009.tar.zst is not listed in a dataset.json" in shown
    assert err.splitlines()[-1].startswith(f"error: {copy}: 4 of 5 shards are damaged")
    assert "Traceback" not in err


def test_a_folder_of_foreign_tars_is_no_dataset(tmp_path):
    (tmp_path / "shard-0.tar").write_bytes(tar("a.wav", "a.json", "b.wav"))
    code, shown, _ = verify(tmp_path)
    assert code == 2
    assert "holds no dataset.json" in shown
    assert "key b: half a clip, it has no b.json" in shown


def tar(*names: str) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 700
            file.addfile(member, io.BytesIO(bytes(700)))
    return archive.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.wav", "a.json", "b.json", "b.flac"), []),
        (("a.wav", "b.wav", "b.json"), ["key a: half a clip, it has no a.json"]),
        (("a.json", "b.wav", "b.json"), ["key a: half a clip, it has no audio beside a.json"]),
        (("a.wav", "a.json", "b.wav", "b.json", "a.wav", "a.json"), ["key a: it comes again after other clips"]),
        (("a.wav", "b.wav", "a.json", "b.json"), ["key a: it comes again", "key b: it comes again"]),
        (("a.wav", "a.wav", "a.json"), ["key a: a.wav is there twice"]),
    ],
)
def test_half_clips_and_repeated_or_torn_keys_are_named(tmp_path, names, words, compressed):
    path = tmp_path / ("x.tar.zst" if compressed else "x.tar")
    path.write_bytes(zstandard.compress(tar(*names)) if compressed else tar(*names))
    problems = tar_problems(path)
    assert len({problem.split(": ")[0] for problem in problems}) == len(words)
    for expected in words:
        assert any(expected in problem for problem in problems)


def test_every_cut_of_a_tar_is_found(tmp_path):
    whole = tar("a.wav", "a.json")[: 2 * (512 + 1024) + 1024]  # without Python's padding to 10 KiB
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    assert tar_problems(path) == []
    for size in range(0, len(whole), 256):
        path.write_bytes(whole[:size])
        assert any("it ends without the two zero blocks" in problem for problem in tar_problems(path)), size
