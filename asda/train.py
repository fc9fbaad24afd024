"""Train: deepspeed asda/train.py --config configs/as2m.json [section.key=value ...]

One loop for pre-training and fine-tuning. Everything that decides a run is in its configuration, which is written to
the run folder with all values resolved. A run that stopped, however it stopped, goes on with the same command.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asda import checkpoint
from asda.checkpoint import State
from asda.config import ClassifyConfig, Config, LogMelStats, dump_config, load_config
from asda.costs import in_flop, network_costs
from asda.data.batches import Batch
from asda.data.cache import CacheConfig
from asda.data.clips import ClipDataset, DamageBudget
from asda.data.order import hash_of
from asda.data.stream import patch_maker, training_batches, with_patches
from asda.engine import (
    Processes,
    gradient_norm,
    join_processes,
    learning_rate,
    make_engine,
    mean_over_ranks,
    micro_batch_of,
    set_learning_rate,
)
from asda.errors import UserError, exit_with_sentence
from asda.evaluate import evaluate_weights
from asda.models.attention import describe_paths
from asda.objectives import Objective, make_objective
from asda.presets import departures
from asda.runlog import RunLog

EXAMPLES = """examples:
  deepspeed asda/train.py --config configs/as2m.json data.train=shards/as2m:train
  deepspeed --num_accelerators 2 asda/train.py --config configs/real_pretrain.json
  torchrun --nproc_per_node 2 asda/train.py --config configs/real_pretrain.json optimizer.steps=100 engine.zero_stage=2

A value is JSON, or text where it does not parse as JSON. Stopped runs go on with the same command; the newest
intact checkpoint of run.folder is used (resume=never refuses instead)."""


def train(config: Config) -> None:
    """Run a configuration to its last step, from its newest checkpoint if it has one."""
    sources = [part.data for part in config.data.datasets]
    labelled = isinstance(config.objective, ClassifyConfig)
    cache = CacheConfig(config.data.cache, config.data.cache_gib)
    dataset = ClipDataset(*sources, labelled=labelled, tolerant=config.data.max_damaged > 0, cache=cache)
    _refuse_unfit_labels(config, dataset)
    if config.data.log_mel == "dataset":
        config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": dataset.log_mel})})
    processes = join_processes()
    micro_batch = micro_batch_of(config, processes.world_size)
    accumulation = config.optimizer.batch // processes.world_size // micro_batch

    run = Path(config.run.folder)
    start_from = _newest_checkpoint(run, config, processes)
    objective = make_objective(config, dataset.vocabulary, processes.device)
    engine = make_engine(config, objective.module, objective.lr_scales, processes.world_size)
    budget = DamageBudget(int(config.data.max_damaged * len(dataset)))
    first_step = _restore(start_from, config, dataset, objective, engine, budget, processes) if start_from else 0

    derived_numbers = _derived_numbers(config, dataset, objective, processes, micro_batch)
    log = RunLog(run, first_step, config.optimizer.steps, enabled=processes.is_first)
    if processes.is_first:
        (run / "config.json").write_text(dump_config(config))
    for line in derived_numbers:
        log.say(line)
    if first_step:
        log.say(f"continuing from {start_from}: {first_step} of {config.optimizer.steps} steps are done")

    stream = training_batches(
        dataset,
        config.data,
        seed=config.run.seed,
        first_step=first_step,
        batch=config.optimizer.batch,
        micro_batch=micro_batch,
        rank=processes.rank,
        world_size=processes.world_size,
        masks=objective.masks(),
        budget=budget,
        patches=patch_maker(config, processes.device, training=True),
    )
    with with_patches(stream, config, micro_batch, processes.device, training=True) as batches:
        meter = Meter(processes.device)
        for step in range(first_step, config.optimizer.steps):
            set_learning_rate(engine, learning_rate(config.optimizer, step))
            # Noise and drop path follow from (seed, step, rank): a resumed step repeats them without stored state.
            torch.manual_seed(int(hash_of(config.run.seed, step, processes.rank)))
            engine.train()
            losses = []
            for _ in range(accumulation):
                patches_BNP, batch = meter.wait_for(batches)
                loss, terms = objective.loss(engine, patches_BNP.to(processes.device), batch)
                engine.backward(loss)
                engine.step()
                meter.add(terms, len(batch.clips))
                losses.append(loss.detach())
            done = step + 1
            extra = objective.after_update(done)
            log.advance()

            last = done == config.optimizer.steps
            if done % config.run.log_every == 0 or last:
                rates = {"lr": learning_rate(config.optimizer, step), "grad_norm": gradient_norm(engine)}
                figures = meter.figures(processes.world_size) | extra | rates
                if budget.num_clips:
                    figures["damaged_clips"] = len(_damaged_on_all_ranks(budget, processes))
                log.record("train", done, figures)
                _stop_if_not_finite(figures, done)
            if config.data.valid and (done % config.run.eval_every == 0 or last):
                with meter.paused():
                    figures = evaluate_weights(config, objective.weights()["model"], dataset.vocabulary, processes)
                log.record("valid", done, figures)
            if done % config.run.save_every == 0 or last:
                # Weights that came from a loss without a value must never replace a checkpoint.
                _stop_if_not_finite(mean_over_ranks({"loss": float(sum(losses))}, processes.device), done)
                damaged = _damaged_on_all_ranks(budget, processes)
                state = State(done, dataset.vocabulary, dataset.fingerprint, processes.world_size, damaged)
                with meter.paused():
                    folder = checkpoint.save(
                        run, config, state, objective.weights(), _engine_writer(engine), processes.is_first
                    )
                log.say(f"saved {folder}")
    log.close()


class Meter:
    """Sums the terms of micro-batches between two log lines, on the device; turns them into figures when asked."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._num_micro_batches = self._num_clips = 0
        self._waited_s = 0.0
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of an evaluation or a save."""
        paused = time.monotonic()
        yield
        self._started += time.monotonic() - paused

    def wait_for(self, batches: Iterator[tuple[Tensor, Batch]]) -> tuple[Tensor, Batch]:
        """The next batch, and how long it took to come."""
        asked = time.monotonic()
        item = next(batches)
        self._waited_s += time.monotonic() - asked
        return item

    def add(self, terms: dict[str, Tensor], num_clips: int) -> None:
        """Add one micro-batch."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        self._num_micro_batches += 1
        self._num_clips += num_clips

    def figures(self, world_size: int) -> dict[str, float]:
        """Means over micro-batches and ranks since the last call. All ranks call this together."""
        elapsed = time.monotonic() - self._started
        means = {name: (value / self._num_micro_batches).item() for name, value in self._sums.items()}
        means["clips_per_s"] = self._num_clips * world_size / elapsed
        means["data_wait_s"] = self._waited_s
        means["data_wait_share"] = self._waited_s / elapsed
        self.__init__(self._device)
        return mean_over_ranks(means, self._device)


def _refuse_unfit_labels(config: Config, dataset: ClipDataset) -> None:
    one_label = isinstance(config.objective, ClassifyConfig) and config.objective.loss == "ce"
    if one_label and dataset.num_labels != len(dataset):
        raise UserError(
            f"{config.data.train} has {dataset.num_labels} labels on {len(dataset)} clips; objective.loss ce wants "
            "one label on every clip, use bce for any number"
        )


def _newest_checkpoint(run: Path, config: Config, processes: Processes) -> Path | None:
    """The checkpoint to continue from, found by the first rank for all."""
    found = [checkpoint.newest(run) if processes.is_first else None]
    dist.broadcast_object_list(found)
    if found[0] is not None and config.resume == "never":
        raise UserError(f"{run} already has a checkpoint, and resume is never; give another run.folder, or resume=auto")
    return found[0]


def _restore(
    folder: Path,
    config: Config,
    dataset: ClipDataset,
    objective: Objective,
    engine: Any,
    budget: DamageBudget,
    processes: Processes,
) -> int:
    """Continue from a checkpoint; returns the number of steps done."""
    saved, state = checkpoint.read_state(folder, to_continue=True)
    _refuse_another_run(folder, saved, config)
    if state.data_fingerprint != dataset.fingerprint:
        raise UserError(
            f"the shards of {config.data.train} are not those that {folder} was trained on; give another run.folder"
        )
    if state.world_size != processes.world_size:
        raise UserError(
            f"{folder} was saved by {state.world_size} ranks and this run has {processes.world_size}; "
            f"continue with {state.world_size}, or start another run.folder with objective.init_from"
        )
    engine.load_checkpoint(str(folder), tag="engine")
    objective.restore(folder)
    budget.met.update(state.damaged_clips)
    return state.step


def _damaged_on_all_ranks(budget: DamageBudget, processes: Processes) -> tuple[int, ...]:
    """The numbers of all damaged clips that any rank has met. All ranks call this together.

    Raises:
        UserError: on all ranks alike, when there are too many for the budget, which each rank spends from by itself.
    """
    met: list[tuple[int, ...]] = [()] * processes.world_size
    dist.all_gather_object(met, tuple(budget.met))  # a copy: threads add to it meanwhile
    budget.add(clip for some in met for clip in some)
    return tuple(sorted(budget.met))


def _refuse_another_run(folder: Path, saved: Config, config: Config) -> None:
    """Refuse to continue when something differs that decides the numbers; pace, paths and threads may differ."""
    ours, theirs = _deciding_values(config), _deciding_values(saved)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{folder} was trained with {name} {theirs.get(name)}, this configuration says {value}; "
                "set it back, or give another run.folder"
            )


def _deciding_values(config: Config) -> dict[str, Any]:
    tree = config.model_dump(
        include={
            "objective": True,
            "model": True,
            "optimizer": True,
            "data": {
                "train",
                "frames",
                "crop",
                "log_mel",
                "pad_log_mel",
                "padding",
                "augment",
                "order",
                "group_shards",
            },
            "engine": {"precision", "zero_stage"},
            "run": {"seed"},
        }
    )
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _engine_writer(engine: Any) -> Callable[[Path], None]:
    """DeepSpeed's share of a checkpoint. Its own pointer file `latest` is not used."""
    return lambda folder: engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def _stop_if_not_finite(figures: dict[str, float], step: int) -> None:
    if not math.isfinite(figures["loss"]):
        raise UserError(
            f"the loss is {figures['loss']} at step {step}; nothing was saved since. Lower optimizer.lr, or raise "
            "optimizer.warmup_steps, and continue from the last checkpoint"
        )


def _derived_numbers(
    config: Config, dataset: ClipDataset, objective: Objective, processes: Processes, micro_batch: int
) -> list[str]:
    """What follows from the configuration, for the reader to check before the first step."""
    settings, patch = config.optimizer, config.model.patch
    num_patches = (config.data.frames // patch) * (config.model.mel_bins // patch)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in objective.module.parameters())
    accumulation = settings.batch // processes.world_size // micro_batch
    stats = config.data.log_mel
    assert isinstance(stats, LogMelStats)
    changed = departures(config.model_dump())
    costs = network_costs(config.model, config.objective, config.data.frames, len(dataset.vocabulary))
    flops = sum(costs.flops.values())
    return [
        f"preset      {config.preset}, {config.size}" + (f"; but {'; '.join(changed)}" if changed else ""),
        f"model       {num_parameters:,} trainable parameters, {num_patches} patches and {in_flop(flops)} a clip",
        f"data        {len(dataset):,} clips in {len(dataset.shards)} shards, "
        f"log-mel mean {stats.mean:.3f} std {stats.std:.3f}",
        f"step        {settings.batch} clips = {processes.world_size} ranks x {accumulation} x {micro_batch}, "
        f"{config.engine.precision}, ZeRO stage {config.engine.zero_stage}, {processes.device.type}",
        f"attention   {_attention_paths(config, objective, processes.device.type, num_patches)}",
        f"run         {settings.steps:,} steps = {settings.steps * settings.batch / len(dataset):.1f} epochs, "
        f"peak lr {settings.lr:g}, folder {config.run.folder}",
    ]


def _attention_paths(config: Config, objective: Objective, device_type: str, num_patches: int) -> str:
    draw = objective.masks()
    sequences = {"clips": (1 + num_patches, True)}  # tokens with CLS, whether gradients are needed
    if draw is not None:
        num_visible = draw(np.random.default_rng(0)).shape[1]
        sequences = {"students": (1 + num_visible, True), "the teacher": (1 + num_patches, False)}
    features = config.model.width // config.model.heads
    return describe_paths(config.engine.attention, device_type, features, sequences)


def main() -> None:
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
    args = parser.parse_args()
    train(load_config(args.config, args.overrides))


if __name__ == "__main__":
    exit_with_sentence(main)
