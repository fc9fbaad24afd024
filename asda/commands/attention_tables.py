"""The work of `asda attention`: measure every run on the same mixtures, print tables, and write JSON and a picture."""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from asda.commands.pictures import DB_PER_NEPER, pyplot, show_levels, show_patches, to_png
from asda.commands.report_runs import distinct_names
from asda.data.clips import ClipDataset
from asda.evaluation.attention import (
    SIGNED,
    Estimate,
    Mixture,
    Network,
    attention_of,
    block_inputs,
    choose_clips,
    load_network,
    make_mixtures,
    mean_estimate,
    measure,
    named_maps,
    on_patches,
    ratio_estimate,
)
from asda.system import write_whole_file

PICTURED = 3  # mixtures in the picture


def compare(args: argparse.Namespace) -> None:
    """Measure every run on the same mixtures, print the tables, and write both files. Raises UserError."""
    networks = {name: load_network(path) for name, path in zip(distinct_names(args.runs), args.runs, strict=True)}
    dataset = ClipDataset(args.data, labelled=True)
    clips = choose_clips(dataset, args.clips, args.seed)
    mixtures = make_mixtures(clips, list(networks.values()), args.context, args.seed)
    print(f"{len(mixtures)} mixtures of {len(mixtures[0].own_TF) / 100:.2f} s from {args.data}")
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
    write_whole_file(args.out, json.dumps(record, indent=2, default=_as_json) + "\n")
    args.out.with_suffix(".png").write_bytes(picture)
    print(f"\nwritten {args.out} and {args.out.with_suffix('.png')}")


def figures(found: dict[str, np.ndarray]) -> dict[str, list[dict[str, Estimate]]]:
    """Estimate unrelated, own and unrelated / own by map and block; no ratio for the signed map, which may be <= 0."""
    return {name: [_of_block(name, *after_before_2B) for after_before_2B in values] for name, values in found.items()}


def _of_block(name: str, after_B: np.ndarray, before_B: np.ndarray) -> dict[str, Estimate]:
    means = {"unrelated": mean_estimate(after_B), "own": mean_estimate(before_B)}
    return means if name == SIGNED else means | {"unrelated / own": ratio_estimate(after_B, before_B)}


def table(name: str, network: Network, found: dict[str, np.ndarray]) -> list[str]:
    """Return a line for each map and block: its figures with their intervals."""
    kind = network.model.attention_lambda
    lines = [f"{name} (lambda {kind})", f"{'block':>5}  {'map':17}{'unrelated':>19}{'own':>19}{'unrelated / own':>19}"]
    for name_of_map, blocks in figures(found).items():
        for block, cells in enumerate(blocks):
            lines.append(f"{block:5}  {name_of_map:17}" + "".join(f"{_in_words(cell):>19}" for cell in cells.values()))
    return lines


def comparison(networks: dict[str, Network], shares: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Return each run's mean over blocks, for the map that mixes its values, and the difference to the first run."""
    main = {name: shares[name][network.main_map].mean(0) for name, network in networks.items()}
    (first, base_2B), *others = main.items()
    lines = [f"mean over blocks, unrelated / own: {_in_words(ratio_estimate(*base_2B))}  {first}"]
    for name, values_2B in others:
        difference = mean_estimate(values_2B[0] / values_2B[1] - base_2B[0] / base_2B[1])
        lines.append(f"{'':35}{_in_words(ratio_estimate(*values_2B))}  {name}")
        lines.append(f"{'':35}{_in_words(difference)}  difference to the first, clip by clip")
    return lines


def _as_json(estimate: Estimate) -> dict[str, float | None]:
    """Return the fields of an estimate; JSON has no nan, so a missing figure is null."""
    return {name: value if math.isfinite(value) else None for name, value in vars(estimate).items()}


def _in_words(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def draw(networks: dict[str, Network], mixtures: Sequence[Mixture]) -> bytes:
    """Draw what the patches that stayed take from all patches in the last block: a row for each network and mixture."""
    plt = pyplot("asda attention")
    rows = [(name, mixture) for name in networks for mixture in mixtures]
    figure, grid = plt.subplots(len(rows), 4, figsize=(14, 2.4 * len(rows) + 0.5), squeeze=False, layout="constrained")
    for axes, (name, mixture) in zip(grid, rows, strict=True):
        _draw_row(figure, axes, name, networks[name], mixture)
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    return to_png(figure)


def _draw_row(figure: Any, axes: Any, name: str, network: Network, mixture: Mixture) -> None:
    show_levels(axes[0], mixture.mixed_TF * DB_PER_NEPER)
    replaced = "first" if mixture.replaced_first else "second"
    axes[0].set_ylabel("Hz (mel scale)", fontsize=9)
    axes[0].set_title(f"{name}\n{replaced} half unrelated", fontsize=9, parse_math=False)
    tokens_1KD = block_inputs(network, mixture.mixed_TF)[-1]
    maps = {n: m for n, m in named_maps(attention_of(network, -1), tokens_1KD).items() if n != SIGNED}
    num_patches = tokens_1KD.shape[1] - 1
    stayed = slice(num_patches // 2, None) if mixture.replaced_first else slice(num_patches // 2)
    for one, (label, map_HKK) in zip(axes[1:], maps.items(), strict=False):
        row_N = map_HKK[:, 1:, 1:][:, stayed].mean((0, 1))
        frames = len(mixture.own_TF)
        figure.colorbar(show_patches(one, on_patches(row_N, network), frames), ax=one)
        one.set_title(f"{label}, times the mean", fontsize=9, parse_math=False)
    for one in axes:
        one.axvline(len(mixture.own_TF) / 200, color="white", linewidth=1.5, linestyle="--")
    for one in axes[1 + len(maps) :]:
        one.set_axis_off()
