"""Keys, splits and shards follow from the clips alone, never from the order in which they are listed."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.plan import assign_splits, choose_vocabulary, keyed, parse_split, plan_split
from asda.sharding.sources.listing import Row


def row(relative: str, labels: tuple[str, ...] = (), group: str = "") -> Row:
    return Row(Place(relative), relative, labels, group, relative)


def split(rows: list[Row], *texts: str) -> dict[str, list[str]]:
    splits = assign_splits(keyed(rows), [parse_split(text) for text in texts])
    return {name: sorted(row.relative for row in part.values()) for name, part in splits.items()}


def test_a_class_whose_name_is_no_text_is_refused():
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.wav: the label 'caf\\udce9' is not UTF-8 text"):
        choose_vocabulary({"train": keyed([row("a.wav", (name,)), row("b.wav", ("café",))])}, None)


def test_all_clips_that_collide_get_a_hash_and_the_others_none():
    keys = {
        r.relative: key
        for key, r in keyed([row("a/b.wav"), row("a_b.wav"), row("x.wav"), row("x.flac"), row("y.wav")]).items()
    }
    assert keys["y.wav"] == "y"
    for name, stem in [("a/b.wav", "a_b"), ("a_b.wav", "a_b"), ("x.wav", "x"), ("x.flac", "x")]:
        assert re.fullmatch(rf"{stem}-[0-9a-f]{{8}}", keys[name])
    assert len(set(keys.values())) == 5


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text("ab/_.-\u00e9", min_size=1, max_size=120), min_size=1, max_size=8), st.randoms())
def test_keys_are_valid_unique_and_independent_of_the_order_of_rows(names, rng):
    rows = [row(name) for name in names]
    keys = keyed(rows)
    assert len(keys) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,95}", key) for key in keys)
    rng.shuffle(rows)
    assert list(keyed(rows).items()) == list(keys.items())


def test_a_share_is_taken_of_every_class():
    rows = [row(f"{label}{n}.wav", (label,)) for label in "abcde" for n in range(40)]
    splits = split(rows, "train=75%", "valid=25%")
    assert Counter(name[0] for name in splits["valid"]) == dict.fromkeys("abcde", 10)
    assert sorted(splits["train"] + splits["valid"]) == sorted(r.relative for r in rows)


def test_shares_stay_exact_on_the_whole_where_every_set_of_labels_is_unique():
    rows = [row(f"{n}.wav", (f"class{n}",)) for n in range(200)]
    splits = split(rows, "a=12.5%", "b=37.5%", "c=50%")
    assert [len(part) for part in splits.values()] == [25, 75, 100]


@given(st.lists(st.sampled_from(["", "a", "b", "c;d"]), min_size=20, max_size=60), st.integers(10, 90))
@settings(max_examples=50, deadline=None)
def test_every_class_has_its_share_within_one_clip(labels, percent):
    rows = [row(f"{n}.wav", (label,)) for n, label in enumerate(labels)]
    part = split(rows, f"x={percent}%", f"y={100 - percent}%")["x"]
    found = Counter(rows[int(name[:-4])].labels for name in part)
    for label, count in Counter(r.labels for r in rows).items():
        assert abs(found[label] - count * percent / 100) <= 1


FOLDS = [row(f"{n}.wav", (), f"fold{n % 3 + 1}") for n in range(6)]
NAMED = [row("0.wav", (), "train"), row("1.wav", (), "dev"), row("2.wav", (), "test")]
PLAIN = [row("0.wav"), row("1.wav")]


@pytest.mark.parametrize(
    ("rows", "rules", "expected"),
    [
        (PLAIN, [], {"train": 2}),
        (PLAIN, ["mine"], {"mine": 2}),
        (FOLDS, [], {"fold1": 2, "fold2": 2, "fold3": 2}),
        (FOLDS, ["train=1,2", "valid=3"], {"train": 4, "valid": 2}),
        (FOLDS, ["train=fold1"], {"train": 2}),
        (FOLDS, ["fold2"], {"fold2": 2}),
        (FOLDS, ["all"], {"all": 6}),
        (NAMED, [], {"dev": 1, "test": 1, "train": 1}),
        (NAMED, ["train"], {"train": 1}),
        (NAMED, ["train", "dev"], {"dev": 1, "train": 1}),
        (NAMED, ["train=train,dev"], {"train": 2}),
        (NAMED, ["a=100%"], {"a": 3}),
        (NAMED, ["a=train,dev", "test"], {"a": 2, "test": 1}),
    ],
)
def test_split_rules_choose_the_clips_they_name(rows, rules, expected):
    assert {name: len(part) for name, part in split(rows, *rules).items()} == expected


@pytest.mark.parametrize(
    ("rows", "rules", "words"),
    [
        (NAMED, ["valid"], "no clip has the split or fold 'valid'; the input has dev, test, train"),
        (PLAIN, ["a=1"], "the input has neither splits nor folds"),
        (FOLDS, ["a=1,2", "b=2"], "'2' already goes to a"),
        (FOLDS, ["a=1", "a=2"], "names a split twice"),
        (FOLDS, ["a=1", "b=10%"], "mixes percentages and values"),
        (PLAIN, ["a=50%", "b=40%"], "add up to 90, not 100"),
        (PLAIN, ["a=99%", "b=1%"], "--split b gets no clip of 2"),
        (PLAIN, ["a b"], "'a b' cannot name a split"),
        (PLAIN, ["=3"], "'' cannot name a split"),
        (PLAIN, ["a=1,,2"], "a value is empty"),
        (PLAIN, ["a=0%"], "0% must be a percentage"),
        (PLAIN, ["a=1/2%"], "1/2% must be a percentage"),
        ([row("a.wav", (), "my split")], [], "'my split' cannot name a split"),
    ],
)
def test_split_rules_that_make_no_sense_are_refused(rows, rules, words):
    with pytest.raises(UserError, match=re.escape(words)):
        split(rows, *rules)


def test_shards_are_as_few_as_allowed_and_of_equal_size():
    rows = [row(f"{n}.wav") for n in range(23)]
    random.Random(0).shuffle(rows)
    keys = keyed(rows)
    tasks = plan_split(Path("out"), "train", keys, (), 10, 600)
    assert [len(task.clips) for task in tasks] == [7, 8, 8]
    assert [task.path.name for task in tasks] == [f"train-{n:06d}.tar.zst" for n in range(3)]
    assert [clip.key for task in tasks for clip in task.clips] == list(keys)
