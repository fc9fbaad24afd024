"""asda/train.py, which also notes what it trains on: --draws FILE, then its own arguments.

A line of FILE for each micro-batch of this rank: the epoch, the number and the repeat of each clip.
"""

import json
import sys
from pathlib import Path

from asda import train
from asda.errors import exit_with_sentence
from asda.objectives import Pretraining

trained = Pretraining.loss


def recorded(objective, engine, patches_BNP, batch):
    with PATH.open("a") as file:
        file.write(json.dumps([clip.draw for clip in batch.clips]) + "\n")
    return trained(objective, engine, patches_BNP, batch)


if __name__ == "__main__":
    PATH = Path(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    Pretraining.loss = recorded
    exit_with_sentence(train.main)
