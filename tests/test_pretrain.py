"""Students, decoder, targets, losses and the teacher's update against the official ones."""

import math
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from asda.config import DecoderConfig, EmaConfig, ModelConfig, PretrainConfig
from asda.models.masks import inverse_block_masks, visible_indices
from asda.models.pretrain import Decoder, Losses, MaskedStudents, Teacher, ema_decay, ema_update, feature_spread

NUM_CLIPS, NUM_STUDENTS = 2, 4


@pytest.fixture(scope="module")
def official(shared: Path) -> dict[str, Tensor]:
    return golden.load(shared, "asda_pretrain")


@pytest.fixture
def students(shared: Path) -> MaskedStudents:
    students = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN)
    students.load_state_dict(golden.our_parameters(golden.checkpoint(shared, "asda_pretrain")))
    return students


@pytest.fixture
def teacher(shared: Path, students: MaskedStudents) -> Teacher:
    teacher = Teacher(students.encoder, golden.TINY_PRETRAIN.target_layers)
    teacher.encoder.load_state_dict(golden.encoder_parameters(golden.checkpoint(shared, "asda_pretrain")["_ema"]))
    return teacher


def visible_of(mask_SN: Tensor) -> Tensor:
    """The official masks, 1 = masked, as our indices [B, M, K]."""
    visible_SK = visible_indices(mask_SN.numpy() == 0)
    return torch.from_numpy(visible_SK).unflatten(0, (-1, NUM_STUDENTS))


def noise_of(official: dict[str, Tensor]) -> Tensor:
    """The official noise at the masked patches, [S, N, D]."""
    mask_SN = official["input.mask"].bool()
    noise_SND = torch.full((*mask_SN.shape, golden.TINY.width), math.nan)  # nothing else of it may be read
    noise_SND[mask_SN] = official["fwd.decoder.mask_noise_by_position"]
    return noise_SND


def golden_losses(students: MaskedStudents, official: dict[str, Tensor]) -> Losses:
    return students(
        golden.patchify(official["input.source"]),
        visible_of(official["input.mask"]),
        official["fwd.targets.y"],
        official["fwd.targets.cls"],
        noise_of(official),
    )


def test_targets_are_the_official_ones(teacher: Teacher, official: dict[str, Tensor]):
    tokens_BND, cls_BD, _ = teacher.targets(golden.patchify(official["input.source"]))
    assert golden.rel_rms(tokens_BND, official["fwd.targets.y"]) < golden.REL_RMS
    assert golden.rel_rms(cls_BD, official["fwd.targets.cls"]) < 2e-5  # its floor is 1.2e-5, see golden.py


def test_the_decoder_gives_what_the_official_one_gives(students: MaskedStudents, official: dict[str, Tensor]):
    seen = []
    for conv in students.decoder.convs:
        conv.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    grid_STFD = official["fwd.decoder.in"].unflatten(1, (8, 8))
    out_SND = students.decoder(grid_STFD).flatten(1, 2)
    assert golden.rel_rms(out_SND, official["fwd.decoder.out"]) < golden.REL_RMS
    residual = seen[0] + official["fwd.decoder.block0.conv_out"]
    assert golden.rel_rms(seen[1], residual) < golden.REL_RMS


def test_a_decoder_of_another_width_has_no_residual_around_its_first_layer():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(layers=1, width=8, groups=2), width=4)
    grid_STFD = torch.randn(2, 3, 5, 4)
    conv_SCTF = decoder.convs[0](grid_STFD.permute(0, 3, 1, 2))
    centred = conv_SCTF - conv_SCTF.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = decoder.proj(torch.nn.functional.gelu(normed).permute(0, 2, 3, 1))
    torch.testing.assert_close(decoder(grid_STFD), expected)


def test_the_loss_is_the_official_sum_per_masked_patch(
    students: MaskedStudents, official: dict[str, Tensor], shared: Path
):
    losses = golden_losses(students, official)
    expected = golden.numbers(shared, "asda_pretrain")["loss"]
    # The official criterion sums, and its trainer divides by the number of masked patches; its utterance term is a
    # sum over clips and students, ours a mean: the weight 0.5 x clips x students makes up for it.
    assert losses.total.item() == pytest.approx(expected["loss_per_sample_size"], rel=1e-6)
    assert losses.frame.item() == pytest.approx(expected["regression_per_sample_size"], rel=1e-6)
    weighted = golden.TINY_PRETRAIN.utterance_weight * losses.utterance.item()
    assert weighted == pytest.approx(expected["cls_per_sample_size"], rel=1e-6)
    assert losses.pred_var.item() == pytest.approx(expected["pred_var"], rel=1e-5)


def test_the_official_target_variance_is_the_spread_over_masked_patches(official: dict[str, Tensor], shared: Path):
    # Ours is over all patches: it then does not depend on the masks.
    spread = feature_spread(official["fwd.targets.y_masked"], torch.ones(len(official["fwd.targets.y_masked"])))
    assert float(spread) == pytest.approx(golden.numbers(shared, "asda_pretrain")["loss"]["target_var"], rel=1e-5)


def test_every_gradient_is_the_official_one(students: MaskedStudents, official: dict[str, Tensor], shared: Path):
    num_masked = golden.numbers(shared, "asda_pretrain")["loss"]["N_masked_sample_size"]
    (golden_losses(students, official).total * num_masked).backward()
    expected = golden.our_parameters(official, "grad.")
    ours = {name: p.grad for name, p in students.named_parameters() if p.grad is not None}
    assert set(ours) == set(expected) == {name for name, _ in students.named_parameters()}
    errors = {name: golden.rel_rms(ours[name], gradient) for name, gradient in expected.items()}
    assert max(errors.values()) < golden.REL_RMS, errors


def test_the_order_of_the_visible_patches_changes_nothing(students: MaskedStudents, official: dict[str, Tensor]):
    students = students.double()
    arguments = [golden.patchify(official["input.source"]), official["fwd.targets.y"], official["fwd.targets.cls"]]
    patches, targets, target_cls = (tensor.double() for tensor in arguments)
    visible_BMK = visible_of(official["input.mask"])
    noise = noise_of(official).double()
    ascending = students(patches, visible_BMK, targets, target_cls, noise)
    shuffled = students(patches, visible_BMK.flip(-1), targets, target_cls, noise)
    torch.testing.assert_close(torch.stack(ascending), torch.stack(shuffled))


def test_one_ema_step_is_the_official_one(
    students: MaskedStudents, teacher: Teacher, official: dict[str, Tensor], shared: Path
):
    decay = golden.numbers(shared, "asda_pretrain")["ema"]["decay_plain"]
    ema_update(teacher, students.encoder, decay)
    for name, tensor in golden.encoder_parameters(official, "ema_step.").items():
        assert golden.rel_rms(teacher.encoder.get_parameter(name), tensor) < golden.REL_RMS, name


def test_the_decay_is_the_official_function_of_the_number_of_updates(shared: Path):
    expected = golden.numbers(shared, "asda_pretrain")["ema"]["annealed_decay_by_num_updates"]
    ours = {updates: ema_decay(EmaConfig(), int(updates)) for updates in expected}
    assert ours == pytest.approx(expected, abs=1e-15)


def test_a_bf16_student_moves_an_fp32_teacher_by_exactly_its_share():
    torch.manual_seed(0)
    students = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN)
    teacher = Teacher(students.encoder, 3)
    before = [p.double() for p in teacher.encoder.parameters()]
    for p in students.parameters():
        torch.nn.init.normal_(p, std=0.02)
    decay = 0.9998
    ema_update(teacher, students.bfloat16().encoder, decay)
    for old, student, new in zip(before, students.encoder.parameters(), teacher.encoder.parameters(), strict=True):
        exact = decay * old + (1 - decay) * student.detach().double()
        # fp32 rounds the difference, its product with the share, and the sum: 3 roundings, the last one dominates.
        error = (new.double() - exact).abs()
        assert (error <= 2**-24 * (new.double().abs() + 4 * (new.double() - old).abs())).all()
        assert new.dtype == torch.float32


def test_eight_updates_follow_the_official_trajectory(students: MaskedStudents, teacher: Teacher, shared: Path):
    data, spec = golden.load(shared, "asda_trajectory"), golden.numbers(shared, "asda_trajectory")
    anneal, adam = spec["ema"], spec["adam"]
    ema = EmaConfig(decay=anneal["decay"], end_decay=anneal["end"], anneal_steps=anneal["anneal_end_step"])
    optimizer = torch.optim.AdamW(
        students.parameters(), betas=adam["betas"], eps=adam["eps"], weight_decay=adam["weight_decay"]
    )
    for step, update in enumerate(spec["updates"]):
        patches_BNP = golden.patchify(data[f"source.{step}"])
        visible_BMK = visible_of(data[f"mask.{step}"])
        targets = teacher.targets(patches_BNP)
        losses = students(patches_BNP, visible_BMK, targets.tokens, targets.cls, torch.zeros(8, 64, 96))
        optimizer.zero_grad()
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(students.parameters(), spec["clip_norm"])
        optimizer.param_groups[0]["lr"] = update["lr"]
        optimizer.step()
        decay = ema_decay(ema, step + 1)
        ema_update(teacher, students.encoder, decay)
        ours = [losses.total.item(), losses.frame.item(), losses.pred_var.item(), norm.item(), decay]
        names = ["loss", "loss_regression", "pred_var", "grad_norm", "ema_decay_after"]
        assert ours == pytest.approx([update[name] for name in names], rel=1e-5), step
    # Where a gradient is smaller than its rounding noise, 1e-5 of the gradients' rms, Adam's step is noise of the size
    # of the learning rate; about 1e-5 of all elements are that small, and sqrt(1e-5) of the summed rates is their rms.
    tolerance = 1e-5**0.5 * sum(update["lr"] for update in spec["updates"])
    for prefix, module in (("final.", students), ("final_ema.", teacher)):
        for name, expected in golden.our_parameters(data, prefix).items():
            error = module.get_parameter(name).detach() - expected
            assert float(golden.without_key_biases(name, error).square().mean().sqrt()) < tolerance, prefix + name


def test_students_and_decoder_of_the_base_model_have_94_950_144_trainable_parameters():
    students = MaskedStudents(ModelConfig(), PretrainConfig(kind="pretrain"))
    assert sum(p.numel() for p in students.parameters() if p.requires_grad) == 94_950_144


def test_no_teacher_parameter_is_trained_and_none_is_shared_with_the_students():
    students = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN)
    teacher = Teacher(students.encoder, 3)
    assert not any(p.requires_grad for p in teacher.parameters())
    students_memory = {p.data_ptr() for p in students.parameters()}
    assert not any(p.data_ptr() in students_memory for p in teacher.parameters())


def test_only_the_last_target_layers_make_the_targets():
    torch.manual_seed(0)
    teacher = Teacher(MaskedStudents(golden.TINY, golden.TINY_PRETRAIN).encoder, target_layers=1)
    patches_BNP = torch.randn(2, 64, 256)
    ffn_BND = teacher.encoder.ffn_outputs(patches_BNP)[-1][:, 1:].double()
    deviation_B1D = (ffn_BND.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed_BND = (ffn_BND - ffn_BND.mean(1, keepdim=True)) / deviation_B1D
    centred = normed_BND - normed_BND.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert golden.rel_rms(teacher.targets(patches_BNP).tokens, expected) < golden.REL_RMS


def test_bf16_students_give_fp32_losses_near_the_fp32_ones_and_bf16_gradients(
    students: MaskedStudents, official: dict[str, Tensor]
):
    exact = golden_losses(students, official)
    rounded = golden_losses(students.bfloat16(), official)
    rounded.total.backward()
    assert all(loss.dtype == torch.float32 for loss in rounded)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in students.parameters())
    # 3 blocks of 14 roundings (10 activations, 4 matrices) and 12 in embedding and decoder, each of rms 2^-9 / sqrt(3)
    # relative to the predictions; a square doubles the relative error.
    assert rounded.total.item() == pytest.approx(exact.total.item(), rel=2 * (3 * 14 + 12) ** 0.5 * 2**-9 / 3**0.5)


def test_the_teacher_gives_fp32_targets_under_bf16_autocast(teacher: Teacher, official: dict[str, Tensor]):
    patches_BNP = golden.patchify(official["input.source"])
    exact = teacher.targets(patches_BNP)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.targets(patches_BNP)
    assert all(tensor.dtype == torch.float32 for tensor in rounded)
    # Layer i carries 14 roundings a block, of rms 2^-9 / sqrt(3) relative to the whole output; the instance norm takes
    # the token mean away and so amplifies them by rms / deviation. The last norm divides by the rms of the mean.
    layers_LBND = torch.stack(teacher.encoder.ffn_outputs(patches_BNP))[:, :, 1:]
    normed_LBND = (layers_LBND - layers_LBND.mean(2, keepdim=True)) / layers_LBND.std(2, keepdim=True)
    amplified_L = (layers_LBND / layers_LBND.std(2, keepdim=True)).square().mean((1, 2, 3)).sqrt()
    per_layer_L = (14 * torch.arange(1, 4)).sqrt() * 2**-9 / 3**0.5 * amplified_L
    bound = float(per_layer_L.square().sum().sqrt() / 3 / normed_LBND.mean(0).square().mean().sqrt())
    assert golden.rel_rms(rounded.tokens, exact.tokens) < bound


def test_the_noise_has_the_configured_deviation_and_comes_from_torchs_generator():
    config = golden.TINY_PRETRAIN
    students = MaskedStudents(golden.TINY, config)
    grids: list[Tensor] = []
    students.decoder.register_forward_pre_hook(lambda module, args: grids.append(args[0].detach()))
    visible_SN = inverse_block_masks(np.random.default_rng(0), 8, (8, 8), config.mask)
    visible_BMK = torch.from_numpy(visible_indices(visible_SN)).unflatten(0, (2, 4))
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students(torch.zeros(2, 64, 256), visible_BMK, torch.zeros(2, 64, 96), torch.zeros(2, 96))
    noise = grids[0].flatten(1, 2)[torch.from_numpy(~visible_SN)]
    # n = 8 x 52 x 96 draws: the deviation has a relative standard error of 1 / sqrt(2 n).
    assert float(noise.std()) == pytest.approx(0.01, rel=5 / (2 * noise.numel()) ** 0.5)
    assert torch.equal(grids[0], grids[1])
    assert not torch.equal(grids[0], grids[2])


def test_feature_spread_counts_weighted_tokens_alone():
    torch.manual_seed(0)
    features_ND, weight_N = torch.randn(50, 7), (torch.arange(50) < 30).float()
    features_ND[30:] = 1e3
    expected = (features_ND[:30].var(dim=0) + 1e-6).sqrt().mean()
    torch.testing.assert_close(feature_spread(features_ND, weight_N), expected)
