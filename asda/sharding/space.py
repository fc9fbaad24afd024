"""Check that the shards will fit on the disk, by a sample of the clips, before anything is written."""

import shutil
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.errors import UserError
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.workers import Workers
from asda.sharding.writer import compressed_bytes

NUM_SAMPLED = 64  # clips; their order is a fixed shuffle, so every n-th is a fair sample
MARGIN = 1.1  # the mean of 64 clips is off by about 5 % if their lengths differ by as much as their mean
INDEX_BYTES = 512  # for each clip in a shard's index, in dataset.json, and in the record of a finished shard
LARGEST_RATIO = 1.02  # bytes of a compressed clip by those of its samples, at worst: noise
MIB, GIB = 1 << 20, 1 << 30


def check_space(workers: Workers, out: Path, tasks: Sequence[ShardTask], freed_bytes: int) -> None:
    """Refuse to begin if the shards will not fit; `freed_bytes` will be freed before they are written."""
    clips = [clip for task in tasks for clip in task.clips]
    if not clips:
        return
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    most = len(clips) * (tasks[0].max_seconds * 2 * SAMPLE_RATE_HZ * LARGEST_RATIO + INDEX_BYTES)
    if most <= free:
        return
    needed = _estimate(workers, clips, tasks[0].max_seconds)
    if needed > free + freed_bytes:
        freeing = f", and --overwrite frees {_size(freed_bytes)}" if freed_bytes else ""
        raise UserError(
            f"{len(clips)} clips need about {_size(needed)}, and --out {out} has {_size(free)} free{freeing}; "
            "free space or choose another --out"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def _estimate(workers: Workers, clips: Sequence[ClipTask], max_seconds: float) -> float:
    """Estimate the bytes of the clips from a sample; clips that cannot be read take none."""
    sample = clips[:: -(-len(clips) // NUM_SAMPLED)]
    sizes = list(workers.pool.map(compressed_bytes, sample, repeat(max_seconds), chunksize=4))
    return len(clips) * (MARGIN * sum(sizes) / len(sizes) + INDEX_BYTES)
