"""tools/make_shards.py from the outside: what it writes, what it refuses, and what it leaves behind."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from verifying import verify_shard

from asda.commands import shards as command
from asda.data.audio.waves import encode_wav
from asda.data.shards.index import DatasetIndex
from asda.data.shards.read import ShardFile, load_dataset
from asda.errors import UserError, exit_with_sentence
from asda.sharding.sources import list_source
from asda.sharding.sources.listing import SourceOptions

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"


def start(*args: object, cwd: Path | None = None) -> subprocess.Popen:
    command = [sys.executable, TOOL, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def make(*args: object, cwd: Path | None = None) -> tuple[str, str]:
    process = start(*args, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def verified(folder: Path) -> DatasetIndex:
    dataset = load_dataset(folder)
    for split in dataset.splits.values():
        for entry in split.shards:
            verify_shard(dataset, entry)
    return dataset


def contents(dataset: DatasetIndex, split: str) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Key -> (frame, label names)."""
    shards = [ShardFile(dataset.folder, entry) for entry in dataset.splits[split].shards]
    return {
        key: (shard.read_frame(number), tuple(dataset.vocabulary[label] for label in shard.index.labels[number]))
        for shard in shards
        for number, key in enumerate(shard.index.keys)
    }


def clip(path: Path, seed: int = 0, num_samples: int = 1600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, 1000, num_samples).astype(np.int16)
    path.write_bytes(encode_wav(samples))
    return path


def table(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def esc10(shared, tmp_path_factory) -> Path:
    """60 real clips of four folds, as a CSV with absolute paths."""
    source = shared / "data/env"
    with (source / "env.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "esc10"]
    chosen = random.Random(1).sample(rows, 60)
    lines = [f"{source / row['path']},{row['label']},{row['fold']},{row['seconds']}" for row in chosen]
    return table(tmp_path_factory.mktemp("esc10") / "esc10.csv", "path,label,fold,seconds", *lines)


@pytest.fixture(scope="module")
def esc10_shards(esc10) -> Path:
    out = esc10.parent / "one"
    args = ("--source", "csv", "--input", esc10.name, "--clips-per-shard", 10)  # relative: dataset.json records it
    make(*args, "--out", out, "--workers", 1, cwd=esc10.parent)
    return out


def test_real_clips_arrive_exactly_with_their_labels_in_their_folds(esc10, esc10_shards):
    dataset = verified(esc10_shards)
    with esc10.open(newline="") as file:
        rows = {Path(row["path"]).stem: row for row in csv.DictReader(file)}
    assert set(dataset.splits) == {f"fold{row['fold']}" for row in rows.values()}
    assert sum(split.clips for split in dataset.splits.values()) == 60
    assert dataset.vocabulary == tuple(sorted({row["label"] for row in rows.values()}))
    for name, split in dataset.splits.items():
        labels: Counter[str] = Counter()
        for key, (frame, names) in contents(dataset, name).items():
            row = next(row for stem, row in rows.items() if key.endswith(re.sub(r"[^A-Za-z0-9_-]", "_", stem)))
            decoded, _ = soundfile.read(row["path"], dtype="float64")
            expected = np.clip(np.round(decoded * 32768), -32768, 32767).astype("<i2").tobytes()
            assert frame[512 + 44 : 512 + 44 + len(expected)] == expected
            assert (names, f"fold{row['fold']}") == ((row["label"],), name)
            labels.update(names)
        assert split.class_counts == tuple(labels[name] for name in dataset.vocabulary)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_workers_or_the_order_of_rows(esc10, esc10_shards, tmp_path, workers):
    header, *lines = esc10.read_text().splitlines()
    random.Random(workers).shuffle(lines)
    table(tmp_path / esc10.name, header, *lines)
    out = tmp_path / "out"
    args = ("--source", "csv", "--input", esc10.name, "--clips-per-shard", 10)
    make(*args, "--out", out, "--workers", workers, cwd=tmp_path)
    assert files_of(out) == files_of(esc10_shards)


def test_a_folder_of_classes_and_its_report(tmp_path):
    for number, name in enumerate(["dog/a.wav", "dog/deep/b.wav", "cat/a.wav", "cat/.hidden.wav", "cat/notes.txt"]):
        clip(tmp_path / "in" / name, number)
    (tmp_path / "in/cat/loop").symlink_to(tmp_path / "in")
    out, err = make("--source", "folder", "--input", tmp_path / "in", "--out", tmp_path / "out")
    dataset = verified(tmp_path / "out")
    assert {key: labels for key, (_, labels) in contents(dataset, "train").items()} == {
        "dog_a": ("dog",),
        "dog_deep_b": ("dog",),
        "cat_a": ("cat",),
    }
    assert "left out: 2 files that are hidden or not audio" in out
    assert re.search(r"train +3 +0\.00 +1 ", out)
    assert "rejected: 0 clips" in out
    assert "3 of 3 clips" in err
    assert not (tmp_path / "out/rejected.csv").exists()


def test_a_flat_folder_and_no_labels_make_clips_without_labels(tmp_path):
    clip(tmp_path / "flat/a.wav")
    clip(tmp_path / "mixed/a.wav")
    clip(tmp_path / "mixed/x/b.FLAC")
    flat = list_source("folder", [tmp_path / "flat"], SourceOptions())
    mixed = list_source("folder", [tmp_path / "mixed"], SourceOptions(use_labels=False))
    assert [(row.relative, row.labels) for row in flat.rows] == [("a.wav", ())]
    assert [(row.relative, row.labels) for row in mixed.rows] == [("a.wav", ()), ("x/b.FLAC", ())]


def test_tags_where_and_labels_choose_rows_and_fix_the_ids(tmp_path):
    for number in range(3):
        clip(tmp_path / f"{number}.wav", number)
    rows = ("path,tags,source", "0.wav,b;a;b,x", "1.wav,,x", "2.wav,zebra,y")
    (tmp_path / "names.txt").write_text("c\nb\na\n")
    make(
        *("--source", "csv", "--input", table(tmp_path / "t.csv", *rows), "--out", tmp_path / "out"),
        *("--where", "source=x", "--labels", tmp_path / "names.txt"),
    )
    dataset = verified(tmp_path / "out")
    assert dataset.vocabulary == ("c", "b", "a")
    assert {key: labels for key, (_, labels) in contents(dataset, "train").items()} == {"0": ("b", "a"), "1": ()}
    assert dataset.splits["train"].class_counts == (0, 1, 1)


def test_unreadable_clips_are_listed_and_the_rest_is_written(tmp_path):
    clip(tmp_path / "good.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "page.wav").write_text("<html>")
    rows = ("path", "good.wav", "empty.wav", "page.wav", "gone.wav")
    args = ("--source", "csv", "--input", table(tmp_path / "t.csv", *rows), "--clips-per-shard", 1)
    out, err = make(*args, "--out", tmp_path / "out", "--workers", 2)
    dataset = verified(tmp_path / "out")
    assert (dataset.rejected, dataset.splits["train"].clips, len(dataset.splits["train"].shards)) == (3, 1, 1)
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected == {
        "empty.wav": "the file is empty",
        "page.wav": "libsndfile: Format not recognised",
        "gone.wav": "no such file",
    }
    assert "rejected gone.wav: no such file" in err.splitlines()
    assert "rejected: 3 clips, listed in" in out


def test_clips_of_digital_silence_are_named_once_and_listed(tmp_path):
    clip(tmp_path / "good.wav")
    for name, level in (("b.wav", 0.0), ("a.flac", 0.0), ("faint.wav", 0.4 / 32768)):  # rounded to zeros
        soundfile.write(tmp_path / name, np.full(8000, level, np.float32), 16_000, subtype="PCM_24")
    left = np.random.default_rng(0).normal(0, 0.1, 8000)
    soundfile.write(tmp_path / "cancels.wav", np.stack([left, -left], axis=1), 16_000, subtype="FLOAT")
    rows = ("path", "good.wav", "b.wav", "a.flac", "faint.wav", "cancels.wav")
    args = ("--source", "csv", "--input", table(tmp_path / "t.csv", *rows), "--workers", 1, "--out", tmp_path / "out")
    out, err = make(*args)
    lines = [line for line in out.splitlines() if "digital silence" in line]
    assert len(lines) == 1
    assert lines[0].startswith("WARNING: 3 clips are digital silence, the first is ")
    with (tmp_path / "out/silent.csv").open(newline="") as file:
        silent = list(csv.DictReader(file))
    assert {row["path"] for row in silent} == {"b.wav", "a.flac", "faint.wav"}
    assert {row["split"] for row in silent} == {"train"}
    assert "rejected cancels.wav: its channels cancel each other: their mean is silence" in err
    assert verified(tmp_path / "out").splits["train"].clips == 4
    shown = subprocess.run(
        [sys.executable, "-m", "asda", "inspect", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert lines[0] in shown.stdout.splitlines()
    for name in ("b.wav", "a.flac", "faint.wav"):
        clip(tmp_path / name, seed=ord(name[0]))
    assert "digital silence" not in make(*args, "--overwrite")[0]
    assert not (tmp_path / "out/silent.csv").exists()


def test_overwrite_replaces_a_dataset_and_only_its_files(esc10_shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(esc10_shards, out)
    (out / "notes.txt").write_text("mine")
    clip(tmp_path / "in/a.wav")
    make("--source", "folder", "--input", tmp_path / "in", "--out", out, "--overwrite")
    assert list(files_of(out)) == ["dataset.json", "notes.txt", "train-000000.json", "train-000000.tar.zst"]
    verified(out)


def test_names_do_not_depend_on_how_the_table_is_spelled(tmp_path, monkeypatch):
    clip(tmp_path / "data/in/a.wav")
    table(tmp_path / "data/t.csv", "path", str(tmp_path / "data/in/a.wav"), "in/b.wav")
    (tmp_path / "data/in/deep").mkdir()
    monkeypatch.chdir(tmp_path / "data/in")
    for spelled in (tmp_path / "data/t.csv", tmp_path / "data/in/../t.csv", Path("../t.csv"), Path("deep/../../t.csv")):
        rows = list_source("csv", [spelled], SourceOptions()).rows
        assert [row.relative for row in rows] == ["in/a.wav", "in/b.wav"]
        assert os.path.samefile(rows[0].place.path, tmp_path / "data/in/a.wav")


def test_the_audio_of_a_table_behind_a_link_is_that_of_its_real_folder(tmp_path):
    clip(tmp_path / "real/a.wav", 1)
    clip(tmp_path / "a.wav", 2)
    table(tmp_path / "real/t.csv", "path", "a.wav", str(tmp_path / "a.wav"))
    (tmp_path / "real/sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real/sub")
    places = [row.place for row in list_source("csv", [tmp_path / "link/../t.csv"], SourceOptions()).rows]
    for place, meant in zip(places, (tmp_path / "real/a.wav", tmp_path / "a.wav"), strict=True):
        assert os.path.samefile(place.path, meant)


@pytest.mark.parametrize("other", ["{0}/x/../data/in/a.wav", "{0}/data/in/a.wav"])
def test_one_file_under_two_names_is_refused(tmp_path, other):
    clip(tmp_path / "data/in/a.wav")
    for folder, first in (("data", "in/a.wav"), ("tables", "../data/in/a.wav")):
        table(tmp_path / folder / "t.csv", "path", first, other.format(tmp_path))
        (tmp_path / folder / "deep").mkdir()
        with pytest.raises(UserError, match=r"t\.csv line 3 lists .*in/a\.wav again, after .*t\.csv line 2"):
            list_source("csv", [tmp_path / folder / "deep" / ".." / "t.csv"], SourceOptions())


def test_classes_that_differ_only_in_case_or_white_space_are_said(tmp_path):
    names = ["Dog", "dog", "cat ", "Cat", "sea  waves", "sea waves", "Owl", "owl", "bee"]
    for number, name in enumerate(names):
        clip(tmp_path / "in" / name / "a.wav", number)
    out, _ = make("--source", "folder", "--input", tmp_path / "in", "--out", tmp_path / "out")
    (line,) = [line for line in out.splitlines() if line.startswith("WARNING: ")]
    assert line.startswith("WARNING: 4 pairs of class names differ only in case, space or Unicode form: 'Cat' (1 ")
    assert "'Dog' (1 clip) and 'dog' (1), 'Owl' (1 clip) and 'owl' (1) and 1 more" in line
    (tmp_path / "one/Dog").mkdir(parents=True)
    shutil.copytree(tmp_path / "in/bee", tmp_path / "one/bee")
    out, _ = make("--source", "folder", "--input", tmp_path / "one", "--out", tmp_path / "out2")
    assert "WARNING" not in out


def started_writing(esc10: Path, out: Path) -> subprocess.Popen:
    """Start a run with one worker, and wait until its second shard is there, so that the first one is finished."""
    args = ("--source", "csv", "--input", esc10.name, "--clips-per-shard", 10, "--workers", 1)
    process = start(*args, "--out", out, cwd=esc10.parent)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar.zst"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_temporary_files_and_no_dataset(esc10, tmp_path, stop):
    process = started_writing(esc10, tmp_path / "out")
    process.send_signal(stop)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert all(re.fullmatch(r"fold\d-\d{6}\.(json|tar\.zst)|\.unfinished", name) for name in left)


def test_a_killed_run_leaves_no_worker_and_its_repetition_gives_the_same_bytes(esc10, esc10_shards, tmp_path):
    out = tmp_path / "out"
    process = started_writing(esc10, out)
    process.kill()
    process.communicate(timeout=20)  # the pipes close once the last worker that inherited them has ended
    (out / "fold1-000000.tar.zst.123.tmp").write_bytes(b"left by the killed run")
    _, err = make("--source", "csv", "--input", esc10.name, "--out", out, "--clips-per-shard", 10, cwd=esc10.parent)
    assert re.search(r"resuming: \d of 8 shards are finished", err)
    assert files_of(out) == files_of(esc10_shards)


def test_a_killed_worker_ends_the_run_in_one_sentence(esc10, tmp_path):
    process = started_writing(esc10, tmp_path / "out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    *progress, sentence = err.splitlines()
    assert sentence == "error: a worker process was killed, probably because memory ran out; use fewer --workers"
    assert all("clips/s" in line for line in progress)  # told every ten seconds, on a busy machine
    assert not (tmp_path / "out/dataset.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    clip(tmp_path / "in/a.wav", num_samples=160_000)
    limited = f"ulimit -f 64; exec {sys.executable} {TOOL} --source folder --input {tmp_path}/in --out {tmp_path}/out"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write .*train-000000.tar.zst: File too large; free space .*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_help_teaches_the_splits_by_example():
    out, _ = make("--help")
    assert "--split train=1,2,3,4 --split valid=5" in out
    assert "--split train=90% --split valid=10%" in out


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Run the tool in this process in a folder with one clip and one CSV; return its one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            exit_with_sentence(lambda: command.main(["--out", "out", *args]))
        assert stopped.value.code == 2
        assert not (tmp_path / "out/dataset.json").exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("rows", "args", "words"),
    [
        (("name,label", "a.wav,x"), (), "t.csv has no column 'path'; its columns are name, label; name it by --path"),
        (("path",), (), "t.csv has no rows below its header"),
        ((), (), "t.csv has no rows below its header"),
        (("path,label", "a.wav,x", "b.wav,x,y"), (), "t.csv line 3 has 3 cells, its header has 2"),
        (("path,path", "a.wav,b.wav"), (), "names a column twice"),
        (("path,label", 'a.wav,"x'), (), "t.csv is not a UTF-8 CSV near line"),
        (("path,label", ",x"), (), "t.csv line 2: the cell 'path' is empty"),
        (("path", "a.wav", "b.wav", "./a.wav"), (), "t.csv line 4 lists a.wav again, after t.csv line 2"),
        (("path,split", "a.wav,"), (), "t.csv line 2: the cell 'split' is empty"),
        (("path,split", "a.wav,train"), ("--split", "valid"), "no clip has the split or fold 'valid'"),
        (("path", "a.wav"), ("--where", "language=ar"), "t.csv has no column 'language'"),
        (("path,x", "a.wav,1"), ("--where", "x=2"), "no row of t.csv has x=2"),
        (("path,x", "a.wav,1"), ("--where", "x"), "--where x: write COLUMN=VALUE"),
        (
            ("path,label", "a.wav,x"),
            ("--labels", "names.txt"),
            "t.csv line 2: the label 'x' is not among the 2 classes",
        ),
        (("path",), ("--labels", "names.txt", "--no-labels"), "--labels and --no-labels contradict each other"),
        (("path",), ("--labels", "gone.txt"), "--labels gone.txt: no such file"),
        (("path",), ("--labels", "empty.txt"), "--labels empty.txt is empty"),
        (("path",), ("--labels", "twice.txt"), "--labels twice.txt line 3 is empty or repeats a name ('a')"),
        (("path", "a.wav"), ("--clips-per-shard", "0"), "--clips-per-shard 0 must be at least 1"),
        (("path", "a.wav"), ("--workers", "-1"), "--workers -1 must be at least 1"),
        (("path", "a.wav"), ("--max-seconds", "nan"), "--max-seconds nan must be above 0"),
        (("path", "a.wav"), ("--max-seconds", "1e9"), "--max-seconds 1e+09 must be above 0 and at most"),
        (("path", "a.wav"), ("--out", "t.csv"), "--out t.csv is not a folder"),
        (("path", "a.wav"), ("--out", "old"), "--out old already holds a dataset; give --overwrite"),
    ],
)
def test_a_bad_table_or_option_is_refused_in_one_sentence(tmp_path, refusal, rows, args, words):
    clip(tmp_path / "a.wav")
    table(tmp_path / "t.csv", *rows)
    table(tmp_path / "names.txt", "y", "z")
    table(tmp_path / "twice.txt", "a", "b", "a")
    (tmp_path / "empty.txt").touch()
    table(tmp_path / "old/dataset.json", "{}")
    line = refusal("--source", "csv", "--input", "t.csv", *args)
    assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--input", "gone"), "--input gone is not a folder"),
        (("--input", "empty"), "empty holds no audio file among 0 files"),
        (("--input", "text"), "text holds no audio file among 1 files"),
        (("--input", "mixed"), "mixed holds audio both directly (a.wav) and in subfolders"),
        (("--input", "mixed", "--where", "a=b"), "--where needs a table's columns"),
        (("--source", "csv", "--input", "gone.csv"), "--input gone.csv is not a CSV file"),
    ],
)
def test_a_bad_folder_is_refused_in_one_sentence(tmp_path, refusal, args, words):
    (tmp_path / "empty").mkdir()
    table(tmp_path / "text/notes.txt", "nothing to hear")
    clip(tmp_path / "mixed/a.wav")
    clip(tmp_path / "mixed/x/b.wav")
    assert re.fullmatch(rf"error: [^\n]*{re.escape(words)}[^\n]*\n", refusal("--source", "folder", *args))


def test_a_table_that_is_not_utf_8_is_refused(tmp_path, refusal):
    (tmp_path / "t.csv").write_bytes(b"path\n\xff.wav\n")
    assert "is not a UTF-8 CSV" in refusal("--source", "csv", "--input", "t.csv")


def test_when_no_clip_is_readable_nothing_is_written(tmp_path, refusal):
    table(tmp_path / "in/a.wav", "no audio")
    lines = refusal("--source", "folder", "--input", "in").splitlines()
    assert lines[0] == "rejected a.wav: libsndfile: Format not recognised"
    assert lines[-1].startswith("error: split train: none of its clips could be read; the first is a.wav: libsndfile")
    assert not (tmp_path / "out").exists()


def test_a_class_without_a_clip_that_could_be_read_ends_the_run_with_one_summary(tmp_path, refusal):
    for number in range(20):
        table(tmp_path / f"in/cat/{number:02d}.wav", "no audio")
    clip(tmp_path / "in/dog/a.wav")
    lines = refusal("--source", "folder", "--input", "in").splitlines()
    assert len([line for line in lines if line.startswith("rejected cat/")]) == 10
    assert "rejected: more clips, which rejected.csv will list" in lines
    what = "error: 1 of 2 classes have no clip that could be read: cat (20 clips); the first is cat/"
    assert lines[-1].startswith(what)
    fix = "out/rejected.csv lists all; repair the files or drop these classes, and give --overwrite"
    assert lines[-1].endswith(f": libsndfile: Format not recognised; {fix}")
    assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 21


def test_a_table_of_missing_files_ends_the_run_at_once_with_one_summary(tmp_path, refusal):
    table(tmp_path / "t.csv", "path", *(f"gone/{number}.wav" for number in range(1000)))
    (line,) = refusal("--source", "csv", "--input", "t.csv").splitlines()
    assert line.startswith("error: 1000 of 1000 files do not exist, such as gone/0.wav, gone/1.wav, gone/2.wav and 997")


def test_what_is_not_used_is_said_once_and_recordings_are_cut(tmp_path):
    clip(tmp_path / "a.wav", num_samples=40_000)
    path = table(tmp_path / "t.csv", "file_name;Category;n", "a.wav;dog,tame;1")
    out, _ = make("--source", "csv", "--input", path, "--out", tmp_path / "out", "--cut", 1, "--channel", 0)
    assert out.count(f"not used: the columns n of {path}") == 1
    dataset = verified(tmp_path / "out")
    labels = {key: labels for key, (_, labels) in contents(dataset, "train").items()}
    assert labels == dict.fromkeys(("a_0-1", "a_1-2", "a_2-2_5"), ("dog,tame",))
    assert dataset.command.endswith("--cut 1 --channel 0 --out .")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--cut", "0"), "--cut 0 must be from 0.1 to --max-seconds 600"),
        (("--cut", "nan"), "--cut nan must be from 0.1"),
        (("--cut", "20", "--max-seconds", "10"), "--cut 20 must be from 0.1 to --max-seconds 10"),
        (("--channel", "-1"), "--channel -1 must be at least 0"),
        (("--label-separator", ""), "--label-separator is empty"),
        (
            ("--label-column", "x"),
            "--label-column names a column of a table; use it with --source csv or parquet or tar",
        ),
    ],
)
def test_bad_options_of_reading_are_refused_in_one_sentence(tmp_path, refusal, args, words):
    clip(tmp_path / "in/a.wav")
    assert re.fullmatch(
        rf"error: [^\n]*{re.escape(words)}[^\n]*\n", refusal("--source", "folder", "--input", "in", *args)
    )


def test_an_unknown_source_is_answered_by_argparse(refusal):
    assert "invalid choice: 'tape'" in refusal("--source", "tape", "--input", "x")
