"""Tables and folders as people have them: what each column means, what is refused, and what is said."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asda.data.labels import audioset_labels
from asda.errors import UserError
from asda.sharding.audio_ref import read_place
from asda.sharding.plan import ShardTask, assign_splits, choose_vocabulary, keyed, parse_split, plan_split
from asda.sharding.sources import list_source
from asda.sharding.sources.listing import Listing, SourceOptions
from asda.sharding.sources.tables import Labels
from asda.sharding.writer import write_shard

RATE = 16_000


def sound(path: Path, seed: int = 0, num_samples: int = RATE) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples_S = np.random.default_rng(seed).normal(0, 1000, num_samples).astype(np.int16)
    soundfile.write(path, samples_S, RATE)
    return samples_S


def listed(source: str, path: Path, **options: object) -> Listing:
    return list_source(source, [path], SourceOptions(**options))  # pyright: ignore[reportArgumentType]


def refusal(source: str, path: Path, **options: object) -> str:
    with pytest.raises(UserError) as error:
        listed(source, path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def shards(listing: Listing, out: Path, *rules: str, vocabulary: tuple[str, ...] | None = None) -> dict[str, bytes]:
    """Write shards and their indexes; return file -> bytes."""
    splits = assign_splits(keyed(listing.rows), [parse_split(rule) for rule in rules])
    names = choose_vocabulary(splits, vocabulary or listing.vocabulary)
    out.mkdir()
    tasks: list[ShardTask] = [t for name, keys in splits.items() for t in plan_split(out, name, keys, names, 4, 600)]
    for task in tasks:
        assert write_shard(task).rejected == []
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(4):
        sound(tmp_path / f"{number}.wav", number)
    return tmp_path


def table(folder: Path, *lines: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def labels_of(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {row.relative: row.labels for row in listing.rows}


# Forms of tables

TABLE = [("file", "tags", "note"), ("0.wav", "dog; barks", "x, y"), ("1.wav", "cat", ""), ("2.wav", "Käfer", "z")]
EXPECTED = {"0.wav": ("dog", "barks"), "1.wav": ("cat",), "2.wav": ("Käfer",)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_the_same_with_any_separator_and_encoding(folder, delimiter, encoding):
    def cell(text: str) -> str:
        return f'"{text}"' if {",", ";"} & set(text) else text

    text = "".join(delimiter.join(map(cell, row)) + "\r\n" for row in TABLE)
    if encoding.endswith("-bom"):
        text, encoding = "\ufeff" + text, encoding.removesuffix("-bom")
    (folder / "t.csv").write_bytes(text.encode(encoding))
    listing = listed("csv", folder / "t.csv")
    assert labels_of(listing) == EXPECTED
    assert listing.notes == [f"not used: the columns note of {folder / 't.csv'}"]


@pytest.mark.parametrize("extension", ["jsonl", "ndjson"])
def test_json_lines_are_tables_whose_cells_may_be_lists(folder, extension):
    objects = [
        {"file_name": "0.wav", "labels": ["dog", "barks"], "n": 1},
        {"labels": "cat", "file_name": "1.wav"},
        {"file_name": "2.wav", "labels": None, "extra": {"a": [1]}},
        {"file_name": "3.wav", "labels": 7},
    ]
    path = table(folder, *map(json.dumps, objects[:2]), "", *map(json.dumps, objects[2:]), name=f"t.{extension}")
    listing = listed("csv", path)
    assert labels_of(listing) == {"0.wav": ("dog", "barks"), "1.wav": ("cat",), "2.wav": (), "3.wav": ("7",)}
    assert listing.notes == [f"not used: the columns n, extra of {path}"]
    where = SourceOptions(where=(("labels", "cat"),))
    assert [row.relative for row in list_source("csv", [path], where).rows] == ["1.wav"]


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("path,label", "label"),
        ("Filename,Category", "Category"),
        ("audio,class", "class"),
        ("filepath,species", "species"),
        ("file_name,target_name,target", "target_name"),
        ("wav,tag,label", "label"),  # the list has an order, not the table
        ("clip,word", None),
    ],
)
def test_columns_are_found_by_a_list_of_names(folder, header, column):
    num_others = header.count(",") - 1
    lines = [f"{number}.wav" + f",other{number}" * num_others + f",name{number}" for number in range(3)]
    if header.startswith("file_name"):
        lines = [f"{number}.wav,name{number},{number}" for number in range(3)]
    listing = listed("csv", table(folder, header, *lines))
    expected = {f"{number}.wav": (f"name{number}",) if column else () for number in range(3)}
    assert labels_of(listing) == expected
    if column is None:
        assert listing.notes[1].startswith(f"no labels: {folder / 't.csv'} has no column such as label, tags")
        assert labels_of(listed("csv", folder / "t.csv", label_column="word")) == {
            f"{number}.wav": (f"name{number}",) for number in range(3)
        }


def test_the_columns_may_be_named(folder):
    path = table(folder, "id,path,other,label", "x,1.wav,0.wav,a", "y,0.wav,1.wav,b")
    listing = listed("csv", path, path_column="other", label_column="id")
    assert labels_of(listing) == {"0.wav": ("x",), "1.wav": ("y",)}
    assert listing.notes == [f"not used: the columns path, label of {path}"]
    assert "--path-column gone: " in refusal("csv", path, path_column="gone")
    assert "--label-column gone: " in refusal("csv", path, label_column="gone")
    assert "its columns are id, path, other, label" in refusal("csv", path, label_column="gone")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("path;x,file", "0.wav;1,2"), "with commas and semicolons between its cells; give --path-column"),
        (("name\tlabel", "0.wav\tdog"), "has no column 'path'; its columns are name, label; name it by --path-column"),
        (("path,label", "https://host/0.wav,dog"), "https://host/0.wav is an address, and addresses are not read"),
        (("path,label", "1.wav,cat", "s3://bucket/0.wav,dog"), "line 3: s3://bucket/0.wav is an address"),
        (("path,labels", "0.wav,\"['dog' 'cat']\""), "line 2: ['dog' 'cat'] is not a list of labels; write [\"a\", "),
        (("path,start", "0.wav,1"), "has a column 'start' and none that completes it to a segment"),
        (("path,onset", "0.wav,1"), "has a column 'onset' and none that completes it to a segment"),
        (("path,start,end", "0.wav,0,x"), "line 2: start '0' and end 'x' must be seconds"),
        (("path,start,end", "0.wav,1,"), "line 2: start '1' and end '' must be seconds"),
        (("path,start,end", "0.wav,1,0.5"), "line 2: start 1 s and end 0.5 s must be 0 <= start < end"),
        (("path,start,end", "0.wav,nan,inf"), "line 2: start nan s and end inf s must be"),
        (("path,start,end", "0.wav,0,1", "0.wav,0.0,1.0"), "line 3 lists 0:0-1.wav again, after"),
        (
            ("path", *(f"gone{n}.wav" for n in range(9)), "0.wav"),
            "9 of 10 files do not exist, such as gone0.wav, gone1",
        ),
        (("path", "._0.wav", "__MACOSX/1.wav"), "all 2 clips are hidden files, such as ._0.wav"),
    ],
)
def test_what_a_table_may_not_say_is_refused_in_one_sentence(folder, lines, words):
    assert words in refusal("csv", table(folder, *lines))


@pytest.mark.parametrize("line", ["[1]", '{"path": "0.wav"', "path", '"0.wav"'])
def test_what_is_no_json_object_is_refused_with_its_line(folder, line):
    path = table(folder, '{"path": "0.wav"}', "", line, name="t.jsonl")
    assert "is not UTF-8 with one JSON object a line, near line 3" in refusal("csv", path)


def test_some_missing_files_are_left_to_the_reader(folder):
    listing = listed("csv", table(folder, "path", *(f"gone{n}.wav" for n in range(8)), "0.wav"))
    assert len(listing.rows) == 9


# Labels


@pytest.mark.parametrize(
    "cells",
    [
        ("Guitar,Music", "Music", "Guitar"),
        ("a|b", "b|c", "c|a"),
        ("a, b, c", "b, a", "c"),
        ("Guitar,Music", "Music,Guitar", ""),
        ("wind/rain", "wind", "rain"),
    ],
)
def test_a_cell_with_another_separator_is_refused_until_the_separator_is_given(folder, cells):
    lines = [f'{number}.wav,"{cell}"' for number, cell in enumerate(cells)]
    path = table(folder, "path,labels", *lines)
    separator = next(s for s in ",|/" if s in cells[0])
    message = refusal("csv", path)
    assert f"line 2: the cell 'labels' is '{cells[0]}', and " in message
    assert f"give --label-separator '{separator}'" in message
    parted = labels_of(listed("csv", path, label_separator=separator))
    assert parted["0.wav"] == tuple(part.strip() for part in cells[0].split(separator))
    assert labels_of(listed("csv", path, label_separator=";"))["0.wav"] == (cells[0],)


@pytest.mark.parametrize(
    "cells",
    [
        ("Bark, dog", "Meow, cat", "dog"),
        ("Speech, man speaking", "Speech, woman speaking", "Speech"),
        ("AC/DC", "AC", "Guitar"),
        ("Guitar,Music;loud", "Music", "Guitar"),
    ],
)
def test_commas_within_names_pass(folder, cells):
    path = table(folder, "path,labels", *(f'{number}.wav,"{cell}"' for number, cell in enumerate(cells)))
    assert labels_of(listed("csv", path))["0.wav"] == tuple(cells[0].split(";"))


def test_the_names_of_audioset_pass_with_all_their_commas():
    labels = Labels(None)
    names = list(audioset_labels())
    random.Random(0).shuffle(names)
    for number, name in enumerate(names):
        assert labels.of(name, str(number)) == (name,)
    labels.refuse_other_separators("label")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['a', 'b']", ("a", "b")),
        ('["a, b", "c"]', ("a, b", "c")),
        ("['it\\'s', \"x\"]", ("it's", "x")),
        ("[ 'a' ]", ("a",)),
        ("[1, 2]", ("1", "2")),
        ("[]", ()),
        ("[music]", ("[music]",)),
        (("a", "a", "b"), ("a", "b")),
        (" a ;; b;a", ("a", "b")),
        ("", ()),
    ],
)
def test_lists_in_cells_are_labels(cell, expected):
    assert Labels(None).of(cell, "here") == expected


# Segments


@pytest.mark.parametrize(
    "header",
    ["start,end", "onset,offset", "start_s,end_s", "start_time,end_time", "Begin Time (s),End Time (s)", "Start,Stop"],
)
def test_columns_of_start_and_end_cut_the_clip(folder, header):
    path = table(folder, f"path,label,{header}", "0.wav,dog,0.25,0.5", "0.wav,cat,0.5,1", "1.wav,cat,,")
    whole = sound(folder / "0.wav", 0)
    listing = listed("csv", path)
    assert labels_of(listing) == {"0:0.25-0.5.wav": ("dog",), "0:0.5-1.wav": ("cat",), "1.wav": ("cat",)}
    assert set(keyed(listing.rows)) == {"0_0_25-0_5", "0_0_5-1", "1"}
    first, second, last = listing.rows
    np.testing.assert_array_equal(read_place(first.place), whole[4000:8000])
    np.testing.assert_array_equal(read_place(second.place), whole[8000:])
    assert len(read_place(last.place)) == RATE
    assert listing.notes == []
    assert len(listed("csv", table(folder, f"path,{header}", "0.wav,0.25,0.5"), use_segments=False).notes) == 2


def test_the_table_in_the_docs_is_read_as_it_says(tmp_path):
    docs = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
    sound(tmp_path / "day1/a.wav", 0, 10 * RATE)
    listing = listed("csv", table(tmp_path, docs.split("### Tables")[1].split("```")[1].strip()))
    assert labels_of(listing) == {"day1/a:3.5-5.wav": ("dog",), "day1/a:7-9.25.wav": ("cat", "purr")}
    assert set(keyed(listing.rows)) == {"day1_a_3_5-5", "day1_a_7-9_25"}
    assert [len(read_place(row.place)) for row in listing.rows] == [24_000, 36_000]


@pytest.mark.parametrize("header", ["start,duration", "onset,duration", "offset,duration", "start_time,duration"])
def test_a_start_may_have_a_duration(folder, header):
    listing = listed("csv", table(folder, f"path,{header}", "0.wav,0.25,0.5"))
    assert [row.relative for row in listing.rows] == ["0:0.25-0.75.wav"]


def test_a_segment_of_a_short_file_is_cut_too_and_one_beyond_its_end_is_a_reason(folder):
    path = table(folder, "path,start,end", "0.wav,0.25,1", "0.wav,2,3", "0.wav,0,400", "1.wav,0,1.3")
    rows = listed("csv", path).rows
    assert len(read_place(rows[0].place)) == 12_000
    assert len(read_place(rows[3].place)) == RATE  # within half a second, as tables round
    with pytest.raises(ValueError, match=r"lasts 1\.0 s and the clip begins at 2 s"):
        read_place(rows[1].place)
    with pytest.raises(ValueError, match=r"lasts 1\.0 s and the clip ends at 400 s"):
        read_place(rows[2].place)


# Names


@pytest.mark.parametrize("name", ["é.wav", "ångström/ü.wav", "が.wav"])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_a_name_in_the_other_unicode_form_is_found_with_the_name_that_the_disk_has(tmp_path, name, on_disk):
    sound(tmp_path / unicodedata.normalize(on_disk, name))
    for form in ("NFC", "NFD"):
        path = table(tmp_path, "path", unicodedata.normalize(form, name))
        (row,) = listed("csv", path).rows
        assert row.relative == unicodedata.normalize(on_disk, name)
        assert Path(row.place.path).is_file()


def test_hidden_files_in_a_table_are_left_out_and_counted(folder):
    hidden = ("._0.wav", "a/.b/1.wav", "__MACOSX/2.wav", str(folder / "._1.wav"))
    listing = listed("csv", table(folder, "path", "0.wav", *hidden))
    assert [row.relative for row in listing.rows] == ["0.wav"]
    assert listing.left_out["hidden files"] == 4


def test_a_table_of_files_below_a_hidden_folder_elsewhere_is_read(tmp_path):
    sound(tmp_path / ".cache/0.wav")
    (tmp_path / "tables").mkdir()
    listing = listed("csv", table(tmp_path / "tables", "path", str(tmp_path / ".cache/0.wav"), "../.cache/1.wav"))
    assert len(listing.rows) == 2


def test_splits_that_differ_only_in_spelling_are_refused_unless_they_are_joined(folder):
    path = table(folder, "path,split", "0.wav,Train", "1.wav,train", "2.wav,test", "3.wav,train")
    keys = keyed(listed("csv", path).rows)
    message = r"'Train' \(1 clip\) and 'train' \(2 clips\) differ only in case, space or Unicode form; give --split"
    for rules in ([], ["train"], ["train=train", "test"], ["x=Train"]):
        with pytest.raises(UserError, match=message):
            assign_splits(keys, [parse_split(rule) for rule in rules])
    joined = assign_splits(keys, [parse_split("train=Train,train"), parse_split("test")])
    assert {name: len(part) for name, part in joined.items()} == {"train": 3, "test": 1}
    assert list(assign_splits(keys, [parse_split("test")])) == ["test"]


# Folders


def test_train_valid_and_test_on_top_of_a_folder_are_splits(tmp_path):
    for number, name in enumerate(["Train/dog/1.wav", "Train/cat/deep/2.wav", "val/dog/3.wav", "TESTING/cat/4.wav"]):
        sound(tmp_path / name, number)
    listing = listed("folder", tmp_path)
    assert {row.relative: (row.labels, row.group) for row in listing.rows} == {
        "Train/dog/1.wav": (("dog",), "train"),
        "Train/cat/deep/2.wav": (("cat",), "train"),
        "val/dog/3.wav": (("dog",), "valid"),
        "TESTING/cat/4.wav": (("cat",), "test"),
    }
    assert listing.notes == ["splits: TESTING/ is test, Train/ is train, val/ is valid"]
    classes = listed("folder", tmp_path, top_folders="classes")
    assert {row.labels for row in classes.rows} == {("Train",), ("val",), ("TESTING",)}
    assert {row.group for row in classes.rows} == {""}


def test_splits_without_classes_have_no_labels(tmp_path):
    for name in ("training/1.wav", "evaluation/2.wav"):
        sound(tmp_path / name)
    assert {row.group: row.labels for row in listed("folder", tmp_path).rows} == {"train": (), "test": ()}


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (
            ("train/a/1.wav", "dog/1.wav"),
            {},
            "holds train, which would be splits, beside dog, which would be classes; ",
        ),
        (("test/a/1.wav", "1.wav"), {}, "which would be splits, beside audio without a folder; give --top-folders"),
        (("val/a/1.wav", "dev/a/1.wav"), {}, "holds dev and val, which both mean the split valid; join or rename them"),
        (("train/a/1.wav", "Train/a/1.wav"), {}, "holds Train and train, which both mean the split train"),
        (("train/a/1.wav", "test/1.wav"), {}, "audio both directly (test/1.wav) and in subfolders"),
        (("a.wav",), {"top_folders": "splits"}, "--top-folders splits: "),
    ],
)
def test_a_folder_that_may_be_read_in_two_ways_is_refused_in_one_sentence(tmp_path, names, options, words):
    for name in names:
        sound(tmp_path / name)
    assert words in refusal("folder", tmp_path, **options)


def test_a_class_named_train_is_one_if_the_user_says_so(tmp_path):
    for name in ("train/1.wav", "dog/2.wav"):
        sound(tmp_path / name)
    assert {row.labels for row in listed("folder", tmp_path, top_folders="classes").rows} == {("train",), ("dog",)}
    assert {row.group for row in listed("folder", tmp_path, top_folders="splits").rows} == {"train", "dog"}


def test_sounds_that_are_not_read_are_named_with_their_count(tmp_path):
    sound(tmp_path / "a.wav")
    for name in ("b.mid", "c.mid", "d.wmv", ".e.mid", "notes.txt"):
        (tmp_path / name).touch()
    assert listed("folder", tmp_path).notes == ["not read: sounds in formats without a decoder here: 2 .mid, 1 .wmv"]


@pytest.mark.parametrize("tree", [("{0}/{1}.wav",), ("train/{0}/{1}.wav", "test/{0}/{1}.wav")])
def test_the_same_sounds_as_a_folder_and_as_a_table_make_the_same_shards(tmp_path, tree):
    lines, with_splits = [], len(tree) > 1
    for number in range(10):
        name = tree[number % len(tree)].format("cat" if number % 3 else "dog", number)
        sound(tmp_path / "in" / name, number)
        lines.append(f"{name},{'cat' if number % 3 else 'dog'}" + (f",{name.split('/')[0]}" if with_splits else ""))
    random.Random(1).shuffle(lines)
    path = table(tmp_path / "in", "path,label" + (",split" if with_splits else ""), *lines)
    for number, rules in enumerate([(), ("a=70%", "b=30%")]):
        of_folder = shards(listed("folder", tmp_path / "in"), tmp_path / f"folder{number}", *rules)
        assert shards(listed("csv", path), tmp_path / f"table{number}", *rules) == of_folder


# FSD50K


def fsd50k(folder: Path) -> Path:
    truth = folder / "FSD50K.ground_truth"
    truth.mkdir(parents=True)
    table(truth, "fname,labels,mids,split", '1,"Cat,Meow","/m/a,/m/b",train', "2,Dog,/m/c,val", name="dev.csv")
    table(truth, "fname,labels,mids", '3,"Dog,Meow","/m/c,/m/b"', name="eval.csv")
    table(truth, "0,Cat,/m/a", "1,Dog,/m/c", "2,Meow,/m/b", name="vocabulary.csv")
    for name in ("dev_audio/1", "dev_audio/2", "eval_audio/3"):
        sound(folder / f"FSD50K.{name}.wav", int(name[-1]))
    return folder


def test_fsd50k_makes_the_shards_of_a_table_of_its_files(tmp_path):
    listing = listed("fsd50k", fsd50k(tmp_path / "in"))
    assert [(row.labels, row.group) for row in listing.rows] == [
        (("Cat", "Meow"), "train"),
        (("Dog",), "val"),
        (("Dog", "Meow"), "test"),
    ]
    assert listing.vocabulary == ("Cat", "Dog", "Meow")
    rows = ('1.wav,"Cat,Meow",train', "2.wav,Dog,val", '3.wav,"Dog,Meow",test')
    lines = [f"FSD50K.{'eval' if 'test' in row else 'dev'}_audio/{row}" for row in rows]
    path = table(tmp_path / "in", "path,labels,split", *lines)
    assert shards(listed("csv", path, label_separator=","), tmp_path / "a") == shards(listing, tmp_path / "b")


def test_a_bad_folder_of_fsd50k_is_refused_in_one_sentence(tmp_path):
    assert "has no " in refusal("fsd50k", tmp_path)
    folder = fsd50k(tmp_path / "in")
    table(folder / "FSD50K.ground_truth", "fname,labels", "3,Cow", name="eval.csv")
    assert "line 2: 'Cow' is not in " in refusal("fsd50k", folder)
    table(folder / "FSD50K.ground_truth", "fname,label", "3,Cow", name="eval.csv")
    assert "has no column 'labels'" in refusal("fsd50k", folder)
    table(folder / "FSD50K.ground_truth", "fname,labels", "3,Dog", name="eval.csv")
    for path in folder.glob("*/*.wav"):
        path.unlink()
    assert "3 of 3 files do not exist, such as FSD50K.dev_audio/1.wav" in refusal("fsd50k", folder)
