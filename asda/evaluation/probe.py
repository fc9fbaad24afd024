"""Evaluate frozen features with k-NN and a linear probe: of the teacher in pre-training, or of any encoder.

Held-out clips are classified by their nearest labelled clips, and by a linear layer fitted to those. Neither learns by
gradient descent, so the figures follow from the weights alone and cost seconds.

The feature of a clip is the mean over the last block's tokens whose patches have audio. The CLS token is of no use: it
learns to predict a clip's mean target, of which the norms of the targets leave next to nothing
(asda/models/pretrain.py), and separates labels only after fine-tuning.

Shapes: N labelled clips, T held-out clips, D width, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from asda.config.run import Config
from asda.data.clips import ClipDataset
from asda.data.features.augment import present_patches
from asda.data.stream import Batch
from asda.engine.processes import Processes
from asda.evaluation.loop import over_clips
from asda.evaluation.metrics import have_one_label, summary
from asda.models.ast import AstEncoder
from asda.models.classifier import mean

PENALTIES = tuple(10.0**power for power in range(-4, 3))  # of the linear layer's squared weights, per labelled clip
ROWS = 1024  # held-out clips compared at once


class LabelledFeatures(NamedTuple):
    """Features of clips and their labels: fp32, in the dataset's order, on the device of every rank."""

    of_clips_ND: Tensor
    targets_NC: Tensor


def probe_encoder(
    encoder: nn.Module, config: Config, data: tuple[ClipDataset, ClipDataset], processes: Processes
) -> dict[str, float | int]:
    """Evaluate an encoder on the two datasets of open_probe_data. All ranks call this together and get the same.

    Nothing is drawn from torch's generator. The encoder, in eval mode and whole on every rank, is not changed. It must
    not communicate, because ranks may have different numbers of batches.

    Returns:
        "knn_accuracy" and "linear_accuracy" if every held-out clip has one label, else "knn_mAP" and "linear_mAP", the
        mean average precision of all classes; nan if features are not finite.
    """
    assert config.probe is not None
    assert not encoder.training
    train, test = (features_of(encoder, clips, config, processes) for clips in data)
    return probe_figures(train, test, config.probe.neighbours)


def probe_figures(train: LabelledFeatures, test: LabelledFeatures, neighbours: int) -> dict[str, float | int]:
    """Compute the figures of probe_encoder from features."""
    targets_TC = test.targets_NC.double().cpu().numpy()
    name = "accuracy" if have_one_label(targets_TC) else "mAP"
    if not (train.of_clips_ND.isfinite().all() and test.of_clips_ND.isfinite().all()):
        return {f"knn_{name}": float("nan"), f"linear_{name}": float("nan")}
    train_ND, test_TD = standardised(train.of_clips_ND, test.of_clips_ND)
    scores = {
        "knn": neighbour_scores(train_ND, train.targets_NC, test_TD, neighbours),
        "linear": linear_scores(train_ND, train.targets_NC, test_TD),
    }
    return {f"{of}_{name}": summary(scores_TC.cpu().numpy(), targets_TC)[name] for of, scores_TC in scores.items()}


def standardised(train_ND: Tensor, test_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale both sets so that each feature has mean 0 and variance 1 over the labelled clips; in fp64.

    A constant feature becomes 0.
    """
    train_ND, test_TD = train_ND.double(), test_TD.double()
    mean_D, std_D = train_ND.mean(0), train_ND.std(0, correction=0)
    scale_D = torch.where(std_D > 0, std_D, torch.inf)
    return (train_ND - mean_D) / scale_D, (test_TD - mean_D) / scale_D


def neighbour_scores(train_ND: Tensor, train_targets_NC: Tensor, test_TD: Tensor, neighbours: int) -> Tensor:
    """Return the share of the nearest labelled clips, by cosine, that have each label: [T, C]."""
    train_ND = normalize(train_ND)
    nearest = [(normalize(rows_RD) @ train_ND.T).topk(neighbours, dim=1).indices for rows_RD in test_TD.split(ROWS)]
    return torch.cat([train_targets_NC[nearest_RK].mean(1) for nearest_RK in nearest])


def linear_scores(train_ND: Tensor, train_targets_NC: Tensor, test_TD: Tensor) -> Tensor:
    """Score held-out clips, [T, C], by a linear layer that ridge regression fits to labels of 0 and 1.

    Features are in fp64, standardised. The weights minimise |X W + b - Y|^2 + penalty N |W|^2 in closed form. Among
    PENALTIES the one is chosen that has the least error when each labelled clip is predicted from all others. That
    follows from the same decomposition: the error of a clip that is left out is its error within, divided by 1 minus
    its leverage.
    """
    num_clips = len(train_ND)
    bias_C = train_targets_NC.double().mean(0)
    centred_NC = train_targets_NC.double() - bias_C
    variance_D, directions_DD = torch.linalg.eigh(train_ND.T @ train_ND)
    turned_ND = train_ND @ directions_DD
    products_DC = turned_ND.T @ centred_NC

    def fitted(penalty: float) -> Tensor:
        return products_DC / (variance_D.clamp(min=0) + penalty * num_clips)[:, None]

    def error_left_out(penalty: float) -> float:
        within_NC = centred_NC - turned_ND @ fitted(penalty)
        leverage_N = turned_ND.square() @ (1 / (variance_D.clamp(min=0) + penalty * num_clips)) + 1 / num_clips
        return float((within_NC / (1 - leverage_N)[:, None]).square().mean())

    weights_DC = directions_DD @ fitted(min(PENALTIES, key=error_left_out))
    return test_TD @ weights_DC + bias_C


def features_of(encoder: nn.Module, dataset: ClipDataset, config: Config, processes: Processes) -> LabelledFeatures:
    """Compute the features of all clips with an encoder in eval mode. All ranks call this together."""
    device = processes.device

    def mean_patch(patches_BNP: Tensor, clips: Batch) -> Tensor:
        tokens_BND = encoder(patches_BNP, present_BN=clips.present(config, device)).float()
        if isinstance(encoder, AstEncoder):  # its patches are not the data's, and it does not mask padding
            return mean(tokens_BND[:, encoder.num_special :])
        audio_BN = torch.from_numpy(present_patches(clips.lengths, None, config.data.frames, config.model.patch))
        return mean(tokens_BND[:, 1:], audio_BN.to(device))

    features_ND, targets_NC = over_clips(dataset, config, processes, mean_patch)
    return LabelledFeatures(torch.from_numpy(features_ND).to(device), torch.from_numpy(targets_NC).to(device))
