"""A key of the configuration may be retired, but not in silence: who still uses it is told what replaces it.

test_frozen_runs.py compares the keys of fresh runs with golden/keys.json, and its stored runs still hold the keys that
have been retired since, so continuing and evaluating them shows that a stored config.json with them loads.
"""

import json
import sys
from pathlib import Path

import frozen_runs as runs

USER_ERROR_EXIT = 2


def test_an_unknown_key_is_refused_by_its_name(tmp_path: Path) -> None:
    assert "data.trian" in refusal("pretrain", "data.trian=tones:train", tmp_path)


def test_every_retired_key_is_refused_with_its_name_and_its_replacement(tmp_path: Path) -> None:
    for key, retired in json.loads(runs.RETIRED.read_text()).items():
        names = [name for name, keys in runs.golden("keys").items() if key in keys]
        assert names, f"{key} was never a key, so it cannot be retired"
        config = runs.RUNS[names[0]][0] if names[0] in runs.RUNS else "pretrain"
        sentence = refusal(config, retired["override"], tmp_path)
        assert key.rpartition("[].")[2] in sentence
        assert retired["replacement"] in sentence


def refusal(config: str, override: str, place: Path) -> str:
    """Return what train.py says to a configuration that it must refuse as a mistake of the user."""
    command = [sys.executable, runs.TRAIN, *runs.training(config, "refused", [override])]
    done = runs.run(command, place)
    assert done.returncode == USER_ERROR_EXIT, done.stdout + done.stderr
    assert not (place / "refused").exists()
    return done.stderr
