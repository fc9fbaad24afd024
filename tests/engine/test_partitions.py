"""What a rank holds, and that checkpoints of it continue on any number of ranks in any stage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import FP16, differing, everything, make_run, run_ranks, stages_of, tiny_config, train_step
from safetensors.torch import save_file

from asda.engine.partitions import dealt_out
from asda.errors import UserError


def config_of(precision: str, stage: int):
    return tiny_config(f"engine.precision={precision}", f"engine.zero_stage={stage}", "engine.micro_batch=4")


def save(objective: Any, engine: Any, processes: Any, folder: Path) -> None:
    """What asda/train.py writes of tensors, without its protocol."""
    import torch.distributed as dist

    from asda.engine.partitions import optimizer_file

    folder.mkdir(parents=True, exist_ok=True)
    stem, tensors = optimizer_file(engine)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / f"{stem}.safetensors")
    for name, weights in objective.weights().items():
        if processes.is_first:
            save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    dist.barrier()


def trained_and_saved(processes: Any, precision: str, folder: Path) -> dict[int, Any]:
    """Three steps in every stage, a checkpoint, a fourth step."""
    report = {}
    for stage in stages_of(precision):
        objective, engine = make_run(config_of(precision, stage), processes)
        for step in range(3):
            train_step(objective, engine, processes, step, step)
        save(objective, engine, processes, folder / str(stage))
        saved = everything(objective, engine)
        train_step(objective, engine, processes, 3, 3)
        report[stage] = (saved, everything(objective, engine))
    return report


def moved(processes: Any, precision: str, sources: Path, targets: Path | None, expected: dict[int, Any]) -> list[str]:
    """Load what was saved in each stage into every stage; returns what is not as it was, bit for bit."""
    from asda.engine.partitions import restore

    complaints = []
    for stage in stages_of(precision):
        for from_stage in stages_of(precision):
            objective, engine = make_run(config_of(precision, stage), processes)
            folder = sources / str(from_stage)
            restore(engine, folder)
            objective.restore(folder)
            saved, after = expected[from_stage]
            where = f"{precision} {from_stage}->{stage} on {processes.world_size}"
            complaints += [f"{where}: {name}" for name in differing(everything(objective, engine), saved)]
            if targets and stage == from_stage:
                save(objective, engine, processes, targets / str(stage))
            if not targets and stage == from_stage:
                train_step(objective, engine, processes, 3, 3)
                wrong = differing(everything(objective, engine), after)
                complaints += [f"{where}, the next step: {name}" for name in wrong]
    return complaints


@pytest.mark.launch
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.faults), FP16])
def test_a_checkpoint_continues_bit_for_bit_from_two_ranks_on_one_and_on_two_again_in_every_stage(
    precision: str, tmp_path: Path, count_fault: Any
) -> None:
    expected = run_ranks(2, trained_and_saved, precision, tmp_path / "two")
    on_one = run_ranks(1, moved, precision, tmp_path / "two", tmp_path / "one", expected[0])
    on_two = run_ranks(2, moved, precision, tmp_path / "one", None, expected[0])
    complaints = [line for some in [*on_one, *on_two] for line in some]
    trials = 2 * len(stages_of(precision)) ** 2
    assert not complaints, complaints[:20]
    count_fault("24", f"2 -> 1 -> 2 ranks, any stage to any, {precision}", trials, trials, recovered=trials)


def incomplete(processes: Any, folder: Path) -> list[str]:
    """What restore says when a rank's file is missing, and when the model is another one."""
    from asda.engine.partitions import restore

    objective, engine = make_run(config_of("fp32", 1), processes)
    save(objective, engine, processes, folder)
    said = []
    moments = next(folder.glob("optimizer-*"))
    whole = moments.read_bytes()
    tensors = {"adam_step": torch.tensor(1.0)}
    for damage in ("few", "none", "model"):
        if damage == "few":
            save_file(tensors, moments)
        elif damage == "none":
            moments.unlink()
        else:
            moments.write_bytes(whole)
            save_file({"else": torch.zeros(1)}, folder / "model.safetensors")
        try:
            restore(engine, folder)
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.launch
def test_a_checkpoint_that_lacks_something_is_refused_in_a_sentence(tmp_path: Path) -> None:
    ((few, none, model),) = run_ranks(1, incomplete, tmp_path / "checkpoint")
    assert "has the optimizer's state for only 0 of" in few
    assert "has no optimizer-*.safetensors" in none
    assert "model.safetensors has no encoder.cls_token" in model


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_parameters_are_dealt_out_about_evenly(num_ranks: int) -> None:
    sizes = [100, 1, 50, 50, 3, 99, 7, 0, 64]
    owners = dealt_out(sizes, num_ranks)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    # The rank that ends highest took its last item when it was lowest, so no more than the mean lay on it before.
    assert max(loads) <= sum(sizes) / num_ranks + max(sizes)
    assert sum(loads) == sum(sizes)
