"""Several ranks write one checkpoint and agree about every one that they find."""

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_table import Count
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_checkpoints import Part, files_at, state_at, tiny_config

from asda.checkpoint.manifest import MANIFEST
from asda.checkpoint.read import checkpoints_of, newest_for_all_ranks
from asda.checkpoint.writer import CheckpointWriter, Outcome
from asda.errors import UserError

OF_RANK_1 = "optimizer-00001-of-00002.safetensors"
AGREED_WITHIN_S = 10.0


def save_three_while_training(processes: Any, run: Path) -> list[Outcome]:
    """Steps 1 to 3, each saved while the ranks exchange something else, as a training does."""
    part, outcomes = Part(processes.rank, processes.world_size), []
    with CheckpointWriter(run, tiny_config("run.keep=3"), processes) as writer:
        for step in (1, 2, 3):
            writer.save(state_at(step, processes.world_size), files_at(step, part))
            all_done = torch.zeros(())
            while not all_done:
                assert writer._save is not None
                all_done = torch.tensor(float(writer._save.done()))
                dist.all_reduce(all_done, op=dist.ReduceOp.MIN)
            outcome = writer.finish()
            assert outcome is not None
            outcomes.append(outcome)
    return outcomes


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "rank 1's file of an older step": lambda newest, older: shutil.copy(older / OF_RANK_1, newest / OF_RANK_1),
    "rank 1's file missing": lambda newest, older: (newest / OF_RANK_1).unlink(),
    "rank 1's file cut": lambda newest, older: os.truncate(newest / OF_RANK_1, 100),
    "rank 1's file empty": lambda newest, older: os.truncate(newest / OF_RANK_1, 0),
    "rank 0's file of an older step": lambda newest, older: shutil.copy(
        older / "model.safetensors", newest / "model.safetensors"
    ),
    "state of an older step": lambda newest, older: shutil.copy(older / "state.json", newest / "state.json"),
    "manifest of an older step": lambda newest, older: shutil.copy(older / MANIFEST, newest / MANIFEST),
    "no manifest": lambda newest, older: (newest / MANIFEST).unlink(),
    "a file of a third rank": lambda newest, older: shutil.copy(
        older / OF_RANK_1, newest / "optimizer-00002-of-00003.safetensors"
    ),
}


def found_after(processes: Any, run: Path, harm: Callable[[Path, Path], object], spares: bool) -> dict[str, Any]:
    """What this rank finds after the first one has harmed the newest checkpoint, or all of them."""
    folders = checkpoints_of(run)
    kept = run.with_name("kept")
    if processes.is_first:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(run, kept)
        for folder in folders[-1:] if spares else folders:
            harm(folder, folders[0])
    dist.barrier()
    started, warnings = time.monotonic(), []
    try:
        found, error = newest_for_all_ranks(run, warnings.append), None
    except UserError as refusal:
        found, error = None, str(refusal)
    seconds = time.monotonic() - started
    dist.barrier()
    if processes.is_first:
        shutil.rmtree(run)
        shutil.copytree(kept, run)
    dist.barrier()
    return {"found": found and found.name, "error": error, "warnings": warnings, "seconds": seconds}


def failing_save(processes: Any, run: Path, policy: str) -> tuple[Outcome, str | None]:
    """A save for which rank 1's disk has no room."""
    part = Part(processes.rank, processes.world_size)
    config = tiny_config(f"run.on_failed_save={policy}")
    with CheckpointWriter(run, config, processes) as writer:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if processes.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        writer.save(state_at(4, processes.world_size), files_at(4, part))
        outcome = writer.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome is not None
    return outcome, writer.failure


def all_trials(processes: Any, run: Path) -> dict[str, Any]:
    saved = save_three_while_training(processes, run)
    return {
        "saved": saved,
        "whole": found_after(processes, run, lambda newest, older: None, spares=True),
        "torn": {name: found_after(processes, run, harm, spares=True) for name, harm in HARMS.items()},
        "all torn": found_after(processes, run, HARMS["rank 1's file missing"], spares=False),
        "failed": {policy: failing_save(processes, run, policy) for policy in ("stop", "continue")},
        "left": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


@pytest.mark.launch
def test_two_ranks_save_together_and_agree_which_checkpoint_is_the_newest_intact_one(
    tmp_path: Path, count_fault: Count
) -> None:
    run = tmp_path / "run"
    first, second = run_ranks(2, all_trials, run)

    assert first["saved"] == second["saved"]
    assert [outcome.failure for outcome in first["saved"]] == [None] * 3
    for step in (1, 2, 3):
        for rank in (0, 1):
            for stem, tensors in files_at(step, Part(rank, 2)).items():
                found = load_file(run / "checkpoints" / f"step-{step:07d}" / f"{stem}.safetensors")
                assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    for ranks_view in (first, second):
        assert ranks_view["whole"]["found"] == "step-0000003"
        assert "none of the 3 checkpoints" in ranks_view["all torn"]["error"]
    trials = [(first["torn"][name], second["torn"][name]) for name in HARMS]
    detected = sum(
        len(a["warnings"]) == 1 and "step-0000003 is damaged" in a["warnings"][0] and not b["warnings"]
        for a, b in trials
    )
    recovered = sum(
        a["found"] == b["found"] == "step-0000002" and max(a["seconds"], b["seconds"]) < AGREED_WITHIN_S
        for a, b in trials
    )
    count_fault("18", "a checkpoint of two ranks torn: older, cut, missing files", len(trials), detected, 0, recovered)

    for policy, sticky in (("stop", True), ("continue", False)):
        assert first["failed"][policy][0] == second["failed"][policy][0], "both ranks are told the same"
        outcome, failure = first["failed"][policy]
        assert outcome.failure.startswith(f"rank 1: cannot write {run}/checkpoints/.tmp-step-0000004/{OF_RANK_1}")
        assert failure == second["failed"][policy][1] == (outcome.failure if sticky else None)
    assert first["left"] == ["latest", "step-0000001", "step-0000002", "step-0000003"]
