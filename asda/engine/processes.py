"""Which process is which: started by deepspeed, torchrun or srun, or alone."""

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from asda.errors import UserError
from asda.system import keep_freed_memory

LAST_RELEASE_S = 0.2  # gloo's threads need microseconds


@dataclass(frozen=True)
class Processes:
    """Where a process stands among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def join_processes(timeout_s: float = 600.0) -> Processes:
    """Join the processes that deepspeed, torchrun or SLURM's srun started; a single one when nobody did.

    An exchange that waits longer than timeout_s for a rank ends in an error.
    """
    _complete_environment()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    # DeepSpeed would compile a shared-memory all-reduce for CPUs at first use (a C++ compiler, 30 s). Its processes
    # spin without a timeout when a peer has died; gloo needs no compiler and ends with an error.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    except dist.DistNetworkError as error:
        raise UserError(
            f"cannot open the port {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']} for the ranks to meet "
            f"({error}); is another run using it? give the launcher another --master_port"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def leave_processes() -> None:
    """Part from the others at a regular end, so that no thread of the group outlives what it uses.

    DeepSpeed keeps references to groups, so that gloo's threads live on; they let go of the last exchange's tensors
    with Python's lock, and one that asks for it while Python ends aborts the process (pytorch/pytorch#179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LAST_RELEASE_S)


def _complete_environment() -> None:
    env = os.environ
    env.update(slurm_ranks(env))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


FIRST_PORT, NUM_PORTS = 20_000, 20_000  # a job's meeting point, by its number: below what systems hand out themselves
FIRST_HOST = re.compile(r"^([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?")  # of node[01-03,07],login
TASKS_OF_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # of 4(x2),1


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of torch.distributed for a process that srun started together with others; {} for any other.

    What is set already stays as it is, so a job may choose MASTER_ADDR and MASTER_PORT by itself.

    Raises:
        UserError: SLURM does not say where the ranks are to meet.
    """
    num_tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "RANK" in env or "SLURM_STEP_ID" not in env or num_tasks == "1":
        return {}  # a batch script without srun has SLURM_NTASKS too, but is one process
    derived = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(env)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
        "MASTER_PORT": str(FIRST_PORT + int(env.get("SLURM_JOB_ID", "0")) % NUM_PORTS),
    }
    return {name: value for name, value in derived.items() if name not in env}


def _first_host(env: Mapping[str, str]) -> str:
    """Where srun's task 0 runs. Not SLURM_LAUNCH_NODE_IPADDR: after salloc that is where the user sits."""
    hosts = FIRST_HOST.match(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    if hosts is None:
        raise UserError(
            "SLURM started several tasks, but neither MASTER_ADDR nor SLURM_JOB_NODELIST says where rank 0 is; set "
            "MASTER_ADDR to the host of the first task, as docs/slurm.sh does"
        )
    return "".join(part or "" for part in hosts.groups())


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    groups = TASKS_OF_NODES.findall(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    of_nodes = [int(num_tasks) for num_tasks, times in groups for _ in range(int(times or 1))]
    node = int(env.get("SLURM_NODEID", "0"))
    return of_nodes[node] if node < len(of_nodes) else int(env.get("SLURM_NTASKS_PER_NODE", "1"))
