"""Properties of the classifier and its losses; test_golden.py has the official logits, gradients and rates."""

import golden
import pytest
import torch
from torch import Tensor

from asda.models.classifier import Classifier, classification_loss

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


def test_a_bf16_classifier_gives_fp32_logits():
    classifier = Classifier(golden.TINY, config_of(), NUM_CLASSES).bfloat16()
    assert classifier(patches_of(2)).dtype == torch.float32
