"""The shard format: readable by common tools, and no damaged byte gets through."""

import io
import json
import random
import re
import resource
import shutil
import subprocess
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from torchaudio.compliance import kaldi
from verifying import verify_shard
from webdataset.compat import WebDataset
from webdataset.tariterators import group_by_keys, tar_file_expander
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from asda.data.audio.read import read_audio
from asda.data.audio.waves import decode_wav, encode_wav
from asda.data.shards.index import MAX_SAMPLE_BYTES, TAR_END, DatasetIndex, tagged_hash
from asda.data.shards.read import ShardFile, load_dataset, load_shard_index
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.plan import ClipTask, ShardTask
from asda.sharding.writer import summarize_split, write_dataset, write_shard

NUM_CLIPS = 6
VOCABULARY = ("even", "odd")


def build(folder: Path) -> DatasetIndex:
    """A dataset of one shard with six short clips of noise that grows louder, so that zstd has something to do."""
    rng = np.random.default_rng(3)
    clips = []
    for number in range(NUM_CLIPS):
        source = folder / f"{number}.wav"
        source.write_bytes(encode_wav((10**number * rng.standard_normal(800)).clip(-9999, 9999).astype(np.int16)))
        labels = (number % 2,) if number else ()
        clips.append(
            ClipTask(f"clip-{number}", Place(str(source)), source.name, tuple(VOCABULARY[n] for n in labels), labels)
        )
    written = write_shard(ShardTask(folder / "train-000000.tar.zst", tuple(clips), max_seconds=1))
    dataset = DatasetIndex(1, 16_000, VOCABULARY, {"train": summarize_split([written], 2)}, 0, folder)
    write_dataset(dataset)
    return dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DatasetIndex:
    return build(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def broken(dataset, tmp_path) -> DatasetIndex:
    """A copy that a test may damage."""
    shutil.copytree(dataset.folder, tmp_path / "copy")
    return replace(dataset, folder=tmp_path / "copy")


def only_shard(dataset: DatasetIndex) -> ShardFile:
    return ShardFile(dataset.folder, dataset.splits["train"].shards[0])


def sentence(action, *args) -> str:
    with pytest.raises(UserError) as error:
        action(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_written_is_what_is_read(dataset):
    assert load_dataset(dataset.folder) == dataset
    shard = only_shard(dataset)
    verify_shard(dataset, shard.entry)
    assert shard.index.keys == tuple(f"clip-{n}" for n in range(NUM_CLIPS))
    assert shard.index.labels == ((), (1,), (0,), (1,), (0,), (1,))
    assert dataset.splits["train"].class_counts == (2, 3)


def test_every_frame_alone_is_a_tar_of_one_clip(dataset):
    shard = only_shard(dataset)
    for number in range(NUM_CLIPS):
        with tarfile.open(fileobj=io.BytesIO(shard.read_frame(number) + TAR_END)) as tar:
            wav, described = (tar.extractfile(member) for member in tar.getmembers())
            assert tar.getnames() == [f"clip-{number}.wav", f"clip-{number}.json"]
            assert all(m.mtime == m.uid == m.gid == 0 and m.mode == 0o644 and m.type == tarfile.REGTYPE for m in tar)
        assert wav is not None
        assert described is not None
        expected = read_audio(dataset.folder / f"{number}.wav")
        np.testing.assert_array_equal(decode_wav(wav.read()), expected)
        labels = [VOCABULARY[label] for label in shard.index.labels[number]]
        assert json.loads(described.read()) == {"labels": labels, "seconds": 0.05, "source": f"{number}.wav"}


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the command zstd")
def test_the_commands_zstd_and_tar_read_a_shard(dataset):
    shard = only_shard(dataset)
    subprocess.run(["zstd", "-tq", shard.path], check=True)
    plain = subprocess.run(["zstd", "-dc", shard.path], check=True, capture_output=True).stdout
    names = subprocess.run(["tar", "t"], input=plain, check=True, capture_output=True).stdout.decode().split()
    assert names == [f"{key}.{part}" for key in shard.index.keys for part in ("wav", "json")]


def test_plain_webdataset_reads_a_decompressed_shard(dataset, tmp_path):
    shard = only_shard(dataset)
    with (
        shard.path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as plain,
    ):
        (tmp_path / "plain.tar").write_bytes(plain.read())
    samples = list(WebDataset(str(tmp_path / "plain.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(shard.index.keys)
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(decode_wav(sample["wav"]), read_audio(dataset.folder / f"{number}.wav"))


def test_frames_in_any_order_form_a_tar_stream(dataset):
    shard = only_shard(dataset)
    order = random.Random(5).sample(range(NUM_CLIPS), NUM_CLIPS)
    stream = io.BytesIO(b"".join(shard.read_frame(number) for number in order) + TAR_END)
    samples = list(group_by_keys(tar_file_expander([{"url": "frames", "stream": stream}])))
    assert [sample["__key__"] for sample in samples] == [f"clip-{number}" for number in order]


def test_hashes_and_sizes_are_those_of_the_bytes_on_disk(dataset):
    shard = only_shard(dataset)
    data = shard.path.read_bytes()
    offsets = [*shard.index.offsets, len(data)]
    assert len(data) == shard.entry.bytes
    assert f"xxh3_128:{xxh3_128_hexdigest(data)}" == shard.entry.hash
    for number, digest in enumerate(shard.index.hashes):
        frame = data[offsets[number] : offsets[number + 1]]
        declared = zstandard.get_frame_parameters(frame)
        assert xxh3_64_hexdigest(frame) == digest
        assert declared.has_checksum
        assert declared.content_size == len(shard.read_frame(number))


def kaldi_log_mel(samples: np.ndarray) -> np.ndarray:
    wave = torch.from_numpy(samples)[None] / 32768
    options = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
    return kaldi.fbank(wave - wave.mean(), sample_frequency=16_000, **options).double().numpy()


def test_log_mel_statistics_are_those_of_torchaudio_s_values_together(shared, tmp_path):
    paths = sorted((shared / "data/env/esc").glob("*.ogg"))[:5]
    clips = tuple(ClipTask(path.stem, Place(str(path)), path.name, (), ()) for path in paths)
    written = write_shard(ShardTask(tmp_path / "train-000000.tar.zst", clips, max_seconds=6))
    values = np.concatenate([kaldi_log_mel(read_audio(path)) for path in paths])
    stats = summarize_split([written], 0).log_mel
    assert stats.frames == len(values)
    # Single values may differ by 2e-3 at most and by 2e-4 in all but one of 1000 (float32 FFTs), so means by 2e-4.
    np.testing.assert_allclose([stats.mean, stats.std], [values.mean(), values.std()], atol=2e-4)


def test_200_random_bit_flips_are_all_detected_and_located(dataset, broken):
    shard, rng = only_shard(broken), random.Random(11)
    clean = shard.path.read_bytes()
    for _ in range(200):
        byte = rng.randrange(len(clean))
        damaged = bytearray(clean)
        damaged[byte] ^= 1 << rng.randrange(8)
        shard.path.write_bytes(damaged)
        number = sum(offset <= byte for offset in shard.index.offsets) - 1
        assert "train-000000.tar.zst is damaged" in sentence(verify_shard, broken, shard.entry)
        if number < NUM_CLIPS:
            assert f"at key clip-{number} (bytes {shard.index.offsets[number]} to" in sentence(shard.read_frame, number)
            assert shard.read_frame((number + 1) % NUM_CLIPS)


def test_50_random_truncations_are_all_detected(broken):
    shard, rng = only_shard(broken), random.Random(12)
    clean = shard.path.read_bytes()
    for _ in range(50):
        size = rng.randrange(len(clean))
        shard.path.write_bytes(clean[:size])
        for refused in (sentence(load_dataset, broken.folder), sentence(verify_shard, broken, shard.entry)):
            assert f"train-000000.tar.zst has {size} bytes, not {len(clean)}" in refused
        for number, stop in enumerate((*shard.index.offsets[1:], len(clean))[:NUM_CLIPS]):
            if stop > size:
                assert f"damaged at key clip-{number} " in sentence(shard.read_frame, number)


def test_a_flipped_byte_anywhere_in_an_index_is_detected(broken):
    entry = only_shard(broken).entry
    path = broken.folder / entry.index_name
    clean = path.read_bytes()
    for byte in random.Random(13).sample(range(len(clean)), 50):
        path.write_bytes(clean[:byte] + bytes([clean[byte] ^ 4]) + clean[byte + 1 :])
        assert f"{path} is damaged: its hash is" in sentence(load_shard_index, broken.folder, entry)


def test_a_missing_file_is_named(broken):
    shard = only_shard(broken)
    shard.path.unlink()
    assert re.search(r"train-000000.tar.zst is missing \(\d+ bytes expected\)", sentence(load_dataset, broken.folder))
    assert "No such file" in sentence(shard.read_frame, 0)
    assert load_dataset(broken.folder, []).vocabulary == VOCABULARY  # no split asked for, no shard looked at
    assert load_dataset(broken.folder, tolerant=True).vocabulary == VOCABULARY  # left to whoever reads it
    (broken.folder / "dataset.json").unlink()
    assert "holds no dataset.json" in sentence(load_dataset, broken.folder)
    assert "holds no dataset.json" in sentence(load_dataset, broken.folder / "nowhere")


def test_an_unknown_split_is_answered_with_the_known_ones(dataset):
    assert sentence(load_dataset, dataset.folder, ["train", "dev"]).endswith("has no split 'dev'; it has train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 4}, "has format version 4, this asda reads 1 to 3; update asda"),
        ({"format_version": "1"}, "malformed at format_version"),
        ({"sample_rate_hz": 8000}, "malformed at sample_rate_hz"),
        ({"extra": 1}, "malformed at extra"),
        ({"vocabulary": ["a", "a"]}, "a class is listed twice"),
        ({"vocabulary": ["a"]}, "split train does not count every class"),
        ({"splits": {"../train": {}}}, "malformed at splits"),
    ],
)
def test_a_malformed_dataset_file_is_refused_with_the_place(broken, change, words):
    path = broken.folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in sentence(load_dataset, broken.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000, "\xff"])
def test_a_dataset_file_that_is_no_json_object_is_refused(broken, text):
    (broken.folder / "dataset.json").write_text(text, encoding="latin-1")
    assert "dataset.json is malformed" in sentence(load_dataset, broken.folder)


@pytest.mark.parametrize(
    "name", ["../train-000000.tar.zst", "/etc/passwd", "train-000000.tar.zst\n", "train-0.tar.zst"]
)
def test_a_shard_s_name_is_never_a_path(broken, name):
    path = broken.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"][0]["name"] = name
    path.write_text(json.dumps(content))
    assert "malformed at splits.train.shards.0.name" in sentence(load_dataset, broken.folder)


def forge(dataset: DatasetIndex, frame: bytes, **changes) -> ShardFile:
    """Replace the shard by one whose first frame is `frame`, with hashes that agree: a shard made by an attacker."""
    index = only_shard(dataset).index
    data = frame + zstandard.ZstdCompressor(write_checksum=True).compress(TAR_END)
    forged = {"bytes": len(data), "hash": tagged_hash(data), "keys": ["clip-0"], "offsets": [0, len(frame)]}
    forged |= {"hashes": [xxh3_64_hexdigest(frame)], "num_samples": [800], "labels": [[]]}
    text = json.dumps(asdict(index) | forged | changes).encode()
    old = only_shard(dataset).entry
    entry = replace(
        old, clips=1, bytes=len(data), hash=tagged_hash(data), index_bytes=len(text), index_hash=tagged_hash(text)
    )
    (dataset.folder / entry.name).write_bytes(data)
    (dataset.folder / entry.index_name).write_bytes(text)
    return ShardFile(dataset.folder, entry)


def test_a_frame_that_declares_too_much_is_refused_before_it_is_decompressed(broken):
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(MAX_SAMPLE_BYTES + 1))
    assert len(bomb) < 1 << 20
    refused = sentence(forge(broken, bomb).read_frame, 0)
    assert f"declares {MAX_SAMPLE_BYTES + 1} bytes, more than {MAX_SAMPLE_BYTES}" in refused


def test_frames_without_size_or_checksum_or_with_junk_are_refused(broken):
    content = only_shard(broken).read_frame(0)
    no_size = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(content)
    no_checksum = zstandard.ZstdCompressor().compress(content)
    junk = zstandard.ZstdCompressor(write_checksum=True).compress(content) + b"junk"
    assert "declares 18446744073709551615 bytes" in sentence(forge(broken, no_size).read_frame, 0)
    assert "has no checksum" in sentence(forge(broken, no_checksum).read_frame, 0)
    assert "unused data" in sentence(forge(broken, junk).read_frame, 0)
    assert "damaged at key clip-0" in sentence(forge(broken, b"no zstd frame").read_frame, 0)


def test_a_frame_with_a_window_of_2_gib_is_refused(broken):
    # A zstd frame by hand (RFC 8878, 3.1.1): magic number; 4 bytes of content size, checksum, no single segment; window
    # of 2^(10 + 21) bytes; 1 byte of content; last block, raw, of 1 byte. A decoder needs to look no further.
    frame = b"\x28\xb5\x2f\xfd" + b"\x84" + bytes([21 << 3]) + b"\1\0\0\0" + b"\x09\0\0x" + b"\0\0\0\0"
    assert zstandard.get_frame_parameters(frame).window_size == 2 << 30
    assert f"declares a window of {2 << 30} bytes, more than" in sentence(forge(broken, frame).read_frame, 0)


def test_a_bomb_is_refused_without_a_byte_of_it_in_memory(broken):
    # 1 GiB of zeros as 8,192 RLE blocks of 128 KiB: 32 KiB of frame.
    blocks = [(1 << 17 << 3 | 1 << 1 | (n == 8191)).to_bytes(3, "little") + b"\0" for n in range(8192)]
    shard = forge(
        broken, b"\x28\xb5\x2f\xfd" + b"\xa4" + (1 << 30).to_bytes(4, "little") + b"".join(blocks) + b"\0" * 4
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    assert f"declares {1 << 30} bytes, more than" in sentence(shard.read_frame, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": ["../up"]}, "malformed at keys.0"),
        ({"keys": ["a", "b"]}, "columns differ in length"),
        ({"offsets": [1, 2]}, "offsets do not ascend"),
        ({"offsets": [0, 10**12]}, "offsets do not ascend"),
        ({"bytes": 1}, "offsets do not ascend"),
        ({"hash": "xxh3_128:" + "0" * 32}, "disagree on the shard's name, clips, bytes or hash"),
        ({"keys": [], "offsets": [0], "hashes": [], "num_samples": [], "labels": []}, "it lists no clip"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(broken, changes, words):
    shard = forge(broken, zstandard.ZstdCompressor(write_checksum=True).compress(b"x"), **changes)
    assert words in sentence(load_shard_index, broken.folder, shard.entry)


def members(*files: tuple[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return archive.getvalue()


WAV = encode_wav(np.zeros(800, np.int16))


@pytest.mark.parametrize(
    "files",
    [
        [("clip-0.wav", WAV)],
        [("clip-0.wav", WAV), ("clip-1.json", b'{"labels": []}')],
        [("clip-0.wav", WAV[:-2]), ("clip-0.json", b'{"labels": []}')],
        [("clip-0.wav", encode_wav(np.zeros(801, np.int16))), ("clip-0.json", b'{"labels": []}')],
        [("clip-0.wav", WAV), ("clip-0.json", b'{"labels": ["odd"]}')],
        [("clip-0.wav", WAV), ("clip-0.json", b"[]")],
    ],
)
def test_members_that_are_not_what_the_index_says_are_named_by_verify_shard(broken, files):
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(members(*files))
    shard = forge(broken, frame)
    refused = sentence(verify_shard, broken, shard.entry)
    assert "train-000000.tar.zst, key clip-0: its members" in refused
