"""Read files of torch.save without running code in them.

A pickle names classes and functions and asks to call them. torch's weights_only reader calls only those that it knows.
Checkpoints of fairseq also name a few classes that only hold settings (argparse.Namespace, nodes of omegaconf, enums).
An inert stand-in replaces those, so that neither their code nor their modules are needed. Other names are refused.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from asda.errors import UserError

# Packages whose objects in a checkpoint are settings and counters. The last line holds the folders that fairseq's
# user_dir names: classes of the official repositories are pickled under those.
SETTINGS_PACKAGES = {
    *("argparse", "collections", "enum", "fairseq", "numpy", "omegaconf", "pathlib", "typing"),
    *("ASDA", "EAT", "SSLAM", "SSLAM_Stage2", "data2vec", "examples"),
}
SETTINGS_BUILTINS = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "str", "tuple"}


class StandIn:
    """An object in place of one whose class is missing: it keeps what the file gives it, and does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        """Keep the arguments here, since pickles may make objects without initialising them."""
        stand_in = super().__new__(cls)
        stand_in.args, stand_in.state = args, None
        return stand_in

    def __setstate__(self, state: Any) -> None:
        self.state = state


def safe_load(path: Path) -> Any:
    """Return the object in a file of torch.save, on the CPU: plain data, tensors, and StandIn for settings.

    A zipped file is mapped, not read, so that an optimizer's state in it costs nothing. The format before torch 1.6 is
    read as well.

    Raises:
        UserError: the file is empty, damaged, not a checkpoint, or names something that no checkpoint needs.
        OSError: the file cannot be opened.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; fetch or copy the checkpoint again")
    unreadable = UserError(
        f"{path} is not a whole PyTorch checkpoint: it is cut off, damaged, or another kind of file; fetch it again"
    )
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            known: list[Any] = [(what, name) for name, what in stand_ins.items()]
            with torch.serialization.safe_globals(known), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols other than 2, which are read or refused too
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except OSError as error:
            # Without a name it is torch's own, about the bytes and not about the file.
            raise (unreadable if error.filename is None else error) from None
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))  # the one that torch refused
            if found is None:
                raise unreadable from None
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"  # torch leaves "builtins." out
            if name in stand_ins:
                raise unreadable from None
            if not is_settings(name):
                raise UserError(
                    f"{path} asks to run {name}, which weights never need; nothing was run: do not trust this file"
                ) from None
            # The file sets the items of a defaultdict after it has made one.
            stand_ins[name] = (lambda *_: {}) if name == "collections.defaultdict" else StandIn
        except Exception:  # a damaged pickle fails in as many ways as there are instructions in it
            raise unreadable from None


def is_settings(name: str) -> bool:
    """Return whether the stand-in may replace an object with this name ("package.module.Class")."""
    package, _, rest = name.partition(".")
    return rest in SETTINGS_BUILTINS if package == "builtins" else package in SETTINGS_PACKAGES


def plain(value: Any) -> Any:
    """Turn settings into plain dicts, lists, numbers and strings, and anything else into None."""
    if isinstance(value, StandIn):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        if isinstance(state, dict):
            return plain(state.get("_content", state.get("_val", state)))  # omegaconf's containers and leaves
        return plain(value.args[0]) if len(value.args) == 1 else None  # an enum is pickled by its number
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None
