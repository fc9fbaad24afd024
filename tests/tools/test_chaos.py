"""The driver of random faults draws the same trial from the same seed, and its table counts what was wrong."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
sys.path[:0] = ["tools/chaos", "."]
from trials import ENDS, FAULTS, draw
assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]
assert {fault for faults in FAULTS.values() for fault in faults} == set(ENDS)
assert {draw(seed, "shards").work for seed in range(20)} == {"shards"}
"""


def test_a_seed_draws_the_same_trial_and_every_fault_has_its_exit_codes() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
