"""Disturb short real runs of training and sharding at random, and compare what they leave with undisturbed ones."""

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from trials import FAULTS, Bench, Trial, Verdict, attempt, draw

KINDS = ("hang", "traceback", "lost", "false", "not recovered")


def main() -> None:
    """Do the trials that the record lacks, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=1, help="of the trials")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--only", default="", choices=["", *FAULTS], help="one kind of work")
    parser.add_argument("--record", type=Path, help="file with a line for each trial; seeds in it are skipped")
    parser.add_argument("--work", type=Path, help="folder; trials that went wrong are kept there")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    done = (
        [json.loads(line) for line in args.record.read_text(encoding="utf-8").splitlines()]
        if _exists(args.record)
        else []
    )
    seen = {entry["seed"] for entry in done}
    seeds = [s for s in range(args.first_seed, args.first_seed + args.trials) if s not in seen]
    if seeds:
        bench = Bench(work / "bench")
        with ThreadPoolExecutor(args.jobs) as pool:
            for entry in pool.map(lambda seed: one(draw(seed, args.only), bench, work, args.record), seeds):
                done.append(entry)
                told = "; ".join(entry["wrong"]) or "right"
                print(f"seed {entry['seed']}: {entry['work']}, {entry['fault']}, {entry['seconds']:.0f} s: {told}")
    print("\n".join(table(done)), flush=True)
    sys.exit(any(entry["wrong"] for entry in done))


def one(trial: Trial, bench: Bench, work: Path, record: Path | None) -> dict:
    """Do a trial, and write its line into the record; its folder is kept if something was wrong."""
    folder = work / f"seed-{trial.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    verdict: Verdict = attempt(trial, bench, folder)
    if not verdict.wrong:
        shutil.rmtree(folder)
    entry = asdict(trial) | asdict(verdict)
    if record:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return entry


def table(entries: list[dict]) -> list[str]:
    """Return the lines of the table: counts by work and fault."""
    groups: defaultdict[tuple[str, str], list[dict]] = defaultdict(list)
    for entry in entries:
        groups[entry["work"], entry["fault"]].append(entry)
    lines = ["| work | fault | trials | right | " + " | ".join(KINDS) + " |", "|---|---|---|---|" + "---|" * len(KINDS)]
    for (work, fault), some in sorted(groups.items()):
        counts = [sum(any(w.startswith(kind) for w in e["wrong"]) for e in some) for kind in KINDS]
        right = sum(not e["wrong"] for e in some)
        lines.append(f"| {work} | {fault} | {len(some)} | {right} | " + " | ".join(map(str, counts)) + " |")
    return lines


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


if __name__ == "__main__":
    main()
