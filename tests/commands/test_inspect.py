"""asda inspect from the outside: what it says of shards, against the files they were made from."""

import csv
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from sounds import CLASSES, SECONDS
from tiny_tools import Done, noise, run, wav

from asda.data.shards.index import tagged_hash
from asda.data.shards.read import ShardFile, load_dataset
from asda.sharding.writer import write_dataset

ROOT = Path(__file__).resolve().parents[2]
ODD = "a $\\frac{ of, rain"  # a class name that matplotlib would take for a formula, and CSV would split


def look(*arguments: object) -> Done:
    return run("inspect", *arguments)


def shown(*arguments: object) -> str:
    done = look(*arguments)
    assert (done.code, done.err) == (0, "")
    return done.out


def figures(*arguments: object) -> dict:
    return json.loads(shown(*arguments, "--json"))


def rows(*arguments: object) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(shown(*arguments))))


def payload(path: Path) -> bytes:
    """The samples of a 16-bit WAV, little-endian."""
    return soundfile.read(path, dtype="int16")[0].astype("<i2").tobytes()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Nine clips of eight lengths: train holds 4 x dog, 2 x ODD and 1 without label, test 2 x dog; no clip has cat."""
    folder = tmp_path_factory.mktemp("mixed")
    plan = [("train", "dog", 0.5), ("train", "dog", 0.5), ("train", f"dog;{ODD}", 0.61), ("train", f"dog;{ODD}", 0.9)]
    plan += [("train", "", 1.0), ("test", "dog", 1.3), ("test", "dog", 2.0), ("train", "bird", 1.999), ("train", "", 3)]
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "split", "tags"))
        for number, (split, tags, seconds) in enumerate(plan):
            wav(folder / f"{number}.wav", noise(seconds, seed=number))
            table.writerow((f"{number}.wav", split, tags))
    (folder / "names.txt").write_text(f"cat\ndog\n{ODD}\nbird\n")
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "csv", "--input", folder / "clips.csv"]
    command += ["--out", folder / "shards", "--labels", folder / "names.txt", "--clips-per-shard", "4"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture
def damaged(shards, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "damaged"))


def flip(folder: Path, key: str) -> tuple[str, int, int]:
    """Flip a bit in the middle of a clip; returns the shard's name and the clip's first byte and end."""
    dataset = load_dataset(folder)
    for split in dataset.splits.values():
        for entry in split.shards:
            index = ShardFile(folder, entry).index
            if key in index.keys:
                number = index.keys.index(key)
                first, end = index.offsets[number : number + 2]
                content = bytearray((folder / entry.name).read_bytes())
                content[(first + end) // 2] ^= 4
                (folder / entry.name).write_bytes(content)
                return entry.name, first, end
    raise AssertionError(key)


def test_the_figures_are_those_of_the_files(shards):
    found = figures(shards)
    samples = round(SECONDS * 16_000)
    for name, clips in (("train", 48), ("test", 16)):
        split = found["splits"][name]
        sizes = [path.stat().st_size for path in shards.glob(f"{name}-*.tar.zst")]
        assert (split["clips"], split["shards"], split["bytes"]) == (clips, len(sizes), sum(sizes))
        assert split["raw_bytes"] == clips * samples * 2
        assert split["ratio"] == sum(sizes) / (clips * samples * 2)
        assert split["seconds"] == pytest.approx(clips * SECONDS)
        assert split["absent_classes"] == []
    assert found["class_counts"] == dict.fromkeys(CLASSES, 8)
    assert found["lengths"]["bins"] == [{"from_s": 2.6, "to_s": 2.61, "clips": 64}]
    assert figures(shards, "--split", "test")["class_counts"] == dict.fromkeys(CLASSES, 2)


def test_the_tables_say_what_the_figures_say(shards):
    out, found = shown(shards), figures(shards)
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["train"][1:4] == ["48", f"{48 * SECONDS / 3600:.2f}", "3"]
    assert lines["all"][1:4] == ["64", f"{64 * SECONDS / 3600:.2f}", "4"]
    assert lines["train"][-2:] == [f"{found['splits']['train']['log_mel'][name]:.4f}" for name in ("mean", "std")]
    assert lines["siren"][1:3] == ["8", "12.5"]
    assert "lengths: shortest 2.60 s, median 2.60 s, longest 2.60 s" in out


def test_the_tables_say_how_the_dataset_was_made_and_what_is_wrong_with_it(mixed):
    from asda.commands.shard_tables import tables

    assert "made by: python tools/make_shards.py --source csv " in shown(mixed)
    found = figures(mixed)
    assert not any("duplicates" in line or "rejected" in line for line in tables(found, 10))
    found["duplicates"] |= {"exact": 3, "exact_across_splits": 1}
    lines = tables(found | {"rejected": 1234}, 10)
    assert "exact duplicates: 3 pairs, 1 of them across splits" in lines
    assert "rejected: 1,234 clips" in lines
    assert not any("near" in line for line in lines)


def test_classes_are_ranked_and_absent_ones_named(mixed):
    out = shown(mixed)
    ranked = [
        line.split() for line in out[out.index("classes by clips") : out.index("absent")].splitlines()[1:] if line
    ]
    assert [line[0] for line in ranked] == ["dog", "a", "bird"]
    assert [line[-1].count("#") for line in ranked] == [30, 10, 5]  # 6, 2 and 1 clips
    assert "1.00 labels a clip, 2 clips have no label" in out
    assert "  train: 1 of 4: cat\n" in out
    assert f"  test: 3 of 4: cat; {ODD}; bird\n" in out
    few = shown(mixed, "--classes", 1)
    assert "... 1 classes between" in few
    assert "dog " in few
    assert "bird " in few
    assert "test: 3 of 4: cat" in few


def test_lengths_are_counted_in_bins_of_equal_width(mixed):
    found = figures(mixed)["lengths"]
    samples = [8000, 8000, 9760, 14400, 16000, 20800, 32000, 31984, 48000]
    assert (found["shortest_s"], found["median_s"], found["longest_s"]) == (0.5, 1.0, 3.0)
    edges = [row["from_s"] for row in found["bins"]] + [found["bins"][-1]["to_s"]]
    assert [row["clips"] for row in found["bins"]] == np.histogram(np.array(samples) / 16_000, edges)[0].tolist()
    assert "2.75 to" not in shown(mixed)  # widths are 1, 2 or 5 times a power of ten


@given(st.lists(st.integers(400, 10**8), min_size=1, max_size=50))
def test_every_length_lies_in_one_of_at_most_twelve_bins(lengths):
    from asda.commands.shard_tables import length_figures

    bins = length_figures(np.array(lengths))["bins"]
    assert 1 <= len(bins) <= 12
    seconds = np.array(lengths) / 16_000
    assert [row["clips"] for row in bins] == [sum((row["from_s"] <= seconds) & (seconds < row["to_s"])) for row in bins]
    assert sum(row["clips"] for row in bins) == len(lengths)


def test_the_bytes_named_for_a_key_hold_that_clip(shards):
    key = "siren_003"
    found = figures(shards, "--key", key)
    first, end = found["bytes"]
    frame = (shards / found["shard"]).read_bytes()[first:end]
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompress(frame) + bytes(1024))) as tar:
        assert tar.getnames() == [f"{key}.wav", f"{key}.json"]
        described = json.load(tar.extractfile(f"{key}.json"))
    assert found["json"] == described == {"labels": ["siren"], "seconds": SECONDS, "source": "siren/003.wav"}
    assert (found["labels"], found["samples"]) == (["siren"], round(SECONDS * 16_000))
    out = shown(shards, "--key", key)
    assert f"{first} to {end} of the shard" in out
    assert f"siren ({found['label_ids'][0]})" in out


def test_the_list_names_every_file_once(shards):
    listed = rows(shards, "--list")
    audio = shards.parent / "audio"
    assert sorted(row["source"] for row in listed) == sorted(str(p.relative_to(audio)) for p in audio.glob("*/*.wav"))
    assert len({row["key"] for row in listed}) == len(listed) == 64
    for row in listed:
        assert float(row["seconds"]) == soundfile.info(audio / row["source"]).duration
        assert row["labels"] == row["source"].split("/")[0]
        assert row["shard"].startswith(f"{row['split']}-")
    assert Counter(row["split"] for row in listed) == {"train": 48, "test": 16}


def test_find_and_columns_narrow_the_list(mixed):
    assert [row["source"] for row in sorted(rows(mixed, "--find", ODD), key=str)] == ["2.wav", "3.wav"]
    assert {row["labels"] for row in rows(mixed, "--find", ODD)} == {f"dog;{ODD}"}
    assert {tuple(row) for row in rows(mixed, "--list", "--columns", "seconds,key")} == {("seconds", "key")}
    assert {row["key"] for row in rows(mixed, "--find", "dog", "--split", "test")} == {"5", "6"}
    assert rows(mixed, "--find", "cat") == []


def test_an_exported_clip_is_the_file_it_was_made_from(shards, tmp_path):
    out = tmp_path / "deep" / "out.wav"
    assert "2.60 s" in shown(shards, "--export", "bell_001", out)
    info, source = soundfile.info(out), shards.parent / "audio/bell/001.wav"
    assert (info.samplerate, info.channels, info.subtype, info.format) == (16_000, 1, "PCM_16", "WAV")
    assert payload(out) == payload(source)
    assert out.read_bytes()[44:] == payload(source)
    assert [path.name for path in out.parent.iterdir()] == ["out.wav"]


def test_intact_shards_are_said_to_be_intact(shards):
    done = look(shards, "--verify")
    assert done.code == 0
    assert f"{shards}: 64 clips in 4 shards, " in done.out
    assert done.err.startswith("64 of 64 clips, ")
    assert "16 clips in 1 shards" in look(shards, "--verify", "--split", "test").out


def test_everything_damaged_is_named_and_nothing_else(damaged):
    keys = [row["key"] for row in rows(damaged, "--list", "--split", "train")]
    hit = random.Random(3).sample(keys[:32], 5)  # clips of the first two shards of train
    places = {key: flip(damaged, key) for key in hit}
    (damaged / "train-000002.tar.zst").unlink()
    done = look(damaged, "--verify")
    lines = done.out.splitlines()
    for key, (shard, first, end) in places.items():
        named = [line for line in lines if f"damaged at key {key} (bytes {first} to {end})" in line]
        assert len(named) == 1
        assert shard in named[0]
    assert [line for line in lines if "train-000002.tar.zst is missing" in line]
    assert done.code == 2
    num_shards = len({shard for shard, _, _ in places.values()}) + 1
    assert f"{num_shards} of 4 shards are damaged" in done.err
    for key in set(keys[:32]) - set(hit):
        assert f"key {key} " not in done.out
    assert look(damaged, "--verify", "--split", "test").code == 0


def test_a_key_that_two_shards_hold_is_named(damaged):
    dataset = load_dataset(damaged)
    train, test = dataset.splits["train"], dataset.splits["test"]
    entry, name = train.shards[0], "test-000001.tar.zst"
    shutil.copy(damaged / entry.name, damaged / name)
    text = (damaged / entry.index_name).read_text().replace(entry.name, name).encode()
    (damaged / "test-000001.json").write_bytes(text)
    copy = replace(entry, name=name, index_bytes=len(text), index_hash=tagged_hash(text))
    twice = replace(test, clips=test.clips + copy.clips, shards=(*test.shards, copy), sample_weights=np.zeros(0, "f4"))
    write_dataset(replace(dataset, splits={"train": train, "test": twice}))
    done = look(damaged, "--verify")
    keys = json.loads(text)["keys"]
    assert len(done.out.splitlines()) == len(keys)
    assert all(f"{name}, key {key}: {entry.name} holds it too" in done.out for key in keys)
    assert (done.code, f"{len(keys)} keys are repeated" in done.err) == (2, True)


def test_tables_and_single_clips_need_no_intact_neighbours(damaged, tmp_path):
    before = figures(damaged)
    shard, _, _ = flip(damaged, "siren_003")
    assert figures(damaged) == before
    assert len(rows(damaged, "--find", "siren", "--columns", "key,seconds")) == 8
    other = next(row["key"] for row in rows(damaged, "--list", "--columns", "key,shard") if row["shard"] == shard)
    shown(damaged, "--export", other, tmp_path / "other.wav")
    done = look(damaged, "--export", "siren_003", tmp_path / "siren.wav")
    assert done.code == 2
    assert "damaged at key siren_003 (bytes " in done.err
    assert not (tmp_path / "siren.wav").exists()


def test_a_damaged_clip_costs_the_list_and_the_sheet_that_clip_alone(damaged, tmp_path):
    before = rows(damaged, "--list")
    for key in ("siren_003", "dog_001" if any(row["key"] == "dog_001" for row in before) else before[0]["key"]):
        flip(damaged, key)
    hit = {key for key in (row["key"] for row in before) if f"damaged at key {key} " in look(damaged, "--verify").out}
    assert len(hit) == 2
    done = look(damaged, "--list")
    assert done.code == 2
    assert done.out.splitlines()[1:] == [
        ",".join(row.values() if row["key"] not in hit else [*list(row.values())[:-1], ""]) for row in before
    ]
    *errors, last = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("damaged at key" in line for line in errors)
    assert last.startswith(f"error: {damaged}: 2 clips cannot be read, and have no source in the list; ")
    done = look(damaged, "--sheet", tmp_path / "a.png", "--num", 64)
    assert (done.code, "62 clips" in done.out) == (2, True)
    assert "2 clips cannot be read, and are not drawn" in done.err
    assert imread(tmp_path / "a.png").std() > 0.1


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), MemoryError()], ids=repr)
def test_whatever_a_clip_raises_is_a_problem_of_that_clip(shards, monkeypatch, error):
    from asda.sharding import verify

    entry = load_dataset(shards).splits["test"].shards[0]
    original = verify.decode_wav

    def fails(wav: bytes) -> np.ndarray:
        calls.append(wav)
        if len(calls) == 3:
            raise error
        return original(wav)

    calls: list[bytes] = []
    monkeypatch.setattr(verify, "decode_wav", fails)
    (problem,) = verify.shard_problems(ShardFile(shards, entry), load_dataset(shards).vocabulary)
    assert problem.startswith(f"shard {shards / entry.name}, clip 1: {type(error).__name__}: ")
    assert problem.endswith("(unexpected; please report it with this file)")


def test_a_sheet_is_a_picture_of_the_clips_asked_for(mixed, tmp_path):
    args = ("--sheet", tmp_path / "a.png", "--num", 3)
    assert "3 clips" in shown(mixed, *args)
    picture = imread(tmp_path / "a.png")
    assert picture.shape[:2] == (290, 1080)  # a row of three panels of 3.2 x 2.3 inches and the margins, 100 dpi
    assert picture.std() > 0.1  # not blank
    shown(mixed, "--sheet", tmp_path / "again.png", "--num", 3)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    shown(mixed, "--sheet", tmp_path / "other.png", "--num", 3, "--seed", 1)
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    assert "2 clips" in shown(mixed, "--sheet", tmp_path / "odd.png", "--find", ODD)  # fewer than --num


def test_a_folder_that_is_no_utf_8_is_drawn(mixed, tmp_path):
    odd = shutil.copytree(mixed, tmp_path / "$x^{\udcff")
    assert look(odd, "--sheet", tmp_path / "a.png", "--num", 2).code == 0
    assert imread(tmp_path / "a.png").std() > 0.1  # not blank


def test_a_sample_is_sorted_by_labels_and_key(mixed):
    from asda.commands.inspect import sample

    dataset = load_dataset(mixed)
    for label, num in ((None, 9), ("dog", 6)):
        clips = sample(dataset, ("train", "test"), label, num, 0)
        assert len(clips) == num
        places = [(clip.label_ids, clip.key) for clip in clips]
        assert places == sorted(places)
        assert places != [(clip.label_ids, clip.key) for clip in sorted(clips, key=lambda clip: clip.key)]


def test_a_sample_has_every_clip_at_most_once_and_every_clip_sometime(mixed):
    from asda.commands.inspect import sample

    dataset = load_dataset(mixed)
    everything = {clip.key for clip in sample(dataset, ("train", "test"), None, 100, 0)}
    assert everything == {str(number) for number in range(9)}
    drawn = [[clip.key for clip in sample(dataset, ("train", "test"), None, 4, seed)] for seed in range(40)]
    assert all(len(set(keys)) == 4 for keys in drawn)
    # A clip is missed by one sample with probability 5/9, by 40 with 6e-11.
    assert {key for keys in drawn for key in keys} == everything
    assert {clip.key for clip in sample(dataset, ("train", "test"), ODD, 9, 0)} == {"2", "3"}


def test_the_columns_of_a_long_clip_are_means_of_its_frames():
    from asda.commands.pictures import PANEL_FRAMES, make_panel

    level_TF = np.random.default_rng(0).normal(size=(2 * PANEL_FRAMES + 9, 128))
    panel = make_panel(level_TF, "")
    assert (panel.level_TF.shape, panel.num_frames) == ((PANEL_FRAMES, 128), len(level_TF))
    # The first nine columns are means of three frames, the others of two; weighted by that, their mean is the clip's,
    # up to the rounding of sums of 1209 values near 1 in float64 (1e-13).
    weights = np.full(PANEL_FRAMES, 2)
    weights[:9] = 3
    np.testing.assert_allclose(np.average(panel.level_TF, 0, weights), level_TF.mean(0), atol=1e-12)
    np.testing.assert_array_equal(make_panel(level_TF[:50], "").level_TF, level_TF[:50])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "dev"], "has no split 'dev'; it has test, train"),
        (["--split", "dev", "--verify"], "has no split 'dev'; it has test, train"),
        (["--key", "siren_3"], "has no clip 'siren_3' in test, train; --list names all keys"),
        (["--key", "SIREN_00"], "keys that contain it: siren_00"),
        (["--find", "sirens"], "--find sirens: {shards} has no such class; did you mean 'siren'?"),
        (["--find", "zzz"], "--classes all shows its classes"),
        (["--find", "siren", "--verify"], "--find goes with --list and --sheet"),
        (["--list", "--json"], "--list and --find print CSV"),
        (["--classes", "-1"], "--classes -1 must be a whole number, or all"),
        (["--list", "--columns", "key,name"], "unknown column 'name'; choose from key,split"),
        (["--sheet", "a.jpg"], "--sheet a.jpg must end in .png"),
        (["--sheet", "a.png", "--num", "0"], "--num 0 must be from 1 to 400"),
        (["--sheet", "a.png", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["--export", "siren_003", "a.flac"], "--export a.flac must end in .wav"),
        (["--export", "siren_003", "/dev/null/a.wav"], "/dev/null: "),
    ],
)
def test_what_cannot_be_done_is_one_sentence(shards, arguments, words):
    done = look(shards, *arguments)
    assert done.code == 2
    assert words.format(shards=shards) in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_url_shows_what_the_folder_shows(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = partial(QuietHandler, directory=str(shards))  # one that sends whole files only
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert figures(url) == figures(shards) | {"dataset": url}
        assert rows(url, "--list") == rows(shards, "--list")
        assert figures(url, "--key", "siren_003", "--cache") == figures(shards, "--key", "siren_003")
        assert "are right, to the last bit" in look(url, "--verify").out
        server.shutdown()


def test_a_folder_without_shards_is_one_sentence(tmp_path):
    done = look(tmp_path)
    assert done.code == 2
    assert "holds no dataset.json" in done.err


def test_a_label_without_clips_makes_no_sheet(mixed, tmp_path):
    done = look(mixed, "--sheet", tmp_path / "a.png", "--find", "cat")
    assert "has no clip with the label 'cat' in " in done.err
    assert not (tmp_path / "a.png").exists()


def test_a_sheet_without_matplotlib_is_one_sentence(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = look(shards, "--sheet", tmp_path / "a.png")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --sheet needs matplotlib; install it with: pip install 'asda[report]'\n"
    shown(shards)


def test_the_command_line_works_and_ends_quietly_when_its_reader_has_gone(shards):
    command = [sys.executable, "-m", "asda", "inspect", shards]
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "64 clips in 4 shards" in done.stdout
    with subprocess.Popen([*command, "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    both = subprocess.run([*command, "--list", "--verify"], capture_output=True, text=True, check=False)
    assert both.returncode == 2
    assert "not allowed with" in both.stderr
