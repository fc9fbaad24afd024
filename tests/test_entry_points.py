"""How a program starts: it runs the code that it lies in, hides no package of others, and explains itself at once."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asda.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.nbc", "*.nbi")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that says when its code runs, with files in it whose names are those of packages."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("asda", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=NOT_CODE)
    with (copy / "asda/__init__.py").open("a") as file:
        file.write('\nprint("THE COPY RUNS")\n')
    for poison in ("asda/numpy.py", "asda/datasets/__init__.py", "tools/numpy.py"):
        (copy / poison).parent.mkdir(exist_ok=True)
        (copy / poison).write_text('raise ImportError("POISON")\n')
    return copy


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which another asda is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "asda").mkdir()
    for name in ("__init__.py", "__main__.py", "train.py", "evaluate.py"):
        (folder / "asda" / name).write_text('print("WRONG")\n')
    return folder


def start(*arguments: object, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(argv, capture_output=True, text=True, env=variables, cwd=cwd, check=False)


@pytest.mark.parametrize("script", ["asda/train.py", "asda/evaluate.py", "tools/make_shards.py", "-m"])
def test_a_program_of_a_checkout_runs_its_own_code_and_its_files_hide_no_package(
    script: str, checkout: Path, another: Path, tmp_path: Path
):
    if script == "-m":
        done = start("-m", "asda", "--help", path=another, cwd=checkout)
    else:
        done = start(checkout / script, "--help", path=another, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert ("THE COPY RUNS" in done.stdout, "WRONG" in done.stdout, "POISON" in done.stderr) == (True, False, False)


HELP_OF_ALL = """
import sys
from asda.__main__ import main
main(["--help"])
assert not {"torch", "pydantic", "numpy"} & sys.modules.keys()
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit as done:
        assert done.code == 0
    assert "torch" not in sys.modules, name
"""


def test_the_help_of_the_commands_does_not_wait_for_torch(tmp_path: Path):
    names = [name for name, (module, _) in COMMANDS.items() if module.startswith("asda.commands.")]
    done = start("-c", HELP_OF_ALL, *names, "train", path=ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS), "a line for each command"
    assert all(f"usage: asda {name} " in done.stdout for name in names)
    assert done.stdout.count("\n  asda ") >= len(names), "examples"


def test_a_command_that_does_not_exist_is_answered_with_the_nearest_one(tmp_path: Path):
    done = start("-m", "asda", "predcit", path=ROOT, cwd=tmp_path)
    sentence = "error: unknown command 'predcit'; did you mean predict? `asda --help` lists all commands\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_a_wheel_has_all_that_the_commands_read(checkout: Path, another: Path, tmp_path: Path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = (
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        checkout,
    )
    done = start(*build, path=another, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    read = [
        path.relative_to(ROOT) for path in (ROOT / "asda").rglob("*.*") if path.suffix in (".csv", ".css", ".jinja")
    ]
    assert read
    assert all((tmp_path / "site" / path).is_file() for path in read)
    done = start("-m", "asda", "--help", path=tmp_path / "site", cwd=tmp_path)
    assert (done.returncode, "THE COPY RUNS" in done.stdout) == (0, True)
