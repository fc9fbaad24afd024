"""The table that a run prints before its first step: sizes, memory and time that follow from its configuration."""

import textwrap
from collections.abc import Callable
from math import prod

from asda.config.data import LogMelStats
from asda.config.model import AstConfig, PretrainConfig
from asda.config.presets import departures
from asda.config.run import Config
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.clips import ClipDataset
from asda.data.features.fbank import FRAME_SHIFT
from asda.engine.processes import Processes
from asda.models.attention import describe_paths
from asda.models.costs import Network, in_flop, rank_memory

COLUMN = 12  # characters of the first column
GOOD_SHARES = (0.8, 0.5)  # of the rate of matrix products: what a step reaches, at best and at worst
WIDTH = 120  # characters of a line
TIMES = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")]  # in seconds
COUNTS = [(10**9, " G"), (10**6, " M"), (10**3, " k"), (1, "")]
BYTES = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")]


def derived_numbers(
    config: Config,
    dataset: ClipDataset,
    processes: Processes,
    micro_batch: int,
    network: Network,
    gemm_rate: float,
    first_step: int = 0,
) -> list[str]:
    """Return the lines of the table.

    Args:
        config: with the log-mel statistics resolved.
        dataset: the training clips.
        processes: all ranks, and the device of this one.
        micro_batch: clips that a rank takes at once.
        network: from costs.network_costs.
        gemm_rate: operations per second of this rank, from costs.gemm_rate.
        first_step: number of steps already done.
    """
    changed = departures(config.model_dump())
    rows = {
        "preset": f"{config.preset}, {config.size}" + (f"; but {'; '.join(changed)}" if changed else ""),
        "data": _data_words(dataset, config),
        "model": f"{sum(network.parameters.values()):,} trainable parameters: {_parts(network.parameters, in_short)}",
        "clip": _clip_words(config),
        "arithmetic": f"{in_flop(sum(network.flops.values()))} per clip: {_parts(network.flops, in_flop)}",
        "attention": _attention_words(config, processes.device.type),
        "step": _step_words(config, processes, micro_batch, sum(network.flops.values())),
        "memory": _memory_words(config, network, processes.world_size),
        "schedule": _rate_words(config),
        "run": _run_words(config, dataset, first_step),
        "time": _time_words(config, network, processes.world_size, gemm_rate, first_step),
    }
    return [line for name, words in rows.items() for line in _wrapped(name, words)]


def in_time(*seconds: float) -> str:
    """Write 1.2 s, or 8.3 to 11 d: at least two digits, in the unit that suits the longest."""
    unit_s, unit = next((u for u in TIMES if max(seconds) >= u[0]), TIMES[-1])
    return f"{' to '.join(_two_digits(value / unit_s) for value in seconds)} {unit}"


def in_bytes(count: int) -> str:
    """Write 1.4 GiB: at least two digits, in the unit that suits them."""
    size, unit = next((u for u in BYTES if count >= u[0]), BYTES[-1])
    return f"{_two_digits(count / size)} {unit}"


def in_short(count: int) -> str:
    """Write 94.95 M: four digits, with the prefix that suits them."""
    size, prefix = next((u for u in COUNTS if count >= u[0]), COUNTS[-1])
    return f"{count / size:.4g}{prefix}"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _wrapped(name: str, words: str) -> list[str]:
    return textwrap.wrap(f"{name:{COLUMN}}{words}", WIDTH, subsequent_indent=COLUMN * " ", break_on_hyphens=False)


def _parts(costs: dict[str, int], words: Callable[[int], str]) -> str:
    return ", ".join(f"{name} {words(count)}" for name, count in costs.items())


def _num_patches(config: Config) -> int:
    return (config.data.frames // config.model.patch) * (config.model.mel_bins // config.model.patch)


def _num_tokens(config: Config) -> int:
    """Count the tokens of a whole clip: CLS and the patches, or AST's CLS, DIST and overlapping patches."""
    return 2 + prod(config.model.grid) if isinstance(config.model, AstConfig) else 1 + _num_patches(config)


def _data_words(dataset: ClipDataset, config: Config) -> str:
    stats = config.data.log_mel
    assert isinstance(stats, LogMelStats), "the trainer resolves them"
    labels = f", {len(dataset.vocabulary)} classes" if dataset.vocabulary else ""
    return (
        f"{len(dataset):,} clips in {len(dataset.shards)} shards{labels}, "
        f"log-mel mean {stats.mean:.3f} std {stats.std:.3f}"
    )


def _clip_words(config: Config) -> str:
    seconds, patches = config.data.frames * FRAME_SHIFT / SAMPLE_RATE_HZ, _num_patches(config)
    words = f"{seconds:g} s = {config.data.frames} frames = {patches} patches"
    objective, model = config.objective, config.model
    if isinstance(model, AstConfig):
        return f"{words}, overlapping: {' x '.join(map(str, model.grid))}, {_num_tokens(config)} tokens"
    if not isinstance(objective, PretrainConfig):
        return f"{words}, {patches + 1} tokens"
    mask, each = objective.mask, objective.mask.visible(patches) + 1
    blocks = f"{mask.blocks(patches)} blocks of {mask.block} x {mask.block}"
    return (
        f"{words}; teacher {patches + 1} tokens; {objective.students} students x {each} tokens = "
        f"{objective.students * each:,}, masked by {blocks if mask.blocks(patches) else 'single patches'}"
    )


def _attention_words(config: Config, device_type: str) -> str:
    sequences = {"clips": (_num_tokens(config), True)}  # whether gradients are needed
    if isinstance(config.objective, PretrainConfig):
        students = (1 + config.objective.mask.visible(_num_patches(config)), True)
        sequences = {"students": students, "the teacher": (_num_tokens(config), False)}
    return describe_paths(config.engine.attention, device_type, config.model.width // config.model.heads, sequences)


def _step_words(config: Config, processes: Processes, micro_batch: int, flops_per_clip: int) -> str:
    batch, world_size = config.optimizer.batch, processes.world_size
    accumulation = batch // world_size // micro_batch
    return (
        f"{batch} clips = {_counted(world_size, 'rank')} x {_counted(accumulation, 'accumulation step')} x "
        f"micro-batch {micro_batch}, {in_flop(batch * flops_per_clip)}; {config.engine.precision}, "
        f"ZeRO stage {config.engine.zero_stage}, "
        f"{processes.device.type}"
    )


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _memory_words(config: Config, network: Network, world_size: int) -> str:
    followed = network.parameters["encoder"] if isinstance(config.objective, PretrainConfig) else 0
    memory = rank_memory(sum(network.parameters.values()), followed, config.engine, world_size)
    parts = {name: size for name, size in memory.items() if size}
    return f"{in_bytes(sum(memory.values()))} per rank, plus activations: {_parts(parts, in_bytes)}"


def _rate_words(config: Config) -> str:
    settings = config.optimizer
    lr = _number(settings.lr)
    warmup = f"warm-up over {_counted(settings.warmup_steps, 'step')}, then " if settings.warmup_steps else ""
    if decay := settings.step_decay:
        steps = f"step {decay.start:,} and every {_counted(decay.every, 'step')} after it"
        return f"lr {warmup}{lr}, times {decay.factor:g} at {steps}"
    return f"lr {warmup}cosine, {lr} to {_number(settings.min_lr)} at step {settings.steps:,}"


def _number(value: float) -> str:
    """Write a learning rate: 5e-4, 0.001."""
    if value >= 1e-3 or not value:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _run_words(config: Config, dataset: ClipDataset, first_step: int) -> str:
    steps, run = config.optimizer.steps, config.run
    words = f"{steps:,} steps = {_visit_words(config, dataset)} in {run.folder}"
    if first_step >= steps:
        return words
    events = {"log line": run.log_every, "checkpoint": run.save_every}
    if config.data.valid or config.probe:
        events["probe" if config.probe else "evaluation"] = run.eval_every
    coming = [f"{name} {min(steps, (first_step // every + 1) * every):,}" for name, every in events.items()]
    return f"{words}; first {', '.join(coming)}"


def _visit_words(config: Config, dataset: ClipDataset) -> str:
    """Count epochs, or visits: each dataset of a mixture has its own epochs."""
    visits, (first, *others) = config.optimizer.steps * config.optimizer.batch, config.data.datasets
    if others:
        return f"{visits:,} visits, {visits / len(dataset):.1f} per clip on average,"
    draws = (first.order or config.data.order).draws_per_epoch
    return f"{visits / (draws or len(dataset)):.1f} epochs" + (f" of {draws:,} draws" if draws else "")


def _time_words(config: Config, network: Network, world_size: int, gemm_rate: float, first_step: int) -> str:
    flops = sum(network.flops.values()) * config.optimizer.batch / world_size
    steps_s = [flops / (share * gemm_rate) for share in GOOD_SHARES]
    left = config.optimizer.steps - first_step
    if left <= 0:
        return f"Run complete ({first_step}/{config.optimizer.steps} steps)"
    shares = " to ".join(f"{100 * share:.0f} %" for share in GOOD_SHARES)
    return (
        f"{in_time(*steps_s)} per step, {in_time(*(left * step_s for step_s in steps_s))} for {left:,} steps, at "
        f"{shares} of a rank's {in_flop(gemm_rate)}/s in matrix products; the log reports what is achieved"
    )
