"""Loading ahead: results in order, whoever does the work, and a word about whoever does not."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_table import Count

from asda.config.model import MaskConfig
from asda.config.run import Config, load_config
from asda.data.batches import Batch
from asda.data.clips import ClipDataset, DamageBudget
from asda.data.prefetch import read_ahead, read_ahead_in_processes
from asda.data.stream import patch_maker, training_batches, with_patches
from asda.errors import UserError
from asda.models.masks import visible_patches

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo_finetune.json"
STATS = 'data.log_mel={"mean": -4.0, "std": 3.0}'
AUGMENT = 'data.augment={"roll": true, "magnitude": 10.0, "frame_noise": 0.1, "mixup": {"alpha": 0.8}}'
CPU = torch.device("cpu")


def slow_square(task: int, note: Callable[[str], None]) -> int:
    time.sleep(random.random() / 100)
    return task * task


def refuse_five(task: int, note: Callable[[str], None]) -> int:
    if task == 5:
        raise UserError("five is refused")
    return task


def sleep_long(task: int, note: Callable[[str], None]) -> int:
    time.sleep(60 if task == 2 else 0)
    return task


in_two_processes = partial(
    read_ahead_in_processes, processes=2, ahead_each=2, timeout_s=60.0, describe=lambda task: f"task {task}"
)
READERS = {
    "here": partial(read_ahead, threads=0, ahead=4, timeout_s=60.0),
    "threads": partial(read_ahead, threads=3, ahead=4, timeout_s=60.0),
    "processes": in_two_processes,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_results_come_in_the_order_of_the_tasks(reader: Callable[..., Iterator[int]]) -> None:
    assert list(reader(range(40), slow_square)) == [n * n for n in range(40)]
    assert list(islice(reader(iter(int, 1), slow_square), 3)) == [0, 0, 0]  # without end


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_an_error_comes_in_its_place(reader: Callable[..., Iterator[int]]) -> None:
    found = []
    with pytest.raises(UserError, match="five is refused"):
        found.extend(reader(range(9), refuse_five))
    assert found == [0, 1, 2, 3, 4]


def config_of(shards: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"data.train={shards}:train", STATS, "data.device=cpu", *overrides])


def stream_of(config: Config, budget: DamageBudget | None = None) -> Iterator[tuple[torch.Tensor, Batch]]:
    dataset = ClipDataset(*[p.data for p in config.data.datasets], labelled=True, tolerant=budget is not None)
    masks = partial(visible_patches, num_masks=4, grid=(16, 8), config=MaskConfig())
    maker = patch_maker(config, CPU, training=True)
    shape = {"seed": 1, "first_step": 1, "batch": 12, "micro_batch": 4, "rank": 0, "world_size": 1}
    batches = training_batches(dataset, config.data, **shape, masks=masks, budget=budget, patches=maker)  # type: ignore[arg-type]
    with with_patches(batches, config, 4, CPU, training=True) as patches:
        yield from patches


def test_processes_give_the_batches_of_threads_to_the_last_bit(shards: Path) -> None:
    by_threads = list(islice(stream_of(config_of(shards, AUGMENT)), 24))
    by_processes = stream_of(config_of(shards, AUGMENT, "data.workers=2", "data.prefetch=2"))
    for expected_BNP, expected in by_threads:  # compared at once: the memory is used again
        patches_BNP, batch = next(by_processes)
        assert torch.equal(patches_BNP, expected_BNP)
        assert [(c.draw, c.key, c.labels) for c in batch.clips] == [(c.draw, c.key, c.labels) for c in expected.clips]
        assert batch.lengths == expected.lengths
        assert np.array_equal(batch.visible_BMK, expected.visible_BMK)  # type: ignore[arg-type]
        assert np.array_equal(batch.targets(8), expected.targets(8))


@pytest.mark.parametrize(("ranks", "workers"), [(2, 3), (3, 2)])
def test_ranks_and_processes_do_not_change_what_a_step_sees(shards: Path, ranks: int, workers: int) -> None:
    config = config_of(shards).data
    dataset = ClipDataset(f"{shards}:train", labelled=True)

    def steps(num_ranks: int, workers: int) -> list[list[str]]:
        shape = {"seed": 1, "first_step": 0, "batch": 12, "micro_batch": 4, "world_size": num_ranks, "masks": None}
        data = config.model_copy(update={"workers": workers})
        streams = [training_batches(dataset, data, rank=rank, **shape) for rank in range(num_ranks)]  # type: ignore[arg-type]
        keys = [[clip.key for b in islice(s, 8 * -(-3 // num_ranks)) for clip in b.clips] for s in streams]
        share = 12 // num_ranks
        return [[key for some in keys for key in some[step * share : (step + 1) * share]] for step in range(8)]

    assert steps(ranks, workers) == steps(1, 0)  # two epochs


def test_processes_hand_over_samples_where_a_gpu_makes_the_patches(shards: Path) -> None:
    config = config_of(shards)
    dataset = ClipDataset(f"{shards}:train", labelled=True)
    shape = {"seed": 1, "first_step": 0, "batch": 12, "micro_batch": 5, "rank": 0, "world_size": 1, "masks": None}
    by_threads, by_processes = (
        training_batches(dataset, config.data.model_copy(update={"workers": workers}), **shape)  # type: ignore[arg-type]
        for workers in (0, 2)
    )
    for expected, batch in islice(zip(by_threads, by_processes, strict=True), 9):
        for clip, other in zip(expected.clips, batch.clips, strict=True):
            assert (clip.draw, clip.key) == (other.draw, other.key)
            assert np.array_equal(clip.samples, other.samples)


def test_damage_that_a_process_meets_is_counted_at_home(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-000001.tar.zst"
    shard.write_bytes(bytes(shard.stat().st_size))
    budget = DamageBudget(16)
    for _ in islice(stream_of(config_of(tmp_path, "data.workers=2"), budget), 12):  # an epoch
        pass
    assert budget.met == set(range(16, 32))


def test_a_killed_worker_is_named_within_seconds(shards: Path, count_fault: Count) -> None:
    stream = stream_of(config_of(shards, "data.workers=2", "data.prefetch=2"))
    next(stream)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"worker \(pid.*when it was to read train-0000"):
        list(islice(stream, 99))
    assert time.monotonic() - started < 5
    count_fault("12", "a worker process killed by SIGKILL", 1, 1)


LEFT_OPEN = """
import sys
from test_prefetch import config_of, stream_of
from asda.errors import UserError, exit_with_sentence

def main():
    stream = stream_of(config_of(sys.argv[1], "data.workers=2"))
    next(stream)
    raise UserError("something else went wrong")

if __name__ == "__main__":
    exit_with_sentence(main)
"""


def test_a_program_that_fails_does_not_wait_for_its_workers(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "left_open.py").write_text(LEFT_OPEN)
    command = [sys.executable, tmp_path / "left_open.py", shards]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT / 'tests/helpers'}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (2, "error: something else went wrong")


def test_a_worker_that_hangs_is_named_after_the_timeout(count_fault: Count) -> None:
    results = in_two_processes(range(9), sleep_long, timeout_s=15.0)  # longer than a process takes to start
    assert [next(results), next(results)] == [0, 1]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"timed out after 15.* when it was to read task 2"):
        next(results)
    assert time.monotonic() - started < 20
    count_fault("13", "a worker process that hangs", 1, 1)


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


def test_workers_hear_no_request_to_stop_and_take_no_random_number_of_the_trainer() -> None:
    # A step's noise follows from its number alone: in a resumed session it must not depend on the workers' start.
    before = torch.get_rng_state(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    results = in_two_processes(range(100), slow_square)
    assert next(results) == 0
    for worker in multiprocessing.active_children():
        blocked = int(status(worker.pid, "SigBlk"), 16)  # type: ignore[arg-type]
        assert all(blocked >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        os.kill(worker.pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert list(results) == [number * number for number in range(1, 100)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before[1]


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, operator, os, signal, sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests/helpers')]!r}\n"
        "from test_prefetch import in_two_processes, slow_square\n"
        "if __name__ == '__main__':\n"
        "    results = in_two_processes(range(100), slow_square)\n"
        "    next(results), next(results)  # one of each: both have started\n"
        "    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = tmp_path / "said"  # a pipe would be waited for as long as any other process of the program holds it
    with said.open("w") as file:
        done = subprocess.run([sys.executable, program], stdout=file, check=False)
    assert done.returncode == -signal.SIGKILL
    workers = [Path(f"/proc/{pid}") for pid in said.read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 2  # torch's own watch looks every five seconds
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(worker.exists() for worker in workers)


@pytest.mark.parametrize("lives", [True, False])
def test_a_worker_whose_trainer_ended_before_it_began_ends_too(lives: bool) -> None:
    trainer = os.getpid() if lives else 1 << 30
    program = f"from asda.data.prefetch import _prepare_worker\n_prepare_worker(True, {trainer}, 0)\nprint('works')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (("works\n", 0) if lives else ("", 1))
