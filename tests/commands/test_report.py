"""The report page: valid, self-contained, and true to what the runs say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, TINY, TINY_PRETRAIN
from tiny_checkpoints import save
from tiny_tools import Done, one_core, room_for, run

from asda.commands.report_figures import MOST_POINTS, Curve, look, points
from asda.commands.report_runs import (
    confusions,
    differences,
    distinct_names,
    read_runs,
    training_hours,
    without_repeats,
)
from asda.config.model import PretrainConfig
from asda.config.run import Config, dump_config, load_config
from asda.models.encoder import Encoder
from asda.models.pretrain import MaskedStudents
from asda.run.log import JsonLines

pytestmark = pytest.mark.usefixtures(one_core.__name__)
VOID = {"meta", "br", "img", "hr", "link", "input"}  # elements of HTML without an end tag
LABELS = ["dog", "rain & <wind>", "siren"]
STATS = 'data.log_mel={"mean": -7.0, "std": 4.0}'


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, ids unique and all that are referred to present."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.num = dict.fromkeys(("svg", "table", "section", "details"), 0)
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)
        references = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text)
        assert {one or other for one, other in references} <= set(self.ids)
        outside = re.findall(r"(?:src|href|xlink:href|action)=\"(?!#|data:)|@import|<script|url\((?!#)", text)
        assert not outside, "the page needs nothing from outside and runs nothing"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.num[tag] = self.num.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg":
            assert {"aria-label", "aria-hidden"} & {name for name, _ in attrs}, "a picture says what it shows"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def report(*arguments: object) -> Done:
    return run("report", *arguments)


def page_of(out: Path, *folders: Path) -> Page:
    done = report(*folders, "--out", out)
    assert done.code == 0, done.err
    return Page(out.read_text())


def pretraining(shards: Path | str, *more: str) -> Config:
    keys = [f"data.train={shards}:train", STATS, *TINY_PRETRAIN, "optimizer.steps=8", *more]
    return load_config(ROOT / "configs" / "demo_pretrain.json", keys)


def finetuning(*more: str) -> Config:
    keys = ["data.train=shards:train", "data.valid=shards:test", STATS, *TINY, "optimizer.steps=8", *more]
    return load_config(ROOT / "configs" / "demo_finetune.json", keys)


def line(kind: str, step: int, **figures: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, **figures}


def write_run(folder: Path, config: Config, *more: dict[str, Any]) -> Path:
    """A run folder whose record is made by hand: losses that fall from 4 to 1 in four lines, 40 clips/s."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump_config(config))
    terms = ("frame_loss", "utterance_loss") if isinstance(config.objective, PretrainConfig) else ("loss",)
    lines = [
        line("train", step, lr=1e-3, grad_norm=1.0, clips_per_s=40.0, rss_gib=0.5 + step, **dict.fromkeys(terms, loss))
        for step, loss in ((2, 4.0), (4, 3.0), (6, 2.0), (8, 1.0))
    ]
    metrics = JsonLines(folder / "metrics.jsonl")
    for entry in [*lines, *more]:
        metrics.write(entry)
    return folder


def write_checkpoint(folder: Path, config: Config) -> None:
    assert isinstance(config.objective, PretrainConfig)
    torch.manual_seed(0)
    student, teacher = MaskedStudents(config.model, config.objective), Encoder(config.model)
    save(folder, config, 8, {"model": student.state_dict(), "teacher": teacher.state_dict()})


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A classifier with an evaluation and confusions, in a folder whose name HTML would misread."""
    valid = line("valid", 8, accuracy=0.25, mAP=0.3, clips=12, classes=3)
    folder = write_run(tmp_path / "<b>&'tags'", finetuning("_about.what=<script>alert(1)</script>"), valid)
    counts = [[3, 1, 0], [0, 2, 2], [0, 0, 4]]
    found = {"data": "shards:test", "step": 8, "clips": 12, "classes": 3, "accuracy": 0.75, "mAP": 0.8125}
    (folder / "evaluation.json").write_text(json.dumps(found | {"confusion": counts, "labels": LABELS}))
    return folder


@pytest.mark.launch
def test_a_pre_training_and_its_fine_tuning_on_one_page(
    shards: Path, pretrained: Path, finetuned: Path, tmp_path: Path
):
    page = page_of(tmp_path / "deep" / "page.html", pretrained, finetuned)
    for heading in ("Pre-training: curves", "Fine-tuning: curves", "What students see", "Where the teacher looks"):
        assert heading in page.words
    assert "6 of 6" in page.words
    assert "4 of 4" in page.words
    evaluation = json.loads((finetuned / "evaluation.json").read_text())
    row = [f"{100 * evaluation['accuracy']:.1f} %", f"{evaluation['mAP']:.3f}", f"{shards}:test", "evaluation.json"]
    assert [*row, "16", "8", "12.5 %", "4"] in [cells[1:] for cells in cells_of(tmp_path / "deep" / "page.html")]


def cells_of(page: Path) -> list[list[str]]:
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page.read_text())
    return [re.findall("<td>(.*?)</td>", row) for row in rows]


def test_a_pre_training_has_masks_attention_and_the_measure(shards: Path, tmp_path: Path):
    config = pretraining(shards)
    folder = write_run(tmp_path / "pretrained", config)
    write_checkpoint(folder, config)
    text = page_of(tmp_path / "page.html", folder).words
    for words in ("what student 2 sees", "A1, times the mean", "A1 - 0.1 A2", "half / on the clip's own"):
        assert words in text
    assert "Departures from preset released, size tiny" in text
    assert "model.width 32 (tiny: 192)" in text


def test_one_map_is_shown_as_one(shards: Path, tmp_path: Path):
    config = pretraining(shards, "model.attention_lambda=absent")
    folder = write_run(tmp_path / "pretrained", config)
    write_checkpoint(folder, config)
    text = page_of(tmp_path / "page.html", folder).words
    assert "A, times the mean" in text
    assert "A2" not in text


@pytest.mark.parametrize(("with_checkpoint", "words"), [(False, "has no checkpoint yet"), (True, "no_such_shards")])
def test_a_page_without_pictures_says_why(tmp_path: Path, with_checkpoint: bool, words: str):
    config = pretraining("no_such_shards")
    folder = write_run(tmp_path / "pretrained", config)
    if with_checkpoint:
        write_checkpoint(folder, config)
    text = page_of(tmp_path / "page.html", folder).words
    assert "There are none: " in text
    assert words in text
    assert "frame loss" in text, "the curves are there all the same"


def test_a_damaged_checkpoint_leaves_out_the_pictures_alone(shards: Path, tmp_path: Path):
    config = pretraining(shards)
    folder = write_run(tmp_path / "pretrained", config)
    write_checkpoint(folder, config)
    (path,) = folder.glob("checkpoints/*/teacher.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert "none of the 1 checkpoints" in page_of(tmp_path / "page.html", folder).words


def test_names_labels_and_stories_are_text_and_confusions_are_named(judged: Path, tmp_path: Path):
    page = page_of(tmp_path / "page.html", judged)
    rows = cells_of(tmp_path / "page.html")
    first = rows.index(["rain &amp; &lt;wind&gt;", "siren", "2", "4"])
    assert rows[first + 1] == ["dog", "rain &amp; &lt;wind&gt;", "1", "4"], "the most frequent first"
    assert "<b>&'tags'" in page.words
    assert "<script>alert(1)</script>" in page.words
    assert "rain & <wind>" in page.words
    assert "b" not in page.num


def test_held_out_figures_are_those_of_the_evaluation_and_else_the_newest(judged: Path, tmp_path: Path):
    figures = {"clips": 12, "classes": 3}
    lines = line("valid", 4, accuracy=0.5, mAP=0.5, **figures), line("valid", 8, accuracy=0.25, mAP=0.375, **figures)
    other = write_run(tmp_path / "other", finetuning(), *lines)
    page_of(tmp_path / "page.html", judged, other)
    rows = [cells[1:] for cells in cells_of(tmp_path / "page.html")]
    assert ["75.0 %", "0.812", "shards:test", "evaluation.json", "12", "3", "33.3 %", "8"] in rows
    assert ["25.0 %", "0.375", "shards:test", "valid", "12", "3", "33.3 %", "8"] in rows


def test_figures_on_the_test_set_stand_for_the_run_and_say_whose_weights_they_are(judged: Path, tmp_path: Path):
    figures = {"clips": 12, "classes": 3}
    lines = (
        line("valid", 4, accuracy=0.75, mAP=0.75, **figures),
        line("valid", 8, accuracy=0.5, mAP=0.5, **figures),
        line("test", 8, accuracy=0.125, mAP=0.125, **figures),
        line("test_best", 8, accuracy=0.25, mAP=0.25, best_step=4, **figures),
    )
    config = finetuning("data.valid=shards:valid", 'data.test=["a:test","b:test"]', "run.keep_best=accuracy")
    page = page_of(tmp_path / "page.html", write_run(tmp_path / "chosen", config, *lines), judged)
    rows = [cells for cells in cells_of(tmp_path / "page.html") if cells[0] == "chosen"]
    best = ["chosen", "25.0 %", "0.250", "a:test, b:test", "test, best on valid", "12", "3", "33.3 %", "4"]
    last = ["chosen", "12.5 %", "0.125", "a:test, b:test", "test, last", "12", "3", "33.3 %", "8"]
    assert rows[:2] == [best, last]
    assert "held out accuracy 25.0 %, mAP 0.250" in page.words
    assert "50.0 %" not in page.words, "what chose the step does not stand for it"


def test_an_evaluation_stands_beside_the_figures_on_the_test_set_and_says_that_it_heard_all(
    judged: Path, tmp_path: Path
):
    found = json.loads((judged / "evaluation.json").read_text()) | {"chunks": True}
    (judged / "evaluation.json").write_text(json.dumps(found))
    (judged / "metrics.jsonl").unlink()
    JsonLines(judged / "metrics.jsonl").write(line("test", 8, accuracy=0.5, mAP=0.5, clips=9, classes=3))
    config = finetuning("data.test=other:test")
    (judged / "config.json").write_text(dump_config(config))
    page = page_of(tmp_path / "page.html", judged)
    rows = [cells[1:5] for cells in cells_of(tmp_path / "page.html")]
    assert ["75.0 %", "0.812", "shards:test, chunks", "evaluation.json"] in rows
    assert ["50.0 %", "0.500", "other:test", "test, last"] in rows
    assert "held out accuracy 75.0 %" in page.words


def test_the_probe_stands_for_a_pre_training(tmp_path: Path):
    probe = line("probe", 8, knn_accuracy=0.5, linear_accuracy=0.625)
    config = pretraining("nowhere", 'probe={"train": "env:a", "test": "env:b"}')
    page_of(tmp_path / "page.html", write_run(tmp_path / "run", config, probe))
    assert ["run", "50.0 %", "62.5 %", "accuracy", "env:b", "8"] in cells_of(tmp_path / "page.html")


@pytest.mark.parametrize(
    "wrong", [{"labels": LABELS[:2]}, {"labels": None}, {"confusion": [[1], [2, 3]]}, {"confusion": "none"}]
)
def test_a_matrix_that_does_not_fit_its_labels_is_none(judged: Path, wrong: dict[str, Any]):
    path = judged / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    (found,) = read_runs([judged])
    assert confusions(found) is None


def test_the_keys_in_which_runs_differ_are_those_that_were_changed(tmp_path: Path):
    changed = ("optimizer.lr=0.002", "data.augment.roll=true", "objective.init_from=runs/a", "run.folder=elsewhere")
    runs = read_runs([write_run(tmp_path / "a", finetuning("objective.init_from=")),
                      write_run(tmp_path / "b", finetuning(*changed))])  # fmt: skip
    found = differences(runs)
    assert found.pop("objective.init_from") == ["", "runs/a"]
    assert found.pop("data.augment.roll") == [False, True]
    assert found.pop("optimizer.lr")[1] == 0.002
    assert not found


def test_passwords_in_locations_are_not_on_the_page(tmp_path: Path):
    address = "https://user:secret@host/x?sig=secret"
    config = finetuning(f"data.train={address}:train", f"data.valid={address}:test")
    folders = [write_run(tmp_path / name, config) for name in ("a", "b")]
    folders.append(write_run(tmp_path / "c", finetuning()))
    (folders[0] / "evaluation.json").write_text(json.dumps({"data": f"{address}:test", "step": 8, "clips": 12}))
    for chosen in (folders[:1], folders):
        page = page_of(tmp_path / "page.html", *chosen)
        assert "https://host/x" in page.words
        assert "secret" not in (tmp_path / "page.html").read_text()


def test_long_values_are_folded(tmp_path: Path):
    parts = json.dumps([f"shards/part{number}:train" for number in range(9)])
    folders = [write_run(tmp_path / "a", finetuning()), write_run(tmp_path / "b", finetuning(f"data.train={parts}"))]
    page = page_of(tmp_path / "page.html", *folders)
    assert page.num["details"] == 3, "the value, and both configurations as a whole"


def test_steps_that_a_continued_run_did_again_count_once():
    entries = [
        line("train", step, loss=loss) for step, loss in ((2, 9), (4, 8), (6, 7), (4, 5), (6, 4), (8, 3), (8, 2))
    ]
    assert [(entry["step"], entry["loss"]) for entry in without_repeats(entries)] == [(2, 9), (4, 5), (6, 4), (8, 2)]


def test_hours_are_those_of_the_clips_at_the_rates_on_record(tmp_path: Path):
    (found,) = read_runs([write_run(tmp_path / "run", finetuning())])
    assert training_hours(found) == pytest.approx(8 * 8 / 40 / 3600, rel=1e-12)  # steps x clips / rate


def test_a_long_curve_is_shown_as_means_of_neighbours():
    entries = [line("train", step, loss=0.5 * step) for step in range(1, 3 * MOST_POINTS + 1)]
    steps, values = points(entries, Curve("train", "loss", "", factor=2.0))
    assert np.array_equal(steps, np.arange(2, 3 * MOST_POINTS, 3))
    assert np.array_equal(values, steps)
    assert [len(one) for one in points(entries[:MOST_POINTS], Curve("train", "lr", ""))] == [0, 0]


def test_a_figure_that_was_not_finite_is_a_gap(tmp_path: Path):
    gap = line("train", 10, loss=None, not_finite=["loss"], clips_per_s=1.0)
    page = page_of(tmp_path / "page.html", write_run(tmp_path / "run", finetuning(), gap))
    assert "training loss" in page.words


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path):
    folder = write_run(tmp_path / "run", finetuning())
    (folder / "metrics.jsonl").write_text("")
    text = page_of(tmp_path / "page.html", folder).words
    assert "No line of training is on record yet" in text
    assert "No run has been evaluated on labels yet" in text


def test_runs_of_one_name_are_told_apart_by_their_folders():
    assert distinct_names([Path("x/a/run"), Path("x/b/run"), Path("y/b/last")]) == ["a/run", "b/run", "b/last"]
    assert distinct_names([Path("x/a/run")]) == ["run"]


def test_more_runs_than_colours_differ_in_their_dashes():
    looks = [look(number) for number in range(20)]
    assert len(set(looks)) == 20


def test_a_disk_that_fills_up_leaves_the_page_that_was_there(judged: Path, tmp_path: Path):
    out = tmp_path / "pages" / "page.html"
    page_of(out, judged)
    before = out.read_bytes()
    with room_for(4096):
        done = report(judged, "--out", out)
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: File too large; free space, or choose another place to write to\n"
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert out.read_bytes() == before


def test_a_page_goes_through_links_and_to_what_is_no_file(judged: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    (tmp_path / "link.html").symlink_to(page)
    assert report(judged, "--out", tmp_path / "link.html").code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert (tmp_path / "link.html").is_symlink()
    (tmp_path / "null").symlink_to("/dev/null")
    assert report(judged, "--out", tmp_path / "null").code == 0
    assert Path("/dev/null").is_char_device()


def test_what_is_no_run_is_one_sentence_and_no_page(judged: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    no_run = report(judged, tmp_path / "empty", "--out", out)
    twice = report(judged, judged, "--out", out)
    (judged / "evaluation.json").write_text("{")
    damaged = report(judged, "--out", out)
    (judged / "evaluation.json").write_text('{"accuracy": "good"}')
    no_number = report(judged, "--out", out)
    sentences = (
        "is not the folder of a run",
        "is given twice",
        "is not valid JSON",
        "accuracy is 'good', not a number",
    )
    for done, words in zip((no_run, twice, damaged, no_number), sentences, strict=True):
        assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert not out.exists()
