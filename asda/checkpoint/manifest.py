"""The manifest of a checkpoint: which files belong to it, with their sizes and hashes, written after all of them.

    {"hash": ..., "format": 2, "step": 1000, "world_size": 2, "config_hash": ..., "data_state": {...},
     "files": {"model.safetensors": {"bytes": 379802624, "xxh3_128": "..."}, ...}}

Its first entry is the hash of the rest, so that damage to the manifest itself is noticed too. A manifest may come from
anyone: names are plain names, sizes are compared before anything is read, and nothing is opened that it does not list.
xxh3 finds damage; it does not prove who made a file.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from asda.system import hash_bytes, hash_file, rename_durably, sync

FORMAT = 2
READABLE_FORMATS = (1, 2)  # format 1 kept DeepSpeed's pickles: only its weights and configuration are read
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20  # 100,000 ranks

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# One name, or one below engine/ in format 1. A leading dot would be a temporary file, or lead out of the folder.
FileName = Annotated[str, Field(pattern=r"^(engine/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$")]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class FileEntry:
    """The size and the hash that a file must have."""

    __pydantic_config__ = STRICT

    bytes: Count
    xxh3_128: Hash


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json; folders of weights have no step, world size and data."""

    __pydantic_config__ = STRICT

    files: dict[FileName, FileEntry]
    format: int = FORMAT
    step: Count | None = None
    world_size: Count | None = None
    config_hash: Hash | None = None  # of config.json
    data_state: dict[str, Any] = field(default_factory=dict)  # which shards in which order
    hash: Hash | None = None  # of all other entries; absent in format 1


@lru_cache
def _validator() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)  # building one takes milliseconds


def entry_of(path: Path) -> FileEntry:
    """Return the size and the hash of a file as it can be read back."""
    return FileEntry(path.stat().st_size, hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write manifest.json into a folder; return its path."""
    fields = {name: value for name, value in asdict(manifest).items() if value is not None and name != "hash"}
    path = folder / MANIFEST
    path.write_text(_with_hash(fields), encoding="utf-8")
    return path


def damage(folder: Path, part: int = 0, parts: int = 1, *, from_disk: bool = False) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if they match the manifest.

    Args:
        folder: the checkpoint, or a folder of weights with a manifest.
        part: the share of the files to read and hash; names and sizes are checked for all files.
        parts: the number of shares, so that each rank of a run checks one.
        from_disk: read past the page cache; slower if the files are loaded next.
    """
    manifest = _read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    complaint = _wrong_names(folder, manifest) or _wrong_sizes(folder, manifest)
    by_size = sorted(manifest.files, key=lambda name: (manifest.files[name].bytes, name))
    return complaint or _wrong_hash(folder, manifest, by_size[part::parts], from_disk)


def _read_manifest(folder: Path) -> Manifest | str:
    """Return the manifest, or what is wrong with it."""
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        return "it is a link; copy the checkpoint itself"
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            return f"its manifest.json has {path.stat().st_size} bytes, more than {MAX_MANIFEST_BYTES}"
        text = path.read_text(encoding="utf-8")
        manifest = _validator().validate_json(text)
    except OSError as error:
        return f"its manifest.json cannot be read: {error.strerror}"
    except ValidationError as error:
        first = error.errors()[0]
        return f"its manifest.json is malformed at {'.'.join(map(str, first['loc'])) or 'top'}: {first['msg']}"
    except ValueError:
        return "its manifest.json is not UTF-8"
    if manifest.format not in READABLE_FORMATS:
        return f"its manifest.json has format {manifest.format}, this version of asda reads {READABLE_FORMATS}"
    if manifest.format > 1 and text != _with_hash({k: v for k, v in json.loads(text).items() if k != "hash"}):
        return "the hash of manifest.json differs from the one in it"
    return manifest


def _with_hash(fields: dict[str, Any]) -> str:
    """Return the only text that a manifest with these entries may have."""
    digest = hash_bytes(json.dumps(fields).encode())
    return json.dumps({"hash": digest, **fields}, indent=2) + "\n"


def _wrong_names(folder: Path, manifest: Manifest) -> str | None:
    step = folder.name.removeprefix("step-")
    if manifest.step is not None and step != folder.name and step.isdecimal() and int(step) != manifest.step:
        return f"its manifest.json is of step {manifest.step}"
    for path in folder.glob("*.safetensors"):
        if path.name not in manifest.files:
            return f"{path.name} is not in its manifest.json"
    return None


def _wrong_sizes(folder: Path, manifest: Manifest) -> str | None:
    for name, expected in manifest.files.items():
        path = folder / name
        if path.is_symlink():
            return f"{name} is a link; copy the file itself"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.bytes:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {expected.bytes}"
    return None


def _wrong_hash(folder: Path, manifest: Manifest, names: list[str], from_disk: bool) -> str | None:
    for name in names:
        try:
            found = hash_file(folder / name, from_disk=from_disk)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != manifest.files[name].xxh3_128:
            return f"the hash of {name} differs from the manifest's"
    return None


TEMPORARY = ".tmp-"


def commit_folder(temporary: Path, folder: Path, manifest: Manifest) -> None:
    """Give a temporary folder, whose files are on the disk, its manifest and its name; replace what had the name."""
    sync(write_manifest(temporary, manifest))
    sync(temporary)
    if folder.exists():
        remove(folder)
    rename_durably(temporary, folder)


def remove(path: Path) -> None:
    """Remove a file or a folder: first its name, in one step, so that nobody sees half a checkpoint.

    On a network disk a file that a reader holds open stays, under a temporary name.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.name.startswith(TEMPORARY):
        nameless = path.with_name(f"{TEMPORARY}removed-{path.name}")
        shutil.rmtree(nameless, ignore_errors=True)
        path = path.rename(nameless)
    shutil.rmtree(path, ignore_errors=True)
