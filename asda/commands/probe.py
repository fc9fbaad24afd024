"""What the frozen features of any encoder tell about labels: nearest neighbours and a linear layer.

The judges of `probe` in pre-training (asda/evaluation/probe.py) on a run, a checkpoint or converted weights, because
fine-tuning hides how good features are. Nothing is trained by gradient descent, so the figures follow from the weights
alone.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.commands.crossval import interval, names, other_splits
from asda.config.base import MOST
from asda.config.data import DataConfig
from asda.config.run import Config, Description, EngineConfig, OptimizerConfig, ProbeConfig, RunConfig
from asda.data.datasets import open_labelled
from asda.data.shards.read import load_dataset
from asda.engine.processes import Processes, join_processes, leave_processes
from asda.errors import UserError, exit_with_sentence
from asda.evaluation.probe import Features, Probe, features_of, judge
from asda.inference import load
from asda.models.classifier import make_encoder

EXAMPLES = """examples:
  asda probe --checkpoint runs/mine --train shards/esc10:fold1+fold2 --test shards/esc10:fold3 --random
  asda probe --checkpoint runs/mine --data shards/esc10 --random       every fold is held out once
  deepspeed --num_accelerators 2 --module asda.commands.probe --checkpoint weights/eat --data shards/x
"""


Figures = dict[str, float | int]


class Sets(NamedTuple):
    """What is compared with what."""

    train: str  # FOLDER:SPLIT+SPLIT
    test: str
    parts: tuple[str, ...]  # of train, FOLDER:SPLIT each


def probe(args: argparse.Namespace) -> None:
    """Judge, print a line for each encoder, and write the JSON file if one is asked for."""
    folder = resolve_checkpoint(args.checkpoint)
    description = read_description(folder)
    weights = args.weights or ("teacher" if (folder / "teacher.safetensors").is_file() else "student")
    encoders: dict[str, nn.Module] = {weights: load(folder, weights, "cpu").encoder}
    if args.random:
        encoders["random"] = _fresh(description, args.seed)
    sets = _sets(args)
    configs = [_config(description, one.train, one.test, args.neighbours) for one in sets]
    for config in configs:
        Probe(config)  # which refuses what cannot be compared
    processes = join_processes()
    rows = {name: _figures(encoder, sets, configs[0], processes) for name, encoder in encoders.items()}
    leave_processes()
    if not processes.is_first:
        return
    print(f"{folder}: {args.neighbours} neighbours and a linear layer", *_told(sets, rows), sep="\n")
    if args.out:
        judged = [
            {"train": one.train, "test": one.test} | {name: of_sets[number] for name, of_sets in rows.items()}
            for number, one in enumerate(sets)
        ]
        about = {"checkpoint": str(folder), "neighbours": args.neighbours}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | {"judged": judged}, indent=2) + "\n")


def _figures(encoder: nn.Module, sets: list[Sets], config: Config, processes: Processes) -> list[Figures]:
    """Of each of the sets; every clip is encoded once, in however many of them it is."""
    assert config.probe is not None
    encoder.to(processes.device)
    parts = {part for one in sets for part in (*one.parts, one.test)}
    features = {
        part: features_of(encoder, open_labelled(config, "--data", part), config, processes)
        for part in sorted(parts)  # on all ranks in one order
    }
    return [
        judge(_joined([features[part] for part in one.parts]), features[one.test], config.probe.neighbours)
        for one in sets
    ]


def _joined(parts: list[Features]) -> Features:
    return Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _told(sets: list[Sets], rows: dict[str, list[Figures]]) -> Iterator[str]:
    for number, one in enumerate(sets):
        yield f"from {one.train}, judged on {one.test}"
        yield from (_line(name, of_sets[number]) for name, of_sets in rows.items())
    if len({tuple(figures) for of_sets in rows.values() for figures in of_sets}) > 1:  # judge names them by the clips
        yield "no mean over the sets: the clips of some have one label each (accuracy), those of others not (mAP)"
    elif len(sets) > 1:
        yield "mean over the sets, with Student's 95 % interval"
        yield from (_mean_line(name, of_sets) for name, of_sets in rows.items())


def _line(name: str, figures: Figures) -> str:
    return f"  {name:8}" + "".join(f"  {key} {value:.4f}" for key, value in figures.items())


def _mean_line(name: str, of_sets: list[Figures]) -> str:
    values = {key: [figures[key] for figures in of_sets] for key in of_sets[0]}
    return f"  {name:8}" + "".join(f"  {key} {fmean(v):.4f} +- {interval(v):.4f}" for key, v in values.items())


def _sets(args: argparse.Namespace) -> list[Sets]:
    """The two sets that were named; or, for every split that is held out, the other splits of the dataset and it."""
    if not args.data:
        return [Sets(args.train, args.test, (args.train,))]
    splits = tuple(load_dataset(args.data).splits)
    sets = []
    for fold in args.hold_out or splits:
        others = other_splits(args.data, splits, fold)
        parts = tuple(f"{args.data}:{split}" for split in others.split("+"))
        sets.append(Sets(f"{args.data}:{others}", f"{args.data}:{fold}", parts))
    return sets


def _config(description: Description, train: str, test: str, neighbours: int) -> Config:
    """A run that has the network's input, in fp32; its own training data, optimizer and folder are never used."""
    config = Config(
        objective=description.objective,
        data=DataConfig(train=train, **description.data.model_dump()),
        model=description.model,
        optimizer=OptimizerConfig(steps=1, warmup_steps=0, lr=1.0, batch=1),
        engine=EngineConfig(precision="fp32"),
        run=RunConfig(folder="unused"),
    )
    wanted = ProbeConfig(train=train, test=test, neighbours=neighbours)
    return config.model_copy(update={"probe": wanted})  # which the encoder of a classifier may have here


def _fresh(description: Description, seed: int) -> nn.Module:
    """The same network as training begins with it: what its shape alone makes of the spectra."""
    torch.manual_seed(seed)
    return make_encoder(description.model).requires_grad_(False).eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; sys.argv by default."""
    parser = argparse.ArgumentParser(
        prog="asda probe",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run, a checkpoint, or converted weights")
    parser.add_argument("--train", metavar="FOLDER:SPLIT", help="labelled clips to compare with")
    parser.add_argument("--test", metavar="FOLDER:SPLIT", help="labelled clips that are judged")
    parser.add_argument(
        "--data", metavar="FOLDER", help="instead of both, a folder or URL: hold out one split after another"
    )
    parser.add_argument("--hold-out", metavar="A,B", type=names, help="with --data: these splits (default: every one)")
    parser.add_argument(
        "--weights", choices=["teacher", "student"], help="default: the teacher where there is one, as in pre-training"
    )
    parser.add_argument("--random", action="store_true", help="also the same network with fresh weights: the baseline")
    parser.add_argument("--seed", type=int, default=1, help="of the fresh weights (default 1)")
    parser.add_argument("--neighbours", type=int, default=10, help="nearest clips that vote (default 10)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args(argv)
    named = [args.train, args.test]
    if any(named) != all(named) or all(named) == bool(args.data) or (args.hold_out and not args.data):
        raise UserError("name --train and --test; or --data, and --hold-out if not every split of it shall be held out")
    if args.neighbours < 1:
        raise UserError(f"--neighbours {args.neighbours} must be 1 or more")
    if not 0 <= args.seed <= MOST:
        raise UserError(f"--seed {args.seed} must be a whole number from 0 to {MOST}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and probe."""
    probe(parse_args(argv))


if __name__ == "__main__":
    exit_with_sentence(main)
