"""Try to break the reader: mutants of encoded sounds, and files that hold other than they declare.

    python tools/fuzz mutants --mutants 20000 --found found    crashes, hangs, tracebacks, memory, lengths that disagree
    python tools/fuzz mutants --seed 7 --only 1234             one of them again
    python tools/fuzz kinds                                    the table of docs/reliability.md

For developers. The exit code is 1 if anything was wrong.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue

from encoders import FORMATS
from mutants import mutant
from odd_files import KINDS, Count, counted
from reading import READ, REFUSED, WRONG, Outcome, Reader
from tqdm import tqdm

AT_ONCE = 64  # mutants handed out before the time is looked at


def outcomes(seed: int, numbers: Sequence[int], workers: int, minutes: float) -> Iterator[tuple[int, Outcome]]:
    """Read mutants in separate processes; yield (number, outcome) until the time is over."""
    end = time.monotonic() + 60 * minutes
    readers: SimpleQueue[Reader] = SimpleQueue()

    def read(number: int) -> Outcome:
        reader = readers.get()
        try:
            return reader.outcome(number)
        finally:
            readers.put(reader)

    with ExitStack() as stack, ThreadPoolExecutor(workers) as threads:
        for reader in threads.map(Reader, [seed] * workers):
            readers.put(stack.enter_context(closing(reader)))
        for start in range(0, len(numbers), AT_ONCE):
            if time.monotonic() > end:
                return
            some = numbers[start : start + AT_ONCE]
            yield from zip(some, threads.map(read, some), strict=True)


def keep(folder: Path, seed: int, number: int, reason: str) -> str:
    """Write a finding's bytes and its reason; return a line about it."""
    its = mutant(seed, number)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed-{seed}-{number}.{its.extension}"
    path.write_bytes(its.content)
    line = f"--seed {seed} --only {number}: {its.format_name} ({', '.join(its.changes)}) {reason}"
    with (folder / "found.txt").open("a", encoding="utf-8") as file:
        print(line, file=file)
    return line


def table(counts: Counter[tuple[str, str]]) -> list[str]:
    """Return lines: format, mutants, and how many were read, refused, wrong."""
    lines = [f"{'format':<18}{'mutants':>9}{READ:>9}{REFUSED:>9}{WRONG:>9}"]
    for name in [*(its.name for its in FORMATS), "all"]:
        row = [sum(n for (of, what), n in counts.items() if name in (of, "all") and what == which)
               for which in (READ, REFUSED, WRONG)]  # fmt: skip
        lines.append(f"{name:<18}{sum(row):>9}{row[0]:>9}{row[1]:>9}{row[2]:>9}")
    return lines


def try_mutants(args: argparse.Namespace) -> int:
    """Read the mutants and print the table; return the number of findings."""
    numbers = [args.only] if args.only is not None else range(args.first, args.first + args.mutants)
    counts: Counter[tuple[str, str]] = Counter()
    results = outcomes(args.seed, numbers, min(args.workers, len(numbers)), args.minutes)
    for number, (what, reason) in tqdm(results, total=len(numbers), unit="mutant"):
        counts[FORMATS[number % len(FORMATS)].name, what] += 1
        if what == WRONG:
            tqdm.write(keep(args.found, args.seed, number, reason), file=sys.stderr)
        elif args.only is not None:
            print(f"{what}: {reason}")
    print("\n".join(table(counts)))
    num_wrong = sum(n for (_, what), n in counts.items() if what == WRONG)
    print(f"seed {args.seed}: {counts.total()} mutants of {len(FORMATS)} formats, {num_wrong} wrong")
    if num_wrong:
        print(f"they are in {args.found}; found.txt says what is wrong with each")
    return num_wrong


def try_kinds(_args: argparse.Namespace) -> int:
    """Read files of every kind, print the table of docs/reliability.md and what was wrong; return how many were."""
    counts = [counted(kind) for kind in tqdm(KINDS, unit="kind", leave=False)]
    print("\n".join(table_of_kinds(counts)))
    wrong = [f"wrong: {count.kind}: {line}" for count in counts for line in count.wrong]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return len(wrong)


def table_of_kinds(counts: Sequence[Count]) -> list[str]:
    """Return lines of Markdown: kind, files tried, read whole, refused in a sentence, wrong, seconds lost."""
    lines = ["| kind | files tried | read whole | refused | wrong | lost |", "|---|---|---|---|---|---|"]
    for its in counts:
        lines.append(
            f"| {its.kind} | {its.tried} | {its.whole} | {its.refused} | {len(its.wrong)} | {its.lost_s:.1f} s |"
        )
    return lines


def main() -> None:
    """Parse the command line, and try."""
    parser = argparse.ArgumentParser(
        "fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    mutants = commands.add_parser("mutants", help="read mutants of encoded sounds")
    add = mutants.add_argument
    add("--seed", type=int, default=0, help="another seed makes other mutants (default: %(default)s)")
    add("--mutants", type=int, default=20_000, metavar="N", help="how many (default: %(default)s)")
    add("--first", type=int, default=0, metavar="N", help="number of the first, to resume (default: %(default)s)")
    add("--only", type=int, metavar="N", help="read this one alone")
    add("--minutes", type=float, default=float("inf"), metavar="M", help="stop after so long")
    add("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--found", type=Path, default=Path("fuzz_found"), metavar="FOLDER", help="where findings go (%(default)s)")
    mutants.set_defaults(run=try_mutants)
    kinds = commands.add_parser("kinds", help="read files that hold other than they declare, and print a table")
    kinds.set_defaults(run=try_kinds)
    args = parser.parse_args()
    sys.exit(args.run(args) > 0)


if __name__ == "__main__":
    main()
