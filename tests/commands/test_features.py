"""asda features from the outside: what it writes, keeps, refuses, and goes on with."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from tiny_tools import TINY, Done, noise, one_core, room_for, run, wav, write_broken, write_pretrained, write_tagger

import asda
from asda.data.audio.waves import AudioError
from asda.data.feature_files import Array, write_npz, write_safetensors
from asda.inference import Model

pytestmark = pytest.mark.usefixtures(one_core.__name__)
# Of the same clip in batches of other sizes: matrix products of other shapes round in another order. A sum of n
# products errs by sqrt(n) eps / 2 on average, n = 112 in the widest layer here and eps = 1.2e-7: 6e-7 of the rms, and
# again in each of four products of three blocks: 2e-6. Five times that for the spread.
BATCH_ROUNDING = 1e-5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretrained(tmp_path_factory.mktemp("weights") / "pretrained")


@pytest.fixture(scope="module")
def model(weights: Path) -> Model:
    return asda.load(weights)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """dog/a.wav (2 s, more than a chunk), dog/b.flac (48 kHz), rain.wav."""
    wav(tmp_path / "recordings" / "dog" / "a.wav", noise(2, seed=1))
    wav(tmp_path / "recordings" / "dog" / "b.flac", noise(1, rate_hz=48_000, seed=2), rate_hz=48_000)
    wav(tmp_path / "recordings" / "rain.wav", noise(0.7, seed=3))
    return tmp_path / "recordings"


def extract(*arguments: object) -> Done:
    return run("features", *arguments)


def succeed(*arguments: object) -> Done:
    done = extract(*arguments)
    assert done.code == 0, done.err
    return done


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and metadata, as --help says that they are read."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("metadata.json")))
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["metadata"])  # noqa: SIM118


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("extension", ["npz", "safetensors"])
def test_a_folder_becomes_a_file_of_features_per_recording(
    recordings: Path, weights: Path, model: Model, tmp_path: Path, extension: str
):
    out = tmp_path / "out"
    done = succeed("--model", weights, "--out", out, "--format", extension, recordings)
    assert set(files_of(out)) == {"features.json", *(f"{n}.{extension}" for n in ("dog/a", "dog/b", "rain"))}
    assert done.out.startswith("3 clips in ")
    arrays, metadata = read(out / f"dog/a.{extension}")
    assert list(arrays) == ["features"]
    assert np.array_equal(arrays["features"], model.features(noise(2, seed=1), 16_000).utterance.numpy())
    assert metadata["clips"] == {"features": {"shape": [TINY.width], "duration_s": 2.0}}
    assert metadata["source"]["path"] == str(recordings / "dog/a.wav")
    assert (metadata["model"], metadata["weights"]) == (str(weights), "student")
    arrays, metadata = read(out / f"dog/b.{extension}")
    assert np.array_equal(
        arrays["features"], model.features(noise(1, rate_hz=48_000, seed=2), 48_000).utterance.numpy()
    )


@pytest.mark.parametrize("layer", [0, 2, None])
def test_granularities_have_their_shapes_and_layers_are_those_of_the_api(
    recordings: Path, weights: Path, model: Model, tmp_path: Path, layer: int | None
):
    expected = model.features(noise(2, seed=1), 16_000, layer)
    num_patches = -(-(1 + (32_000 - 400) // 160) // 16)  # of 16 frames, the last filled up
    shapes = {
        "utterance": (TINY.width,),
        "frame": (num_patches, TINY.width),
        "patch": (num_patches, 8, TINY.width),
    }
    of = {"utterance": expected.utterance, "frame": expected.frames, "patch": expected.patches}
    for granularity, shape in shapes.items():
        out = tmp_path / granularity
        chosen = [] if layer is None else ["--layer", layer]
        succeed("--model", weights, "--out", out, "--granularity", granularity, *chosen, recordings / "dog" / "a.wav")
        arrays, metadata = read(out / "a.npz")
        assert arrays["features"].dtype == np.float32
        assert arrays["features"].shape == shape == tuple(metadata["clips"]["features"]["shape"])
        assert np.array_equal(arrays["features"], of[granularity].numpy())
        assert (metadata["granularity"], metadata["layer"]) == (granularity, 3 if layer is None else layer)
        times_s = metadata["first_s"] + metadata["hop_s"] * np.arange(num_patches)
        assert times_s == pytest.approx(expected.times_s.numpy(), abs=1e-6)  # of 2 s in fp32


def test_the_teacher_is_another_network_than_the_student(recordings: Path, weights: Path, tmp_path: Path):
    sound = recordings / "rain.wav"
    succeed("--model", weights, "--out", tmp_path / "out", "--weights", "teacher", sound)
    teacher = asda.load(weights, weights="teacher").features(noise(0.7, seed=3), 16_000).utterance.numpy()
    assert np.array_equal(read(tmp_path / "out" / "rain.npz")[0]["features"], teacher)


def test_shards_have_the_features_and_labels_of_their_audio_files(
    shards: Path, weights: Path, model: Model, tmp_path: Path
):
    arguments = ("--model", weights, "--granularity", "frame")
    succeed(*arguments, "--out", tmp_path / "shards", f"{shards}:train+test")
    succeed(*arguments, "--out", tmp_path / "files", shards.parent / "audio")
    shard_files = sorted((tmp_path / "shards").glob("*.npz"))
    assert [path.stem for path in shard_files] == ["test-000000", "train-000000", "train-000001", "train-000002"]
    num_clips = 0
    for path in shard_files:
        arrays, metadata = read(path)
        for key, found in arrays.items():
            name, _, number = key.rpartition("_")  # the class's folder and the file's name
            (expected, *_), _ = read(tmp_path / "files" / name / f"{number}.npz")[0].values(), None
            difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert difference <= BATCH_ROUNDING, key
            assert metadata["clips"][key]["shape"] == list(found.shape)
            assert metadata["clips"][key]["labels"] == [name]
            num_clips += 1
    assert num_clips == 64


DIES_WHILE_WRITING_ITS_THIRD_FILE = """
import os, signal, sys
from asda.commands import features
replace, calls = os.replace, []
def dying_replace(old, new):
    calls.append(new)
    if len(calls) == 4:  # after the settings and two files
        os.truncate(old, os.path.getsize(old) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = dying_replace
features.main()
"""


@pytest.mark.parametrize("extension", ["npz", "safetensors"])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    shards: Path, weights: Path, tmp_path: Path, extension: str
):
    arguments = ["--model", weights, "--granularity", "patch", "--format", extension, f"{shards}:train+test"]
    succeed(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", DIES_WHILE_WRITING_ITS_THIRD_FILE, *map(str, arguments), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole, found = files_of(tmp_path / "whole"), files_of(out)
    (half,) = found.keys() - whole.keys()
    assert half.startswith(f"train-000002.{extension}.")
    assert half.endswith(".tmp")
    del found[half]
    assert set(found) == {"features.json", f"train-000000.{extension}", f"train-000001.{extension}"}
    assert found.items() <= whole.items()
    written_ns = {name: (out / name).stat().st_mtime_ns for name in found}

    assert "32 clips were already extracted" in succeed(*arguments, "--out", out).out
    assert files_of(out) == whole
    assert written_ns == {name: (out / name).stat().st_mtime_ns for name in found}, "finished files are not touched"
    assert succeed(*arguments, "--out", out).out.startswith("64 of 64 clips are already extracted")


def test_bytes_do_not_depend_on_the_hour(recordings: Path, weights: Path, tmp_path: Path):
    succeed("--model", weights, "--out", tmp_path / "out", recordings / "rain.wav")
    with zipfile.ZipFile(tmp_path / "out" / "rain.npz") as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_features_of_other_settings_or_models_are_never_mixed(recordings: Path, weights: Path, tmp_path: Path):
    out = tmp_path / "out"
    common = ("--out", out, recordings / "rain.wav")
    succeed("--model", weights, *common)
    before = files_of(out)
    other = write_tagger(tmp_path / "other")
    same = shutil.copytree(weights, tmp_path / "same")
    cases = {
        "layer 3, not 1": ("--model", weights, "--layer", 1),
        "granularity utterance, not patch": ("--model", weights, "--granularity", "patch"),
        "weights student, not teacher": ("--model", weights, "--weights", "teacher"),
        "file_format npz, not safetensors": ("--model", weights, "--format", "safetensors"),
        f"another model ({weights})": ("--model", other),
    }
    for words, arguments in cases.items():
        done = extract(*arguments, *common)
        assert (done.code, done.out) == (2, ""), words
        (line,) = done.err.splitlines()
        assert words in line
        assert "--out" in line
    assert succeed("--model", same, *common).out.startswith("1 of 1 clips"), "a copy of the model is the same model"
    assert files_of(out) == before


def test_features_of_other_audio_of_the_same_name_are_not_taken_for_finished(
    recordings: Path, weights: Path, tmp_path: Path
):
    arguments = ("--model", weights, "--out", tmp_path / "out")
    succeed(*arguments, recordings)
    wav(recordings / "rain.wav", noise(0.7, seed=4))
    (tmp_path / "out" / "dog" / "b.npz").write_bytes(b"damaged")
    done = extract(*arguments, recordings)
    assert done.code == 2
    first, second, last = done.err.splitlines()
    assert f"error: {recordings}/dog/b.flac: its features {tmp_path}/out/dog/b.npz cannot be read" in first
    assert f"error: {recordings}/rain.wav: the features {tmp_path}/out/rain.npz were made from other audio" in second
    assert last == "error: 2 of 3 inputs cannot be used"


def test_broken_files_and_damaged_shards_are_named_and_the_rest_is_done(
    shards: Path, recordings: Path, weights: Path, tmp_path: Path
):
    copied = shutil.copytree(shards, tmp_path / "shards")
    damaged = bytearray((copied / "train-000001.tar.zst").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copied / "train-000001.tar.zst").write_bytes(damaged)
    (recordings / "rain.wav").write_text("no sound")
    done = extract(
        "--model", weights, "--out", tmp_path / "out", recordings, f"{copied}:train", tmp_path / "missing.wav"
    )
    assert done.code == 2
    made = {"dog/a.npz", "dog/b.npz", "train-000000.npz", "train-000002.npz"}
    assert set(files_of(tmp_path / "out")) == {"features.json", *made}
    lines = done.err.splitlines()
    starts = [recordings / "rain.wav", copied / "train-000001.tar.zst", tmp_path / "missing.wav"]
    assert len(lines) == 4
    for line, path in zip(lines, starts, strict=False):
        assert line.startswith("error: ")
        assert line.count(str(path)) == 1
    assert lines[-1] == "error: 3 of 7 inputs cannot be used"


def test_a_path_that_cannot_be_looked_at_is_named_and_the_others_are_done(
    recordings: Path, weights: Path, tmp_path: Path
):
    long = tmp_path / f"{'x' * 300}.wav"
    for _ in range(2):  # the second run keeps what the first has made
        done = extract("--model", weights, "--out", tmp_path / "out", long, recordings / "rain.wav")
        assert done.code == 2
        assert done.err.splitlines() == [
            f"error: {long}: cannot be read: File name too long",
            "error: 1 of 2 inputs cannot be used",
        ]
        assert set(files_of(tmp_path / "out")) == {"features.json", "rain.npz"}


def test_features_whose_source_cannot_be_looked_at_any_more_are_named(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ("--model", weights, "--out", tmp_path / "out", recordings)
    succeed(*arguments)

    def refusing(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("asda.system.hash_file", refusing)
    from asda.commands.features import hash_file

    with pytest.raises(AudioError, match="cannot be read: Permission denied"):
        hash_file(recordings / "rain.wav")


@pytest.mark.parametrize("left", ["features.json.123.tmp", "dog/"])
def test_what_a_run_leaves_that_was_killed_before_its_first_file_is_no_obstacle(
    recordings: Path, weights: Path, tmp_path: Path, left: str
):
    path = tmp_path / "out" / left
    path.parent.mkdir(parents=True)
    path.mkdir() if left.endswith("/") else path.write_text("half")
    succeed("--model", weights, "--out", tmp_path / "out", recordings)
    assert set(files_of(tmp_path / "out")) == {"features.json", "dog/a.npz", "dog/b.npz", "rain.npz"}


def test_the_settings_are_written_before_any_folder_of_the_features(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, content: bytes) -> None:
        assert not list(path.parent.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asda.commands.features.write_whole_file", full)
    assert extract("--model", weights, "--out", tmp_path / "out", recordings).code == 2
    assert not list((tmp_path / "out").iterdir())


def test_the_same_weights_with_another_front_end_are_another_model(recordings: Path, weights: Path, tmp_path: Path):
    other = shutil.copytree(weights, tmp_path / "other")
    about = json.loads((other / "config.json").read_text())
    about["data"]["log_mel"]["std"] *= 2
    (other / "config.json").write_text(json.dumps(about))
    (other / "manifest.json").unlink(missing_ok=True)
    succeed("--model", weights, "--out", tmp_path / "out", recordings / "rain.wav")
    done = extract("--model", other, "--out", tmp_path / "out", recordings / "rain.wav")
    assert done.code == 2
    assert "features of another model" in done.err


def test_every_kind_of_broken_audio_is_one_sentence_and_leaves_no_folder(weights: Path, tmp_path: Path):
    for path, words in write_broken(tmp_path / "broken").values():
        done = extract("--model", weights, "--out", tmp_path / "out", path)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert line.startswith(f"error: {path}: "), line
        assert words in line
        assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_sentence(shards: Path, recordings: Path, weights: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(recordings, tmp_path / "again")
    sound = recordings / "rain.wav"
    cases = {
        "holds no audio file": ("--model", weights, tmp_path / "empty"),
        "there is no checkpoint in": ("--model", tmp_path / "nowhere", sound),
        "--layer 4 must be from 0 to 3": ("--model", weights, "--layer", 4, sound),
        "would both become dog/a": ("--model", weights, recordings, tmp_path / "again"),
        "--channel -1 must be at least 0": ("--model", weights, "--channel", -1, sound),
        "has clips of one channel; leave it out": ("--model", weights, "--channel", 0, f"{shards}:test"),
        "name its splits (test, train)": ("--model", weights, shards),
        "has no split 'nope'": ("--model", weights, f"{shards}:nope"),
        "holds files but no features.json": ("--model", weights, "--out", recordings, sound),
        "is not a folder": ("--model", weights, "--out", tmp_path / "file", sound),
        "has no teacher": ("--model", write_tagger(tmp_path / "tagger"), "--weights", "teacher", sound),
    }
    for words, arguments in cases.items():
        done = extract("--out", tmp_path / "out", *arguments)
        assert (done.code, done.out) == (2, ""), words
        (line,) = done.err.splitlines()
        assert words in line
        assert not (tmp_path / "out").exists()


def spooled(arrays: dict[str, np.ndarray]) -> tuple[io.BytesIO, dict[str, Array]]:
    spool, places = io.BytesIO(), {}
    for key, array in arrays.items():
        places[key] = Array(array.shape, spool.tell())
        spool.write(array.tobytes())
    return spool, places


def test_no_key_of_a_clip_is_special_in_an_npz(tmp_path: Path):
    arrays = {key: np.full(3, number, np.float32) for number, key in enumerate(("file", "metadata", "allow_pickle"))}
    with (tmp_path / "a.npz").open("wb") as file:
        write_npz(file, *spooled(arrays), "{}")
    found, metadata = read(tmp_path / "a.npz")
    assert metadata == {}
    assert all(np.array_equal(found[key], arrays[key]) for key in arrays)
    assert len(found) == 3


@pytest.mark.parametrize("shapes", [[(7,)], [(0, 3), (5, 8, 3), (1,)], [(2, 3)] * 12])
def test_the_bytes_of_both_formats_are_those_of_the_libraries(shapes: list[tuple[int, ...]]):
    rng = np.random.default_rng(0)
    names = ["clip", "b.\u00e9\u9ce5", 'quote"\\', *(f"k{number}" for number in range(20))]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=False)}
    metadata = json.dumps({"source": {"path": 'a "b"\\\udcff\u00e9/x\n'}, "clips": {"shape": [1]}})
    file = io.BytesIO()
    write_safetensors(file, *spooled(arrays), metadata)
    assert file.getvalue() == safetensors.numpy.save(arrays, {"metadata": metadata})
    file = io.BytesIO()
    write_npz(file, *spooled(arrays), metadata)
    with zipfile.ZipFile(file) as archive:
        for name, array in arrays.items():
            expected = io.BytesIO()
            np.lib.format.write_array(expected, array)
            assert archive.read(f"{name}.npy") == expected.getvalue()


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
@pytest.mark.parametrize("granularity", ["utterance", "frame", "patch"])
def test_features_of_a_long_file_go_through_the_disk_and_are_those_of_the_api(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str, granularity: str
):
    monkeypatch.setattr("asda.commands.features.SPOOL_BYTES", 100)
    monkeypatch.setattr("asda.data.feature_files.COPY_BYTES", 1000)
    path = wav(tmp_path / "long.wav", noise(40, rate_hz=22_050), rate_hz=22_050)
    options = ("--granularity", granularity, "--format", file_format)
    assert extract("--model", weights, "--out", tmp_path / "out", *options, path).code == 0
    arrays, metadata = read(tmp_path / "out" / f"long.{file_format}")
    of_api = asda.load(weights).features(path)
    expected = {"utterance": of_api.utterance, "frame": of_api.frames, "patch": of_api.patches}[granularity]
    assert np.array_equal(arrays["features"], expected.numpy())
    assert metadata["clips"]["features"]["duration_s"] == 40
    assert [each.name for each in (tmp_path / "out").iterdir()] == [f"long.{file_format}", "features.json"]


def test_every_name_that_a_file_may_have_is_that_of_its_features(weights: Path, tmp_path: Path):
    names = [
        "x.wav",
        "x.flac",
        "x.mp3.wav",
        "-dash.wav",
        "new\nline.wav",
        "quo'te\".wav",
        "\udcff.wav",
        "\U0001f415.wav",
    ]
    (tmp_path / "in").mkdir()
    names += ["a" * 251 + ".wav", "\u9ce5" * 83 + ".au", "b" * 252 + ".au"]
    for name in names:
        wav(tmp_path / "a.wav", noise(0.5)).rename(tmp_path / "in" / name)
    for _ in range(2):  # the second time, all are kept
        done = extract("--model", weights, "--out", tmp_path / "out", "--format", "safetensors", tmp_path / "in")
        assert done.code == 0, done.err
        (line,) = done.err.splitlines()
        assert "their features keep the extension" in line
    assert "nothing to do" in done.out
    written = [path for path in (tmp_path / "out").iterdir() if path.name != "features.json"]
    assert len(written) == len(names)
    assert {Path(read(path)[1]["source"]["path"]).name for path in written} == set(names)
    assert {"x.wav.safetensors", "x.flac.safetensors", "x.mp3.safetensors"} <= {path.name for path in written}


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), MemoryError(), KeyError("x")])
def test_an_error_that_nobody_expected_costs_one_file(weights: Path, tmp_path: Path, monkeypatch, error: Exception):
    bad, good = wav(tmp_path / "a.wav", noise(1)), wav(tmp_path / "b.wav", noise(1))
    duration_s = Model.duration_s

    def failing(self: Model, path: Path):
        if path == bad:
            raise error
        return duration_s(self, path)

    monkeypatch.setattr(Model, "duration_s", failing)
    done = extract("--model", weights, "--out", tmp_path / "out", bad, good)
    assert done.code == 2
    assert (tmp_path / "out" / "b.npz").exists()
    assert done.err.startswith(f"error: {bad}: {type(error).__name__}: ")
    assert "please report it" in done.err


def test_one_channel_is_chosen_and_is_a_setting_of_the_folder(weights: Path, tmp_path: Path):
    left_S, right_S = noise(1, seed=1), noise(1, seed=2)
    path = wav(tmp_path / "a.wav", np.stack([left_S, right_S], axis=1))
    assert extract("--model", weights, "--out", tmp_path / "out", "--channel", 1, path).code == 0
    expected_D = asda.load(weights).features(right_S, 16_000).utterance
    assert np.array_equal(read(tmp_path / "out" / "a.npz")[0]["features"], expected_D.numpy())
    done = extract("--model", weights, "--out", tmp_path / "out", path)
    assert (done.code, "channel 1, not None" in done.err) == (2, True)


ODD_NAMES = (
    "line\nbreak.wav", "-dash.wav", "'quotes\".wav", "caf\udce9.wav", "🐕.wav", " space .wav", "a..wav", "%s{}.wav",
)  # fmt: skip


@pytest.mark.parametrize("extension", ["npz", "safetensors"])
def test_any_name_that_the_disk_allows_becomes_a_file(weights: Path, tmp_path: Path, extension: str):
    sounds, out = tmp_path / "sounds", tmp_path / "out"
    longest = ("x" * 251, "鳥" * 83 + "xx", "\udce9" * 251)  # of 251 bytes; and two that are cut to one beginning
    names = [*ODD_NAMES, *(f"{name}.wav" for name in longest), f"{'x' * 250}y.wav"]
    for number, name in enumerate(names):
        wav(sounds / "plain.wav", noise(0.3, seed=number)).rename(sounds / name)
    for again in range(2):
        done = succeed("--model", weights, "--out", out, "--format", extension, sounds)
        assert f"{len(names)} " in done.out, again
        assert done.err == ""
    found = {read(path)[1]["source"]["path"]: path for path in out.glob(f"*.{extension}")}
    assert set(found) == {str(sounds / name) for name in names}
    assert not list(out.glob("*.tmp"))
    for name in ODD_NAMES:
        assert found[str(sounds / name)].name == f"{name.removesuffix('.wav')}.{extension}"
    assert max(len(os.fsencode(path.name)) for path in found.values()) <= 255


def test_inputs_that_differ_only_in_their_extension_keep_it(recordings: Path, weights: Path, tmp_path: Path):
    for name in ("a.flac", "a.wav.wav", "c.aiff"):
        shutil.copy(recordings / "dog" / "a.wav", recordings / "dog" / name)
    done = succeed("--model", weights, "--out", tmp_path / "out", recordings)
    names = {"dog/a.wav.npz", "dog/a.flac.npz", "dog/a.wav.wav.npz", "dog/b.npz", "dog/c.npz", "rain.npz"}
    assert set(files_of(tmp_path / "out")) == {"features.json", *names}
    first = recordings / "dog" / "a.flac"
    assert done.err == f"3 files share their name, such as {first}; their features keep the extension\n"
    assert read(tmp_path / "out/dog/a.flac.npz")[1]["source"]["path"] == str(recordings / "dog/a.flac")
    assert "6 of 6 clips are already" in succeed("--model", weights, "--out", tmp_path / "out", recordings).out


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_full_disk_or_a_stop_ends_the_run(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("asda.commands.features.finish", fails)
    done = extract("--model", weights, "--out", tmp_path / "out", recordings)
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(done.err.splitlines()) == 1


def test_one_channel_is_taken_where_the_channels_cancel(weights: Path, model: Model, tmp_path: Path):
    left = noise(0.8)
    sound = wav(tmp_path / "sounds" / "anti.wav", np.stack([left, -left], axis=1))
    arguments = ("--model", weights, "--out", tmp_path / "out", sound)
    done = extract(*arguments)
    assert done.code == 2
    assert "cancel each other" in done.err
    assert "--channel 0" in done.err
    succeed(*arguments, "--channel", 0)
    arrays, metadata = read(tmp_path / "out/anti.npz")
    assert np.array_equal(arrays["features"], model.features(left, 16_000).utterance.numpy())
    assert metadata["channel"] == 0
    for channel in ([], ["--channel", 1]):
        done = extract(*arguments, *channel)
        assert f"holds features with channel 0, not {channel[1] if channel else None}" in done.err
    (tmp_path / "new").mkdir()
    done = extract("--model", weights, "--out", tmp_path / "new", sound, "--channel", 2)
    assert "has 2 channels, counted from 0, and no channel 2" in done.err


def test_sounds_that_are_not_read_are_named_once_with_their_count(recordings: Path, weights: Path, tmp_path: Path):
    for name in ("a.mid", "dog/b.mid", "c.dss", "readme.txt", ".hidden.mid"):
        (recordings / name).write_bytes(b"MThd")
    done = succeed("--model", weights, "--out", tmp_path / "out", recordings)
    assert done.err == f"{recordings}: passed over, because asda does not read these formats: 2 .mid, 1 .dss\n"


def test_a_long_file_that_ends_early_leaves_no_half_file(weights: Path, tmp_path: Path):
    sound = wav(tmp_path / "long.wav", noise(100))
    sound.write_bytes(sound.read_bytes()[:-90_001])
    done = extract("--model", weights, "--out", tmp_path / "out", "--granularity", "patch", sound)
    assert done.code == 2
    assert "truncated" in done.err
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"long.wav"}, "what waited is gone"


def test_a_failure_is_one_line_whatever_the_name(weights: Path, tmp_path: Path):
    names = ("a\nb\x1b[0m\udce9.wav", "c.wav")
    for name in names:
        (tmp_path / name).write_text("no sound")
    done = extract("--model", weights, "--out", tmp_path / "out", *(tmp_path / name for name in names))
    first, second, _ = done.err.splitlines()
    assert first.startswith(f"error: {tmp_path}/a\\nb\\x1b[0m\\udce9.wav: libsndfile: ")
    assert second.startswith(f"error: {tmp_path}/c.wav: libsndfile: ")


def test_a_disk_that_fills_up_ends_the_run_and_leaves_no_half_file(
    recordings: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("asda.commands.features.SPOOL_BYTES", 100)
    with room_for(4096):  # a file has 8 patches of 32 features for each of 6 steps: 6 KiB
        done = extract("--model", weights, "--out", tmp_path / "out", "--granularity", "patch", recordings)
    assert done.code == 2
    assert done.err == "error: File too large; free space, or choose another place to write to\n"
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"recordings"}
