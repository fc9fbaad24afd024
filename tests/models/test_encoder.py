"""Properties of the encoder, and its learned lambda against the paper; test_golden.py has the official activations."""

import math

import golden
import pytest
import torch
from torch import Tensor

from asda.config.model import ModelConfig
from asda.models.attention import Attention, initial_lambda, set_attention_path
from asda.models.encoder import DropPath, Encoder

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def test_tokens_do_not_depend_on_the_order_in_which_patches_are_listed():
    torch.manual_seed(0)
    encoder = Encoder(golden.TINY).double().eval()
    patches_BNP = torch.randn(2, 24, 256, dtype=torch.float64)
    order_N = torch.randperm(24)
    shuffled = encoder(patches_BNP[:, order_N], order_N.expand(2, -1))
    in_order = encoder(patches_BNP)
    torch.testing.assert_close(shuffled[:, 1:], in_order[:, 1:][:, order_N])
    torch.testing.assert_close(shuffled[:, 0], in_order[:, 0])


def test_the_place_of_the_cls_token_makes_no_difference():
    # It has no position, and attention, norms and MLPs do not see the order of tokens.
    torch.manual_seed(0)
    encoder = Encoder(golden.TINY).eval()
    head_BND = encoder.embed(torch.randn(2, 64, 256))
    middle_N = torch.cat([torch.arange(1, 33), torch.tensor([0]), torch.arange(33, 65)])
    middle_BND = head_BND[:, middle_N]
    for block in encoder.blocks:
        head_BND, middle_BND = block(head_BND)[0], block(middle_BND)[0]
    torch.testing.assert_close(middle_BND, head_BND[:, middle_N])


def test_steps_are_what_blocks_take_and_mlps_give():
    torch.manual_seed(0)
    encoder, taken, given = Encoder(golden.TINY).eval(), [], []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        block.mlp.register_forward_hook(lambda module, args, output: given.append(output))  # type: ignore[union-attr]
    steps = list(encoder.steps(torch.randn(2, 64, 256)))
    assert len(steps) == golden.TINY.depth
    seen = zip(steps, taken, given, strict=True)
    assert all(tokens is before and ffn is output for (tokens, ffn), before, output in seen)


def test_the_base_encoder_has_92_364_288_parameters_and_no_buffer_in_its_checkpoint():
    encoder = Encoder(ModelConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 92_364_288
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


def test_weights_are_drawn_as_in_the_recipe():
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(depth=1))
    # The relative error of a standard deviation from n draws is 1 / sqrt(2 n): 5 sigma for the smallest, n = 589,824.
    for layer in (encoder.blocks[0].attn.qk, encoder.blocks[0].attn.v, encoder.blocks[0].mlp.fc1):  # type: ignore[union-attr]
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=5 / (2 * 589_824) ** 0.5)  # type: ignore[union-attr]
    bound = (6 / (256 + 768)) ** 0.5  # Xavier
    assert 0.999 * bound < float(encoder.patch_embed.weight.detach().abs().max()) <= bound
    assert float(encoder.cls_token.detach().std()) == pytest.approx(1, rel=5 / (2 * 768) ** 0.5)
    assert not any(p.any() for name, p in encoder.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in encoder.named_parameters() if "norm" in name and name.endswith("weight"))


def test_a_bf16_encoder_takes_fp32_patches_and_stays_near_fp32():
    torch.manual_seed(0)
    encoder = Encoder(golden.TINY).eval()
    patches_BNP = torch.randn(2, 64, 256)
    exact = encoder(patches_BNP)
    for parameter in encoder.parameters():  # as DeepSpeed does: the position table stays in fp32
        parameter.data = parameter.data.bfloat16()
    rounded = encoder(patches_BNP)
    assert rounded.dtype == torch.bfloat16
    # 3 blocks of 14 roundings (10 activations, 4 matrices) and 6 before them, each of relative rms 2^-9 / sqrt(3); the
    # norms keep the scale. Factor 2: the residual stream is rounded too.
    assert golden.rel_rms(rounded, exact) < 2 * (3 * 14 + 6) ** 0.5 * 2**-9 / 3**0.5


def test_drop_path_keeps_the_mean_and_drops_whole_sequences():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(40_000, 2, 3))
    per_sequence = dropped[:, 0, 0]
    assert torch.equal(dropped, per_sequence[:, None, None].expand_as(dropped))
    assert per_sequence.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    # A sequence has variance 0.25 / 0.75; five standard errors of the mean of 40,000.
    assert float(per_sequence.mean()) == pytest.approx(1, abs=5 * (0.25 / 0.75 / 40_000) ** 0.5)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(5, 2, 3)), torch.ones(5, 2, 3))


# The learned lambda against the paper (Ye et al., "Differential Transformer", 2024), equations 1 to 3 ---------------


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x * y for x, y in zip(a, b, strict=True)]).sum()


def paper_lambda(vectors: list[Tensor], initial: float) -> Tensor:
    """Equation 2: exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init."""
    q1, k1, q2, k2 = vectors
    return torch.exp(dot(q1, k1)) - torch.exp(dot(q2, k2)) + initial


def paper_softmax(logits_NN: Tensor) -> Tensor:
    exponentials = torch.exp(logits_NN - logits_NN.max())
    return exponentials / exponentials.sum(1)[:, None]


def paper_attention(tokens_ND: Tensor, weights: dict[str, Tensor], heads: int, initial: float) -> Tensor:
    """Equations 1 and 3, head by head: (1 - lambda_init) RMSNorm of each head's difference, then the projection."""
    num_features = tokens_ND.shape[1] // heads
    q_NC, k_NC = (tokens_ND @ weights["qk.weight"].T + weights["qk.bias"]).chunk(2, dim=1)
    v_ND = tokens_ND @ weights["v.weight"].T + weights["v.bias"]
    lam = paper_lambda([weights[f"lam.{name}"] for name in ("q1", "k1", "q2", "k2")], initial)
    outputs = []
    for head in range(heads):
        maps = []
        for part in (head, heads + head):  # the first maps of all heads, then the second ones
            of_head = slice(part * num_features, (part + 1) * num_features)
            maps.append(paper_softmax(q_NC[:, of_head] @ k_NC[:, of_head].T / num_features**0.5))
        mixed_NE = (maps[0] - lam * maps[1]) @ v_ND[:, head * num_features : (head + 1) * num_features]
        root_N1 = ((mixed_NE * mixed_NE).sum(1)[:, None] / num_features + 1e-5) ** 0.5
        outputs.append((1 - initial) * (mixed_NE / root_N1 * weights["norm.norm.weight"]))
    return torch.cat(outputs, dim=1) @ weights["proj.weight"].T + weights["proj.bias"]


@pytest.mark.parametrize("path", ["explicit", "sdpa", "auto"])
@pytest.mark.parametrize("block", [0, 1, 11])
def test_attention_with_a_learned_lambda_is_the_papers_forward_and_backward(block: int, path: str):
    torch.manual_seed(0)
    config = ModelConfig(
        width=12, heads=3, attention_lambda="learned", attention_norm="per_head", attention_scale="by_depth"
    )
    attention = Attention(config, block).double()
    set_attention_path(attention, path)  # type: ignore[arg-type]
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens_BND = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 7, 12, dtype=torch.float64)
    names, inputs = zip(*attention.named_parameters(), strict=True)
    initial = 0.8 - 0.6 * math.exp(-0.3 * ((block + 1) - 1))  # the paper's layers count from 1
    expected = torch.stack([paper_attention(x, dict(zip(names, inputs, strict=True)), 3, initial) for x in tokens_BND])
    ours = attention(tokens_BND)
    # Ours computes lambda in fp32, with about eight roundings (four products, their sum, an exponential, a difference,
    # a sum) of numbers under e^1.5; the rest is fp64. The norm divides by what the maps' difference leaves: 10 times.
    tolerance = 10 * 8 * math.exp(1.5) * 2**-24
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
    gradients, wanted = (torch.autograd.grad(out, [tokens_BND, *inputs], cotangent) for out in (ours, expected))
    for name, gradient, theirs in zip(("tokens", *names), gradients, wanted, strict=True):
        error = float((gradient - theirs).abs().max())
        assert error <= tolerance * float(theirs.abs().max()), name


def test_the_initial_lambda_has_the_papers_values():
    # Section 2.1: 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l, the first being 1.
    for layer, value in ((1, 0.2), (2, 0.355509), (6, 0.666122), (12, 0.777870)):
        assert initial_lambda(layer - 1) == pytest.approx(value, abs=5e-7)
    assert initial_lambda(10_000) == pytest.approx(0.8)


def test_a_learned_lambda_begins_near_its_initial_value():
    # With vectors of 24 numbers N(0, 0.1), q . k has the deviation sqrt(24) x 0.01; a difference of two exponentials of
    # such numbers has sqrt(2) of it: five of those.
    torch.manual_seed(0)
    config = ModelConfig(width=96, heads=4, attention_lambda="learned")
    for block in range(12):
        lam = torch.as_tensor(Attention(config, block).current_lambda())
        assert lam.item() == pytest.approx(initial_lambda(block), abs=5 * 2**0.5 * 24**0.5 * 0.01)
