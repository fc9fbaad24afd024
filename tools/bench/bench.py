"""Measure the speed of parts beside a baseline, in turns in one run: medians, their ratio, and the floor.

    python tools/bench/bench.py                 every benchmark
    python tools/bench/bench.py data --json     one, as a JSON object on one line
    python tools/bench/bench.py memory          bytes a rank holds and sends, by ZeRO stage (minutes)
    python tools/bench/bench.py attention       the paths of attention, by shape and dtype (minutes)
    python tools/bench/bench.py step            a training step of ASDA-base, beside a plain one (minutes)
    python tools/bench/bench.py index           a hundred million clips: opening, positions, memory (a minute, 0.5 GB)
    python tools/bench/bench.py metrics         mAP of 20,000 x 527 scores, beside torchmetrics and scikit-learn

Machines are shared and noisy: quote the ratios, not the rates.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from bench_data import CLIP_SECONDS, ROUNDS, Figures, bench_data, kaldi_log_mel
from bench_index import bench_index
from bench_memory import bench_memory
from bench_metrics import bench_metrics
from bench_step import bench_step

from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.features.fbank import log_mel
from asda.errors import exit_with_sentence
from asda.models.attention import TRITON_TILE, AttentionPath, attend


def bench_features() -> dict[str, float]:
    """Time the log-mel of one 10 s clip on one thread, ours and torchaudio's."""
    torch.set_num_threads(1)
    clip_S = np.random.default_rng(0).integers(-9000, 9000, CLIP_SECONDS * SAMPLE_RATE_HZ).astype(np.int16)
    wave_S = torch.from_numpy(clip_S / np.float32(32768))
    ours, theirs = alternate(lambda: log_mel(clip_S), lambda: kaldi_log_mel(wave_S), rounds=40)
    return {"ours_ms": ours * 1000, "torchaudio_ms": theirs * 1000, "ratio": theirs / ours}


def alternate(*works: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return the median seconds of each, run in turns after one unmeasured round."""
    seconds: list[list[float]] = [[] for _ in works]
    for round_number in range(rounds + 1):
        for work, taken in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            if round_number:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


# Sequences x tokens, and whether the shape is trained: of ASDA-base at 10 s, heads and features per head as there.
ATTENTION_SHAPES = {
    "students 16 x 103": (16, 103, True),  # of one clip
    "students 192 x 103": (192, 103, True),  # of the micro-batch of configs/as2m.json
    "teacher 1 x 513": (1, 513, False),
    "teacher 12 x 513": (12, 513, False),
    "fine-tuning 8 x 513": (8, 513, True),
}
HEADS, HEAD_FEATURES, LAMBDA = 12, 64, 0.1


def bench_attention() -> Figures:
    """Time differential attention by path, in ms; `ratio` is explicit / sdpa, `products` the matrix products alone."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: dict[str, dict[str, float]] = {}
    for (name, (sequences, tokens, trained)), dtype in product(
        ATTENTION_SHAPES.items(), (torch.bfloat16, torch.float32)
    ):
        for backward in (False, True) if trained else (False,):
            works = attention_works(sequences, tokens, backward, dtype, device)
            with torch.set_grad_enabled(backward):
                seconds = dict(zip(works, alternate(*works.values()), strict=True))
            label = f"{name}, {str(dtype).removeprefix('torch.')}, {'forward + backward' if backward else 'forward'}"
            rows[label] = {path: 1000 * s for path, s in seconds.items()}
            rows[label]["ratio"] = seconds["explicit"] / seconds["sdpa"]
    return rows


def attention_works(
    sequences: int, tokens: int, backward: bool, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], object]]:
    """Make a call of each path, on random inputs laid out as the encoder's linear layers make them."""
    width = HEADS * HEAD_FEATURES
    qk_BNC = torch.randn(sequences, tokens, 4 * width, device=device).to(dtype).requires_grad_(backward)
    v_BND = torch.randn(sequences, tokens, width, device=device).to(dtype).requires_grad_(backward)
    cotangent_BND = torch.randn(sequences, tokens, width, device=device).to(dtype)

    def work(path: AttentionPath) -> None:
        qk_2BGNE = qk_BNC.unflatten(-1, (2, 2 * HEADS, HEAD_FEATURES)).permute(2, 0, 3, 1, 4)
        v_BHNE = v_BND.unflatten(-1, (HEADS, HEAD_FEATURES)).transpose(1, 2)
        mixed_BND = attend(qk_2BGNE, v_BHNE, LAMBDA, path=path).transpose(1, 2).flatten(2)
        if backward:
            torch.autograd.grad(mixed_BND, (qk_BNC, v_BND), cotangent_BND)
        if device == "cuda":
            torch.cuda.synchronize()

    paths: list[AttentionPath] = ["explicit", "sdpa"]
    if device == "cuda" and tokens <= TRITON_TILE:
        paths.append("triton")
    products = products_work(sequences, tokens, backward, dtype, device)
    return {"products": products} | {path: partial(work, path) for path in paths}


def products_work(sequences: int, tokens: int, backward: bool, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Make a call of the matrix products of differential attention, on contiguous operands into allocated memory."""
    rows = torch.randn(sequences * HEADS, tokens, HEAD_FEATURES, device=device).to(dtype)
    matrix = torch.randn(sequences * HEADS, tokens, tokens, device=device).to(dtype)
    matrix_out, rows_out = torch.empty_like(matrix), torch.empty_like(rows)

    def work() -> None:
        # Forward: two maps and their difference with v. Backward: of the difference; of v, two queries, two keys.
        with torch.no_grad():
            for _ in range(3 if backward else 2):
                torch.bmm(rows, rows.mT, out=matrix_out)
            for _ in range(6 if backward else 1):
                torch.bmm(matrix, rows, out=rows_out)
        if device == "cuda":
            torch.cuda.synchronize()

    return work


BENCHMARKS = {
    "features": bench_features,
    "data": bench_data,
    "attention": bench_attention,
    "step": bench_step,
    "memory": bench_memory,
    "metrics": bench_metrics,
    "index": bench_index,
}


def print_figures(figures: Figures) -> None:
    """Print a name and value on a line; values with parts make a table, a line each."""
    heads: list[str] = []
    for key, value in figures.items():
        if not isinstance(value, dict):
            print(f"  {key:34} {value:10.2f}")
            continue
        if list(value) != heads:
            heads = list(value)
            print(f"  {'':50}" + "".join(f"{head:>12}" for head in heads))
        print(f"  {key:50}" + "".join(f"{part:12.2f}" for part in value.values()))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        prog="tools/bench/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a benchmark, on one line")
    args = parser.parse_args()
    for name in args.names or BENCHMARKS:
        figures = BENCHMARKS[name]()
        if args.json:
            print(json.dumps({"benchmark": name, **figures}))
        else:
            print(f"{name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}")
            print_figures(figures)


if __name__ == "__main__":
    exit_with_sentence(main)
