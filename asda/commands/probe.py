"""Evaluate the frozen features of an encoder: k-NN and a linear layer on labelled clips.

Fine-tuning hides how good features are. Here nothing is trained by gradient descent: k-NN lets the nearest labelled
clips vote, and the linear layer is a ridge regression. It is the probe of pre-training (section `probe` of a
configuration) for a run, a checkpoint, or converted weights.
"""

import argparse
from pathlib import Path

from asda.commands.parsing import CHECKPOINT_HELP, check_range, comma_list, make_parser
from asda.config.base import MOST
from asda.errors import UserError, exit_with_sentence

EXAMPLES = """examples
  asda probe --checkpoint runs/mine --train shards/esc10:fold1+fold2 --test shards/esc10:fold3 --random
      features of runs/mine, and of the same network with random weights as a baseline
  asda probe --checkpoint runs/mine --data shards/esc10 --random
      hold out every fold in turn
  deepspeed --num_accelerators 2 --module asda.commands.probe --checkpoint weights/eat --data shards/x
      encode the clips on two ranks
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line. Raises UserError."""
    parser = make_parser("probe", (__doc__ or "").strip(), EXAMPLES)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help=CHECKPOINT_HELP)
    add("--train", metavar="FOLDER:SPLIT", help="labelled clips to compare with")
    add("--test", metavar="FOLDER:SPLIT", help="labelled clips to evaluate")
    add("--data", metavar="FOLDER", help="instead of both, a folder or URL: hold out one split after another")
    add("--hold-out", metavar="A,B", type=comma_list(str), help="with --data: these splits (default: every split)")
    add("--weights", choices=["teacher", "student"], help="default: the teacher, if the checkpoint has one")
    add("--random", action="store_true", help="also evaluate the network with random weights, as a baseline")
    add("--seed", type=int, default=1, help="seed of the random weights (default: 1)")
    add("--neighbours", type=int, default=10, help="nearest clips that vote (default: 10)")
    add("--out", type=Path, metavar="FILE.json", help="also write the figures to this file")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args(argv)
    named = [args.train, args.test]
    if any(named) != all(named) or all(named) == bool(args.data) or (args.hold_out and not args.data):
        raise UserError("name --train and --test, or else --data, to which --hold-out may be added")
    check_range("--neighbours", args.neighbours, 1)
    check_range("--seed", args.seed, 0, MOST)
    return args


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and probe."""
    args = parse_args(argv)

    from asda.commands.probe_encoders import probe  # brings torch

    probe(args)


if __name__ == "__main__":  # a launcher starts each rank by the module's name
    exit_with_sentence(main)
