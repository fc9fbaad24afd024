"""Which audio files a user means: files as given, folders with all that is below them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asda.data.audio.waves import AUDIO_EXTENSIONS
from asda.errors import UserError


@dataclass(frozen=True)
class AudioFile:
    """One file to read. That it exists, or holds audio, is not known yet."""

    path: Path
    relative: Path  # below the folder that was given, or the name of a file given by itself


def audio_files(given: list[Path]) -> list[AudioFile]:
    """Files as given, and those below each folder that have an audio extension and are not hidden, sorted.

    Raises:
        UserError: a folder holds no audio.
    """
    return [file for path in given for file in _meant_by(path)]


def _meant_by(path: Path) -> list[AudioFile]:
    # By os.path, because pathlib raises where a path cannot be looked at: whoever reads the file says what is wrong.
    return _below(path) if os.path.isdir(path) else [AudioFile(path, Path(path.name))]


def _below(folder: Path) -> list[AudioFile]:
    names = sorted(name for name in walk(folder) if is_audio(name))
    if not names:
        raise UserError(f"{folder} holds no audio file; known extensions are {' '.join(AUDIO_EXTENSIONS)}")
    return [AudioFile(folder / name, Path(name)) for name in names]


def is_audio(relative: str) -> bool:
    """Whether a name has an audio extension and no part of its path is hidden."""
    return os.path.splitext(relative)[1].lower() in AUDIO_EXTENSIONS and "/." not in f"/{relative}"


def walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files, following links to folders, each folder once.

    Raises:
        UserError: a folder cannot be listed, whose files nobody would miss.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()  # a link back into the tree
            continue
        seen.add(real)
        folders.sort()
        inside = os.path.relpath(root, folder)
        prefix = "" if inside == "." else f"{inside}/"
        yield from (prefix + name for name in files)


def _refuse(error: OSError) -> None:
    raise UserError(
        f"the folder {error.filename} cannot be listed: {error.strerror}; open it, or move it away"
    ) from None
