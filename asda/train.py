"""Train: deepspeed asda/train.py --config configs/as2m.json [section.key=value ...]

The configuration is checked before torch and DeepSpeed are loaded, so a mistake is reported within a second. The
training itself is in asda/trainer.py.
"""

import os
import sys

if not __package__:  # run as a script: Python has put asda/ first, where names of ours would hide other packages
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if os.path.realpath(path) != here)]

import argparse

from asda.config.run import load_config
from asda.errors import exit_with_sentence

EPILOG = """examples:
  asda train --config configs/demo_pretrain.json                                     one process
  deepspeed asda/train.py --config configs/as2m.json data.train=shards/as2m:train    every GPU of this machine
  torchrun --nproc_per_node 2 asda/train.py --config configs/real_pretrain.json optimizer.steps=100

values:
  section.key=value replaces a value of the file. A value is JSON, or text if it is not valid JSON:
  engine.zero_stage=2, run.folder=runs/x, 'data.train=["a:train", "b:train"]'. An unknown key fails at once, with a
  suggestion. configs/ has complete recipes; `asda describe` prints what one costs.

stop and resume:
  The same command resumes from the newest intact checkpoint in run.folder, on any number of ranks. Settings that
  affect results must stay the same; any that differ are listed. resume=never refuses to resume.
  SIGTERM, SIGINT, SIGUSR1 and SIGHUP finish the step, save a checkpoint and end with exit code 75; a second signal
  ends the run at once.

run.folder gets config.json (every value), metrics.jsonl, tensorboard/ and checkpoints/."""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="asda train",
        description="Pre-train an audio encoder, or fine-tune a classifier, as a JSON configuration says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="JSON file that describes the run; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)

    from asda.trainer import train  # takes seconds

    train(config)


if __name__ == "__main__":
    exit_with_sentence(main, prints=False)
