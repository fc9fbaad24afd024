"""Measure what a rank holds and sends in a step of ASDA-base, by ZeRO stage, beside what is computed for it.

`bench.py memory` starts one and two ranks for every stage. It looks at their second step: which tensors are alive
between the backward pass and the update, and what is given to torch.distributed. Activations are freed by then.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asda.config.run import EngineConfig, load_config
from asda.engine.partitions import fragments
from asda.engine.processes import free_port, join_processes, leave_processes
from asda.engine.zero import make_engine
from asda.models.costs import rank_memory
from asda.objectives import Pretraining, make_objective

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "as2m.json"
LOW_BYTES, FULL_BYTES = 2, 4  # a value in bf16 or fp16, and in fp32
MB = 1e6
STAGES, WORLDS = (0, 1, 2, 3), (1, 2)
Bytes = dict[str, float]


def computed_traffic(parameters: int, followed: int, stage: int, world: int, micro_batches: int = 1) -> Bytes:
    """Compute the bytes that a rank of a bf16 run sends in a step, if exchanges go around a ring.

    A ring of W ranks sends (W - 1) / W of the whole to gather it or to reduce and scatter it, and twice that to reduce
    it everywhere.
    """
    once = (world - 1) / world
    # In fp32 (engine.deepspeed_dict). Stages 2 and 3 exchange after every micro-batch; stage 2 reduces everywhere, as
    # stage 1 does, and every rank throws all but its share away.
    times = {0: 2, 1: 2, 2: 2 * micro_batches, 3: micro_batches}[stage]
    gradients = times * FULL_BYTES * parameters
    # Stage 3 gathers before the forward pass and keeps what it gathered: DeepSpeed lets 1e9 parameters live.
    gathers = {0: 0, 1: 1, 2: 1, 3: micro_batches}[stage]
    weights = LOW_BYTES * parameters * gathers
    return {"gradients": gradients * once, "weights": weights * once, "teacher": LOW_BYTES * followed * once}


def bench_memory(config: Path = CONFIG, overrides: Iterable[str] = ()) -> dict[str, dict[str, float]]:
    """Return what the first of one or two ranks holds and sends in a step, in MB, by ZeRO stage."""
    rows = {}
    for world in WORLDS:
        for stage in STAGES:
            found = measured(world, [f"engine.zero_stage={stage}", *overrides], config)
            parameters, followed, held = found["parameters"], found["followed"], found["held"]
            computed = rank_memory(parameters, followed, EngineConfig(zero_stage=stage), world)
            sends = computed_traffic(parameters, followed, stage, world)
            row = {name: held[name] / MB for name in (*computed, "other")}
            row |= {"all": sum(held.values()) / MB, "computed": sum(computed.values()) / MB, "RSS": found["rss"] / MB}
            row |= {"sent": sum(found["sent"].values()) / MB, "to send": sum(sends.values()) / MB}
            rows[f"{world} rank{'s' * (world > 1)}, stage {stage}"] = row
    return rows


def measured(world: int, overrides: list[str], config: Path = CONFIG) -> dict[str, Any]:
    """Return what the first of `world` ranks measured in its second step."""
    port, script = free_port(), str(Path(__file__).resolve())
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()}
        argv = [sys.executable, script, "--config", str(config), *overrides]
        processes.append(
            subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}:\n{errors[-2000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def measure(config_file: Path, overrides: list[str]) -> dict[str, Any]:
    """Take two steps of one clip a rank, on noise; return what is held and sent in the second."""
    world = int(os.environ["WORLD_SIZE"])
    # The measured tensors do not depend on the number of students; the time does.
    sizes = [f"optimizer.batch={world}", "engine.micro_batch=1", "objective.students=1", "engine.precision=bf16"]
    config = load_config(config_file, [*sizes, 'data.log_mel={"mean": -4, "std": 4}', *overrides])
    processes = join_processes()
    objective = make_objective(config, (), processes.device)
    assert isinstance(objective, Pretraining)
    draw = objective.masks()
    engine: Any = make_engine(config, objective.module, objective.lr_scales, world)
    objective.follow(engine)
    rng, patch = np.random.default_rng(processes.rank), config.model.patch
    num_patches = config.data.frames // patch * (config.model.mel_bins // patch)
    patches_BNP = torch.from_numpy(rng.normal(size=(1, num_patches, patch**2)).astype(np.float32))
    found: dict[str, Any] = {}
    for step in (1, 2):
        with counted() as sent_backward:
            batch: Any = SimpleNamespace(visible_BMK=draw(rng)[None])
            loss, _ = objective.loss(engine, patches_BNP.to(processes.device), batch)
            engine.backward(loss)
        del loss
        found["held"] = held(engine, objective)
        with counted() as sent_update:
            engine.step()
        with counted() as sent_teacher:
            objective.after_update(step)
        by_phase = {"backward": sent_backward, "update": sent_update, "teacher": sent_teacher}
        found["sent"] = {f"{phase}, {kind}": n for phase, sent in by_phase.items() for kind, n in sent.items()}
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    found["followed"] = sum(p.numel() for p in objective.teacher.parameters())
    found["rss"] = resident_bytes()
    leave_processes()
    return found


def held(engine: Any, objective: Pretraining) -> Bytes:
    """Return the bytes of all living tensors by kind; each piece of memory counts once."""
    seen: set[int] = set()

    def take(tensors: Iterable[Tensor | None]) -> float:
        taken = 0
        for tensor in tensors:
            if tensor is None or tensor.device.type == "meta":
                continue
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in seen:
                seen.add(memory.data_ptr())
                taken += memory.nbytes()
        return float(taken)

    parameters = list(engine.module.parameters())
    masters = [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    masters += [fragment.master for fragment in fragments(engine)]
    moments = [x for state in engine.basic_optimizer.state.values() for x in state.values() if _is_tensor(x)]
    kinds = {
        "weights": take([*(p.data for p in parameters), *(getattr(p, "ds_tensor", None) for p in parameters)]),
        "gradients": take([*(p.grad for p in [*parameters, *masters]), *_kept_gradients(engine.optimizer)]),
        "master and moments": take([*masters, *moments]),
        "teacher": take(objective.teacher.parameters()),
        "averages": take(objective._ema.averages),
    }
    # The rest: tables of positions, buffers of DeepSpeed's exchanges.
    wide = [x for x in gc.get_objects() if _is_tensor(x) and x.numel() > 1 << 16]
    return kinds | {"other": take(wide)}


def _kept_gradients(optimizer: Any) -> list[Tensor]:
    """Return the gradients that DeepSpeed's stages 2 and 3 keep in their own buffers until the update."""
    by_group = getattr(optimizer, "averaged_gradients", {})
    kept = [tensor for tensors in by_group.values() for tensor in tensors]
    return [x for x in [*kept, getattr(optimizer, "grad_partitions_flat_buffer", None)] if x is not None]


def _is_tensor(x: object) -> bool:
    return issubclass(type(x), Tensor)  # isinstance would look behind weak references, some of them dead


# Methods of a process group: the share of the whole that a ring of W ranks sends, in units of (W - 1) / W, and the
# place of the whole among the arguments.
EXCHANGES = {
    "allreduce": (2, 0),
    "allreduce_coalesced": (2, 0),
    "broadcast": (1, 0),
    "reduce": (1, 0),
    "allgather": (1, 0),
    "_allgather_base": (1, 0),
    "allgather_into_tensor_coalesced": (1, 0),
    "reduce_scatter": (1, 1),
    "_reduce_scatter_base": (1, 1),
    "reduce_scatter_tensor_coalesced": (1, 1),
}


@contextmanager
def counted() -> Iterator[Bytes]:
    """Count what this rank would send around a ring, by kind of exchange, while inside."""
    group_class, sent = dist.ProcessGroup, defaultdict(float)
    original = {name: getattr(group_class, name) for name in EXCHANGES if hasattr(group_class, name)}

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        times, place = EXCHANGES[name]

        @wraps(method)
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            world = group.size()
            sent[name.strip("_")] += times * (world - 1) / world * _bytes(args[place])
            return method(group, *args, **kwargs)

        return call

    for name, method in original.items():
        setattr(group_class, name, counting(name, method))
    try:
        yield sent
    finally:
        for name, method in original.items():
            setattr(group_class, name, method)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(item) for item in tensors)


def resident_bytes() -> int:
    """Return the bytes of this process that are in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run one rank: measure, and print the findings as JSON on the last line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench/bench_memory.py", description="Run one rank of `bench.py memory`."
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found = measure(args.config, args.overrides)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
