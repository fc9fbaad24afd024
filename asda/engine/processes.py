"""Join the processes of a run, which deepspeed, torchrun or srun has started, or a single one."""

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from asda.engine.partitions import use_gloo
from asda.errors import UserError
from asda.system import complete_environment, keep_freed_memory

LAST_RELEASE_S = 0.2  # for gloo's threads to release the last tensors; they need microseconds


@dataclass(frozen=True)
class Processes:
    """The rank of a process, the number of ranks, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def join_processes(timeout_s: float = 600.0) -> Processes:
    """Join the processes that deepspeed, torchrun or SLURM's srun has started; without those, be the only one.

    Args:
        timeout_s: an exchange that waits longer for a rank ends in an error.

    Raises:
        UserError: the port on which the ranks meet is taken.
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
    use_gloo()
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    except dist.DistNetworkError as error:
        raise UserError(
            f"cannot open the port {os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']} for the ranks to meet "
            f"({error}); is another run using it? give the launcher another --master_port"
        ) from None
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def from_all_ranks(value: Any) -> list[Any]:
    """Return every rank's value, by rank. All ranks call this together."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave_processes() -> None:
    """End the process group at a regular end, so that none of its threads outlives what it uses.

    DeepSpeed keeps references to groups, so gloo's threads live on. They release the last exchange's tensors under
    Python's lock, and one that asks for the lock while Python ends aborts the process (pytorch/pytorch#179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(LAST_RELEASE_S)


def _complete_environment() -> None:
    complete_environment()
    env = os.environ
    env.update(slurm_ranks(env))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))


def free_port() -> int:
    """Find a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


FIRST_PORT, NUM_PORTS = 20_000, 20_000  # a job's meeting point, by its number: below what systems hand out themselves
FIRST_HOST = re.compile(r"^([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?")  # of node[01-03,07],login
TASKS_OF_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # of 4(x2),1


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """Return torch.distributed's variables for a process that srun started with others; {} for any other.

    Variables that are set are left out, so a job may choose MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: SLURM does not say where the ranks meet.
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
    """Return the host of srun's task 0. SLURM_LAUNCH_NODE_IPADDR is not it: after salloc that is the user's host."""
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
