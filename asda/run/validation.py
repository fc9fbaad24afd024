"""Which step of a fine-tuning is the best: chosen on data.valid, and never on data.test.

A run with run.keep_best saves a checkpoint whenever its validation figure is the best so far, and keeps that one
beside the newest. Each checkpoint's state says which step was the best when it was saved, so a killed run knows it
exactly as far as it is saved, and evaluates the rest again.
"""

import math
from dataclasses import dataclass

from asda.checkpoint.read import State
from asda.config.model import ClassifyConfig
from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.errors import UserError


@dataclass
class Best:
    """The best step so far, by one figure of the evaluations on data.valid; the earliest where several are equal."""

    step: int = 0  # 0: none yet
    figure: float | None = None

    def see(self, step: int, figure: float) -> None:
        """Take the figure of a step."""
        if math.isfinite(figure) and (self.figure is None or figure > self.figure):
            self.step, self.figure = step, figure

    def forget(self, step: int) -> None:
        """The checkpoint of that step could not be saved; the next evaluation begins anew."""
        if step == self.step:
            self.step, self.figure = 0, None


def best_so_far(saved: Config, state: State, config: Config, valid: ClipDataset | None) -> Best:
    """What a checkpoint knows of the best step; nothing where the choice is now made by something else."""
    same_clips = saved.data.valid == config.data.valid
    if state.best_on and valid:  # the shards may have moved; a checkpoint of before the field knows their place alone
        same_clips = state.best_on == valid.fingerprint
    same = same_clips and saved.run.keep_best == config.run.keep_best
    return Best(state.best_step, state.best_figure) if same else Best()


def check_choice(config: Config) -> None:
    """Raise UserError where what shall choose a checkpoint, or judge the chosen one, is not there or no classifier."""
    name, valid, test = config.run.keep_best, config.data.valid, config.data.test
    is_classifier = isinstance(config.objective, ClassifyConfig)
    if not is_classifier and (name or test):
        key = "run.keep_best" if name else "data.test"
        raise UserError(f"{key} {name or test!r} is for objective.kind classify; leave it empty in pre-training")
    if name and not valid:
        raise UserError(f"run.keep_best {name} chooses by an evaluation; give data.valid=FOLDER:SPLIT")
