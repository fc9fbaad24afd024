"""Speed of the parts beside a baseline, measured in turn in one run: medians, their ratio, and the floor.

    python tools/bench.py                 every benchmark
    python tools/bench.py data --json     one, as a JSON object on one line
    python tools/bench.py attention       the ways to compute attention, by shape and dtype (minutes)

Machines are shared and noisy: quote the ratios, not the rates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio.compliance.kaldi as kaldi
from torch.utils.data import DataLoader, Dataset

from asda.config import Config, load_config
from asda.data.audio import SAMPLE_RATE_HZ
from asda.data.fbank import log_mel
from asda.data.stream import ClipDataset, evaluation_batches, with_patches
from asda.errors import exit_with_sentence
from asda.models.attention import TRITON_TILE, attend, by_definition

Figures = dict[str, float] | dict[str, dict[str, float]]

ROOT = Path(__file__).resolve().parent.parent
CLIP_SECONDS = 10
NUM_CLIPS = 384
BATCH = 16
WORKERS = 2  # threads of ours, processes of the baseline
ROUNDS = 5


class WavFolder(Dataset):
    """The usual way: a WAV per clip, torchaudio's fbank, one worker process per core."""

    def __init__(self, folder: Path, config: Config):
        self.paths = sorted(folder.glob("*.wav"))
        self.frames = config.data.frames

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Padded log-mel [frames, 128]."""
        samples_S, _ = soundfile.read(self.paths[number], dtype="float32")
        return pad(reference_log_mel(torch.from_numpy(samples_S)), self.frames)


def reference_log_mel(wave_S: torch.Tensor) -> torch.Tensor:
    """Torchaudio's Kaldi features as the published recipes call them, [T, 128]."""
    wave_1S = (wave_S - wave_S.mean())[None]
    return kaldi.fbank(
        wave_1S, htk_compat=True, window_type="hanning", num_mel_bins=128, dither=0.0, sample_frequency=SAMPLE_RATE_HZ
    )


def pad(mel_TM: torch.Tensor, frames: int) -> torch.Tensor:
    """Cut or pad with zeros to `frames`."""
    return torch.nn.functional.pad(mel_TM[:frames], (0, 0, 0, max(0, frames - len(mel_TM))))


def bench_features() -> dict[str, float]:
    """Log-mel of one 10 s clip on one thread, ours and torchaudio's."""
    torch.set_num_threads(1)
    clip_S = np.random.default_rng(0).integers(-9000, 9000, CLIP_SECONDS * SAMPLE_RATE_HZ).astype(np.int16)
    wave_S = torch.from_numpy(clip_S / np.float32(32768))
    ours, theirs = alternate(lambda: log_mel(clip_S), lambda: reference_log_mel(wave_S), rounds=40)
    return {"ours_ms": ours * 1000, "torchaudio_ms": theirs * 1000, "ratio": theirs / ours}


def bench_data() -> dict[str, float]:
    """Clips per second from disk to normalised patches: shards against WAV files in a DataLoader."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards = write_clips(folder)
        overrides = [
            f"data.train={shards}:train",
            'data.log_mel={"mean": -4.268, "std": 4.569}',
            f"data.threads={WORKERS}",
        ]
        config = load_config(ROOT / "configs" / "as2m.json", overrides)
        dataset = ClipDataset(config.data.train, labelled=False)
        loader = DataLoader(WavFolder(folder / "wav", config), BATCH, num_workers=WORKERS, persistent_workers=True)
        stream = lambda: evaluation_batches(dataset, config.data, batch=BATCH, rank=0, world_size=1)  # noqa: E731
        read, whole, theirs = alternate(
            lambda: exhaust(stream()),
            lambda: exhaust(with_patches(stream(), config, BATCH, torch.device("cpu"))),
            lambda: exhaust(loader),
        )
    return {
        "ours_clips_per_s": NUM_CLIPS / whole,
        "wav_loader_clips_per_s": NUM_CLIPS / theirs,
        "ratio": theirs / whole,
        "read_and_verify_only_clips_per_s": NUM_CLIPS / read,
    }


def write_clips(folder: Path) -> Path:
    """Noise with a falling spectrum, as WAV files and as shards; returns the shards' folder."""
    (folder / "wav").mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_CLIPS):
        steps_S = rng.standard_normal(CLIP_SECONDS * SAMPLE_RATE_HZ)
        samples_S = np.convolve(steps_S, np.exp(-np.arange(32) / 8), "same") * 0.03
        soundfile.write(folder / "wav" / f"{number:04d}.wav", samples_S, SAMPLE_RATE_HZ, subtype="PCM_16")
    tool = [sys.executable, ROOT / "tools" / "make_shards.py", "--source", "folder", "--input", folder / "wav"]
    subprocess.run([*tool, "--out", folder / "shards"], check=True, capture_output=True)
    return folder / "shards"


def exhaust(items: object) -> None:
    """Take everything an iterable gives."""
    for _ in items:  # type: ignore[attr-defined]
        pass


def alternate(*works: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each, run in turn after one unmeasured round."""
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
    """Differential attention by path, in ms; `products` are its matrix products alone, which no path can beat."""
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
            ours = seconds.keys() - {"products", "definition"}
            rows[label] = {path: 1000 * s for path, s in seconds.items()}
            rows[label]["best ratio"] = seconds["definition"] / min(seconds[path] for path in ours)
    return rows


def attention_works(
    sequences: int, tokens: int, backward: bool, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], object]]:
    """Path -> one call of it, on random inputs laid out as the encoder's linear layers make them."""
    width = HEADS * HEAD_FEATURES
    qk_BNC = torch.randn(sequences, tokens, 4 * width, device=device).to(dtype).requires_grad_(backward)
    v_BND = torch.randn(sequences, tokens, width, device=device).to(dtype).requires_grad_(backward)
    cotangent_BND = torch.randn(sequences, tokens, width, device=device).to(dtype)

    def work(path: Callable[..., torch.Tensor]) -> None:
        qk_2BGNE = qk_BNC.unflatten(-1, (2, 2 * HEADS, HEAD_FEATURES)).permute(2, 0, 3, 1, 4)
        v_BHNE = v_BND.unflatten(-1, (HEADS, HEAD_FEATURES)).transpose(1, 2)
        mixed_BND = path(qk_2BGNE, v_BHNE, LAMBDA).transpose(1, 2).flatten(2)
        if backward:
            torch.autograd.grad(mixed_BND, (qk_BNC, v_BND), cotangent_BND)
        if device == "cuda":
            torch.cuda.synchronize()

    paths = {"definition": by_definition}
    names = ("explicit", "sdpa") if device == "cpu" else ("sdpa", "triton") if tokens <= TRITON_TILE else ("sdpa",)
    paths |= {name: partial(attend, path=name) for name in names}
    return {"products": products_work(sequences, tokens, backward, dtype, device)} | {
        name: partial(work, path) for name, path in paths.items()
    }


def products_work(sequences: int, tokens: int, backward: bool, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """The matrix products of differential attention, on contiguous operands and into memory that is there."""
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


BENCHMARKS = {"features": bench_features, "data": bench_data, "attention": bench_attention}


def print_figures(figures: Figures) -> None:
    """Name and value on a line; where a value has parts, a table with a line for each."""
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
        prog="tools/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
