"""asda describe: what a configuration or a folder of weights is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def describe(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asda", "describe", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_one_command_prints_the_published_counts_and_the_arithmetic_of_a_clip():
    printed = describe("configs/as2m.json").stdout
    assert "94,950,144 trainable: encoder 92,364,288, decoder 2,585,856" in printed
    assert "64 x 8 patches; 16 students of 103 tokens, a teacher of 513" in printed
    assert "1.175 TFLOP a clip and step" in printed


def test_overrides_are_described_with_what_departs_from_the_preset():
    figures = json.loads(describe("configs/as2m.json", "preset=eat", "model.mlp_ratio=3.5", "--json").stdout)
    assert figures["departures"] == ["model.mlp_ratio 3.5 (eat: 4.0)"]
    assert figures["parameters"]["trainable"] == 87_840_000 - 12 * (768 * 768 + 768 // 2)


def test_an_ast_and_what_ham_ast_adds_are_described_by_their_overlapping_patches():
    printed = describe("configs/esc50_ham.json", "--classes", "50").stdout
    assert "ordinary attention (AST), 6 Conformer blocks, channel attention" in printed
    assert "encoder 85,717,248, ham 85,299,504, head 39,986" in printed
    assert "32 x 8 patches, cut into 50 x 12 overlapping patches, 602 tokens" in printed


@pytest.mark.launch
def test_a_trained_classifier_is_described_with_its_classes(finetuned: Path):
    printed = describe(finetuned).stdout
    assert "lambda 0.1" in printed
    assert "head" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.json"], "there is no config file nowhere.json"),
        (["configs"], "there is no checkpoint in configs"),
        (["configs", "model.width=3"], "configs is a folder of weights, which 'model.width=3' cannot change"),
        (["configs/esc50_ham.json", "--classes", "-1"], "--classes -1 must be from 0 to 1099511627776"),
        (["configs/as2m.json", "model.widht=3"], "did you mean model.width?"),
    ],
)
def test_a_path_that_describes_nothing_is_one_sentence(arguments: list[str], sentence: str):
    result = describe(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
