"""Turn rows into shards before any audio is read: keys, splits, vocabulary, order. All functions are pure.

Nothing here depends on the order in which the source lists its rows, so the same clips make the same shards.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128

import asda
from asda.data.shards.index import SHARD_SUFFIX
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Row, alike, counted

MAX_KEY_CHARS = 95  # a ustar header has 100 bytes for "<key>.json"
KEY_HASH_CHARS = 8  # hex digits that tell colliding keys apart


@dataclass(frozen=True)
class ClipTask:
    """One clip to be written."""

    key: str
    place: Place
    source: str
    labels: tuple[str, ...]
    label_ids: tuple[int, ...]


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written."""

    path: Path
    clips: tuple[ClipTask, ...]
    max_seconds: float


@dataclass(frozen=True)
class Plan:
    """All shards that will be written into a folder."""

    out: Path
    vocabulary: tuple[str, ...]
    splits: dict[str, list[ShardTask]]

    @cached_property
    def tasks(self) -> list[ShardTask]:
        """The shards of all splits; a shard's number is its position."""
        return [task for split in self.splits.values() for task in split]

    @cached_property
    def digest(self) -> str:
        """Hash of everything that determines the bytes, except the audio: see `inputs_digest` in journal.py.

        The folders of input and output do not count, so they may be moved or spelled differently.
        """
        state = xxh3_128(json.dumps([asda.__version__, self.vocabulary]).encode())
        for task in self.tasks:
            clips = [(c.key, c.source, c.labels, c.label_ids, c.place.identity) for c in task.clips]
            state.update(json.dumps([task.path.name, task.max_seconds, clips]).encode())
        return state.hexdigest()

    def part(self, number: int, num_parts: int) -> range:
        """Return the shards of part 1 <= number <= num_parts; the parts differ by at most one shard."""
        return range(len(self.tasks) * (number - 1) // num_parts, len(self.tasks) * number // num_parts)


@dataclass(frozen=True)
class SplitRule:
    """One --split: a name alone, a name for some values, or a name for a share of every class."""

    text: str
    name: str
    values: tuple[str, ...] = ()
    share: Fraction = Fraction(0)


def parse_split(text: str) -> SplitRule:
    """Read NAME, NAME=V1,V2 or NAME=25%. Raises UserError."""
    name, equals, choice = text.partition("=")
    check_split_name(name, f"--split {text}")
    if not equals:
        return SplitRule(text, name)
    if choice.endswith("%"):
        number = re.fullmatch(r"\d+(\.\d+)?%", choice, re.ASCII)
        if not number or not 0 < (share := Fraction(choice[:-1])) <= 100:
            raise UserError(f"--split {text}: {choice} must be a percentage above 0 and at most 100, as in valid=12.5%")
        return SplitRule(text, name, share=share / 100)
    values = tuple(value.strip() for value in choice.split(","))
    if not all(values):
        raise UserError(f"--split {text}: a value is empty; write {name}=1,2 or {name}=25%")
    return SplitRule(text, name, values)


def check_split_name(name: str, where: str) -> None:
    """Refuse names that cannot begin a shard's file name."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name, re.ASCII):
        raise UserError(f"{where}: {name!r} cannot name a split; use letters, digits and _, as in --split train=VALUE")


def keyed(rows: list[Row]) -> dict[str, Row]:
    """Give every row its key; sort the keys by xxh3_64(key), which mixes the clips whatever their origin.

    A key is the relative path without its extension, with "_" for all but letters, digits, - and _. If that is
    ambiguous or too long, all rows concerned get a hash of their relative path: keys do not depend on the rows' order.
    """
    stems = [re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(row.relative)[0]) for row in rows]
    num_rows = Counter(stems)
    keys: dict[str, Row] = {}
    for stem, row in zip(stems, rows, strict=True):
        key = stem
        if num_rows[stem] > 1 or len(stem) > MAX_KEY_CHARS:
            digest = xxh3_64_hexdigest(os.fsencode(row.relative))[:KEY_HASH_CHARS]
            key = f"{stem[: MAX_KEY_CHARS - KEY_HASH_CHARS - 1]}-{digest}"
        if key in keys:
            raise UserError(f"{row.where} and {keys[key].where} get the same key {key}; rename one of the files")
        keys[key] = row
    return dict(sorted(keys.items(), key=lambda item: (xxh3_64_intdigest(item[0].encode()), item[0])))


def assign_splits(keys: dict[str, Row], rules: list[SplitRule]) -> dict[str, dict[str, Row]]:
    """Choose the split of every clip: split name -> its part of `keys`. Clips that no rule names are left out."""
    kinds = {"percentages" if rule.share else "values" if rule.values else "names" for rule in rules}
    names = [rule.name for rule in rules]
    if "percentages" in kinds and len(kinds) > 1:
        given = " ".join(f"--split {rule.text}" for rule in rules)
        raise UserError(f"{given} mixes {' and '.join(sorted(kinds))}; use one kind")
    if len(set(names)) != len(names):
        raise UserError(f"--split names a split twice in {', '.join(names)}; list its values in one, as in train=1,2")
    if kinds == {"percentages"}:
        return _by_shares(keys, rules)
    num_clips = Counter(row.group for row in keys.values())
    split_of = _split_of_group(set(num_clips), rules)
    _refuse_alike(num_clips, split_of, bool(rules))
    splits: dict[str, dict[str, Row]] = {name: {} for name in sorted(set(split_of.values()))}
    for key, row in keys.items():
        if row.group in split_of:
            splits[split_of[row.group]][key] = row
    return splits


def _split_of_group(groups: set[str], rules: list[SplitRule]) -> dict[str, str]:
    """Map the source's groups (splits, folds, or "" alone) to the splits to write."""
    if not rules:
        for group in groups - {""}:
            check_split_name(group, "the input's splits")
        return {group: group or "train" for group in groups}
    folds_or_nothing = all(group == "" or group.startswith("fold") for group in groups)
    if len(rules) == 1 and not rules[0].values and folds_or_nothing and rules[0].name not in groups:
        return dict.fromkeys(groups, rules[0].name)
    split_of: dict[str, str] = {}
    for rule in rules:
        for value in rule.values or (rule.name,):
            group = value if value in groups else f"fold{value}"
            if group not in groups:
                known = ", ".join(sorted(groups - {""})) or "neither splits nor folds"
                raise UserError(f"--split {rule.text}: no clip has the split or fold {value!r}; the input has {known}")
            if group in split_of:
                raise UserError(f"--split {rule.text}: {value!r} already goes to {split_of[group]}")
            split_of[group] = rule.name
    return split_of


def _refuse_alike(num_clips: Counter[str], split_of: dict[str, str], chosen: bool) -> None:
    """Refuse splits such as Train and train, unless --split names both or neither."""
    for one, other in alike(sorted(num_clips)):
        if (one in split_of) + (other in split_of) == 1 or (one in split_of and not chosen):
            both = " and ".join(f"{name!r} ({counted(num_clips[name], 'clip')})" for name in (one, other))
            join = f"give --split {other}={one},{other} to join them"
            raise UserError(f"the splits {both} differ only in case, space or Unicode form; {join}")


def _by_shares(keys: dict[str, Row], rules: list[SplitRule]) -> dict[str, dict[str, Row]]:
    """Deal the clips, class after class, always to the split that is furthest below its share.

    A class is a set of labels. The dealing does not restart with each class, so the whole is divided as exactly as each
    class, even if most sets of labels are unique. All segments of one recording go to one split.
    """
    if (total := sum(rule.share for rule in rules)) != 1:
        percent = float(100 * total)
        raise UserError(f"the percentages of --split add up to {percent:g}, not 100; name a split for the rest too")
    rules = sorted(rules, key=lambda rule: rule.name)
    recordings: dict[tuple, list[str]] = {}  # all cuts of one stay together
    for key, row in keys.items():
        recordings.setdefault(row.place.recording, []).append(key)
    # Stable: by the hash of the first key within a class.
    by_class = sorted(recordings.values(), key=lambda cuts: sorted({n for key in cuts for n in keys[key].labels}))
    chosen: dict[str, str] = {}
    num_clips = Counter({rule.name: 0 for rule in rules})
    for cuts in by_class:
        number = len(chosen) + len(cuts)
        lagging = max(rules, key=lambda rule: rule.share * number - num_clips[rule.name])
        num_clips[lagging.name] += len(cuts)
        chosen |= dict.fromkeys(cuts, lagging.name)
    if empty := [name for name, count in num_clips.items() if count == 0]:
        raise UserError(f"--split {empty[0]} gets no clip of {len(keys)}; raise its percentage")
    return {rule.name: {key: row for key, row in keys.items() if chosen[key] == rule.name} for rule in rules}


def choose_vocabulary(splits: dict[str, dict[str, Row]], fixed: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the sorted labels of all splits, or the fixed ones. Raises UserError if a label is unknown or not text."""
    rows = [row for split in splits.values() for row in split.values()]
    if fixed is None:
        names = {label: row.where for row in rows for label in row.labels}
        for label, where in names.items():
            if any("\ud800" <= letter <= "\udfff" for letter in label):  # Python's form of bytes that are not UTF-8
                raise UserError(f"{where}: the label {label!r} is not UTF-8 text; give the class another name")
        return tuple(sorted(names))
    known = set(fixed)
    for row in rows:
        if unknown := set(row.labels) - known:
            label = min(unknown)
            raise UserError(f"{row.where}: the label {label!r} is not among the {len(fixed)} classes of --labels")
    return fixed


def plan_split(
    out: Path, split: str, keys: dict[str, Row], vocabulary: tuple[str, ...], clips_per_shard: int, max_seconds: float
) -> list[ShardTask]:
    """Cut a split into as few shards as `clips_per_shard` allows, of sizes that differ by at most one clip."""
    label_ids = {label: number for number, label in enumerate(vocabulary)}
    clips = [
        ClipTask(key, row.place, row.relative, row.labels, tuple(label_ids[label] for label in row.labels))
        for key, row in keys.items()
    ]
    num_shards = -(-len(clips) // clips_per_shard)
    bounds = [len(clips) * number // num_shards for number in range(num_shards + 1)]
    return [
        ShardTask(out / f"{split}-{number:06d}{SHARD_SUFFIX}", tuple(clips[start:stop]), max_seconds)
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]
