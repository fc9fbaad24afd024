"""Parameters and arithmetic of the networks: published counts, a closed form, torch's own counter and timer."""

from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from asda.config.run import Config, EngineConfig, load_config
from asda.models.costs import Network, gemm_rate, in_flop, network_costs, rank_memory

AS2M = Path(__file__).parents[2] / "configs" / "as2m.json"


def costs_of(config: Config) -> Network:
    return network_costs(config.model, config.objective, config.data.frames, classes=10)


def test_the_as2m_config_builds_exactly_the_published_model():
    parameters = costs_of(load_config(AS2M)).parameters
    assert parameters["encoder"] == 92_364_288
    assert sum(parameters.values()) == 94_950_144


def test_the_eat_preset_has_the_published_number_of_parameters():
    assert sum(costs_of(load_config(AS2M, ["preset=eat"])).parameters.values()) == 87_840_000


def test_a_clip_of_asda_costs_1_17_tflop():
    assert sum(costs_of(load_config(AS2M)).flops.values()) / 1e12 == pytest.approx(1.17, abs=0.01)  # published


def linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def test_the_count_is_the_closed_form_of_the_architecture():
    flops = costs_of(load_config(AS2M)).flops
    width, blocks, students, visible, patches = 768, 12, 16, 102, 512

    def block(tokens: int) -> int:
        maps = 2 * linear(tokens, width, tokens)  # two products of queries and keys, all heads together
        mixed = linear(tokens, tokens, width)
        layers = linear(tokens, width, 4 * width) + 2 * linear(tokens, width, width)  # q1 q2 k1 k2; v and projection
        return maps + mixed + layers + 2 * linear(tokens, width, int(3.5 * width))

    # A backward costs two forwards; the patch embedding has no gradient of its input.
    encoder = 3 * blocks * block(visible + 1) + 2 * linear(visible, 256, width)
    conv = linear(patches, 9 * width // 16, width)  # 3 x 3, 16 groups
    assert flops["students"] == students * encoder
    assert flops["decoder"] == students * 3 * (6 * conv + linear(patches, width, width))
    assert flops["teacher"] == blocks * block(patches + 1) + linear(patches, 256, width)


def test_torchs_own_counter_counts_a_grouped_weight_gradient_once_for_every_group():
    # The reason for a formula of ours; when this fails, torch has mended it and ours can go.
    conv = torch.nn.Conv2d(32, 32, 3, padding=1, groups=16, device="meta")
    with FlopCounterMode(display=False) as counter:
        conv(torch.empty(1, 32, 8, 8, device="meta")).sum().backward()
    product = 2 * 8 * 8 * 9 * 2 * 32
    assert counter.get_total_flops() == (1 + 16) * product


def test_a_classifier_costs_three_forwards_of_its_encoder_and_head():
    config = load_config(AS2M.parent / "demo_finetune.json")
    tokens, width = 16 * 8 + 1, 128
    block = 2 * linear(tokens, width, tokens) + linear(tokens, tokens, width) + linear(tokens, width, 6 * width)
    block += 2 * linear(tokens, width, int(3.5 * width))
    expected = 3 * 4 * block + 2 * linear(tokens - 1, 256, width) + 3 * linear(1, width, 10)
    assert sum(costs_of(config).flops.values()) == expected


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 FLOP"), (999, "999 FLOP"), (1_175_256_127_488, "1.175 TFLOP"), (4.5e22, "45 ZFLOP")]
)
def test_counts_are_written_with_the_prefix_that_suits_them(count: float, words: str):
    assert in_flop(count) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_for_a_product_of_matrices_is_the_one_that_torchs_own_timer_sees(dtype: torch.dtype):
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    timed_s = Timer("a @ b.T", globals={"a": a, "b": b}, num_threads=torch.get_num_threads()).timeit(3).median
    # Other programs may take half of the cores and more from either; a slip of a power of ten, or of 2 FLOP, shows
    # in the count, which is exact: a rate is 2 n^3 over a time.
    assert 0.2 < gemm_rate(torch.device("cpu"), dtype) * timed_s / (2 * 1024**3) < 5


def test_measuring_the_rate_leaves_the_generator_of_the_run_alone():
    state = torch.get_rng_state()
    gemm_rate(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("stage", "published_gb"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_memory_of_a_rank_is_that_of_the_zero_paper_but_for_gradients_in_fp32(stage: int, published_gb: float):
    # Figure 1: 7.5 billion parameters, 64 ranks, gradients in 2 bytes; ours add up in 4 where ZeRO partitions.
    memory = rank_memory(7_500_000_000, 0, EngineConfig(zero_stage=stage), 64)
    memory["gradients"] //= 2 if stage else 1
    assert sum(memory.values()) / 1e9 == pytest.approx(published_gb, abs=0.05)


def test_a_teacher_costs_its_own_weights_and_each_ranks_share_of_the_averages():
    memory = rank_memory(100, 80, EngineConfig(precision="fp16"), 3)
    assert (memory["averages"], memory["teacher"]) == (107, 160)
    alone = rank_memory(100, 80, EngineConfig(precision="fp32", zero_stage=0), 1)
    assert alone == {"weights": 400, "gradients": 400, "master and moments": 800, "averages": 0, "teacher": 320}


def test_an_offloaded_optimizer_is_not_on_the_device():
    assert rank_memory(100, 0, EngineConfig(zero_stage=2, offload_optimizer=True), 2)["master and moments"] == 0
