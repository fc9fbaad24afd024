"""List the audio files that a user means: files as given, and folders with everything below them."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from asda.data.audio.waves import AUDIO_EXTENSIONS, UNREAD_EXTENSIONS
from asda.errors import UserError, say


@dataclass(frozen=True)
class AudioFile:
    """One file to read. Whether it exists, or holds audio, is not known yet."""

    path: Path
    relative: Path  # below the folder that was given, or the name of a file given by itself


def audio_files(given: list[Path]) -> list[AudioFile]:
    """List files as given, and the audio below each folder, sorted: an audio extension, not hidden.

    Raises:
        UserError: a folder holds no audio.
    """
    found: list[AudioFile] = []
    for path in given:
        if not os.path.isdir(path):  # unlike pathlib's it is False if a path cannot be looked at; reading it says why
            found.append(AudioFile(path, Path(path.name)))
            continue
        everything = sorted(walk(path))
        names = [name for name in everything if is_audio(name)]
        if complaint := unread_in_words(everything):
            say(f"{path}: {complaint}")
        if not names:
            raise UserError(f"{path} holds no audio file; known extensions are {' '.join(AUDIO_EXTENSIONS)}")
        found += [AudioFile(path / name, Path(name)) for name in names]
    return found


def is_audio(relative: str) -> bool:
    """Return whether a name has an audio extension and is not hidden."""
    return os.path.splitext(relative)[1].lower() in AUDIO_EXTENSIONS and not is_hidden(relative)


def is_hidden(relative: str) -> bool:
    """Return whether a part of a path is hidden: .x, macOS's ._x, or its folder __MACOSX. Such files are no input."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in relative.split("/"))


def unreadable(names: Iterable[str]) -> dict[str, int]:
    """Count the files, by extension, that hold sound which is not read; the most frequent first."""
    extensions = (os.path.splitext(name)[1].lower() for name in names if not is_hidden(name))
    return dict(Counter(extension for extension in extensions if extension in UNREAD_EXTENSIONS).most_common())


def unread_in_words(names: Iterable[str]) -> str:
    """Say how many files hold sound in a format that is not read, or nothing."""
    counts = unreadable(names)
    kinds = ", ".join(f"{count} {extension}" for extension, count in counts.items())
    return f"passed over, because asda does not read these formats: {kinds}" if counts else ""


def existing(path: Path) -> Path:
    """Return the path as the disk has it, if only its Unicode form differs (é as one character or two), or as given."""
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        forms = (found / unicodedata.normalize(form, part) for form in ("NFC", "NFD"))
        found = next((each for each in (found / part, *forms) if os.path.lexists(each)), found / part)
    return found if os.path.lexists(found) else path


def walk(folder: Path) -> Iterator[str]:
    """Yield the relative paths of all files, following links to folders, each folder once.

    Raises:
        UserError: a folder cannot be listed; its files would be missing without notice.
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
    raise UserError(f"cannot list the folder {error.filename}: {error.strerror}; make it readable or move it away")
