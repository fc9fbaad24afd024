"""Describe a configuration or a checkpoint: its preset, parameters, tokens, and FLOPs per clip."""

import argparse
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asda.commands.parsing import CHECKPOINT_HELP, check_range, make_parser
from asda.commands.text import aligned
from asda.config.base import MOST
from asda.config.model import AstConfig, ModelConfig, PretrainConfig
from asda.config.presets import departures
from asda.config.run import Config, Description, load_config
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.errors import UserError

if TYPE_CHECKING:
    from asda.models.costs import Network

EXAMPLES = """examples
  asda describe configs/as2m.json
  asda describe configs/as2m.json preset=eat size=large
  asda describe runs/real_pretrain
      the newest checkpoint of a run; or one checkpoint, or a folder of converted weights
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("describe", __doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("path", type=Path, help=f"a configuration (JSON), {CHECKPOINT_HELP}")
    add("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    add("--classes", type=int, default=0, metavar="C", help="classes of a head, which the data of a run decide")
    add("--json", action="store_true", help="one JSON object on one line")
    args = parser.parse_args(argv)
    check_range("--classes", args.classes, 0, MOST)
    return args


def table(what: Config | Description, network: "Network") -> list[str]:
    """Return the lines to print."""
    from asda.models.costs import in_flop  # brings torch

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
    return aligned(rows)


def as_json(what: Config | Description, network: "Network") -> dict[str, Any]:
    """Return the same figures for programs."""
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
    from asda.data.features.fbank import FRAME_SHIFT  # brings torch

    model = what.model
    grid = (what.data.frames // model.patch, model.mel_bins // model.patch)
    patches = grid[0] * grid[1]
    seconds = what.data.frames * FRAME_SHIFT / SAMPLE_RATE_HZ
    words = f"{seconds:.2f} s = {what.data.frames} log-mel frames = {grid[0]} x {grid[1]} patches"
    if isinstance(model, AstConfig):
        return (
            f"{words}, cut into {' x '.join(map(str, model.grid))} overlapping patches, {2 + prod(model.grid)} tokens"
        )
    if not isinstance(what.objective, PretrainConfig):
        return f"{words}, {patches + 1} tokens"
    visible = int(patches * (1 - what.objective.mask.ratio))
    return f"{words}; {what.objective.students} students of {visible + 1} tokens, a teacher of {patches + 1}"


def _read(path: Path, overrides: list[str]) -> tuple[Config | Description, int]:
    """Read a configuration with its overrides, or a folder of weights, and its number of classes (0: not known)."""
    from asda.checkpoint.read import read_description, resolve_checkpoint  # brings torch

    if path.is_dir():
        if overrides:
            raise UserError(
                f"{path} is a folder of weights, which {overrides[0]!r} cannot change; give a configuration"
            )
        description = read_description(resolve_checkpoint(path))
        return description, len(description.labels)
    return load_config(path, overrides), 0


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and describe."""
    args = parse_args(argv)

    from asda.models.costs import network_costs  # brings torch

    what, classes = _read(args.path, args.overrides)
    network = network_costs(what.model, what.objective, what.data.frames, args.classes or classes)
    print(json.dumps(as_json(what, network)) if args.json else "\n".join(table(what, network)))
