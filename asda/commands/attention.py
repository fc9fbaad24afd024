"""Measure how much attention falls on irrelevant context: a table, a JSON file and a picture.

Half of each clip is replaced by half of an unrelated clip. docs/attention_measure.md defines the figures.
"""

import argparse
from pathlib import Path

from asda.commands.parsing import CHECKPOINT_HELP, check_range, make_parser
from asda.config.base import MOST
from asda.errors import UserError

EXAMPLES = """examples
  asda attention runs/mine --data shards/mine:valid
      one run, on 64 clips
  asda attention runs/two_maps runs/one_map --data shards/esc10:fold4 --context noise --query cls
      two runs on the same mixtures with noise, and their difference: what the CLS token attends to

Figures are relative to uniform attention, per block and map. unrelated: the weight on the unrelated half; own: the same
before the half was replaced; unrelated / own: what the content does. Below 1, attention avoids irrelevant context.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("attention", (__doc__ or "").strip(), EXAMPLES)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help=CHECKPOINT_HELP)
    add("--data", required=True, metavar="FOLDER:SPLIT", help="clips; their labels tell which are unrelated")
    add("--clips", type=int, default=64, help="number of clips, chosen at random (default: 64)")
    add("--context", choices=("clip", "noise"), default="clip", help="what replaces a half (default: clip)")
    add("--query", choices=("patches", "cls"), default="patches", help="which tokens attend (default: patches)")
    add("--seed", type=int, default=0, help="seed of clips, halves and noise (default: 0)")
    out = Path("attention.json")
    add("--out", type=Path, default=out, help=f"default: {out}; the picture lies beside it, as .png")
    args = parser.parse_args(argv)
    if args.query == "cls" and args.context == "clip":
        raise UserError("--query cls needs --context noise: if both halves are clips, neither is irrelevant to CLS")
    if args.clips < 2:
        raise UserError(f"--clips {args.clips} must be at least 2: each clip is mixed with another one")
    check_range("--seed", args.seed, 0, MOST)
    if args.out.suffix == ".png":
        raise UserError(f"--out {args.out} is for the figures; name it .json: the picture is written beside it")
    return args


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and compare the runs."""
    args = parse_args(argv)

    from asda.commands.attention_tables import compare  # brings torch

    compare(args)
