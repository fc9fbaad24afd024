"""Training and evaluating give the numbers, the order of clips and the keys that were recorded in golden/.

Every test owns its commands, because a start of train.py takes seconds.

Tolerances, all relative. In fp32 two ways to compute the same differed by 2e-7 at most, over all figures and 20 steps:
the kernels of then and the definitions; AVX2 and plain SSE. 1e-5 leaves room for other processors, and any mistake in
a formula is larger.

In bf16 a rounding errs by at most u = 2^-9. An element goes through n of them, 14 a block (norms, projections, maps,
their difference, the product, GELU, residuals), 8 around the blocks: n = 2 x 14 + 8 = 36 here, which by chance comes to
sqrt(n) u = 6 u, and in the gradient, twice as far, to sqrt(2 n) u = 8.5 u. A squared error doubles it: 12 u. The mean
over N elements divides by sqrt(N); two programs that round by themselves differ by sqrt(2) more, and three standard
deviations are allowed:

    frame_loss      N = 8 clips x 2 students x 26 patches x 16 features = 6,656    3 sqrt(2) 12 u / 82   = 0.6 u
    utterance_loss  N = 8 clips x 2 students x 16 features = 256                   3 sqrt(2) 12 u / 16   = 3.2 u
    loss            their mean is less; of 32 logits of 0.5 at most, beside a loss of 1.4: no square
                                                                                   3 sqrt(2) 6 u 0.36 / 5.7 = 1.6 u

Over 20 steps the weights part too: an update, whose gradient errs by 8.5 u, moves the loss by that share of what it
moves it at all, which is at most 7 % of the loss from the first step to the last: 0.6 u more, in every figure. So
frame_loss may differ by 2 u, the other losses by 4 u. The norm of the gradient may err as one element, since the
elements of a row share an input that was rounded: 8.5 u, sqrt(2) of it for two programs, and 0.6 u: 16 u.

Measured: kernels and definitions in bf16 differ by 0.1 u in frame_loss, 0.25 u in utterance_loss, 0.15 u in loss and
1.9 u in grad_norm; bf16 and fp32 by 0.2 u, 2.5 u, 1.3 u and 3.1 u.
"""

import json
import os
from pathlib import Path

import frozen_runs as runs
import pytest

BF16_ROUNDING = 2**-9  # u
EXACT = 1e-12  # of what follows from the step alone: the last bits of a cosine
TOLERANCES = {
    "fp32": {"loss": 1e-5, "frame_loss": 1e-5, "utterance_loss": 1e-5, "grad_norm": 1e-4},
    "bf16": {
        "loss": 4 * BF16_ROUNDING,
        "frame_loss": 2 * BF16_ROUNDING,
        "utterance_loss": 4 * BF16_ROUNDING,
        "grad_norm": 16 * BF16_ROUNDING,
    },
}
ADDED = ["dataset_hashes"]  # to evaluation.json since it was recorded: which dataset was evaluated
SAME_LOGITS = 1e-5  # figures of an evaluation are ranks and counts of clips, of which none lies that near another

# Without AVX-512 torch multiplies bf16 matrices at 0.2 GFLOP/s, and a run first measures that rate, for minutes.
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
BF16_IS_SLOW = "avx512bw" not in CPU_FLAGS and "FROZEN_BF16" not in os.environ
NEEDS_BF16 = pytest.mark.skipif(
    BF16_IS_SLOW, reason="bf16 products take minutes without AVX-512; FROZEN_BF16=1 runs them all the same"
)
MINUTES = pytest.mark.timeout(1200)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=[NEEDS_BF16, MINUTES])])
def test_a_pretraining_of_20_steps_keeps_its_losses_its_order_and_its_keys(tmp_path: Path, precision: str) -> None:
    runs.copy_golden(tmp_path, "tones", "mixed")
    run = runs.train(name := f"pretrain_{precision}", tmp_path)
    check_figures(run, name)
    check_keys(run, name)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=[NEEDS_BF16, MINUTES])])
def test_a_finetuning_from_the_stored_pretraining_keeps_its_losses_its_order_and_its_keys(
    tmp_path: Path, precision: str
) -> None:
    runs.copy_golden(tmp_path, "tones", "pretrained")
    run = runs.train(name := f"finetune_{precision}", tmp_path)
    check_figures(run, name)
    check_keys(run, name)


def test_the_stored_pretraining_goes_on_from_step_10_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    runs.copy_golden(tmp_path, "tones", "pretrained")
    (tmp_path / "pretrained").rename(tmp_path / "moved")
    run = runs.train("pretrain_fp32", tmp_path, folder="moved")
    check_figures(run, "pretrain_fp32")
    assert checkpoints(run) == ["step-0000010", "step-0000020"]


def test_the_stored_ast_goes_on_from_step_3_and_keeps_its_losses_its_order_and_its_keys(tmp_path: Path) -> None:
    runs.copy_golden(tmp_path, "mixed", "ast")
    run = runs.train("ast", tmp_path)
    check_figures(run, "ast")
    check_keys(run, "ast")
    assert checkpoints(run) == ["step-0000003", "step-0000006"]


def test_two_ranks_draw_a_mixture_in_the_order_of_one_rank(tmp_path: Path) -> None:
    runs.copy_golden(tmp_path, "tones", "mixed")
    run = runs.train_on_two_ranks(tmp_path)
    drawn = runs.clips_of(run)
    assert drawn == runs.golden("clips")["pretrain_bf16"][: len(drawn)]
    check_keys(run, "two_ranks")


def test_evaluating_the_stored_finetuning_gives_the_recorded_figures(tmp_path: Path) -> None:
    runs.copy_golden(tmp_path, "tones", "finetuned")
    found, expected = runs.evaluate("finetuned", tmp_path), runs.golden("evaluation")
    assert [name for name in found if name not in ADDED] == list(expected)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=SAME_LOGITS) if isinstance(value, float) else value), name


def check_figures(run: Path, name: str) -> None:
    """Compare a run's figures and the clips of all its steps with the recorded ones."""
    assert runs.clips_of(run) == runs.golden("clips")[name]
    found, expected = runs.figures_of(run), runs.golden("figures")[name]
    assert set(found) == set(expected)
    tolerances = TOLERANCES["bf16" if name.endswith("bf16") else "fp32"]
    for figure, values in expected.items():
        assert found[figure] == pytest.approx(values, rel=tolerances.get(figure, EXACT)), figure


def check_keys(run: Path, name: str) -> None:
    """Refuse a frozen key that is gone from config.json without being retired; new keys may come."""
    retired = json.loads(runs.RETIRED.read_text())
    gone = set(runs.golden("keys")[name]) - set(runs.keys_of(run))
    assert sorted(gone - set(retired)) == []


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
