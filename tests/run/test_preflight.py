"""What is said before the first step: numbers by hand, lines that a terminal holds."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from asda.config.data import LogMelStats
from asda.config.run import Config, load_config
from asda.engine.processes import Processes
from asda.models.costs import network_costs
from asda.run.preflight import WIDTH, derived_numbers, in_bytes, in_short, in_time

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = torch.device("cpu")
MIXTURE = 'data.train=[{"data": "a:train", "share": 0.7}, {"data": "b:train", "share": 0.3}]'


class Clips(Sequence):
    """Stands for a dataset, of which only the counts are asked."""

    def __init__(self, num_clips: int, num_shards: int, num_classes: int = 0):
        self.num_clips, self.shards, self.vocabulary = num_clips, range(num_shards), tuple(map(str, range(num_classes)))

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, clip: object) -> object:
        raise AssertionError("no clip is read")


def said(config: Config, dataset: Clips, world_size: int, micro_batch: int, rate: float, first_step: int = 0) -> str:
    """The table, its wrapped lines joined."""
    network = network_costs(config.model, config.objective, config.data.frames, len(dataset.vocabulary))
    lines = derived_numbers(config, dataset, Processes(0, world_size, CPU), micro_batch, network, rate, first_step)  # pyright: ignore[reportArgumentType]
    assert all(len(line) <= WIDTH for line in lines)
    return re.sub(r"\n +", " ", "\n".join(lines))


def test_the_published_recipe_is_summed_up() -> None:
    table = said(load_config(CONFIGS / "as2m.json"), Clips(1_912_134, 900), 4, 12, 600e12)
    # 1.175 TFLOP x 48 clips / 4 ranks = 14.1 TFLOP a step and rank: 29.4 ms at 480 TFLOP/s, 6.5 hours for 800,000.
    for words in (
        "preset      released, base\n",
        "data        1,912,134 clips in 900 shards, log-mel mean -4.268 std 4.569\n",
        "model       94,950,144 trainable parameters: encoder 92.36 M, decoder 2.586 M\n",
        "10.24 s = 1024 frames = 512 patches; teacher 513 tokens; 16 students x 103 tokens = 1,648, ",
        "masked by 5 blocks of 5 x 5\n",
        "arithmetic  1.175 TFLOP per clip: students",
        "step        48 clips = 4 ranks x 1 accumulation step x micro-batch 12, 56.41 TFLOP; bf16, ZeRO stage 1, cpu\n",
        # (2 + 4 + 12 / 4) x 94,950,144 + (4 / 4 + 2) x 92,364,288 bytes
        "memory      1.1 GiB per rank, plus activations: weights 181 MiB, gradients 362 MiB, ",
        "schedule    lr warm-up over 106,666 steps, then cosine, 5e-4 to 0 at step 800,000\n",
        "800,000 steps = 20.1 epochs in runs/as2m; first log line 100, checkpoint 5,000\n",
        "29 to 47 ms per step, 6.5 to 10 h for 800,000 steps, at 80 % to 50 % of a rank's 600 TFLOP/s",
    ):
        assert words in table


def test_a_recipe_of_ast_is_summed_up() -> None:
    table = said(load_config(CONFIGS / "esc50_ham.json"), Clips(1600, 20, num_classes=50), 1, 12, 100e12)
    for words in (
        "preset      ast, base\n",
        "encoder 85.72 M, ham 85.3 M, head 39.99 k\n",
        "5.12 s = 512 frames = 256 patches, overlapping: 50 x 12, 602 tokens\n",
        "sdpa for clips of 602 tokens",
        "schedule    lr 1e-5, times 0.85 at step 170 and every 34 steps after it\n",
    ):
        assert words in table


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("as2m_asda", [], "600,000 steps = 144.0 epochs of 200,000 draws in runs/"),
        ("as2m", [MIXTURE], "800,000 steps = 38,400,000 visits, 19.2 per clip on average, in runs/as2m;"),
        ("as2m", ["data.frames=128"], "16 students x 13 tokens = 208, masked by single patches\n"),
        ("as2m", ["optimizer.warmup_steps=0"], "lr cosine, 5e-4 to 0 at step 800,000\n"),
    ],
)
def test_epochs_are_those_of_the_order_and_masks_those_of_the_clip(name: str, overrides: list[str], words: str) -> None:
    config = load_config(CONFIGS / f"{name}.json", overrides)
    assert words in said(config, Clips(2_000_000, 900, 527), 4, 12, 600e12)


def test_a_run_that_goes_on_is_told_what_is_left_and_what_comes_next() -> None:
    overrides = ['probe={"train": "a:b", "test": "a:c"}', "run.eval_every=300", "run.save_every=250"]
    config = load_config(CONFIGS / "real_pretrain.json", overrides)
    stats = LogMelStats(mean=0.0, std=1.0)
    config = config.model_copy(update={"data": config.data.model_copy(update={"log_mel": stats})})
    table = said(config, Clips(640, 3), 2, 8, 3e11, first_step=250)
    assert "for 1,250 steps" in table
    assert "first log line 260, checkpoint 500, probe 300\n" in table
    assert "checkpoint 1,500, probe 1,500\n" in said(config, Clips(640, 3), 2, 8, 3e11, first_step=1480), "at the end"
    finished = said(config, Clips(640, 3), 2, 8, 3e11, first_step=1500)
    assert "Run complete (1500/1500 steps)" in finished
    assert "checkpoint" not in finished


def test_a_classifier_has_classes_and_neither_students_nor_a_teacher() -> None:
    config = load_config(CONFIGS / "real_finetune.json")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"log_mel": LogMelStats(mean=0.0, std=1.0)})}
    )
    table = said(config, Clips(160, 2, 10), 2, 4, 3e11)
    assert "160 clips in 2 shards, 10 classes" in table
    assert "256 patches, 257 tokens\n" in table
    assert "2 ranks x 2 accumulation steps x micro-batch 4" in table
    assert "teacher" not in table
    assert "averages" not in table


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ([0.0294, 0.047], "29 to 47 ms"),
        ([1.2], "1.2 s"),
        ([1.5, 2.4], "1.5 to 2.4 s"),
        ([100, 160], "1.7 to 2.7 min"),
        ([7200], "2 h"),
        ([20_000, 2 * 86_400], "0.23 to 2 d"),
        ([1e-5], "0.01 ms"),
    ],
)
def test_times_are_written_in_the_unit_that_suits_the_longest(seconds: list[float], words: str) -> None:
    assert in_time(*seconds) == words


def test_bytes_and_counts_are_written_with_the_unit_that_suits_them() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1536, 5 * 2**20)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5 MiB"]
    assert [in_short(n) for n in (7, 1500, 92_364_288, 2 * 10**9)] == ["7", "1.5 k", "92.36 M", "2 G"]
