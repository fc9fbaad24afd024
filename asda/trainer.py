"""The loop of training: one for pre-training and fine-tuning. asda/train.py is its command line.

    the newest checkpoint -> for every step: batch, forward, backward, update, EMA -> log, judge, save, stop

Two counts that are never mixed: `step` counts batches, and the place in the data follows from it; `applied_steps`
counts updates of the weights, and the learning rate and the teacher's decay follow from it. They differ by the steps
whose loss or gradient had no finite value: those change nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from asda.checkpoint.manifest import damage
from asda.checkpoint.read import State, newest_for_all_ranks, read_state, step_folder
from asda.checkpoint.weights import read_weights
from asda.checkpoint.writer import CheckpointWriter, Outcome
from asda.config.data import DataSpecs
from asda.config.model import ClassifyConfig
from asda.config.run import Config, dump_config
from asda.data.batches import Batch
from asda.data.clips import Clip, ClipDataset, DamageBudget
from asda.data.datasets import _open_data, open_held_out
from asda.data.order import hash_of
from asda.data.stream import patch_maker, training_batches, with_patches
from asda.engine.partitions import optimizer_file, restore
from asda.engine.processes import Processes, join_processes, leave_processes
from asda.engine.zero import (
    gradient_norm,
    guarded,
    learning_rate,
    make_engine,
    micro_batch_of,
    replicas_differ,
    set_learning_rate,
    was_applied,
)
from asda.errors import Stopped, UserError, say
from asda.evaluation.loop import evaluate_weights
from asda.evaluation.probe import Probe
from asda.models.costs import gemm_rate, network_costs
from asda.objectives import DTYPES, Pretraining, make_objective
from asda.run.folder import check_folder_is_shared, claim_folder
from asda.run.heartbeat import HEARTBEAT_TIMEOUT_S, Heartbeat
from asda.run.log import BAD_STEPS, RunLog, check_wandb, collapse_alarm
from asda.run.preflight import derived_numbers
from asda.run.resume import check_continuation
from asda.run.signals import StopSignals, agree
from asda.run.throughput import Meter
from asda.run.validation import Best, best_so_far, check_choice


def train(config: Config) -> None:
    """Run a configuration to its last step, from its newest checkpoint if it has one."""
    check_wandb(config.run.wandb)
    check_choice(config)
    dataset = _open_data(config)
    if config.data.log_mel == "dataset":
        config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": dataset.log_mel})})
    processes = join_processes(config.engine.timeout_s)
    with StopSignals() as stop, Heartbeat(processes, min(HEARTBEAT_TIMEOUT_S, config.engine.timeout_s)):
        Trainer(config, dataset, processes, stop).run()
    leave_processes()


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # batches tried
    applied_steps: int = 0  # updates of the weights
    bad_in_a_row: int = 0  # steps since the last update

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing."""
        return self.step - self.applied_steps


class Trainer:
    """One run: its parts, and the loop over its steps."""

    def __init__(self, config: Config, dataset: ClipDataset, processes: Processes, stop: StopSignals):
        """Make all parts, or restore them. The run folder is touched once nothing can be refused any more."""
        self.config, self.dataset, self.processes, self.stop = config, dataset, processes, stop
        self.folder = Path(config.run.folder)
        self.micro_batch = micro_batch_of(config, processes.world_size)
        self.accumulation = config.optimizer.batch // processes.world_size // self.micro_batch
        self.budget = DamageBudget(int(config.data.max_damaged * len(dataset)))
        self.probe = Probe(config) if config.probe else None
        self.valid, warnings = open_held_out(config, dataset)
        self.progress, self.best = Progress(), Best()
        self.clips: list[Clip] = []  # this rank's part of the last step

        check_folder_is_shared(self.folder, processes.rank, processes.world_size)
        # Before the newest checkpoint is looked for, which a run that is about to end may yet write. A new folder is
        # made later. Both are kept open: closing either would end the lock.
        self.locks = [claim_folder(self.folder, processes.rank, make=False)]
        start_from = newest_for_all_ranks(self.folder, warn=say)
        changes = self._continue_from(start_from) if start_from else []
        goes_on = start_from is not None
        self.objective = make_objective(config, dataset.vocabulary, processes.device, goes_on=goes_on)
        self.engine = make_engine(config, self.objective.module, self.objective.lr_scales, processes.world_size)
        self.objective.follow(self.engine)
        if start_from:
            restore(self.engine, start_from)
            self.objective.restore(start_from)

        costs = network_costs(config.model, config.objective, config.data.frames, len(dataset.vocabulary))
        rate = gemm_rate(processes.device, DTYPES[config.engine.precision])
        about = derived_numbers(config, dataset, processes, self.micro_batch, costs, rate, self.progress.step)
        self.locks.append(claim_folder(self.folder, processes.rank, make=True))
        self.log = self._open_log(about + changes)
        for sentence in warnings:
            self.log.warn(sentence)
        self.writer = CheckpointWriter(self.folder, config, processes)
        self.meter = Meter(processes, sum(costs.flops.values()), rate, self.progress.skipped_steps)

    def _open_log(self, lines: list[str]) -> RunLog:
        """The run's record, which begins with the resolved configuration and these lines."""
        config = self.config
        log = RunLog(
            self.folder,
            self.progress.step,
            config.optimizer.steps,
            enabled=self.processes.is_first,
            wandb=config.run.wandb,
            config=config.model_dump(mode="json", by_alias=True),
        )
        if self.processes.is_first:
            (self.folder / "config.json").write_text(dump_config(config))
        for line in lines:
            log.say(line)
        return log

    def run(self) -> None:
        """Do every step that is left.

        Raises:
            Stopped: as was asked, after a checkpoint.
        """
        made = with_patches(self._stream(), self.config, self.micro_batch, self.processes.device, training=True)
        with made as batches, self.writer:
            while self.progress.step < self.config.optimizer.steps:
                figures = self._step(batches)
                self.log.advance()
                self._check_replicas()
                self._report(figures)
                self._judge()
                self._save_or_stop()
        self.log.close()

    def _step(self, batches: Iterator[tuple[Tensor, Batch]]) -> dict[str, float]:
        """One batch: forward, backward, and an update if loss and gradient are finite on all ranks."""
        config, progress, engine = self.config, self.progress, self.engine
        set_learning_rate(engine, partial(learning_rate, config.optimizer, progress.applied_steps))
        # Noise and drop path follow from (seed, step, rank): a resumed step repeats them without stored state.
        torch.manual_seed(int(hash_of(config.run.seed, progress.step, self.processes.rank)))
        engine.train()
        self.clips = []
        for number in range(self.accumulation):
            patches_BNP, batch = self.meter.wait_for(batches)
            self.clips += batch.clips
            loss, terms = self.objective.loss(engine, patches_BNP.to(self.processes.device), batch)
            engine.backward(guarded(loss))
            self.meter.add(terms, len(batch.clips))
            if number == self.accumulation - 1:
                self.writer.wait_until_copied()  # what is being saved is about to change
            engine.step()
        applied = was_applied(engine)
        self.meter.end_step(applied=applied)
        progress.step += 1
        progress.applied_steps += applied
        progress.bad_in_a_row = 0 if applied else progress.bad_in_a_row + 1
        lr = learning_rate(config.optimizer, progress.applied_steps - applied)
        figures = {"lr": lr, "grad_norm": gradient_norm(engine)}
        if applied:
            return figures | self.objective.after_update(progress.applied_steps)
        self._note_bad_step()
        return figures

    def _note_bad_step(self) -> None:
        """Say and record which clips were in a step that changed nothing.

        Raises:
            UserError: on all ranks alike, when it was one too many in a row.
        """
        clips = [name for part in self._from_all([self._name(clip) for clip in self.clips]) for name in part]
        step, in_a_row, most = self.progress.step, self.progress.bad_in_a_row, self.config.run.max_bad_steps
        record = self.folder / BAD_STEPS
        self.log.warn(
            f"step {step}: the loss or the gradient is not finite, so nothing was changed ({in_a_row} in a row; "
            f"{most} end the run); its clips are in {record}"
        )
        self.log.bad_step(step, clips)
        if in_a_row >= most:
            raise UserError(
                f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite and changed "
                f"nothing; their clips are in {record}, the last begin with {', '.join(clips[:4])}. Look at the clips; "
                "go on with a larger run.max_bad_steps, or begin another run.folder with a lower optimizer.lr or more "
                "optimizer.warmup_steps"
            )

    def _check_replicas(self) -> None:
        """Compare what all ranks should have alike: a difference would be trained on for ever.

        Raises:
            UserError: on all ranks alike.
        """
        every = self.config.run.check_replicas_every
        if not every or self.progress.step % every:
            return
        teacher = self.objective.teacher if isinstance(self.objective, Pretraining) else None
        if difference := replicas_differ(self.engine, teacher, self.processes):
            raise UserError(
                f"the ranks have drifted apart by step {self.progress.step}: {difference}. Look for a faulty device, "
                "and go on from the last checkpoint"
            )

    def _report(self, figures: dict[str, float]) -> None:
        """A line of figures, every run.log_every steps and at the end."""
        if not self._is_due(self.config.run.log_every):
            return
        figures = self.meter.figures() | figures | {"failed_saves": self.writer.num_failed}
        if self.budget.num_clips:
            figures["damaged_clips"] = len(self._damaged_on_all_ranks())
        self.log.record("train", self.progress.step, figures, {"clips": self._hash_of_clips()})
        if isinstance(self.objective, Pretraining):
            self.log.alarm(collapse_alarm(figures, self.config.run))

    def _judge(self) -> None:
        """Held-out figures of a classifier, or of the teacher's features, every run.eval_every steps and at the end."""
        if not self._is_due(self.config.run.eval_every):
            return
        if isinstance(self.config.objective, ClassifyConfig):
            with self.meter.paused():
                self._judge_classifier()
        if self.probe and isinstance(self.objective, Pretraining):
            with self.meter.paused():
                figures = self.probe.figures(self.objective.teacher.encoder, self.processes)
            self.log.record("probe", self.progress.step, figures)

    def _judge_classifier(self) -> None:
        """Figures on data.valid, which may choose the best step, and at the end on data.test, which chooses nothing."""
        data, step = self.config.data, self.progress.step
        if not data.valid and not (data.test and self._is_last):
            return
        weights = self.objective.weights(everywhere=True)["model"]
        if data.valid:
            self.log.record("valid", step, figures := self._figures(weights, data.valid))
            if name := self.config.run.keep_best:
                self._tell(self.writer.finish())  # so that all ranks know what became of the best
                self.best.see(step, figures[name])
        if self._is_last and self.best.step:
            chosen = f"step {self.best.step}, {self.config.run.keep_best} {self.best.figure:.4f}"
            self.log.say(f"best on {data.valid}, which chose it: {chosen}")
        if self._is_last and data.test:
            self._judge_on_test(weights)

    def _judge_on_test(self, weights: dict[str, Tensor]) -> None:
        """What the last weights, and those of the best step, come to on clips that did not choose them."""
        step, best, test = self.progress.step, self.best.step, self.config.data.test
        self.log.record("test", step, figures := self._figures(weights, test))
        if not best:
            return
        if best != step:
            folder = step_folder(self.folder, best)
            if complaint := next(filter(None, self._from_all(damage(folder))), None):
                self.log.warn(f"{folder} is not evaluated on {test}: {complaint}")
                return
            figures = self._figures(read_weights(folder, "model"), test)
        self.log.record("test_best", step, figures | {"best_step": best})

    def _figures(self, weights: dict[str, Tensor], data: DataSpecs) -> dict[str, float | int]:
        return evaluate_weights(self.config, weights, self.dataset.vocabulary, self.processes, data)

    def _save_or_stop(self) -> None:
        """Begin a checkpoint where one is due; leave where any rank was asked to, or could not save.

        Raises:
            Stopped, UserError: on all ranks alike.
        """
        self._tell(self.writer.poll())
        is_best = self.best.step == self.progress.step
        wish = agree(self.processes, stop=bool(self.stop.asked), fail=self.writer.failure is not None, save=is_best)
        if wish["fail"]:
            self._tell(self.writer.finish())
            raise UserError(self.writer.failure)
        if self._is_due(self.config.run.save_every) or wish["stop"] or wish["save"]:
            self._save()
        if wish["stop"] or self._is_last:
            self._tell(self.writer.finish())
            if self.writer.failure:
                raise UserError(self.writer.failure)
        if wish["stop"] and not self._is_last:
            self.log.close()
            raise Stopped(
                f"stopped after step {self.progress.step} of {self.config.optimizer.steps}, as "
                f"{self.stop.asked or 'another rank'} asked; it is saved, and the same command goes on"
            )

    def _save(self) -> None:
        state = State(
            self.progress.step,
            self.dataset.vocabulary,
            self.dataset.fingerprint,
            self.processes.world_size,
            self._damaged_on_all_ranks(),
            applied_steps=self.progress.applied_steps,
            skipped_steps=self.progress.skipped_steps,
            bad_steps_in_a_row=self.progress.bad_in_a_row,
            best_step=self.best.step,
            best_figure=self.best.figure,
            best_on=self.valid.fingerprint if self.valid and self.best.step else "",
        )
        with self.meter.paused():
            stem, moments = optimizer_file(self.engine)
            files = {name: tensors for name, tensors in self.objective.weights().items() if tensors}
            self.writer.save(state, files | {stem: moments})

    def _tell(self, outcome: Outcome | None) -> None:
        """Say how a save ended, and others that have ended since."""
        while outcome is not None:
            if outcome.failure:
                self.log.warn(f"step {outcome.step} could not be saved: {outcome.failure}")
                self.best.forget(outcome.step)
            else:
                gib, seconds = outcome.bytes / 2**30, outcome.seconds
                self.log.say(f"saved {outcome.folder} ({gib:.2f} GiB in {seconds:.1f} s, beside the training)")
            outcome = self.writer.poll()

    def _continue_from(self, folder: Path) -> list[str]:
        """Take the counters from a checkpoint; returns lines that say where the run goes on, and what is changed.

        Raises:
            UserError: something that decides the numbers is not as it was.
        """
        if self.config.resume == "never":
            raise UserError(
                f"{self.folder} already has a checkpoint, and resume is never; give another run.folder, or resume=auto"
            )
        saved, state = read_state(folder, to_continue=True)
        changes = check_continuation(folder, saved, self.config)
        if state.data_fingerprint != self.dataset.fingerprint:
            raise UserError(
                f"the shards of {self.config.data.train} are not those that {folder} was trained on; give another "
                "run.folder"
            )
        if state.vocabulary != self.dataset.vocabulary:
            raise UserError(
                f"the shards of {self.config.data.train} have other classes, or another order of them, than those that "
                f"{folder} was trained on; make them with the --labels of then, or give another run.folder"
            )
        self.progress = Progress(state.step, state.applied_steps, state.bad_steps_in_a_row)
        self.best = best_so_far(saved, state, self.config, self.valid)
        if state.best_step and not self.best.step:
            changes.append(
                f"the best so far, step {state.best_step}, was chosen on or by something else: it is not kept"
            )
        self.budget.met.update(state.damaged_clips)
        if state.world_size != self.processes.world_size:
            changes.append(f"changed since {folder.name}: ranks {state.world_size} -> {self.processes.world_size}")
        return [f"continuing from {folder}: {state.step} of {self.config.optimizer.steps} steps are done", *changes]

    def _stream(self) -> Iterator[Batch]:
        return training_batches(
            self.dataset,
            self.config.data,
            seed=self.config.run.seed,
            first_step=self.progress.step,
            batch=self.config.optimizer.batch,
            micro_batch=self.micro_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            masks=self.objective.masks(),
            budget=self.budget,
            patches=patch_maker(self.config, self.processes.device, training=True),
        )

    @property
    def _is_last(self) -> bool:
        return self.progress.step == self.config.optimizer.steps

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self._is_last

    def _damaged_on_all_ranks(self) -> tuple[int, ...]:
        """The numbers of all damaged clips that any rank has met. All ranks call this together.

        Raises:
            UserError: on all ranks alike, when they are too many for the budget; by itself a rank knows of its own.
        """
        met = self._from_all(tuple(self.budget.met))  # a copy: threads add to it meanwhile
        self.budget.add(clip for some in met for clip in some)
        return tuple(sorted(self.budget.met))

    def _hash_of_clips(self) -> str:
        """Of the set of clips in the last step, over all ranks: two runs that agree in it saw the same batch."""
        numbers = sorted(number for part in self._from_all([clip.number for clip in self.clips]) for number in part)
        return xxhash.xxh3_64_hexdigest(json.dumps(numbers).encode())

    def _name(self, clip: Clip) -> str:
        return f"{self.dataset.locate(clip.number)[0].entry.name}:{clip.key}"

    def _from_all(self, mine: Any) -> list[Any]:
        """Every rank's value. All ranks call this together."""
        everyones = [None] * self.processes.world_size
        dist.all_gather_object(everyones, mine)
        return everyones
