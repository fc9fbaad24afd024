"""Documents, docstrings and messages are plain technical English: none of the phrases that made readers guess.

A finding names file, line, phrase and a better wording. All findings come at once. Comments are not checked.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What to avoid, in any case, as a regular expression whose blanks match any white space, and what to write. {} is a
# value of an f-string.
PHRASES = {
    r"\b(?:that|which) (?:is|are) none\b": "say what is wrong: invalid, missing, empty, not finite",
    r"\b(?:what|where it|where they) (?:is|are) none\b": "say what is wrong: invalid, missing, empty, not finite",
    r"\bwhat is no\b": "say what is wrong: invalid, missing, empty, not finite",
    r"\bof then\b": "name it: 'the --labels of the first call', 'the earlier folder'",
    r"\bthe (?:whole )?road\b(?!-)": "the full pipeline",
    r"\bjudg(?:e|es|ed|ing)\b": "evaluate, score, compare",
    r"\bhears?\b|\b(?:not|never) heard\b": "score, use, contain; '--chunks scores long clips in full'",
    r"\b(?:go|goes|going|gone|went) on\b": "resume, continue",
    r"\bwhat decides\b": "settings that affect results",
    r"\bat least must be, and one must not\b|\bone must not\b": "at least one patch must be visible, and one hidden",
    r"\b(?:which|that|and) chose nothing\b|\bchooses nothing\b": "which is never used for selection",
    r"\bfeatures are worth\b": "evaluate frozen features with k-NN and a linear probe",
    r"\bchanges nothing on any\b": "all ranks skip the step",
    r"\bdone all the same\b": "unreadable files are reported and skipped",
    r"\bmap of the house\b": "repository layout",
    r"^#+ Words$": "Glossary",
    r"\bwhat is held out is also trained on\b": "near-duplicates span two splits: scores may be optimistic",
    r"\blearning [{}]*a cosine\b": "lr cosine, 5e-4 to 0",
    r"\baccumulated x\b": "2 accumulation steps x micro-batch 8",
    r"\bno step is left\b": "run complete (80/80 steps)",
    r"\bhad their features before\b": "are already extracted",
    r"\{\} pairs of duplicates lie\b": "1 near-duplicate pair spans train and valid",
    r"\brefused within a second\b": "unknown keys fail immediately, with a suggestion",
    r"\bwhere there (?:is|are|was|were) (?:one|none|any|no)\b": "'if', 'if any', 'without'",
    r"\b(?-i:Of) (?=[a-z0-9`{])": "no sentence begins with 'Of': name the subject first",
}
# How the first line of a docstring must not begin: verb first, or a plain noun for a class or a property.
FIRST_WORDS = r"(?:Of|As|What|Where|Whether|The same of)\b"
BETTER_FIRST_WORDS = "begin with a verb: Return, Count, Refuse, Yield; a property or a class may begin with a noun"

DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "shards/README.md", "Makefile")
CODE = ("asda", "tools", "runs", "docs")


class Finding(NamedTuple):
    """A place, the phrase found there, and what to write."""

    path: str
    line: int
    phrase: str
    better: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.phrase!r}; better: {self.better}"


FLAGS = re.MULTILINE | re.IGNORECASE
COMPILED = [(re.compile(pattern.replace(" ", r"\s+"), FLAGS), better) for pattern, better in PHRASES.items()]
ANY = re.compile("|".join(pattern.pattern for pattern, _ in COMPILED), FLAGS)  # most texts have none: one look


def findings_in_text(path: str, text: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield every phrase in a text that begins on a line of a file."""
    for pattern, better in COMPILED if ANY.search(text) else ():
        for found in pattern.finditer(text):
            line = first_line + text.count("\n", 0, found.start())
            yield Finding(path, line, " ".join(found.group().split()), better)


def findings_in_code(path: str, source: str) -> Iterator[Finding]:
    """Yield every phrase in the docstrings and string literals of a Python file."""
    tree = ast.parse(source)
    for node, text in texts(tree):
        if not re.search(r"\s", text):  # a key or a name, and no sentence
            continue
        yield from findings_in_text(path, text, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from findings_in_first_line(path, node)


def findings_in_first_line(
    path: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[Finding]:
    """Yield the first line of a docstring that does not begin as a plain statement does."""
    lines = (ast.get_docstring(node) or "").splitlines()
    found = re.match(FIRST_WORDS, lines[0]) if lines else None
    if found and not (found.group() == "Whether" and is_property(node)):
        yield Finding(path, node.body[0].lineno, lines[0], BETTER_FIRST_WORDS)


def is_property(node: ast.AST) -> bool:
    """Return whether a function is a property."""
    return any("property" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def texts(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Yield every string of a syntax tree: an f-string once, with {} for its values."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node, node.value


def report(findings: Iterator[Finding]) -> str:
    """Return all findings, in the order of files and lines, after their number; '' if there are none."""
    found = sorted(set(findings))
    return "\n".join([f"{len(found)} phrases to reword:", *map(str, found)]) if found else ""


def test_documents_are_plain_english() -> None:
    paths = [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").glob("*.md")) + [ROOT / "docs/slurm.sh"]
    found = (f for path in paths for f in findings_in_text(str(path.relative_to(ROOT)), path.read_text()))
    if message := report(found):
        pytest.fail(message, pytrace=False)


def test_configurations_tell_their_story_in_plain_english() -> None:
    findings: list[Finding] = []
    for path in sorted((ROOT / "configs").glob("*.json")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            findings += findings_in_text(f"configs/{path.name}", line, number)
        assert set(json.loads("\n".join(lines))["_about"]) >= {"what", "source", "command"}, path
    if message := report(iter(findings)):
        pytest.fail(message, pytrace=False)


@pytest.mark.parametrize("folder", CODE)
def test_docstrings_and_messages_are_plain_english(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    found = (f for path in paths for f in findings_in_code(str(path.relative_to(ROOT)), path.read_text()))
    if message := report(found):
        pytest.fail(message, pytrace=False)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("held-out clips that are\nnone or unlabelled", "that are none"),
        ("UserError where it is none.", "where it is none"),
        ("make them with the --labels of then", "of then"),
        ("runs the whole road", "the whole road"),
        ("judges every held-out clip once", "judges"),
        ("--chunks hears long clips to the end", "hears"),
        ("the same command goes on", "goes on"),
        ("What decides the numbers may not change", "What decides"),
        ("visible; one at least must be, and one must not: change it", "at least must be, and one must not"),
        ("judged on data.test, which chose nothing", "which chose nothing"),
        ("where there are any", "where there are any"),
        ("Of a whole clip: its tokens", "Of"),
        ("## Words", "## Words"),
    ],
)
def test_a_riddle_is_found_with_its_line(text: str, phrase: str) -> None:
    found = list(findings_in_text("README.md", f"one line\n{text}\n"))
    assert (phrase, 2) in [(one.phrase, one.line) for one in found]


@pytest.mark.parametrize(
    "text",
    [
        "resumes with the same command",
        "unreadable files are reported and skipped",
        "none of these recipes has been run; the road-noise class; a list of the nth",
        "an on-going run, one of them; and then the next",
        "the sum of all of the values; shears and hearts",
    ],
)
def test_plain_english_passes(text: str) -> None:
    assert not list(findings_in_text("README.md", text))


def test_code_is_read_as_python_reads_it() -> None:
    source = '''"""As X, but of Y."""
def f(n):
    """Of the set of clips in the last step."""
    raise ValueError(f"{n} clips "
                     f"that are {n} none; learning {n}a cosine")
class C:
    """Whether it is."""
    @property
    def ready(self):
        """Whether it is."""
    def late(self):
        """Where it ends."""
'''
    found = {(one.line, one.phrase) for one in findings_in_code("x.py", source)}
    first_lines = {(1, "As X, but of Y."), (3, "Of the set of clips in the last step."), (7, "Whether it is.")}
    assert found == first_lines | {(3, "Of"), (4, "learning {}a cosine"), (12, "Where it ends.")}
