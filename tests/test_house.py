"""The house itself: which rooms there are, who may import whom, and how large they may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asda"
FILES_AT_THE_TOP = 9
CORE_LINES = 4_200
PACKAGE_LINES = 17_800  # without commands/: 14,500 for the house, the rest for reading odd files and ending as told
COMMAND_LINES = 3_800

# From the ground up: a room imports only from rooms that stand before it.
ROOMS = (
    "errors", "system", "config", "models", "data", "engine", "checkpoint", "official", "inference", "__init__",
    "sharding", "objectives", "evaluation", "run", "trainer", "train", "evaluate", "commands", "__main__",
)  # fmt: skip

# What training is made of; README says in which order to read it.
CORE = (
    "train", "trainer", "objectives", "config/base", "config/model", "config/data", "config/run", "models/attention",
    "models/encoder", "models/pretrain", "models/masks", "data/order", "data/clips", "data/stream",
    "data/shards/read", "engine/zero", "engine/ema", "checkpoint/read", "checkpoint/writer", "evaluation/loop",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package stands for its __init__."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


MODULES = modules()


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def room_of(module: str) -> str:
    """The file or folder directly in asda/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_every_room_has_a_place_and_at_most_nine_files_lie_at_the_top():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert files | folders == set(ROOMS)
    assert len(files) <= FILES_AT_THE_TOP


def test_no_import_runs_up():
    places = {room: number for number, room in enumerate(ROOMS)}
    arrows = {(module, target) for module, path in MODULES.items() for target in imports_of(path)}
    up = sorted(f"{a} imports {b}" for a, b in arrows if places[room_of(a)] < places[room_of(b)])
    assert not up, "\n".join(up)


def test_no_files_import_each_other_in_a_circle():
    arrows = {module: set(imports_of(path)) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, targets in arrows.items() if not targets]:
        for module in leaves:
            del arrows[module]
        for targets in arrows.values():
            targets.difference_update(leaves)
    assert not arrows, f"in or above a circle: {arrows}"


def test_the_core_is_twenty_files_of_at_most_4200_lines():
    assert len(CORE) == 20
    assert lines_of([PACKAGE / f"{name}.py" for name in CORE]) <= CORE_LINES


def test_the_package_stays_within_its_envelope():
    commands = sorted((PACKAGE / "commands").rglob("*.py"))
    assert lines_of(sorted(set(PACKAGE.rglob("*.py")) - set(commands))) <= PACKAGE_LINES
    assert lines_of(commands) <= COMMAND_LINES


@pytest.mark.parametrize("folder", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda p: p.name)
def test_every_folder_says_in_a_sentence_what_it_promises(folder: Path):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring
    assert docstring.split("\n")[0].endswith(".")


def test_nothing_needs_the_fast_models_to_be_imported():
    """Delete asda/models/fast and every number stays: it is imported inside the functions that prefer it."""
    for module, path in MODULES.items():
        if not module.startswith("asda.models.fast"):
            at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
            assert not [node for node in at_import if "models.fast" in str(node.module)], module


def test_tests_mirror_the_rooms():
    folders = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*") if any(path.glob("test_*.py"))}
    others = {Path("."), Path("tools"), Path("frozen")}
    assert [str(folder) for folder in sorted(folders - others) if not (PACKAGE / folder).is_dir()] == []


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text, or starts a program whose output is text."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    place = 0 if isinstance(function, ast.Attribute) and name == "open" else 1  # of the mode: Path.open has no name
    if name in ("open", "fdopen"):
        if {k.arg for k in call.keywords} - {"mode", "buffering", "encoding", "errors", "newline", "closefd", "opener"}:
            return False  # of something else than a file
        given = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
        mode = given[0].value if given and isinstance(given[0], ast.Constant) else "" if given else "r"
        return isinstance(mode, str) and re.fullmatch("[rwax][+]?t?", mode) is not None
    return name in ("read_text", "write_text", "TextIOWrapper") or any(k.arg == "text" for k in call.keywords)


@pytest.mark.parametrize("folder", ["asda", "tools", "runs"])
def test_text_is_utf_8_whatever_the_locale_is(folder: str):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert any(k.arg == "encoding" for k in node.keywords), f"{where} takes the locale's encoding"
