"""Turn audio files into a dataset of verified shards (shards/README.md is the format's specification)."""

import argparse
import csv
import io
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from asda.data.audio import MAX_SECONDS, SAMPLE_RATE_HZ
from asda.data.index import DATASET_FILE, FORMAT_VERSION, MAX_SAMPLE_BYTES, DatasetIndex, SplitIndex
from asda.data.plan import ShardTask, assign_splits, choose_vocabulary, keyed, parse_split, plan_split
from asda.data.sources import SOURCES, SourceOptions
from asda.data.writer import (
    TEMPORARY_SUFFIX,
    WrittenShard,
    start_worker,
    summarize_split,
    write_dataset,
    write_file,
    write_shard,
)
from asda.errors import UserError, exit_with_sentence

REJECTED_FILE = "rejected.csv"
OUR_FILES = re.compile(r"[A-Za-z0-9_]+-[0-9]{6}(\.tar\.zst|\.json)", re.ASCII)
REPORT_EVERY_S = 10.0  # between lines of progress where stderr is not a terminal
LONGEST_CLIP_S = MAX_SAMPLE_BYTES // (2 * SAMPLE_RATE_HZ) - 1  # what a reader accepts as one sample
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # workers share the cores
MIB = 1 << 20

EXAMPLES = """
examples
  python tools/make_shards.py --source csv --input esc50.csv --out shards/esc50
      a table with the columns path and label; its column fold becomes the splits fold1, fold2, ...
  python tools/make_shards.py --source csv --input esc50.csv --out shards/esc50 --split train=1,2,3,4 --split valid=5
      the same clips, folds 1 to 4 for training and fold 5 held out
  python tools/make_shards.py --source csv --input all.csv --out shards/words --where language=ar --split train
      rows of one language, and only those whose column split says train
  python tools/make_shards.py --source folder --input recordings --out shards/mine --split train=90% --split valid=10%
      one class per subfolder of recordings/; a tenth of every class held out

--split, which may be repeated
  NAME          where the input has splits or folds of that name, only those clips; otherwise all clips go to NAME
  NAME=V1,V2    the clips whose split or fold is V1 or V2 go to NAME; what no --split names is left out
  NAME=25%      that share of every class goes to NAME; the percentages must add up to 100
  Without --split the column split names the splits, else the column fold does (fold1, fold2, ...), else all is train.

columns of a CSV
  path            absolute, or relative to the CSV
  label, labels or tags (the first present)   class names, several separated by ";"
  split or fold (the first present)
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, help="what --input is")
    add("--input", required=True, type=Path, help="the CSV or folder to read")
    add("--out", required=True, type=Path, help="the folder to write, made if need be")
    add("--split", action="append", default=[], metavar="NAME[=...]", help="see below")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such rows; may be repeated")
    add("--labels", type=Path, metavar="FILE", help="class names, one per line: fixes the ids, others are refused")
    add("--no-labels", action="store_true", help="write clips without labels")
    add("--clips-per-shard", type=int, default=256, metavar="N", help="most clips in a shard (default %(default)s)")
    add("--max-seconds", type=float, default=MAX_SECONDS, metavar="S", help="reject longer clips (default %(default)g)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")
    add("--overwrite", action="store_true", help="replace the dataset in --out")
    return parser.parse_args()


def make_shards(args: argparse.Namespace) -> None:
    """List, plan, write, and report."""
    check_numbers(args)
    labels = read_labels(args.labels, args.no_labels) if args.labels else None
    listing = SOURCES[args.source](args.input, SourceOptions(not args.no_labels, tuple(map(parse_where, args.where))))
    splits = assign_splits(keyed(listing.rows), [parse_split(text) for text in args.split])
    vocabulary = choose_vocabulary(splits, labels)
    plan = {
        name: plan_split(args.out, name, keys, vocabulary, args.clips_per_shard, args.max_seconds)
        for name, keys in splits.items()
    }
    started = time.monotonic()
    with claimed(args.out, args.overwrite):
        written = write_shards(plan, args.workers)
        dataset = finish(args.out, vocabulary, written)
    seconds = time.monotonic() - started
    num_unnamed = len(listing.rows) - sum(map(len, splits.values()))
    left_out = listing.left_out | {"clips of splits or folds that no --split names": num_unnamed}
    report(dataset, seconds, args.workers, left_out)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that make no shards."""
    for name in ("clips_per_shard", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not 0 < args.max_seconds <= LONGEST_CLIP_S:
        raise UserError(f"--max-seconds {args.max_seconds:g} must be above 0 and at most {LONGEST_CLIP_S}")


def parse_where(text: str) -> tuple[str, str]:
    """Read COLUMN=VALUE."""
    column, equals, value = text.partition("=")
    if not column or not equals:
        raise UserError(f"--where {text}: write COLUMN=VALUE, as in --where language=ar")
    return column, value


def read_labels(path: Path, no_labels: bool) -> tuple[str, ...]:
    """Read the vocabulary, one class name per line."""
    if no_labels:
        raise UserError("--labels and --no-labels contradict each other; give one of them")
    if not path.is_file():
        raise UserError(f"--labels {path}: no such file")
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {path} is no UTF-8 text: {error}") from None
    if not names:
        raise UserError(f"--labels {path} is empty; write one class name per line")
    for line, name in enumerate(names, start=1):
        if not name or name in names[: line - 1]:
            raise UserError(
                f"--labels {path} line {line} is empty or repeats a name ({name!r}); each line is one class"
            )
    return names


@contextmanager
def claimed(out: Path, overwrite: bool) -> Iterator[None]:
    """Hold the output folder: no dataset.json while shards change, no temporary files afterwards."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder")
    if (out / DATASET_FILE).exists() and not overwrite:
        raise UserError(f"--out {out} already holds a dataset; give --overwrite to replace it, or another folder")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if (out / DATASET_FILE).exists():
        (out / DATASET_FILE).unlink()
        for path in out.iterdir():
            if OUR_FILES.fullmatch(path.name) or path.name == REJECTED_FILE:
                path.unlink()
    try:
        yield
    finally:
        sweep(out)
        if created and not any(out.iterdir()):
            out.rmdir()


def sweep(out: Path) -> None:
    """Remove the temporary files of this run, or of one that was killed."""
    for path in out.glob(f"*{TEMPORARY_SUFFIX}"):
        name, _, _ = path.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")  # drops the process id
        if OUR_FILES.fullmatch(name) or name in (DATASET_FILE, REJECTED_FILE):
            path.unlink(missing_ok=True)


def write_shards(plan: Mapping[str, list[ShardTask]], num_workers: int) -> dict[str, list[WrittenShard]]:
    """Write all shards in worker processes, reporting rejected clips and progress as shards are finished."""
    tasks = [task for split in plan.values() for task in split]
    with worker_pool(min(num_workers, len(tasks))) as pool:
        written = iter(progress(pool.map(write_shard, tasks), sum(len(task.clips) for task in tasks)))
        return {name: [next(written) for _ in split] for name, split in plan.items()}


@contextmanager
def worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end with the block, at once if it fails."""
    os.environ.update(ONE_THREAD)  # read when a worker imports numpy
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by other threads
    pool = ProcessPoolExecutor(num_workers, context, initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most often for want of memory; use fewer --workers") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def progress(shards: Iterable[WrittenShard], num_clips: int) -> Iterator[WrittenShard]:
    """Pass shards on; say on stderr how far we are: a bar on a terminal, a line now and then elsewhere."""
    on_terminal = sys.stderr.isatty()
    started = reported = time.monotonic()
    done = 0
    with tqdm(total=num_clips, unit="clip", disable=not on_terminal) as bar:
        for shard in shards:
            for source, reason in shard.rejected:
                tqdm.write(f"rejected {source}: {reason}", file=sys.stderr)
            bar.update(len(shard.clips) + len(shard.rejected))
            done += len(shard.clips) + len(shard.rejected)
            now = time.monotonic()
            if not on_terminal and (now - reported > REPORT_EVERY_S or done == num_clips):
                print(f"{done} of {num_clips} clips, {done / (now - started):.0f} clips/s", file=sys.stderr, flush=True)
                reported = now
            yield shard


def finish(out: Path, vocabulary: tuple[str, ...], written: Mapping[str, list[WrittenShard]]) -> DatasetIndex:
    """Write what was rejected, and dataset.json last. Raises UserError where a split has no readable clip."""
    rejected = [clip for shards in written.values() for shard in shards for clip in shard.rejected]
    for name, shards in written.items():
        if not any(shard.clips for shard in shards):
            reason = shards[0].rejected[0]
            raise UserError(f"split {name}: none of its clips could be read; the first is {': '.join(reason)}")
    splits = {name: summarize_split(shards, len(vocabulary)) for name, shards in written.items()}
    dataset = DatasetIndex(FORMAT_VERSION, SAMPLE_RATE_HZ, vocabulary, splits, len(rejected), out)
    if rejected:
        write_file(out / REJECTED_FILE, csv_table([("path", "reason"), *rejected]))
    write_dataset(dataset)
    return dataset


def csv_table(rows: list[tuple[str, str]]) -> bytes:
    """Return rows as a CSV; paths keep bytes that are no UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def report(dataset: DatasetIndex, seconds: float, num_workers: int, left_out: Mapping[str, int]) -> None:
    """Print what was written, with units."""
    print(f"{'split':<12}{'clips':>9}{'hours':>9}{'shards':>8}{'MiB':>10}{'raw MiB':>10}", end="")
    print(f"{'classes':>9}{'absent':>8}{'log-mel mean':>14}{'std':>8}")
    for name, split in dataset.splits.items():
        print(split_line(name, split))
    num_clips = sum(split.clips for split in dataset.splits.values())
    print(f"{num_clips} clips in {seconds:.1f} s: {num_clips / seconds:.0f} clips/s with {num_workers} workers")
    print(
        f"rejected: {dataset.rejected} clips"
        + (f", listed in {dataset.folder / REJECTED_FILE}" if dataset.rejected else "")
    )
    for reason, count in left_out.items():
        if count:
            print(f"left out: {count} {reason}")


def split_line(name: str, split: SplitIndex) -> str:
    """One row of the report. Absent classes are those of the vocabulary without a clip in the split."""
    mib = sum(shard.bytes for shard in split.shards) / MIB
    raw_mib = split.seconds * SAMPLE_RATE_HZ * 2 / MIB
    absent = split.class_counts.count(0)
    sizes = f"{split.clips:>9}{split.seconds / 3600:>9.2f}{len(split.shards):>8}{mib:>10.1f}{raw_mib:>10.1f}"
    stats = f"{split.log_mel.mean:>14.4f}{split.log_mel.std:>8.4f}"
    return f"{name:<12}{sizes}{len(split.class_counts) - absent:>9}{absent:>8}{stats}"


def main() -> None:
    """Run, and clean up after SIGTERM as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    make_shards(parse_args())


if __name__ == "__main__":
    exit_with_sentence(main)
