"""One batch learned by heart: what a network must be able to do."""

import torch
from torch import Tensor, nn


def losses_of(classifier: nn.Module, patches_BNP: Tensor, steps: int = 40, lr: float = 3e-3) -> list[float]:
    """Cross-entropy over steps of Adam; clip number i has class i modulo 5."""
    optimizer = torch.optim.Adam(classifier.parameters(), lr)
    classes_B = torch.arange(len(patches_BNP)) % 5
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(classifier(patches_BNP), classes_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
