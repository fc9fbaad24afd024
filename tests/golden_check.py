"""Compare everything that asda computes with the official models' numbers.

FOLDER is laid out like ../shared/golden: sizes are read from its json files, weights from its checkpoints or, where
those are absent, from the keys state.*. What is there is checked; what is not is listed.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import golden
import golden_data
import golden_networks
import torch
from golden import Finetuning, Folder, Pretraining
from golden_findings import Finding, Findings
from tqdm import tqdm

from asda.errors import UserError, exit_with_sentence

EXAMPLES = """
examples
  python tests/golden_check.py ../shared/golden
      every attention path that the CPU has, each with 1 and with 2 threads; a minute at the tiny size
  python tests/golden_check.py ../shared/golden --attention sdpa --threads 4
      one path with one number of threads

exit codes
  0  every error lies within its tolerance
  1  at least one exceeds it
  2  the folder is not there, holds nothing of this, or holds a file that cannot be read
"""

PATHS = ("explicit", "sdpa", "auto")  # of attention, on a CPU
THREADS = (1, 2)
EXCEEDED_EXIT = 1


class Suite(NamedTuple):
    """The comparisons of one golden file."""

    title: str
    files: tuple[str, ...]  # golden files that it reads
    check: Callable[[Folder, str], Findings]  # folder, attention path
    varies: Literal["with attention and threads", "with threads", "never"]

    def settings(self, paths: tuple[str, ...], threads: tuple[int, ...]) -> list[tuple[str, int]]:
        """The attention paths and numbers of threads that can make a difference to it."""
        if self.varies == "with attention and threads":
            return [(path, count) for path in paths for count in threads]
        return [(paths[0], count) for count in (threads if self.varies == "with threads" else threads[:1])]


def suites() -> list[Suite]:
    """All of them, whatever is there."""
    found = []
    for family in golden.FAMILIES:
        pretrain, trajectory, finetune = (f"{family}_{part}" for part in ("pretrain", "trajectory", "finetune"))
        always = "with attention and threads"
        found += [
            Suite(f"{family} pretrain", (pretrain,), partial(_pretrain, family), always),
            Suite(f"{family} trajectory", (trajectory, pretrain), partial(_trajectory, family), always),
            Suite(f"{family} finetune", (finetune,), partial(_finetune, family), always),
        ]
    found.append(Suite("front-end", ("fbank_test",), _front_end, "with threads"))
    found.append(Suite("masks", ("mask_generator",), _masks, "never"))
    return found


def _pretrain(family: str, folder: Folder, path: str) -> Findings:
    return golden_networks.check_pretrain(Pretraining.read(folder, family, path))


def _trajectory(family: str, folder: Folder, path: str) -> Findings:
    name, case = f"{family}_trajectory", Pretraining.read(folder, family, path)
    return golden_networks.check_trajectory(case, folder.tensors(name), folder.numbers(name))


def _finetune(family: str, folder: Folder, path: str) -> Findings:
    return golden_networks.check_finetune(Finetuning.read(folder, family, path))


def _front_end(folder: Folder, path: str) -> Findings:
    return golden_data.check_front_end(folder.tensors("fbank_test"), folder.numbers("fbank_test"))


def _masks(folder: Folder, path: str) -> Findings:
    return golden_data.check_masks(folder.tensors("mask_generator"), folder.numbers("mask_generator"))


def check(folder: Folder, paths: tuple[str, ...], threads: tuple[int, ...]) -> tuple[list[Finding], list[str]]:
    """The findings of all suites whose files are there, and the names of the files that are not."""
    runs, absent = [], []
    for suite in suites():
        missing = [file for name in suite.files for file in folder.absent(name)]
        absent += [file for file in missing if file not in absent]
        runs += [] if missing else [(suite, *setting) for setting in suite.settings(paths, threads)]
    if not runs:
        raise UserError(f"{folder.path} holds no golden file, such as {absent[0]}; give ../shared/golden")
    found = []
    for suite, path, count in tqdm(runs, desc="golden", unit="suite", disable=not sys.stderr.isatty(), leave=False):
        found += run(folder, suite, path, count)
    return found, absent


def run(folder: Folder, suite: Suite, path: str, threads: int) -> list[Finding]:
    """The findings of one suite with one attention path and number of threads."""
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    marks = {"with attention and threads": f"{path}, {count}", "with threads": count}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        named = [f._replace(group=f"{suite.title}: {f.group}") for f in suite.check(folder, path)]
        return [f._replace(run=marks.get(suite.varies, "")) for f in named]
    finally:
        torch.set_num_threads(before)


def worst_of_groups(found: list[Finding]) -> list[Finding]:
    """The finding of each group that comes nearest to its tolerance, or exceeds it most."""
    worst: dict[str, Finding] = {}
    for finding in found:
        if finding.group not in worst or finding.share > worst[finding.group].share:
            worst[finding.group] = finding
    return list(worst.values())


def table(worst: list[Finding]) -> str:
    """A line per group."""
    width = max(len(finding.group) for finding in worst)
    lines = [f"{'group':{width}}  {'largest error':>13}  {'tolerance':>9}  {'':8}  {'measure':10}  where"]
    for f in worst:
        verdict = "ok" if f.share <= 1 else "EXCEEDED"
        where = f"{f.name}  ({f.run})" if f.run else f.name
        lines.append(f"{f.group:{width}}  {f.error:13.1e}  {f.tolerance:9.1e}  {verdict:8}  {f.measure:10}  {where}")
    return "\n".join(lines)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the golden files lie")
    parser.add_argument("--attention", choices=PATHS, help="one way to compute attention; without it all three")
    parser.add_argument("--threads", type=int, help="CPU threads; without it 1 and 2")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print the worst of every group; leave with 1 when one exceeds its tolerance."""
    args = parse_args(arguments)
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} must be at least 1")
    paths = (args.attention,) if args.attention else PATHS
    threads = (args.threads,) if args.threads else THREADS
    found, absent = check(Folder(args.folder), paths, threads)
    worst = worst_of_groups(found)
    print(table(worst))
    for file in absent:
        print(f"not there: {file}")
    exceeded = sum(not f.share <= 1 for f in worst)
    settings = f"attention {', '.join(paths)}; threads {', '.join(map(str, threads))}"
    verdict = f"{exceeded} groups EXCEED their tolerance" if exceeded else "all within tolerance"
    print(f"{len(found)} comparisons in {len(worst)} groups ({settings}): {verdict}")
    if exceeded:
        sys.exit(EXCEEDED_EXIT)


if __name__ == "__main__":
    exit_with_sentence(main)
