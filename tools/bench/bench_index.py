"""Open a hundred million clips (270,000 hours) by an index without audio, and ask for positions of an epoch.

Each mode of the order is measured in a process of its own, which prints its figures as JSON:

    python tools/bench/bench_index.py FOLDER MODE
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asda.config.data import DataConfig
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.clips import ClipDataset
from asda.data.order import ClipOrder
from asda.data.shards.index import (
    FORMAT_VERSION,
    SHARD_ROW,
    DatasetIndex,
    LogMelMoments,
    ShardTable,
    SplitIndex,
    class_weight,
)
from asda.sharding.writer import write_dataset

CLIPS, SHARD_CLIPS, CLASSES, SECONDS = 100_000_000, 256, 527, 9.72  # 270,000 hours
DRAWS, BATCH, POSITIONS, ROUNDS = 200_000, 48, 200, 3
LIMITS = {"open_s": 10.0, "position_ms": 50.0, "slowest_ms": 50.0, "peak_mib": 1024.0}
MODES = {
    "balanced": {"mode": "balanced", "draws_per_epoch": DRAWS},
    "with replacement": {"mode": "balanced", "draws_per_epoch": DRAWS, "replacement": True},
    "shuffled": {"mode": "shuffled"},
}


def bench_index(num_clips: int = CLIPS) -> dict[str, float | dict[str, float]]:
    """Open 10^8 clips and jump about in an epoch 200 times: medians of three processes; the slowest; peak of memory."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_index(Path(folder), num_clips)
        rows: dict[str, float | dict[str, float]] = {"limits": LIMITS}
        rows |= {name: _summary([_in_own_process(folder, name) for _ in range(ROUNDS)]) for name in MODES}
        megabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        return {**rows, "index, MB": megabytes, "all of it, s": time.perf_counter() - began}


def write_index(folder: Path, num_clips: int) -> None:
    """Write dataset.json and what belongs to it for so many clips in random classes, but no shard."""
    rng = np.random.default_rng(0)
    num_shards = -(-num_clips // SHARD_CLIPS)
    rows = np.zeros(num_shards, SHARD_ROW)
    rows["number"], rows["clips"], rows["bytes"] = np.arange(num_shards), SHARD_CLIPS, 70 << 20
    rows["clips"][-1] = num_clips - (num_shards - 1) * SHARD_CLIPS
    rows["hash"] = np.frombuffer(rng.bytes(16 * num_shards), "V16")
    rows["index_bytes"], rows["index_hash"] = 24_000, rows["hash"]
    # A class is twice as rare as the one 40 before it, and a clip has one label.
    classes = np.minimum(rng.exponential(60, num_clips).astype(np.int64), CLASSES - 1)
    counts = np.bincount(classes, minlength=CLASSES)
    weights = np.array([class_weight(count) for count in counts])
    split = SplitIndex(
        clips=num_clips,
        seconds=num_clips * SECONDS,
        class_counts=tuple(counts.tolist()),
        log_mel=LogMelMoments(-4.3, 4.6, num_clips * 970),
        shards=ShardTable("train", rows),
        class_weights=tuple(weights.tolist()),
        sample_weights=weights.astype(np.float32)[classes],
    )
    names = tuple(f"class {number}" for number in range(CLASSES))
    write_dataset(DatasetIndex(FORMAT_VERSION, SAMPLE_RATE_HZ, names, {"train": split}, 0, folder))


def measure(folder: str, mode: str) -> dict[str, float]:
    """Open the index, begin an epoch, and jump to random positions of it."""
    config = DataConfig.model_validate({"train": f"{folder}:train", "order": MODES[mode]})
    orders: list[ClipOrder] = []

    def open_it() -> None:
        dataset = ClipDataset(config.datasets[0].data, labelled=True, tolerant=True)
        orders.append(ClipOrder(dataset.ordered(config), seed=1, group_shards=config.group_shards))

    opening = seconds(open_it)
    order = orders[0]
    first_epoch = seconds(lambda: order.draws(0, BATCH))
    another = 1000 * CLIPS + 12_345  # in the middle of an epoch for every mode
    next_epoch = seconds(lambda: order.draws(another, another + BATCH))
    last = config.order.draws_per_epoch or CLIPS
    jumps = [seconds(_jump, order, int(place)) for place in (last - BATCH) * np.random.default_rng(1).random(POSITIONS)]
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {
        "open_s": opening + first_epoch,  # until the first draws are there
        "epoch_s": first_epoch,
        "other_s": next_epoch,
        "position_ms": 1000 * statistics.median(jumps),
        "slowest_ms": 1000 * max(jumps),
        "peak_mib": int(status.partition("VmHWM:")[2].split()[0]) / 1024,
    }


def _jump(order: ClipOrder, position: int) -> None:
    """Ask for the clips of a step and for the shards that come, as a run does that continues there."""
    order.draws(position, position + BATCH)
    order.shards_ahead(position, order.draws_per_group + 1)


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """Time one call."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def _summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: (max if name in ("slowest_ms", "peak_mib") else statistics.median)(each[name] for each in rounds)
        for name in rounds[0]
    }


def _in_own_process(folder: str, mode: str) -> dict[str, float]:
    command = [sys.executable, __file__, folder, mode]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
