"""A small real dataset for the tests: synthetic sounds, written as files and sharded by tools/make_shards.py."""

import subprocess
import sys
from pathlib import Path

from sounds import write_dataset

ROOT = Path(__file__).resolve().parents[2]


def make_dataset(folder: Path, clips_per_class: int) -> Path:
    """Write audio and shards (splits train and test, several shards) below `folder`; returns the shards' folder."""
    write_dataset(folder / "audio", clips_per_class, seed=5)
    return make_shards(folder / "audio", folder / "shards")


def make_shards(audio: Path, out: Path, *more: object) -> Path:
    """Shards of a folder with a class per subfolder; returns theirs."""
    command = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "folder", "--input", audio, "--out", out]
    command += ["--split", "train=75%", "--split", "test=25%", "--clips-per-shard", "16", *more]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return out
