"""Sounds in tars and in parquet files: the shards are those of the same files beside a table."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_sources_tables import labels_of, listed, refusal, shards, table

from asda.data.audio.waves import AudioError
from asda.sharding.audio_ref import Place, read_place
from asda.sharding.sources import list_source
from asda.sharding.sources.listing import SourceOptions

EXTENSIONS = ("wav", "flac", "ogg", "mp3")


def encoded(number: int) -> bytes:
    """Return a sound of a rate and format of its own."""
    samples_S = np.random.default_rng(number).normal(0, 0.05, 12_000 + 100 * number).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples_S, (16_000, 44_100, 48_000, 22_050)[number % 4], format=EXTENSIONS[number % 4])
    return file.getvalue()


SOUNDS = [encoded(number) for number in range(8)]
NAMES = [f"{'ab'[number % 2]}/{number}.{EXTENSIONS[number % 4]}" for number in range(8)]
LABELS = [("dog",), ("cat",), ("dog", "cat"), ()] * 2


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with the sounds and a table of them."""
    lines = []
    for name, content, labels in zip(NAMES, SOUNDS, LABELS, strict=True):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        lines.append(f"{name},{';'.join(labels)}")
    return table(tmp_path / "files", "path,labels", *lines)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def beside(name: str, extension: str) -> str:
    return f"{name.rpartition('.')[0]}.{extension}"


def as_json(name: str, labels: tuple[str, ...]) -> dict[str, bytes]:
    return {beside(name, "json"): json.dumps({"labels": labels, "n": 1}).encode()}


def as_class(name: str, labels: tuple[str, ...]) -> dict[str, bytes]:
    return {beside(name, "cls"): ";".join(labels).encode()}


def as_text(name: str, labels: tuple[str, ...]) -> dict[str, bytes]:
    return {beside(name, "txt"): ";".join(labels).encode() + b"\n"}


@pytest.mark.parametrize("labels_as", [as_json, as_class, as_text])
def test_tars_make_the_shards_of_their_files(files, tmp_path, labels_as: Callable[..., dict[str, bytes]]):
    for number in range(2):
        members = {"._hidden.wav": b"x", "alone.json": b"{}"}
        for name, content, labels in list(zip(NAMES, SOUNDS, LABELS, strict=True))[number::2]:
            members |= labels_as(name, labels) | {name: content}
        tar(tmp_path / f"in/{number:06d}.tar", members)
    listing = listed("tar", tmp_path / "in")
    assert listing.left_out["samples without a sound"] == 2
    assert shards(listing, tmp_path / "a") == shards(listed("csv", files), tmp_path / "b")
    notes = [f"not used: the columns n of {tmp_path / 'in'}"] if labels_as is as_json else []
    assert listing.notes == notes


def test_a_key_ends_at_the_first_dot_and_a_split_is_the_name_of_the_tar(tmp_path):
    members = {"x/a.b.left.wav": SOUNDS[0], "x/a.json": b'{"Label": "dog", "split": "no"}'}
    tar(tmp_path / "train-000000.tar", members)
    tar(tmp_path / "train-000001.tar", {"y.wav": SOUNDS[0], "y.json": b'{"Label": "cat", "split": "no"}'})
    tar(tmp_path / "validation-0.tar", members)
    listing = listed("tar", tmp_path)
    assert {row.relative: (row.labels, row.group) for row in listing.rows} == {
        "train-000000/x/a.b.left.wav": (("dog",), "train"),  # the name is in two tars
        "y.wav": (("cat",), "train"),
        "validation-0/x/a.b.left.wav": (("dog",), "valid"),
    }


def test_numbers_of_classes_need_their_names(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.wav": SOUNDS[0], "a.cls": b"1", "b.wav": SOUNDS[0], "b.cls": b"0\n"})
    assert "a.cls: the label 1 is a number; give a file of names as --labels, or --no-labels" in refusal("tar", path)
    assert labels_of(listed("tar", path, label_names=("dog", "cat"))) == {"a.wav": ("cat",), "b.wav": ("dog",)}
    assert "the label 1 is not one of 0 to 0" in refusal("tar", path, label_names=("dog",))
    assert labels_of(listed("tar", path, use_labels=False)) == {"a.wav": (), "b.wav": ()}


def test_a_sound_of_a_tar_may_be_cut(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.json": b"{}", "a.wav": SOUNDS[0]})
    (row,) = listed("tar", path).rows
    (tmp_path / "a.wav").write_bytes(SOUNDS[0])
    whole_S = read_place(Place(str(tmp_path / "a.wav")))
    np.testing.assert_array_equal(read_place(row.place), whole_S)
    np.testing.assert_array_equal(read_place(row.place.cut(0.25, 0.5)), whole_S[4000:8000])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tar", b"no tar", "a.tar is not an uncompressed tar, or is cut short"),
        ("a.tar", b"\x1f\x8b", "unpack a .gz or .zst"),
        ("a.tar", {"a.txt": b"x"}, "holds no audio file in 1 samples"),
        ("a.tar", {"a.wav": SOUNDS[0], "a.json": b"[1]"}, "a.json is not UTF-8 json: no object"),
        ("a.tar", {"a.wav": SOUNDS[0], "a.json": b"{"}, "a.json is not UTF-8 json: "),
        ("a.tar", {"a.wav": SOUNDS[0], "a.txt": b"\xff"}, "a.txt is not UTF-8 txt: "),
        ("notes.txt", b"", "holds no *.tar"),
        ("._a.tar", b"", "holds no *.tar"),
    ],
)
def test_a_bad_tar_is_refused_in_one_sentence(tmp_path, name, content, words):
    tar(tmp_path / name, content) if isinstance(content, dict) else (tmp_path / name).write_bytes(content)
    assert words in refusal("tar", tmp_path)


def test_a_tar_that_is_cut_short_is_refused_or_costs_its_last_clip(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.wav": SOUNDS[0], "b.wav": SOUNDS[0]})
    whole = path.read_bytes()
    rows = listed("tar", path).rows
    path.write_bytes(whole[: len(SOUNDS[0]) + 2000])
    read_place(rows[0].place)
    with pytest.raises(AudioError, match="the archive ends before it"):
        read_place(rows[1].place)
    assert "x.tar" in refusal("tar", path)
    path.unlink()
    with pytest.raises(AudioError, match="the archive cannot be read"):
        read_place(rows[0].place)


def test_archives_of_some_splits_are_refused_beside_others(tmp_path):
    tar(tmp_path / "train-0.tar", {"a.wav": SOUNDS[0]})
    tar(tmp_path / "other-0.tar", {"b.wav": SOUNDS[0]})
    assert "train-0.tar is named for a split and " in refusal("tar", tmp_path)


# parquet


def parquet(path: Path, cells: list, group_rows: int = 3, names: tuple[str, ...] = (), **columns: list) -> Path:
    """Write cells of sounds, dictionaries of bytes and path, as Hugging Face does."""
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    data = {"audio": pyarrow.array(cells, struct), **{name: pyarrow.array(some) for name, some in columns.items()}}
    made = pyarrow.table(data)
    if names:
        feature = {"names": names, "_type": "ClassLabel"}
        some_list = any(isinstance(item, list) for item in columns["labels"])
        feature = {"feature": feature, "_type": "Sequence"} if some_list else feature
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"labels": feature}}})})
    pyarrow.parquet.write_table(made, path, row_group_size=group_rows)
    return path


CELLS = [{"bytes": content, "path": name} for name, content in zip(NAMES, SOUNDS, strict=True)]


@pytest.mark.parametrize("form", ["lists", "text", "numbers"])
def test_parquet_files_make_the_shards_of_their_files(files, tmp_path, form):
    ids = {"cat": 0, "dog": 1}
    columns: dict[str, list] = {
        "lists": [list(labels) for labels in LABELS],
        "text": [";".join(labels) for labels in LABELS],
        "numbers": [[ids[label] for label in labels] for labels in LABELS],
    }
    for number in range(2):
        labels = columns[form][number * 4 : number * 4 + 4]
        path = tmp_path / f"in/data-{number:05d}-of-00002.parquet"
        names = ("cat", "dog") if form == "numbers" else ()
        parquet(path, CELLS[number * 4 : number * 4 + 4], names=names, labels=labels, n=[1] * 4)
    listing = listed("parquet", tmp_path / "in")
    assert shards(listing, tmp_path / "a") == shards(listed("csv", files), tmp_path / "b")
    assert listing.notes == [f"not used: the columns n of {tmp_path / 'in'}"]
    assert listing.vocabulary == (("cat", "dog") if form == "numbers" else None)


def test_bytes_or_path_may_be_null(files, tmp_path):
    cells = [{"bytes": SOUNDS[0], "path": None}, {"bytes": None, "path": NAMES[1]}, CELLS[2]]
    path = parquet(files.parent / "t.parquet", cells, label=["a", "b", "c"])
    listing = listed("parquet", path)
    assert [row.relative for row in listing.rows] == ["t/0", NAMES[1], NAMES[2]]
    for number, row in enumerate(listing.rows):
        np.testing.assert_array_equal(read_place(row.place), read_place(Place(str(files.parent / NAMES[number]))))
    one_group = parquet(tmp_path / "u.parquet", [cells[1]], label=["b"])
    assert listed("parquet", one_group).rows[0].place == Place(str(tmp_path / NAMES[1]))
    empty = parquet(tmp_path / "v.parquet", [cells[0], {"bytes": None, "path": None}, None], label=["b"] * 3)
    assert "v.parquet row 1: audio has neither bytes nor a path" in refusal("parquet", empty)


def test_splits_and_numbers_of_classes_are_those_of_hugging_face(tmp_path):
    for split in ("train", "validation", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", CELLS[:1], names=("z", "a"), labels=[0])
    listing = listed("parquet", tmp_path)
    assert {row.group: (row.relative, row.labels) for row in listing.rows} == {
        split: (f"{file}-00000-of-00001/a/0.wav", ("z",))
        for split, file in {"train": "train", "valid": "validation", "test": "test"}.items()
    }
    assert listing.vocabulary == ("z", "a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": [3]}, "x.parquet row 0: the label 3 is a number; give a file of names as --labels"),
        ({"labels": [3], "names": ("a",)}, "the label 3 is not one of 0 to 0"),
        ({"label": ["Guitar,Music", "Music", "Guitar"]}, "give --label-separator ','"),
    ],
)
def test_labels_that_are_not_clear_are_refused_in_one_sentence(tmp_path, arguments, words):
    cells = CELLS[: len(next(iter(arguments.values())))]
    path = parquet(tmp_path / "x.parquet", cells, **arguments)
    assert words in refusal("parquet", path)


def test_a_bad_parquet_file_is_refused_in_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    path.write_bytes(b"no parquet")
    assert "x.parquet cannot be opened as parquet: " in refusal("parquet", path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), path)
    assert "has 0 columns struct<bytes, path>; one is read" in refusal("parquet", path)
    rows = listed("parquet", parquet(path, CELLS[:2], label=["a", "b"])).rows
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AudioError, match=r"parquet: .*cannot be opened as parquet"):
        read_place(Place(str(tmp_path / "gone.parquet"), entry="audio", row=0))
    assert len(rows) == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("parquet", path).endswith("which needs pyarrow: pip install 'asda[parquet]'")


def test_options_of_tables_hold_for_archives_too(tmp_path):
    for number, languages in enumerate((["ar", "ar", "en"], ["fr", "fr", "fr"])):
        words = ["a|b", "b", "a"]
        cells = CELLS[3 * number :][:3]
        parquet(tmp_path / f"{number}.parquet", cells, word=words, lang=languages, speaker=words)
    listing = list_source("parquet", [tmp_path], SourceOptions(label_column="word", label_separator="|"))
    assert list(labels_of(listing).values()) == [("a", "b"), ("b",), ("a",)] * 2
    assert listing.notes == [f"not used: the columns lang, speaker of {tmp_path}"]
    arabic = SourceOptions(label_column="word", label_separator="|", where=(("lang", "ar"),))
    assert len(list_source("parquet", [tmp_path], arabic).rows) == 2
    assert "give --label-separator '|'" in refusal("parquet", tmp_path, label_column="word")
    parquet(tmp_path / "2.parquet", CELLS[6:7], label=["a"])
    assert "differ in their column of labels, or its names; run apart" in refusal("parquet", tmp_path)
