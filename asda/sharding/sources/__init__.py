"""Sources of clips: a function for each, all in the table SOURCES.

A source lists clips and what is known about them; it opens no audio. To add one, write a function
(input paths, options) -> Listing and name it in SOURCES: asda shards offers it as --source.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from asda.data.audio.ffmpeg import EXTRA, has_pyav
from asda.data.audio.find import is_hidden
from asda.data.audio.waves import PYAV_EXTENSIONS
from asda.errors import UserError
from asda.sharding.sources.archives import rows_from_parquet, rows_from_tar
from asda.sharding.sources.audioset import rows_from_audioset
from asda.sharding.sources.files import rows_from_esc50, rows_from_folder, rows_from_fsd50k, rows_from_speechcommands
from asda.sharding.sources.listing import Listing, Row, SourceOptions
from asda.sharding.sources.prepared import rows_from_eat, rows_from_hdf5
from asda.sharding.sources.tables import refuse_missing, rows_from_csv

SOURCES: dict[str, Callable[[list[Path], SourceOptions], Listing]] = {
    "audioset": rows_from_audioset,
    "csv": rows_from_csv,
    "eat": rows_from_eat,
    "esc50": rows_from_esc50,
    "folder": rows_from_folder,
    "fsd50k": rows_from_fsd50k,
    "hdf5": rows_from_hdf5,
    "parquet": rows_from_parquet,
    "speechcommands": rows_from_speechcommands,
    "tar": rows_from_tar,
}

# Options that only some sources understand, and what to say to the others.
OPTIONS: dict[str, tuple[set[str], str]] = {
    "where": ({"csv", "esc50", "parquet", "tar"}, "--where needs a table's columns"),
    "audio": ({"audioset", "eat"}, "--audio names the folder of the files that a table lists without paths"),
    "class_labels": ({"audioset", "eat", "hdf5"}, "--class-labels names classes by their index and MID"),
    "sample_rate_hz": ({"eat", "hdf5"}, "--sample-rate is that of HDF5 packs"),
    "path_column": ({"csv"}, "--path-column names a column of a table"),
    "label_column": ({"csv", "parquet", "tar"}, "--label-column names a column of a table"),
    "label_separator": ({"csv", "parquet", "tar"}, "--label-separator is that of a table's cells"),
    "top_folders": ({"folder"}, "--top-folders says what the folders in a folder are"),
}


def list_source(source: str, inputs: list[Path], options: SourceOptions) -> Listing:
    """List the clips of a source. Raises UserError for unknown options, clips listed twice, or a missing decoder."""
    for name, (takers, meaning) in OPTIONS.items():
        if getattr(options, name) and source not in takers:
            raise UserError(f"{meaning}; use it with --source {' or '.join(sorted(takers))}")
    gc.disable()  # among millions of rows it finds nothing and takes a quarter of the time
    try:
        listing = SOURCES[source](inputs, options)
    finally:
        gc.enable()
    listing = _without_hidden(listing)
    _refuse_duplicates(listing.rows)
    if listing.table:
        refuse_missing(listing.rows, listing.table)
    if not has_pyav():
        needing = [row.relative for row in listing.rows if row.place.path.lower().endswith(PYAV_EXTENSIONS)]
        if needing:
            raise UserError(f"{needing[0]} and {len(needing) - 1} more files are AAC, MP4 or WebM: {EXTRA}")
    return listing


def _without_hidden(listing: Listing) -> Listing:
    """Leave out hidden files that a table lists, as the ._x that macOS puts beside each x, and count them."""
    kept = [row for row in listing.rows if not _hidden(row.relative)]
    if not kept:
        raise UserError(f"all {len(listing.rows)} clips are hidden files, such as {listing.rows[0].relative}")
    hidden = len(listing.rows) - len(kept)
    return replace(listing, rows=kept, left_out=listing.left_out | {"hidden files": hidden}) if hidden else listing


def _hidden(relative: str) -> bool:
    """Return whether a file is hidden, by its path in the input; outside of it by its name alone."""
    outside = relative.startswith(("/", "../"))
    return is_hidden(relative.rpartition("/")[2] if outside else relative) or "/__MACOSX/" in relative


def _refuse_duplicates(rows: list[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.relative in seen:
            first = next(other for other in rows if other.relative == row.relative)
            raise UserError(f"{row.where} lists {row.relative} again, after {first.where}; keep one of them")
        seen.add(row.relative)
