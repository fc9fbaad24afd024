"""The golden check finds our networks, front-end and masks equal to the official ones, and would find them unequal.

A mutant changes one thing of ours, and the group that concerns it must exceed its tolerance.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import golden
import golden_check
import golden_networks
import numpy as np
import pytest
import torch
from golden_findings import Finding
from safetensors.torch import save_file
from torch import Tensor, nn

from asda.config.presets import PRESETS
from asda.data.features import fbank
from asda.data.features.cpu import CpuPatches
from asda.engine import ema as ema_module
from asda.errors import UserError
from asda.models import attention, classifier, encoder, masks, pretrain
from asda.models.patches import from_patches

Patch = pytest.MonkeyPatch
ONE_RUN = ("--attention", "explicit", "--threads", "1")
SUITES = {suite.title: suite for suite in golden_check.suites()}
CHECKED = [title for title in SUITES if title != "eat trajectory"]  # which has no golden file
# What is recorded twice or is not of the networks: the noise in the order of a gather, and its inverse.
NOT_COMPARED = {"fwd.decoder.mask_noise", "fwd.mask.ids_restore"}


@pytest.fixture(scope="module")
def folder(shared: Path) -> golden.Folder:
    return golden.Folder(shared / "golden")


@pytest.fixture
def copied(shared: Path, tmp_path: Path) -> Path:
    """The fine-tuning files alone, to be spoiled."""
    for path in (shared / "golden").glob("asda_finetune*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


def exceeded(found: list[Finding]) -> set[str]:
    return {finding.group for finding in found if not finding.share <= 1}


@pytest.mark.parametrize(("path", "threads"), [("explicit", 1), ("sdpa", 1), ("auto", 1), ("auto", 2)])
@pytest.mark.parametrize("title", CHECKED)
def test_everything_is_within_tolerance_on_every_path(title: str, path: str, threads: int, folder: golden.Folder):
    found = golden_check.run(folder, SUITES[title], path, threads)
    assert found
    assert not exceeded(found), golden_check.table(golden_check.worst_of_groups(found))


@pytest.mark.parametrize("title", CHECKED)
def test_every_tensor_of_the_files_takes_part(title: str, folder: golden.Folder):
    golden_check.run(folder, SUITES[title], "auto", 1)
    official = folder.tensors(SUITES[title].files[0])
    assert set(official) - official.used <= NOT_COMPARED


# Mutants ------------------------------------------------------------------------------------------------------------


def preset(**changes: object) -> Callable[[Patch], None]:
    return lambda patch: [patch.setitem(PRESETS["released"]["model"], *change) for change in changes.items()]  # type: ignore[func-returns-value]


def replaced(module: object, name: str, make: Callable) -> Callable[[Patch], None]:
    """`name` of `module` becomes make(what it was)."""
    return lambda patch: patch.setattr(module, name, make(getattr(module, name)))


def tanh_gelu(_: Callable) -> Callable:
    def mutant(mlp: encoder.Mlp, x: Tensor) -> Tensor:
        return mlp.fc2(nn.functional.gelu(mlp.fc1(x), approximate="tanh"))

    return mutant


def position_of_first_patches(embed: Callable) -> Callable:
    return lambda self, patches, where=None: embed(self, patches)


def shifted_by_a_row(table: Callable) -> Callable:
    return lambda rows, columns, width: table(rows, columns, width).roll(columns, 0)


def axes_exchanged(table: Callable) -> Callable:
    return lambda rows, columns, width: table(rows, columns, width).roll(width // 2, 1)


def summed_utterance(losses: Callable) -> Callable:
    def mutant(self: nn.Module, pred: Tensor, cls: Tensor, visible: Tensor, *targets: Tensor) -> pretrain.Losses:
        right = losses(self, pred, cls, visible, *targets)
        num_students = visible.shape[0] * visible.shape[1]
        return right._replace(total=right.total + (num_students - 1) * self.utterance_weight * right.utterance)

    return mutant


def masked_and_visible_exchanged(indices: Callable) -> Callable:
    return lambda visible_MN: indices(~visible_MN)


def students_in_another_order(indices: Callable) -> Callable:
    return lambda visible_MN: indices(visible_MN)[::-1].copy()


def without_gelu(_: Callable) -> Callable:
    return lambda x: x


def targets_without(part: str) -> Callable[[Patch], None]:
    return replaced(pretrain, part, lambda _: lambda x, *shape: x)


def one_step_late(decay: Callable) -> Callable:
    return lambda config, step: decay(config, step + 1)


def half_as_far(update: Callable) -> Callable:
    return lambda averages, followed, decay: update(averages, followed, (1 + decay) / 2)


def adam_of(**changes: object) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        patch.setattr(golden_networks, "adam", lambda students, settings: right(students, settings | changes))

    right = golden_networks.adam
    return mutate


def pooling_with_cls(patch: Patch) -> None:
    patch.setitem(classifier.POOLINGS, "mean", lambda tokens_BND, _: tokens_BND.mean(1))
    patch.setitem(classifier.POOLINGS, "linear_softmax", classifier.linear_softmax)


def scales_from_below(scales: Callable) -> Callable:
    return lambda model, decay: {
        name: scale * decay if scale < 1 else scale for name, scale in scales(model, decay).items()
    }


def per_positive_label(loss: Callable) -> Callable:
    return lambda logits, targets, config: loss(logits, targets, config) / targets.sum() * len(targets)


def padded_after_normalisation(finish: Callable) -> Callable:
    def other(self: CpuPatches, *args: object) -> None:
        self._layout = self._layout._replace(pad_log_mel=self._layout.mean)
        finish(self, *args)

    return other


def periodic(window: Tensor) -> Tensor:
    return torch.hann_window(len(window), periodic=True)


def with_other_blocks(size: int) -> Callable[[Callable], Callable]:
    return lambda union: lambda centres, grid, block: union(centres, grid, size)


LOCAL = "norms"  # fed with official activations
MUTANTS: dict[str, tuple[str, str, Callable[[Patch], None]]] = {
    "lambda 0.3": ("asda pretrain", "student activations", preset(attention_lambda=0.3)),
    "lambda 0.3 in a classifier": ("asda finetune", "logits CLS_TOKEN", preset(attention_lambda=0.3)),
    "lambda 0.3 in training": ("asda trajectory", "losses", preset(attention_lambda=0.3)),
    "scale 1": ("asda finetune", "logits CLS_TOKEN", preset(attention_scale=1.0)),
    "scale 1, gradients": ("asda pretrain", "gradients", preset(attention_scale=1.0)),
    "tanh GELU": ("asda finetune", "logits CLS_TOKEN", replaced(encoder.Mlp, "forward", tanh_gelu)),
    "tanh GELU in EAT": ("eat pretrain", "teacher activations", replaced(encoder.Mlp, "forward", tanh_gelu)),
    "eps 1e-6 in the attention": ("asda pretrain", LOCAL, replaced(attention, "NORM_EPS", lambda _: 1e-6)),
    "eps 1e-5 in the encoder": ("eat pretrain", LOCAL, replaced(encoder, "NORM_EPS", lambda _: 1e-5)),
    "eps 1e-5 before the head": ("eat finetune", LOCAL, replaced(classifier, "NORM_EPS", lambda _: 1e-5)),
    "utterance term summed": (
        "asda pretrain",
        "losses",
        replaced(pretrain.MaskedStudents, "_losses", summed_utterance),
    ),
    "positions a row late": ("eat pretrain", "position table", replaced(encoder, "sincos_positions", shifted_by_a_row)),
    "positions a row late, tokens": (
        "eat pretrain",
        "student activations",
        replaced(encoder, "sincos_positions", shifted_by_a_row),
    ),
    "time and mel exchanged": ("asda finetune", "activations", replaced(encoder, "sincos_positions", axes_exchanged)),
    "positions of other patches": (
        "asda pretrain",
        "student activations",
        replaced(encoder.Encoder, "embed", position_of_first_patches),
    ),
    "students exchanged": (
        "asda pretrain",
        "student activations",
        replaced(golden, "visible_indices", students_in_another_order),
    ),
    "decoder without GELU": ("asda pretrain", "decoder", replaced(pretrain, "gelu", without_gelu)),
    "targets without instance norm": ("asda pretrain", "targets", targets_without("instance_norm")),
    "targets without layer norm": ("eat pretrain", "targets", targets_without("layer_norm")),
    "EMA half as far": ("asda pretrain", "EMA step", replaced(ema_module, "ema_update", half_as_far)),
    "EMA decay a step late": ("eat pretrain", "EMA decay", replaced(ema_module, "ema_decay", one_step_late)),
    "EMA a step late in training": ("asda trajectory", "losses", replaced(ema_module, "ema_decay", one_step_late)),
    "Adam without decay": ("asda pretrain", "Adam step", adam_of(weight_decay=0.0)),
    "Adam with another eps": ("eat pretrain", "Adam step", adam_of(eps=1e-6)),
    "Adam with other betas": ("asda trajectory", "losses", adam_of(betas=(0.9, 0.999))),
    "pooling with CLS": ("asda finetune", "logits MEAN_POOLING", pooling_with_cls),
    "linear softmax with CLS": ("eat finetune", "logits LIN_SOFTMAX", pooling_with_cls),
    "linear softmax, 1e-7": (
        "eat finetune",
        "logits LIN_SOFTMAX",
        replaced(classifier, "CERTAINTY_GAP", lambda _: 1e-7),
    ),
    "loss per label": (
        "asda finetune",
        "bce loss and gradients",
        replaced(classifier, "classification_loss", per_positive_label),
    ),
    "lr scales a block lower": ("asda finetune", "lr scales", replaced(classifier, "lr_scales", scales_from_below)),
    "pre-emphasis 0.96": ("front-end", "fbank", replaced(fbank, "PRE_EMPHASIS", lambda _: 0.96)),
    "a periodic window": ("front-end", "fbank: 99.9 %", replaced(fbank, "WINDOW_W", periodic)),
    "padding normalised to 0": ("front-end", "normalised", replaced(CpuPatches, "_finish", padded_after_normalisation)),
    "blocks of 4": ("masks", "asda_64x8_len5: blocks", replaced(masks, "block_union", with_other_blocks(4))),
    "blocks of 4, masks": (
        "masks",
        "asda_64x8_len5: distribution",
        replaced(masks, "block_union", with_other_blocks(4)),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_exceeds_the_tolerance(name: str, folder: golden.Folder, monkeypatch: Patch):
    title, group, mutate = MUTANTS[name]
    mutate(monkeypatch)
    assert f"{title}: {group}" in exceeded(golden_check.run(folder, SUITES[title], "explicit", 1))


# The program --------------------------------------------------------------------------------------------------------


def test_the_program_lists_the_worst_of_each_group_and_what_is_not_there(copied: Path, capsys: pytest.CaptureFixture):
    golden_check.main([str(copied), *ONE_RUN])
    printed = capsys.readouterr().out
    assert "asda finetune: logits LIN_SOFTMAX" in printed
    assert "not there: eat_finetune.json" in printed
    assert "not there: fbank_test.safetensors" in printed
    assert "all within tolerance" in printed
    assert "EXCEEDED" not in printed


def test_the_program_exits_with_1_when_a_tolerance_is_exceeded(
    copied: Path, capsys: pytest.CaptureFixture, monkeypatch: Patch
):
    preset(attention_lambda=0.3)(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        golden_check.main([str(copied), *ONE_RUN])
    assert exit.value.code == 1
    assert "EXCEEDED" in capsys.readouterr().out


def test_without_the_checkpoint_the_weights_are_those_among_the_tensors(copied: Path):
    weights = golden.Folder(copied).checkpoint("asda_finetune")
    path = copied / "asda_finetune.safetensors"
    official = golden.Folder(copied).tensors("asda_finetune")
    save_file(official | {f"state.{name}": tensor.contiguous() for name, tensor in weights.items()}, path)
    (copied / "asda_finetune_official.pt").unlink()
    assert not exceeded(golden_check.run(golden.Folder(copied), SUITES["asda finetune"], "explicit", 1))


@pytest.mark.parametrize("suffix", [".json", ".safetensors", "_official.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_one_sentence(suffix: str, share: float, copied: Path):
    path = copied / f"asda_finetune{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"{path.name} is not .*copy it again") as error:
        golden_check.main([str(copied), *ONE_RUN])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["spec", "num_classes", "train_bce", "optim_overrides"])
def test_a_missing_key_is_one_sentence(key: str, copied: Path):
    path = copied / "asda_finetune.json"
    numbers = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in numbers.items() if name != key}))
    with pytest.raises(UserError, match=f"asda_finetune.json has no '{key}'"):
        golden_check.main([str(copied), *ONE_RUN])


def test_sizes_that_the_weights_do_not_have_are_one_sentence(copied: Path):
    path = copied / "asda_finetune.json"
    numbers = json.loads(path.read_text())
    numbers["spec"]["depth"] = 2
    path.write_text(json.dumps(numbers))
    with pytest.raises(UserError, match=r"the weights of asda_finetune_official.pt do not fit: .*blocks\.2"):
        golden_check.main([str(copied), *ONE_RUN])


def test_a_folder_that_is_not_there_or_holds_nothing_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        golden_check.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="holds no golden file"):
        golden_check.main([str(tmp_path)])


def test_an_error_that_is_no_number_exceeds_every_tolerance():
    assert not Finding("group", "name", float("nan"), 1.0, "largest").share <= 1
    assert not Finding("group", "name", 1e-9, 0.0, "largest").share <= 1
    assert Finding("group", "name", 0.0, 0.0, "largest").share == 0


def test_patches_go_back_to_the_log_mel_that_they_came_from():
    mel_TF = torch.from_numpy(np.arange(32 * 128, dtype=np.float32)).reshape(32, 128)
    assert torch.equal(from_patches(golden.patchify(mel_TF[None, None])[0], golden.PATCH), mel_TF)
