"""Say what a configuration or a folder of weights is: its preset, parameters, tokens, and arithmetic per clip."""

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.config.base import MOST
from asda.config.model import AstConfig, ModelConfig, PretrainConfig
from asda.config.presets import departures
from asda.config.run import Config, Description, load_config
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.features.fbank import FRAME_SHIFT
from asda.errors import UserError, exit_with_sentence
from asda.models.costs import Network, in_flop, network_costs

EXAMPLES = """examples
  asda describe configs/as2m.json
  asda describe configs/as2m.json preset=eat size=large
  asda describe runs/real_pretrain
      the newest checkpoint of a run; or one checkpoint, or a folder of converted weights
"""
COLUMN = 12  # characters of the first column


def describe(what: Config | Description, classes: int) -> list[str]:
    """Lines of a table for people."""
    network = network_costs(what.model, what.objective, what.data.frames, classes)
    changed = departures(what.model_dump())
    rows = {
        "preset": f"{what.preset}, {what.size}" + (f"; but {'; '.join(changed)}" if changed else ""),
        "model": _model_words(what),
        "parameters": f"{sum(network.parameters.values()):,} trainable: "
        + ", ".join(f"{part} {count:,}" for part, count in network.parameters.items()),
        "clip": _clip_words(what),
        "arithmetic": f"{in_flop(sum(network.flops.values()))} a clip and step: "
        + ", ".join(f"{part} {in_flop(flops)}" for part, flops in network.flops.items()),
    }
    if isinstance(what, Config):
        step = what.optimizer.batch * sum(network.flops.values())
        rows["run"] = (
            f"{what.optimizer.steps:,} steps of {what.optimizer.batch} clips: {in_flop(step)} a step, "
            f"{in_flop(what.optimizer.steps * step)} in all"
        )
    return [f"{name:{COLUMN}}{words}" for name, words in rows.items()]


def as_json(what: Config | Description, classes: int) -> dict[str, Any]:
    """The same figures for programs."""
    network: Network = network_costs(what.model, what.objective, what.data.frames, classes)
    return {
        "preset": what.preset,
        "size": what.size,
        "departures": departures(what.model_dump()),
        "parameters": network.parameters | {"trainable": sum(network.parameters.values())},
        "flops_per_clip": network.flops | {"total": sum(network.flops.values())},
    }


def _model_words(what: Config | Description) -> str:
    model = what.model
    kind = _attention_words(model) if isinstance(model, ModelConfig) else _ast_words(model)
    return f"{model.depth} blocks of width {model.width}, {model.heads} heads, MLP {model.mlp_ratio:g} x, {kind}"


def _attention_words(model: ModelConfig) -> str:
    return {"absent": "ordinary attention", "learned": "differential attention with a learned lambda"}.get(
        str(model.attention_lambda), f"differential attention with lambda {model.attention_lambda}"
    )


def _ast_words(model: AstConfig) -> str:
    blocks = f", {model.conformer.blocks} Conformer blocks" if model.conformer.blocks else ""
    return f"ordinary attention (AST){blocks}{', channel attention' if model.channel_attention.enabled else ''}"


def _clip_words(what: Config | Description) -> str:
    model = what.model
    grid = (what.data.frames // model.patch, model.mel_bins // model.patch)
    patches = grid[0] * grid[1]
    seconds = what.data.frames * FRAME_SHIFT / SAMPLE_RATE_HZ
    words = f"{seconds:.2f} s = {what.data.frames} log-mel frames = {grid[0]} x {grid[1]} patches"
    if isinstance(model, AstConfig):
        return f"{words}, seen as {' x '.join(map(str, model.grid))} overlapping ones, {2 + prod(model.grid)} tokens"
    if not isinstance(what.objective, PretrainConfig):
        return f"{words}, {patches + 1} tokens"
    visible = int(patches * (1 - what.objective.mask.ratio))
    return f"{words}; {what.objective.students} students of {visible + 1} tokens, a teacher of {patches + 1}"


def _read(path: Path, overrides: list[str]) -> tuple[Config | Description, int]:
    """A configuration with its overrides, or a folder of weights; and the number of classes where it is known."""
    if path.is_dir():
        if overrides:
            raise UserError(f"{path} is a folder of weights, which {overrides[0]!r} cannot change; give a config file")
        description = read_description(resolve_checkpoint(path))
        return description, len(description.labels)
    return load_config(path, overrides), 0


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and describe."""
    parser = argparse.ArgumentParser(
        prog="asda describe", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a configuration (JSON), a run, a checkpoint, or converted weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--classes", type=int, default=0, help="of a classifier's head, where the data decides them")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    args = parser.parse_args(argv)
    if not 0 <= args.classes <= MOST:
        raise UserError(f"--classes {args.classes} must be a whole number from 0 to {MOST}")
    what, classes = _read(args.path, args.overrides)
    classes = args.classes or classes
    print(json.dumps(as_json(what, classes)) if args.json else "\n".join(describe(what, classes)))


if __name__ == "__main__":
    exit_with_sentence(main)
