"""Every source of tools/make_shards.py on the layout that its users have on disk, to shards and back."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import zstandard

from asda.data.labels import audioset_labels
from asda.errors import UserError
from asda.sharding.audio_ref import Place, read_place
from asda.sharding.sources import list_source
from asda.sharding.sources.audioset import AudioFolder
from asda.sharding.sources.listing import Listing, SourceOptions

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shards.py"
RATE = 16_000
Clips = dict[str, tuple[list[str], np.ndarray]]  # key -> labels, int16 samples


def noise(seed: int, num_samples: int = 1600) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1000, num_samples).astype(np.int16)


def sound(path: Path, seed: int = 0, num_samples: int = 1600) -> np.ndarray:
    """Write a clip and return its samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples_S = noise(seed, num_samples)
    soundfile.write(path, samples_S, RATE)
    return samples_S


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def shards(out: Path, *args: object) -> tuple[dict[str, Clips], list[str], str]:
    """Make shards; return split -> clips as zstd, tar and soundfile read them, the vocabulary, and what was printed."""
    command = [sys.executable, TOOL, *map(str, args), "--out", str(out), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    splits: dict[str, Clips] = {}
    for path in sorted(out.glob("*.tar.zst")):
        with path.open("rb") as file:
            unpacked = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        clips = splits.setdefault(path.name.split("-")[0], {})
        for name in [name for name in members if name.endswith(".wav")]:
            samples_S, rate = soundfile.read(io.BytesIO(members[name]), dtype="int16")
            assert rate == RATE
            clips[name[:-4]] = json.loads(members[name[:-4] + ".json"])["labels"], samples_S
    return splits, json.loads((out / "dataset.json").read_text())["vocabulary"], done.stdout


def labels_of(clips: Clips) -> dict[str, list[str]]:
    return {key: labels for key, (labels, _) in clips.items()}


def listed(listing: Listing) -> dict[str, tuple[tuple[str, ...], str]]:
    return {row.relative: (row.labels, row.group) for row in listing.rows}


def refusal(source: str, *inputs: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        list_source(source, list(inputs), SourceOptions(**options))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)
    return str(error.value)


# AudioSet

ORIGINAL = (
    "# Segments csv created Sun Mar  5 10:54:31 2017",
    "# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=4",
    "# YTID, start_seconds, end_seconds, positive_labels",
)
PLAIN = ("YTID,start_seconds,end_seconds,positive_labels",)
SEGMENTS = (
    '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
    '--ZhevVpy1s, 50.000, 60.000, "/m/012xff"',
    '_aE2O5G5WE_, 0.000, 10.000, "/m/03fwl,/m/04rlf,/m/09x0r"',
)


@pytest.fixture
def audioset(tmp_path) -> Path:
    """Two tables in the two forms, and audio named in four ways; one segment of --ZhevVpy1s is missing."""
    text(tmp_path / "csv/balanced_train_segments.csv", *ORIGINAL, *SEGMENTS)
    text(tmp_path / "csv/eval_segments.csv", *PLAIN, '-0RWZT-miFs,420.000,430.000,"/m/03v3yw,/m/0k4j"')
    text(
        tmp_path / "csv/class_labels_indices.csv", "index,mid,display_name"
    )  # lies beside them and is no table of segments
    sound(tmp_path / "audio/balanced/Y--PJHxphWEs.flac", 1, 45 * RATE)
    sound(tmp_path / "audio/balanced/_aE2O5G5WE_.wav", 2, 10 * RATE + 800)
    sound(tmp_path / "audio/eval/-0RWZT-miFs_420000.ogg", 3, 9 * RATE)
    sound(tmp_path / "audio/Y--ZhevVpy1s_10.000_20.000.wav", 4)
    text(tmp_path / "audio/notes.txt", "")
    return tmp_path


def test_audioset_goes_to_shards_and_back(audioset):
    splits, vocabulary, out = shards(
        audioset / "out", "--source", "audioset", "--input", audioset / "csv", "--audio", audioset / "audio"
    )
    assert vocabulary == list(audioset_labels())
    assert {name: labels_of(clips) for name, clips in splits.items()} == {
        "balanced_train": {
            "--PJHxphWEs_30000": ["Speech", "Gush"],
            "_aE2O5G5WE__0": ["Goat", "Music", "Speech"],
        },
        "eval": {"-0RWZT-miFs_420000": ["Keys jangling", "Car"]},
    }
    balanced = splits["balanced_train"]
    np.testing.assert_array_equal(balanced["--PJHxphWEs_30000"][1], noise(1, 45 * RATE)[30 * RATE : 40 * RATE])
    np.testing.assert_array_equal(balanced["_aE2O5G5WE__0"][1], noise(2, 10 * RATE + 800))
    assert len(splits["eval"]["-0RWZT-miFs_420000"][1]) == 9 * RATE
    with (audioset / "out/rejected.csv").open(newline="") as file:
        rejected = list(csv.reader(file))[1:]
    reason = "no file in --audio but for other times, such as Y--ZhevVpy1s_10.000_20.000.wav"
    assert rejected == [["--ZhevVpy1s_50000", reason]]
    assert "left out: 1 files of --audio that are not audio" in out


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("abc_-123456.m4a", Place("abc_-123456.m4a", 30, 40)),
        ("Yabc_-123456.wav", Place("Yabc_-123456.wav", 30, 40)),
        ("deep/er/abc_-123456.MP3", Place("deep/er/abc_-123456.MP3", 30, 40)),
        ("abc_-123456_30000.wav", Place("abc_-123456_30000.wav")),
        ("abc_-123456_30.flac", Place("abc_-123456_30.flac")),
        ("Yabc_-123456_30.000.ogg", Place("Yabc_-123456_30.000.ogg")),
        ("abc_-123456_30_40.wav", Place("abc_-123456_30_40.wav")),
        ("abc_-123456_30.000_40.000.wav", Place("abc_-123456_30.000_40.000.wav")),
        ("abc_-123456_30000_40000.wav", Place("abc_-123456_30000_40000.wav")),
        ("abc_-123456_0_10.wav", None),
        ("abc_-123456_30000_40.wav", None),
        ("abc_-123456.txt", None),
        (".abc_-123456.wav", None),
        ("abc_-1234567.wav", None),
    ],
)
def test_a_file_s_name_says_which_segment_it_is(tmp_path, file, place):
    table = text(tmp_path / "a_segments.csv", *PLAIN, 'abc_-123456,30.000,40.000,"/m/09x0r"')
    folder = tmp_path / "audio"
    text(folder / file)
    if place is None:
        assert "holds none of the 1 segments" in refusal("audioset", table, audio=folder)
    else:
        (row,) = list_source("audioset", [table], SourceOptions(audio=folder)).rows
        assert row.place == Place(f"{folder}/{place.path}", place.start_s, place.stop_s)


def test_a_video_s_segments_are_told_apart_by_their_files_or_cut_from_one(tmp_path):
    table = text(tmp_path / "a_segments.csv", *PLAIN, "abc_-123456,0,10,/m/09x0r", "abc_-123456,10,20,/m/04rlf")
    text(tmp_path / "named/abc_-123456_0.wav")
    text(tmp_path / "named/abc_-123456_10000.wav")
    text(tmp_path / "whole/abc_-123456.wav")
    named = list_source("audioset", [table], SourceOptions(audio=tmp_path / "named"))
    whole = list_source("audioset", [table], SourceOptions(audio=tmp_path / "whole"))
    assert [Path(row.place.path).name for row in named.rows] == ["abc_-123456_0.wav", "abc_-123456_10000.wav"]
    assert [(row.place.start_s, row.place.stop_s) for row in whole.rows] == [(0, 10), (10, 20)]
    assert list(listed(named)) == list(listed(whole)) == ["abc_-123456_0", "abc_-123456_10000"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((*PLAIN, "xyz_-123456,0,10,/m/09x0r"), "several files for a segment: xyz_-123456 (deep/Yxyz_-123456.wav and"),
        ((*PLAIN, "abc_-123456,0,10,/m/nothing"), "line 2: '/m/nothing' is not among the 527 classes"),
        ((*PLAIN, "abc_-123456,x,10,/m/09x0r"), "line 2: start 'x' and end '10' must be seconds"),
        ((*PLAIN, "abc_-123456,10,9,/m/09x0r"), "line 2: start 10 s and end 9 s must be 0 <= start < end"),
        ((*PLAIN, "abc_-123456,-1,9,/m/09x0r"), "line 2: start -1 s"),
        ((*PLAIN, "abc_-123456,nan,nan,/m/09x0r"), "line 2: start nan s"),
        ((*PLAIN, "abc,0,10,/m/09x0r"), "line 2: 'abc' is not a YouTube id of 11"),
        ((*PLAIN, "abc_-123456,0,10,/m/09x0r,/m/04rlf"), "line 2 has 5 cells, its header has 4"),
        ((*PLAIN, "abc_-123456,0,10,/m/09x0r", "abc_-123456,0,10,/m/09x0r"), "lists abc_-123456_0 again"),
        ((*ORIGINAL[:2], "abc_-123456,0,10,/m/09x0r"), "line 3 comes before a header"),
        (("YTID,start_seconds,positive_labels",), "has no column 'end_seconds'"),
        (ORIGINAL[:2], "is empty; it must begin with a header"),
        (
            (*PLAIN, "xyz_-123456,0,10,/m/09x0r"),
            "has several files for a segment: xyz_-123456 (deep/Yxyz_-123456.wav and",
        ),
    ],
)
def test_a_bad_table_of_segments_is_refused_in_one_sentence(tmp_path, rows, words):
    for name in ("abc_-123456.wav", "xyz_-123456.wav", "deep/Yxyz_-123456.wav"):
        text(tmp_path / "audio" / name)
    assert words in refusal("audioset", text(tmp_path / "a_segments.csv", *rows), audio=tmp_path / "audio")


def test_audioset_without_its_folders_is_refused_in_one_sentence(tmp_path):
    table = text(tmp_path / "a_segments.csv", *PLAIN, "abc_-123456,0,10,/m/09x0r")
    assert "needs --audio" in refusal("audioset", table)
    assert "gone is not a folder" in refusal("audioset", table, audio=tmp_path / "gone")
    assert "gone.csv: no such file" in refusal("audioset", tmp_path / "gone.csv", audio=tmp_path)
    assert "holds none of the 1 segments" in refusal("audioset", table, audio=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no *_segments.csv" in refusal("audioset", tmp_path / "empty", audio=tmp_path)
    classes = text(tmp_path / "classes.csv", "index,mid,display_name", "1,/m/09x0r,Speech")
    assert "line 2 is not index,mid,name with the index 0" in refusal(
        "audioset", table, audio=tmp_path, class_labels=classes
    )


def test_the_folder_of_audio_is_read_once_and_no_file_is_asked_for(audioset, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail(f"asked for {path}"))
    monkeypatch.setattr(Path, "stat", lambda path: pytest.fail(f"asked for {path}"))
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    assert AudioFolder(audioset / "audio").num_others == 1


@pytest.mark.parametrize("name", ["balanced_train", "eval"])
def test_the_real_tables_of_audioset_are_read_to_the_last_row(shared, tmp_path, name):
    table = shared / "data/audioset" / f"{name}_segments.csv"
    lines = table.read_text().splitlines()[1:]
    chosen = lines[::1000]
    for line in chosen:
        text(tmp_path / f"{line[0]}/Y{line[:11]}.wav")
    listing = list_source("audioset", [table], SourceOptions(audio=tmp_path))
    assert len(listing.rows) + len(listing.missing) == len(lines)
    names = dict(
        line.split(",", 2)[1:] for line in (shared / "data/audioset/class_labels_indices.csv").read_text().splitlines()
    )
    expected = {
        f"{line[:11]}_{round(1000 * float(line.split(',')[1]))}": tuple(
            names[mid].strip('"') for mid in line.split('"')[1].split(",")
        )
        for line in chosen
    }
    assert listed(listing) == {key: (labels, name) for key, labels in expected.items()}
    assert listing.vocabulary == audioset_labels()


# EAT


def manifest(folder: Path, *, root: str = "/gone") -> Path:
    text(folder / "label_descriptors.csv", '0,/m/dog,"Dog"', '1,/m/cat,"Cat, tame"')
    text(folder / "train.tsv", root, "Ya.wav\t1600", "deep/Yb.wav\t1600")
    text(folder / "train.lbl", "Yb\t/m/dog,/m/cat", "Yz\t/m/dog", "Ya\t/m/cat")
    text(folder / "eval.tsv", root, "Yc.flac\t1600", "Yd.flac\t1600")
    text(folder / "eval.lbl", "Yc\t/m/dog", "Yd\t/m/dog")
    return folder


def test_eat_goes_to_shards_and_back(tmp_path):
    manifest(tmp_path / "eat")
    waves = {"Ya": sound(tmp_path / "audio/Ya.wav", 1), "deep_Yb": sound(tmp_path / "audio/deep/Yb.wav", 2)}
    waves["Yc"] = sound(tmp_path / "audio/Yc.flac", 3)
    splits, vocabulary, out = shards(
        tmp_path / "out", "--source", "eat", "--input", tmp_path / "eat", "--audio", tmp_path / "audio"
    )
    assert vocabulary == ["Dog", "Cat, tame"]
    assert {name: labels_of(clips) for name, clips in splits.items()} == {
        "train": {"Ya": ["Cat, tame"], "deep_Yb": ["Dog", "Cat, tame"]},
        "eval": {"Yc": ["Dog"]},
    }
    for clips in splits.values():
        for key, (_, samples_S) in clips.items():
            np.testing.assert_array_equal(samples_S, waves[key])
    assert "left out: 1 labels of clips that no manifest lists" in out
    assert "Yd.flac,no such file" in (tmp_path / "out/rejected.csv").read_text()


def test_the_root_of_a_manifest_is_its_first_line_or_a_subfolder_of_audio_of_that_name(tmp_path):
    for root in ("here/train", "there/audio"):
        text(tmp_path / root / "Ya.wav")
        text(tmp_path / root / "deep/Yb.wav")
    folder = manifest(tmp_path / "eat", root=str(tmp_path / "here/train"))
    table = folder / "train.tsv"
    asked = {None: "here/train", tmp_path / "here": "here/train", tmp_path / "there/audio": "there/audio"}
    for audio, root in asked.items():
        rows = list_source("eat", [table], SourceOptions(audio=audio)).rows
        assert [row.place.path for row in rows] == [f"{tmp_path}/{root}/Ya.wav", f"{tmp_path}/{root}/deep/Yb.wav"]


def test_manifests_may_name_clips_in_hdf5_packs(tmp_path):
    samples_S = noise(4, 3200)
    with h5py.File(tmp_path / "10.h5", "w") as pack:
        pack["Ya.wav"] = samples_S
        pack["Yb.wav"] = samples_S.astype(np.float32) / 32768
    with h5py.File(tmp_path / "panns.hdf5", "w") as pack:
        pack["audio_name"], pack["waveform"] = [b"Yx.wav", b"Yc.wav"], np.stack([0 * samples_S, samples_S])
    rows = ("10.h5/Ya.wav\t3200", "10.h5/Yb.wav\t3200", "panns.hdf5/Yc.wav\t3200", "10.h5/Yd.wav\t9", "11.h5/Ye.wav\t9")
    table = text(tmp_path / "train.tsv", str(tmp_path), *rows)
    listing = list_source("eat", [table], SourceOptions(use_labels=False, sample_rate_hz=RATE))
    assert [row.relative for row in listing.rows] == ["10.h5/Ya.wav", "10.h5/Yb.wav", "panns.hdf5/Yc.wav"]
    for row in listing.rows:
        np.testing.assert_array_equal(read_place(row.place), samples_S)
    assert listing.missing == [("10.h5/Yd.wav", "no Yd.wav in the pack"), ("11.h5/Ye.wav", "no pack 11.h5")]


def test_the_real_manifests_of_eat_are_read_to_the_last_row(shared, tmp_path):
    folder = shared / "data/audioset/eat_as20k"
    names = {row[1]: row[2] for row in csv.reader((folder / "label_descriptors.csv").open(newline=""))}
    expected = {}
    for split in ("train", "eval"):
        files = [line.split("\t")[0] for line in (folder / f"{split}.tsv").read_text().splitlines()[1:]]
        labels = dict(line.split("\t") for line in (folder / f"{split}.lbl").read_text().splitlines())
        for file in files[::1000]:
            text(tmp_path / split / file)
            expected[file] = tuple(names[mid] for mid in labels[file[:-4]].split(",")), split
    listing = list_source("eat", [folder], SourceOptions(audio=tmp_path))
    assert listed(listing) == expected
    num_rows = sum(len((folder / f"{split}.tsv").read_text().splitlines()) - 1 for split in ("train", "eval"))
    assert len(listing.rows) + len(listing.missing) == num_rows
    assert listing.vocabulary == audioset_labels()


@pytest.mark.parametrize(
    ("file", "lines", "words"),
    [
        ("train.tsv", ("/gone", "Ya.wav\t1600"), "line 1: the root '/gone' is not a folder here; give the folder"),
        ("train.tsv", (".", "Ya.wav"), "train.tsv line 2 is not file<TAB>number of samples"),
        ("train.tsv", (".", "Ya.wav\tmany"), "train.tsv line 2 is not file<TAB>number of samples"),
        ("train.tsv", (".", "Ya.wav\t1", "x/../Ya.wav\t1"), "lists Ya.wav again"),
        ("train.tsv", (".", "Ya.wav\t1", "Yq.wav\t1"), "train.lbl has no line for Yq; add them"),
        ("train.tsv", (".", "Yz.wav\t1"), "none of the 1 files in the manifests exists"),
        ("train.lbl", ("Ya\t/m/dog", "Ya\t/m/dog"), "train.lbl line 2 repeats 'Ya'"),
        ("train.lbl", ("Ya /m/dog",), "train.lbl line 1 repeats 'Ya /m/dog' or is not id<TAB>labels"),
        ("train.lbl", ("Ya\t/m/cow",), "train.lbl line 1: '/m/cow' is not among the 2 classes of"),
        ("label_descriptors.csv", ("0,/m/dog,Dog", "1,/m/cat,Dog"), "names a class twice"),
        ("label_descriptors.csv", ("0,/m/dog",), "line 1 is not index,mid,name"),
    ],
)
def test_a_bad_manifest_is_refused_in_one_sentence(tmp_path, monkeypatch, file, lines, words):
    monkeypatch.chdir(tmp_path)
    folder = manifest(tmp_path / "eat", root=".")
    text(tmp_path / "Ya.wav")
    text(tmp_path / "deep/Yb.wav")
    text(folder / file, *lines)
    assert words in refusal("eat", folder / "train.tsv")


def test_manifests_without_their_tables_are_refused_in_one_sentence(tmp_path):
    folder = manifest(tmp_path / "eat", root=str(tmp_path))
    text(tmp_path / "Ya.wav")
    (folder / "train.lbl").unlink()
    assert "train.lbl: no such file; --no-labels lists the clips without" in refusal("eat", folder / "train.tsv")
    (folder / "label_descriptors.csv").unlink()
    assert "give the table index,mid,name as --class-labels" in refusal("eat", folder / "train.tsv")
    assert "holds no *.tsv" in refusal("eat", tmp_path)
    assert "gone.tsv: no such file" in refusal("eat", tmp_path / "gone.tsv", use_labels=False)


# HDF5


def panns(path: Path, names: list[str], targets: list[list[int]], num_classes: int = 527, **attrs: int) -> np.ndarray:
    """Write a pack as PANNs does; return its waveforms, int16 [N, S]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform_NS = np.stack([noise(len(name), 3200) for name in names])
    with h5py.File(path, "w") as pack:
        pack.create_dataset("audio_name", data=np.array(names, dtype="S20"))
        pack.create_dataset("waveform", data=waveform_NS)
        target_NK = pack.create_dataset("target", shape=(len(names), num_classes), dtype=bool)
        for row, ids in enumerate(targets):
            target_NK[row, ids] = True
        pack.attrs.update(attrs)
    return waveform_NS


def test_hdf5_goes_to_shards_and_back(tmp_path):
    parts = tmp_path / "in/unbalanced_train"
    first = panns(parts / "unbalanced_train_part00.h5", ["Ya.wav", "Ybb.wav"], [[0, 526], []], sample_rate=RATE)
    panns(parts / "unbalanced_train_part01.h5", ["Yccc.wav"], [[137]])
    panns(tmp_path / "in/eval.h5", ["Yd.wav"], [[3]], sample_rate=RATE)
    splits, vocabulary, _ = shards(tmp_path / "out", "--source", "hdf5", "--input", tmp_path / "in")
    names = audioset_labels()
    assert vocabulary == list(names)
    assert {name: labels_of(clips) for name, clips in splits.items()} == {
        "unbalanced_train": {"Ya": [names[0], names[526]], "Ybb": [], "Yccc": [names[137]]},
        "eval": {"Yd": [names[3]]},
    }
    np.testing.assert_array_equal(splits["unbalanced_train"]["Ya"][1], first[0])
    np.testing.assert_array_equal(splits["unbalanced_train"]["Ybb"][1], first[1])
    assert len(splits["unbalanced_train"]["Yccc"][1]) == 1600  # 3200 at PANNs' 32 kHz, since the pack does not say


def test_a_row_of_a_pack_is_what_a_file_of_its_samples_is(tmp_path):
    waveform_NS = panns(tmp_path / "a.h5", ["Ya.wav"], [[]], sample_rate=44_100)
    soundfile.write(tmp_path / "a.wav", waveform_NS[0], 44_100, subtype="PCM_16")
    (row,) = list_source("hdf5", [tmp_path / "a.h5"], SourceOptions()).rows
    np.testing.assert_array_equal(read_place(row.place), read_place(Place(str(tmp_path / "a.wav"))))


def test_a_bad_pack_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.h5"
    panns(path, ["Ya.wav"], [[]], num_classes=50, sample_rate=RATE)
    assert "target has the shape (1, 50), not (1, 527)" in refusal("hdf5", path)
    assert "--sample-rate 8000: " in refusal("hdf5", path, use_labels=False, sample_rate_hz=8000)
    with h5py.File(path, "a") as pack:
        del pack["waveform"]
    assert "has no data set 'waveform', as PANNs' packs of waveforms do; it has audio_name, target" in refusal(
        "hdf5", path
    )
    with h5py.File(path, "a") as pack:
        pack["waveform"] = np.zeros((2, 3200), np.int16)
    assert "1 names and a waveform of the shape (2, 3200)" in refusal("hdf5", path)
    panns(path, ["Ya.wav", "Ya.wav"], [[], []])
    assert "lists Ya.wav again" in refusal("hdf5", path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "a.h5 cannot be opened as HDF5" in refusal("hdf5", path)
    assert "gone.h5 cannot be opened as HDF5" in refusal("hdf5", tmp_path / "gone.h5")
    (tmp_path / "empty").mkdir()
    assert "holds no pack; they are named *.h5 or *.hdf5" in refusal("hdf5", tmp_path / "empty")


def test_without_h5py_or_pyav_one_sentence_names_the_extra(tmp_path, monkeypatch):
    panns(tmp_path / "a.h5", ["Ya.wav"], [[]])
    text(tmp_path / "in/dog/a.m4a")
    text(tmp_path / "in/dog/b.wav")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("hdf5", tmp_path / "a.h5").endswith("pip install 'asda[hdf5]'")
    assert (
        refusal("folder", tmp_path / "in") == "dog/a.m4a and 0 more files are AAC, MP4 or WebM: pip install 'asda[m4a]'"
    )


# ESC-50 and Speech Commands

ESC50 = "filename,fold,target,category,esc10,src_file,take"


@pytest.fixture(scope="module")
def esc50(shared, tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """Real clips of folds 1 to 4 in the layout of ESC-50, and the rows of the table they come from."""
    folder = tmp_path_factory.mktemp("esc50")
    with (shared / "data/env/env.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] in ("esc10", "esc50x")][::16]
    lines = []
    (folder / "audio").mkdir()
    for row in rows:
        name = Path(row["path"]).name
        (folder / "audio" / name).symlink_to(shared / "data/env" / row["path"])
        source, take, target = name.removesuffix(".ogg").split("-")[1:]
        esc10 = row["task"] == "esc10"
        lines.append(f"{name},{row['fold']},{target},{row['label']},{esc10},{source},{take}")
    text(folder / "meta/esc50.csv", ESC50, *lines)
    return folder, rows


def test_esc50_goes_to_shards_and_back(esc50, tmp_path):
    folder, rows = esc50
    splits, vocabulary, _ = shards(tmp_path / "out", "--source", "esc50", "--input", folder)
    target = {row["label"]: int(row["path"].removesuffix(".ogg").split("-")[-1]) for row in rows}
    assert vocabulary == sorted(target, key=lambda label: target[label])
    assert {(split, key, *labels) for split, clips in splits.items() for key, labels in labels_of(clips).items()} == {
        (f"fold{row['fold']}", Path(row["path"]).stem, row["label"]) for row in rows
    }
    for clips in splits.values():
        for key, (_, samples_S) in clips.items():
            decoded, _ = soundfile.read(folder / "audio" / f"{key}.ogg", dtype="float64")
            np.testing.assert_array_equal(samples_S, np.clip(np.round(decoded * 32768), -32768, 32767))


def test_esc10_is_a_selection_with_its_own_ids(esc50):
    folder, rows = esc50
    listing = list_source("esc50", [folder], SourceOptions(where=(("esc10", "True"),)))
    chosen = [row for row in rows if row["task"] == "esc10"]
    assert len(listing.rows) == len(chosen)
    assert set(listing.vocabulary or ()) == {row["label"] for row in chosen}
    assert listing.left_out == {"rows without the --where values": len(rows) - len(chosen)}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("filename,fold,category", "a.wav,1,dog"), "has no column 'target'"),
        ((ESC50, "a.wav,one,0,dog,True,1,A"), "line 2: filename, fold, target, category must not be empty"),
        ((ESC50, "a.wav,1,,dog,True,1,A"), "line 2: filename, fold, target, category must not be empty"),
        ((ESC50, "a.wav,1,0,dog,True,1,A", "b.wav,1,0,cat,True,1,A"), "line 3: the target 0 was 'dog' before"),
        ((ESC50, "a.wav,1,0,dog,True,1,A", "b.wav,1,1,dog,True,1,A"), "gives one category two targets"),
        ((ESC50, "a.wav,1,0,dog,True,1,A", "a.wav,2,0,dog,True,1,A"), "line 3 lists a.wav again, after"),
        ((ESC50,), "has no rows below its header"),
    ],
)
def test_a_bad_table_of_esc50_is_refused_in_one_sentence(tmp_path, lines, words):
    (tmp_path / "audio").mkdir()
    text(tmp_path / "meta/esc50.csv", *lines)
    assert words in refusal("esc50", tmp_path)
    assert "has no meta/esc50.csv or no audio/" in refusal("esc50", tmp_path / "meta")


def test_speechcommands_goes_to_shards_and_back(shared, tmp_path):
    folder = tmp_path / "sc"
    with (shared / "data/kws/kws.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "speech_commands"][::40]
    splits_of = {}
    for number, row in enumerate(rows):
        file = shared / "data/kws" / row["path"]
        name = f"{row['label'].removeprefix('en_')}/{file.name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file)
        splits_of[name] = row["split"] if row["split"] == "train" else ("valid", "test")[number % 2]
    lists = {s: [n.replace(".ogg", ".wav") for n, split in splits_of.items() if split == s] for s in ("valid", "test")}
    assert all(lists.values())
    text(folder / "validation_list.txt", *lists["valid"])
    text(folder / "testing_list.txt", *lists["test"])
    text(folder / "LICENSE")
    sound(folder / "_background_noise_/white_noise.wav", 0, RATE)
    splits, vocabulary, out = shards(tmp_path / "out", "--source", "speechcommands", "--input", folder)
    assert {(split, key, *labels) for split, clips in splits.items() for key, labels in labels_of(clips).items()} == {
        (split, name.removesuffix(".ogg").replace("/", "_"), name.split("/")[0]) for name, split in splits_of.items()
    }
    assert vocabulary == sorted({name.split("/")[0] for name in splits_of})
    assert "left out: 1 recordings in _background_noise_" in out
    assert "left out: 1 files that are not recordings of words" in out


def test_a_bad_folder_of_speechcommands_is_refused_in_one_sentence(tmp_path):
    text(tmp_path / "yes/a.wav")
    assert "validation_list.txt: no such file" in refusal("speechcommands", tmp_path)
    text(tmp_path / "validation_list.txt", "yes/a.wav")
    assert "testing_list.txt: no such file" in refusal("speechcommands", tmp_path)
    text(tmp_path / "testing_list.txt", "yes/a.wav")
    assert "testing_list.txt line 1: yes/a.wav is in both lists" in refusal("speechcommands", tmp_path)
    text(tmp_path / "testing_list.txt", "no/b.wav", "no/c.wav")
    assert "has no file for no/b, no/c, which its lists name" in refusal("speechcommands", tmp_path)
    assert "is not a folder" in refusal("speechcommands", tmp_path / "gone")
    text(tmp_path / "testing_list.txt")
    (tmp_path / "yes/a.wav").unlink()
    assert "holds no audio in subfolders" in refusal("speechcommands", tmp_path)


# What all have in common


def test_options_that_a_source_does_not_know_are_refused(tmp_path):
    assert "use it with --source audioset or eat" in refusal("folder", tmp_path, audio=tmp_path)
    assert "use it with --source csv or esc50 or parquet or tar" in refusal("hdf5", tmp_path, where=(("a", "b"),))
    assert "use it with --source audioset or eat or hdf5" in refusal("csv", tmp_path, class_labels=tmp_path)
    assert "use it with --source eat or hdf5" in refusal("csv", tmp_path, sample_rate_hz=1)
    assert "--source csv takes one --input and got 2" in refusal("csv", tmp_path, tmp_path)


def test_a_csv_goes_to_shards_and_back(tmp_path):
    wave = sound(tmp_path / "a.wav")
    text(tmp_path / "t.csv", "path, label, split", 'a.wav, "x; y", valid')
    splits, vocabulary, _ = shards(tmp_path / "out", "--source", "csv", "--input", tmp_path / "t.csv")
    assert (labels_of(splits["valid"]), vocabulary) == ({"a": ["x", "y"]}, ["x", "y"])
    np.testing.assert_array_equal(splits["valid"]["a"][1], wave)


def test_a_folder_goes_to_shards_and_back_with_files_that_only_ffmpeg_reads(tmp_path):
    wave = sound(tmp_path / "in/dog/a.wav")
    (tmp_path / "in/cat").mkdir()
    alac(tmp_path / "in/cat/b.m4a", wave)
    splits, _, _ = shards(tmp_path / "out", "--source", "folder", "--input", tmp_path / "in")
    assert labels_of(splits["train"]) == {"dog_a": ["dog"], "cat_b": ["cat"]}
    np.testing.assert_array_equal(splits["train"]["cat_b"][1], wave)


def alac(path: Path, samples_S: np.ndarray) -> None:
    """Write 16 kHz mono samples as lossless ALAC in MP4."""
    import av

    with av.open(str(path), "w", format="ipod") as container:
        stream = container.add_stream("alac", rate=RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(samples_S[None], format="s16p", layout="mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.mark.parametrize("hidden", ["._{}", "__MACOSX/._{}", ".trash/{}"])
def test_hidden_files_are_no_input_in_any_source(audioset, tmp_path, hidden):
    def hide(name: str) -> None:
        folder, _, file = name.rpartition("/")
        text(tmp_path / folder / hidden.format(file), "\0macOS")

    manifest(tmp_path / "eat", root=str(tmp_path / "audio"))
    panns(tmp_path / "packs/a.h5", ["Ya.wav"], [[]], sample_rate=RATE)
    text(tmp_path / "sc/validation_list.txt", "yes/a.wav")
    text(tmp_path / "sc/testing_list.txt")
    sound(tmp_path / "sc/yes/a.wav")
    sound(tmp_path / "esc/audio/a.wav")
    text(tmp_path / "esc/meta/esc50.csv", ESC50, "a.wav,1,0,dog,True,1,A", "._a.wav,1,0,dog,True,1,A")
    for name in ("Ya.wav", "deep/Yb.wav", "Yc.flac", "Yd.flac"):
        sound(tmp_path / "audio" / name)
    for name in ("csv/eval_segments.csv", "eat/train.tsv", "packs/a.h5", "sc/yes/a.wav", "audio/Y--PJHxphWEs.wav"):
        hide(name)
    options = SourceOptions(audio=tmp_path / "audio")
    counts = {
        "audioset": (tmp_path / "csv", 3, options),
        "eat": (tmp_path / "eat", 4, SourceOptions()),
        "hdf5": (tmp_path / "packs", 1, SourceOptions()),
        "speechcommands": (tmp_path / "sc", 1, SourceOptions()),
        "esc50": (tmp_path / "esc", 1, SourceOptions()),
    }
    found = {name: len(list_source(name, [path], some).rows) for name, (path, _, some) in counts.items()}
    assert found == {name: count for name, (_, count, _) in counts.items()}
