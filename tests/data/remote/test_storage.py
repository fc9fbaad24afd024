"""Shards from anywhere: whatever network, disk and other processes do, the bytes are right or one sentence says why."""

import fcntl
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serving
from verifying import verify_shard

from asda.data.audio.waves import encode_wav
from asda.data.remote import cache as cache_module
from asda.data.remote import fetch as fetch_module
from asda.data.remote.cache import Cache, CacheConfig, StoredFile
from asda.data.remote.storage import LocalFolder, open_storage
from asda.data.shards.index import DatasetIndex, tagged_hash
from asda.data.shards.read import ShardFile, load_dataset
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.writer import summarize_split, write_dataset, write_shard

NUM_SHARDS, NUM_CLIPS = 5, 4
KIB = 1 << 10

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> DatasetIndex:
    """Five shards of four clips of noise, about 150 KiB each: several network packets."""
    folder, rng = tmp_path_factory.mktemp("served"), np.random.default_rng(4)
    written = []
    for shard in range(NUM_SHARDS):
        clips = []
        for number in range(NUM_CLIPS):
            source = folder / "source.wav"  # written again for every shard; only its content counts
            source = source.with_name(f"{shard}-{number}.wav")
            source.write_bytes(encode_wav(rng.integers(-9999, 9999, 20_000).astype(np.int16)))
            clips.append(ClipTask(f"clip-{shard}-{number}", Place(str(source)), source.name, ("noise",), (0,)))
        written.append(write_shard(ShardTask(folder / f"train-{shard:06}.tar.zst", tuple(clips), max_seconds=2)))
    write_dataset(DatasetIndex(2, 16_000, ("noise",), {"train": summarize_split(written, 1)}, 0, folder))
    return load_dataset(folder)


@pytest.fixture(scope="module")
def frames(local) -> dict[tuple[int, int], bytes]:
    """What every read must give."""
    return {(s, n): shard.read_frame(n) for s, shard in enumerate(shards_of(local)) for n in range(NUM_CLIPS)}


@pytest.fixture
def server(local):
    with serving(local.folder) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The first wait is 10 ms instead of half a second."""
    monkeypatch.setattr(fetch_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def cache(tmp_path) -> CacheConfig:
    return CacheConfig(tmp_path / "cache", timeout_s=0.4, attempts=4)


def shards_of(dataset: DatasetIndex) -> list[ShardFile]:
    return [ShardFile(dataset.folder, entry) for entry in dataset.splits["train"].shards]


def sentence(action, *args) -> str:
    with pytest.raises(UserError) as error:
        action(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def cached(config: CacheConfig) -> list[str]:
    return sorted(path.name for path in config.path.iterdir() if path.name != "lock")


def test_every_way_of_reading_gives_the_same_bytes(local, server, cache, frames):
    ways = [(str(local.folder), None), (f"file://{local.folder}", None), (server.url, None), (server.url + "/", cache)]
    for location, config in ways:
        dataset = load_dataset(location, ["train"], config)
        assert dataset == local or config or location == server.url
        for s, shard in enumerate(shards_of(dataset)):
            assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [frames[s, n] for n in range(NUM_CLIPS)]
            verify_shard(dataset, shard.entry)


def test_a_shard_and_its_index_are_fetched_once_and_kept_for_the_next_run(server, cache, frames):
    for _ in range(2):
        for s, shard in enumerate(shards_of(load_dataset(server.url, None, cache))):
            assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [frames[s, n] for n in range(NUM_CLIPS)]
    assert server.requests.pop("dataset.json") == 2  # it may have changed
    assert set(server.requests.values()) == {1}
    assert len(server.requests) == len(cached(cache)) == 2 * NUM_SHARDS


PASSING = ["reset", "short", "long", "less", "page", "flip", "stall", 500, 503, 429]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(server, cache, frames, caplog, fault):
    shard = shards_of(load_dataset(server.url, None, cache))[0]
    server.faults[shard.entry.name] = [fault, fault]
    server.faults[shard.entry.index_name] = [fault]
    with caplog.at_level(logging.WARNING, "asda"):
        assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [frames[0, n] for n in range(NUM_CLIPS)]
    assert (server.requests[shard.entry.name], server.requests[shard.entry.index_name]) == (3, 2)
    assert len(caplog.messages) == 3
    assert all("attempt " in line and server.url in line and "\n" not in line for line in caplog.messages)
    assert len(cached(cache)) == 2


REASONS = {
    "reset": "ClientPayloadError|Connection reset|ClientOSError",
    "short": "ClientPayloadError",
    "long": "ClientPayloadError",
    "less": r"\d+ of \d+ bytes arrived",
    "page": "66 of .* bytes arrived, which look like a web page",
    "flip": "its hash is [0-9a-f]{32}, the index says",
    "stall": "nothing arrived for 0.4 s|did not answer in time",
    "drip": r"only \d+ bytes arrived in 0\.4 s",
    503: "HTTP status 503",
}


@pytest.mark.parametrize("fault", REASONS)
def test_what_does_not_pass_ends_in_one_sentence_and_leaves_nothing(server, cache, fault):
    shard = shards_of(load_dataset(server.url, None, cache))[1]
    assert shard.index
    server.faults[shard.entry.name] = [fault] * 100
    with pytest.raises(UserError, match=REASONS[fault]) as error:
        shard.read_frame(0)
    assert f"cannot fetch {server.url}/train-000001.tar.zst: " in str(error.value)
    assert "(4 attempts in " in str(error.value)
    assert server.requests[shard.entry.name] == 4
    assert len(cached(cache)) == 1  # the index


@pytest.mark.parametrize(("status", "words"), [(404, "no such file"), (403, "status 403"), (401, "status 401")])
def test_what_cannot_succeed_is_asked_for_once(server, cache, status, words):
    shard = shards_of(load_dataset(server.url, None, cache))[1]
    server.faults[shard.entry.index_name] = [status]
    assert words in sentence(shard.read_frame, 0)
    server.faults["dataset.json"] = [status]
    assert f"cannot fetch {server.url}/dataset.json: " in sentence(load_dataset, server.url)
    assert server.requests[shard.entry.index_name] == 1


def test_30_random_schedules_of_faults_lose_and_repeat_nothing(server, tmp_path, frames, count_fault):
    rng, num_faults = random.Random(7), 0
    for trial in range(30):
        config = CacheConfig(tmp_path / str(trial), timeout_s=0.3, attempts=4)
        shard = shards_of(load_dataset(server.url, None, config))[trial % NUM_SHARDS]
        for name in (shard.entry.name, shard.entry.index_name):
            faults = rng.choices([fault for fault in PASSING if fault != "stall"], k=rng.randrange(4))
            server.faults[name] = faults.copy()
            num_faults += len(faults)
        assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [
            frames[trial % NUM_SHARDS, n] for n in range(NUM_CLIPS)
        ]
    met = num_faults - sum(map(len, server.faults.values()))  # each was followed by another request
    count_fault("10", "a server's 5xx and 429, resets, short and wrong bodies", num_faults, met)


def test_single_frames_are_fetched_alone_where_nothing_is_kept(server, frames):
    shard = shards_of(load_dataset(server.url))[2]
    server.faults[shard.entry.name] = ["flip", 503]
    assert shard.read_frame(3) == frames[2, 3]  # a flipped bit is asked for again, as everything else
    assert server.requests[shard.entry.name] == 3
    with serving(server.folder, ranges=False) as whole:
        refused = sentence(shards_of(load_dataset(whole.url))[0].read_frame, 1)
        assert "does not send parts of files; read it through a cache" in refused


def test_credentials_are_used_and_never_shown(server, tmp_path, caplog):
    config = CacheConfig(tmp_path / "cache", attempts=2)
    location = server.url.replace("//", "//Alice:open%20sesame@") + "/my data/?sig=se%2Fcret&x=1"
    caplog.set_level(logging.DEBUG)  # of the packages below too, as far as they name addresses in warnings
    dataset = load_dataset(location, None, config)
    shard = shards_of(dataset)[0]
    server.faults[shard.entry.name] = ["short", 403]
    said = [str(dataset.folder), str(shard.path), sentence(shard.read_frame, 0)]
    server.faults["dataset.json"] = [503, 503]
    said.append(sentence(load_dataset, location, None, config))
    said.append(sentence(open_storage, f"simplecache::{location}"))
    said += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 7
    assert not [text for text in said if "sesame" in text or "Alice" in text or "cret" in text]
    assert {query for query, _ in server.seen if "dataset" in query} == {"/my%20data/dataset.json?sig=se%2Fcret&x=1"}
    assert {authorization for _, authorization in server.seen} == {"Basic QWxpY2U6b3BlbiBzZXNhbWU="}


def test_concurrent_readers_of_a_shard_wait_for_one_download(server, cache, frames):
    shards = shards_of(load_dataset(server.url, None, cache))
    server.hold = threading.Event()
    with ThreadPoolExecutor(16) as pool:
        reads = {(s, n): pool.submit(shards[s].read_frame, n) for s in range(2) for n in range(NUM_CLIPS) for _ in "ab"}
        time.sleep(0.2)
        server.hold.set()
        assert {place: read.result(timeout=20) for place, read in reads.items()} == {p: frames[p] for p in reads}
    assert all(
        server.requests[shard.entry.name] == server.requests[shard.entry.index_name] == 1 for shard in shards[:2]
    )


def test_prefetching_is_bounded_and_saves_the_reader_the_wait(server, tmp_path, frames):
    config = CacheConfig(tmp_path / "cache", downloads=2)
    shards = shards_of(load_dataset(server.url, None, config))
    for shard in shards:
        shard.prefetch()
        shard.prefetch()
    deadline = time.monotonic() + 20
    while len(cached(config)) < 2 * NUM_SHARDS or any(name.endswith(".part") for name in cached(config)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.most_at_once <= 2
    before = server.requests.total()
    assert shards[4].read_frame(1) == frames[4, 1]
    assert server.requests.total() == before


def test_a_reader_does_not_queue_behind_what_is_fetched_ahead(server, tmp_path, frames):
    config = CacheConfig(tmp_path / "cache", downloads=1, timeout_s=20)
    shards = shards_of(load_dataset(server.url, None, config))
    server.faults[shards[0].entry.index_name] = ["stall"]
    for shard in shards:
        shard.prefetch()  # all wait behind a stalled one
    time.sleep(0.1)
    assert shards[3].read_frame(0) == frames[3, 0]
    assert server.requests[shards[3].entry.name] == 1
    server.released.set()
    assert shards[0].read_frame(0) == frames[0, 0]


def size_of(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a reader gave up its empty .part, because the file had come
        return 0


def test_the_bound_holds_at_every_moment_while_readers_push_each_other_out(server, local, tmp_path, frames):
    largest = max(entry.bytes for entry in local.splits["train"].shards)
    bound = int(2.5 * largest)
    config = CacheConfig(tmp_path / "cache", gib=bound / (1 << 30))
    shards = shards_of(load_dataset(server.url, None, config))
    sizes, done = [], threading.Event()

    def watch():
        while not done.is_set():
            with (config.path / "lock").open("a") as lock:  # or files come between one look and the next
                fcntl.flock(lock, fcntl.LOCK_EX)
                sizes.append(sum(size_of(entry) for entry in os.scandir(config.path)))
            time.sleep(0.002)

    def read(seed: int) -> bool:
        rng = random.Random(seed)
        places = [(rng.randrange(NUM_SHARDS), rng.randrange(NUM_CLIPS)) for _ in range(25)]
        return all(shards[s].read_frame(n) == frames[s, n] for s, n in places)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    done.set()
    watcher.join()
    assert largest < max(sizes) <= bound
    assert sum(server.requests[shard.entry.name] for shard in shards) > NUM_SHARDS  # they did push each other out


def test_the_least_recently_used_file_goes_first(tmp_path):
    files = [StoredFile(str(n), 10, tagged_hash(bytes([n]) * 10)) for n in range(5)]
    cache = Cache(tmp_path / "cache", 30)
    (cache.folder / "thesis.txt").write_text("not ours, and larger than the bound: neither counted nor removed")

    def fill(n: int):
        cache.fill(files[n], lambda _, part: part.write(bytes([n]) * 10) and None)

    for n in (0, 1, 2):
        fill(n)
    assert cache.read(files[0], 2, 4) == b"\0\0"
    fill(3)
    assert cache.holds(files[2])
    fill(4)
    assert {n for n, file in enumerate(files) if cache.path(file).exists()} == {2, 3, 4}
    assert (cache.folder / "thesis.txt").exists()


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path):
    file = StoredFile("a", 10, tagged_hash(b"0123456789"))
    cache = Cache(tmp_path, 30)
    cache.fill(file, lambda _, part: part.write(b"0123456789") and None)
    with cache.path(file).open("rb") as reader:
        cache.path(file).unlink()
        assert reader.read() == b"0123456789"
    assert cache.read(file, 0, 10) is None


READ_ALL = """
import json, sys
from asda.data.remote.cache import CacheConfig, StoredFile
from asda.data.shards.index import tagged_hash
from asda.data.remote.storage import open_storage
storage = open_storage(sys.argv[1], CacheConfig(sys.argv[2], timeout_s=60))
print("open", flush=True)
sys.stdin.readline()
for file in (StoredFile(*fields) for fields in json.loads(sys.argv[3])):
    assert tagged_hash(storage.read_whole(file)) == file.hash
"""


def start_reader(url: str, folder: Path, local: DatasetIndex) -> subprocess.Popen:
    """A process that reads all shards through the cache, without the packages that decode them: those take seconds."""
    files = json.dumps([(entry.name, entry.bytes, entry.hash) for entry in local.splits["train"].shards])
    arguments = [sys.executable, "-c", READ_ALL, url, str(folder), files]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*readers: subprocess.Popen):
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()


def test_two_processes_share_a_cache_and_a_killed_one_leaves_nothing_in_the_way(server, local, tmp_path):
    config = CacheConfig(tmp_path / "cache")
    first, second, killed = (start_reader(server.url, config.path, local) for _ in range(3))
    last = local.splits["train"].shards[-1].name
    server.faults[last] = ["stall"]
    go(killed)
    while not server.requests[last]:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [name for name in cached(config) if name.endswith(".part")]
    for path in config.path.iterdir():
        path.unlink() if not path.name.endswith(".part") else None
    server.requests.clear()
    go(first, second)
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert set(server.requests.values()) == {1}
    assert len(cached(config)) == NUM_SHARDS
    assert not [name for name in cached(config) if name.endswith(".part")]


def test_what_a_crash_left_is_swept_and_what_another_is_fetching_is_not(tmp_path):
    abandoned, busy = (tmp_path / (digit * 32 + ".part") for digit in "ab")
    abandoned.write_bytes(b"half")
    busy.write_bytes(b"half")
    with busy.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Cache(tmp_path, 100)
        assert (abandoned.exists(), busy.exists()) == (False, True)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_copy_is_fetched_again_once(server, cache, frames, damage):
    shard = shards_of(load_dataset(server.url, None, cache))[0]
    assert shard.read_frame(2) == frames[0, 2]
    copy = cache.path / shard.entry.hash.rpartition(":")[2]
    content = bytearray(copy.read_bytes())
    content[shard.index.offsets[2] + 9] ^= 1
    copy.write_bytes({"flip": bytes(content), "truncate": content[: shard.index.offsets[2]], "empty": b""}[damage])
    assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [frames[0, n] for n in range(NUM_CLIPS)]
    assert server.requests[shard.entry.name] == 2
    assert tagged_hash(copy.read_bytes()) == shard.entry.hash


def test_a_server_whose_shard_is_damaged_is_not_asked_for_ever(local, cache, tmp_path):
    (tmp_path / "served").mkdir()
    for path in local.folder.iterdir():
        (tmp_path / "served" / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "served" / "train-000000.tar.zst"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with serving(tmp_path / "served") as server:
        damaged = shards_of(load_dataset(server.url, None, cache))[0]
        assert "its hash is" in sentence(damaged.read_frame, 0)
        assert server.requests["train-000000.tar.zst"] == 4


def test_a_cache_that_is_too_small_or_on_a_full_disk_says_so(server, tmp_path, monkeypatch):
    small = shards_of(load_dataset(server.url, None, CacheConfig(tmp_path / "small", gib=100 * KIB / (1 << 30))))[0]
    assert f"may hold {100 * KIB}; raise data.cache_gib" in sentence(small.read_frame, 0)

    full = CacheConfig(tmp_path / "full")
    shard = shards_of(load_dataset(server.url, None, full))[0]
    assert shard.index
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: cache_module.shutil._ntuple_diskusage(9, 8, 1000))
    assert f"has 1000 bytes free, {shard.entry.name} needs {shard.entry.bytes}; free" in sentence(shard.read_frame, 0)
    monkeypatch.undo()

    (tmp_path / "a file").write_text("")
    assert "cannot use the cache" in sentence(open_storage, server.url, CacheConfig(tmp_path / "a file"))


def test_a_disk_that_fills_up_on_the_way_is_no_reason_to_ask_the_server_again(server, cache):
    shard = shards_of(load_dataset(server.url, None, cache))[0]
    assert shard.index
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50 * KIB, before[1]))
    try:
        refused = sentence(shard.read_frame, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot use the cache {cache.path}: File too large; free some space" in refused
    assert server.requests[shard.entry.name] <= 1
    assert len(cached(cache)) == 1


@pytest.mark.parametrize(
    "location",
    ["pipe://touch {canary}", "simplecache::http://127.0.0.1/x", "github://a:b@c/d", "s3://a::zip://b", "local://x"],
)
def test_only_known_schemes_are_opened(tmp_path, location):
    canary = tmp_path / "canary"
    assert "a location is a folder or begins with file://, http://" in sentence(
        open_storage, location.format(canary=canary)
    )
    assert not canary.exists()


def test_a_location_without_a_scheme_is_a_folder(tmp_path):
    assert open_storage("pipe:touch x") == LocalFolder(Path("pipe:touch x"))
    assert "holds no dataset.json" in sentence(load_dataset, "pipe:touch x")
    assert open_storage(f"file://{tmp_path}/a%20b") == LocalFolder(tmp_path / "a b")


@pytest.mark.parametrize(("location", "package"), [("https://host/x", "aiohttp"), ("s3://bucket/x", "s3fs")])
def test_a_missing_package_is_named(monkeypatch, location, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert sentence(open_storage, location) == f"{location} needs the package {package}: pip install 'asda[remote]'"


def test_local_shards_are_announced_to_the_system(local, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append(args[1:]))
    shards_of(local)[0].prefetch()
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)] * 2


@pytest.fixture(scope="module")
def bucket(local):
    """An S3 server on loopback that holds the shards, and the environment that leads s3fs to it."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="sounds")
        for path in local.folder.glob("*[!v]"):
            client.put_object(Bucket="sounds", Key=f"mine/{path.name}", Body=path.read_bytes())
        yield client
    server.stop()


def test_shards_of_a_bucket_are_read_through_a_cache_and_frame_by_frame(bucket, cache, frames, monkeypatch):
    monkeypatch.setattr(fetch_module, "PIECE_BYTES", 64 * KIB)  # so that a shard takes several requests
    for config in (CacheConfig(cache.folder), None):
        dataset = load_dataset("s3://sounds/mine", None, config)
        for s, shard in enumerate(shards_of(dataset)):
            shard.prefetch()
            assert [shard.read_frame(n) for n in range(NUM_CLIPS)] == [frames[s, n] for n in range(NUM_CLIPS)]
        verify_shard(dataset, dataset.splits["train"].shards[0])


def test_a_bucket_s_faults_end_in_a_sentence(bucket, tmp_path, local):
    config = CacheConfig(tmp_path / "cache", attempts=2)
    assert "no such file (not tried again)" in sentence(load_dataset, "s3://sounds/nowhere", None, config)
    assert "no such file (not tried again)" in sentence(load_dataset, "s3://nobucket/mine", None, config)
    shard = shards_of(load_dataset("s3://sounds/mine", None, config))[4]
    content = (local.folder / shard.entry.name).read_bytes()
    bucket.put_object(Bucket="sounds", Key=f"mine/{shard.entry.name}", Body=content[:-1] + b"x")
    assert "its hash is" in sentence(shard.read_frame, 0)
    bucket.put_object(Bucket="sounds", Key=f"mine/{shard.entry.name}", Body=content[:-5000])
    assert f"{len(content) - 5000} of {len(content)} bytes arrived" in sentence(shard.read_frame, 0)
    bucket.put_object(Bucket="sounds", Key=f"mine/{shard.entry.name}", Body=content)
    assert shard.read_frame(0)


def test_a_bucket_that_cannot_be_reached_is_given_up(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    for name, value in (("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    began = time.monotonic()
    refused = sentence(load_dataset, "s3://sounds/mine", None, CacheConfig(tmp_path, attempts=3, timeout_s=1))
    assert "3 attempts in" in refused
    assert "AKIA" not in refused
    assert time.monotonic() - began < 10
