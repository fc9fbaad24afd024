"""One training step of ASDA-base beside a plain implementation of the same: time, arithmetic and memory.

Shapes: B clips, M students of each, S = B * M sequences, N patches of a clip, K visible ones, T time patches, F mel
patches, D width, H heads, E = D / H.

The plain one is what one writes from the paper with torch.nn: explicit maps of attention, nn.LayerNorm, F.gelu,
nn.Conv2d, torch.optim.AdamW, clip_grad_norm_, a loop over the parameters for the teacher. A test shows that its losses
and gradients are those of asda.models. Each side lives in a process of its own, and the processes step in turn.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from asda.config import Config, DecoderConfig, ModelConfig, PretrainConfig, load_config
from asda.costs import gemm_rate, network_costs
from asda.data.batches import Batch
from asda.engine import guarded, join_processes, make_engine, set_learning_rate
from asda.models.encoder import sincos_positions
from asda.models.masks import visible_patches
from asda.objectives import Pretraining, make_objective

CONFIG = Path(__file__).parents[1] / "configs" / "as2m.json"
OVERRIDES = ["optimizer.batch=1", "engine.micro_batch=1"]
WARM_UP, ROUNDS = 2, 7  # steps of each side; the median of the rounds counts
DECAY = 0.9998  # of the teacher
GIB = 2**30
KIB = 2**10
CLEAR_PEAK = "5"  # what /proc/self/clear_refs takes to set the peak of resident memory to what is resident now
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# The plain implementation --------------------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """(softmax(q1 k1^T / sqrt(E)) - lambda softmax(q2 k2^T / sqrt(E))) v, normalised, scaled and projected."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.lam, self.scale = config.heads, config.attention_lambda, config.attention_scale
        self.qk = nn.Linear(config.width, 4 * config.width)
        self.v = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_SND: Tensor) -> Tensor:
        """[S, N, D] -> [S, N, D]."""
        q1, q2, k1, k2 = (self._by_head(part) for part in self.qk(x_SND).chunk(4, dim=-1))
        first, second = (
            (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) for q, k in ((q1, k1), (q2, k2))
        )
        mixed_SHNE = (first - self.lam * second) @ self._by_head(self.v(x_SND))
        return self.proj(self.norm(mixed_SHNE.transpose(1, 2).flatten(2)) * self.scale)

    def _by_head(self, x_SND: Tensor) -> Tensor:
        return x_SND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PlainMlp(nn.Module):
    """Two linear layers and a GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, int(config.width * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.width * config.mlp_ratio), config.width)

    def forward(self, x_SND: Tensor) -> Tensor:
        """[S, N, D] -> [S, N, D]."""
        return self.fc2(functional.gelu(self.fc1(x_SND)))


class PlainBlock(nn.Module):
    """Post-norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn, self.mlp = PlainAttention(config), PlainMlp(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width, eps=1e-6), nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x_SND: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and its MLP's."""
        x_SND = self.norm1(x_SND + self.attn(x_SND))
        ffn_SND = self.mlp(x_SND)
        return self.norm2(x_SND + ffn_SND), ffn_SND


class PlainEncoder(nn.Module):
    """Patches to tokens; the patches that a student does not see are left out before the first block."""

    positions: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        num_mel_patches = config.mel_bins // config.patch
        self.patch_embed = nn.Linear(config.patch**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        table_ND = sincos_positions(config.max_time_patches, num_mel_patches, config.width)
        self.register_buffer("positions", table_ND, persistent=False)

    def forward(self, patches_BNP: Tensor, visible_BMK: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens with CLS first, [S, 1 + K, D], and what every MLP gave."""
        x_SND = self.patch_embed(patches_BNP) + self.positions[: patches_BNP.shape[1]]
        if visible_BMK is not None:
            visible_SK = visible_BMK.flatten(0, 1)
            x_SND = x_SND.repeat_interleave(visible_BMK.shape[1], dim=0)
            x_SND = x_SND.gather(1, visible_SK[..., None].expand(-1, -1, x_SND.shape[-1]))
        x_SND = self.norm(torch.cat([self.cls_token.expand(len(x_SND), -1, -1), x_SND], dim=1))
        ffns = []
        for block in self.blocks:
            x_SND, ffn_SND = block(x_SND)
            ffns.append(ffn_SND)
        return x_SND, ffns


class PlainDecoder(nn.Module):
    """Convolution, norm over the channels, GELU and residual, several times; then a projection."""

    def __init__(self, config: DecoderConfig, width: int):
        super().__init__()
        widths = [width] + [config.width] * (config.layers - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, config.width, config.kernel, padding=config.kernel // 2, groups=config.groups) for w in widths
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.proj = nn.Linear(config.width, width)

    def forward(self, x_SDTF: Tensor) -> Tensor:
        """[S, D, T, F] -> [S, N, D]."""
        for conv in self.convs:
            y_SDTF = self.norm(conv(x_SDTF).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y_SDTF = functional.gelu(y_SDTF)
            x_SDTF = x_SDTF + y_SDTF if x_SDTF.shape == y_SDTF.shape else y_SDTF
        return self.proj(x_SDTF.flatten(2).transpose(1, 2))


class PlainStudents(nn.Module):
    """Encoder, decoder and losses; parameters are named as in asda.models.pretrain.MaskedStudents."""

    def __init__(self, model: ModelConfig, config: PretrainConfig):
        super().__init__()
        self.encoder = PlainEncoder(model)
        self.decoder = PlainDecoder(config.decoder, model.width)
        self.num_mel_patches = model.mel_bins // model.patch
        self.noise_std, self.utterance_weight = config.decoder.noise_std, config.utterance_weight

    def forward(
        self,
        patches_BNP: Tensor,
        visible_BMK: Tensor,
        targets_BND: Tensor,
        target_cls_BD: Tensor,
        noise_SND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The total loss, the frame loss, the utterance loss, and the spread of the predictions."""
        (num_clips, num_students, _), visible_SK = visible_BMK.shape, visible_BMK.flatten(0, 1)
        tokens_SKD, _ = self.encoder(patches_BNP, visible_BMK)
        width = tokens_SKD.shape[-1]
        if noise_SND is None:
            noise_SND = torch.randn(len(visible_SK), patches_BNP.shape[1], width) * self.noise_std
        places = visible_SK[..., None].expand(-1, -1, width)
        grid_SND = noise_SND.to(tokens_SKD.dtype).scatter(1, places, tokens_SKD[:, 1:])
        grid_SDTF = grid_SND.transpose(1, 2).unflatten(2, (-1, self.num_mel_patches))
        pred_SND = self.decoder(grid_SDTF)

        masked_SN = torch.ones(pred_SND.shape[:2], dtype=torch.bool).scatter(1, visible_SK, False)
        wanted_SND = targets_BND.repeat_interleave(num_students, dim=0)
        error_X = (pred_SND[masked_SN].float() - wanted_SND[masked_SN]).square().sum(-1) / width**0.5
        cls_BMD = tokens_SKD[:, 0].float().unflatten(0, (num_clips, num_students))
        frame = error_X.mean()
        utterance = ((cls_BMD - target_cls_BD[:, None]).square().sum(-1) / width**0.5).mean()
        spread = spread_of(pred_SND[masked_SN].detach().float())
        return frame + self.utterance_weight * utterance, frame, utterance, spread


def plain_targets(encoder: PlainEncoder, patches_BNP: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """What the teacher asks for: tokens [B, N, D] and their mean [B, D]."""
    _, ffns = encoder(patches_BNP)
    normed = [functional.instance_norm(ffn[:, 1:].float().transpose(1, 2)).transpose(1, 2) for ffn in ffns[-layers:]]
    mean_BND = torch.stack(normed).mean(0)
    tokens_BND = functional.layer_norm(mean_BND, mean_BND.shape[-1:])
    spread_of(tokens_BND.flatten(0, 1))
    return tokens_BND, tokens_BND.mean(1)


def spread_of(features_XD: Tensor) -> Tensor:
    """The features' standard deviations, averaged."""
    return (features_XD.var(dim=0) + 1e-6).sqrt().mean()


# Both sides, a step at a time ----------------------------------------------------------------------------------------


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What has passed since the last call belongs to this part."""
        now = time.perf_counter()
        self.seconds[part], self._last = self.seconds.get(part, 0.0) + now - self._last, now


def inputs_of(config: Config) -> tuple[Tensor, Tensor]:
    """Patches of a clip [1, N, P], and what 16 students see of it [1, M, K]."""
    assert isinstance(config.objective, PretrainConfig)
    grid = (config.data.frames // config.model.patch, config.model.mel_bins // config.model.patch)
    rng = np.random.default_rng(0)
    visible_MK = visible_patches(rng, num_masks=config.objective.students, grid=grid, config=config.objective.mask)
    torch.manual_seed(0)
    return torch.randn(1, grid[0] * grid[1], config.model.patch**2), torch.from_numpy(visible_MK)[None]


def plain_step(config: Config) -> tuple[Callable[[], Clock], dict[str, int]]:
    """A function that takes a step of the plain implementation, and the bytes of what it keeps between steps."""
    assert isinstance(config.objective, PretrainConfig)
    patches_BNP, visible_BMK = inputs_of(config)
    objective, settings = config.objective, config.optimizer
    students = PlainStudents(config.model, objective)
    nn.init.normal_(students.encoder.cls_token)
    teacher = copy.deepcopy(students.encoder).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        students.parameters(), lr=1e-5, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    low = config.engine.precision == "bf16"

    def step() -> Clock:
        clock = Clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            with torch.no_grad():
                targets = plain_targets(teacher, patches_BNP, objective.target_layers)
            clock.lap("teacher")
            total, *_ = students(patches_BNP, visible_BMK, *targets)
        clock.lap("students")
        total.backward()
        clock.lap("backward")
        nn.utils.clip_grad_norm_(students.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), students.encoder.parameters(), strict=True):
                slow.mul_(DECAY).add_(fast, alpha=1 - DECAY)
        clock.lap("ema")
        return clock

    weights, teachers = (4 * sum(p.numel() for p in module.parameters()) for module in (students, teacher))
    return step, {"weights": weights, "gradients": weights, "adam": 2 * weights, "teacher": teachers}


def our_step(config: Config) -> tuple[Callable[[], Clock], dict[str, int]]:
    """The same of ours, through the engine and the objective as asda/train.py runs them."""
    processes = join_processes()
    objective = make_objective(config, (), processes.device)
    assert isinstance(objective, Pretraining)
    engine = make_engine(config, objective.module, objective.lr_scales, processes.world_size)
    objective.follow(engine)
    set_learning_rate(engine, 1e-5)
    patches_BNP, visible_BMK = inputs_of(config)
    batch = Batch([], visible_BMK.numpy())
    num_updates = 0

    def step() -> Clock:
        nonlocal num_updates
        clock = Clock()
        engine.train()
        loss, _ = objective.loss(engine, patches_BNP, batch)
        clock.lap("forward")
        engine.backward(guarded(loss))
        clock.lap("backward")
        engine.step()
        clock.lap("optimizer")
        num_updates += 1
        objective.after_update(num_updates)
        clock.lap("ema")
        return clock

    low = config.engine.precision == "bf16"
    parameters = sum(p.numel() for p in objective.module.parameters())
    followed = sum(p.numel() for p in objective.teacher.encoder.parameters())
    state = {"weights": (6 if low else 4) * parameters, "gradients": 4 * parameters, "adam": 8 * parameters}
    return step, state | {"teacher": (6 if low else 4) * followed}


SIDES = {"plain": plain_step, "ours": our_step}


# A process for each side ----------------------------------------------------------------------------------------------


def config_of(precision: str) -> Config:
    """configs/as2m.json for one clip on one rank; in fp32 without ZeRO, which has nothing to part there."""
    stage = ["engine.zero_stage=0"] if precision == "fp32" else []
    return load_config(CONFIG, [*OVERRIDES, f"engine.precision={precision}", *stage])


def serve(side: str, precision: str, answers: Any) -> None:
    """Answer each line of standard input with a line of JSON: "step" takes one, "gemm" measures the machine."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = config_of(precision)
    before_gib = resident_gib("VmRSS")
    step, state = SIDES[side](config)
    for line in sys.stdin:
        if line.strip() == "gemm":
            answer: dict[str, Any] = {"rate": gemm_rate(torch.device("cpu"), DTYPES[precision])}
        else:
            Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
            started = time.perf_counter()
            parts = step().seconds
            took_s, peak_gib = time.perf_counter() - started, resident_gib("VmHWM") - before_gib
            answer = {"step_s": took_s, "parts": parts, "peak_gib": peak_gib, "state": state}
        print(json.dumps(answer), file=answers, flush=True)


def resident_gib(field: str) -> float:
    """Resident memory of this process (VmRSS), or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * KIB / GIB


class Side:
    """A process that steps when asked."""

    def __init__(self, side: str, precision: str):
        command = [sys.executable, __file__, side, precision]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: list[dict[str, Any]] = []

    def ask(self, what: str) -> dict[str, Any]:
        """Send a line, wait for the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def step(self) -> None:
        """Take a step, and keep what it tells."""
        self.answers.append(self.ask("step"))

    def median_s(self) -> float:
        """Of a step."""
        return statistics.median(answer["step_s"] for answer in self.answers)

    def peak_gib(self) -> float:
        """The highest of any step, over what was resident before the model was built."""
        return max(answer["peak_gib"] for answer in self.answers)

    def shares(self) -> dict[str, float]:
        """Median share of each part of the step, in percent."""
        names = self.answers[0]["parts"]
        return {
            name: 100 * statistics.median(a["parts"].get(name, 0) / a["step_s"] for a in self.answers) for name in names
        }

    def state_gib(self) -> dict[str, float]:
        """What is kept between steps, or with the gradients until the next one."""
        return {name: size / GIB for name, size in self.answers[0]["state"].items()}

    def end(self) -> None:
        """Close the process."""
        self._process.communicate()


def bench_step() -> dict[str, Any]:
    """A training step of ASDA-base on one clip: ours beside a plain one, the machine's products, peaks of memory."""
    sides = {(side, precision): Side(side, precision) for precision in DTYPES for side in SIDES}
    rates: dict[str, list[float]] = {precision: [] for precision in DTYPES}
    for number in range(WARM_UP + ROUNDS):
        for (name, precision), side in sides.items():
            if name == "ours":
                rates[precision].append(side.ask("gemm")["rate"])
            side.step()
            if number < WARM_UP:
                side.answers.clear()
    figures = figures_of(sides, {precision: statistics.median(some) for precision, some in rates.items()})
    for side in sides.values():
        side.end()
    return figures


def figures_of(sides: dict[tuple[str, str], Side], gemm_rates: dict[str, float]) -> dict[str, Any]:
    """Names and figures, flat, in GiB, seconds, percent and 1e9 operations a second."""
    config = config_of("bf16")
    flops = sum(network_costs(config.model, config.objective, config.data.frames, 0).flops.values())
    ours, plain = sides["ours", "bf16"], sides["plain", "fp32"]
    figures = {
        "ours_s": ours.median_s(),
        "baseline_s": plain.median_s(),
        "ratio": plain.median_s() / ours.median_s(),
        "gemm_share": flops / ours.median_s() / gemm_rates["bf16"],
        "floor_s": flops / gemm_rates["bf16"],
        "ours_peak_gib": ours.peak_gib(),
        "baseline_peak_gib": sides["plain", "bf16"].peak_gib(),
        "fp32_ours_s": sides["ours", "fp32"].median_s(),
        "fp32_ratio": plain.median_s() / sides["ours", "fp32"].median_s(),
        "fp32_gemm_share": flops / sides["ours", "fp32"].median_s() / gemm_rates["fp32"],
        "fp32_ours_peak_gib": sides["ours", "fp32"].peak_gib(),
        "fp32_baseline_peak_gib": plain.peak_gib(),
        "bf16_baseline_s": sides["plain", "bf16"].median_s(),
        "gemm_bf16_gflop_per_s": gemm_rates["bf16"] / 1e9,
        "gemm_fp32_gflop_per_s": gemm_rates["fp32"] / 1e9,
        "tflop_a_clip": flops / 1e12,
    }
    shares = ours.shares()
    figures |= {f"{part}_share": share for part, share in shares.items()}
    figures["overhead_share"] = 100 - sum(shares.values())
    figures |= {f"ours_{part}_gib": size for part, size in ours.state_gib().items()}
    return figures | {f"baseline_{part}_gib": size for part, size in plain.state_gib().items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One side of the benchmark; tools/bench.py step runs them all.")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("precision", choices=DTYPES)
    chosen = parser.parse_args()
    # What libraries print goes to standard error, so that only answers come out.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(chosen.side, chosen.precision, answers)
