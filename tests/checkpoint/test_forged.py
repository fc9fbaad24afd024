"""A checkpoint from a stranger, whose manifest fits what it forges, is refused in a sentence and runs nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from fault_table import Count
from tiny_checkpoints import save, tiny_config

from asda.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, FileEntry, Manifest, entry_of, write_manifest
from asda.checkpoint.read import MAX_STATE_BYTES, read_state, resolve_checkpoint
from asda.checkpoint.weights import read_weights
from asda.errors import UserError


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (open, (str(self._path), "w"))


def vouch_for(folder: Path, **entries: FileEntry) -> None:
    """Write the manifest that a forger would: right for every file, and for others as given."""
    files = {path.name: entry_of(path) for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}
    write_manifest(folder, Manifest(files | entries, step=1, world_size=1))


def pickle_as_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    vouch_for(folder)


def absurd_header(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    vouch_for(folder)


def absurd_shape(folder: Path, _: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    vouch_for(folder)


def linked_weights(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").rename(canary.with_name("elsewhere"))
    (folder / "model.safetensors").symlink_to(canary.with_name("elsewhere"))
    vouch_for(folder)


def linked_folder(folder: Path, canary: Path) -> None:
    folder.rename(canary.with_name("step"))
    folder.symlink_to(canary.with_name("step"))


def name_that_leads_out(folder: Path, canary: Path) -> None:
    canary.with_name("secret").write_text("secret")
    vouch_for(folder, **{"../../../secret": entry_of(canary.with_name("secret"))})


def absolute_name(folder: Path, canary: Path) -> None:
    canary.with_name("secret").write_text("secret")
    vouch_for(folder, **{str(canary.with_name("secret")): entry_of(canary.with_name("secret"))})


def absurd_bytes(folder: Path, _: Path) -> None:
    vouch_for(folder, **{"model.safetensors": FileEntry(1 << 80, "0" * 32)})


def unlisted_weights(folder: Path, _: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "optimizer-00001-of-00002.safetensors")


def nested_manifest(folder: Path, _: Path) -> None:
    (folder / MANIFEST).write_text('{"files":' * 100_000)


def huge_manifest(folder: Path, _: Path) -> None:
    os.truncate(folder / MANIFEST, MAX_MANIFEST_BYTES + 1)  # a hole, of no bytes on the disk


def nested_state(folder: Path, _: Path) -> None:
    (folder / "state.json").write_text('{"format":2,"step":' + "[" * 100_000)
    vouch_for(folder)


def huge_state(folder: Path, _: Path) -> None:
    os.truncate(folder / "state.json", MAX_STATE_BYTES + 1)
    vouch_for(folder)


def nested_config(folder: Path, _: Path) -> None:
    (folder / "config.json").write_text('{"model":' * 100_000)
    vouch_for(folder)


def a_pipe(folder: Path, _: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


FORGERIES = [
    pickle_as_weights, absurd_header, absurd_shape, linked_weights, linked_folder, name_that_leads_out, absolute_name,
    absurd_bytes, unlisted_weights, nested_manifest, huge_manifest, nested_state, huge_state, nested_config, a_pipe,
]  # fmt: skip


def test_a_forged_checkpoint_is_refused_in_a_sentence_and_runs_nothing(tmp_path: Path, count_fault: Count) -> None:
    refused = ran = 0
    for forge in FORGERIES:
        run = tmp_path / forge.__name__
        canary = run / "canary"
        forge(save(run, tiny_config(), 1), canary)
        try:
            folder = resolve_checkpoint(run)
            read_state(folder, to_resume=True)
            read_weights(folder, "model")
        except UserError as error:
            refused += len(str(error)) < 500  # a sentence does not repeat the file
        ran += canary.exists()
    count_fault("30", "forged checkpoints: pickles, links, names, sizes, bombs", len(FORGERIES), refused, lost=ran)
