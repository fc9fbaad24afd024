"""README and docs name only what exists: links, headings, files, commands, options and configuration keys.

All findings of a test come at once, with file and line.
"""

import json
import re
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from asda.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README, INDEX = ROOT / "README.md", ROOT / "docs/README.md"
MOST_README_LINES = 200
MOST_CORE_LINES = 4200  # of the twenty files that are training
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, *PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "shards/README.md"))]
TEXTS = [*DOCUMENTS, ROOT / "docs/slurm.sh"]  # the changelog is left out: it names what is gone
MODULES = {
    "asda/train.py": "asda.train",
    "asda/evaluate.py": "asda.evaluate",
    "tools/make_shards.py": "asda.commands.shards",
}

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`|^ {4,}\S[^\n]*$", re.DOTALL | re.MULTILINE)
LINE = re.compile(r"^[^#\n][^\n]*$", re.MULTILINE)
FILE = re.compile(r"(?<![\w/.:-])((?:asda|configs|docs|runs|tests|tools|shards|\.ci)/[\w./-]*)(?![\w./*<{-])")
CALL = re.compile(r"(?<![\w/.-])asda ([a-z]+)\b")
COMMAND_LINE = re.compile(
    r"(?<![\w/.-])(asda [a-z]+|asda/train\.py|asda/evaluate\.py|tools/make_shards\.py)((?:[^\n#`]|\\\n)*)"
)
KEY = re.compile(r"(?<![\w/.-])((?:data|engine|model|objective|optimizer|probe|run)(?:\.[a-z_]+)+)(?![\w/(*-])")
FILE_SUFFIXES = (".safetensors", ".py", ".json", ".pt")  # what only looks like a configuration key
SOURCES_OF_RUNS = (".py", ".sh")  # what a checkout has below runs/; the rest is made by runs


def where(path: Path, text: str, position: int) -> str:
    """Return file and line of a position in a text."""
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"


def in_code(path: Path) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield every piece of code of a document, or every line of a script without comments, with its place."""
    text = path.read_text()
    for piece in (CODE if path.suffix == ".md" else LINE).finditer(text):
        yield where(path, text, piece.start()), piece


def headings(path: Path) -> list[str]:
    """Return the headings of a document, without its title and without lines of code blocks."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    return re.findall(r"^##+ (.+)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def configuration_keys() -> set[str]:
    """Return every key of the configuration, with dots, and every section."""
    from asda.config.run import Config

    schema = Config.model_json_schema()
    return set(keys_of(schema, schema["$defs"], ""))


def keys_of(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the keys of a part of a JSON schema."""
    if "$ref" in schema:
        yield from keys_of(definitions[schema["$ref"].rpartition("/")[2]], definitions, prefix)
    for branch in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from keys_of(branch, definitions, prefix)
    for name, part in schema.get("properties", {}).items():
        yield prefix + name
        yield from keys_of(part, definitions, f"{prefix}{name}.")


def fail_with(findings: list[str]) -> None:
    if findings:
        pytest.fail("\n".join([f"{len(findings)} findings:", *findings]), pytrace=False)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_README_LINES


def test_the_table_of_contents_is_that_of_the_headings() -> None:
    listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", README.read_text(), re.MULTILINE)
    sections = [
        heading for heading in re.findall(r"^## (.+)$", README.read_text(), re.MULTILINE) if heading != "Contents"
    ]
    assert listed == [(heading, anchor(heading)) for heading in sections]


def test_every_link_leads_somewhere() -> None:
    findings = []
    for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        text = path.read_text()
        for found in LINK.finditer(text):
            target, _, fragment = found.group(1).partition("#")
            if "://" in target:
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists():
                findings.append(f"{where(path, text, found.start())}: no file {target}")
            elif fragment and fragment not in map(anchor, headings(file)):
                findings.append(f"{where(path, text, found.start())}: no heading #{fragment} in {target or path.name}")
    fail_with(findings)


def test_every_page_is_in_the_index() -> None:
    linked = {found.partition("#")[0] for found in LINK.findall(INDEX.read_text())}
    pages = [path.name for path in PAGES if path != INDEX]
    fail_with([f"docs/README.md does not link {name}" for name in pages if name not in linked])
    assert "docs/README.md" in LINK.findall(README.read_text())


def test_every_file_that_is_named_exists() -> None:
    findings = []
    for path in TEXTS:
        for place, piece in in_code(path):
            for name in FILE.findall(piece.group()):
                name = name.rstrip(".")
                made_later = name.startswith(("runs/", "shards/")) and not name.endswith((*SOURCES_OF_RUNS, ".md"))
                if not made_later and not (ROOT / name).exists():
                    findings.append(f"{place}: no file {name}")
    fail_with(findings)


def test_every_command_that_is_named_exists() -> None:
    findings = []
    for path in [*TEXTS, ROOT / "CHANGELOG.md"]:
        for place, piece in in_code(path):
            findings += [
                f"{place}: no command asda {name}" for name in CALL.findall(piece.group()) if name not in COMMANDS
            ]
    fail_with(findings)


def source_of(command: str) -> str:
    """Return the source that defines a command's options; "" if the command is unknown."""
    module = MODULES.get(command) or COMMANDS.get(command.removeprefix("asda "), ("",))[0]
    if not module:
        return ""
    files = [ROOT / f"{module.replace('.', '/')}.py"]
    if module == "asda.commands.shards":  # its sources have options of their own
        files += [*(ROOT / "asda/sharding/sources").glob("*.py"), *(ROOT / "asda/commands").glob("*.py")]
    return "".join(file.read_text() for file in files)


def test_every_option_is_one_of_its_command() -> None:
    findings = []
    for path in [*TEXTS, ROOT / "CHANGELOG.md"]:
        for place, piece in in_code(path):
            for command, rest in COMMAND_LINE.findall(piece.group()):
                options = re.findall(r"(?<!\S)--[a-z][a-z-]*", rest) if (source := source_of(command)) else []
                findings += [f"{place}: {command} has no {name}" for name in options if f'"{name}"' not in source]
    fail_with(findings)


def test_every_configuration_key_that_is_named_exists() -> None:
    findings, keys = [], configuration_keys()
    for path in TEXTS:
        for place, piece in in_code(path):
            named = [
                key for key in KEY.findall(piece.group()) if not key.endswith((".safetensors", ".py", ".json", ".pt"))
            ]
            findings += [f"{place}: no configuration key {key}" for key in named if key not in keys]
    fail_with(findings)


def test_commands_of_the_configurations_name_their_own_file() -> None:
    for path in sorted((ROOT / "configs").glob("*.json")):
        command = json.loads(path.read_text())["_about"]["command"]
        assert f"configs/{path.name}" in command or command == "make demo", path


def test_the_core_is_twenty_files_in_the_order_of_reading() -> None:
    listed = re.findall(r"^(\d+)\. \[(asda/[^\]]+)\]\(\2\)", README.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, 21))
    lines = sum(len((ROOT / name).read_text().splitlines()) for _, name in listed)
    assert lines <= MOST_CORE_LINES, f"the core has {lines} lines"


def test_the_picture_is_what_its_program_draws() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/road.py"))["picture"]()
    assert (ROOT / "docs/road.svg").read_text() == drawn + "\n", "python docs/road.py > docs/road.svg"
