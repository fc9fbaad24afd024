"""Train: deepspeed asda/train.py --config configs/as2m.json [section.key=value ...]

The configuration is checked before torch and DeepSpeed are loaded, so a slip is answered within a second. What follows
is asda/trainer.py.
"""

import os
import sys

if not __package__:  # run as a script: Python has put asda/ first, where names of ours would hide other packages
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if os.path.realpath(path) != here)]

import argparse

from asda.config.run import load_config
from asda.errors import exit_with_sentence

EXAMPLES = """examples:
  deepspeed asda/train.py --config configs/as2m.json data.train=shards/as2m:train
  deepspeed --num_accelerators 2 asda/train.py --config configs/real_pretrain.json
  torchrun --nproc_per_node 2 asda/train.py --config configs/real_pretrain.json optimizer.steps=100 engine.zero_stage=2

A value is JSON, or text where it does not parse as JSON. Stopped runs go on with the same command, on any number of
ranks; the newest intact checkpoint of run.folder is used (resume=never refuses instead). SIGTERM, SIGINT and SIGUSR1
finish the step, save, and end with exit code 75; a second one ends at once."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="asda/train.py",
        description="Pre-train or fine-tune, as a JSON configuration says.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="the run, a JSON file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)

    from asda.trainer import train  # takes seconds

    train(config)


if __name__ == "__main__":
    exit_with_sentence(main)
