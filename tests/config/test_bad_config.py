"""Whatever a configuration holds, it is read or refused in one sentence, soon: row 31 of the fault matrix."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import Count

from asda.config.run import load_config
from asda.errors import USER_ERROR_EXIT, UserError
from asda.run.resume import flattened

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT / "configs" / f"{name}.json" for name in ("demo_pretrain", "demo_finetune", "esc50_ast")]
RESOLVED = 'data.log_mel={"mean": -4, "std": 4}'
MAX_SECONDS = 1.0  # the matrix allows so much for one refusal; here it is the bound of the slowest of all
MAX_SENTENCE_CHARS = 1500
HUGE = ("1e308", "-1e308", "1e400", "1" + "0" * 400)


def values(path: Path) -> dict[str, Any]:
    config = load_config(path, [RESOLVED, "data.augment.noise_snr_db=[1, 2]"])
    return flattened(config) | {"data.train": config.data.train}


def refused_in_one_sentence(path: Path, override: str) -> bool:
    """Whether the value was refused; anything but a sentence, soon, fails."""
    began = time.process_time()
    try:
        load_config(path, [RESOLVED, override] if "log_mel" not in override else [override])
    except UserError as error:
        sentence = str(error)
    else:
        return False
    assert time.process_time() - began < MAX_SECONDS, override[:80]
    assert "\n" not in sentence
    assert len(sentence) < MAX_SENTENCE_CHARS
    return True


def wrong_types(value: Any) -> Iterator[str]:
    """Values of other JSON types than this one."""
    if not isinstance(value, bool):
        yield "true"
    if not isinstance(value, str):
        yield '"text"'
    if not isinstance(value, int | float) or isinstance(value, bool):
        yield "7"
    yield '{"nowhere": {}}'
    yield "[[]]"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "fault", ["an unknown key beside every key", "a wrong type", "NaN", "a huge number", "a negative count"]
)
def test_every_key_refuses(fault: str, path: Path, count_fault: Count) -> None:
    trials = []
    for key, value in values(path).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if fault.startswith("an unknown"):
            if not key.startswith("_about."):  # where any key may stand
                trials.append(f"{key}_misspelt=1")
        elif fault == "a wrong type":
            # null stands for a value that may be left out; data.valid and probe are read in several forms
            trials += [f"{key}={wrong}" for wrong in wrong_types(value) if value is not None]
        elif fault == "NaN":
            trials += [f"{key}=NaN"] if is_number else []
        elif fault.startswith("a huge"):
            trials += [f"{key}={huge}" for huge in HUGE] if is_number else []
        elif isinstance(value, int) and is_number:
            trials.append(f"{key}=-1")
    refused = [trial for trial in trials if refused_in_one_sentence(path, trial)]
    assert set(trials) == set(refused), sorted(set(trials) - set(refused))
    count_fault("31", f"configuration: {fault} ({path.stem})", len(trials), len(refused))


NO_CONFIGS = {
    "cut": b'{"run": {"fold',
    "deep": b"[" * 200_000,
    "deep, in objects": b'{"a":' * 150_000,
    "deep, and closed": b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "10 MB": b'{"_about": {"x": "' + b"y" * 10_000_000 + b'"}}',
    "a number of 300,000 digits": b'{"model": {"width": ' + b"9" * 300_000 + b"}}",
    "no text": bytes(range(256)),
    "half a surrogate": b'{"run": {"folder": "\\ud800"}}',
    "a list": b"[]",
    "nothing": b"",
    "a key twice": b'{"run": {"seed": 1, "seed": 2}}',
    "keys without end": json.dumps({f"key{n}": n for n in range(60_000)}).encode(),
}


def test_a_file_that_is_no_config_is_named_with_the_rule(tmp_path: Path, count_fault: Count) -> None:
    path, named = tmp_path / "run.json", 0
    for name, content in NO_CONFIGS.items():
        path.write_bytes(content)
        began = time.process_time()
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert time.process_time() - began < MAX_SECONDS, name
        assert "\n" not in str(caught.value), name
        named += "run.json" in str(caught.value)
    count_fault("31", "configuration: a file that is none", len(NO_CONFIGS), named)


@pytest.mark.parametrize("override", ["a=" + "[" * 100_000, ".".join(["a"] * 5000) + "=1", "data.=1", ".=1", "=", ""])
def test_a_strange_override_is_one_sentence(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PATHS[0], [override])
    assert "\n" not in str(caught.value)


def test_reading_a_configuration_needs_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, asda.config.run, asda.errors\n"
        "print([name for name in ('torch', 'deepspeed', 'numpy', 'nvidia.dali') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.launch
def test_the_trainer_says_it_before_it_imports_torch(tmp_path: Path, count_fault: Count) -> None:
    # Wall-clock time depends on who else computes here; what takes the time are the imports, and these can be seen.
    argv = [sys.executable, "-X", "importtime", ROOT / "asda" / "train.py", "--config", PATHS[0], "optimizer.lrr=1"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == USER_ERROR_EXIT
    assert done.stderr.splitlines()[-1].endswith("unknown key optimizer.lrr; did you mean optimizer.lr?")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert not imported & {"torch", "deepspeed"}
    assert not list(tmp_path.iterdir())
    count_fault("31", "configuration: refused before torch and DeepSpeed are imported", 1, 1)
