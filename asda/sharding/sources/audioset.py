"""AudioSet as users have it: tables of segments, and the audio of the videos that they could download.

Downloaders name files in several ways, and a YouTube id has 11 characters, so each name means one thing:

    --PJHxphWEs.m4a, Y--PJHxphWEs.wav        a whole video, or its segment: told by the length when it is read
    --PJHxphWEs_30000.wav                    the segment that begins at 30000 ms; also _30, in seconds
    --PJHxphWEs_30.000_40.000.flac           the segment from 30 s to 40 s; also in milliseconds
"""

import re
from collections.abc import Iterator
from pathlib import Path

from asda.data.audio.find import is_audio, walk
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import (
    Classes,
    Listing,
    Row,
    SourceOptions,
    check_cells,
    examples,
    files_in,
    read_cells,
    require_columns,
    segment_of,
)

COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")
VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}", re.ASCII)
TIME = r"_(\d+(?:\.\d+)?)"
FILE_STEM = re.compile(rf"Y?({VIDEO_ID.pattern})(?:{TIME}(?:{TIME})?)?", re.ASCII)
Segment = tuple[str, str, float, float, str]  # place for messages, video, start and stop in s, MIDs


def rows_from_audioset(inputs: list[Path], options: SourceOptions) -> Listing:
    """List the segments of one or more CSVs whose audio is in the folder --audio; a CSV's stem is their split."""
    if options.audio is None:
        raise UserError("--source audioset needs --audio, the folder with the downloaded files")
    classes = Classes(options.class_labels)
    tables = [table for path in inputs for table in files_in(path, "_segments.csv", "balanced_train_segments.csv")]
    files = AudioFolder(options.audio)
    rows: list[Row] = []
    missing: list[tuple[str, str]] = []
    for table in tables:
        group = table.stem.removesuffix("_segments")
        for where, video, start_s, stop_s, mids in _read_segments(table):
            found = files.find(video, start_s, stop_s)
            name = f"{video}_{round(1000 * start_s)}"
            if isinstance(found, str):
                missing.append((name, found))
            else:
                labels = classes.labels(mids, where) if options.use_labels else ()
                rows.append(Row(found, name, labels, group, found.path))
    if files.ambiguous:
        several = f"several files for a segment: {examples(files.ambiguous)}"
        raise UserError(f"--audio {options.audio} has {several}; keep one of each")
    if not rows:
        names = "Y<id>.wav, <id>.m4a, <id>_<start in ms>.flac or the like"
        raise UserError(f"--audio {options.audio} holds none of the {len(missing)} segments; files are named {names}")
    left_out = {"files of --audio that are not audio, or not named by a video id": files.num_others}
    return Listing(rows, left_out, classes.names if options.use_labels else None, missing)


def _read_segments(table: Path) -> Iterator[Segment]:
    """Yield the segments of a CSV, whose header may be the last of AudioSet's comments. Raises UserError."""
    header: list[str] = []
    for line, cells in read_cells(table):
        where = f"{table} line {line}"
        if header and not cells[0].startswith("#"):
            check_cells(where, cells, len(header))
            yield _segment(where, *(cells[header.index(column)] for column in COLUMNS))
            continue
        names = [cell.lstrip("# ").strip() for cell in cells]
        if COLUMNS[0] in names:
            require_columns(table, names, COLUMNS)
            header = names
        elif not cells[0].startswith("#"):
            raise UserError(f"{where} comes before a header; it must name {', '.join(COLUMNS)}")
    if not header:
        raise UserError(f"{table} is empty; it must begin with a header that names {', '.join(COLUMNS)}")


def _segment(where: str, video: str, start: str, stop: str, mids: str) -> Segment:
    video = video.strip()
    if not VIDEO_ID.fullmatch(video):
        raise UserError(f"{where}: {video!r} is not a YouTube id of 11 letters, digits, - and _")
    return where, video, *segment_of(where, start, stop), mids


class AudioFolder:
    """The files of a folder by the id of their video. The folder is listed once, not for every row."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"--audio {folder} is not a folder")
        self.folder = folder
        self.num_others = 0
        self._file_of: dict[str, str] = {}  # the one file of a video, named by its id alone, as most are
        self._files_of: dict[str, list[str]] = {}  # all others
        self.ambiguous: list[str] = []  # segments for which find() has met several files
        for name in walk(folder):
            match = _parsed(name)
            if not match or not is_audio(name):
                self.num_others += 1
            elif match[2] or self._file_of.setdefault(match[1], name) is not name:
                self._files_of.setdefault(match[1], []).append(name)

    def find(self, video: str, start_s: float, stop_s: float) -> Place | str:
        """Return the place of a segment, or the reason why it has none."""
        plain, others = self._file_of.get(video), self._files_of.get(video, [])
        fitting = [name for name in others if _fits(name, start_s, stop_s)]
        if plain:
            fitting.append(plain)
        if not fitting:
            return f"no file in --audio but for other times, such as {others[0]}" if others else "no file in --audio"
        if len(fitting) > 1:
            self.ambiguous.append(f"{video} ({' and '.join(sorted(fitting))})")
        path = f"{self.folder}/{fitting[0]}"
        return Place(path, start_s, stop_s) if fitting[0] == plain else Place(path)


def _parsed(name: str) -> re.Match[str] | None:
    """Match video id, first and second time in a file's name; None if it has no id."""
    return FILE_STEM.fullmatch(name.rpartition("/")[2].rpartition(".")[0])


def _fits(name: str, start_s: float, stop_s: float) -> bool:
    """Return whether the times in a file's name, if any, are those of the segment, in seconds or milliseconds."""
    match = _parsed(name)
    times = [float(time) for time in match.groups()[1:] if time is not None] if match else []
    in_ms = [round(1000 * time_s) for time_s in (start_s, stop_s)][: len(times)]
    return times == in_ms or [round(1000 * time) for time in times] == in_ms
