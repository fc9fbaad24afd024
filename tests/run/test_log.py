"""What a run leaves behind: valid JSON whatever happens, boards as their own readers see them, alarms now and then."""

import errno
import fcntl
import json
import math
import os
import pty
import re
import resource
import select
import shutil
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_table import Count
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asda.config.run import RunConfig
from asda.errors import UserError
from asda.run.log import ALARM_EVERY, JsonLines, RunLog, _kept_id, check_wandb, collapse_alarm, read_metrics

RUN = RunConfig(folder="runs/x")


@contextmanager
def opened(folder: Path, first_step: int = 0, num_steps: int = 10, **more: object) -> Iterator[RunLog]:
    log = RunLog(folder, first_step, num_steps, enabled=True, **more)  # pyright: ignore[reportArgumentType]
    yield log
    log.close()


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines_of(folder: Path) -> list[dict]:
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[list[str]]:
    """Makes stderr a terminal of this width; gives a list that in the end holds what it showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    shown: list[str] = []
    pieces: list[bytes] = []
    with open(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield shown
        stderr.flush()
        while select.select([ours], [], [], 0.1)[0]:  # it comes in pieces
            pieces.append(os.read(ours, 1 << 16))
    shown.append(b"".join(pieces).decode())
    os.close(ours)


def test_what_is_not_finite_is_null_in_valid_json_and_nan_when_read_back(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.record("train", 1, {"loss": math.nan, "lr": 0.5, "grad_norm": math.inf, "skipped_steps": 1})
        log.record("train", 2, {"loss": 1.25})
    first, second = lines_of(tmp_path)
    assert first["loss"] is None
    assert first["grad_norm"] is None
    assert first["not_finite"] == ["loss", "grad_norm"]
    assert (first["lr"], first["skipped_steps"]) == (0.5, 1)
    assert second == {"kind": "train", "step": 2, "loss": 1.25}
    read = read_metrics(tmp_path, "train")
    assert math.isnan(read[0]["loss"])
    assert math.isnan(read[0]["grad_norm"])
    assert "not_finite" not in read[0]


def test_a_resumed_run_drops_half_a_line_damaged_lines_and_those_it_will_do_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as log:
        for step in range(1, 7):
            log.record("train", step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 300 + b"\n" + b"".join(lines[1:]) + b'{"kind": "train", "st')
    assert [entry["step"] for entry in read_metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6], "readable while it runs"
    with opened(tmp_path, first_step=4) as log:
        log.record("train", 5, {"loss": 50.0})
    assert [(entry["step"], entry["loss"]) for entry in lines_of(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert "1 damaged lines" in capsys.readouterr().err


def test_tensorboard_shows_every_figure_at_its_step_and_the_curve_of_a_resumed_run_once(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for step in (1, 2, 3):
            log.record("train", step, {"loss": 1 / step, "skipped_steps": 0})
        log.record("probe", 3, {"knn_accuracy": 0.5})
    with opened(tmp_path, first_step=2) as log:
        log.record("train", 3, {"loss": 7.0})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert [event.value for event in board.Scalars("train/skipped_steps")] == [0, 0]
    assert board.Scalars("probe/knn_accuracy") == [], "it was of a step that is done again"


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as log:
        log.advance()
        log.record("train", 1, {"loss": 1.23456789, "step_s": 0.1, "skipped_steps": 0, "failed_saves": 2})
        log.say("saved it")
    said = capsys.readouterr()
    assert said.out == "train step 1: loss 1.2346  failed_saves 2\nsaved it\n"
    assert said.err == ""


@pytest.mark.parametrize("columns", [120, 0])
def test_on_a_terminal_a_bar_shows_loss_and_pace_and_other_lines_stand_above_it(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal(monkeypatch, columns) as shown, opened(tmp_path, first_step=2) as log:
        for step in (3, 4):
            log.advance()
            log.record("train", step, {"loss": 1.5, "frame_loss": 1.0, "clips_per_s": 12.25, "lr": 1e-4})
        log.record("probe", 4, {"knn_accuracy": 0.75})
        log.warn("it is hot")
    assert re.search(r"\| 4/10 .*loss=1.5, clips_per_s=12.25, lr=0.0001", shown[0])
    assert "frame_loss" not in shown[0]
    assert "warning: it is hot\r\n" in shown[0]
    assert capsys.readouterr().out == "probe step 4: knn_accuracy 0.75\n"


def test_a_rank_that_tells_nothing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", 0, 3, enabled=False, wandb="project")
    log.say("a")
    log.warn("b")
    log.alarm("c")
    log.advance()
    log.record("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_on_stderr_and_in_the_file_at_the_step_where_it_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, first_step=4) as log:
        log.advance()
        log.warn("something")
    assert lines_of(tmp_path) == [{"kind": "warning", "step": 5, "text": "something"}]
    assert capsys.readouterr().err == "warning: something\n"


def test_lines_that_find_no_room_wait_and_are_all_there_in_order_once_there_is_some(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"kind": "train", "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # a third of the next line
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match=str(errno.EFBIG)):
                lines.write({"kind": "train", "step": step})
            assert [entry["step"] for entry in lines_of(tmp_path)] == [1], "no half line"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.write({"kind": "train", "step": 4})
    assert [entry["step"] for entry in lines_of(tmp_path)] == [1, 2, 3, 4]


def test_lines_that_never_find_room_are_counted_at_the_end_and_told_once_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path / "run") as log:
        (tmp_path / "run" / "metrics.jsonl").mkdir()
        for step in (1, 2, 3):
            log.record("train", step, {"loss": 1.0})
    told = capsys.readouterr().err.splitlines()
    assert sum("metrics.jsonl: Is a directory; its lines are kept for the next try" in line for line in told) == 1
    assert sum("3 lines could not be written to" in line for line in told) == 1


def test_a_board_that_fails_is_left_out_with_a_warning_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        name = "the wall"

        def record(self, kind: str, step: int, figures: dict) -> None:
            raise ConnectionResetError("Connection lost")

        def close(self) -> None:
            raise AssertionError("it is gone")

    with opened(tmp_path) as log:
        log._boards.append(Failing())
        log.record("train", 1, {"loss": 1.0})
        log.record("train", 2, {"loss": 1.0})
    assert capsys.readouterr().err.count("the wall failed and gets no more figures: Connection lost") == 1
    assert [entry["step"] for entry in read_metrics(tmp_path, "train")] == [1, 2]


def wandb_history(path: Path) -> list[dict[str, float]]:
    """The points in an offline file of W&B: a header of 7 bytes, then Record protobufs in LevelDB's log format.

    https://github.com/google/leveldb/blob/main/doc/log_format.md: checksum (4 bytes), length (2), type (1), data; type
    1 is a whole record. Files of less than a block (32 KiB) have no other types.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        data, at, records = path.read_bytes(), 7, []
        assert len(data) < 32 * 1024
        while at < len(data):
            length, kind = struct.unpack_from("<HB", data, at + 4)
            assert kind == 1
            records.append(Record.FromString(data[at + 7 : at + 7 + length]))
            at += 7 + length
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.05)  # its helper process writes a moment longer
    points = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{"".join(item.nested_key): json.loads(item.value_json) for item in items} for items in points]


def test_a_resumed_run_continues_its_curve_in_weights_and_biases_which_may_be_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 2):
        time.sleep(1.1)  # W&B names its folders by the second
        with opened(tmp_path, first_step, wandb="project", config={"optimizer": {"lr": 0.5}}) as log:
            for step in (first_step + 1, first_step + 2):
                log.record("train", step, {"loss": 1.0 / step})
            log.record("probe", first_step + 2, {"knn_accuracy": math.nan})
    kept, *_ = (tmp_path / "wandb_run.txt").read_text().splitlines()
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {kept}, "one run, whatever the number of starts"
    rows = [row for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for row in wandb_history(path)]
    curve = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sorted(curve) == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
    said = capsys.readouterr()
    assert f"curves are at {tmp_path / 'wandb'}" in said.out
    assert said.err == "", "it keeps quiet"


@pytest.mark.parametrize("how", ["same", "moved", "restored", "copied", "old", "empty"])
def test_a_run_folder_keeps_its_id_and_a_copy_gets_its_own(tmp_path: Path, capsys: pytest.CaptureFixture, how: str):
    folder = tmp_path / "a run\u00e9"
    folder.mkdir()
    first = _kept_id(folder)
    if how == "moved":
        folder = folder.rename(tmp_path / "moved")
    elif how == "restored":
        shutil.copytree(folder, tmp_path / "backup")
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "backup", folder)
    elif how == "copied":
        folder = shutil.copytree(folder, tmp_path / "copy")
    elif how == "old":
        (folder / "wandb_run.txt").write_text(first + "\n")
    elif how == "empty":
        (folder / "wandb_run.txt").write_text("")
    second = _kept_id(folder)
    assert second
    assert (second == first) == (how not in ("copied", "empty"))
    assert _kept_id(folder) == second
    assert ("is a copy of the run folder" in capsys.readouterr().err) == (how == "copied")


def test_what_weights_and_biases_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**options: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError) as raised:
        RunLog(tmp_path, 0, 10, enabled=True, wandb="project")
    assert str(raised.value) == (
        "run.wandb 'project': Weights & Biases refuses: No API key configured. Use `wandb login` to log in; set "
        "WANDB_MODE=offline to keep its files in the run folder, or leave run.wandb empty"
    )


def test_weights_and_biases_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_wandb("project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb("")
    with pytest.raises(UserError, match=r"run.wandb 'project' needs .* pip install 'asda\[wandb\]'"):
        check_wandb("project")


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"target_variance": 0.09}, ["target_variance is 0.09", "run.min_target_spread 0.1"]),
        ({"prediction_variance": 0.001}, ["prediction_variance is 0.001", "run.min_prediction_spread 0.01"]),
    ],
)
def test_a_collapse_is_said_with_its_value_its_threshold_and_what_to_try(
    figures: dict[str, float], words: list[str]
) -> None:
    sentence = collapse_alarm({"target_variance": 0.9, "prediction_variance": 0.5} | figures, RUN)
    assert sentence is not None
    assert all(word in sentence for word in [*words, "optimizer.lr"])


@pytest.mark.parametrize(
    "figures",
    [
        {"target_variance": 0.1, "prediction_variance": 0.01},
        {"target_variance": math.nan, "prediction_variance": math.nan},
        {"loss": 1.0},
    ],
)
def test_no_collapse_is_said_at_the_threshold_nor_of_what_is_not_known(figures: dict[str, float]) -> None:
    assert collapse_alarm(figures, RUN) is None


def test_an_alarm_that_lasts_is_said_at_most_every_ten_lines_with_a_count(tmp_path: Path) -> None:
    with opened(tmp_path, num_steps=100) as log:
        for step in range(1, 26):
            log.advance()
            log.record("train", step, {"loss": 0.0})
            log.alarm(None if step == 3 else f"flat at {step}")
    said = [(entry["step"], entry["text"]) for entry in read_metrics(tmp_path, "warning")]
    assert said == [
        (1, "flat at 1"),
        (1 + ALARM_EVERY, "flat at 11 (10 times so far)"),
        (1 + 2 * ALARM_EVERY, "flat at 21 (20 times so far)"),
    ]


DAMAGED = [
    '{"kind": "train", "step": "3", "loss": 1}',
    '{"kind": "train", "step": null, "loss": 1}',
    '{"kind": "train", "step": true, "loss": 1}',
    '{"kind": "train", "step": -1, "loss": 1}',
    '{"kind": ["train"], "step": 3}',
    '{"kind": "train", "step": 3, "loss": "low"}',
    '{"kind": "train", "step": 3, "loss": null}',
    '{"kind": "train", "step": 3, "loss": {}}',
    '{"kind": "train", "step": 3, "not_finite": 7}',
    '{"kind": "train", "step": 3, "clips": {}}',
    '{"kind": "warning", "step": 3, "text": 5}',
    '{"kind": "train", "step": ' + "9" * 5000 + "}",
    "[" * 100_000,
    "3",
    "",
]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_dropped_and_the_run_resumes(line: str, tmp_path: Path, capfd, count_fault: Count) -> None:
    whole = [json.dumps({"kind": "train", "step": step, "loss": 1.5, "clips": "a hash"}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], line, whole[1], ""]))
    assert [entry["step"] for entry in read_metrics(tmp_path, "train")] == [1, 2]
    with opened(tmp_path, first_step=2) as log:
        log.record("valid", 2, {"mAP": 0.5, "clips": 16})
    assert [entry["step"] for entry in lines_of(tmp_path)] == [1, 2, 2]
    assert read_metrics(tmp_path, "valid")[0]["clips"] == 16
    assert "metrics.jsonl had 1 damaged lines; they are dropped" in capfd.readouterr().err
    count_fault("43", "a line of metrics.jsonl that no run has written", 1, 1, recovered=1)


def test_curves_that_have_no_place_are_a_warning(tmp_path: Path, capfd, count_fault: Count) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    with opened(tmp_path) as log:
        log.record("train", 1, {"loss": 0.5})
    assert [entry["loss"] for entry in read_metrics(tmp_path, "train")] == [0.5]
    assert "warning: no curves for TensorBoard" in capfd.readouterr().err
    count_fault("43", "a file where the curves of TensorBoard belong", 1, 1, recovered=1)
