"""How much the teacher's features tell about labels that it has never seen, while it is being pre-trained.

Held-out clips are judged by their nearest neighbours among labelled clips, and by a linear layer that is fitted to
those. Neither learns by gradient descent, so the figures follow from the weights alone and cost seconds.

The feature of a clip is the mean over those tokens of the last block whose patches hold audio. The CLS token would not
do: it learns to predict a clip's mean target, of which the norms of the targets leave next to nothing
(asda/models/pretrain.py), and tells labels apart only after fine-tuning.

Shapes: N labelled clips, T held-out clips, D width, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asda.config.run import Config
from asda.data.batches import Batch
from asda.data.clips import ClipDataset
from asda.data.datasets import open_labelled
from asda.data.features.augment import present_patches
from asda.engine.processes import Processes
from asda.errors import UserError
from asda.evaluation.loop import over_clips
from asda.evaluation.metrics import have_one_label, summary
from asda.models.ast import AstEncoder
from asda.models.classifier import mean

PENALTIES = tuple(10.0**power for power in range(-4, 3))  # of the linear layer's squared weights, per labelled clip
ROWS = 1024  # held-out clips that are compared at once


class Features(NamedTuple):
    """What an encoder makes of clips, and what they are: fp32, in the dataset's order, on the device of every rank."""

    of_clips_ND: Tensor
    targets_NC: Tensor


class Probe:
    """The two sets of labelled clips of config.probe. Open it before the first step: mistakes show then."""

    def __init__(self, config: Config):
        """Open the shards.

        Args:
            config: with a section probe, and the log-mel statistics resolved: clips are seen as in training.

        Raises:
            UserError: shards are missing or have no labels, the two sets have other classes, or too few clips.
        """
        assert config.probe is not None
        self._config, self._neighbours = config, config.probe.neighbours
        self._train = open_labelled(config, "probe.train", config.probe.train)
        self._test = open_labelled(config, "probe.test", config.probe.test)
        if self._train.vocabulary != self._test.vocabulary:
            raise UserError(
                f"probe.test {config.probe.test} has {len(self._test.vocabulary)} classes that are not the "
                f"{len(self._train.vocabulary)} of probe.train {config.probe.train}; make the shards with the same "
                "--labels FILE"
            )
        if self._test.shares_shards_with(self._train):
            raise UserError(
                f"probe.test {config.probe.test} and probe.train {config.probe.train} have shards in common, where "
                "each clip is its own neighbour; name splits that are apart"
            )
        if len(self._train) < self._neighbours:
            raise UserError(
                f"probe.neighbours {self._neighbours} exceeds the {len(self._train)} clips of probe.train "
                f"{config.probe.train}; ask for fewer"
            )

    def figures(self, teacher: nn.Module, processes: Processes) -> dict[str, float | int]:
        """Judge an encoder. All ranks call this together, and get the same figures.

        Nothing is drawn from torch's generator, and the teacher stays as it is.

        Args:
            teacher: an Encoder that is whole on every rank and does not communicate, so that ranks may have different
                numbers of batches; in eval mode.
            processes: all ranks.

        Returns:
            "knn_accuracy" and "linear_accuracy" where every held-out clip has one label, otherwise "knn_mAP" and
            "linear_mAP", the mean of the average precisions of all classes; nan where the features are not finite.
        """
        assert not teacher.training
        train, test = (features_of(teacher, clips, self._config, processes) for clips in (self._train, self._test))
        return judge(train, test, self._neighbours)


def judge(train: Features, test: Features, neighbours: int) -> dict[str, float | int]:
    """The figures of Probe.figures, from features that are there already."""
    train_ND, test_TD = train.of_clips_ND, test.of_clips_ND
    targets_TC = test.targets_NC.double().cpu().numpy()
    name = "accuracy" if have_one_label(targets_TC) else "mAP"
    if not (train_ND.isfinite().all() and test_TD.isfinite().all()):
        return {f"knn_{name}": float("nan"), f"linear_{name}": float("nan")}
    train_ND, test_TD = standardised(train_ND, test_TD)
    scores = {
        "knn": neighbour_scores(train_ND, train.targets_NC, test_TD, neighbours),
        "linear": linear_scores(train_ND, train.targets_NC, test_TD),
    }
    return {f"{of}_{name}": summary(scores_TC.cpu().numpy(), targets_TC)[name] for of, scores_TC in scores.items()}


def standardised(train_ND: Tensor, test_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in fp64, shifted and scaled so that each feature has mean 0 and variance 1 over the labelled clips.

    A feature that is always the same becomes 0.
    """
    train_ND, test_TD = train_ND.double(), test_TD.double()
    mean_D, std_D = train_ND.mean(0), train_ND.std(0, correction=0)
    scale_D = torch.where(std_D > 0, std_D, torch.inf)
    return (train_ND - mean_D) / scale_D, (test_TD - mean_D) / scale_D


def neighbour_scores(train_ND: Tensor, train_targets_NC: Tensor, test_TD: Tensor, neighbours: int) -> Tensor:
    """Share of the nearest labelled clips that have the label, [T, C]; nearest by the cosine."""
    train_ND = nn.functional.normalize(train_ND)
    nearest = [
        (nn.functional.normalize(rows_RD) @ train_ND.T).topk(neighbours, dim=1).indices
        for rows_RD in test_TD.split(ROWS)
    ]
    return torch.cat([train_targets_NC[nearest_RK].mean(1) for nearest_RK in nearest])


def linear_scores(train_ND: Tensor, train_targets_NC: Tensor, test_TD: Tensor) -> Tensor:
    """What a linear layer says of the held-out clips, [T, C], fitted to labels of 0 and 1 by ridge regression.

    The weights minimise |X W + b - Y|^2 + penalty N |W|^2 in closed form. The penalty is the one of PENALTIES with the
    least error when each labelled clip is predicted from all others, which follows from one decomposition too: the
    error of a clip that was left out is its error within, over 1 minus its leverage.

    Args:
        train_ND: features of mean 0, in fp64.
        train_targets_NC: 1 where the clip has the label.
        test_TD: features of the held-out clips, shifted alike.
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


def features_of(encoder: nn.Module, dataset: ClipDataset, config: Config, processes: Processes) -> Features:
    """What an encoder, in eval mode, makes of all clips. All ranks call this together."""
    device = processes.device

    def mean_patch(patches_BNP: Tensor, clips: Batch) -> Tensor:
        tokens_BND = encoder(patches_BNP, present_BN=clips.present(config, device)).float()
        if isinstance(encoder, AstEncoder):  # whose patches are others than the data's, and which knows no padding
            return mean(tokens_BND[:, encoder.num_special :])
        audio_BN = torch.from_numpy(present_patches(clips.lengths, None, config.data.frames, config.model.patch))
        return mean(tokens_BND[:, 1:], audio_BN.to(device))

    features_ND, targets_NC = over_clips(dataset, config, processes, mean_patch)
    return Features(torch.from_numpy(features_ND).to(device), torch.from_numpy(targets_NC).to(device))
