"""Properties of the classifier and its losses; test_golden.py has the official logits, gradients and rates."""

import golden
import pytest
import torch
from torch import Tensor

from asda.models.classifier import Classifier, classification_loss

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

NUM_CLASSES = 13
config_of = golden.classify_config


def patches_of(num_clips: int) -> Tensor:
    return torch.randn(num_clips, 48, golden.PATCH**2)


def test_smoothed_cross_entropy_is_the_formula_and_mixed_targets_are_taken():
    torch.manual_seed(0)
    logits_BC, targets_BC = torch.randn(5, 4).double(), torch.rand(5, 4).softmax(1).double()
    smoothed_BC = 0.9 * targets_BC + 0.1 / 4
    expected = -(smoothed_BC * logits_BC.log_softmax(1)).sum(1).mean()
    ours = classification_loss(logits_BC, targets_BC, config_of(loss="ce", label_smoothing=0.1))
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def test_two_halves_of_a_batch_average_to_its_loss():
    torch.manual_seed(0)
    logits_BC, targets_BC = torch.randn(8, 4), (torch.rand(8, 4) < 0.3).float()
    halves = [classification_loss(logits_BC[i : i + 4], targets_BC[i : i + 4], config_of()) for i in (0, 4)]
    whole = classification_loss(logits_BC, targets_BC, config_of())
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_drop_path_acts_while_training_alone():
    torch.manual_seed(0)
    classifier, patches_BNP = Classifier(golden.TINY, config_of(drop_path=0.9), NUM_CLASSES), patches_of(2)
    assert not torch.equal(classifier.train()(patches_BNP), classifier(patches_BNP))
    assert torch.equal(classifier.eval()(patches_BNP), classifier(patches_BNP))


@pytest.mark.parametrize("pooling", ["cls", "mean", "linear_softmax"])
def test_masked_padding_is_as_if_it_were_not_there(pooling: str):
    torch.manual_seed(0)
    classifier = Classifier(golden.TINY, config_of(pooling=pooling), NUM_CLASSES).eval()
    patches_BNP, sizes = patches_of(3), (16, 40, 48)
    present_BN = torch.arange(48) < torch.tensor(sizes)[:, None]
    logits_BC = classifier(patches_BNP, present_BN)
    for logits_C, patches_NP, size in zip(logits_BC, patches_BNP, sizes, strict=True):
        # As many roundings in another order: the tolerance of the official logits, 5e-6.
        assert (logits_C - classifier(patches_NP[None, :size])[0]).abs().max() <= 5e-6
    assert not torch.equal(classifier(patches_BNP)[0], logits_BC[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "linear_softmax"])
def test_masked_padding_gets_no_gradient(pooling: str):
    torch.manual_seed(0)
    classifier = Classifier(golden.TINY, config_of(pooling=pooling), NUM_CLASSES)
    patches_BNP = patches_of(2).requires_grad_()
    present_BN = torch.arange(48) < torch.tensor([[24], [48]])
    classifier(patches_BNP, present_BN).square().sum().backward()
    assert patches_BNP.grad is not None
    assert (patches_BNP.grad[~present_BN] == 0).all()
    assert (patches_BNP.grad[present_BN].abs().sum(1) > 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_classifier_gives_logits_that_fp32_tells_apart(autocast: bool):
    classifier = Classifier(golden.TINY, config_of(), NUM_CLASSES)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BC = (classifier if autocast else classifier.bfloat16())(patches_of(8))
    assert logits_BC.dtype == torch.float32
    assert (logits_BC != logits_BC.bfloat16()).float().mean() > 0.9  # of 65,536 values one is a value of bf16
