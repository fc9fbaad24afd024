"""What a rank holds and sends: counted here, beside formulas."""

import bench_memory
import pytest
import torch.distributed as dist

from asda.config.run import EngineConfig
from asda.models.costs import rank_memory

SMALL = ["model.width=96", "model.heads=4", "model.depth=2", "objective.target_layers=2", "objective.decoder.width=96"]
# Partitions are padded to equal and even sizes, and single numbers travel too: a flag, a norm.
SLACK_BYTES = 64_000


@pytest.mark.launch
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_hold_and_send_what_the_formulas_say(stage: int) -> None:
    found = bench_memory.measured(2, [f"engine.zero_stage={stage}", *SMALL])
    parameters, followed = found["parameters"], found["followed"]
    held, computed = found["held"], rank_memory(parameters, followed, EngineConfig(zero_stage=stage), world_size=2)
    if stage == 3:
        computed["weights"] = held["weights"]  # stage 3 leaves small parameters whole, all of them at this size
    # In stage 1 the first rank holds the front of all parameters laid end to end, where the encoder's are.
    computed["averages"] = min(4 * followed, 2 * parameters) if stage == 1 else computed["averages"]
    for name, size in computed.items():
        assert held[name] == pytest.approx(size, abs=SLACK_BYTES), name
    sends = bench_memory.computed_traffic(parameters, followed, stage, world=2)
    if stage == 1:
        assert sum(found["sent"].values()) == pytest.approx(sum(sends.values()), abs=SLACK_BYTES)
    else:
        assert found["sent"]["backward, reduce_scatter_base"] == pytest.approx(sends["gradients"], abs=SLACK_BYTES)


def test_what_a_ring_sends_follows_from_the_kind_of_exchange() -> None:
    # To reduce everywhere is to reduce and scatter, then to gather; either sends (W - 1) / W of the whole.
    assert {bench_memory.EXCHANGES[name][0] for name in ("allreduce", "allreduce_coalesced")} == {2}
    assert all(hasattr(dist.ProcessGroup, name) for name in bench_memory.EXCHANGES)
    for stage in bench_memory.STAGES:
        assert sum(bench_memory.computed_traffic(100, 90, stage, world=1).values()) == 0
        for world in (2, 8, 64):
            gradients = bench_memory.computed_traffic(100, 90, stage, world)["gradients"]
            assert gradients == pytest.approx((400 if stage == 3 else 800) * (world - 1) / world)
