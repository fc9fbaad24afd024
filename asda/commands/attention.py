"""How much attention falls on irrelevant context: a table, a JSON file and a picture.

    asda attention RUN [RUN ...] --data FOLDER:SPLIT [--clips 64] [--out attention.json]

Half of each clip is replaced by half of an unrelated one; docs/attention_measure.md defines the figures.
"""

import argparse
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asda.commands.pictures import DB_PER_NEPER, pyplot, show_levels, show_patches
from asda.commands.report_runs import distinct_names
from asda.config.base import MOST
from asda.data.clips import ClipDataset
from asda.errors import UserError, exit_with_sentence
from asda.evaluation.attention_maps import (
    SIGNED,
    Network,
    attention_of,
    block_inputs,
    load_network,
    named_maps,
    on_patches,
)
from asda.evaluation.attention_noise import (
    Estimate,
    Mixture,
    choose_clips,
    make_mixtures,
    mean_estimate,
    measure,
    ratio_estimate,
)

EPILOG = """examples:
  asda attention runs/mine --data shards/mine:valid
  asda attention runs/two_maps runs/one_map --data shards/esc10:fold4 --context noise --query cls

Per block and map: unrelated is the weight on the unrelated half over that under uniform attention, own the same before
the half was replaced, and unrelated / own what the content does: less than 1 turns away from what does not belong.
"""
PICTURED = 3  # mixtures in the picture


def compare(args: argparse.Namespace) -> None:
    """Measure every run on the same mixtures, print the tables, write both files."""
    networks = {name: load_network(path) for name, path in zip(distinct_names(args.runs), args.runs, strict=True)}
    dataset = ClipDataset(args.data, labelled=True)
    clips = choose_clips(dataset, args.clips, args.seed)
    mixtures = make_mixtures(clips, list(networks.values()), args.context, args.seed)
    print(f"{len(mixtures)} mixtures of {len(mixtures[0].own_TM) / 100:.2f} s from {args.data}")
    shares = {name: measure(network, mixtures, args.query) for name, network in networks.items()}
    for name, found in shares.items():
        print("\n" + "\n".join(table(name, networks[name], found)))
    if len(networks) > 1:
        print("\n" + "\n".join(comparison(networks, shares)))
    record = {key: getattr(args, key) for key in ("data", "context", "query", "seed")} | {"clips": len(mixtures)}
    record["paths"] = {name: str(path) for name, path in zip(networks, args.runs, strict=True)}
    record["runs"] = {name: figures(found) for name, found in shares.items()}
    picture = draw(networks, mixtures[:PICTURED])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2, default=_as_json) + "\n")
    args.out.with_suffix(".png").write_bytes(picture)
    print(f"\nwritten {args.out} and {args.out.with_suffix('.png')}")


def figures(found: dict[str, np.ndarray]) -> dict[str, list[dict[str, Estimate]]]:
    """By map and block: unrelated, own, and unrelated / own (not for the signed map, which may be 0 or less)."""
    return {name: [_of_block(name, *after_before_2B) for after_before_2B in values] for name, values in found.items()}


def _of_block(name: str, after_B: np.ndarray, before_B: np.ndarray) -> dict[str, Estimate]:
    means = {"unrelated": mean_estimate(after_B), "own": mean_estimate(before_B)}
    return means if name == SIGNED else means | {"unrelated / own": ratio_estimate(after_B, before_B)}


def table(name: str, network: Network, found: dict[str, np.ndarray]) -> list[str]:
    """Lines: block x map, each figure with its interval."""
    kind = network.model.attention_lambda
    lines = [f"{name} (lambda {kind})", f"{'block':>5}  {'map':17}{'unrelated':>19}{'own':>19}{'unrelated / own':>19}"]
    for name_of_map, blocks in figures(found).items():
        for block, cells in enumerate(blocks):
            lines.append(f"{block:5}  {name_of_map:17}" + "".join(f"{_in_words(cell):>19}" for cell in cells.values()))
    return lines


def comparison(networks: dict[str, Network], shares: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Lines: the mean over blocks of each run by the map that mixes its values, and how it differs from the first."""
    main = {name: shares[name][network.main_map].mean(0) for name, network in networks.items()}
    (first, base_2B), *others = main.items()
    lines = [f"mean over blocks, unrelated / own: {_in_words(ratio_estimate(*base_2B))}  {first}"]
    for name, values_2B in others:
        difference = mean_estimate(values_2B[0] / values_2B[1] - base_2B[0] / base_2B[1])
        lines.append(f"{'':35}{_in_words(ratio_estimate(*values_2B))}  {name}")
        lines.append(f"{'':35}{_in_words(difference)}  more than the first, clip by clip")
    return lines


def _as_json(estimate: Estimate) -> dict[str, float | None]:
    """With null where there is no figure, which JSON has no other word for."""
    return {name: value if math.isfinite(value) else None for name, value in vars(estimate).items()}


def _in_words(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def draw(networks: dict[str, Network], mixtures: Sequence[Mixture]) -> bytes:
    """PNG: a row a network and mixture, with what the patches that stayed take from all patches in the last block."""
    plt = pyplot("asda attention")
    rows = [(name, mixture) for name in networks for mixture in mixtures]
    figure, grid = plt.subplots(len(rows), 4, figsize=(14, 2.4 * len(rows) + 0.5), squeeze=False, layout="constrained")
    for axes, (name, mixture) in zip(grid, rows, strict=True):
        _draw_row(figure, axes, name, networks[name], mixture)
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def _draw_row(figure: Any, axes: Any, name: str, network: Network, mixture: Mixture) -> None:
    show_levels(axes[0], mixture.mixed_TM * DB_PER_NEPER)
    replaced = "first" if mixture.replaced_first else "second"
    axes[0].set_ylabel("Hz (mel scale)", fontsize=9)
    axes[0].set_title(f"{name}\n{replaced} half unrelated", fontsize=9, parse_math=False)
    tokens_1KD = block_inputs(network, mixture.mixed_TM)[-1]
    maps = {n: m for n, m in named_maps(attention_of(network, -1), tokens_1KD).items() if n != SIGNED}
    num_patches = tokens_1KD.shape[1] - 1
    stayed = slice(num_patches // 2, None) if mixture.replaced_first else slice(num_patches // 2)
    for one, (label, map_HKK) in zip(axes[1:], maps.items(), strict=False):
        row_N = map_HKK[:, 1:, 1:][:, stayed].mean((0, 1))
        frames = len(mixture.own_TM)
        figure.colorbar(show_patches(one, on_patches(row_N, network), frames), ax=one)
        one.set_title(f"{label}, times the mean", fontsize=9, parse_math=False)
    for one in axes:
        one.axvline(len(mixture.own_TM) / 200, color="white", linewidth=1.5, linestyle="--")
    for one in axes[1 + len(maps) :]:
        one.set_axis_off()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="asda attention",
        description="How much attention falls on context that has nothing to do with the sound.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, a checkpoint, or weights")
    parser.add_argument("--data", required=True, metavar="FOLDER:SPLIT", help="clips; labels tell which are unrelated")
    parser.add_argument("--clips", type=int, default=64, help="how many, chosen at random (default: 64)")
    parser.add_argument("--context", choices=("clip", "noise"), default="clip", help="what replaces a half")
    parser.add_argument("--query", choices=("patches", "cls"), default="patches", help="who attends (default: patches)")
    parser.add_argument("--seed", type=int, default=0, help="of clips, halves and noise (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attention.json"),
        help="default: attention.json; the picture is the .png beside it",
    )
    args = parser.parse_args(argv)
    if args.query == "cls" and args.context == "clip":
        raise UserError("--query cls needs --context noise: of two clips, neither is irrelevant to CLS")
    if args.clips < 2:
        raise UserError(f"--clips {args.clips} must be at least 2: each clip is mixed with another one")
    if not 0 <= args.seed <= MOST:
        raise UserError(f"--seed {args.seed} must be a whole number from 0 to {MOST}")
    if args.out.suffix == ".png":
        raise UserError(f"--out {args.out} is where the figures go; name it .json, the picture is written beside it")
    return args


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and compare."""
    compare(parse_args(argv))


if __name__ == "__main__":
    exit_with_sentence(main)
