"""AudioSet's class names: complete, in the order of the published models, and in the package."""

import csv
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

from launching import ROOT

from asda.data.labels import audioset_labels


def rows() -> list[dict[str, str]]:
    with (files("asda.data") / "audioset_labels.csv").open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def test_there_are_527_classes_numbered_from_0_with_their_own_ids_and_names():
    assert [int(row["index"]) for row in rows()] == list(range(527))
    assert len({row["mid"] for row in rows()}) == len({row["display_name"] for row in rows()}) == 527
    assert (rows()[0]["mid"], rows()[0]["display_name"]) == ("/m/09x0r", "Speech")
    assert audioset_labels() == tuple(row["display_name"] for row in rows())


def test_the_order_is_the_one_in_which_eat_and_asda_number_their_logits(shared: Path):
    folder = shared / "data" / "audioset"
    with (folder / "eat_as20k" / "label_descriptors.csv").open(newline="") as table:
        assert list(csv.reader(table)) == [list(row.values()) for row in rows()]
    assert (folder / "class_labels_indices.csv").read_bytes() == (ROOT / "asda/data/audioset_labels.csv").read_bytes()


def test_a_wheel_holds_the_names_and_whose_they_are(tmp_path: Path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "asda"):
        (tree / name).symlink_to(ROOT / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"asda/data/audioset_labels.csv", "asda/data/audioset_labels.csv.license"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )
