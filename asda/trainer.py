"""The training loop, one for pre-training and fine-tuning; asda/train.py is its command line.

    newest checkpoint -> for every step: batch, forward, backward, update -> report, validate, save, stop

Two counts are never mixed. `step` counts batches, and the position in the data follows from it. `applied_steps` counts
updates of the weights, and the learning rate and the teacher's decay follow from it. They differ by the steps whose
loss or gradient was not finite: all ranks skip such a step.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from webdataset.pipeline import DataPipeline

from asda.checkpoint.read import State, newest_for_all_ranks
from asda.checkpoint.writer import CheckpointWriter, Outcome
from asda.config.run import Config, dump_config
from asda.data.clips import Clip, ClipDataset, DamageBudget
from asda.data.datasets import open_training_data
from asda.data.order import hash_of
from asda.data.stream import Batch, make_patches, training_batches
from asda.engine import partitions, zero
from asda.engine.processes import Processes, from_all_ranks, join_processes, leave_processes
from asda.errors import Stopped, UserError, say
from asda.models.costs import gemm_rate, network_costs
from asda.objectives import PRECISIONS, make_objective
from asda.run.folder import check_folder_is_shared, claim_folder
from asda.run.heartbeat import HEARTBEAT_TIMEOUT_S, Heartbeat
from asda.run.log import BAD_STEPS, RunLog, check_wandb, collapse_alarm
from asda.run.preflight import derived_numbers
from asda.run.resume import open_checkpoint
from asda.run.signals import StopSignals, agree
from asda.run.throughput import Throughput
from asda.run.validation import Validation
from asda.system import write_whole_file


def train(config: Config) -> None:
    """Run a configuration to its last step, from its newest checkpoint if it has one."""
    check_wandb(config.run.wandb)
    dataset = open_training_data(config)
    if config.data.log_mel == "dataset":
        config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": dataset.log_mel})})
    processes = join_processes(config.engine.timeout_s)
    with StopSignals() as stop, Heartbeat(processes, min(HEARTBEAT_TIMEOUT_S, config.engine.timeout_s)):
        Trainer(config, dataset, processes, stop).run()
    leave_processes()


@dataclass
class StepCounts:
    """How far a run has come."""

    step: int = 0  # batches tried
    applied_steps: int = 0  # updates of the weights
    bad_in_a_row: int = 0  # steps since the last update

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing."""
        return self.step - self.applied_steps

    def add(self, *, applied: bool) -> None:
        """Count a step."""
        self.step += 1
        self.applied_steps += applied
        self.bad_in_a_row = 0 if applied else self.bad_in_a_row + 1


class Trainer:
    """One run: its parts, and the loop over its steps."""

    def __init__(self, config: Config, dataset: ClipDataset, processes: Processes, stop: StopSignals):
        """Make all parts, or restore them. The run folder is not touched before everything has been checked."""
        self.config, self.dataset, self.processes, self.stop = config, dataset, processes, stop
        self.folder = Path(config.run.folder)
        self.micro_batch = zero.micro_batch_of(config, processes.world_size)
        self.accumulation = config.optimizer.batch // processes.world_size // self.micro_batch
        self.budget = DamageBudget(int(config.data.max_damaged * len(dataset)))
        self.validation = Validation(config, dataset, processes)
        self.counts = StepCounts()
        self.clips: list[Clip] = []  # this rank's part of the last step

        check_folder_is_shared(self.folder, processes.rank, processes.world_size)
        # Lock an existing folder before looking for the newest checkpoint: a run that is about to end may still write
        # one. A new folder is made later. Both claims are kept: closing the lock of either would release both.
        self.claims = [claim_folder(self.folder, processes.rank, make=False)]
        checkpoint = newest_for_all_ranks(self.folder, warn=say)
        changes = self._resume_from(checkpoint) if checkpoint else []
        self.objective = make_objective(config, dataset.vocabulary, processes.device, resumed=checkpoint is not None)
        self.engine = zero.make_engine(config, self.objective.module, self.objective.lr_scales, processes.world_size)
        self.objective.follow(self.engine)
        if checkpoint:
            partitions.restore(self.engine, checkpoint)
            self.objective.restore(checkpoint)

        costs = network_costs(config.model, config.objective, config.data.frames, len(dataset.vocabulary))
        rate = gemm_rate(processes.device, PRECISIONS[config.engine.precision])
        about = derived_numbers(config, dataset, processes, self.micro_batch, costs, rate, self.counts.step)
        self.claims.append(claim := claim_folder(self.folder, processes.rank, make=True))
        assert claim is not None, "the folder was made"
        self.log = self._open_log(about + changes)
        self.writer = CheckpointWriter(self.folder, config, processes, claim.check)
        self.throughput = Throughput(processes, sum(costs.flops.values()), rate, self.counts.skipped_steps)

    def _resume_from(self, checkpoint: Path) -> list[str]:
        """Take the counters from a checkpoint; return lines that say where the run resumes and what has changed."""
        saved, state, lines = open_checkpoint(checkpoint, self.config, self.dataset, self.processes.world_size)
        self.counts = StepCounts(state.step, state.applied_steps, state.bad_steps_in_a_row)
        self.budget.met.update(state.damaged_clips)
        return lines + self.validation.resume(saved, state)

    def _open_log(self, lines: list[str]) -> RunLog:
        """Open the run's record; it begins with the resolved configuration and these lines."""
        config, is_first, steps = self.config, self.processes.is_first, self.config.optimizer.steps
        tree = config.model_dump(mode="json", by_alias=True)
        log = RunLog(self.folder, self.counts.step, steps, enabled=is_first, wandb=config.run.wandb, config=tree)
        if is_first:
            write_whole_file(self.folder / "config.json", dump_config(config))
        for line in lines:
            log.say(line)
        for sentence in self.validation.warnings:
            log.warn(sentence)
        return log

    def run(self) -> None:
        """Do all remaining steps. Raises Stopped if the run was asked to stop, after it has saved a checkpoint."""
        with closing(self._stream().iterator()) as batches, self.writer:  # pyright: ignore[reportArgumentType]
            while self.counts.step < self.config.optimizer.steps:
                figures = self._step(batches)
                self.log.advance()
                self._check_replicas()
                self._report(figures)
                self._validate()
                self._save_or_stop()
        self.log.close()

    def _step(self, batches: Iterator[tuple[Tensor, Batch]]) -> dict[str, float]:
        """Take one batch: forward, backward, and an update if loss and gradient are finite on all ranks."""
        config, counts, engine = self.config, self.counts, self.engine
        rate_of = partial(zero.learning_rate, config.optimizer, counts.applied_steps)
        zero.set_learning_rate(engine, rate_of)
        # Noise and drop path follow from (seed, step, rank): a resumed step repeats them without stored state.
        torch.manual_seed(int(hash_of(config.run.seed, counts.step, self.processes.rank)))
        engine.train()
        self.clips = []
        for number in range(self.accumulation):
            patches_BNP, batch = self.throughput.wait_for(batches)
            self.clips += batch.clips
            loss, terms = self.objective.loss(engine, patches_BNP.to(self.processes.device), batch)
            engine.backward(zero.guarded(loss))
            self.throughput.add(terms, len(batch.clips))
            if number == self.accumulation - 1:
                self.writer.wait_until_copied()  # the tensors that are being saved are about to change
            engine.step()
        applied = zero.was_applied(engine)
        self.throughput.end_step(applied=applied)
        counts.add(applied=applied)
        figures = {"lr": rate_of(1.0), "grad_norm": zero.gradient_norm(engine)}
        if applied:
            return figures | self.objective.after_update(counts.applied_steps)
        self._note_bad_step()
        return figures

    def _note_bad_step(self) -> None:
        """Report and record the clips of a step that changed nothing; after too many, raise UserError on all ranks."""
        names = [f"{self.dataset.locate(clip.number)[0].entry.name}:{clip.key}" for clip in self.clips]
        clips = [name for part in from_all_ranks(names) for name in part]
        step, in_a_row, most = self.counts.step, self.counts.bad_in_a_row, self.config.run.max_bad_steps
        record = self.folder / BAD_STEPS
        self.log.warn(
            f"step {step}: the loss or the gradient is not finite, so no weight was changed ({in_a_row} in a row; "
            f"{most} end the run); its clips are in {record}"
        )
        self.log.bad_step(step, clips)
        if in_a_row >= most:
            raise UserError(
                f"{in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not finite and changed "
                f"nothing. Their clips are in {record}; the last begin with {', '.join(clips[:4])}. Look at the clips; "
                "resume with a larger run.max_bad_steps, or start another run.folder with a lower optimizer.lr or more "
                "optimizer.warmup_steps"
            )

    def _check_replicas(self) -> None:
        """Compare what all ranks should have alike; raise UserError on all if it differs, because that never mends."""
        every = self.config.run.check_replicas_every
        if not every or self.counts.step % every:
            return
        if difference := zero.replicas_differ(self.engine, self.objective.teacher, self.processes):
            raise UserError(
                f"step {self.counts.step}: the ranks have drifted apart: {difference}. Look for a faulty device, "
                "then resume from the last checkpoint"
            )

    def _report(self, figures: dict[str, float]) -> None:
        """Log figures, every run.log_every steps and at the end."""
        if not self._is_due(self.config.run.log_every):
            return
        figures = self.throughput.figures() | figures | {"failed_saves": self.writer.num_failed}
        if self.budget.num_clips:
            figures["damaged_clips"] = len(self._damaged_on_all_ranks())
        self.log.record("train", self.counts.step, figures, {"clips": self._hash_of_clips()})
        self.log.alarm(collapse_alarm(figures, self.config.run))

    def _validate(self) -> None:
        """Evaluate on held-out clips, every run.eval_every steps and at the end."""
        if not self._is_due(self.config.run.eval_every):
            return
        with self.throughput.paused():
            if self.config.run.keep_best:  # before there is a new best, all ranks learn whether the last one was saved
                self._tell(self.writer.finish())
            self.validation.run(self.counts.step, self.objective, self.log)

    def _save_or_stop(self) -> None:
        """Begin a checkpoint if one is due. All ranks raise Stopped if one was asked to, UserError if a save failed."""
        self._tell(self.writer.poll())
        is_best = self.validation.best.step == self.counts.step
        wish = agree(self.processes, stop=bool(self.stop.asked), fail=self.writer.failure is not None, save=is_best)
        if wish["fail"]:
            self._tell(self.writer.finish())
            raise UserError(self.writer.failure)
        if self._is_due(self.config.run.save_every) or wish["stop"] or wish["save"]:
            self._save()
        if wish["stop"] or self._is_last:
            self._tell(self.writer.finish())
            if self.writer.last_failure:  # the save that the end needs; run.on_failed_save is about those on the way
                raise UserError(self.writer.last_failure)
        if wish["stop"] and not self._is_last:
            self.log.close()
            raise Stopped(
                f"stopped after step {self.counts.step} of {self.config.optimizer.steps}, as "
                f"{self.stop.asked or 'another rank'} asked; a checkpoint is saved, and the same command resumes"
            )

    def _save(self) -> None:
        counts, dataset, validation = self.counts, self.dataset, self.validation
        state = State(
            counts.step,
            dataset.vocabulary,
            dataset.fingerprint,
            self.processes.world_size,
            self._damaged_on_all_ranks(),
            applied_steps=counts.applied_steps,
            skipped_steps=counts.skipped_steps,
            bad_steps_in_a_row=counts.bad_in_a_row,
            best_step=validation.best.step,
            best_figure=validation.best.figure,
            best_on=validation.best_on,
        )
        with self.throughput.paused():
            stem, moments = partitions.optimizer_file(self.engine)
            files = {name: tensors for name, tensors in self.objective.weights().items() if tensors}
            self.writer.save(state, files | {stem: moments})

    def _tell(self, outcome: Outcome | None) -> None:
        """Log how a save ended, and others that have ended since."""
        while outcome is not None:
            if outcome.failure:
                self.log.warn(f"the checkpoint of step {outcome.step} could not be saved: {outcome.failure}")
                self.validation.best.forget(outcome.step)
            else:
                gib, seconds = outcome.bytes / 2**30, outcome.seconds
                self.log.say(f"saved {outcome.folder} ({gib:.2f} GiB in {seconds:.1f} s, while training)")
            outcome = self.writer.poll()

    def _stream(self) -> DataPipeline:
        batches = training_batches(
            self.dataset,
            self.config.data,
            seed=self.config.run.seed,
            first_step=self.counts.step,
            batch=self.config.optimizer.batch,
            micro_batch=self.micro_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            masks=self.objective.masks(),
            budget=self.budget,
        )
        return batches.compose(make_patches(self.config, self.processes.device, self.micro_batch, training=True))

    @property
    def _is_last(self) -> bool:
        return self.counts.step == self.config.optimizer.steps

    def _is_due(self, every: int) -> bool:
        return self.counts.step % every == 0 or self._is_last

    def _damaged_on_all_ranks(self) -> tuple[int, ...]:
        """Return the damaged clips of all ranks, which call this together. All raise UserError if they are too many."""
        met = from_all_ranks(tuple(self.budget.met))  # a copy: threads add to it meanwhile
        self.budget.add(clip for some in met for clip in some)
        return tuple(sorted(self.budget.met))

    def _hash_of_clips(self) -> str:
        """Hash the set of clips in the last step, over all ranks: equal hashes mean the same batch."""
        numbers = sorted(number for part in from_all_ranks([clip.number for clip in self.clips]) for number in part)
        return xxhash.xxh3_64_hexdigest(json.dumps(numbers).encode())
