"""Parameters and arithmetic of the networks: published counts, a closed form, torch's own counter."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from asda.config import Config, load_config
from asda.costs import Network, in_flop, network_costs

AS2M = Path(__file__).parent.parent / "configs" / "as2m.json"


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
