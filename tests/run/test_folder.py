"""Several machines: SLURM's names for ranks, a folder that not all of them see, a machine that is lost.

A machine is a launcher with all that it starts; where network namespaces can be made (as root) each has its own
network interface, joined by a virtual cable, and names its own address.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fault_table import Count
from launching import BIN, ROOT, environment
from tiny_runs import EVERY, TinyRun

from asda.engine.processes import free_port, slurm_ranks
from asda.errors import LOST_PEER_EXIT, STOPPED_EXIT, UserError
from asda.run import folder as hosts_module

STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[03-05,09]", "node03"),
        ("gpu[12,14]-ib,login", "gpu12-ib"),
        ("a-1,b-2", "a-1"),
    ],
)
def test_the_ranks_of_srun_meet_on_the_first_host(hosts: str, first: str) -> None:
    env = STEP | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": hosts, "SLURM_STEP_TASKS_PER_NODE": "4,2"}
    assert slurm_ranks(env) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": first,
        "MASTER_PORT": "24711",
    }


def test_what_is_set_stays_as_it_is() -> None:
    env = STEP | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29"}
    derived = slurm_ranks(env)
    assert derived["LOCAL_WORLD_SIZE"] == "4"
    assert not {"MASTER_ADDR", "MASTER_PORT"} & derived.keys()
    assert slurm_ranks(env | {"RANK": "0"}) == {}  # started by torchrun in a job


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert slurm_ranks({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == {}


def test_a_job_that_names_no_host_is_refused() -> None:
    with pytest.raises(UserError, match="neither MASTER_ADDR nor SLURM_JOB_NODELIST says where rank 0 is"):
        slurm_ranks(STEP | {"SLURM_NTASKS": "8"})


HOLDER = """
import sys
from pathlib import Path
from asda.run import folder as hosts
folder = Path(sys.argv[1])
with (folder / hosts.LOCK_FILE).open("a+") as file:
    print(repr(hosts._lock(file, folder)), flush=True)
    sys.stdin.read()
"""


@contextmanager
def place_held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock in a folder, and is killed at the end of the block."""
    argv = [sys.executable, "-c", HOLDER, str(folder)]
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths)
    assert holder.stdout
    assert holder.stdout.readline().strip() == "''"
    yield holder
    holder.kill()
    holder.communicate()


def test_a_run_folder_is_one_run_s_alone_until_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with place_held(tmp_path) as holder, (tmp_path / hosts_module.LOCK_FILE).open("a+") as file:
        monkeypatch.setattr(hosts_module, "LOCK_PATIENCE_S", 0.3)
        complaint = hosts_module._lock(file, tmp_path)
        assert complaint.startswith(f"{tmp_path} is being written to by process {holder.pid} on ")
    monkeypatch.setattr(hosts_module, "LOCK_PATIENCE_S", 20.0)
    with (tmp_path / hosts_module.LOCK_FILE).open("a+") as file:
        assert not hosts_module._lock(file, tmp_path)
    assert f"process {os.getpid()} on " in (tmp_path / hosts_module.LOCK_FILE).read_text()


def test_two_run_folders_that_lead_to_one_place_are_one_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_fault: Count
) -> None:
    (place := tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "checkpoints").symlink_to(place)
    monkeypatch.setattr(hosts_module, "LOCK_PATIENCE_S", 0.3)
    monkeypatch.setattr(hosts_module.dist, "broadcast_object_list", lambda values: None)
    with place_held(place) as holder, pytest.raises(UserError, match=f"is being written to by process {holder.pid} on"):
        hosts_module.claim_folder(tmp_path / "two", 0, make=True)
    claim = hosts_module.claim_folder(tmp_path / "two", 0, make=True)
    assert claim is not None
    claim.check()
    count_fault("37", "two run folders whose checkpoints are one folder", 1, 1)


def run_of(shards: Path, folder: Path, *more: str) -> TinyRun:
    # Without the decoder's noise, which is drawn for each rank, another number of ranks does the same sums.
    quiet = ("objective.decoder.noise_std=0", "engine.timeout_s=12")
    return TinyRun(None, shards, folder, 3 * EVERY, more=(*quiet, *more))  # type: ignore[arg-type]


@dataclass
class Host:
    """A machine of two, joined by a cable; or this machine, where namespaces cannot be made."""

    prefix: list[str]
    address: str
    interface: str

    def start(self, log: Path, argv: list[str], **variables: str) -> subprocess.Popen:
        env = environment() | {"GLOO_SOCKET_IFNAME": self.interface, "TP_SOCKET_IFNAME": self.interface} | variables
        with log.open("w") as file:
            return subprocess.Popen(
                [*self.prefix, *argv], env=env, cwd=ROOT, start_new_session=True, stdout=file, stderr=file
            )


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    names = [f"asda{os.getpid()}{letter}" for letter in "ab"]
    cables = [f"v{os.getpid()}{letter}" for letter in "ab"]
    can = os.geteuid() == 0 and all(_ip("netns", "add", name) for name in names)
    can = can and _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    if not can:
        yield [Host([], "127.0.0.1", "lo")] * 2
        return
    try:
        made = []
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            assert _ip("link", "set", cable, "netns", name)
            assert _ip("-n", name, "addr", "add", f"10.199.0.{number}/24", "dev", cable)
            assert _ip("-n", name, "link", "set", cable, "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
            made.append(Host(["ip", "netns", "exec", name], f"10.199.0.{number}", cable))
        yield made
    finally:
        for name in names:
            _ip("netns", "del", name)


def torchrun(hosts: list[Host], number: int, port: int, run: TinyRun) -> list[str]:
    where = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"]
    meeting = ["--master_addr", hosts[0].address, "--master_port", str(port)]
    return [str(BIN / "torchrun"), *where, *meeting, "asda/train.py", *run.arguments()]


def wait_for_steps(run: TinyRun, steps: int, launchers: list[subprocess.Popen], log: Path) -> None:
    deadline = time.monotonic() + 120
    while len(run.figures()) < steps:
        assert all(launcher.poll() is None for launcher in launchers), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.launch
def test_a_run_on_two_hosts_loses_one_and_goes_on_with_the_other(
    hosts: list[Host], shards: Path, tmp_path: Path, count_fault: Count
) -> None:
    run, port = run_of(shards, tmp_path / "run", "optimizer.steps=400"), free_port()
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    launchers = [host.start(logs[n], torchrun(hosts, n, port, run)) for n, host in enumerate(hosts)]
    wait_for_steps(run, EVERY + 2, launchers, logs[0])
    machine = psutil.Process(launchers[1].pid)
    for process in [*machine.children(recursive=True), machine]:
        process.kill()
    lost = time.monotonic()
    assert launchers[0].wait(60) == 1, logs[0].read_text()  # torchrun's own word for any failure
    assert time.monotonic() - lost < 60
    assert f"exitcode  : {LOST_PEER_EXIT}" in logs[0].read_text()
    trained, newest = run.figures(), run.newest_step()
    assert len(trained) - newest <= 2 * EVERY
    left = hosts[0].start(logs[0], [sys.executable, "asda/train.py", *run.arguments(), "optimizer.steps=400"])
    wait_for_steps(run, newest + EVERY, [left], logs[0])
    left.terminate()
    assert left.wait(30) == STOPPED_EXIT
    assert "ranks 2 -> 1" in logs[0].read_text()
    for step, figures in run.figures().items():  # the same clips, summed in another order: a few units of fp32
        assert figures["loss"] == pytest.approx(trained.get(step, figures)["loss"], rel=1e-4)
    count_fault("24", "one of two hosts is lost, the run goes on with the other", 1, detected=1, recovered=1)


@pytest.mark.launch
def test_srun_started_ranks_find_each_other(hosts: list[Host], shards: Path, tmp_path: Path) -> None:
    run = run_of(shards, tmp_path / "run")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    job |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": hosts[0].address}
    argv = [sys.executable, "asda/train.py", *run.arguments()]
    tasks = [
        host.start(tmp_path / f"{n}.log", argv, **job, SLURM_PROCID=str(n), SLURM_NODEID=str(n))
        for n, host in enumerate(hosts)
    ]
    assert [task.wait(120) for task in tasks] == [0, 0], (tmp_path / "0.log").read_text()
    assert len(run.figures()) == 3 * EVERY


@pytest.mark.launch
def test_a_run_folder_that_a_host_does_not_see_is_refused(hosts: list[Host], shards: Path, tmp_path: Path) -> None:
    # Relative folders of hosts with different homes: each sees its own.
    port, env = free_port(), {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    tasks = []
    for n, host in enumerate(hosts):
        home = tmp_path / f"home{n}"
        home.mkdir()
        argv = [sys.executable, str(ROOT / "asda" / "train.py"), *run_of(shards, Path("runs/x")).arguments()]
        meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(port), "RANK": str(n)}
        inside = [sys.executable, "-c", f"import os,sys; os.chdir({str(home)!r}); os.execv(sys.argv[1], sys.argv[1:])"]
        tasks.append(host.start(tmp_path / f"{n}.log", [*inside, *argv], **env, **meeting))
    assert [task.wait(120) for task in tasks] == [2, 2], (tmp_path / "0.log").read_text()
    for n in range(2):
        assert "run.folder runs/x is not one folder for all ranks" in (tmp_path / f"{n}.log").read_text()
        assert list((tmp_path / f"home{n}").iterdir()) == []


PDSH = """#!/bin/sh
# In place of pdsh over ssh: runs the command on all hosts, with the host's number for %n, and waits.
shift 5
on_host() {{ echo "$command" | sed "s/%n/$1/g"; }}
command="$*"
GLOO_SOCKET_IFNAME={interfaces[0]} {prefixes[0]} sh -c "$(on_host 0)" & first=$!
GLOO_SOCKET_IFNAME={interfaces[1]} {prefixes[1]} sh -c "$(on_host 1)" || failed=1
wait $first && exit $failed
"""


@pytest.mark.launch
@pytest.mark.faults
def test_deepspeed_starts_a_run_on_the_hosts_of_a_file(hosts: list[Host], shards: Path, tmp_path: Path) -> None:
    # The transport is ours, since there is no ssh between namespaces; all else is deepspeed's way to several machines.
    run, programs = run_of(shards, tmp_path / "run"), tmp_path / "bin"
    programs.mkdir()
    texts = {"prefixes": [" ".join(host.prefix) for host in hosts], "interfaces": [host.interface for host in hosts]}
    (programs / "pdsh").write_text(PDSH.format(**texts))
    (programs / "pdsh").chmod(0o755)
    (tmp_path / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    where = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check"]
    meeting = ["--master_addr", hosts[0].address, "--master_port", str(free_port())]
    argv = [str(BIN / "deepspeed"), *where, *meeting, "asda/train.py", *run.arguments()]
    env = environment() | {"PATH": f"{programs}:{environment()['PATH']}"}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nnodes=2, num_local_procs=1, node_rank=1" in done.stdout + done.stderr
    assert len(run.figures()) == 3 * EVERY
