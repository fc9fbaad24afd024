"""Programs as clusters, containers and old terminals start them: other locales, streams, users, disks and folders."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_table import Count
from forked_ranks import RankServer
from launching import ROOT, environment, pretraining
from tiny_runs import EVERY, TinyRun, assert_same_runs, wait_until

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import checkpoints_of, newest_checkpoint, read_state, step_folder
from asda.data.shards.read import load_dataset
from asda.errors import STOPPED_EXIT, USER_ERROR_EXIT
from asda.system import SHARED_MEMORY

pytestmark = pytest.mark.launch

NO_NAMESPACE = bool(subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode)
ISOLATED = pytest.mark.skipif(NO_NAMESPACE, reason="this system lets nobody mount a file system of their own")

# As docker run --user 12345 --read-only: no home, no entry in passwd, nothing but one folder can be written. The Python
# of a developer may lie in /root, which only root may enter.
CONTAINER = """
python=$(readlink -f "$2") && top=/$(echo "$python" | cut -d/ -f2,3)
mount --make-rprivate / && mkdir -p "$1" && mount --bind "$1" "$1"
case $top in /root/*) aside=$(mktemp -d) && mount --bind "$top" "$aside" && mount -t tmpfs -o mode=755 none /root &&
    mkdir -p "$top" && mount --move "$aside" "$top";; esac
mount -o remount,ro,bind / && shift
exec setpriv --reuid 12345 --regid 12345 --clear-groups env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME "$@"
"""


def run(argv: list[str], shell: str = '"$@"', **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command through a shell that may change what it finds around itself."""
    argv = ["bash", "-c", shell, "bash", *argv]
    env = environment() | variables
    return subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, errors="replace", env=env, timeout=240, check=False
    )


def trainer(*arguments: str) -> list[str]:
    return [sys.executable, "asda/train.py", *arguments]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a locale whose text is latin-1."""
    folder = tmp_path_factory.mktemp("locales")
    argv = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    if shutil.which("localedef"):
        subprocess.run(argv, capture_output=True, check=False)
    if not (folder / "en_US.ISO-8859-1").exists():
        pytest.skip("localedef makes no latin-1 locale here")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_run_whose_notes_have_an_accent_resumes_in_any_locale(
    latin_1: dict[str, str], shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    config = tmp_path / "José.json"
    notes = {"_about": {"who": "José, 音"}} | json.loads((ROOT / "configs" / "demo_pretrain.json").read_text("utf-8"))
    config.write_text(json.dumps(notes, ensure_ascii=False), "utf-8")
    folder = tmp_path / "rún"
    _, _, *more = pretraining(shards, folder, "run.save_every=2")
    for locale in (latin_1, ASCII):
        done = run(trainer("--config", str(config), *more, "optimizer.steps=4"), **locale)
        assert done.returncode == 0, done.stderr
        assert [read_state(checkpoint)[1].step for checkpoint in checkpoints_of(folder)] == [2, 4]
        shutil.rmtree(step_folder(folder, 4))  # so that the next one resumes from step 2
    assert "resum" in done.stdout
    count_fault("34", "an accent in notes and paths: latin-1 and ASCII locales", 2, 2, recovered=2)


def test_shards_of_sounds_whose_names_have_accents_are_made_in_any_locale(
    shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    sounds = sorted((shards.parent / "audio").rglob("*.wav"))[:3]
    (tmp_path / "in" / "José").mkdir(parents=True)
    for number, path in enumerate(sounds):
        shutil.copy(path, tmp_path / "in" / "José" / f"音{number}.wav")
    made = []
    for name, locale in (("ascii", ASCII), ("utf-8", {"LC_ALL": "C.UTF-8"})):
        more = ["--source", "folder", "--input", str(tmp_path / "in"), "--out", str(tmp_path / name)]
        done = run([sys.executable, "tools/make_shards.py", *more], **locale)
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".txt"})
    assert made[0].keys() == made[1].keys()
    assert [n for n in made[0] if made[0][n] != made[1][n]] in ([], ["dataset.json"])
    count_fault("34", "names of sounds and classes in an ASCII locale", 1, 1)


@ISOLATED
@pytest.mark.parametrize("disk", ["size=1m", "nr_inodes=8"])
def test_a_run_that_cannot_save_its_end_says_so(disk: str, shards: Path, tmp_path: Path, count_fault: Count) -> None:
    (tmp_path / "small").mkdir()
    small = tmp_path / "small"
    shell = f'mount -t tmpfs -o {disk} none {small} && "$@"; code=$?; ls {small}/run/checkpoints; exit $code'
    more = ["run.on_failed_save=continue", "optimizer.steps=3", "run.save_every=1", "model.width=64"]
    program = trainer(*pretraining(shards, small / "run", *more))
    done = run(["unshare", "-m", "bash", "-c", shell, "bash", *program])
    assert done.returncode == USER_ERROR_EXIT, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "step-" not in done.stdout.splitlines()[-1]
    last = done.stderr.rstrip().splitlines()[-1]
    assert "it begins anew, because there is no checkpoint yet" in last
    assert ("it has room for no more files" in last) == disk.startswith("nr_inodes")
    count_fault("35", "run.on_failed_save continue, a disk without room for bytes or files", 1, 1)


def test_a_stop_that_cannot_be_saved_is_not_called_saved(
    ranks: RankServer, shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    stopped = TinyRun(
        ranks, shards, tmp_path / "run", 4000, more=("run.on_failed_save=continue", "run.save_every=1000")
    )
    [rank] = stopped.start()
    wait_until(lambda: len(stopped.figures()) > 2, [rank])
    resource_limit(rank.pid, 1 << 16)  # the log is shorter
    rank.kill(signal.SIGTERM)
    assert rank.wait(30) == USER_ERROR_EXIT, rank.text()
    assert "saved" not in rank.text().splitlines()[-1]
    assert "File too large" in rank.text().splitlines()[-1]
    count_fault("35", "run.on_failed_save continue, a stop that cannot be saved", 1, 1)


def resource_limit(pid: int, num_bytes: int) -> None:
    """Let a process write no file longer than this."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def removed(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))
    shutil.rmtree(folder.with_name("gone"))


def replaced(folder: Path) -> None:
    moved(folder)
    shutil.copytree(folder.with_name("moved"), folder)


@pytest.mark.parametrize("become", [moved, removed, replaced], ids=lambda become: become.__name__)
def test_a_run_whose_folder_is_no_longer_there_ends_and_touches_no_other(
    become: Callable[[Path], None], ranks: RankServer, shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    lost = TinyRun(ranks, shards, tmp_path / "run", 4000, more=("run.on_failed_save=continue",))
    [rank] = lost.start()
    wait_until(lambda: lost.newest_step() >= EVERY, [rank])
    become(lost.folder)
    there = sorted(map(str, lost.folder.rglob("step-*"))) if lost.folder.exists() else None
    assert rank.wait(60) == USER_ERROR_EXIT, rank.text()
    assert "was moved, removed or replaced while this run was training" in rank.text().splitlines()[-1]
    assert (sorted(map(str, lost.folder.rglob("step-*"))) if lost.folder.exists() else None) == there
    if become is moved:
        elsewhere = TinyRun(ranks, shards, tmp_path / "moved", 4000)
        assert elsewhere.newest_step() >= EVERY
        assert all(damage(folder) is None for folder in checkpoints_of(elsewhere.folder))
    count_fault("36", "the folder of a running run is moved, removed, replaced", 1, 1)


@pytest.mark.parametrize("streams", [">&- 2>&-", ">/dev/full 2> >(true)"])
def test_training_and_shards_are_done_though_nobody_can_be_told(
    streams: str, shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    done = run(trainer(*pretraining(shards, tmp_path / "run")), f'"$@" {streams}')
    assert done.returncode == 0
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "step-0000006"
    audio = sorted((shards.parent / "audio").iterdir())[0]
    more = ["--source", "folder", "--input", str(audio), "--out", str(tmp_path / "made")]
    done = run([sys.executable, "tools/make_shards.py", *more], f'"$@" {streams}')
    assert done.returncode == 0
    assert load_dataset(tmp_path / "made").splits
    count_fault("40", "stdout and stderr closed, full, or read by nobody", 2, 2)


def test_a_closed_terminal_is_a_stop_like_any_other(
    ranks: RankServer, shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    whole, hung = (TinyRun(ranks, shards, tmp_path / name, 20) for name in ("whole", "hung"))
    whole.finish()
    [rank] = hung.start()
    wait_until(lambda: len(hung.figures()) > 2, [rank])
    rank.kill(signal.SIGHUP)
    assert rank.wait(30) == STOPPED_EXIT, rank.text()
    assert hung.newest_step() == max(hung.figures())
    hung.finish(1)
    assert_same_runs(hung, whole)
    count_fault("44", "SIGHUP to a run", 1, 1, recovered=1)


@ISOLATED
def test_a_container_without_home_user_or_room_trains_and_shards(
    shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(shards, work / "shards")
    shutil.copytree(shards.parent / "audio", work / "audio")
    for path in (work, *work.rglob("*")):
        os.chown(path, 12345, 12345)
    for folder in tmp_path.parents[:-1]:
        folder.chmod(0o755)
    tmp_path.chmod(0o755)

    def isolated(*argv: str) -> subprocess.CompletedProcess[str]:
        return run(["unshare", "-m", "bash", "-c", CONTAINER, "bash", str(work), *argv])

    done = isolated(*trainer(*pretraining(work / "shards", work / "run")))
    assert done.returncode == 0, done.stdout + done.stderr
    newest = newest_checkpoint(work / "run")
    assert newest is not None
    assert newest.name == "step-0000006"
    more = ["--source", "folder", "--input", str(work / "audio"), "--out", str(work / "made")]
    done = isolated(sys.executable, "tools/make_shards.py", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_dataset(work / "made").splits
    count_fault("41", "a user without an entry or a home, on a read-only disk", 2, 2)


@ISOLATED
def test_a_shared_memory_of_64_kb_trains_and_is_named_by_what_needs_more(
    shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    isolated = ["unshare", "-m", "bash", "-c", f'mount -t tmpfs -o size=64k none {SHARED_MEMORY} && "$@"', "bash"]
    done = run([*isolated, *trainer(*pretraining(shards, tmp_path / "run", "optimizer.steps=2"))])
    assert done.returncode == 0, done.stderr
    more = ["--source", "folder", "--input", str(shards.parent / "audio"), "--out", str(tmp_path / "made")]
    done = run([*isolated, sys.executable, "tools/make_shards.py", *more])
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or SHARED_MEMORY in done.stderr.splitlines()[-1]
    count_fault("42", "a shared memory of 64 KB", 2, 2)
