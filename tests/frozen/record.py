"""Make all golden files anew, by commands only: python tests/frozen/record.py [--train-with PROGRAM]

README.md beside it says when that may be done, and with which PROGRAM the numbers were recorded.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import frozen_runs as runs
from frozen_runs import GOLDEN
from frozen_sounds import write_folder, write_table

STORED_STEP = {"pretrained": 10, "ast": 3, "finetuned": 20}  # run folder -> the step of the one checkpoint in it


def main() -> None:
    """Record everything in a temporary folder, then replace golden/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-with", type=Path, default=runs.TRAIN, metavar="PROGRAM", help="instead of train.py")
    program = parser.parse_args().train_with.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        record_shards(place)
        record_runs(place, program)
        write("evaluation", runs.evaluate("finetuned", place))


def record_shards(place: Path) -> None:
    """Make and store both datasets."""
    write_folder(place / "sounds")
    write_table(place / "table")
    hashes = {}
    for dataset in runs.SHARDING:
        folder = runs.make_shards(dataset, place)
        shutil.copytree(folder, GOLDEN / dataset)
        names = sorted(path.name for path in folder.iterdir() if path.name != "dataset.json")
        hashes[dataset] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    write("shards_sha256", hashes)


def record_runs(place: Path, program: Path) -> None:
    """Train everything, store the runs that others begin from, and write down losses, order and keys."""
    done = {"pretrain_fp32": runs.train("pretrain_fp32", place, program=program)}
    store(done["pretrain_fp32"], place / "pretrained")
    for name in ("pretrain_bf16", "finetune_fp32", "finetune_bf16", "ast"):
        done[name] = runs.train(name, place, folder=f"new_{name}", program=program)
    store(done["finetune_fp32"], place / "finetuned")
    store(done["ast"], place / "ast")
    write("figures", {name: runs.figures_of(folder) for name, folder in done.items()})
    write("clips", {name: runs.clips_of(folder) for name, folder in done.items()})
    done["two_ranks"] = runs.train_on_two_ranks(place)
    write("keys", {name: runs.keys_of(folder) for name, folder in done.items()})


def store(run: Path, target: Path) -> None:
    """Copy a run as if it had been stopped at its stored step, into the place and into golden/.

    The steps behind the checkpoint, the boards (whose names tell the machine) and the lock stay away.
    """
    last = STORED_STEP[target.name]
    checkpoint = f"checkpoints/step-{last:07d}"
    shutil.copytree(run / checkpoint, target / checkpoint)
    shutil.copy(run / "config.json", target)
    (target / "checkpoints" / "latest").write_text(f"step-{last:07d}\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= last]
    (target / "metrics.jsonl").write_text("".join(kept))
    shutil.copytree(target, GOLDEN / target.name)


# Figures of metrics.jsonl that tell how fast the machine was
OF_THE_MACHINE = {
    "step_s", "clips_per_s", "tflop_per_s", "gemm_share", "data_wait_s", "data_wait_share", "rss_gib",
}  # fmt: skip


def write(name: str, content: Any) -> None:
    """Write golden/NAME.json, a list on one line each."""
    text = json.dumps(content, indent=1)
    (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
