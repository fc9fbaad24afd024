"""Differential attention against torch's own attention, and its properties."""

import golden
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asda.config import ModelConfig
from asda.models.attention import Attention, attention_map, differential_attention

B, H, N, E = 3, 4, 7, 24


def random_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, N, E, dtype=dtype, requires_grad=True) for _ in range(5)]


def module_of(attention_lambda: float = 0.1) -> Attention:
    torch.manual_seed(0)
    return Attention(golden.TINY.model_copy(update={"attention_lambda": attention_lambda}), block=0).double()


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.3, 1.0])
def test_output_and_gradients_equal_the_difference_of_two_sdpa_calls(lam: float):
    q1, k1, q2, k2, v = inputs = random_inputs()
    ours = differential_attention(q1, k1, q2, k2, v, lam)
    oracle = scaled_dot_product_attention(q1, k1, v) - lam * scaled_dot_product_attention(q2, k2, v)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype)
    torch.testing.assert_close(ours, oracle)
    gradients, expected = (torch.autograd.grad(output, inputs, cotangent) for output in (ours, oracle))
    torch.testing.assert_close(gradients, expected)


def test_lambda_zero_is_ordinary_attention():
    q1, k1, q2, k2, v = random_inputs()
    torch.testing.assert_close(differential_attention(q1, k1, q2, k2, v, 0.0), scaled_dot_product_attention(q1, k1, v))


def test_equal_maps_and_lambda_one_cancel():
    q, k, _, _, v = random_inputs()
    assert not differential_attention(q, k, q, k, v, 1.0).any()


def test_bf16_attention_is_as_near_to_the_exact_one_as_its_roundings_allow():
    exact_inputs = [x.bfloat16() for x in random_inputs()]
    rounded = differential_attention(*exact_inputs, lam=0.1)  # type: ignore[misc]
    exact = differential_attention(*(x.double() for x in exact_inputs), lam=0.1)  # type: ignore[misc]
    assert rounded.dtype == torch.bfloat16
    # Six roundings (scaled query, logits, map, lambda x map, difference, output) of rms 2^-9 / sqrt(3) at most; those
    # of query and logits are relative to logits of size 1, so they reach the map in full. Factor 2 for the worst case.
    assert golden.rel_rms(rounded, exact) < 2 * 6**0.5 * 2**-9 / 3**0.5


def test_rows_of_both_maps_sum_to_one():
    attention, tokens_BND = module_of(), torch.randn(B, N, golden.TINY.width, dtype=torch.float64)
    for map_BHNN in attention.maps(tokens_BND):
        assert map_BHNN.shape == (B, golden.TINY.heads, N, N)
        torch.testing.assert_close(map_BHNN.sum(-1), torch.ones(B, golden.TINY.heads, N, dtype=torch.float64))


def test_the_maps_are_those_that_the_forward_uses():
    attention, tokens_BND = module_of(), torch.randn(B, N, golden.TINY.width, dtype=torch.float64)
    mixed = []
    attention.norm.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    attention(tokens_BND)
    first, second = attention.maps(tokens_BND)
    v_BHNE = attention.v(tokens_BND).unflatten(-1, (golden.TINY.heads, -1)).transpose(1, 2)
    torch.testing.assert_close(mixed[0], ((first - 0.1 * second) @ v_BHNE).transpose(1, 2).flatten(2))


def test_a_key_bias_changes_nothing():
    attention, tokens_BND = module_of(), torch.randn(B, N, golden.TINY.width, dtype=torch.float64)
    before = attention(tokens_BND)
    attention.qk.bias.data[2 * golden.TINY.width :] += 3.0  # rows are q1, q2, k1, k2
    torch.testing.assert_close(attention(tokens_BND), before)


def test_lambda_zero_leaves_the_second_maps_weights_without_gradient():
    attention = module_of(attention_lambda=0.0)
    attention(torch.randn(B, N, golden.TINY.width, dtype=torch.float64)).square().sum().backward()
    assert attention.qk.weight.grad is not None
    q1, q2, k1, k2 = attention.qk.weight.grad.chunk(4)
    assert q1.any()
    assert k1.any()
    assert not q2.any()
    assert not k2.any()


def test_permuted_tokens_give_permuted_outputs():
    attention, tokens_BND = module_of(), torch.randn(B, N, golden.TINY.width, dtype=torch.float64)
    order = torch.randperm(N)
    torch.testing.assert_close(attention(tokens_BND[:, order]), attention(tokens_BND)[:, order])


def test_the_norm_over_the_heads_has_epsilon_1e_5():
    # A wrong epsilon changes logits by 6e-6, too near the rounding noise for the golden numbers to show it.
    assert Attention(ModelConfig(width=8, heads=2), block=0).norm.eps == 1e-5


def test_large_logits_do_not_overflow():
    q = torch.full((1, 1, 2, 4), 1e4, dtype=torch.bfloat16)
    assert attention_map(q, q).isfinite().all()
