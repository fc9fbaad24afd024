"""The published configurations from raw files to the final table: each dataset in the layout in which people have it.

The network is tiny and takes three steps; data, augmentation, loss, order, schedule and figures are as published.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import soundfile
from forked_ranks import RankServer
from launching import ROOT, environment
from sounds_dataset import write_dataset

from asda.run.log import read_metrics

SMALL = [
    "model.width=32", "model.depth=2", "model.heads=2", "engine.precision=fp32", "engine.micro_batch=4",
    "optimizer.batch=4", "optimizer.steps=3", "optimizer.warmup_steps=1", "run.log_every=1",
]  # fmt: skip
SMALL_PRETRAINING = [
    *SMALL, "objective.target_layers=2", "objective.students=2", "objective.decoder.width=32",
    "objective.decoder.layers=1",
]  # fmt: skip
MIDS = ("/m/07pp_mv", "/m/0395lw", "/m/09xqv", "/m/07r5v4s", "/m/02mk9", "/m/015p6", "/m/07pbtc8", "/m/03kmc9")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    with RankServer() as server:
        yield server


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files of 8 classes x 4 clips of 3 s."""
    folder = tmp_path_factory.mktemp("audio")
    write_dataset(folder, clips_per_class=4, seed=7)
    return {path.name: sorted(path.iterdir()) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def as20k(sounds: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of AudioSet as downloaded: tables of segments, and files named after videos."""
    folder = tmp_path_factory.mktemp("audioset")
    lines: dict[str, list[str]] = {"balanced_train": [], "eval": []}
    names = count()
    for mid, files in zip(MIDS, sounds.values(), strict=True):
        for number, file in enumerate(files):
            video = f"{next(names):011d}"
            place(file, folder / f"audio/Y{video}.wav")
            lines["eval" if number == 3 else "balanced_train"].append(f'{video}, 0.000, 10.000, "{mid},/m/09x0r"')
    for split, rows in lines.items():
        header = ["# made for a test", "# of rows", "# YTID, start_seconds, end_seconds, positive_labels"]
        (folder / f"{split}_segments.csv").write_text("\n".join([*header, *rows]) + "\n")
    splits = ("--split", "train=balanced_train", "--split", "eval")
    return sharded(folder, "audioset", folder, "--audio", folder / "audio", *splits)


@pytest.fixture(scope="module")
def esc50(sounds: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the folder ESC-50-master."""
    folder = tmp_path_factory.mktemp("ESC-50-master")
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for target, (name, files) in enumerate(sounds.items()):
        for fold, file in enumerate(files, 1):
            clip = f"{fold}-{target}{fold}-A-{target}.wav"
            place(file, folder / "audio" / clip)
            rows.append(f"{clip},{fold},{target},{name},False,{target}{fold},A")
    (folder / "meta").mkdir()
    (folder / "meta/esc50.csv").write_text("\n".join(rows) + "\n")
    return sharded(folder, "esc50", folder)


@pytest.fixture(scope="module")
def words(sounds: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the folder of Speech Commands: a folder a word, and two lists."""
    folder = tmp_path_factory.mktemp("speech_commands")
    for name, files in sounds.items():
        for number, file in enumerate(files):
            place(file, folder / name / f"{number:08x}_nohash_0.wav", seconds=1.0)
    for split, number in (("validation", 2), ("testing", 3)):
        (folder / f"{split}_list.txt").write_text("".join(f"{n}/{number:08x}_nohash_0.wav\n" for n in sounds))
    return sharded(folder, "speechcommands", folder)


def place(file: Path, to: Path, seconds: float = 3.0) -> None:
    """The beginning of a file, elsewhere."""
    to.parent.mkdir(parents=True, exist_ok=True)
    samples_S, rate_hz = soundfile.read(file, dtype="int16")
    soundfile.write(to, samples_S[: int(seconds * rate_hz)], rate_hz, subtype="PCM_16")


def sharded(folder: Path, source: str, *more: object) -> Path:
    out = folder / "shards"
    argv = [sys.executable, ROOT / "tools/make_shards.py", "--source", source, "--input", *more, "--out", out]
    subprocess.run(list(map(str, argv)), check=True, capture_output=True, env=environment())
    return out


def run(ranks: RankServer, log: Path, script: str, *arguments: object) -> str:
    """One program, to its end; what it said."""
    rank = ranks.start(0, 0, 0, log, f"asda/{script}", *map(str, arguments))
    assert rank.wait(200) == 0, rank.text()
    return rank.text()


@pytest.fixture(scope="module")
def pretrained(ranks: RankServer, as20k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AudioSet's sound without labels, by the published pre-training."""
    folder = tmp_path_factory.mktemp("runs") / "as2m"
    config = ("--config", ROOT / "configs/as2m.json", f"data.train={as20k}:train", f"run.folder={folder}")
    run(ranks, folder.with_suffix(".log"), "train.py", *config, *SMALL_PRETRAINING)
    return folder


ALL_BUT_ONE = {"train": "fold1+fold2+fold3", "valid": "fold4"}
ON_TEST = {"train": "train", "valid": "test"}
BEST_ON_VALID = {"train": "train", "valid": "valid", "test": "test"}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "dataset", "splits", "figure", "classes"),
    [
        ("as20k_asda", "as20k", {"train": "train", "valid": "eval"}, "mAP", 527),
        ("esc50_asda", "esc50", ALL_BUT_ONE, "accuracy", 8),
        ("spc2_asda", "words", ON_TEST, "accuracy", 8),
        ("esc50_ham", "esc50", ALL_BUT_ONE, "accuracy", 8),
        ("spc2_ast", "words", BEST_ON_VALID, "accuracy", 8),
        ("spc2_ham", "words", BEST_ON_VALID, "accuracy", 8),
    ],
)
def test_a_published_fine_tuning_runs_from_raw_files_to_its_table(
    name: str,
    dataset: str,
    splits: dict[str, str],
    figure: str,
    classes: int,
    ranks: RankServer,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    shards, folder = request.getfixturevalue(dataset), tmp_path / name
    places = [f"run.folder={folder}", *(f"data.{key}={shards}:{split}" for key, split in splits.items())]
    # AST begins with published weights, which are not at hand
    start = request.getfixturevalue("pretrained") if name.endswith("_asda") else ""
    config = ("--config", ROOT / f"configs/{name}.json", f"objective.init_from={start}")
    run(ranks, tmp_path / "train.log", "train.py", *config, *places, *SMALL)
    assert len(read_metrics(folder, "test_best")) == (splits is BEST_ON_VALID)
    table = run(ranks, tmp_path / "evaluate.log", "evaluate.py", "--checkpoint", folder)
    figures = json.loads((folder / "evaluation.json").read_text())
    assert (figures["clips"], figures["classes"]) == (8, classes)
    shown = float(re.search(rf"^{figure} +([\d.]+)", table, re.MULTILINE)[1])  # type: ignore[index]
    assert shown == pytest.approx(figures[figure] * (100 if figure == "accuracy" else 1), abs=0.005)
