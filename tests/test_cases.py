"""Inputs that were handled wrongly, one test for each row of the table in shared/cases/README.md.

Each row stands for a kind; the tests of the rooms, and tests/data/audio/test_mutants.py, try others of the kind.
"""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from conversion import convert
from encoders import FORMATS, sound
from safetensors.torch import load_file
from tiny_tools import Done, noise, one_core, run, wav, write_tagger

from asda.data.audio.read import count_frames, open_audio, read_audio, read_wave, wave_blocks
from asda.data.audio.waves import AudioError
from asda.data.shards.index import DatasetIndex
from asda.data.shards.read import ShardFile, load_dataset
from asda.sharding import workers

pytestmark = pytest.mark.usefixtures(one_core.__name__)

ROOT = Path(__file__).resolve().parents[1]
RATE_HZ = 16_000
MPEG_DELAY = 529 + 1105  # samples: a decoder's, and LAME's, which only LAME's own header tells


@pytest.fixture(scope="module")
def cases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make_cases.py writes."""
    out = tmp_path_factory.mktemp("cases")
    before = sys.argv
    sys.argv = ["make_cases.py", str(out)]
    try:
        runpy.run_path(str(shared / "cases" / "make_cases.py"))
    finally:
        sys.argv = before
    return out


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagger(tmp_path_factory.mktemp("weights") / "tagger")


@pytest.fixture(autouse=True)
def workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written by a thread here: a worker process takes seconds to start."""

    class Threads(ThreadPoolExecutor):
        def __init__(self, num_workers: int, _context: object, _start: object, arguments: tuple[object]):
            super().__init__(num_workers)
            monkeypatch.setattr(workers, "_counts", arguments[0], raising=False)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Threads)


def shards(out: Path, source: str, given: Path, *more: object) -> Done:
    return run("shards", "--source", source, "--input", given, "--out", out, "--workers", 1, *more)


def clips(out: Path) -> dict[str, dict[str, tuple[int, tuple[str, ...]]]]:
    """Split -> key -> (samples, names of the labels)."""
    dataset = load_dataset(out)
    return {split: dict(clips_of(dataset, split)) for split in dataset.splits}


def clips_of(dataset: DatasetIndex, split: str) -> Iterator[tuple[str, tuple[int, tuple[str, ...]]]]:
    for entry in dataset.splits[split].shards:
        index = ShardFile(dataset.folder, entry).index
        for key, samples, labels in zip(index.keys, index.num_samples, index.labels, strict=True):
            yield key, (samples, tuple(dataset.vocabulary[label] for label in labels))


def refused(done: Done, *words: str) -> str:
    """One sentence on stderr, and an exit code that says so."""
    assert done.code != 0
    (sentence,) = done.err.strip().splitlines()[-1:]
    assert sentence.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in sentence, sentence
    return sentence


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


# ---- mp3, ogg, flac, wav: lengths


def mpeg_samples(path: Path, frame: int = 576) -> int:
    with av.open(str(path), "r", format="mp3") as container:
        return frame * sum(packet.size > 0 for packet in container.demux(audio=0))


@pytest.mark.parametrize("name", ["vbr_no_xing", "cbr_no_xing"])
def test_every_frame_of_an_mp3_without_a_count_is_read(cases: Path, name: str):
    path = cases / "mp3" / f"{name}.mp3"
    num_samples = mpeg_samples(path)
    assert abs(num_samples - 10 * RATE_HZ) <= MPEG_DELAY + 576  # the case is as it is meant
    assert 0 <= num_samples - len(read_audio(path)) <= 529
    assert count_frames(path) == (len(read_audio(path)), RATE_HZ)


@pytest.mark.parametrize("name", ["mp3/two_joined.mp3", "ogg/chained_vorbis.ogg"])
def test_joined_files_are_read_whole(cases: Path, name: str):
    assert len(read_audio(cases / name)) == count_frames(cases / name)[0] == 20 * RATE_HZ


@pytest.mark.parametrize(
    "name",
    ["flac/says_half.flac", "flac/unknown_length.flac", "wav/data_size_0.wav", "wav/bw64.wav", "mp3/behind_zeros.mp3"],
)
def test_ten_seconds_are_read_whatever_the_header_says(cases: Path, name: str):
    assert len(read_audio(cases / name)) == count_frames(cases / name)[0] == 10 * RATE_HZ
    with open_audio(cases / name) as recording:
        assert sum(map(len, recording.blocks())) == 10 * RATE_HZ


def test_shards_hold_every_second_of_the_odd_files(cases: Path, tmp_path: Path):
    paths = [path for folder in ("mp3", "ogg", "flac", "wav", "stereo", "codec") for path in (cases / folder).iterdir()]
    table(tmp_path / "all.csv", "path,label", *(f"{path},{path.parent.name}" for path in sorted(paths)))
    done = shards(tmp_path / "shards", "csv", tmp_path / "all.csv", "--split", "train")
    assert done.code in (0, 1, 2), done.err
    assert "Traceback" not in done.err
    assert "cancels.wav" in done.err
    assert "unknown_codec.webm" in done.err
    # Two classes have lost their only clip, which is an error of its own; what was read is in the table nevertheless.
    good = sorted(path for path in paths if path.parent.name not in ("stereo", "codec"))
    table(tmp_path / "read.csv", "path,label", *(f"{path},{path.parent.name}" for path in good))
    done = shards(tmp_path / "read", "csv", tmp_path / "read.csv", "--split", "train")
    assert done.code == 0, done.err
    seconds = sorted(round(samples / RATE_HZ) for samples, _ in clips(tmp_path / "read")["train"].values())
    assert seconds == [10] * 7 + [20] * 2


# ---- signals and codecs


def test_channels_that_cancel_are_named_and_one_is_chosen_on_request(cases: Path, tmp_path: Path, tagger: Path):
    path = cases / "stereo" / "cancels.wav"
    with pytest.raises(AudioError, match=r"channels cancel each other: .*--channel 0"):
        read_audio(path)
    assert np.abs(read_wave(path, channel=1)[0]).max() > 0.1
    refused(run("predict", "--model", tagger, path), "cancel", "--channel 0")
    table(tmp_path / "all.csv", "path,label", f"{path},noise")
    done = shards(tmp_path / "shards", "csv", tmp_path / "all.csv", "--split", "train", "--channel", 1)
    assert done.code == 0, done.err
    assert [samples for samples, _ in clips(tmp_path / "shards")["train"].values()] == [10 * RATE_HZ]


def test_clips_of_digital_silence_are_counted_and_named_once(tmp_path: Path):
    for number in range(5):
        wav(tmp_path / "audio" / f"{number}.wav", noise(1, seed=number) * (number > 2))
    done = shards(tmp_path / "shards", "folder", tmp_path / "audio", "--split", "train")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert len(re.findall(r"\b3 clips\b.*digital silence", said)) == 1, said


@pytest.fixture
def with_unknown_codec(cases: Path, tmp_path: Path) -> Path:
    """A folder of two good files and one whose codec nobody knows, in the middle."""
    for name in ("a", "c"):
        wav(tmp_path / "audio" / f"{name}.wav", noise(1))
    shutil.copy(cases / "codec" / "unknown_codec.webm", tmp_path / "audio" / "b.webm")
    return tmp_path / "audio"


def test_a_file_of_an_unknown_codec_costs_that_file(with_unknown_codec: Path, tagger: Path, tmp_path: Path):
    done = run("predict", "--model", tagger, "--json", with_unknown_codec)
    assert [Path(json.loads(line)["file"]).name for line in done.out.splitlines()] == ["a.wav", "c.wav"]
    refused(done, "1 of 3")
    done = run("features", "--model", tagger, "--out", tmp_path / "features", with_unknown_codec)
    assert sorted(path.stem for path in (tmp_path / "features").glob("*.npz")) == ["a", "c"]
    refused(done, "1 of 3")
    done = shards(tmp_path / "shards", "folder", with_unknown_codec, "--split", "train")
    assert done.code == 0, done.err
    assert done.err.count("b.webm") == 1
    assert len(clips(tmp_path / "shards")["train"]) == 2


# ---- folders and tables


def test_folders_of_splits_are_splits(cases: Path, tmp_path: Path):
    done = shards(tmp_path / "shards", "folder", cases / "folders")
    assert done.code == 0, done.err
    by_split = clips(tmp_path / "shards").items()
    found = {split: Counter(labels for _, labels in each.values()) for split, each in by_split}
    assert found == {"train": Counter({("dog",): 1, ("cat",): 1}), "test": Counter({("dog",): 1})}


def test_labels_with_commas_are_no_class_of_their_own(cases: Path, tmp_path: Path):
    done = shards(tmp_path / "shards", "csv", cases / "tables" / "commas.csv", "--split", "train")
    refused(done, "Guitar", "Music", "--label-separator")
    more = ("--split", "train", "--label-separator", ",")
    done = shards(tmp_path / "shards", "csv", cases / "tables" / "commas.csv", *more)
    assert done.code == 0, done.err
    assert load_dataset(tmp_path / "shards").vocabulary == ("Guitar", "Music")
    labels = sorted(sorted(labels) for _, labels in clips(tmp_path / "shards")["train"].values())
    assert labels == [["Guitar"], ["Guitar", "Music"], ["Guitar", "Music"], ["Music"]]


def test_a_column_category_holds_labels_and_columns_that_are_not_used_are_named(cases: Path, tmp_path: Path):
    text = (cases / "tables" / "category.csv").read_text().splitlines()
    for number in range(4):
        shutil.copy(cases / "tables" / f"{number}.wav", tmp_path)
    table(tmp_path / "more.csv", f"{text[0]},loudness", *(f"{line},3" for line in text[1:]))
    done = shards(tmp_path / "shards", "csv", tmp_path / "more.csv", "--split", "train")
    assert done.code == 0, done.err
    assert load_dataset(tmp_path / "shards").vocabulary == ("cat", "dog")
    assert (done.out + done.err).count("loudness") == 1


def test_onset_and_offset_cut_the_clips(cases: Path, tmp_path: Path):
    done = shards(tmp_path / "shards", "csv", cases / "tables" / "onset.csv", "--split", "train")
    assert done.code == 0, done.err
    lengths = sorted(samples for samples, _ in clips(tmp_path / "shards")["train"].values())
    assert lengths == [round(seconds * RATE_HZ) for seconds in (0.2, 0.2, 0.4, 1)]


def test_a_segment_of_a_table_is_cut_from_a_file_that_is_little_longer(tmp_path: Path):
    for number, seconds in enumerate((1.0, 0.9, 3.3)):
        wav(tmp_path / f"{number}.wav", noise(seconds))
    rows = ("0.wav,dog,0.2,0.8", "1.wav,cat,0.5,0.9", "2.wav,dog,0,3")
    table(tmp_path / "cut.csv", "path,label,start,end", *rows)
    done = shards(tmp_path / "shards", "csv", tmp_path / "cut.csv", "--split", "train")
    assert done.code == 0, done.err
    lengths = sorted(samples for samples, _ in clips(tmp_path / "shards")["train"].values())
    assert lengths == [round(seconds * RATE_HZ) for seconds in (0.4, 0.6, 3)]


def test_splits_alike_are_refused_and_addresses_too(cases: Path, tmp_path: Path):
    done = shards(tmp_path / "shards", "csv", cases / "tables" / "case.csv")
    refused(done, "Train", "train")
    done = shards(tmp_path / "shards", "csv", cases / "tables" / "address.csv", "--split", "train")
    sentence = refused(done, "https://host/0.wav")
    assert "download" in sentence


def test_names_are_found_in_the_other_unicode_form_and_classes_alike_are_said(cases: Path, tmp_path: Path):
    done = shards(tmp_path / "shards", "csv", cases / "unicode" / "nfc.csv", "--split", "train")
    assert done.code == 0, done.err
    assert len(clips(tmp_path / "shards")["train"]) == 1
    for number in range(2):
        wav(tmp_path / f"{number}.wav", noise(1, seed=number))
    table(tmp_path / "alike.csv", "path,label", "0.wav,caf\u00e9", "1.wav,cafe\u0301")
    done = shards(tmp_path / "alike", "csv", tmp_path / "alike.csv", "--split", "train")
    assert re.search(r"WARNING: .*(class|alike)", done.out + done.err), done.out + done.err


# ---- names


def test_features_have_names_of_their_own_whatever_the_files_are_called(cases: Path, tagger: Path, tmp_path: Path):
    done = run("features", "--model", tagger, "--out", tmp_path / "features", cases / "names")
    written = [path.name for path in (tmp_path / "features").glob("*.npz")]
    long = "\u9ce5" * 83
    assert len(written) == 4 if done.code == 0 else written and not any(name.startswith(long) for name in written)
    assert sum(name.startswith("x") for name in written) == 2
    assert "\u9e1f.npz" in written
    if done.code:
        refused(done, "1 of 4")


@pytest.mark.parametrize("source", ["folder", "audioset", "esc50", "hdf5"])
def test_hidden_files_are_no_input_of_any_source(cases: Path, tmp_path: Path, source: str):
    given, more = tmp_path / "given", []
    apple = (cases / "hidden" / "__MACOSX" / "dog" / "._1.wav").read_bytes()
    if source == "folder":
        shutil.copytree(cases / "hidden" / "__MACOSX", given / "__MACOSX")
        wav(given / "dog" / "1.wav", noise(1))
        (given / "dog" / "._1.wav").write_bytes(apple)
    elif source == "audioset":
        shutil.copytree(cases / "hidden" / "meta", given)
        header = "# created\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
        (given / "eval_segments.csv").write_text(f'{header}AAAAAAAAAAA, 0.000, 10.000, "/m/09x0r"\n')
        wav(tmp_path / "audio" / "YAAAAAAAAAAA.wav", noise(1))
        (tmp_path / "audio" / "._YAAAAAAAAAAA.wav").write_bytes(apple)
        more += ["--audio", str(tmp_path / "audio")]
    elif source == "esc50":
        shutil.copytree(cases / "hidden" / "esc50", given)
        wav(given / "audio" / "1-100032-A-0.wav", noise(1))
        (given / "meta").mkdir()
        columns = "filename,fold,target,category,esc10,src_file,take"
        table(given / "meta" / "esc50.csv", columns, "1-100032-A-0.wav,1,0,dog,True,100032,A")
    else:
        h5py = pytest.importorskip("h5py")
        given.mkdir()
        (given / "._x.h5").write_bytes(apple)
        with h5py.File(given / "x.h5", "w") as pack:
            pack["audio_name"] = np.array([b"YAAAAAAAAAAA.wav"])
            pack["waveform"] = np.stack([noise(1)])
            pack["target"] = np.eye(527, dtype=bool)[:1]
        more += ["--sample-rate", str(RATE_HZ)]
    done = shards(tmp_path / "shards", source, given, *more)
    assert done.code == 0, done.err
    assert "._" not in done.err
    assert [len(each) for each in clips(tmp_path / "shards").values()] == [1]


# ---- long recordings


def peak_bytes(blocks: Iterable[np.ndarray]) -> tuple[int, int]:
    """Samples of all blocks, and the most memory that Python and numpy have taken for them."""
    tracemalloc.start()
    num_samples = sum(map(len, blocks))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return num_samples, peak


def test_twelve_hours_of_flac_are_read_in_the_memory_of_ten_minutes(tmp_path: Path):
    peaks = []
    for seconds in (600, 12 * 3600):
        path, left = tmp_path / "zeros.flac", seconds * RATE_HZ
        with soundfile.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as file:
            while left:
                file.write(np.zeros(min(left, 1 << 24), np.int16))
                left -= min(left, 1 << 24)
        assert count_frames(path) == (seconds * RATE_HZ, RATE_HZ)
        num_samples, peak = peak_bytes(wave_blocks(path))
        assert num_samples == seconds * RATE_HZ
        peaks.append(peak)
    assert peaks[1] <= 1.3 * peaks[0]
    assert len(read_audio(path, segment=(43_000, 43_010))) == 10 * RATE_HZ


def test_an_hour_at_192_khz_is_read_in_constant_memory(tmp_path: Path):
    peaks, rate = [], 192_000
    for seconds in (60, 600):  # the file of an hour is in tests/data/audio/test_parts.py, sparse
        with soundfile.SoundFile(tmp_path / "a.wav", "w", rate, 1, "PCM_16") as file:
            for _ in range(seconds // 10):
                file.write(np.zeros(10 * rate, np.int16))
        num_samples, peak = peak_bytes(wave_blocks(tmp_path / "a.wav"))
        assert num_samples == seconds * RATE_HZ
        peaks.append(peak)
    assert peaks[1] <= 1.3 * peaks[0]


# ---- what else a folder holds


@pytest.fixture
def many_formats(tmp_path: Path) -> Path:
    """A folder with one file of six formats, and three of formats that are not read."""
    wanted = {"3gp amr": "3gp", "mov pcm": "mov", "mp2": "mp2", "wma": "wma", "wavpack": "wv", "ac-3": "ac3"}
    (tmp_path / "audio").mkdir()
    for its in FORMATS:
        if its.name in wanted:
            content = its.bytes_of(sound(1, its.rate_hz, its.channels))
            (tmp_path / "audio" / f"clip.{wanted[its.name]}").write_bytes(content)
    for name in ("a.mid", "b.mid", "c.dss"):
        (tmp_path / "audio" / name).write_bytes(b"MThd")
    return tmp_path / "audio"


@pytest.mark.parametrize("command", ["predict", "features", "shards"])
def test_readable_files_are_read_and_the_others_named_once(many_formats: Path, tagger: Path, tmp_path: Path, command):
    if command == "predict":
        done = run("predict", "--model", tagger, "--json", many_formats)
        found = len(done.out.splitlines())
    elif command == "features":
        done = run("features", "--model", tagger, "--out", tmp_path / "out", many_formats)
        found = len(list((tmp_path / "out").glob("*.npz")))
    else:
        done = shards(tmp_path / "out", "folder", many_formats, "--split", "train")
        found = len(clips(tmp_path / "out")["train"])
    assert (found, done.code) == (6, 0), done.err
    lines = [line for line in (done.out + done.err).splitlines() if ".mid" in line]
    assert len(lines) == 1, done.out + done.err
    assert "2 .mid" in lines[0]
    assert "1 .dss" in lines[0]


# ---- beyond audio


def test_an_official_checkpoint_of_tensors_that_are_not_contiguous_is_converted_bit_for_bit(shared, tmp_path):
    whole = shared / "golden" / "eat_pretrain_official.pt"
    state = torch.load(whole, weights_only=True)
    turned = 0
    for key, tensor in state["model"].items():
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
            state["model"][key] = tensor.t().contiguous().t()
            turned += not state["model"][key].is_contiguous()
    assert turned > 3
    torch.save(state, tmp_path / "turned.pt")
    outs = []
    for name, path in (("whole", whole), ("turned", tmp_path / "turned.pt")):
        done = convert(path, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        outs.append(load_file(tmp_path / name / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(tensor, outs[1][key]) for key, tensor in outs[0].items())


def test_a_copied_run_folder_has_a_run_of_its_own_in_weights_and_biases(tmp_path, monkeypatch):
    from asda.run.log import WANDB_FILE, RunLog

    ids: list[str] = []
    board = SimpleNamespace(offline=True, url="", define_metric=lambda *_, **__: None, finish=lambda: None)
    fake = SimpleNamespace(
        Error=RuntimeError,
        Settings=lambda **_: None,
        init=lambda **options: ids.append(options["id"]) or board,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said = io.StringIO()

    def opened(folder: Path) -> None:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            RunLog(folder, 0, 1, enabled=True, wandb="project").close()

    opened(tmp_path / "run")
    opened(tmp_path / "run")  # resumed
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = said.getvalue()
    opened(tmp_path / "copy")
    opened(tmp_path / "copy")
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert "cop" in said.getvalue()[len(before) :], "it is said"
    assert (tmp_path / "copy" / WANDB_FILE).exists()


def test_an_evaluation_names_its_dataset_by_hash(tmp_path):
    golden = ROOT / "tests" / "frozen" / "golden"
    out = tmp_path / "evaluation.json"
    from asda.evaluate import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["--checkpoint", str(golden / "ast"), "--data", f"{golden / 'tones'}:test", "--out", str(out)])
    record = json.loads(out.read_text())
    dataset = load_dataset(golden / "tones")
    assert re.search(r"^xxh3_128:[0-9a-f]{32}$", dataset.hash)
    assert dataset.hash in json.dumps(record), record.keys()


def test_one_sentence_of_ours_is_all_that_decoders_say(cases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    infinite = np.tile([[np.inf, -np.inf]], (16_000, 1)).astype(np.float32)
    wav(tmp_path / "infinite.wav", infinite)
    sentences = []
    for path in [*sorted(cases.glob("mp3/*")), tmp_path / "infinite.wav"]:
        for read in (read_audio, count_frames, lambda path: sum(map(len, wave_blocks(path)))):
            try:
                read(path)
            except AudioError as error:
                sentences.append(str(error))
    assert set(sentences) == {"holds samples that are not finite"}
    assert capfd.readouterr() == ("", "")
