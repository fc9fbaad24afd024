"""Files are read without running anything that they name."""

import argparse
import collections
import enum
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from asda.errors import UserError
from asda.official.safe_load import is_settings, plain, safe_load

ZIPPED = [True, False]  # the format of torch.save since 1.6, and the one before


class Call:
    """Is pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.function, self.arguments


def save(content: object, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def official_repository(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of the name that EAT's classes are pickled under, there while the file is written."""
    package = ModuleType("EAT")
    package.PredictionMode = enum.Enum(  # type: ignore[attr-defined]
        "PredictionMode", ["MEAN_POOLING", "CLS_TOKEN", "LIN_SOFTMAX"], module="EAT"
    )
    monkeypatch.setitem(sys.modules, "EAT", package)
    return package


@pytest.mark.parametrize("zipped", ZIPPED)
def test_tensors_and_settings_of_known_classes_are_read_without_their_modules(
    zipped: bool, tmp_path: Path, official_repository: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    meters = collections.defaultdict(list)
    meters["loss"].append(0.5)
    content = {
        "model": {"w": torch.arange(6.0).reshape(2, 3)},
        "args": argparse.Namespace(num_heads=12, inner=argparse.Namespace(rates=[0.1, 0.2])),
        "mode": official_repository.PredictionMode.CLS_TOKEN,
        "meters": meters,
        "best": torch.tensor(0.5).numpy()[()],  # a numpy scalar
    }
    path = save(content, tmp_path / "x.pt", zipped)
    monkeypatch.delitem(sys.modules, "EAT")
    read = safe_load(path)
    assert torch.equal(read["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert plain({key: read[key] for key in ("args", "mode", "meters", "best")}) == {
        "args": {"num_heads": 12, "inner": {"rates": [0.1, 0.2]}},
        "mode": 2,
        "meters": {"loss": [0.5]},
        "best": None,
    }


def test_nodes_of_omegaconf_become_plain_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The state that omegaconf pickles: containers with _content, leaves with _val, both with their parents.
    package = ModuleType("omegaconf")
    for name in ("DictConfig", "AnyNode"):
        setattr(package, name, type(name, (), {"__module__": "omegaconf"}))
    monkeypatch.setitem(sys.modules, "omegaconf", package)
    tree, leaf = package.DictConfig(), package.AnyNode()
    leaf.__dict__ = {"_val": 12, "_parent": tree}
    tree.__dict__ = {"_content": {"depth": leaf}, "_parent": None}
    path = save({"cfg": tree}, tmp_path / "x.pt")
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert plain(safe_load(path)["cfg"]) == {"depth": 12}


@pytest.mark.parametrize("zipped", ZIPPED)
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), r"posix\.system"),
        (os.mkdir, ("{}",), r"posix\.mkdir"),
        (eval, ("open('{}', 'w')",), r"builtins\.eval"),
        (exec, ("open('{}', 'w')",), r"builtins\.exec"),
        (getattr, ("{}", "encode"), r"builtins\.getattr"),
        (Path.touch, ("{}",), r"builtins\.getattr"),
        (pickle.loads, (b"",), r"pickle\.loads"),
    ],
)
def test_a_file_that_would_run_code_is_refused_by_name_and_nothing_runs(
    function: Callable[..., Any], arguments: tuple[Any, ...], name: str, zipped: bool, tmp_path: Path
):
    victim = tmp_path / "made_by_the_pickle"
    filled = [a.format(victim) if isinstance(a, str) else a for a in arguments]
    path = save({"model": {"w": torch.ones(2)}, "cfg": Call(function, *filled)}, tmp_path / "evil.pt", zipped)
    with pytest.raises(UserError, match=f"evil.pt asks to run {name}, which weights never need; nothing was run"):
        safe_load(path)
    assert not victim.exists()


@pytest.mark.parametrize("zipped", ZIPPED)
def test_functions_and_imports_of_the_known_packages_do_not_run_either(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    victim, package = tmp_path / "made_by_the_pickle", tmp_path / "fairseq"
    package.mkdir()
    (package / "__init__.py").write_text("def run(path):\n    open(path, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import fairseq  # type: ignore[import-not-found]  # the one just written

    path = save({"model": {"w": torch.ones(2)}, "cfg": Call(fairseq.run, str(victim))}, tmp_path / "x.pt", zipped)
    (package / "__init__.py").write_text(f"open({str(victim)!r}, 'w').close()\n")
    monkeypatch.delitem(sys.modules, "fairseq")
    assert torch.equal(safe_load(path)["model"]["w"], torch.ones(2))
    assert not victim.exists()
    assert "fairseq" not in sys.modules


def test_names_that_only_begin_like_a_known_package_are_not_known():
    assert is_settings("omegaconf.dictconfig.DictConfig")
    assert not is_settings("omegaconf_evil.Config")
    assert not is_settings("os.fairseq")
    assert not is_settings("builtins.eval")


@pytest.mark.parametrize("zipped", ZIPPED)
def test_a_file_cut_anywhere_is_one_sentence(zipped: bool, tmp_path: Path):
    whole = save({"model": {"w": torch.randn(40, 40)}}, tmp_path / "whole.pt", zipped).read_bytes()
    path = tmp_path / "cut.pt"
    for num_bytes in (1, 2, 10, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(UserError, match=r"cut\.pt is not a whole PyTorch checkpoint"):
            safe_load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b"hello\n" * 100, "not a whole PyTorch checkpoint"), (b"PK\x03\x04", "not a whole PyTorch")],
)
def test_other_files_are_one_sentence(content: bytes, sentence: str, tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        safe_load(tmp_path / "x.pt")
