"""The Triton kernels, run by Triton's interpreter in a process of its own, against the definition in fp64.

Shapes: as in asda/models/attention.py.
"""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import golden
import pytest
import torch
from launching import command, pretraining, start
from torch import Tensor

from asda.errors import UserError
from asda.models.attention import attend, by_definition, choose_path

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, HEADS = 2, 3

# fp32: sums of at most 128 products whose roundings, 2^-24 each, add up like a random walk to 7e-7; two or three
# products follow one another, and exp of a logit of size 4 adds 4 x 2^-24 at most.
FP32_REL_RMS = 3 * (128**0.5 + 4) * 2**-24
# bf16: every result passes through two roundings, of what is multiplied (weights or gradients of logits) and of itself.
# The interpreter cuts off instead of rounding, which makes all numbers smaller by up to 2^-7 and 2^-8 on average.
BF16_REL_RMS = 2 * 2**-8


@dataclass(frozen=True)
class Case:
    """What attention is computed of."""

    tokens: int
    features: int = 16
    maps: int = 2
    learned: bool = False
    padded: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self) -> dict:
        """The arguments of attend, laid out as the encoder's linear layers make them, and a cotangent."""
        torch.manual_seed(0)
        present_BN = torch.rand(SEQUENCES, self.tokens) < 0.7
        present_BN[:, 0] = True
        qk_BNC = torch.randn(SEQUENCES, self.tokens, 2 * self.maps * HEADS * self.features).to(self.dtype)
        v_BND, d_mixed_BND = torch.randn(2, SEQUENCES, self.tokens, HEADS * self.features).to(self.dtype)
        return {
            "qk_2BGNE": qk_BNC.unflatten(-1, (2, -1, self.features)).permute(2, 0, 3, 1, 4),
            "v_BHNE": v_BND.unflatten(-1, (HEADS, -1)).transpose(1, 2),
            "lam": torch.tensor(0.3) if self.learned else 0.3,
            "present_BN": present_BN if self.padded else None,
            "d_mixed_BHNE": d_mixed_BND.unflatten(-1, (HEADS, -1)).transpose(1, 2),
        }


CASES = [
    Case(103, 64),  # the students of ASDA-base
    Case(103, 64, learned=True, padded=True),
    Case(103, 64, maps=1),
    Case(103, 64, learned=True, padded=True, dtype=torch.bfloat16),
    Case(128, 128, learned=True),  # the largest tile
    Case(33, 24, padded=True),  # a width that is not a power of two, one query in the second step
    Case(7, 8, learned=True),  # smaller than the smallest product
    Case(1, 16, maps=1),
]


def exactly(case: dict) -> list[Tensor]:
    """What attend gives, then the gradients of qk, v and a learned lambda, in fp64 by the definition."""
    lam = case["lam"]
    inputs = [case[name].double().requires_grad_() for name in ("qk_2BGNE", "v_BHNE")]
    if isinstance(lam, Tensor):
        inputs.append(lam := lam.double().requires_grad_())
    mixed_BHNE = by_definition(*inputs[:2], lam, case["present_BN"])
    return [mixed_BHNE, *torch.autograd.grad(mixed_BHNE, inputs, case["d_mixed_BHNE"].double())]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor]]:
    """The kernels' results of all cases."""
    cases, results = (tmp_path_factory.mktemp("triton") / name for name in ("cases.pt", "results.pt"))
    torch.save([case.inputs() for case in CASES], cases)
    subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "triton_interpreter.py", cases, results],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return torch.load(results)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(asdict(CASES[number])))
def test_output_and_gradients_equal_the_definition_in_fp64(interpreted: list[list[Tensor]], number: int):
    bound = FP32_REL_RMS if CASES[number].dtype == torch.float32 else BF16_REL_RMS
    for result, exact in zip(interpreted[number], exactly(CASES[number].inputs()), strict=True):
        if CASES[number].tokens == 1 and not exact.any():  # one token: a map is 1 whatever its query and key are
            assert not result.any()
        else:
            assert golden.rel_rms(result, exact) < bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_output_and_gradients_equal_the_definition_in_fp64(case: Case):
    inputs = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.inputs().items()}
    wanted = [x.requires_grad_() for name, x in inputs.items() if name in ("qk_2BGNE", "v_BHNE")]
    if case.learned:
        wanted.append(inputs["lam"].requires_grad_())
    mixed_BHNE = attend(*(inputs[n] for n in ("qk_2BGNE", "v_BHNE", "lam", "present_BN")), path="triton")
    ours = [mixed_BHNE, *torch.autograd.grad(mixed_BHNE, wanted, inputs["d_mixed_BHNE"])]
    bound = FP32_REL_RMS if case.dtype == torch.float32 else BF16_REL_RMS
    for result, exact in zip(ours, exactly(case.inputs()), strict=True):
        assert golden.rel_rms(result.cpu(), exact) < bound or not exact.any()


def test_without_a_gpu_triton_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"engine\.attention triton needs a CUDA device.*use auto"):
        choose_path("triton", "cpu", tokens=103, features=64, needs_gradient=True)


@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it trains")
def test_training_by_triton_without_a_gpu_ends_with_a_sentence_and_no_run_folder(shards: Path, tmp_path: Path):
    done = start(command(0, "train.py", *pretraining(shards, tmp_path / "run", "engine.attention=triton")))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: engine.attention triton needs a CUDA device")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("tokens", "features", "path"), [(128, 64, "triton"), (129, 64, "sdpa"), (103, 192, "sdpa")])
def test_what_exceeds_the_tile_takes_torchs_attention(tokens: int, features: int, path: str):
    assert choose_path("triton", "cuda", tokens, features, needs_gradient=True) == path
