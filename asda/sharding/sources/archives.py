"""Sources of sounds inside archives: tars as webdataset reads them, and parquet files as Hugging Face writes them.

    train-000000.tar                       key.flac beside key.json, key.cls or key.txt; a key ends at its first dot
    train-00000-of-00004.parquet           a column struct<bytes, path>; names of labels that are numbers in the schema

Nothing is unpacked: a clip is read from its place in the archive. A clip's name in the input is its name in the
archive, so the shards are those of the same files in a folder, listed by a CSV.
"""

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from asda.data.audio.find import is_audio, is_hidden, walk
from asda.errors import UserError
from asda.sharding.audio_ref import PARQUET_EXTENSION, Place, open_parquet, struct_bytes
from asda.sharding.sources.listing import SPLIT_FOLDERS, Listing, SourceOptions
from asda.sharding.sources.tables import LABEL_COLUMNS, Cell, Record, Table, as_cell, find_column, list_table

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

LARGEST_GROUP_BYTES = 1 << 30  # of the audio in a row group, which is read whole
CLASS, TEXT, SPLIT = "cls", "txt", "split"  # columns
Names = tuple[str, ...] | None  # of labels that are numbers


class Clip(NamedTuple):
    """One sound in an archive."""

    where: str  # for messages
    record: Record
    relative: str  # its name in the archive
    place: Place


def _archives(inputs: list[Path], ending: str) -> dict[Path, str]:
    """Return archive -> split for files as given and all in folders. Raises UserError."""
    paths: list[Path] = []
    for given in inputs:
        below = sorted(n for n in walk(given) if n.endswith(ending) and not is_hidden(n)) if given.is_dir() else ()
        if given.is_dir() and not below:
            raise UserError(f"--input {given} holds no *{ending}")
        paths += [given / name for name in below] or [given]
    split_of = {path: _split_of(path) for path in paths}
    named = [path for path, split in split_of.items() if split]
    if named and len(named) < len(paths):
        other = next(path for path, split in split_of.items() if not split)
        raise UserError(f"{named[0]} is named for a split and {other} is not; rename one, or run once for each")
    return split_of


def _split_of(path: Path) -> str:
    """Return the split that a file's first word means, or its folder's name, or ""."""
    word = re.match(r"[A-Za-z]*", path.name)
    names = (word[0] if word else "", path.absolute().parent.name)
    return next((SPLIT_FOLDERS[name.casefold()] for name in names if name.casefold() in SPLIT_FOLDERS), "")


def _list(clips: Iterable[Clip], columns: Iterable[str], options: SourceOptions, used: set[str], name: str) -> Listing:
    """List clips as the rows of one table; those whose name is in two archives get the archive's before it."""
    now: Clip

    def records() -> Iterator[tuple[str, Record]]:
        nonlocal now
        for now in clips:
            yield now.where, now.record

    columns = list(dict.fromkeys(columns))
    listing = list_table(Table(name, columns, records()), options, lambda *_: (now.relative, now.place), used)
    times = Counter(row.relative for row in listing.rows)
    double = {relative for relative, count in times.items() if count > 1}
    longer = (f"{Path(row.place.path).stem}/{row.relative}" for row in listing.rows)
    rows = zip(listing.rows, longer, strict=True)
    return replace(listing, rows=[replace(r, relative=name) if r.relative in double else r for r, name in rows])


def _named(value: object, names: Names, where: str) -> Cell:
    """Return a label as text: numbers by their names. Raises UserError if a number has none."""
    if isinstance(value, list):
        return tuple(str(_named(item, names, where)) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return as_cell(value)
    if names is None:
        raise UserError(f"{where}: the label {value} is a number; give a file of names as --labels, or --no-labels")
    if not 0 <= value < len(names):
        raise UserError(f"{where}: the label {value} is not one of 0 to {len(names) - 1}, which are named")
    return names[value]


# tar


def rows_from_tar(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the sounds in tars, or in all of a folder, with the labels of the .json, .cls or .txt beside them."""
    clips: list[Clip] = []
    num_alone = 0
    for path, split in _archives(inputs, ".tar").items():
        samples = _samples(path)
        clips += _clips_of_tar(path, split, samples, options)
        num_alone += sum(not any(is_audio(member.name) for member in members) for members in samples.values())
    if not clips:
        raise UserError(f"{inputs[0]} holds no audio file in {num_alone} samples")
    columns = list(dict.fromkeys(column for clip in clips for column in clip.record))
    label = find_column(Table(str(inputs[0]), columns, ()), (*LABEL_COLUMNS, CLASS, TEXT), options.label_column)
    whole = (clip._replace(record={c: clip.record.get(c, "") for c in columns}) for clip in clips)
    listing = _list(whole, columns, replace(options, label_column=label), set(), str(inputs[0]))
    return replace(listing, left_out=listing.left_out | {"samples without a sound": num_alone})


def _samples(path: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Return key -> the files of a tar that are not hidden. Raises UserError."""
    samples: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isreg() and not is_hidden(member.name):
                    samples[f"{folder}/{name.partition('.')[0]}"].append(member)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise UserError(f"{path} is not an uncompressed tar, or is cut short: {error}; unpack a .gz or .zst") from None
    return samples


def _clips_of_tar(
    path: Path, split: str, samples: dict[str, list[tarfile.TarInfo]], options: SourceOptions
) -> Iterator[Clip]:
    """Yield the sounds of a tar, each with what lies beside it."""
    with path.open("rb") as archive:
        for members in samples.values():
            record: Record = {}
            for member in members:
                kind = member.name.rpartition(".")[2].lower()
                if kind in ("json", CLASS, TEXT):
                    archive.seek(member.offset_data)
                    record |= _cells(kind, archive.read(member.size), options, f"{path}: {member.name}")
            record |= {SPLIT: split} if split else {}
            for member in members:
                if is_audio(member.name):
                    place = Place(str(path), first_byte=member.offset_data, num_bytes=member.size)
                    yield Clip(f"{path}: {member.name}", record, os.path.normpath(member.name), place)


def _cells(kind: str, content: bytes, options: SourceOptions, where: str) -> Record:
    """Return the cells that a file beside a sound holds. Raises UserError."""
    try:
        text = content.decode("utf-8-sig").strip()
        if kind == "json":
            cells = json.loads(text)
            if not isinstance(cells, dict):
                raise ValueError("no object")
        else:
            cells = {kind: int(text) if kind == CLASS and re.fullmatch(r"\d{1,18}", text, re.ASCII) else text}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not UTF-8 {kind}: {error}") from None
    label = options.label_column or find_column(Table(where, list(cells), ()), LABEL_COLUMNS) or CLASS
    names, labelled = options.label_names, options.use_labels
    return {c: _named(value, names, where) if c == label and labelled else as_cell(value) for c, value in cells.items()}


# parquet


def rows_from_parquet(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the rows of parquet files, or of all in a folder; train-00000-of-00004.parquet belongs to train."""
    split_of = _archives(inputs, PARQUET_EXTENSION)
    columns: dict[str, None] = {}
    sounds: dict[Path, str] = {}
    kinds: set[tuple[str | None, Names]] = set()  # column of labels, and names of its numbers
    for path, split in split_of.items():
        with open_parquet(str(path)) as file:
            schema = file.schema_arrow
        columns |= dict.fromkeys(schema.names + ([SPLIT] if split else []))
        sounds[path] = _audio_column(path, schema)
        label = find_column(Table(str(path), schema.names, ()), LABEL_COLUMNS, options.label_column, "--label-column")
        kinds.add((label, _names_in(schema, label) if label else None) if options.use_labels else (None, None))
    if len(kinds) > 1:
        raise UserError(f"the parquet files in {inputs[0]} differ in their column of labels, or its names; run apart")
    label, names = kinds.pop()
    clips = (
        clip._replace(record={c: clip.record.get(c, "") for c in columns})
        for path, split in split_of.items()
        for clip in _clips_of_parquet(path, split, sounds[path], (label, names or options.label_names))
    )
    return replace(_list(clips, columns, options, set(sounds.values()), str(inputs[0])), vocabulary=names)


def _audio_column(path: Path, schema: "pyarrow.Schema") -> str:
    import pyarrow

    found = [
        f.name for f in schema if pyarrow.types.is_struct(f.type) and {"bytes", "path"} <= {p.name for p in f.type}
    ]
    if len(found) > 1 and "audio" in found:
        return "audio"
    if len(found) != 1:
        what = f"has {len(found)} columns struct<bytes, path>; one is read, or the one that is named audio"
        raise UserError(f"{path} {what}; its columns are {', '.join(schema.names)}")
    return found[0]


def _names_in(schema: "pyarrow.Schema", label: str) -> Names:
    """Return the names of a column's numbers, which Hugging Face keeps in the schema, or None."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
    except (KeyError, ValueError, TypeError):
        return None
    feature = feature[0] if isinstance(feature, list) and feature else feature
    feature = feature.get("feature", feature) if isinstance(feature, dict) else {}
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if names else None


def _has_bytes(file: "pyarrow.parquet.ParquetFile", audio: str) -> list[bool]:
    """Return for every row whether its sound lies in its cell; its bytes are read only if the file does not tell."""
    found: list[bool] = []
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        column = next(column for column in columns if column.path_in_schema == f"{audio}.bytes")
        if column.total_uncompressed_size > LARGEST_GROUP_BYTES:
            size = f"a row group with {column.total_uncompressed_size >> 20} MiB of audio"
            raise UserError(f"the parquet file has {size}, and at most 1024 are read; write it with row_group_size=100")
        nulls = column.statistics.null_count if column.statistics and column.statistics.has_null_count else None
        if nulls in (0, group.num_rows):
            found += [nulls == 0] * group.num_rows
        else:
            cells = file.read_row_group(number, columns=[f"{audio}.bytes"]).column(audio)
            found += struct_bytes(cells).is_valid().to_pylist()
    return found


def _clips_of_parquet(path: Path, split: str, audio: str, numbered: tuple[str | None, Names]) -> Iterator[Clip]:
    """Yield the rows, without the bytes of their sounds; `numbered` is the column of labels, and their names."""
    with open_parquet(str(path)) as file:
        in_cell = _has_bytes(file, audio)
        others = [name for name in file.schema_arrow.names if name != audio]
        batches = file.iter_batches(columns=[*others, f"{audio}.path"])
        for number, values in enumerate(values for batch in batches for values in batch.to_pylist()):
            where = f"{path} row {number}"
            cells = {c: _named(values[c], numbered[1], where) if c == numbered[0] else values[c] for c in others}
            record = {column: as_cell(value) for column, value in cells.items()} | ({SPLIT: split} if split else {})
            name = (values[audio] or {}).get("path") or ""
            if in_cell[number]:
                relative, place = name or f"{path.stem}/{number}", Place(str(path), entry=audio, row=number)
            elif name:
                relative, place = os.path.normpath(name), Place(os.path.join(path.parent, name))
            else:
                raise UserError(f"{where}: {audio} has neither bytes nor a path")
            yield Clip(where, record, relative, place)
