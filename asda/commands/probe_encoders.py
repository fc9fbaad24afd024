"""The work of `asda probe`: encode every clip once, evaluate each pair of training and test splits, and print."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.config.data import DataConfig
from asda.config.run import Config, Description, EngineConfig, OptimizerConfig, ProbeConfig, RunConfig
from asda.data.datasets import open_labelled, open_probe_data
from asda.data.shards.read import load_dataset
from asda.engine.processes import Processes, join_processes, leave_processes
from asda.evaluation.folds import interval, other_splits
from asda.evaluation.probe import LabelledFeatures, features_of, probe_figures
from asda.inference import load
from asda.models.classifier import make_encoder
from asda.system import write_whole_file

Figures = dict[str, float | int]


class Sets(NamedTuple):
    """The splits that are compared."""

    train: str  # FOLDER:SPLIT+SPLIT
    test: str
    parts: tuple[str, ...]  # the splits of train, FOLDER:SPLIT each


def probe(args: argparse.Namespace) -> None:
    """Evaluate, print a line for each encoder, and write the JSON file if asked for. Raises UserError."""
    folder = resolve_checkpoint(args.checkpoint)
    description = read_description(folder)
    weights = args.weights or ("teacher" if (folder / "teacher.safetensors").is_file() else "student")
    encoders: dict[str, nn.Module] = {weights: load(folder, weights, "cpu").encoder}
    if args.random:
        encoders["random"] = _random_encoder(description, args.seed)
    sets = list_sets(args)
    configs = [_config(description, one.train, one.test, args.neighbours) for one in sets]
    for config in configs:
        open_probe_data(config)  # refuses splits that cannot be compared
    processes = join_processes()
    rows = {name: _figures(encoder, sets, configs[0], processes) for name, encoder in encoders.items()}
    leave_processes()
    if not processes.is_first:
        return
    print(f"{folder}: k-NN with {args.neighbours} neighbours, and a linear layer", *words(sets, rows), sep="\n")
    if args.out:
        _write(args.out, {"checkpoint": str(folder), "neighbours": args.neighbours}, sets, rows)


def _write(out: Path, about: dict[str, object], sets: list[Sets], rows: dict[str, list[Figures]]) -> None:
    judged = [
        {"train": one.train, "test": one.test} | {name: of_sets[number] for name, of_sets in rows.items()}
        for number, one in enumerate(sets)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole_file(out, json.dumps(about | {"judged": judged}, indent=2) + "\n")


def _figures(encoder: nn.Module, sets: list[Sets], config: Config, processes: Processes) -> list[Figures]:
    """Evaluate an encoder on each of the sets. Every split is encoded once, even if several sets hold it."""
    assert config.probe is not None
    encoder.to(processes.device)
    parts = {part for one in sets for part in (*one.parts, one.test)}
    features = {
        part: features_of(encoder, open_labelled(config, "--data", part), config, processes)
        for part in sorted(parts)  # all ranks take one order
    }
    return [
        probe_figures(_joined([features[part] for part in one.parts]), features[one.test], config.probe.neighbours)
        for one in sets
    ]


def _joined(parts: list[LabelledFeatures]) -> LabelledFeatures:
    return LabelledFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def words(sets: list[Sets], rows: dict[str, list[Figures]]) -> Iterator[str]:
    """Yield the lines to print: the figures of each set, then their mean with Student's 95 % interval."""
    for number, one in enumerate(sets):
        yield f"train {one.train}, test {one.test}"
        yield from (_line(name, of_sets[number]) for name, of_sets in rows.items())
    if len({tuple(figures) for of_sets in rows.values() for figures in of_sets}) > 1:  # accuracy here, mAP there
        yield "no mean over the sets: in some, each clip has one label (accuracy), in others it has several (mAP)"
    elif len(sets) > 1:
        yield "mean over the sets, with Student's 95 % interval"
        yield from (_mean_line(name, of_sets) for name, of_sets in rows.items())


def _line(name: str, figures: Figures) -> str:
    return f"  {name:8}" + "".join(f"  {key} {value:.4f}" for key, value in figures.items())


def _mean_line(name: str, of_sets: list[Figures]) -> str:
    values = {key: [figures[key] for figures in of_sets] for key in of_sets[0]}
    return f"  {name:8}" + "".join(f"  {key} {fmean(v):.4f} +- {interval(v):.4f}" for key, v in values.items())


def list_sets(args: argparse.Namespace) -> list[Sets]:
    """Return --train and --test; or, for each split to hold out, the other splits of the dataset and that split."""
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
    """Return a run with the network's input, in fp32; its training data, optimizer and folder are never used."""
    config = Config(
        objective=description.objective,
        data=DataConfig(train=train, **description.data.model_dump()),
        model=description.model,
        optimizer=OptimizerConfig(steps=1, warmup_steps=0, lr=1.0, batch=1),
        engine=EngineConfig(precision="fp32"),
        run=RunConfig(folder="unused"),
    )
    wanted = ProbeConfig(train=train, test=test, neighbours=neighbours)
    return config.model_copy(update={"probe": wanted})  # unchecked: a configuration of fine-tuning refuses a probe


def _random_encoder(description: Description, seed: int) -> nn.Module:
    """Return the network as it is before training: what its shape alone makes of the input."""
    torch.manual_seed(seed)
    return make_encoder(description.model).requires_grad_(False).eval()
