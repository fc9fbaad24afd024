"""Rows 22 and 23: a signal to whomever ends a run in the same step on all ranks, saved; a lost rank ends the others.

What is launched by deepspeed or torchrun gets its signals through them, with their own ideas of what to send on.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fault_table import Count
from forked_ranks import Rank, RankServer
from launching import BIN, ROOT, command, environment
from tiny_runs import EVERY, TinyRun, assert_same_runs, wait_until

from asda.errors import LOST_PEER_EXIT, STOPPED_EXIT
from asda.run.signals import REPEAT_S, StopSignals, launchers_above, program_of

STEPS = 40
HEARTBEAT_S = 6.0  # by engine.timeout_s, which shortens it
SENDERS = {"one rank": [1], "all ranks": [0, 1]}

RANK = """
import ctypes, sys, threading
from asda.engine.processes import join_processes
from asda.errors import Stopped, UserError, exit_with_sentence
from asda.run.heartbeat import Heartbeat
from asda.run.signals import StopSignals, agree

def stuck_in_c():
    mutex = ctypes.create_string_buffer(64)  # all zeros: PTHREAD_MUTEX_INITIALIZER
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # for ever, whatever signals come

def main():
    processes, task = join_processes(), sys.argv[1]
    with StopSignals() as stop, Heartbeat(processes, 3.0):
        print("ready", flush=True)
        if task == "stuck":
            stuck_in_c()
        while task == "until asked" and not agree(processes, stop=bool(stop.asked), other=False)["stop"]:
            pass
        if task == "until asked":
            raise Stopped("stopped in good order")
        if task == "rank 1 fails" and processes.rank:
            raise UserError("this rank has reasons")
        if task == "rank 1 fails":
            stuck_in_c()
        if task == "rank 0 ends first" and processes.rank:
            threading.Event().wait(2)

exit_with_sentence(main)
"""


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankServer, shards: Path) -> TinyRun:
    """On two ranks."""
    more = (f"engine.timeout_s={HEARTBEAT_S}",)
    run = TinyRun(ranks, shards, shards.parent / "never-stopped", STEPS, 2, more)
    run.finish()
    return run


def pair(ranks: RankServer, folder: Path, task: str, world_size: int = 2) -> list[Rank]:
    from asda.engine.processes import free_port

    (script := folder / "rank.py").write_text(RANK)
    port = free_port()
    started = [
        ranks.start(rank, world_size, port, folder / f"{rank}.log", str(script), task)
        for rank in range(max(1, world_size))
    ]
    wait_until(lambda: all("ready" in rank.text() for rank in started), started)
    return started


@pytest.mark.parametrize(
    ("command_line", "program"),
    [
        ("/v/bin/python3.11 /v/bin/deepspeed --num_gpus 2 asda/train.py", "deepspeed"),
        ("/v/bin/python -u -m deepspeed.launcher.launch --world_info=x asda/train.py", "deepspeed.launcher.launch"),
        ("/v/bin/python /v/bin/torchrun --nproc_per_node 2 asda/train.py", "torchrun"),
        ("/v/bin/python -m torch.distributed.run asda/train.py", "torch.distributed.run"),
        ("/v/bin/python -u asda/train.py --config torchrun", "train.py"),
        ("bash -c deepspeed asda/train.py", ""),
        ("/usr/bin/nohup /v/bin/torchrun", ""),
        ("python", ""),
    ],
)
def test_a_launcher_is_known_by_what_python_was_told_to_run(command_line: str, program: str) -> None:
    assert program_of(command_line.split()) == program


def test_neither_shells_nor_services_are_launchers() -> None:
    assert launchers_above(psutil.Process()) == []


def test_the_second_signal_ends_a_process_whose_main_thread_waits_for_ever(ranks: RankServer, tmp_path: Path) -> None:
    (rank,) = pair(ranks, tmp_path, "stuck", world_size=0)
    rank.kill(signal.SIGTERM)
    rank.kill(signal.SIGINT)  # as launchers repeat what the group has got; of two that wait the system gives it first
    time.sleep(REPEAT_S + 0.5)
    assert rank.runs
    rank.kill(signal.SIGUSR1)
    assert rank.wait(2) == 128 + signal.SIGUSR1
    assert len(re.findall(r"SIG(?:TERM|INT): the run finishes this step, saves", rank.text())) == 1
    assert "SIGUSR1 again: stopping at once" in rank.text()


@pytest.mark.parametrize("stderr", ["full", "read by nobody"])
def test_the_second_signal_and_the_watchdog_need_no_stderr(stderr: str, tmp_path: Path, count_fault: Count) -> None:
    from asda.engine.processes import free_port

    (script := tmp_path / "rank.py").write_text(RANK)
    where = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    where |= {"MASTER_PORT": str(free_port())}
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(4096))
    log: int = writing if stderr == "read by nobody" else os.open("/dev/full", os.O_WRONLY)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), "stuck"],
            env=environment() | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=log,
        )
        for rank in range(2)
    ]
    assert all(b"ready\n" in iter(rank.stdout.readline, b"") for rank in ranks if rank.stdout)
    ranks[1].send_signal(signal.SIGTERM)
    time.sleep(REPEAT_S + 0.5)
    ranks[1].send_signal(signal.SIGTERM)
    assert ranks[1].wait(5) == 128 + signal.SIGTERM
    assert ranks[0].wait(15) == LOST_PEER_EXIT
    os.close(reading)
    os.close(writing)
    count_fault("39", "second signal and watchdog; stderr full, or read by nobody", 2, 2)


def test_a_run_under_nohup_outlives_its_terminal(count_fault: Count) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)
    count_fault("44", "SIGHUP under nohup", 1, 1)


def test_all_ranks_agree_to_stop_and_no_heartbeat_is_missed(ranks: RankServer, tmp_path: Path) -> None:
    started = pair(ranks, tmp_path, "until asked")
    time.sleep(4)  # longer than the heartbeat's patience
    started[1].kill(signal.SIGUSR1)
    assert [rank.wait(5) for rank in started] == [STOPPED_EXIT] * 2
    assert "stopped in good order" in started[0].text()
    assert "did not respond" not in started[0].text() + started[1].text()


def test_a_rank_that_ends_early_in_good_order_ends_nobody(ranks: RankServer, tmp_path: Path) -> None:
    assert [rank.wait(10) for rank in pair(ranks, tmp_path, "rank 0 ends first")] == [0, 0]


def test_a_rank_that_fails_ends_one_that_waits_for_ever(ranks: RankServer, tmp_path: Path) -> None:
    waits, fails = pair(ranks, tmp_path, "rank 1 fails")
    assert fails.wait(5) == 2
    assert waits.wait(5) == LOST_PEER_EXIT
    assert "stopped, because rank 1 on" in waits.text()
    assert "has stopped; see its message" in waits.text()


def stopped(run: TinyRun, session: int) -> int:
    """The step of a run that has just been stopped; it must be what all ranks agreed on and saved."""
    step = run.newest_step()
    assert [len(draws) for draws in run.draws(session)].count(8) == len(run.draws(session))
    assert step == max(run.figures())
    assert not list((run.folder / "checkpoints").glob(".tmp-*"))
    return step


@pytest.mark.launch
def test_any_signal_to_one_rank_or_all_saves_the_same_step_and_loses_nothing(
    uninterrupted: TinyRun, tmp_path: Path, count_fault: Count
) -> None:
    run = replace(uninterrupted, folder=tmp_path / "run")
    trials = [("SIGTERM", [1]), ("SIGINT", [0, 1]), ("SIGUSR1", [0])]
    for session, (name, hit) in enumerate(trials):
        ranks = run.start(session)
        wait_until(lambda session=session: run.steps_begun(session) >= 3, ranks)
        for rank in hit:
            os.killpg(ranks[rank].pid, signal.Signals[name])
        asked = time.monotonic()
        assert [rank.wait(15) for rank in ranks] == [STOPPED_EXIT] * 2, ranks[0].text()
        assert time.monotonic() - asked < 15
        assert all("Traceback" not in rank.text() for rank in ranks)
        assert stopped(run, session) >= 3
    run.finish(len(trials))
    assert_same_runs(run, uninterrupted)
    count_fault("22", "SIGTERM, SIGINT, SIGUSR1 to one rank and to all", 3, detected=3, recovered=3)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("blow", "victim"),
    [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)]
    + [pytest.param(*case, marks=pytest.mark.faults) for case in ((signal.SIGKILL, 0), (signal.SIGSTOP, 1))],
)
def test_a_rank_that_is_lost_ends_the_other_and_nothing_is_saved_without_it(
    blow: signal.Signals, victim: int, uninterrupted: TinyRun, tmp_path: Path, count_fault: Count
) -> None:
    run = replace(uninterrupted, folder=tmp_path / "run")
    ranks = run.start()
    wait_until(lambda: run.newest_step() >= EVERY, ranks)  # saves take their time, beside the steps
    ranks[victim].kill(blow)
    hit = time.monotonic()
    other = ranks[1 - victim]
    assert other.wait(60) == LOST_PEER_EXIT, other.text()
    # HEARTBEAT_S and three beats where the peer's sockets stay open, at once where they do not; and a busy machine.
    assert time.monotonic() - hit < 15
    assert f"\n[rank {1 - victim}] stopped, because" in "\n" + other.text()  # it may be the first line
    assert "Traceback" not in other.text()
    newest = run.newest_step()
    if blow == signal.SIGSTOP:
        ranks[victim].kill(signal.SIGKILL)
    ranks[victim].wait(10)
    assert run.newest_step() == newest
    assert newest >= EVERY
    run.finish(1)
    assert_same_runs(run, uninterrupted)
    count_fault("23", f"{blow.name} of rank {victim}", 1, detected=1, recovered=1)


def test_a_frozen_peer_does_not_hold_the_second_signal(
    uninterrupted: TinyRun, tmp_path: Path, count_fault: Count
) -> None:
    run = replace(uninterrupted, folder=tmp_path / "run", more=("engine.timeout_s=60",))
    ranks = run.start()
    wait_until(lambda: run.steps_begun(0) >= 2, ranks)
    ranks[1].kill(signal.SIGSTOP)
    time.sleep(0.5)
    ranks[0].kill(signal.SIGTERM)
    time.sleep(REPEAT_S + 0.5)
    ranks[0].kill(signal.SIGTERM)
    assert ranks[0].wait(2) == 128 + signal.SIGTERM
    ranks[1].kill(signal.SIGKILL)
    count_fault("22", "SIGTERM twice while a rank is frozen", 1, detected=1)


# What deepspeed, its launch.py and torchrun do with a signal; asda/errors.py has the table of exit codes.
def front_end(launcher: psutil.Process) -> list[int]:
    return [launcher.pid]


def launch_py(launcher: psutil.Process) -> list[int]:
    return [child.pid for child in launcher.children() if "deepspeed.launcher.launch" in child.cmdline()]


def first_rank(launcher: psutil.Process) -> list[int]:
    return [process.pid for process in launcher.children(recursive=True) if "train.py" in str(process.cmdline()[2:4])][
        -1:
    ]


def whole_group(launcher: psutil.Process) -> list[int]:
    return [process.pid for process in [launcher, *launcher.children(recursive=True)]]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("program", "blow", "targets", "exit_code"),
    [
        ("deepspeed", signal.SIGTERM, front_end, -signal.SIGTERM),
        pytest.param("deepspeed", signal.SIGTERM, launch_py, 1, marks=pytest.mark.faults),
        pytest.param("deepspeed", signal.SIGUSR1, first_rank, STOPPED_EXIT, marks=pytest.mark.faults),
        pytest.param("deepspeed", signal.SIGINT, whole_group, -signal.SIGINT, marks=pytest.mark.faults),
        pytest.param("deepspeed", signal.SIGKILL, front_end, -signal.SIGKILL, marks=pytest.mark.faults),
        pytest.param("torchrun", signal.SIGTERM, front_end, 1, marks=pytest.mark.faults),
        pytest.param("torchrun", signal.SIGUSR1, first_rank, 1, marks=pytest.mark.faults),
        pytest.param("torchrun", signal.SIGTERM, whole_group, 1, marks=pytest.mark.faults),
        pytest.param("torchrun", signal.SIGUSR1, front_end, -signal.SIGUSR1, marks=pytest.mark.faults),
    ],
)
def test_a_signal_to_a_launcher_loses_nothing(
    program: str,
    blow: signal.Signals,
    targets: Callable[[psutil.Process], list[int]],
    exit_code: int,
    uninterrupted: TinyRun,
    tmp_path: Path,
    count_fault: Count,
) -> None:
    run = replace(uninterrupted, folder=tmp_path / "run")
    script = ["asda/train.py", *run.arguments()]
    deepspeed = command(2, "train.py", *run.arguments())
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", *script]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            deepspeed if program == "deepspeed" else torchrun,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    launcher = psutil.Process(process.pid)
    metrics = run.folder / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    everybody = [launcher, *launcher.children(recursive=True)]
    asked = time.monotonic()
    for pid in targets(launcher):
        os.kill(pid, blow)
    gone, alive = psutil.wait_procs(everybody, timeout=15)
    text = (tmp_path / "log").read_text()
    assert not alive, text
    assert time.monotonic() - asked < 15
    assert gone[gone.index(launcher)].returncode == exit_code, text
    step = run.newest_step()
    assert step == max(run.figures()), text
    assert f"stopped after step {step}" in text
    run.finish(1)
    assert_same_runs(run, uninterrupted)
    hit = f"{blow.name} to {targets.__name__.replace('_', ' ')} of {program}"
    count_fault("22", hit, 1, detected=1, recovered=1)
