"""What the tests of commands share: tiny models, odd audio, a command run in this process."""

import contextlib
import importlib
import io
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch

from asda.checkpoint.weights import write_weights
from asda.config.data import InputConfig, LogMelStats
from asda.config.model import ClassifyConfig, DecoderConfig, ModelConfig, PretrainConfig
from asda.config.run import Description
from asda.errors import exit_with_sentence
from asda.models.classifier import Classifier
from asda.models.encoder import Encoder
from asda.models.pretrain import MaskedStudents

TINY = ModelConfig(width=32, depth=3, heads=2)
LABELS = ("rain", "dog", "siren", "clock", "wind")
INPUT = InputConfig(frames=128, log_mel=LogMelStats(mean=-7.0, std=4.0))
HEAD_STD = 0.3  # so that the classes of a network with random weights differ: logits of 1.7


def write_tagger(folder: Path, *, model: ModelConfig = TINY, labels: tuple[str, ...] = LABELS, seed: int = 1) -> Path:
    """A classifier with random weights."""
    torch.manual_seed(seed)
    objective = ClassifyConfig(kind="classify", init_from="", loss="bce")
    classifier = Classifier(model, objective, len(labels))
    torch.nn.init.normal_(classifier.head.weight, std=HEAD_STD)
    description = Description(objective=objective, data=INPUT, model=model, labels=labels)
    write_weights(folder, description, {"model": classifier.state_dict()})
    return folder


def write_pretrained(folder: Path) -> Path:
    """A pre-trained student and teacher with random weights."""
    torch.manual_seed(2)
    objective = PretrainConfig(
        kind="pretrain", students=2, target_layers=2, decoder=DecoderConfig(layers=1, width=32, groups=2)
    )
    weights = {"model": MaskedStudents(TINY, objective).state_dict(), "teacher": Encoder(TINY).state_dict()}
    write_weights(folder, Description(objective=objective, data=INPUT, model=TINY), weights)
    return folder


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(command: str, *arguments: object) -> Done:
    """Run a command as its command line would, in this process (a fresh one takes seconds to import torch)."""
    main = importlib.import_module(f"asda.commands.{command}").main
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exit_with_sentence(lambda: main(list(map(str, arguments))))
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Files end at this size, as on a disk that fills up: what is written behind it fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(seconds: float, rate_hz: int = 16_000, seed: int = 0) -> np.ndarray:
    """int16 [S]: noise whose loudness and colour change, so that no two windows are alike."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    loud = 0.05 + 0.25 * np.sin(2 * np.pi * 0.7 * time_s) ** 2
    tone = np.sin(2 * np.pi * (400 + 300 * time_s) * time_s)
    return np.rint(32767 * loud * (0.5 * tone + 0.2 * rng.standard_normal(len(time_s))).clip(-1, 1)).astype(np.int16)


def wav(path: Path, samples: np.ndarray, rate_hz: int = 16_000) -> Path:
    """Write int16 or float samples [S] or [S, channels]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate_hz, subtype="PCM_16" if samples.dtype == np.int16 else "FLOAT")
    return path


def write_broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Every kind of broken file: name -> (path, words of the sentence that must be said)."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = wav(folder / "whole.wav", noise(1)).read_bytes()
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    with_nan = noise(1).astype(np.float32) / 32768
    with_nan[700] = np.nan
    wav(folder / "nan.wav", with_nan)
    (folder / "zero_bytes.wav").write_bytes(b"")
    wav(folder / "no_samples.wav", np.zeros(0, np.int16))
    wav(folder / "too_short.wav", np.zeros(399, np.int16))
    (folder / "text.wav").write_text("this is no sound\n")
    (folder / "whole.wav").unlink()
    words = {
        "truncated": "truncated",
        "nan": "not finite",
        "zero_bytes": "empty",
        "no_samples": "no samples",
        "too_short": "400",
        "text": "libsndfile",
        "missing": "no such file",
    }
    return {name: (folder / f"{name}.wav", text) for name, text in words.items()}


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """One thread: on a busy machine, waiting for a second core costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
