"""Evaluate on held-out shards: deepspeed asda/evaluate.py --checkpoint runs/x --data shards/y:test

Streams every clip exactly once over any number of ranks (plain `python asda/evaluate.py` is one rank), prints accuracy
or mean average precision and writes a JSON file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asda import checkpoint
from asda.config import ClassifyConfig, Config
from asda.data.batches import Batch
from asda.data.cache import CacheConfig
from asda.data.clips import ClipDataset
from asda.data.stream import evaluation_batches, patch_maker, with_patches
from asda.engine import Processes, join_processes, leave_processes
from asda.errors import UserError, exit_with_sentence
from asda.metrics import summary
from asda.models.attention import set_attention_path
from asda.models.classifier import Classifier


def evaluate_weights(
    config: Config, weights: dict[str, Tensor], vocabulary: tuple[str, ...], processes: Processes
) -> dict[str, float | int]:
    """Figures of a classifier on config.data.valid. All ranks call this together.

    Weights come whole rather than inside a ZeRO engine, so ranks may have different numbers of batches, and the
    figures are those of the weights that a checkpoint holds.

    Raises:
        UserError: the shards are damaged, or have other classes than the classifier.
    """
    assert isinstance(config.objective, ClassifyConfig)
    dataset = held_out(config, vocabulary)
    model = Classifier(config.model, config.objective, len(vocabulary))
    model.load_state_dict(weights)
    set_attention_path(model, config.engine.attention)
    model = model.to(processes.device).eval()

    def scores_of(patches_BNP: Tensor, clips: Batch) -> Tensor:
        return model(patches_BNP, clips.present(config, processes.device))

    scores_NC, targets_NC = over_clips(dataset, config, processes, scores_of)
    return summary(scores_NC, targets_NC, single_label=config.objective.loss == "ce")


def held_out(config: Config, vocabulary: tuple[str, ...]) -> ClipDataset:
    """The clips of config.data.valid.

    Raises:
        UserError: the shards are missing, have no labels, or other classes than the classifier.
    """
    cache = CacheConfig(config.data.cache, config.data.cache_gib)
    dataset = ClipDataset(config.data.valid, labelled=True, cache=cache)
    if not dataset.num_labels:
        raise UserError(
            f"{config.data.valid} has no labels on its {len(dataset)} clips, so there is nothing to measure; name a "
            "split of labelled clips"
        )
    if dataset.vocabulary != vocabulary:
        raise UserError(
            f"{config.data.valid} has {len(dataset.vocabulary)} classes that are not the {len(vocabulary)} the "
            "classifier was trained on; make the shards with the same --labels FILE"
        )
    return dataset


def over_clips(
    dataset: ClipDataset, config: Config, processes: Processes, rows_of: Callable[[Tensor, Batch], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """What a network makes of every clip, and the clips' targets, in the dataset's order, on every rank.

    Args:
        dataset: labelled clips.
        config: the run, whose micro-batch and precision are used; fp16 is for training alone, here it is fp32.
        processes: among which the clips are dealt.
        rows_of: patches [B, N, P] on the device, and their clips -> [B, X].

    Returns:
        fp32, [clips, X] and [clips, classes].
    """
    batch, device = config.engine.micro_batch, processes.device
    stream = evaluation_batches(
        dataset,
        config.data,
        batch=batch,
        rank=processes.rank,
        world_size=processes.world_size,
        patches=patch_maker(config, device),
    )
    rows, targets = [], []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision == "bf16")
    with with_patches(stream, config, batch, device) as batches, torch.inference_mode(), autocast:
        for patches_BNP, clips in batches:
            rows.append(rows_of(patches_BNP.to(device), clips).float().cpu().numpy())
            targets.append(clips.targets(len(dataset.vocabulary)))
    parts: list[Any] = [None] * processes.world_size
    dist.all_gather_object(parts, (rows, targets))
    all_rows, all_targets = (np.concatenate([a for some in lists for a in some]) for lists in zip(*parts, strict=True))
    assert len(all_rows) == len(dataset), "every clip exactly once"
    return all_rows, all_targets


def evaluate(path: Path, data: str | None, out: Path | None) -> None:
    """Evaluate a checkpoint, print its figures and write them as JSON."""
    folder = checkpoint.resolve(path)
    config, state = checkpoint.read_state(folder)
    if not isinstance(config.objective, ClassifyConfig):
        raise UserError(f"{folder} is a pre-training checkpoint and has no classes; fine-tune it first")
    valid = data or config.data.valid
    if not valid:
        raise UserError(f"{folder} names no held-out data; give --data FOLDER:SPLIT")
    config = config.model_copy(update={"data": config.data.model_copy(update={"valid": valid})})
    processes = join_processes()
    figures = evaluate_weights(config, checkpoint.read_weights(folder, "model"), state.vocabulary, processes)
    leave_processes()
    if not processes.is_first:
        return
    out = out or folder.parent.parent / "evaluation.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"checkpoint": str(folder), "data": valid, "step": state.step, **figures}, indent=2) + "\n"
    )
    print(_in_words(figures, valid), f"written to {out}", sep="\n")


def _in_words(figures: dict[str, float | int], data: str | list[str]) -> str:
    lines = [f"{figures['clips']} clips of {data}, {figures['classes']} classes"]
    if "accuracy" in figures:
        lines.append(f"accuracy  {100 * figures['accuracy']:.2f} %  (chance {100 / figures['classes']:.2f} %)")
    lines.append(f"mAP       {figures['mAP']:.4f}  ({figures['classes_without_positives']} classes without positives)")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(
        prog="asda/evaluate.py",
        description="Accuracy or mean average precision of a fine-tuned checkpoint on held-out shards.",
        epilog="example:\n  deepspeed --num_accelerators 2 asda/evaluate.py --checkpoint runs/x --data shards/y:test",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run folder (its newest), or one checkpoint")
    parser.add_argument("--data", help="FOLDER:SPLIT; default: the run's own data.valid")
    parser.add_argument("--out", type=Path, help="the JSON file; default: evaluation.json in the run folder")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    args = parser.parse_args()
    evaluate(args.checkpoint, args.data, args.out)


if __name__ == "__main__":
    exit_with_sentence(main)
