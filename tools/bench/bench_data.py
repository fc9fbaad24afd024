"""`tools/bench/bench.py data`: the way of a clip from the disk to patches and masks, beside three usual ways.

All read the same sounds, make the same log-mel and mask it 16 times. One process (or thread) a core each:

official    as the published code does it: a 32 kHz WAV a clip, torchaudio's resample and fbank, masks clip by clip, all
            in a torch DataLoader (written here from that description)
flac        16 kHz FLAC files and torchaudio's fbank in a DataLoader
webdataset  the same shards through plain webdataset stages and torchaudio's fbank in a DataLoader
"""

import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import psutil
import soundfile
import torch
import torchaudio
import torchaudio.compliance.kaldi as kaldi
import xxhash
import zstandard
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType
from torch.utils.data import DataLoader, Dataset
from webdataset.filters import map as wds_map
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList, split_by_worker
from webdataset.tariterators import group_by_keys, tar_file_expander

from asda.config.model import MaskConfig
from asda.config.run import Config, load_config
from asda.data.audio.waves import SAMPLE_RATE_HZ, decode_wav
from asda.data.clips import ClipDataset
from asda.data.features.fbank import log_mel, num_frames
from asda.data.shards.index import (
    FORMAT_VERSION,
    DatasetIndex,
    LogMelMoments,
    ShardEntry,
    SplitIndex,
    class_weight,
    tagged_hash,
)
from asda.data.shards.read import ShardFile
from asda.data.stream import Batch, make_patches, training_batches
from asda.models.masks import visible_patches
from asda.sharding.writer import write_dataset

ROOT = Path(__file__).resolve().parents[2]
CLIP_SECONDS = 10
OFFICIAL_RATE_HZ = 32_000
FRAMES, PATCH, MEL_BINS = 1024, 16, 128
GRID = FRAMES // PATCH, MEL_BINS // PATCH
STUDENTS, VISIBLE, CENTRES, BLOCK = 16, 102, 5, 5
MEAN, STD = -4.268, 4.569
draw_masks = partial(visible_patches, num_masks=STUDENTS, grid=GRID, config=MaskConfig())

NUM_CLIPS = 384  # 64 s of work for the slowest of them on one core
BATCH, AHEAD = 16, 4
WORKERS = len(os.sched_getaffinity(0))  # threads of ours, processes of the others
ROUNDS = 5
LINKS = 6  # names of each file, for the writer
BIG_SHARDS, BIG_SHARD_CLIPS = 7_813, 256  # of a generated index: 2 million clips
MIB = 1 << 20
ONE_RANK: Any = {"seed": 1, "batch": BATCH, "micro_batch": BATCH, "rank": 0, "world_size": 1}

T = TypeVar("T")
Figures = Mapping[str, float | dict[str, float]]


def kaldi_log_mel(wave_S: torch.Tensor) -> torch.Tensor:
    """Torchaudio's Kaldi features as the published recipes call them, [T, 128]."""
    wave_1S = (wave_S - wave_S.mean())[None]
    return kaldi.fbank(
        wave_1S, htk_compat=True, window_type="hanning", num_mel_bins=MEL_BINS, dither=0.0, sample_frequency=16_000
    )


def padded(mel_TM: torch.Tensor) -> torch.Tensor:
    """Cut or padded with zeros to FRAMES, and normalised."""
    mel_TM = torch.nn.functional.pad(mel_TM[:FRAMES], (0, 0, 0, max(0, FRAMES - len(mel_TM))))
    return (mel_TM - MEAN) / (2 * STD)


def masks_one_by_one(rng: np.random.Generator) -> np.ndarray:
    """Inverse block masks [M, N] as they are usually made: the blocks of all masks at once, then mask after mask."""
    num_patches = GRID[0] * GRID[1]
    offsets = np.arange(BLOCK) - BLOCK // 2
    centres_MC = rng.integers(num_patches, size=(STUDENTS, CENTRES))
    rows = np.clip(centres_MC[..., None] // GRID[1] + offsets, 0, GRID[0] - 1)
    columns = np.clip(centres_MC[..., None] % GRID[1] + offsets, 0, GRID[1] - 1)
    cells = rows[..., :, None] * GRID[1] + columns[..., None, :]
    visible_MN = np.zeros((STUDENTS, num_patches), dtype=bool)
    np.put_along_axis(visible_MN, cells.reshape(STUDENTS, -1), True, axis=1)
    for visible_N in visible_MN:
        excess = np.count_nonzero(visible_N) - VISIBLE
        candidates = np.flatnonzero(visible_N == (excess > 0))
        visible_N[rng.choice(candidates, abs(excess), replace=False)] = excess < 0
    return visible_MN


class AudioFolder(Dataset):
    """A file a clip: decode, resample where need be, torchaudio's fbank, masks."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, np.ndarray]:
        """Normalised log-mel [FRAMES, 128] and masks."""
        samples_S, rate_hz = soundfile.read(self.paths[number], dtype="float32")
        wave_S = torchaudio.functional.resample(torch.from_numpy(samples_S), rate_hz, SAMPLE_RATE_HZ)
        return padded(kaldi_log_mel(wave_S)), masks_one_by_one(np.random.default_rng(number))


def from_webdataset(folder: Path) -> DataPipeline:
    """Our shards in plain webdataset: it reads no zstd by itself, so a stage opens the stream before its own stages."""

    def opened(urls: Iterator[dict]) -> Iterator[dict]:
        for url in urls:
            with open(url["url"], "rb") as file:
                stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                yield {"url": url["url"], "stream": io.BufferedReader(stream)}

    def item(sample: dict) -> tuple[torch.Tensor, np.ndarray]:
        samples_S, _ = soundfile.read(io.BytesIO(sample["wav"]), dtype="float32")
        return padded(kaldi_log_mel(torch.from_numpy(samples_S))), masks_one_by_one(np.random.default_rng(0))

    urls = sorted(str(path) for path in folder.glob("*.tar.zst"))
    return DataPipeline(SimpleShardList(urls), split_by_worker, opened, tar_file_expander, group_by_keys, wds_map(item))


def write_clips(folder: Path, num_clips: int) -> None:
    """Noise with a falling spectrum, as 32 kHz WAV, 16 kHz WAV and 16 kHz FLAC, and as shards of several sizes."""
    rng = np.random.default_rng(0)
    for name in ("wav32", "wav16", "flac16"):
        (folder / name).mkdir()
    for number in range(num_clips):
        steps_S = rng.standard_normal(CLIP_SECONDS * OFFICIAL_RATE_HZ)
        wave_S = np.convolve(steps_S, np.exp(-np.arange(32) / 8), "same") * 0.03
        soundfile.write(folder / "wav32" / f"{number:05d}.wav", wave_S, OFFICIAL_RATE_HZ, subtype="PCM_16")
        soundfile.write(folder / "wav16" / f"{number:05d}.wav", wave_S[::2], SAMPLE_RATE_HZ, subtype="PCM_16")
        soundfile.write(folder / "flac16" / f"{number:05d}.flac", wave_S[::2], SAMPLE_RATE_HZ, subtype="PCM_16")


def make_shards(folder: Path, clips_per_shard: int, source: str = "wav16") -> tuple[Path, float]:
    """Make shards of the 16 kHz files; return their folder, and the seconds that the tool reports."""
    out = folder / f"{source}-by-{clips_per_shard}"
    tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "folder", "--input", folder / source]
    options = ["--out", out, "--clips-per-shard", str(clips_per_shard)]
    printed = subprocess.run([*tool, *options], check=True, capture_output=True, text=True, encoding="utf-8").stdout
    found = re.search(r"clips in ([\d,.]+) s", printed)
    assert found, printed
    return out, float(found[1].replace(",", ""))


def writer_rate(folder: Path, few_s: float) -> float:
    """Clips per second of make_shards.py, from how much longer it takes for LINKS times the clips than for one time."""
    (folder / "many16").mkdir()
    for path in (folder / "wav16").iterdir():
        for number in range(LINKS):
            (folder / "many16" / f"{path.stem}_{number}.wav").hardlink_to(path)
    _, many_s = make_shards(folder, 64, "many16")
    return (LINKS - 1) * NUM_CLIPS / (many_s - few_s)


def config_for(shards: Path, overrides: Sequence[str] = ()) -> Config:
    """configs/as2m.json on these shards, with a thread a core."""
    stats = f'data.log_mel={{"mean": {MEAN}, "std": {STD}}}'
    return load_config(
        ROOT / "configs" / "as2m.json",
        [
            f"data.train={shards}:train",
            stats,
            f"data.threads={WORKERS}",
            f"data.prefetch={AHEAD}",
            "data.device=cpu",
        ],
    )


def our_batches(shards: Path, *, masks: bool = True) -> Iterator[Batch]:
    """Without end, in the order of training."""
    return iter(our_pipeline(shards, masks=masks))


def our_pipeline(shards: Path, *, masks: bool = True, first_step: int = 0) -> DataPipeline:
    """Return our batches as a pipeline, which may get more stages."""
    config = config_for(shards)
    dataset = ClipDataset(config.data.train, labelled=False)  # type: ignore[arg-type]
    return training_batches(
        dataset, config.data, first_step=first_step, masks=draw_masks if masks else None, **ONE_RANK
    )


def our_patches(shards: Path, first_step: int = 0) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield patches from the whole pipeline, without end."""
    batches = our_pipeline(shards, first_step=first_step)
    yield from batches.compose(make_patches(config_for(shards), torch.device("cpu"), BATCH))


def part_of(stream: Iterator[T]) -> Iterator[T]:
    """Take as many clips as the others have from an endless stream, after what it had prepared."""
    deque(islice(stream, 3 * AHEAD), maxlen=0)
    return islice(stream, NUM_CLIPS // BATCH)


def handed_over(shards: Path) -> Iterator[object]:
    """Yield what the host does if a GPU makes the patches: read, verify, decompress, give to DALI; without end."""
    batches = ([clip.samples for clip in batch.clips] for batch in our_batches(shards, masks=False))
    pipe = Pipeline(batch_size=BATCH, num_threads=WORKERS, device_id=None, prefetch_queue_depth=2)
    with pipe:
        pipe.set_outputs(fn.external_source(source=batches, batch=True, dtype=DALIDataType.INT16, ndim=1))
    while True:
        yield pipe.run()


def loader(dataset: Dataset | DataPipeline) -> DataLoader:
    """Return a loader with a process for each core, kept from round to round."""
    return DataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True)  # type: ignore[arg-type]


def bench_data() -> Figures:
    """Clips per second from the disk to patches and 16 masks, beside three usual ways; and what it costs by stage."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_clips(folder, NUM_CLIPS)
        shards, few_s = make_shards(folder, 64)
        streams: dict[str, Iterator[object]] = {
            "ours": our_patches(shards),
            "read_and_verify": our_batches(shards, masks=False),
        }
        loaders = {
            "official": loader(AudioFolder(folder / "wav32")),
            "flac": loader(AudioFolder(folder / "flac16")),
            "webdataset": loader(from_webdataset(shards)),
        }
        ways = {name: partial(part_of, stream) for name, stream in streams.items()}
        # By itself: the others' threads, which prepare their next batches, would count.
        _, host_ms = in_turn({"handed_over": partial(part_of, handed_over(shards))})
        seconds, _ = in_turn(ways | {name: partial(iter, some) for name, some in loaders.items()})
        few, many = (make_shards(folder, size)[0] for size in (NUM_CLIPS, 4))
        grown = {"1_shard": our_patches(few), "96_shards": our_patches(many)}
        growth, _ = in_turn({name: partial(part_of, stream) for name, stream in grown.items()})
        return {
            **{f"{name}_clips_per_s": NUM_CLIPS / taken for name, taken in (seconds | growth).items()},
            "ratio": seconds["official"] / seconds["ours"],
            "ratio_flac": seconds["flac"] / seconds["ours"],
            "ratio_webdataset": seconds["webdataset"] / seconds["ours"],
            "host_ms_per_clip": host_ms["handed_over"],
            "writer_clips_per_s": writer_rate(folder, few_s),
            "first_batch_after_resume_s": seconds_to_first_batch(shards),
            "memory_growth_mib": memory_growth_mib(shards),
            **cold_reads(shards),
            **big_index(folder),
            **{f"{name}_ms": value for name, value in stages(shards).items()},
        }


def in_turn(ways: Mapping[str, Callable[[], Iterator[object]]]) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of seconds, and of this process's CPU milliseconds a clip, one way after another in every round."""
    seconds, cpu_ms = ({name: [] for name in ways} for _ in range(2))
    for round_number in range(ROUNDS + 1):
        for name, way in ways.items():
            batches = way()
            started, cpu_started = time.perf_counter(), time.process_time()
            deque(batches, maxlen=0)
            if round_number:  # the first is for caches, compilers, and processes to start
                seconds[name].append(time.perf_counter() - started)
                cpu_ms[name].append(1000 * (time.process_time() - cpu_started) / NUM_CLIPS)
    return medians(seconds), medians(cpu_ms)


def medians(figures: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each list."""
    return {name: statistics.median(taken) for name, taken in figures.items()}


def seconds_to_first_batch(shards: Path) -> float:
    """From nothing but the configuration to the patches of a batch in the middle of the 1000th epoch."""
    started = time.perf_counter()
    next(our_patches(shards, first_step=(1000 * NUM_CLIPS + NUM_CLIPS // 2) // BATCH))
    return time.perf_counter() - started


def memory_growth_mib(shards: Path) -> float:
    """Resident memory after five epochs, less that after one."""
    resident = []
    stream = our_patches(shards)
    for _ in range(5):
        deque(islice(stream, NUM_CLIPS // BATCH), maxlen=0)
        resident.append(psutil.Process().memory_info().rss)
    return (resident[-1] - resident[0]) / MIB


def cold_reads(shards: Path) -> dict[str, float]:
    """Clips per second of an epoch whose shards are not in the system's memory, by the order of the reads."""
    orders = {
        "in_order": (['data.order={"mode": "sequential"}'], True),
        "in_groups": ([], True),  # as training reads: shuffled in groups of shards, each announced before
        "in_groups_unannounced": ([], False),
        "anywhere": (["data.group_shards=100000"], False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    for _, (name, (overrides, announced)) in product(range(ROUNDS), orders.items()):
        config = config_for(shards, overrides=["data.group_shards=2", *overrides])
        dataset = ClipDataset(config.data.train, labelled=False)  # type: ignore[arg-type]
        for shard in dataset.shards:
            forget(Path(shard.path))
        batches = training_batches(dataset, config.data, first_step=0, masks=None, **ONE_RANK)
        started = time.perf_counter()
        with nullcontext() if announced else patch.object(ShardFile, "prefetch", lambda shard: None):
            deque(islice(batches, NUM_CLIPS // BATCH), maxlen=0)
        seconds[name].append(time.perf_counter() - started)
    return {f"cold_{name}_clips_per_s": NUM_CLIPS / taken for name, taken in medians(seconds).items()}


def forget(path: Path) -> None:
    """Drop a file from the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def stages(shards: Path) -> dict[str, float]:
    """Median milliseconds of each stage of one clip, on one thread."""
    dataset = ClipDataset(f"{shards}:train", labelled=False)
    shard, number = dataset.locate(NUM_CLIPS // 2)
    start, stop = shard.index.offsets[number : number + 2]
    file = os.open(shard.path, os.O_RDONLY)
    frame = os.pread(file, stop - start, start)
    decompressor = zstandard.ZstdDecompressor()
    members = decompressor.decompress(frame)
    samples_S = decode_wav(memoryview(members)[512 : 512 + 44 + 2 * shard.index.num_samples[number]])
    mel_TM = np.empty((num_frames(len(samples_S)), MEL_BINS), np.float32)
    rng = np.random.default_rng(0)
    works: dict[str, Callable[[], object]] = {
        "read": lambda: os.pread(file, stop - start, start),
        "hash": lambda: xxhash.xxh3_64_hexdigest(frame),
        "decompress": lambda: decompressor.decompress(frame),
        "log_mel": lambda: log_mel(samples_S, out_TM=mel_TM),
        "masks": lambda: draw_masks(rng),
        "torchaudio_log_mel": lambda: kaldi_log_mel(torch.from_numpy(samples_S / np.float32(32768))),
    }
    torch.set_num_threads(1)
    found = {}
    for name, work in works.items():
        work()
        taken = []
        for _ in range(50):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        found[name] = 1000 * statistics.median(taken)
    return found


def big_index(folder: Path) -> dict[str, float]:
    """Time opening a dataset of 2 million clips (shards are empty files of the right size), and a jump in its order."""
    generated = generate_index(folder / "big")
    script = (
        "import json, sys, time, psutil; from asda.config.data import DataConfig;"
        "from asda.data.clips import ClipDataset;"
        "from asda.data.order import ClipOrder; before = psutil.Process().memory_info().rss; t = time.perf_counter();"
        "config = DataConfig(train=sys.argv[1]); dataset = ClipDataset(config.train, labelled=True);"
        "opened = time.perf_counter() - t; order = ClipOrder(dataset.ordered(config), seed=1, group_shards=16);"
        "t = time.perf_counter(); order.draws(7 * len(dataset) // 2, 7 * len(dataset) // 2 + 16);"
        "jump = time.perf_counter() - t;"
        "print(json.dumps([opened, (psutil.Process().memory_info().rss - before) / 2**20, jump]))"
    )
    printed = subprocess.run([sys.executable, "-c", script, f"{generated}:train"], check=True, capture_output=True)
    names = ("open_2m_clips_s", "open_2m_clips_mib", "jump_in_2m_clips_s")
    return dict(zip(names, json.loads(printed.stdout), strict=True))


def generate_index(folder: Path) -> Path:
    """Write a dataset of BIG_SHARDS shards as make_shards.py would describe it; files have a size and no content."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    num_clips, num_bytes, index_bytes = BIG_SHARDS * BIG_SHARD_CLIPS, 70 * MIB, 24_000
    digest = tagged_hash(b"")
    entries = [
        ShardEntry(f"train-{number:06d}.tar.zst", BIG_SHARD_CLIPS, num_bytes, digest, index_bytes, digest)
        for number in range(BIG_SHARDS)
    ]
    for entry in entries:
        for name, size in ((entry.name, entry.bytes), (entry.index_name, entry.index_bytes)):
            with (folder / name).open("wb") as file:
                file.truncate(size)
    counts = tuple(int(n) for n in rng.integers(100, 1_000_000, 527))
    split = SplitIndex(
        clips=num_clips,
        seconds=float(num_clips * CLIP_SECONDS),
        class_counts=counts,
        log_mel=LogMelMoments(MEAN, STD, num_clips * 998),
        shards=tuple(entries),
        class_weights=tuple(class_weight(count) for count in counts),
        sample_weights=rng.uniform(0.001, 10, num_clips).astype(np.float32),
    )
    names = tuple(f"class {number}" for number in range(527))
    write_dataset(DatasetIndex(FORMAT_VERSION, SAMPLE_RATE_HZ, names, {"train": split}, 0, folder))
    return folder
