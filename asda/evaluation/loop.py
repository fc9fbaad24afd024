"""Run a network over held-out clips, each exactly once, on any number of processes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from webdataset.pipeline import DataPipeline

from asda.checkpoint.read import description_of
from asda.config.data import DataSpecs
from asda.config.model import ClassifyConfig
from asda.config.run import Config
from asda.data.audio.waves import SAMPLE_RATE_HZ
from asda.data.clips import ClipDataset
from asda.data.datasets import open_evaluation_data
from asda.data.stream import Batch, evaluation_batches, make_patches
from asda.engine.processes import Processes, from_all_ranks
from asda.evaluation.metrics import summary
from asda.inference import Model
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier


def evaluate_weights(
    config: Config, weights: dict[str, Tensor], vocabulary: tuple[str, ...], processes: Processes, data: DataSpecs
) -> dict[str, float | int]:
    """Evaluate a classifier on these clips. All ranks call this together.

    Weights are whole and not inside a ZeRO engine. So ranks may have different numbers of batches, and the figures are
    those of the weights that a checkpoint holds.

    Raises:
        UserError: the shards are damaged, or have other classes than the classifier.
    """
    dataset = open_evaluation_data(config, vocabulary, data)
    return summary(*logits_of_clips(config, weights, dataset, processes))


def logits_of_clips(
    config: Config, weights: dict[str, Tensor], dataset: ClipDataset, processes: Processes, *, chunks: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute a classifier's logits of every clip. All ranks call this together and get the same.

    With `chunks`, a clip longer than data.frames is scored in full, in chunks, as asda.inference.Model.logits does;
    otherwise only its beginning is. engine.micro_batch, precision and attention of the run are used.

    Returns:
        Logits and targets, both fp32 [N, C].
    """
    assert isinstance(config.objective, ClassifyConfig)
    model = Classifier(config.model, config.objective, len(dataset.vocabulary))
    model.load_state_dict(weights)
    set_attention_path(model, config.engine.attention)
    model = model.to(processes.device).eval()
    if chunks:
        return _over_whole_clips(dataset, config, processes, model)

    def logits_of(patches_BNP: Tensor, clips: Batch) -> Tensor:
        return model(patches_BNP, clips.present(config, processes.device))

    return over_clips(dataset, config, processes, logits_of)


def over_clips(
    dataset: ClipDataset, config: Config, processes: Processes, rows_of: Callable[[Tensor, Batch], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Run a network over every clip; return its rows and the targets in the dataset's order, on every rank.

    `rows_of` takes patches [B, N, P] on the device, and their clips, and returns [B, X]. The results are fp32,
    [clips, X] and [clips, classes]. The run's micro-batch and precision are used. fp16 changes nothing here: a
    classifier's weights are fp32, and a teacher's are fp16 already.
    """
    device = processes.device
    stream = _batches(dataset, config, processes).compose(make_patches(config, device, config.engine.micro_batch))
    with closing(stream.iterator()) as batches, _inference(config, device):  # pyright: ignore[reportArgumentType]
        return _gathered(((rows_of(patches_BNP.to(device), clips), clips) for patches_BNP, clips in batches), dataset)


def _over_whole_clips(
    dataset: ClipDataset, config: Config, processes: Processes, classifier: Classifier
) -> tuple[np.ndarray, np.ndarray]:
    """Score clips in full: return logits of the mean probabilities of their chunks, and targets, as over_clips does.

    A single-label classifier gives logarithms of probabilities for clips of one chunk too, so that all clips have the
    same kind of score.
    """
    assert isinstance(config.objective, ClassifyConfig)
    one_label = config.objective.loss == "ce"
    description = description_of(config, dataset.vocabulary)
    model = Model(Path(config.run.folder), description, classifier, processes.device)

    def rows() -> Iterator[tuple[Tensor, Batch]]:
        for batch in _batches(dataset, config, processes):
            logits_BC = torch.stack(model.logits([clip.samples for clip in batch.clips], SAMPLE_RATE_HZ))
            yield (log_softmax(logits_BC.double(), dim=1) if one_label else logits_BC), batch

    with _inference(config, processes.device):
        return _gathered(rows(), dataset)


def _batches(dataset: ClipDataset, config: Config, processes: Processes) -> DataPipeline:
    """Return this rank's share of the clips."""
    batch, rank, world_size = config.engine.micro_batch, processes.rank, processes.world_size
    return evaluation_batches(dataset, config.data, batch=batch, rank=rank, world_size=world_size)


@contextmanager
def _inference(config: Config, device: torch.device) -> Iterator[None]:
    """Compute without gradients, in the run's precision."""
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16"):
        yield


def _gathered(made: Iterable[tuple[Tensor, Batch]], dataset: ClipDataset) -> tuple[np.ndarray, np.ndarray]:
    """Gather rows and targets of all ranks, in the dataset's order; fp32."""
    rows, targets, numbers = [], [], []
    for rows_BX, clips in made:
        rows.append(rows_BX.float().cpu().numpy())
        targets.append(clips.targets(len(dataset.vocabulary)))
        numbers.append(np.array([clip.number for clip in clips.clips]))
    parts = zip(*from_all_ranks((rows, targets, numbers)), strict=True)
    all_rows, all_targets, seen = (np.concatenate([a for some in lists for a in some]) for lists in parts)
    if not np.array_equal(seen, np.arange(len(dataset))):  # figures of other clips must never be printed
        raise RuntimeError(f"evaluation has not seen each of {len(dataset)} clips once, in order: {seen}")
    return all_rows, all_targets
