"""Turn audio files into a dataset of verified shards (shards/README.md is the format's specification)."""

import argparse
import csv
import io
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from asda.commands.parsing import check_range, make_parser
from asda.commands.shard_sources import SOURCE_HELP, add_source_arguments, options_from
from asda.commands.shard_tables import absent_table, silence_lines, split_figures, split_table
from asda.commands.text import on_one_line
from asda.data.audio.waves import MAX_SECONDS, SAMPLE_RATE_HZ
from asda.data.labels import read_labels
from asda.data.shards.index import DATASET_FILE, FORMAT_VERSION, MAX_SAMPLE_BYTES, DatasetIndex, Duplicates
from asda.data.shards.read import load_dataset
from asda.errors import UserError
from asda.sharding.cut import cut_recordings, with_channel
from asda.sharding.duplicates import Pair, find_pairs
from asda.sharding.journal import (
    DUPLICATES_FILE,
    MERGE,
    REJECTED_FILE,
    SILENT_FILE,
    Journal,
    bytes_to_replace,
    claimed,
    refuse_finished,
    sweep,
)
from asda.sharding.plan import Plan, assign_splits, choose_vocabulary, keyed, parse_split, plan_split
from asda.sharding.sources import list_source
from asda.sharding.sources.listing import Listing, alike, counted, examples
from asda.sharding.verify import verify_dataset
from asda.sharding.workers import Workers, worker_pool
from asda.sharding.writer import WrittenShard, check_space, summarize_split, write_dataset, writing
from asda.system import FileLock, write_whole_file

LONGEST_CLIP_S = MAX_SAMPLE_BYTES // (2 * SAMPLE_RATE_HZ) - 1  # what a reader accepts as one sample
SHORTEST_CUT_S = 0.1
MOST_REJECTED_LINES = 10  # that are printed
NOT_IN_COMMAND = {"--out", "--workers", "--part", "--merge", "--overwrite"}  # they change no byte of the shards

EXAMPLES = """examples
  asda shards --source csv --input esc50.csv --out shards/esc50
      a table with the columns path and label; its column fold becomes the splits fold1, fold2, ...
  asda shards --source csv --input esc50.csv --out shards/esc50 --split train=1,2,3,4 --split valid=5
      the same clips, folds 1 to 4 for training and fold 5 held out
  asda shards --source csv --input all.csv --out shards/words --where language=ar --split train
      rows of one language, and only those with train in their column split
  asda shards --source folder --input recordings --out shards/mine --split train=90% --split valid=10%
      one class per subfolder of recordings/; a tenth of every class held out
  asda shards --verify --out shards/mine
      read every file of a dataset, and name all that is damaged

If a run was stopped, or killed, the same command resumes after the last finished shard.

several machines with one disk (array jobs)
  asda shards --source csv --input all.csv --out shards/all --part 1/8
      writes an eighth of the shards; run 1/8 to 8/8 at any time, in any order. The part that finishes last also writes
      dataset.json; or run the command with --merge instead of --part

--split (repeatable)
  NAME          only the clips of this split or fold; if the input has none of that name, all clips go to NAME
  NAME=V1,V2    clips whose split or fold is V1 or V2 go to NAME; clips that no --split names are left out
  NAME=25%      that share of every class goes to NAME; the percentages must add up to 100
  Without --split, splits are named by the column split, or else by the column fold (fold1, fold2, ...); without either
  column all clips go to train.
"""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read these arguments; --verify takes few of them. Raises UserError."""
    parser = make_parser("shards", __doc__ or "", EXAMPLES + SOURCE_HELP)
    add_source_arguments(parser)
    add = parser.add_argument_group("what becomes of the clips").add_argument
    add("--split", action="append", default=[], metavar="NAME[=...]", help="see below")
    add("--labels", type=Path, metavar="FILE", help="class names, one per line: fixes the ids and refuses other labels")
    add("--clips-per-shard", type=int, default=256, metavar="N", help="most clips in a shard (default: %(default)s)")
    add(
        "--max-seconds", type=float, default=MAX_SECONDS, metavar="S", help="reject longer clips (default: %(default)g)"
    )
    verifying = make_parser("shards", __doc__ or "", "")
    for each in (parser, verifying):
        add = each.add_argument_group("where and how").add_argument
        add("--out", required=True, type=Path, help="the folder to write; created if missing")
        cores = len(os.sched_getaffinity(0))
        add("--workers", type=int, default=cores, metavar="N", help="processes (default: all cores)")
        add("--verify", action="store_true", help="check the dataset in --out; exit code 2 if anything is damaged")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--part", type=parse_part, default=(1, 1), metavar="I/N", help="write the I-th of N parts")
    either.add_argument("--merge", action="store_true", help="write dataset.json when all parts are finished")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset, or other unfinished work")
    verify = "--verify" in argv and not {"-h", "--help"} & set(argv)
    args = (verifying if verify else parser).parse_args(argv)
    args.command = command_of(argv)
    check_arguments(args)
    return args


def parse_part(text: str) -> tuple[int, int]:
    """Read I/N: the number of a part, and how many there are."""
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} must be I/N with 1 <= I <= N, as in 3/8")
    return int(match[1]), int(match[2])


def make_shards(args: argparse.Namespace) -> None:
    """List the clips, plan the shards, write them, and report. Raises UserError."""
    labels = read_labels(args.labels) if args.labels else None
    listing = with_channel(list_source(args.source, args.input, options_from(args, labels)), args.channel)
    listing = cut_recordings(listing, args.cut, args.workers)
    plan = plan_shards(args, listing, labels or listing.vocabulary)
    shards = range(0) if args.merge else plan.part(*args.part)
    if not shards and not args.merge:
        raise UserError(
            f"--part {args.part[0]}/{args.part[1]}: there are only {len(plan.tasks)} shards; use fewer parts"
        )
    refuse_finished(plan, args.overwrite)
    started = time.monotonic()
    journal = Journal(args.out, plan.digest)
    with worker_pool(args.workers, len(shards)) as workers:
        unwritten = [task for task in plan.tasks if not journal.has_record(task)]
        check_space(workers, args.out, unwritten, bytes_to_replace(args.out, plan.digest) if args.overwrite else 0)
        with (
            claimed(plan, shards, args.command, args.overwrite) as (journal, lock),
            workers.ended_by_failure(),  # before claimed() sweeps away what they leave behind
        ):
            if (args.out / DATASET_FILE).exists():  # the last run was stopped before its very last step
                journal.remove()
                dataset = load_dataset(args.out)
            else:
                written = write_shards(plan, shards, journal, workers)
                dataset = finish(plan, listing, written, journal, lock, args)
    if dataset:
        report(dataset, time.monotonic() - started, args.workers, left_out(listing, plan))
        print("\n".join(listing.notes), end="\n" if listing.notes else "")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers out of range and options that contradict each other. Raises UserError."""
    check_range("--workers", args.workers, 1)
    if args.verify:
        return
    if args.labels and args.no_labels:
        raise UserError("--labels and --no-labels contradict each other; give one of them")
    check_range("--clips-per-shard", args.clips_per_shard, 1)
    if args.cut is not None and not SHORTEST_CUT_S <= args.cut <= args.max_seconds:
        raise UserError(f"--cut {args.cut:g} must be from {SHORTEST_CUT_S} to --max-seconds {args.max_seconds:g}")
    if args.channel is not None:
        check_range("--channel", args.channel, 0)
    if not 0 < args.max_seconds <= LONGEST_CLIP_S:
        raise UserError(f"--max-seconds {args.max_seconds:g} must be above 0 and at most {LONGEST_CLIP_S}")


def plan_shards(args: argparse.Namespace, listing: Listing, labels: tuple[str, ...] | None) -> Plan:
    """Give every clip its key, split, label ids and shard; ids are sorted by name if no `labels` fix them."""
    splits = assign_splits(keyed(listing.rows), [parse_split(text) for text in args.split])
    vocabulary = choose_vocabulary(splits, labels)
    tasks = {
        name: plan_split(args.out, name, keys, vocabulary, args.clips_per_shard, args.max_seconds)
        for name, keys in splits.items()
    }
    return Plan(args.out, vocabulary, tasks)


def command_of(argv: Sequence[str]) -> str:
    """Return the command that makes the same dataset in one run, in the current folder.

    It lacks the options that change no byte of the shards: dataset.json is the same with other parts and workers.
    """
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in NOT_IN_COMMAND
        if not dropping:
            kept.append(word)
    command = shlex.join(["python", "tools/make_shards.py", *kept, "--out", "."])
    return os.fsencode(command).decode(errors="backslashreplace")


def write_shards(plan: Plan, shards: range, journal: Journal, workers: Workers) -> dict[int, WrittenShard]:
    """Write our shards that are not finished, and return all of ours by number; progress goes to stderr."""
    tasks = plan.tasks[shards.start : shards.stop]
    if num_finished := sum(map(journal.has_record, tasks)):
        print(f"resuming: {num_finished} of {len(tasks)} shards are finished", file=sys.stderr)
    written = workers.run(journal.produce, tasks, [len(task.clips) for task in tasks], "clip", rejection_printer())
    return dict(zip(shards, written, strict=True))


def rejection_printer() -> Callable[[WrittenShard], None]:
    """Return a function that prints a line for each of the first clips that could not be read."""
    num_told = 0

    def tell(shard: WrittenShard) -> None:
        nonlocal num_told
        for source, reason in shard.rejected:
            num_told += 1
            if num_told <= MOST_REJECTED_LINES:
                tqdm.write(on_one_line(f"rejected {source}: {reason}"), file=sys.stderr)
            elif num_told == MOST_REJECTED_LINES + 1:
                tqdm.write(f"rejected: more clips, which {REJECTED_FILE} will list", file=sys.stderr)

    return tell


def finish(
    plan: Plan,
    listing: Listing,
    written: dict[int, WrittenShard],
    journal: Journal,
    lock: FileLock,
    args: argparse.Namespace,
) -> DatasetIndex | None:
    """Write dataset.json and the tables beside it if all shards are finished, ours and those of other parts."""
    if (plan.out / DATASET_FILE).exists() or not lock.take(MERGE):
        print(f"this part is done; another part writes {plan.out / DATASET_FILE}")
        return None
    others = [number for number in range(len(plan.tasks)) if number not in written]
    missing = [number for number in others if not journal.has_record(plan.tasks[number])]
    if missing:
        unfinished = f"{len(missing)} of {len(plan.tasks)} shards are not finished"
        if args.merge:
            raise UserError(f"{unfinished}, the first is {plan.tasks[missing[0]].path.name}; run the other parts first")
        print(f"this part is done; {unfinished}: the part that finishes last, or --merge, writes {DATASET_FILE}")
        return None
    for number in others:
        shard = journal.read(plan.tasks[number])
        if shard is None:
            raise UserError(f"{plan.tasks[number].path} has changed since its part wrote it; run that part again")
        written[number] = shard
    journal.check_place()
    dataset = write_tables(plan, listing, written, args.command)
    sweep(plan.out)
    journal.remove()
    return dataset


def write_tables(plan: Plan, listing: Listing, written: Mapping[int, WrittenShard], command: str) -> DatasetIndex:
    """Write the tables of rejected clips and of duplicates, and then dataset.json. Raises UserError."""
    numbers = iter(range(len(plan.tasks)))
    splits = {name: [written[next(numbers)] for _ in tasks] for name, tasks in plan.splits.items()}
    rejected = [tuple(clip) for shards in splits.values() for shard in shards for clip in shard.rejected]
    for name, shards in splits.items():
        if not any(shard.entry for shard in shards):
            reason = shards[0].rejected[0]
            raise UserError(f"split {name}: none of its clips could be read; the first is {': '.join(reason)}")
    rejected += sorted(listing.missing)
    write_table(plan.out / REJECTED_FILE, ("path", "reason"), rejected)
    refuse_lost_classes(plan, splits)
    clips = [(key, name) for name, shards in splits.items() for shard in shards for key in shard.keys]
    pairs = find_pairs([prints for shards in splits.values() for shard in shards for prints in shard.prints])
    silent = [(*clip, name) for name, shards in splits.items() for shard in shards for clip in shard.silent]
    write_table(plan.out / SILENT_FILE, ("key", "path", "split"), silent)
    header = ("kind", "key", "split", "other_key", "other_split", "differing_bits")
    rows = [(pair.kind, *clips[pair.first], *clips[pair.second], pair.differing_bits) for pair in pairs]
    write_table(plan.out / DUPLICATES_FILE, header, rows)
    dataset = DatasetIndex(
        format_version=FORMAT_VERSION,
        sample_rate_hz=SAMPLE_RATE_HZ,
        vocabulary=plan.vocabulary,
        splits={name: summarize_split(shards, len(plan.vocabulary)) for name, shards in splits.items()},
        rejected=len(rejected),
        folder=plan.out,
        duplicates=count_pairs(pairs, [split for _, split in clips]),
        command=command,
    )
    with writing(plan.out / DATASET_FILE):
        return write_dataset(dataset)


def refuse_lost_classes(plan: Plan, splits: Mapping[str, Sequence[WrittenShard]]) -> None:
    """Refuse a dataset that lacks a class of which clips were listed, because none of them could be read."""
    found = {label for shards in splits.values() for shard in shards for ids in shard.labels for label in ids}
    listed = Counter(label for task in plan.tasks for clip in task.clips for label in clip.label_ids)
    lost = {plan.vocabulary[label]: count for label, count in sorted(listed.items()) if label not in found}
    if lost:
        first = next(clip for task in plan.tasks for clip in task.clips if set(clip.labels) & set(lost))
        reasons = dict(clip for shards in splits.values() for shard in shards for clip in shard.rejected)
        counts = examples([f"{name} ({counted(count, 'clip')})" for name, count in lost.items()])
        what = f"{len(lost)} of {len(plan.vocabulary)} classes have no clip that could be read: {counts}"
        fix = f"{plan.out / REJECTED_FILE} lists all; repair the files or drop these classes, and give --overwrite"
        raise UserError(f"{what}; the first is {first.source}: {reasons[first.source]}; {fix}")


def count_pairs(pairs: Sequence[Pair], splits: Sequence[str]) -> Duplicates:
    """Count the pairs of duplicates by kind, and those whose clips lie in two splits."""
    exact, near = ([p for p in pairs if p.kind == kind] for kind in ("exact", "near"))
    across = [sum(splits[p.first] != splits[p.second] for p in of_kind) for of_kind in (exact, near)]
    return Duplicates(len(exact), across[0], len(near), across[1])


def write_table(path: Path, header: tuple[str, ...], rows: Sequence[tuple]) -> None:
    """Write a CSV if it has rows; paths keep bytes that are not UTF-8."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with writing(path):
        write_whole_file(path, text.getvalue().encode(errors="surrogateescape"))


def left_out(listing: Listing, plan: Plan) -> dict[str, int]:
    """Count the rows of the input that are not in the dataset, by reason."""
    num_unnamed = len(listing.rows) - sum(len(task.clips) for task in plan.tasks)
    return listing.left_out | {"clips of splits or folds that no --split names": num_unnamed}


def report(dataset: DatasetIndex, seconds: float, num_workers: int, not_in: Mapping[str, int]) -> None:
    """Print what was written, with units."""
    figures = {name: split_figures(dataset, split) for name, split in dataset.splits.items()}
    print("\n".join(split_table(figures)))
    if any(row["absent_classes"] for row in figures.values()):
        print("\n".join(absent_table(figures, len(dataset.vocabulary))))
    num_clips = sum(split.clips for split in dataset.splits.values())
    print(f"{num_clips} clips in {seconds:.1f} s: {num_clips / seconds:.0f} clips/s with {num_workers} workers")
    table = f", listed in {dataset.folder / REJECTED_FILE}" if dataset.rejected else ""
    print(f"rejected: {dataset.rejected} clips{table}")
    report_alike(dataset)
    for line in silence_lines(str(dataset.folder)):
        print(line)
    report_duplicates(dataset.duplicates, Path(f"{dataset.folder}") / DUPLICATES_FILE)
    for reason, count in not_in.items():
        if count:
            print(f"left out: {count} {reason}")


def report_alike(dataset: DatasetIndex) -> None:
    """Warn of names that may mean one class."""
    counts = [sum(of_splits) for of_splits in zip(*(s.class_counts for s in dataset.splits.values()), strict=True)]
    num_clips = dict(zip(dataset.vocabulary, counts, strict=True))
    pairs = [(a, b, counted(num_clips[a], "clip")) for a, b in alike(dataset.vocabulary)]
    named = [f"{a!r} ({clips}) and {b!r} ({num_clips[b]})" for a, b, clips in pairs]
    if named:
        what = f"{len(named)} pairs of class names differ only in case, space or Unicode form"
        print(f"WARNING: {what}: {examples(named)}; are they one class?")


def report_duplicates(duplicates: Duplicates, table: Path) -> None:
    """Print the number of duplicates, with a warning about those in two splits."""
    if duplicates.exact + duplicates.near == 0:
        return
    print(f"duplicates: {duplicates.exact} exact and {duplicates.near} near pairs, listed in {table}")
    across = duplicates.exact_across_splits + duplicates.near_across_splits
    if across:
        print(
            f"WARNING: {across} pairs of duplicates span two splits ({duplicates.exact_across_splits} exact, "
            f"{duplicates.near_across_splits} near): scores may be optimistic. Keep each pair in one split, or drop "
            f"one of its clips; {table} lists them"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, then make a dataset or verify it."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    verify_dataset(args.out, args.workers) if args.verify else make_shards(args)
