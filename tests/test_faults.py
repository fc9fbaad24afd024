"""What damage does to a run: strict it ends in one sentence, tolerant it is counted, and never is a wrong sample used.

The rows are those of docs/reliability.md. Every trial reads through the same stream as training.
"""

import contextlib
import csv
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import zstandard
from fault_table import Count
from verifying import verify_shard
from xxhash import xxh3_64_hexdigest

from asda.config.data import DataConfig
from asda.data import prefetch as reader
from asda.data.clips import Clip, ClipDataset, DamageBudget, read_clips
from asda.data.order import Draw
from asda.data.shards.index import DatasetIndex, tagged_hash
from asda.data.shards.read import ShardFile, load_dataset
from asda.data.stream import training_batches
from asda.errors import UserError
from asda.sharding.writer import write_dataset

ROOT = Path(__file__).resolve().parent.parent
NUM_CLIPS = 48  # of the split train of the fixture `shards`, in 3 shards
BATCH, MICRO_BATCH = 12, 6


@dataclass
class Target:
    """A copy of the shards that a test may damage, and what they held."""

    folder: Path
    samples: dict[str, bytes]  # key -> what its clip holds

    @property
    def dataset(self) -> DatasetIndex:
        return load_dataset(self.folder, tolerant=True)

    @property
    def shard(self) -> ShardFile:
        """The one that is damaged: the second of three."""
        return ShardFile(self.folder, self.dataset.splits["train"].shards[1])

    @property
    def first_clip(self) -> int:
        return self.dataset.splits["train"].shards[0].clips

    def epoch(self, **config: object) -> tuple[list[Clip], DamageBudget]:
        """Read each clip once, as training does."""
        data = DataConfig(train=f"{self.folder}:train", frames=256, **config)  # type: ignore[arg-type]
        tolerant = data.max_damaged > 0
        dataset = ClipDataset(f"{self.folder}:train", labelled=False, tolerant=tolerant)
        budget = DamageBudget(int(data.max_damaged * len(dataset)))
        shape = {"batch": BATCH, "micro_batch": MICRO_BATCH, "rank": 0, "world_size": 1}
        batches = training_batches(dataset, data, seed=1, first_step=0, **shape, masks=None, budget=budget)  # type: ignore[arg-type]
        return [clip for b in itertools.islice(batches, NUM_CLIPS // MICRO_BATCH) for clip in b.clips], budget

    def wrong(self, clips: list[Clip]) -> int:
        """Clips whose samples are not those that were written."""
        return sum(self.samples[clip.key] != clip.samples.tobytes() for clip in clips)


@pytest.fixture(scope="module")
def samples(shards: Path) -> dict[str, bytes]:
    dataset = ClipDataset(f"{shards}:train", labelled=False)
    clips = read_clips(dataset, [Draw(0, number) for number in range(len(dataset))])
    return {clip.key: clip.samples.tobytes() for clip in clips}


@pytest.fixture
def target(shards: Path, samples: dict[str, bytes], tmp_path: Path) -> Target:
    shutil.copytree(shards, tmp_path / "copy")
    return Target(tmp_path / "copy", samples)


@contextlib.contextmanager
def damaged(path: Path, damage: Callable[[bytes], bytes]) -> Iterator[None]:
    """Change a file in its place, and put it back."""
    before = path.read_bytes()
    path.write_bytes(damage(before))
    yield
    path.write_bytes(before)


def refused(action: Callable[[], object], *words: str) -> bool:
    """Whether it ends in one sentence with these words in it."""
    try:
        action()
    except UserError as error:
        return "\n" not in str(error) and all(word in str(error) for word in words)
    return False


def cuts(target: Target, where: list[int], count: Callable[[int, int, int], None]) -> None:
    """Cut the shard at each place: strict refuses before the first clip, tolerant counts just the clips cut off."""
    shard, detected, lost = target.shard, 0, 0
    path, stops = Path(shard.path), shard.index.offsets[1:]
    for number, cut in enumerate(where):
        with damaged(path, lambda data, cut=cut: data[:cut]):
            detected += refused(target.epoch, shard.entry.name)
            if number % 5 == 0:  # an epoch takes longer than a refusal
                clips, budget = target.epoch(max_damaged=0.5)
                cut_off = {target.first_clip + n for n, stop in enumerate(stops) if stop > cut}
                lost += target.wrong(clips) + (len(clips) != NUM_CLIPS) + (budget.met != cut_off)
    count(len(where), detected, lost)


def test_a_shard_cut_anywhere(target: Target, count_fault: Count) -> None:
    size = target.shard.entry.bytes
    where = random.Random(1).sample(range(size), 50)
    cuts(target, where, lambda *counts: count_fault("1", "shard cut off at any byte", *counts))


def test_a_shard_cut_between_two_clips(target: Target, count_fault: Count) -> None:
    where = list(target.shard.index.offsets)
    cuts(target, where, lambda *counts: count_fault("2", "shard cut off between two clips", *counts))


def flips(target: Target, damages: list[tuple[int, Callable[[bytes], bytes]]]) -> tuple[int, int, int]:
    """Damage bytes that begin at each place. Returns trials, how many were detected, and wrong or missing clips."""
    shard, detected, lost = target.shard, 0, 0
    dataset, path, offsets = target.dataset, Path(shard.path), shard.index.offsets
    clips_by_number = ClipDataset(f"{target.folder}:train", labelled=False)
    for number, (where, damage) in enumerate(damages):
        hit = int(np.searchsorted(offsets, where, side="right")) - 1
        with damaged(path, damage):
            seen = refused(lambda: verify_shard(dataset, shard.entry), shard.entry.name)
            if hit < shard.entry.clips:  # behind that lies the end frame, which holds no clip
                draw = Draw(0, target.first_clip + hit)
                key = shard.index.keys[hit]
                seen &= refused(lambda draw=draw: read_clips(clips_by_number, [draw]), shard.entry.name, key)
            if number % 10 == 0:
                clips, budget = target.epoch(max_damaged=0.5)
                lost += target.wrong(clips) + (len(clips) != NUM_CLIPS)
                seen &= (target.first_clip + hit in budget.met) == (hit < shard.entry.clips)
        detected += seen
    return len(damages), detected, lost


def test_any_bit_flipped(target: Target, count_fault: Count) -> None:
    rng = random.Random(2)

    def flip(where: int) -> tuple[int, Callable[[bytes], bytes]]:
        bit = 1 << rng.randrange(8)
        return where, lambda data: data[:where] + bytes([data[where] ^ bit]) + data[where + 1 :]

    size = target.shard.entry.bytes
    count_fault(
        "4", "one bit flipped anywhere in a shard", *flips(target, [flip(rng.randrange(size)) for _ in range(200)])
    )


def test_a_hole_of_zeros(target: Target, count_fault: Count) -> None:
    rng = random.Random(3)

    def hole(where: int) -> tuple[int, Callable[[bytes], bytes]]:
        return where, lambda data: data[:where] + bytes(512) + data[where + 512 :]

    size = target.shard.index.offsets[-1] - 512
    holes = [hole(rng.randrange(size)) for _ in range(20)]
    count_fault("3", "512 zero bytes anywhere in a shard", *flips(target, holes))


def test_missing_files(target: Target, count_fault: Count) -> None:
    names = [f"train-{number:06d}{suffix}" for number in range(3) for suffix in (".tar.zst", ".json")]
    detected = lost = 0
    for name in names:
        kept = (target.folder / name).rename(target.folder / "kept")
        detected += refused(target.epoch, name)
        clips, budget = target.epoch(max_damaged=0.5)
        lost += target.wrong(clips) + (len(clips) != NUM_CLIPS)
        in_memory = name.endswith(".json")  # an index that was read is kept; a new process would miss it
        lost += len(budget.met) not in ((0, 16) if in_memory else (16,))
        detected -= not refused(lambda: target.epoch(max_damaged=0.1), "max_damaged") and not in_memory
        kept.rename(target.folder / name)
    count_fault("6a", "a shard or its index missing", len(names), detected, lost)


def test_nothing_but_damage_ends_and_does_not_loop(target: Target, count_fault: Count) -> None:
    for path in target.folder.glob("train-*.tar.zst"):
        path.write_bytes(bytes(path.stat().st_size))
    started = time.monotonic()
    detected = refused(lambda: target.epoch(max_damaged=1.0), "no intact clip") + refused(
        target.epoch, "damaged at key"
    )
    assert time.monotonic() - started < 10
    count_fault("6b", "all shards bad, also where all may be", 2, detected)


def test_slow_reads_change_nothing_but_the_time(
    target: Target, count_fault: Count, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = [clip.draw for clip in target.epoch()[0]]
    read, rng = ShardFile.read_frame, random.Random(4)

    def slowly(self: ShardFile, number: int) -> bytes:
        time.sleep(0.6 if rng.random() < 0.05 else 0.001)
        return read(self, number)

    monkeypatch.setattr(ShardFile, "read_frame", slowly)
    monkeypatch.setattr(reader, "STALL_S", 0.2)
    clips, _ = target.epoch()
    warned = "waiting for data for" in capfd.readouterr().err
    count_fault(
        "11",
        "reads that stall now and then",
        1,
        int(warned),
        target.wrong(clips) + (expected != [c.draw for c in clips]),
    )


def test_a_thread_that_runs_out_of_memory_is_named(
    target: Target, count_fault: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ShardFile, number: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(ShardFile, "read_frame", fail)
    started = time.monotonic()
    detected = refused(target.epoch, "asda-reader-", "memory", "train-0000")
    assert time.monotonic() - started < 5
    count_fault("12", "a reading thread out of memory", 1, int(detected))


def test_a_read_that_never_ends_is_named(target: Target, count_fault: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(ShardFile, "read_frame", lambda self, number: released.wait())
    started = time.monotonic()
    detected = refused(lambda: target.epoch(timeout_s=1.0), "no data for 1 s", "asda-reader-", "train-0000")
    assert time.monotonic() - started < 6
    released.set()
    count_fault("13", "a read that never ends", 1, int(detected))


def forge(target: Target, number: int, frame: bytes, **index_values: object) -> str:
    """Put a frame into the shard and let all hashes and sizes vouch for it; returns the key that it stands under."""
    shard, dataset = target.shard, target.dataset
    index, data = shard.index, Path(shard.path).read_bytes()
    starts = [*index.offsets, len(data)]
    frames = [data[a:b] for a, b in itertools.pairwise(starts)]
    frames[number] = frame
    content = b"".join(frames)
    Path(shard.path).write_bytes(content)
    forged = {
        "offsets": tuple(itertools.accumulate((len(f) for f in frames[:-1]), initial=0)),
        "hashes": tuple(xxh3_64_hexdigest(f) for f in frames[:-1]),
        "bytes": len(content),
        "hash": tagged_hash(content),
    }
    text = json.dumps(asdict(index) | forged | index_values).encode()
    (target.folder / shard.entry.index_name).write_bytes(text)
    entry = replace(
        shard.entry, bytes=len(content), hash=tagged_hash(content), index_bytes=len(text), index_hash=tagged_hash(text)
    )
    train = dataset.splits["train"]
    shards = tuple(entry if e.name == entry.name else e for e in train.shards)
    write_dataset(replace(dataset, splits={**dataset.splits, "train": replace(train, shards=shards)}))
    return index.keys[number]


def zstd(content: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)  # type: ignore[arg-type]


def half_clips(target: Target) -> Iterator[tuple[str, bytes]]:
    """Frames without one of their two members, with one twice, with the other clip's, and with none."""
    wav, described, other = (members(target, number) for number in (0, 0, 1))
    wav, described, other = wav[0], described[1], other[0]
    yield "the wav is missing", zstd(described)
    yield "the json is missing", zstd(wav)
    yield "the wav is there twice", zstd(wav + wav + described)
    yield "another clip's wav", zstd(other + described)
    yield "nothing", zstd(b"")
    yield "no tar", zstd(bytes(2048))


def members(target: Target, number: int) -> tuple[bytes, bytes]:
    """The two tar members of a clip."""
    frame = target.shard.read_frame(number)
    size = int(frame[124:136].rstrip(b"\0 "), 8)
    end = 512 + size + -size % 512
    return frame[:end], frame[end:]


def test_half_clips_under_right_hashes(shards: Path, samples: dict, tmp_path: Path, count_fault: Count) -> None:
    trials = detected = lost = 0
    kinds = list(half_clips(Target(shards, samples)))
    for number, (name, frame) in enumerate(kinds):
        target = Target(tmp_path / str(number), samples)
        shutil.copytree(shards, target.folder)
        key = forge(target, 0, frame)
        seen = refused(lambda target=target: verify_shard(target.dataset, target.shard.entry), key)
        reads_wrong = name in ("the json is missing", "the wav is there twice")  # of no use to training, which has both
        seen &= reads_wrong or refused(target.epoch, key)
        clips, _ = target.epoch(max_damaged=0.5)
        trials, detected, lost = trials + 1, detected + seen, lost + target.wrong(clips) + (len(clips) != NUM_CLIPS)
    count_fault("5a", "half a clip, or two, whose hashes are right", trials, detected, lost)


def test_keys_that_come_twice(target: Target, count_fault: Count) -> None:
    index = target.shard.index
    keys = (index.keys[1], *index.keys[1:])
    forge(target, 0, zstd(target.shard.read_frame(1)), keys=keys)
    count_fault("5b", "a key twice in an index", 1, refused(target.epoch, target.shard.entry.index_name, "twice"))


def test_frames_that_are_cut_or_changed_under_right_hashes(
    shards: Path, samples: dict, tmp_path: Path, count_fault: Count
) -> None:
    rng = random.Random(7)
    intact = zstd(Target(shards, samples).shard.read_frame(0))
    damages = [intact[: rng.randrange(len(intact))] for _ in range(10)]
    for _ in range(20):
        where = rng.randrange(len(intact))
        damages.append(intact[:where] + bytes([intact[where] ^ 1 << rng.randrange(8)]) + intact[where + 1 :])
    detected = lost = 0
    for number, frame in enumerate(damages):
        target = Target(tmp_path / str(number), samples)
        shutil.copytree(shards, target.folder)
        key = forge(target, 0, frame or b"?")
        dataset = ClipDataset(f"{target.folder}:train", labelled=False)
        try:
            clips = read_clips(dataset, [Draw(0, target.first_clip)])
            lost += target.wrong(clips)
            detected += target.wrong(clips) == 0  # zstd has a few bits that mean nothing
        except UserError as error:
            detected += key in str(error)
        shutil.rmtree(target.folder)
    count_fault("7", "a zstd frame cut or changed, whose hashes are right", len(damages), detected, lost)


def test_bombs_are_refused_before_they_are_unpacked(target: Target, count_fault: Count) -> None:
    zeros = bytes(1 << 20)
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compressobj(size=1 << 30)
    large = b"".join(compressor.compress(zeros) for _ in range(1 << 10)) + compressor.flush()
    unsized = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    without_size = b"".join(unsized.compress(zeros) for _ in range(1 << 10)) + unsized.flush()
    # RFC 8878: magic number, a descriptor that asks for a window, 2 GiB as the window, one empty last block.
    wide = bytes.fromhex("28b52ffd") + bytes([0x04, (31 - 10) << 3, 0x01, 0x00, 0x00]) + bytes(4)
    detected = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in (large, without_size, wide):
        key = forge(target, 0, bomb)
        dataset = ClipDataset(f"{target.folder}:train", labelled=False)
        detected += refused(lambda dataset=dataset: read_clips(dataset, [Draw(0, target.first_clip)]), key)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 << 10
    count_fault("8", "zstd bombs: 1 GiB of zeros, without a size, a window of 2 GiB", 3, detected)


def hostile_files(folder: Path) -> list[str]:
    """Files that break a rule each; their names."""
    rng = np.random.default_rng(0)
    noise_S = (0.1 * rng.standard_normal(16_000)).astype(np.float32)

    def write(name: str, samples: np.ndarray = noise_S, rate: int = 16_000, **options: str) -> bytes:
        soundfile.write(folder / name, samples, rate, **options)
        return (folder / name).read_bytes()

    flac = write("frames_2_36.flac")
    (folder / "frames_2_36.flac").write_bytes(flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff" * 4 + flac[26:])
    write("rate_1_hz.wav", rate=1)
    wav = write("channels_60000.wav", subtype="PCM_16")
    (folder / "channels_60000.wav").write_bytes(wav[:22] + (60_000).to_bytes(2, "little") + wav[24:])
    write("nan.wav", np.full(16_000, np.nan, np.float32), subtype="FLOAT")
    write("infinite.wav", np.full(16_000, np.inf, np.float32), subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "page.wav").write_text("<html><body>404 Not Found</body></html>")
    flac = write("cut.flac")
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    wav = write("cut.wav", subtype="PCM_16")
    (folder / "cut.wav").write_bytes(wav[:9_000])
    write("too_short.wav", noise_S[:399])
    write("too_long.wav", np.zeros(16_000 * 61, np.float32))
    return [path.name for path in folder.iterdir()]


def test_hostile_audio_is_rejected_with_its_reason(tmp_path: Path, count_fault: Count) -> None:
    (tmp_path / "audio").mkdir()
    names = hostile_files(tmp_path / "audio")
    soundfile.write(tmp_path / "audio" / "good.wav", np.zeros(16_000, np.float32), 16_000)
    tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "folder", "--input", tmp_path / "audio"]
    options = ["--out", tmp_path / "shards", "--max-seconds", "60", "--workers", "1"]
    subprocess.run([*tool, *options], check=True, capture_output=True, timeout=120)
    with (tmp_path / "shards" / "rejected.csv").open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    detected = sum(len(reasons.get(name, "")) > 8 for name in names)
    lost = load_dataset(tmp_path / "shards").splits["train"].clips != 1
    count_fault("9", "hostile audio files, in make_shards.py", len(names), detected, int(lost))
