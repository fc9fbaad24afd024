"""Properties of students, teacher and losses; test_golden.py has the official activations, gradients and updates."""

from collections.abc import Callable
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asda.config.model import DecoderConfig, ModelConfig, PretrainConfig
from asda.config.presets import PRESETS
from asda.engine.ema import ema_update
from asda.models.attention import set_attention_path
from asda.models.masks import inverse_block_masks, visible_indices
from asda.models.pretrain import Decoder, MaskedStudents, Teacher, feature_spread, masked_error

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.fixture(scope="module")
def case(shared: Path) -> golden.Pretraining:
    return golden.Pretraining.read(golden.Folder(shared / "golden"), "asda")


@pytest.fixture
def students(case: golden.Pretraining) -> MaskedStudents:
    return case.students()


@pytest.fixture
def teacher(case: golden.Pretraining, students: MaskedStudents) -> Teacher:
    return case.teacher(students)


def test_a_decoder_of_another_width_has_no_residual_around_its_first_layer():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(layers=1, width=8, groups=2), width=4)
    grid_STFD = torch.randn(2, 3, 5, 4)
    conv_SCTF = decoder.convs[0](grid_STFD.permute(0, 3, 1, 2))
    centred = conv_SCTF - conv_SCTF.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = decoder.proj(torch.nn.functional.gelu(normed).permute(0, 2, 3, 1))
    torch.testing.assert_close(decoder(grid_STFD), expected)


def test_the_order_of_the_visible_patches_changes_nothing(students: MaskedStudents, case: golden.Pretraining):
    students = students.double()
    arguments = [case.patches, case.official["fwd.targets.y"], case.official["fwd.targets.cls"]]
    patches, targets, target_cls = (tensor.double() for tensor in arguments)
    visible_BMK = case.visible_of(case.official["input.mask"])
    noise = case.noise.double()
    ascending = students(patches, visible_BMK, targets, target_cls, noise)
    shuffled = students(patches, visible_BMK.flip(-1), targets, target_cls, noise)
    torch.testing.assert_close(torch.stack(ascending), torch.stack(shuffled))


def test_a_bf16_student_moves_an_fp32_teacher_by_exactly_its_share():
    torch.manual_seed(0)
    students = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN)
    teacher = Teacher(students.encoder, 3)
    before = [p.double() for p in teacher.encoder.parameters()]
    for p in students.parameters():
        torch.nn.init.normal_(p, std=0.02)
    decay = 0.9998
    ema_update(teacher.encoder.parameters(), students.bfloat16().encoder.parameters(), decay)
    for old, student, new in zip(before, students.encoder.parameters(), teacher.encoder.parameters(), strict=True):
        exact = decay * old + (1 - decay) * student.detach().double()
        # fp32 rounds the difference, its product with the share, and the sum: 3 roundings, the last one dominates.
        error = (new.double() - exact).abs()
        assert (error <= 2**-24 * (new.double().abs() + 4 * (new.double() - old).abs())).all()
        assert new.dtype == torch.float32


@pytest.mark.parametrize(("preset", "count"), [("released", 94_950_144), ("paper", 94_950_144), ("eat", 87_840_000)])
def test_students_and_decoder_of_the_base_model_have_the_published_number_of_trainable_parameters(
    preset: str, count: int
):
    with torch.device("meta"):
        students = MaskedStudents(ModelConfig(**PRESETS[preset]["model"]), PretrainConfig(kind="pretrain"))
    assert sum(p.numel() for p in students.parameters() if p.requires_grad) == count


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
    ffn_BND = [*teacher.encoder.steps(patches_BNP)][-1][1][:, 1:].double()
    deviation_B1D = (ffn_BND.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed_BND = (ffn_BND - ffn_BND.mean(1, keepdim=True)) / deviation_B1D
    centred = normed_BND - normed_BND.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert golden.rel_rms(teacher.targets(patches_BNP).tokens, expected) < golden.REL_RMS


def test_bf16_students_give_fp32_losses_near_the_fp32_ones_and_bf16_gradients(
    students: MaskedStudents, case: golden.Pretraining
):
    exact = case.losses(students)
    rounded = case.losses(students.bfloat16())
    rounded.total.backward()
    assert all(loss.dtype == torch.float32 for loss in rounded)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in students.parameters())
    # 3 blocks of 14 roundings (10 activations, 4 matrices) and 12 in embedding and decoder, each of rms 2^-9 / sqrt(3)
    # relative to the predictions; a square doubles the relative error.
    assert rounded.total.item() == pytest.approx(exact.total.item(), rel=2 * (3 * 14 + 12) ** 0.5 * 2**-9 / 3**0.5)


def test_the_teacher_gives_fp32_targets_under_bf16_autocast(teacher: Teacher, case: golden.Pretraining):
    patches_BNP = case.patches
    exact = teacher.targets(patches_BNP)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.targets(patches_BNP)
    assert all(tensor.dtype == torch.float32 for tensor in rounded)
    # Layer i carries 14 roundings a block, of rms 2^-9 / sqrt(3) relative to the whole output; the instance norm takes
    # the token mean away and so amplifies them by rms / deviation. The last norm divides by the rms of the mean.
    layers_LBND = torch.stack([ffn_BND for _, ffn_BND in teacher.encoder.steps(patches_BNP)])[:, :, 1:]
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


def error_case() -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of 3 students of each of 2 clips, targets, and 7 visible places of each student."""
    torch.manual_seed(0)
    pred_SND, targets_BND = torch.randn(6, 40, 72).bfloat16(), torch.randn(2, 40, 72)
    return pred_SND, targets_BND, torch.stack([torch.randperm(40)[:7] for _ in range(6)])


def masked_rows(pred_SND: Tensor, visible_SK: Tensor) -> Tensor:
    return pred_SND[torch.ones(pred_SND.shape[:2], dtype=torch.bool).scatter(1, visible_SK, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_masked_error_counts_masked_patches_alone(dtype: torch.dtype):
    pred_SND, targets_BND, visible_SK = error_case()
    pred_SND = pred_SND.to(dtype).requires_grad_()
    error, spread = masked_error(pred_SND, targets_BND, visible_SK)
    exact_SND = pred_SND.detach().double().requires_grad_()
    difference_XD = masked_rows(exact_SND - targets_BND.double().repeat_interleave(3, 0), visible_SK)
    expected = difference_XD.square().sum(-1).mean()
    expected_spread = (masked_rows(exact_SND, visible_SK).var(dim=0) + 1e-6).sqrt().mean()
    # Differences, squares and sums are in fp32 whatever the predictions are.
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(spread.double(), expected_spread, rtol=1e-5, atol=0)
    assert not spread.requires_grad
    (gradient,) = torch.autograd.grad(1.7 * error, pred_SND)
    (exact,) = torch.autograd.grad(1.7 * expected, exact_SND)
    # A rounding has an rms of eps / sqrt(12). In bf16 the last one counts; in fp32 difference, factor, share and weight
    # round alike, and fp64 is computed in fp32. Factor 2 for what is not uniform.
    roundings, eps = (1, 2**-7) if dtype == torch.bfloat16 else (4, 2**-23)
    assert golden.rel_rms(gradient, exact) < 2 * (roundings / 12) ** 0.5 * eps
    assert not gradient.gather(1, visible_SK[..., None].expand(-1, -1, 72)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_makes_the_error_not_finite(bad: float):
    # An error that lost it would hide a bad batch from the check before the update.
    pred_SND, targets_BND, visible_SK = error_case()
    visible_SK[:] = torch.arange(7)
    pred_SND[0, 20, 5] = bad
    assert not masked_error(pred_SND, targets_BND, visible_SK)[0].isfinite()


# A training step wastes nothing ---------------------------------------------------------------------------------------

WAITING = {  # operations whose result the host must know before it can go on
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask they count what is True in it
GRID = (16, 8)
NUM_CLIPS = 2


class HostWaitsError(Exception):
    """An operation made the host wait for a value on the device."""


class NoWaiting(TorchDispatchMode):
    """Raises HostWaitsError where a GPU would have to be waited for; counts the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask or func is torch.ops.aten.repeat_interleave.Tensor:
            raise HostWaitsError(func)
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(x.numel() for x in results if isinstance(x, Tensor))])
        return result


def a_step(path: str, device: str = "cpu") -> tuple[MaskedStudents, Teacher, Tensor, Tensor]:
    """Students, teacher, patches and visible places of a step of tiny models."""
    torch.manual_seed(0)
    students = MaskedStudents(golden.TINY, golden.TINY_PRETRAIN)
    teacher = Teacher(students.encoder, 3).to(device)
    for module in (students, teacher):
        set_attention_path(module, path)  # type: ignore[arg-type]
    num_students = golden.TINY_PRETRAIN.students
    masks_SN = inverse_block_masks(np.random.default_rng(0), NUM_CLIPS * num_students, GRID, golden.TINY_PRETRAIN.mask)
    visible_BMK = torch.from_numpy(visible_indices(masks_SN)).unflatten(0, (NUM_CLIPS, num_students)).to(device)
    return students.to(device), teacher, torch.randn(NUM_CLIPS, 128, 256, device=device), visible_BMK


def run_step(students: MaskedStudents, teacher: Teacher, patches_BNP: Tensor, visible_BMK: Tensor) -> None:
    targets = teacher.targets(patches_BNP)
    students(patches_BNP, visible_BMK, targets.tokens, targets.cls).total.backward()
    ema_update(teacher.encoder.parameters(), students.encoder.parameters(), 0.9998)


@pytest.mark.parametrize("path", ["explicit", "sdpa", "auto"])
def test_nothing_in_a_step_makes_the_host_wait_for_the_device(path: str):
    step = a_step(path)
    with NoWaiting():
        run_step(*step)


def test_a_step_needs_no_value_at_all_on_the_host():
    # Tensors of the device "meta" have no values: what asks for one, or copies to the CPU, raises.
    run_step(*a_step("sdpa", "meta"))


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.index_put_([x > 0], torch.tensor(0.0)),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x, torch.tensor([2, 1, 1, 1]), dim=0),
    ],
)
def test_a_wait_would_be_noticed(waits: Callable[[Tensor], object]):
    with NoWaiting(), pytest.raises(HostWaitsError):
        waits(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("waits", "error", "words"),
    [
        (Tensor.tolist, NotImplementedError, "Cannot copy out of meta tensor"),
        (Tensor.cpu, NotImplementedError, "Cannot copy out of meta tensor"),
        (Tensor.numpy, TypeError, "can't convert meta device type tensor to numpy"),
        (lambda x: float(x[0, 0]), RuntimeError, "cannot be called on meta tensors"),
    ],
)
def test_a_value_on_the_host_would_be_noticed(waits: Callable[[Tensor], object], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        waits(torch.randn(4, 4, device="meta"))


def test_visible_patches_are_gathered_before_they_are_embedded():
    class EncodedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise EncodedError

    students, _, patches_BNP, visible_BMK = a_step("auto")
    embedded: list[int] = []
    students.encoder.patch_embed.register_forward_hook(lambda module, args, output: embedded.append(args[0].numel()))
    students.encoder.register_forward_hook(stop)
    with NoWaiting() as mode, pytest.raises(EncodedError):
        students(patches_BNP, visible_BMK, torch.zeros(1), torch.zeros(1))
    assert embedded == [visible_BMK.numel() * patches_BNP.shape[-1]]
    # Nothing as large as all tokens of all students comes into being up to the encoder's output.
    num_sequences = visible_BMK.shape[0] * visible_BMK.shape[1]
    assert mode.largest < num_sequences * patches_BNP.shape[1] * golden.TINY.width


def test_targets_of_the_inference_mode_give_the_gradients_that_ordinary_tensors_give():
    students, teacher, patches_BNP, visible_BMK = a_step("auto")
    targets = teacher.targets(patches_BNP)
    assert all(tensor.is_inference() for tensor in targets)
    noise_SND = torch.randn(8, 128, golden.TINY.width)
    gradients = []
    for tokens, cls in ((targets.tokens, targets.cls), (targets.tokens.clone(), targets.cls.clone())):
        total = students(patches_BNP, visible_BMK, tokens, cls, noise_SND).total
        gradients.append(torch.autograd.grad(total, list(students.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_teacher_can_be_trained_on_after_its_inference():
    # The weights stay ordinary tensors: the average moves them after every step, and a checkpoint restores them.
    students, teacher, patches_BNP, _ = a_step("auto")
    before = teacher.targets(patches_BNP).tokens
    torch.nn.init.normal_(students.encoder.norm.weight)
    ema_update(teacher.encoder.parameters(), students.encoder.parameters(), 0.5)
    assert not torch.equal(teacher.targets(patches_BNP).tokens, before)
    teacher.encoder.load_state_dict(teacher.encoder.state_dict())
