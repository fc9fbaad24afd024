"""The teacher: the closed form of its average in fp64, in every precision and stage, alike on all ranks."""

from typing import Any

import pytest
import torch
from ranks import PRECISIONS, lower_the_loss_scale, make_run, run_ranks, stages_of, tiny_config, train_step

NUM_STEPS = 5


LAYOUTS = [(precision, stage) for precision in PRECISIONS for stage in stages_of(precision)]


def followed(processes: Any) -> list[str]:
    """Train in every precision and stage; returns what differs from the average of the recorded master weights."""
    from asda.engine.ema import ema_decay
    from asda.engine.zero import full_weights

    complaints = []
    for precision, stage in LAYOUTS:
        config = tiny_config(
            f"engine.precision={precision}", f"engine.zero_stage={stage}",
            "objective.ema.decay=0.99", "objective.ema.end_decay=0.999", "objective.ema.anneal_steps=4",
        )  # fmt: skip
        objective, engine = make_run(config, processes)
        lower_the_loss_scale(engine)
        began = {name: w.double().clone() for name, w in objective.weights(everywhere=True)["teacher"].items()}
        exact = {name: w.clone() for name, w in began.items()}
        path = dict.fromkeys(began, 0.0)
        for step in range(NUM_STEPS):
            assert train_step(objective, engine, processes, step, step)
            masters = full_weights(engine, everywhere=True)
            decay = ema_decay(config.objective.ema, step + 1)
            for name in exact:
                moved = (1 - decay) * (masters[f"encoder.{name}"].double() - exact[name])
                exact[name] += moved
                path[name] = path[name] + moved.abs()
        found = objective.weights(everywhere=True)["teacher"]
        for name, ours in found.items():
            # Each update rounds the difference and its product to 2**-24 of themselves, which 1e-6 of the path covers,
            # and the sum to 2**-24 of the weight.
            bound = NUM_STEPS * 2**-24 * exact[name].abs() + 1e-6 * path[name]
            if not (ours.dtype == torch.float32 and ((ours.double() - exact[name]).abs() <= bound).all()):
                complaints.append(f"{precision} {stage}: {name} is not the average")
            if (ours.double() == began[name]).all() and path[name].max() > 0:
                complaints.append(f"{precision} {stage}: {name} did not move")
            seen = dict(objective.teacher.encoder.named_parameters())[name]
            if not torch.equal(seen.float(), ours.to(seen.dtype).float()):
                complaints.append(f"{precision} {stage}: the teacher's {name} is not the rounded average")
            if seen.dtype != objective._dtype:
                complaints.append(f"{precision} {stage}: the teacher's {name} is in {seen.dtype}")
        complaints += _unequal_on_ranks(objective)
    return complaints


def _unequal_on_ranks(objective: Any) -> list[str]:
    import torch.distributed as dist

    bits: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(bits, {n: p.float() for n, p in objective.teacher.encoder.named_parameters()})
    return [n for n in bits[0] if not all(torch.equal(bits[0][n], other[n]) for other in bits)]


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_teacher_is_the_average_of_the_master_weights_in_every_precision_and_stage(
    ranks: int, count_fault: Any
) -> None:
    for complaints in run_ranks(ranks, followed):
        assert not complaints, complaints
    count_fault("28", f"teacher after {NUM_STEPS} updates, on {ranks} ranks", len(LAYOUTS), len(LAYOUTS))
