"""Differential attention against torch's own attention, its properties, and its paths against its definition.

Shapes: as in asda/models/attention.py.
"""

from itertools import product

import golden
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asda.config.model import ModelConfig
from asda.models.attention import (
    Attention,
    AttentionPath,
    LearnedLambda,
    attend,
    attention_map,
    by_definition,
    choose_path,
    describe_paths,
    differential_attention,
    set_attention_path,
)

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

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


SHORT, LONG = 21, 133  # tokens
MAPS = [(1, False), (2, False), (2, True)]  # how many, and whether lambda is learned
CASES = [
    (path, tokens, maps, padded, learned)
    for path, tokens, (maps, learned), padded in product(["explicit", "sdpa"], [SHORT, LONG], MAPS, [False, True])
]
FP64_ATOL = 1e-12  # of numbers of size 1: at most 133 products of rounding 2^-53, and exp of them: far below


def attended(
    path: AttentionPath | None,
    tokens: int,
    maps: int,
    padded: bool,
    learned: bool,
    dtype: torch.dtype,
    lam_value: float = 0.3,
) -> list[Tensor]:
    """What attention gives of inputs of `dtype`, then the gradients of qk, v and lambda; by the definition in fp64
    where the path is None.
    """
    torch.manual_seed(0)
    draws = torch.randn(B, tokens, 2 * maps * H * E), torch.randn(B, tokens, H * E), torch.randn(B, tokens, H * E)
    wide = dtype if path else torch.float64
    qk_BNC, v_BND, cotangent_BND = (x.to(dtype).to(wide) for x in draws)
    lam = torch.tensor(lam_value, dtype=torch.float64 if wide == torch.float64 else torch.float32)
    wanted = [x.requires_grad_() for x in ([qk_BNC, v_BND, lam] if learned else [qk_BNC, v_BND])]
    present_BN = torch.rand(B, tokens) < 0.7
    present_BN[:, 0] = True

    qk_2BGNE = qk_BNC.unflatten(-1, (2, -1, E)).permute(2, 0, 3, 1, 4)
    v_BHNE = v_BND.unflatten(-1, (H, E)).transpose(1, 2)
    arguments = qk_2BGNE, v_BHNE, lam if learned else lam_value, present_BN if padded else None
    mixed_BHNE = attend(*arguments, path=path) if path else by_definition(*arguments)
    mixed_BND = mixed_BHNE.transpose(1, 2).flatten(2)
    return [mixed_BND, *torch.autograd.grad(mixed_BND, wanted, cotangent_BND, allow_unused=maps == 1)]


@pytest.mark.parametrize(("path", "tokens", "maps", "padded", "learned"), CASES)
def test_every_path_is_the_definition_forward_and_backward(
    path: AttentionPath, tokens: int, maps: int, padded: bool, learned: bool
):
    ours = attended(path, tokens, maps, padded, learned, torch.float64)
    exact = attended(None, tokens, maps, padded, learned, torch.float64)
    # The gradient of lambda is a sum over all tokens, hence larger than 1; everything else is of size 1.
    torch.testing.assert_close(ours, exact, rtol=FP64_ATOL, atol=FP64_ATOL)


@pytest.mark.parametrize(("path", "tokens", "maps", "padded", "learned"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_rounds_no_more_than_its_steps_allow(
    dtype: torch.dtype, path: AttentionPath, tokens: int, maps: int, padded: bool, learned: bool
):
    # What is written between input and gradient: scaled query, logits, maps (their difference, one more), gradient of
    # the difference, of the logits, of the scaled query, the product: 8 roundings of at most eps / 2 each, whose rms
    # is eps / sqrt(12). Logits are of size 1, up to 4, and round in proportion, so that rounding counts twice: 10. In
    # fp32 sums round too: of up to 133 products at a random walk of sqrt(133) eps / sqrt(12), twice in a row.
    # Factor 2 for what the model leaves out.
    eps = torch.finfo(dtype).eps
    sums = 2 * LONG if dtype == torch.float32 else 0
    bound = 2 * ((10 + sums) / 12) ** 0.5 * eps
    mixed, *gradients = attended(path, tokens, maps, padded, learned, dtype)
    exact_mixed, *exact_gradients = attended(None, tokens, maps, padded, learned, dtype)
    if learned:
        # The sum, over every output and its cotangent, of terms that have the outputs' size and errors: it may cancel,
        # so its error is measured by the root of the sum of the terms' squares.
        assert abs(gradients.pop() - exact_gradients.pop()) < bound * exact_mixed.norm()
    for result, exact in zip([mixed, *gradients], [exact_mixed, *exact_gradients], strict=True):
        assert golden.rel_rms(result, exact) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lambda_zero_leaves_the_second_map_without_gradient_in_every_dtype(dtype: torch.dtype):
    _, dqk_BNC, _ = attended("explicit", SHORT, 2, False, False, dtype, lam_value=0.0)
    of_first, of_second = dqk_BNC.unflatten(-1, (2, 2, -1)).unbind(-2)
    assert of_first.any()
    assert not of_second.any()  # nor NaN


@pytest.mark.parametrize("path", ["explicit", "sdpa"])
def test_autocast_leaves_attention_in_the_dtype_of_its_inputs(path: AttentionPath):
    arguments = [torch.randn(2, B, 2 * H, N, E).bfloat16(), torch.randn(B, H, N, E).bfloat16(), 0.1]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*arguments, path=path).dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["explicit", "sdpa"])
def test_a_module_with_a_learned_lambda_trains_alike_by_every_path(path: AttentionPath):
    settings = {"attention_lambda": "learned", "attention_norm": "per_head", "attention_scale": "by_depth"}
    tokens_BND, cotangent_BND = torch.randn(2, B, N, golden.TINY.width, dtype=torch.float64)
    torch.manual_seed(0)
    attention = Attention(golden.TINY.model_copy(update=settings), block=1).double()
    assert isinstance(attention.lam, LearnedLambda)
    set_attention_path(attention, path)
    outputs = attention(tokens_BND), forward_by_definition(attention, tokens_BND)
    gradients = [torch.autograd.grad(output, [*attention.parameters()], cotangent_BND) for output in outputs]
    # The learned lambda itself is an fp32 number, so 2^-24 of it differs between two ways to sum its gradient.
    torch.testing.assert_close(*gradients, rtol=2**-22, atol=2**-22)


def forward_by_definition(attention: Attention, tokens_BND: Tensor) -> Tensor:
    (q1, q2, k1, k2), v = attention.qk(tokens_BND).chunk(4, dim=-1), attention.v(tokens_BND)
    by_head = [x.unflatten(-1, (golden.TINY.heads, -1)).transpose(1, 2) for x in (q1, k1, q2, k2, v)]
    mixed_BND = differential_attention(*by_head, lam=attention.current_lambda()).transpose(1, 2).flatten(2)
    return attention.proj(attention.norm(mixed_BND) * attention.scale)


@pytest.mark.parametrize(
    ("device_type", "tokens", "needs_gradient", "path"),
    [
        ("cpu", 103, True, "explicit"),
        ("cpu", 103, False, "sdpa"),
        ("cpu", 128, True, "explicit"),
        ("cpu", 513, True, "sdpa"),
        ("cpu", 513, False, "sdpa"),
        ("cuda", 103, True, "sdpa"),
        ("cuda", 513, False, "sdpa"),
    ],
)
def test_auto_follows_device_length_and_training(device_type: str, tokens: int, needs_gradient: bool, path: str):
    assert choose_path("auto", device_type, tokens, 64, needs_gradient) == path


def test_the_log_says_which_path_is_taken_for_what():
    assert describe_paths("auto", "cpu", 64, {"students": (103, True), "the teacher": (513, False)}) == (
        "auto: explicit for students of 103 tokens, sdpa for the teacher of 513 tokens"
    )
    assert describe_paths("sdpa", "cpu", 64, {"clips": (513, True)}) == "sdpa: sdpa for clips of 513 tokens"
