"""A folder of audio files, one class per subfolder."""

from pathlib import Path

from asda.data.audio.find import is_audio, walk
from asda.data.audio.waves import AUDIO_EXTENSIONS
from asda.errors import UserError
from asda.sharding.audio_ref import Place
from asda.sharding.sources.listing import Listing, Row, SourceOptions, only_input


def rows_from_folder(inputs: list[Path], options: SourceOptions) -> Listing:
    """List a folder's audio: one class per first-level subfolder, or no labels if all files lie directly in it."""
    folder = only_input(inputs, "folder")
    if not folder.is_dir():
        raise UserError(f"--input {folder} is not a folder; --source folder wants a folder of audio files")
    files = sorted(walk(folder))
    audio = [name for name in files if is_audio(name)]
    if not audio:
        known = " ".join(AUDIO_EXTENSIONS)
        raise UserError(f"{folder} holds no audio file among {len(files)} files; known extensions are {known}")
    direct = [name for name in audio if "/" not in name]
    if options.use_labels and 0 < len(direct) < len(audio):
        raise UserError(
            f"{folder} holds audio both directly ({direct[0]}) and in subfolders, which would be classes; "
            "move one kind away, or give --no-labels"
        )
    labelled = options.use_labels and not direct
    rows = [_row(folder, name, labelled) for name in audio]
    return Listing(rows, {"files that are hidden or not audio": len(files) - len(audio)})


def _row(folder: Path, name: str, labelled: bool) -> Row:
    path = f"{folder}/{name}"
    return Row(Place(path), name, (name.split("/")[0],) if labelled else (), "", path)
