"""tools/make_shards.py stopped, shared out, and interfered with: the bytes are those of one undisturbed run."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked_tool
import numpy as np
import pytest
from verifying import verify_shard

from asda.data.audio.waves import encode_wav
from asda.data.shards.read import load_dataset
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.journal import ALL_SHARDS, JOURNAL_FOLDER, RECORD_SUFFIX
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.workers import worker_pool
from asda.sharding.writer import check_space
from asda.system import FileLock

NUM_CLIPS = 40
SOURCE = ("--source", "folder", "--input", "in", "--clips-per-shard", "1", "--workers", "1")


def write_clip(path: Path, seed: int, num_samples: int = 1600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_wav(np.random.default_rng(seed).normal(0, 1000, num_samples).astype(np.int16)))


def run(folder: Path, out: str, *args: str) -> tuple[int | None, str, str]:
    log = folder / f"{out}{''.join(args).replace('/', '_')}.log"
    process = forked_tool.start(folder, log, *SOURCE, "--out", out, *args)
    process.join(120)
    return process.exitcode, log.read_text(), log.with_suffix(".err").read_text()


def succeed(folder: Path, out: str, *args: str) -> str:
    code, shown, err = run(folder, out, *args)
    assert code == 0, err
    return shown + err


def refused(folder: Path, out: str, *args: str) -> str:
    code, _, err = run(folder, out, *args)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with 40 short clips in in/, one of them no audio and two the same, and their shards in whole/."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(NUM_CLIPS):
        write_clip(folder / "in" / f"class{number % 3}" / f"{number}.wav", seed=max(number, 1))
    (folder / "in/class1/4.wav").write_text("no audio")
    succeed(folder, "whole")
    return folder


@pytest.fixture
def copy(clips, tmp_path) -> Path:
    """Another folder with the same clips, that a test may change."""
    shutil.copytree(clips / "in", tmp_path / "in")
    return tmp_path


def records(out: Path) -> set[str]:
    folder = out / JOURNAL_FOLDER
    return {name for name in os.listdir(folder) if name.endswith(RECORD_SUFFIX)} if folder.is_dir() else set()


def kill_at_random(folder: Path, out: str, rng: random.Random) -> bool:
    """Start a run and kill it with SIGKILL at a random moment; False where it had ended before."""
    process = forked_tool.start(folder, folder / f"{out}.log", *SOURCE, "--out", out)
    before, deadline = records(folder / out), time.monotonic() + 60
    if rng.random() < 0.8:  # otherwise somewhere while it starts
        while process.is_alive() and records(folder / out) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.join(20)
    return process.exitcode == -signal.SIGKILL


def test_after_20_kills_at_random_moments_the_bytes_are_those_of_an_undisturbed_run(clips, count_fault):
    rng, num_kills, num_finished = random.Random(20), 0, 0
    out = clips / "killed"
    while num_kills < 20:
        num_kills += kill_at_random(clips, out.name, rng)
        if (out / "dataset.json").exists() and not (out / JOURNAL_FOLDER).exists():
            assert files_of(out) == files_of(clips / "whole")
            shutil.rmtree(out)
            num_finished += 1
    succeed(clips, out.name)
    assert files_of(out) == files_of(clips / "whole")
    count_fault("33", "make_shards.py killed by SIGKILL, and run again: equal bytes", 20, num_kills)


def test_parts_in_any_order_and_at_the_same_time_make_the_same_bytes(clips):
    assert "this part is done; 26 of 40 shards are not finished" in succeed(clips, "parts", "--part", "3/3")
    with ThreadPoolExecutor(2) as pool:
        shown = list(pool.map(lambda part: succeed(clips, "parts", "--part", part, "--workers", "2"), ("1/3", "2/3")))
    assert sum("log-mel mean" in text for text in shown) == 1  # the one that finished last reports
    assert files_of(clips / "parts") == files_of(clips / "whole")


def test_merge_writes_nothing_before_all_parts_are_there(clips):
    line = refused(clips, "merged", "--merge")
    assert "40 of 40 shards are not finished, the first is train-000000.tar.zst" in line
    assert not (clips / "merged").exists()
    succeed(clips, "merged", "--part", "1/2")
    assert "20 of 40 shards are not finished, the first is train-000020" in refused(clips, "merged", "--merge")
    lock = FileLock((clips / "merged" / JOURNAL_FOLDER / "lock").open("ab"))
    lock.take(range(1 << 40, (1 << 40) + 2))  # as if another part were merging
    lock.release(range(1 << 40, (1 << 40) + 1))
    assert "another part writes" in succeed(clips, "merged", "--part", "2/2")
    lock.file.close()
    succeed(clips, "merged", "--merge")
    assert files_of(clips / "merged") == files_of(clips / "whole")


def test_a_run_stopped_after_dataset_json_only_cleans_up(clips):
    succeed(clips, "last", "--part", "1/2")
    left = clips / "last" / JOURNAL_FOLDER
    kept = {path.name: path.read_bytes() for path in left.iterdir()}
    succeed(clips, "last", "--part", "2/2")
    left.mkdir()
    (left / "plan.json").write_bytes(kept["plan.json"])
    assert "rejected: 1 clips" in succeed(clips, "last")
    assert files_of(clips / "last") == files_of(clips / "whole")
    assert "already holds a dataset; give --overwrite" in refused(clips, "last")


def test_two_runs_never_write_the_same_shards(clips):
    succeed(clips, "locked", "--part", "1/2")
    lock = FileLock((clips / "locked" / JOURNAL_FOLDER / "lock").open("ab"))
    lock.take(range(30, 31))  # somebody writes shard 30
    assert "another run is writing these shards of locked" in refused(clips, "locked")
    assert "another run is writing these shards of locked" in refused(clips, "locked", "--part", "4/4")
    assert "another run is writing into locked" in refused(clips, "locked", "--max-seconds", "9", "--overwrite")
    succeed(clips, "locked", "--part", "1/4")
    lock.take(ALL_SHARDS)
    lock.file.close()
    succeed(clips, "locked")
    assert files_of(clips / "locked") == files_of(clips / "whole")


def test_unfinished_work_of_another_plan_is_refused_until_overwrite_discards_it(clips):
    succeed(clips, "other", "--part", "1/2", "--max-seconds", "9")
    line = refused(clips, "other")
    assert "unfinished work of `python tools/make_shards.py --source folder --input in --clips-per-shard 1" in line
    assert "--max-seconds 9 --out .`, which has other clips, labels or options" in line
    succeed(clips, "other", "--overwrite")
    assert files_of(clips / "other") == files_of(clips / "whole")


@pytest.mark.parametrize("name", ["rejected.csv", "duplicates.csv", "train-000007.json", "train-000000.tar.zst"])
def test_a_file_of_the_user_with_a_name_that_the_shards_need_is_refused_and_left_alone(copy, name):
    (copy / "out").mkdir()
    (copy / "out" / name).write_text("mine")
    for more in ((), ("--overwrite",)):
        line = refused(copy, "out", *more)
        assert f"--out out holds {name}, which no dataset.json or unfinished work there owns" in line
        assert "move it away, or choose another folder" in line
        assert files_of(copy / "out") == {name: b"mine"}


def test_overwrite_removes_what_the_old_dataset_or_work_names_and_nothing_of_the_user(copy):
    succeed(copy, "out")
    (copy / "out/mine-000001.json").write_text("mine")
    (copy / "out/train-000077.tar.zst").write_text("mine")
    succeed(copy, "out", "--part", "1/2", "--max-seconds", "9", "--split", "other", "--overwrite")
    left = {path.name for path in (copy / "out").iterdir()} - {JOURNAL_FOLDER}
    shards = {f"other-{number:06d}{suffix}" for number in range(20) for suffix in (".json", ".tar.zst")}
    assert left - shards == {"mine-000001.json", "train-000077.tar.zst"}  # one of the 20 is no audio
    succeed(copy, "out", "--overwrite")
    succeed(copy, "whole")
    mine = {"mine-000001.json": b"mine", "train-000077.tar.zst": b"mine"}
    assert files_of(copy / "out") == files_of(copy / "whole") | mine


@pytest.mark.parametrize("moment", ["dataset.json", "train-000003.json", "rejected.csv"])
def test_an_overwrite_that_was_killed_while_it_removed_old_files_still_knows_them(copy, moment):
    succeed(copy, "out")
    (copy / "out/mine-000001.json").write_text("mine")
    removing = KILLED_WHILE_REMOVING.format(moment=moment, source=SOURCE)
    done = subprocess.run([sys.executable, "-c", removing], cwd=copy, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (copy / "out/dataset.json").exists()
    assert "unfinished work" in refused(copy, "out")
    succeed(copy, "out", "--split", "other", "--overwrite")
    succeed(copy, "whole", "--split", "other")
    assert files_of(copy / "out") == files_of(copy / "whole") | {"mine-000001.json": b"mine"}


@pytest.mark.parametrize("damage", ["", '{"plan": "of a version before", "command": "x"}'], ids=["damaged", "older"])
def test_work_whose_plan_names_no_files_is_kept_until_overwrite_discards_it(copy, damage):
    succeed(copy, "out", "--part", "1/2", "--split", "other")
    (copy / "out" / JOURNAL_FOLDER / "plan.json").write_text(damage)
    before = records(copy / "out")
    assert "unfinished work" in refused(copy, "out")
    assert records(copy / "out") == before
    succeed(copy, "out", "--overwrite")
    succeed(copy, "whole")
    assert files_of(copy / "out") == files_of(copy / "whole")


KILLED_WHILE_REMOVING = """
import os, signal, sys
from pathlib import Path
argv = [*{source}, "--out", "out", "--max-seconds", "9", "--overwrite"]
unlink = Path.unlink
def dying(path, missing_ok=False):
    unlink(path, missing_ok)
    if path.name == "{moment}":
        os.kill(os.getpid(), signal.SIGKILL)
Path.unlink = dying
from asda.commands import shards
shards.main(argv)
"""


def test_a_shard_whose_audio_or_files_have_changed_is_made_again(copy):
    succeed(copy, "out", "--part", "1/2")
    made = [json.loads(path.read_text()) for path in sorted((copy / "out").glob("train-*.json"))]
    first, second = (index["keys"][0].replace("_", "/", 1) + ".wav" for index in made[:2])
    write_clip(copy / "in" / first, seed=1000)
    (copy / "out/train-000001.tar.zst").write_bytes(b"cut")
    (copy / "out" / JOURNAL_FOLDER / f"train-000002{RECORD_SUFFIX}").write_text("damaged")
    succeed(copy, "out")
    succeed(copy, "fresh")
    assert second != first
    assert files_of(copy / "out") == files_of(copy / "fresh")


def test_a_disk_that_fills_up_in_the_middle_is_one_sentence_and_can_be_continued(copy):
    write_clip(copy / "in/class0/0.wav", seed=77, num_samples=160_000)  # 320 kB
    limited = f"ulimit -f 64; exec {sys.executable} {forked_tool.TOOL} {' '.join(SOURCE)} --out out"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60, cwd=copy)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "File too large; free space or choose another --out" in lines[0]
    assert not list((copy / "out").rglob("*.tmp"))
    for index in (copy / "out").glob("train-*.json"):
        assert index.with_suffix(".tar.zst").exists()
    succeed(copy, "out")
    succeed(copy, "fresh")
    assert files_of(copy / "out") == files_of(copy / "fresh")


def test_a_failure_ends_the_workers_before_anybody_cleans_up_behind_them():
    with worker_pool(2, 2) as workers:
        workers.pool.submit(abs, 1).result()
        asleep = [workers.pool.submit(time.sleep, 60) for _ in range(2)]
        with pytest.raises(ZeroDivisionError), workers.ended_by_failure():
            raise ZeroDivisionError
        assert not multiprocessing.active_children()
    assert all(future.cancelled() or future.exception() for future in asleep)  # cancelled: had not reached a worker yet


def test_a_signal_to_the_whole_group_leaves_no_traceback(tmp_path, count_fault):
    """A closed terminal sends SIGHUP to all processes; multiprocessing's tracker would die of it, and its heir fail."""
    code = (
        "import os, signal, sys, time\nfrom asda.sharding.workers import worker_pool\nif __name__ == '__main__':\n"
        "    signal.signal(signal.SIGHUP, signal.default_int_handler)\n    with worker_pool(2, 2) as workers:\n"
        "        workers.pool.submit(abs, 1).result()\n        os.killpg(0, signal.SIGHUP)\n        time.sleep(20)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(code)
    argv = [sys.executable, str(script)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, start_new_session=True, env=env)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "resource_tracker" not in done.stderr
    count_fault("48", "SIGHUP to all processes of a command with workers", 1, 1)


def test_a_disk_without_room_is_refused_before_anything_is_written(clips, monkeypatch, tmp_path):
    place = Place(str(clips / "in/class2/2.wav"))
    tasks = [ShardTask(tmp_path / "train-000000.tar.zst", (ClipTask("2", place, "2.wav", (), ()),) * 500, 600.0)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1_500_000))
    with worker_pool(1, 1) as workers:
        with pytest.raises(UserError, match=r"500 clips need about 1.\d MiB, and --out .* has 1.4 MiB free; free"):
            check_space(workers, tmp_path / "not/yet", tasks, 0)
        check_space(workers, tmp_path, tasks, 1_000_000)  # what --overwrite frees counts


def test_the_dataset_names_its_command_weights_and_duplicates(clips):
    dataset = load_dataset(clips / "whole")
    for entry in dataset.splits["train"].shards:
        verify_shard(dataset, entry)
    assert dataset.command == "python tools/make_shards.py --source folder --input in --clips-per-shard 1 --out ."
    assert (dataset.duplicates.exact, dataset.duplicates.exact_across_splits) == (1, 0)
    lines = (clips / "whole/duplicates.csv").read_text().splitlines()
    assert lines[0] == "kind,key,split,other_key,other_split,differing_bits"
    assert sorted(lines[1].split(",")[1:4:2]) == ["class0_0", "class1_1"]
    split = dataset.splits["train"]
    assert split.class_counts == (14, 12, 13)  # class1 has lost the one that is no audio
    np.testing.assert_allclose(split.class_weights, [1000 / 14.01, 1000 / 12.01, 1000 / 13.01])
    labels = [load_labels(clips / "whole", entry.index_name)[0][0] for entry in split.shards]
    expected = [split.class_weights[label] for label in labels]
    np.testing.assert_allclose(split.sample_weights, expected, rtol=1e-5)  # written with six digits, half a unit each


def load_labels(folder: Path, name: str) -> list[list[int]]:
    return json.loads((folder / name).read_text())["labels"]


def test_a_pair_that_crosses_splits_is_said_loudly(copy):
    table = [f"in/class0/{n}.wav,x,{split}" for n, split in ((3, "train"), (6, "train"), (9, "valid"))]
    shutil.copy(copy / "in/class0/3.wav", copy / "in/class0/9.wav")
    (copy / "t.csv").write_text("\n".join(["path,label,split", *table]) + "\n")
    command = [sys.executable, forked_tool.TOOL, "--source", "csv", "--input", "t.csv", "--out", "out"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=60)
    assert "WARNING: 1 pairs of duplicates span two splits (1 exact, 0 near)" in done.stdout
    assert load_dataset(copy / "out").duplicates.exact_across_splits == 1


def test_sigterm_keeps_what_it_finished(clips):
    process = forked_tool.start(clips, clips / "term.log", *SOURCE, "--out", "term")
    deadline = time.monotonic() + 60
    while not records(clips / "term"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    process.join(20)
    assert process.exitcode in (0, 130)
    if process.exitcode:
        assert "resuming: " in succeed(clips, "term")
    assert files_of(clips / "term") == files_of(clips / "whole")
