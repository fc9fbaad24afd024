"""Write tables of events: one CSV file for all recordings, or a folder with a table for each."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from asda.data.audio.find import AudioFile
from asda.errors import UserError
from asda.inference.events import Event, write_events, write_header
from asda.system import whole_file

Write = Callable[[AudioFile, list[Event]], None]


@contextmanager
def event_tables(out: Path | None, kind: str, files: list[AudioFile]) -> Iterator[Write]:
    """Yield a function that writes the events of a file; the tables are whole, or absent.

    Raises:
        UserError: two recordings would share a table, or the path is a file and a folder is needed.
    """
    if out is None:
        yield lambda file, events: None
    elif kind == "csv":
        with one_table(out, kind) as text:
            yield lambda file, events: write_events(text, kind, str(file.path), events)
    else:
        check_names(out, files)
        yield lambda file, events: write_table(table_path(out, file), kind, file, events)


@contextmanager
def one_table(path: Path, kind: str) -> Iterator[TextIOWrapper]:
    """Open a table that gets its name at the end of the block."""
    if path.is_dir():
        raise UserError(f"--events {path} is a folder; name a .csv file, or choose --events-format audacity or raven")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        write_header(text, kind)
        yield text
        text.detach()


def write_table(path: Path, kind: str, file: AudioFile, events: list[Event]) -> None:
    """Write the table of one recording."""
    with one_table(path, kind) as text:
        write_events(text, kind, str(file.path), events)


def table_path(out: Path, file: AudioFile) -> Path:
    """Return where the table of a recording lies: its name below its input, and .txt."""
    return out / f"{file.relative}.txt"


def check_names(out: Path, files: list[AudioFile]) -> None:
    """Refuse recordings that would share a table. Raises UserError."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--events {out} is a file; name a folder, which gets a table for each recording")
    name, times = Counter(file.relative for file in files).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} inputs are called {name} and would share a table; give one folder that holds them")
