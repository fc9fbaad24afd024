"""Which audio files a user means: files as given, folders with all that is below them."""

from dataclasses import dataclass
from pathlib import Path

from asda.data.sources import AUDIO_EXTENSIONS, is_audio, walk
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
    return [file for path in given for file in (_below(path) if path.is_dir() else [AudioFile(path, Path(path.name))])]


def _below(folder: Path) -> list[AudioFile]:
    names = sorted(name for name in walk(folder) if is_audio(name))
    if not names:
        raise UserError(f"{folder} holds no audio file; known extensions are {' '.join(AUDIO_EXTENSIONS)}")
    return [AudioFile(folder / name, Path(name)) for name in names]
