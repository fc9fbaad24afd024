"""Put random faults on real short runs, and give a verdict from outside: exit codes, sentences, files, processes.

    python tools/chaos --trials 500 --work faults --record r.jsonl    resumes after the trials in the record
    python tools/chaos --seed 17 --work faults                        one of them again; its folder is kept
    python tools/chaos --only shards --work faults                    a kind of work, or a family of faults

For developers, on Linux; some faults need root. The exit code is 1 if anything was wrong.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import count, islice
from pathlib import Path
from typing import Any

import verdicts
from faults import Plan, draw
from trials import GOOD, IMPOSSIBLE, Record, Trial, stopping
from workloads import Material

Line = dict[str, Any]  # of the record
COLUMNS: dict[str, Callable[[Line], bool]] = {
    "trials": lambda _: True,
    "struck": lambda line: line["struck"],
    "as told": lambda line: line["verdict"] == GOOD,
    "recovered": lambda line: line["again"] and verdicts.DIFFERS not in line["verdict"],
    "lost": lambda line: verdicts.LOST in line["verdict"] or verdicts.DIFFERS in line["verdict"],
    "hangs": lambda line: verdicts.HANG in line["verdict"] or verdicts.LEFT in line["verdict"],
    "false": lambda line: verdicts.SENTENCE in line["verdict"],
    "codes": lambda line: verdicts.CODE in line["verdict"],
    "tracebacks": lambda line: verdicts.TRACEBACK in line["verdict"],
    "impossible": lambda line: line["verdict"] == IMPOSSIBLE,
}


def plans(first: int, only: str) -> Iterator[Plan]:
    """Yield the trials of all seeds that are of a kind of work or of a family of faults."""
    for plan in map(draw, count(first)):
        if not only or only == plan.fault.family or plan.work.name.startswith(only):
            yield plan


def recorded(path: Path | None) -> list[Line]:
    """Return the lines of a record; a last line that was cut off is dropped."""
    if path is None or not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def records(todo: Sequence[Plan], material: Material, jobs: int) -> Iterator[Record]:
    """Carry out trials, so many at a time; yield what became of each."""
    stopping.clear()
    with ThreadPoolExecutor(jobs) as threads:
        waiting = iter(todo)
        running: dict[Future[Record], Trial] = {}
        try:
            while True:
                for plan in islice(waiting, jobs - len(running)):
                    trial = Trial(plan, material)
                    running[threads.submit(trial.run)] = trial
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    yield future.result()
        finally:
            stopping.set()
            for trial in running.values():
                for program in trial.programs:
                    program.end()


def table(lines: Sequence[Line], key: str) -> list[str]:
    """Return lines: a kind, and how many of its trials are in each column."""
    names = [*sorted({line[key] for line in lines}), "all"]
    rows = [f"{key:<20}" + "".join(f"{title:>11}" for title in COLUMNS)]
    for name in names:
        some = [line for line in lines if name in (line[key], "all")]
        rows.append(f"{name:<20}" + "".join(f"{sum(map(test, some)):>11}" for test in COLUMNS.values()))
    return rows


def carry_out(todo: Sequence[Plan], args: argparse.Namespace) -> Iterator[Line]:
    """Yield the line of each trial, after it is printed and in the record."""
    material = Material(args.work.resolve() / "material")
    for number, record in enumerate(records(todo, material, args.jobs), 1):
        line = record.line()
        if args.record:
            args.record.parent.mkdir(parents=True, exist_ok=True)
            with args.record.open("a", encoding="utf-8") as file:
                print(json.dumps(line, ensure_ascii=False), file=file)
        what = f"{record.work}, {record.fault}, {record.moment}"
        print(f"{number}/{len(todo)} seed {record.seed}: {what}: {record.verdict} ({record.seconds:.0f} s)", flush=True)
        for complaint in record.complaints:
            print(f"    {complaint}", flush=True)
        if record.verdict in (GOOD, IMPOSSIBLE) and args.seed is None:
            shutil.rmtree(args.work / f"trial-{record.seed}", ignore_errors=True)
        yield line


def try_all(args: argparse.Namespace) -> int:
    """Carry out the trials that the record lacks, and print the tables; return the number of bad ones."""
    lines = recorded(args.record) if args.seed is None else []
    args.work.mkdir(parents=True, exist_ok=True)
    done = {line["seed"] for line in lines}
    wanted = (
        [draw(args.seed)] if args.seed is not None else list(islice(plans(args.first_seed, args.only), args.trials))
    )
    lines = [line for line in lines if line["seed"] in {plan.seed for plan in wanted}]
    try:
        for line in carry_out([plan for plan in wanted if plan.seed not in done], args):
            lines.append(line)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
    print("\n".join([*table(lines, "work"), "", *table(lines, "family")]))
    bad = [line["seed"] for line in lines if line["verdict"] not in (GOOD, IMPOSSIBLE)]
    print(f"{len(lines)} trials, {len(bad)} bad" + (f": seeds {', '.join(map(str, bad))}" if bad else ""))
    return len(bad)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--trials", type=int, default=500, metavar="N", help="how many (default: %(default)s)")
    add("--first-seed", type=int, default=1, metavar="N", help="seed of the first (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="repeat this one alone, and keep its folder")
    add("--jobs", type=int, default=2, metavar="N", help="trials at a time (default: %(default)s)")
    add(
        "--work",
        type=Path,
        default=Path("chaos"),
        metavar="FOLDER",
        help="where all of it happens (%(default)s)",
    )
    add("--record", type=Path, metavar="FILE", help="a JSON line per trial is appended; trials in it are not repeated")
    add("--only", default="", metavar="KIND", help="this kind of work (train, shards, ...) or family of faults")
    return parser.parse_args(arguments)


def main() -> None:
    """Try, and end with 1 if anything was wrong."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(try_all(parsed()) > 0)


if __name__ == "__main__":
    main()
