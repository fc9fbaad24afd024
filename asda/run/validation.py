"""Evaluations during a run, and the choice of its best checkpoint.

A classifier is evaluated on data.valid, and at the end on data.test, which is never used for selection. In pre-training
the probe evaluates the teacher's features.

With run.keep_best a checkpoint is saved whenever its validation metric is the best so far, and is kept beside the
newest ones. Each checkpoint records the best step that was known when it was saved. So a killed run resumes with that,
and evaluates what came later again.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import State, step_folder
from asda.checkpoint.weights import read_weights
from asda.config.data import DataSpecs
from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.data.datasets import open_held_out, open_probe_data
from asda.engine.processes import Processes, from_all_ranks
from asda.evaluation.loop import evaluate_weights
from asda.evaluation.probe import probe_encoder
from asda.objectives import Objective
from asda.run.log import Figures, RunLog


@dataclass
class Best:
    """The best step so far by the validation metric; the earliest of several equal ones."""

    step: int = 0  # 0: none yet
    figure: float | None = None  # the validation metric

    def update(self, step: int, figure: float) -> None:
        """Compare the metric of a step; one that is not finite is never the best."""
        if math.isfinite(figure) and (self.figure is None or figure > self.figure):
            self.step, self.figure = step, figure

    def forget(self, step: int) -> None:
        """Start over if this step was the best: its checkpoint could not be saved."""
        if step == self.step:
            self.step, self.figure = 0, None


def best_so_far(saved: Config, state: State, config: Config, valid: ClipDataset | None) -> Best:
    """Return the best step that a checkpoint knows; none if the clips or the metric have changed since."""
    same_clips = saved.data.valid == config.data.valid
    if state.best_on and valid:  # the shards may have moved; checkpoints from before this field know only their place
        same_clips = state.best_on == valid.fingerprint
    same = same_clips and saved.run.keep_best == config.run.keep_best
    return Best(state.best_step, state.best_figure) if same else Best()


class Validation:
    """The evaluations of a run, and its best step. All ranks call every method together."""

    def __init__(self, config: Config, dataset: ClipDataset, processes: Processes):
        """Open all held-out clips, so that mistakes show before the first step.

        Args:
            config: with the log-mel statistics resolved.
            dataset: the training clips.
            processes: all ranks.

        Raises:
            UserError: shards are missing, unlabelled, of other classes, or shared between data.valid and data.test.
        """
        self._config, self._vocabulary, self._processes = config, dataset.vocabulary, processes
        self._probe_data = open_probe_data(config) if config.probe else None
        self._valid, self.warnings = open_held_out(config, dataset)
        self.best = Best()

    @property
    def best_on(self) -> str:
        """Fingerprint of the clips that chose the best step; empty if there is none."""
        return self._valid.fingerprint if self._valid and self.best.step else ""

    def resume(self, saved: Config, state: State) -> list[str]:
        """Take the best step from a checkpoint; return a line if it no longer counts."""
        self.best = best_so_far(saved, state, self._config, self._valid)
        if not state.best_step or self.best.step:
            return []
        return [f"best checkpoint so far, step {state.best_step}: not kept, because data.valid or run.keep_best differ"]

    def run(self, step: int, objective: Objective, log: RunLog) -> None:
        """Evaluate what the configuration asks for, and log the figures."""
        data, is_last = self._config.data, step == self._config.optimizer.steps
        if self._probe_data:
            assert objective.teacher is not None, "the configuration allows a probe in pre-training only"
            encoder = objective.teacher.encoder
            log.record("probe", step, probe_encoder(encoder, self._config, self._probe_data, self._processes))
        if not data.valid and not (data.test and is_last):
            return
        weights = objective.weights(everywhere=True)["model"]
        if data.valid:
            self._validate(step, weights, log)
        if data.test and is_last:
            self._test(step, weights, log)

    def _validate(self, step: int, weights: dict[str, Tensor], log: RunLog) -> None:
        """Evaluate on data.valid, and see whether this is the best step."""
        data, metric = self._config.data.valid, self._config.run.keep_best
        figures = self._figures(weights, data)
        log.record("valid", step, figures)
        if metric:
            self.best.update(step, figures[metric])
        if self.best.step and step == self._config.optimizer.steps:
            log.say(f"best checkpoint on {data}: step {self.best.step}, {metric} {self.best.figure:.4f}")

    def _test(self, step: int, weights: dict[str, Tensor], log: RunLog) -> None:
        """Evaluate the last weights and those of the best step on data.test."""
        best, data = self.best.step, self._config.data.test
        figures = self._figures(weights, data)
        log.record("test", step, figures)
        if not best:
            return
        if best != step:
            folder = step_folder(Path(self._config.run.folder), best)
            if complaint := next(filter(None, from_all_ranks(damage(folder))), None):
                log.warn(f"the best checkpoint, {folder}, is damaged and not evaluated on {data}: {complaint}")
                return
            figures = self._figures(read_weights(folder, "model"), data)
        log.record("test_best", step, figures | {"best_step": best})

    def _figures(self, weights: dict[str, Tensor], data: DataSpecs) -> Figures:
        return evaluate_weights(self._config, weights, self._vocabulary, self._processes, data)
