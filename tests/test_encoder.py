"""The encoder against the official one, block by block."""

from pathlib import Path

import golden
import pytest
import torch
from torch import Tensor

from asda.config import ModelConfig
from asda.models.encoder import DropPath, Encoder, sincos_positions


@pytest.fixture(scope="module")
def official(shared: Path) -> dict[str, Tensor]:
    return golden.load(shared, "asda_pretrain")


@pytest.fixture(scope="module")
def state(shared: Path) -> dict[str, Tensor]:
    return golden.checkpoint(shared, "asda_pretrain")


def load_encoder(parameters: dict[str, Tensor]) -> Encoder:
    encoder = Encoder(golden.TINY)
    encoder.load_state_dict(golden.encoder_parameters(parameters))
    return encoder.eval()


def record(encoder: Encoder) -> dict[str, Tensor]:
    """Everything that the golden file records of an encoder's forward, filled while it runs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args, output: seen.__setitem__(name, output)

    encoder.patch_embed.register_forward_hook(keep("patch_embed"))
    encoder.norm.register_forward_pre_hook(lambda module, args: seen.__setitem__("tokens_prenorm", args[0]))
    encoder.norm.register_forward_hook(keep("tokens"))
    for i, block in enumerate(encoder.blocks):
        block.attn.norm.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args, i=i: seen.__setitem__(f"block{i}.attn_heads", args[0])
        )
        block.attn.register_forward_hook(keep(f"block{i}.attn"))  # type: ignore[union-attr]
        block.mlp.register_forward_hook(keep(f"block{i}.ffn"))  # type: ignore[union-attr]
        block.norm2.register_forward_hook(keep(f"block{i}.out"))  # type: ignore[union-attr]
    return seen


def assert_all_match(seen: dict[str, Tensor], official: dict[str, Tensor], prefix: str) -> None:
    wanted = {name for name in official if name.startswith(prefix)}
    assert wanted == {prefix + name for name in seen}
    errors = {name: golden.rel_rms(tensor, official[prefix + name]) for name, tensor in seen.items()}
    assert max(errors.values()) < golden.REL_RMS, errors


def test_the_position_table_is_the_official_one(state: dict[str, Tensor]):
    official_ND = state["modality_encoders.IMAGE.fixed_positional_encoder.positions"][0]
    ours_ND = sincos_positions(golden.TINY.max_time_patches, 8, golden.TINY.width)
    # The official table has its phases in fp32: the frequency and its product with the row are each rounded by up to
    # 2^-24, so the phase, and with it the sine, is off by up to row x 2^-23; ours is computed in fp64. The sine and
    # the cosine themselves add two roundings of 2^-24 at most.
    row_N1 = torch.arange(len(ours_ND))[:, None] // 8
    assert ((ours_ND - official_ND).abs() <= row_N1.clamp(min=7) * 2**-23 + 2**-23).all()


def test_every_activation_of_the_teacher_is_the_official_one(official: dict[str, Tensor], state: dict[str, Tensor]):
    encoder = load_encoder(state["_ema"])  # type: ignore[arg-type]
    seen = record(encoder)
    encoder(golden.patchify(official["input.source"]))
    assert_all_match(seen, official, "fwd.teacher.")


def test_every_activation_of_the_students_is_the_official_one(official: dict[str, Tensor], state: dict[str, Tensor]):
    encoder = load_encoder(state)
    seen = record(encoder)
    where_SK = official["fwd.mask.ids_keep"]
    patches_SNP = golden.patchify(official["input.source"]).repeat_interleave(4, dim=0)
    encoder(patches_SNP.gather(1, where_SK[..., None].expand(-1, -1, patches_SNP.shape[-1])), where_SK)
    del seen["patch_embed"]  # ours embeds the visible patches alone
    expected = {name: t for name, t in official.items() if name != "fwd.student.patch_embed"}
    assert_all_match(seen, expected, "fwd.student.")


def test_tokens_do_not_depend_on_the_order_in_which_patches_are_listed():
    torch.manual_seed(0)
    encoder = Encoder(golden.TINY).double().eval()
    patches_BNP = torch.randn(2, 24, 256, dtype=torch.float64)
    order_N = torch.randperm(24)
    shuffled = encoder(patches_BNP[:, order_N], order_N.expand(2, -1))
    in_order = encoder(patches_BNP)
    torch.testing.assert_close(shuffled[:, 1:], in_order[:, 1:][:, order_N])
    torch.testing.assert_close(shuffled[:, 0], in_order[:, 0])


def test_ffn_outputs_are_what_the_mlps_give(official: dict[str, Tensor], state: dict[str, Tensor]):
    encoder = load_encoder(state["_ema"])  # type: ignore[arg-type]
    for i, ffn_BND in enumerate(encoder.ffn_outputs(golden.patchify(official["input.source"]))):
        assert golden.rel_rms(ffn_BND, official[f"fwd.teacher.block{i}.ffn"]) < golden.REL_RMS


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
