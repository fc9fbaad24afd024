"""Write the embeddings of audio files, folders or shards: one .npz or .safetensors for each file or shard.

A file of features gets its name when it is whole, and is then kept: the same command resumes a stopped run and ends
with the same bytes. features.json says what all files of a folder have in common.

Shapes: S samples, T time patches, F mel patches, D width.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import xxhash
from safetensors import SafetensorError
from tqdm import tqdm

import asda
from asda import system
from asda.commands.parsing import CHECKPOINT_HELP, check_range, make_parser
from asda.commands.text import on_one_line
from asda.data.audio.find import AudioFile, audio_files
from asda.data.audio.waves import SAMPLE_RATE_HZ, AudioError
from asda.data.clips import ClipDataset, read_clips
from asda.data.feature_files import WRITERS, Array, read_metadata
from asda.data.order import Draw
from asda.data.shards.index import DATASET_FILE, SHARD_SUFFIX
from asda.data.shards.read import ShardFile, load_dataset
from asda.errors import UserError, failure_of, say
from asda.system import TEMPORARY_SUFFIX, hash_bytes, whole_file, write_whole_file

if TYPE_CHECKING:
    from asda.inference import Features, Model

FORMAT_VERSION = 1  # of the files of features
SETTINGS_FILE = "features.json"
FILE_KEY = "features"  # the one array of an audio file
SPOOL_BYTES = 64 << 20  # of features that wait in memory for the rest of their file; more wait on the disk
MOST_NAME_BYTES = 255  # of a file, on every usual file system
CLIPS_AT_ONCE = 16  # in a shard; fixed, because the size of a batch changes the last bits of its features
REPORT_EVERY_S = 10.0  # between lines of progress, if stderr is not a terminal

EXAMPLES = """examples
  asda features --model runs/mine --out features/mine recordings
      an embedding [width] of every audio file below recordings/: features/mine/dog/1.npz of dog/1.wav
  asda features --model runs/mine --out features/esc --granularity frame shards/esc:train+valid
      embeddings [time, width] of every clip of two splits: a file per shard, in it an array per clip, named by its key
  asda features --model weights/eat --out features/l9 --layer 9 --format safetensors a.wav b.flac
      the output of the ninth block, of two files

granularity
  utterance  [D]        the CLS token, mean over the chunks of a long file
  frame      [T, D]     mean over the mel patches; hop_s seconds from one to the next, the first centred at first_s
  patch      [T, F, D]  every patch, low frequencies first

reading them
  file = np.load("1.npz"); file["features"]; json.loads(str(file["metadata.json"]))
  with safe_open("1.safetensors", "np") as file: file.get_tensor("features"); json.loads(file.metadata()["metadata"])
  The metadata holds model, weights, layer, granularity, hop_s, first_s, source, and under clips the shape, the seconds
  and (for shards) the labels of every array.

names
  The extension is replaced: dog/1.npz of dog/1.wav. It is kept where two inputs differ only by it: x.wav.npz and
  x.flac.npz. A name that would be too long for a disk is cut, and ends with a hash of all of it.

Finished files are kept: the same command resumes a stopped run. Only one process at a time may write to a folder.
Many short clips are faster as shards, whose clips are encoded 16 at a time; audio files are encoded one by one. A
recording may last for days: its features wait on the disk of --out, which needs room for them twice.
Unreadable files are reported on stderr and skipped; the exit code is then 2.
"""


@dataclass(frozen=True)
class Settings:
    """Settings that all features of a folder share."""

    model: str  # the path as given; two paths may lead to the same model
    fingerprint: str  # of the weights, and of how they are used
    weights: str
    layer: int
    granularity: str
    file_format: str
    format_version: int = FORMAT_VERSION
    channel: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what is written; it names a channel only if one is chosen."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Embedded:
    """The features that become one array."""

    key: str
    duration_s: float
    parts: Iterable["Features"]  # of a clip, or of each chunk of a long file
    labels: dict[str, list[str]]  # {"labels": [...]} of a shard's clip; an audio file has none


@dataclass(frozen=True)
class Task:
    """One file of features to write."""

    name: str  # in --out, without an extension
    extension: str  # of the source
    source: str  # the path of the audio file or shard, for people
    num_clips: int
    fingerprint: Callable[[], str]  # hashes the source's bytes
    # Takes a layer, and what is told the seconds that were read; raises UserError.
    embed: Callable[["Model", int, Callable[[float], None]], Iterator[Embedded]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line."""
    parser = make_parser("features", "Write the embeddings of audio files, folders or shards, resumably.", EXAMPLES)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="audio files, folders of them, or shards as FOLDER:SPLIT")
    add("--model", required=True, type=Path, metavar="PATH", help=CHECKPOINT_HELP)
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the features go; created if missing")
    add(
        "--granularity",
        choices=("utterance", "frame", "patch"),
        default="utterance",
        help="see below (default: %(default)s)",
    )
    add(
        "--layer",
        type=int,
        metavar="N",
        help="number of the block whose output is taken (default: the last); 0 is the input of the first",
    )
    add("--channel", type=int, metavar="N", help="take this channel of files, from 0 (default: the mean of all)")
    add("--weights", choices=("student", "teacher"), default="student", help="which network of a pre-training")
    add("--format", choices=WRITERS, default="npz", help="format of the files (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network computes")
    args = parser.parse_args(argv)
    if args.channel is not None:
        check_range("--channel", args.channel, 0)
    return args


def extract(args: argparse.Namespace) -> None:
    """List the files to write, write those that are missing, and report. Raises UserError."""
    tasks = distinct([task for text in args.inputs for task in tasks_of(text, args.channel)])
    model = asda.load(args.model, weights=args.weights, device=args.device)
    settings = settings_of(args, model)
    check_folder(args.out, settings)
    failures, written = [], []
    with ClipProgress(sum(task.num_clips for task in tasks)) as progress:
        for task in tasks:
            try:
                finish(task, args.out, settings, model, progress)
                written.append(path_of(args.out, task, settings.file_format))
            except Exception as error:  # one bad file costs one file
                reason = failure_of(error)
                failures.append(on_one_line(reason if task.source in reason else f"{task.source}: {reason}"))
                if len(tasks) > 1:
                    tqdm.write(f"error: {failures[-1]}", file=sys.stderr)
            progress.finish(task.num_clips)
    if num_missing := sum(not path.exists() for path in written):
        moved = f"{num_missing} of {len(written)} files are gone from --out {args.out}, which was moved or replaced"
        raise UserError(f"{moved} meanwhile; put it back and start the same command again")
    print(progress.summary(args.out))
    if failures:
        raise UserError(failures[0] if len(tasks) == 1 else f"{len(failures)} of {len(tasks)} inputs cannot be used")


def settings_of(args: argparse.Namespace, model: "Model") -> Settings:
    """Resolve the arguments: the layer becomes a number, the model a fingerprint of its weights. Raises UserError."""
    layer = model.depth if args.layer is None else args.layer
    if not 0 <= layer <= model.depth:
        raise UserError(f"--layer {layer} must be from 0 to {model.depth}, the model's number of blocks")
    stem = "teacher" if args.weights == "teacher" else "model"
    use = model.description.model_dump_json(include={"model", "data"})
    fingerprint = xxhash.xxh3_128_hexdigest((hash_file(model.folder / f"{stem}.safetensors") + use).encode())
    return Settings(
        *(str(args.model), f"xxh3_128:{fingerprint}", args.weights, layer, args.granularity, args.format),
        channel=args.channel,
    )


def tasks_of(text: str, channel: int | None) -> list[Task]:
    """Return a task for each audio file or each shard of one INPUT. Raises UserError."""
    path = Path(text)
    if os.path.isfile(path / DATASET_FILE):  # unlike pathlib's, False for a path that cannot be read
        splits = ", ".join(load_dataset(path).splits)
        raise UserError(f"{text} is a dataset of shards; name its splits ({splits}), as in {text}:NAME")
    if os.path.exists(path) or ":" not in text:
        return [file_task(file, channel) for file in audio_files([path])]
    if channel is not None:
        raise UserError(f"--channel {channel} is for audio files, and {text} has clips of one channel; leave it out")
    dataset = ClipDataset(text, labelled=True)
    starts = np.cumsum([0, *(shard.entry.clips for shard in dataset.shards)]).tolist()
    return [shard_task(dataset, shard, start) for shard, start in zip(dataset.shards, starts, strict=False)]


def file_task(file: AudioFile, channel: int | None) -> Task:
    """Return the task of one audio file."""

    def embed(model: "Model", layer: int, hear: Callable[[float], None]) -> Iterator[Embedded]:
        parts = model.feature_blocks(asda.File(file.path, channel, hear), layer=layer)
        yield Embedded(FILE_KEY, model.duration_s(file.path), parts, labels={})

    name, extension = os.path.splitext(file.relative)
    return Task(name, extension, str(file.path), 1, lambda: hash_file(file.path), embed)


def shard_task(dataset: ClipDataset, shard: ShardFile, first_clip: int) -> Task:
    """Return the task of one shard, whose first clip has this number in the dataset."""

    def embed(model: "Model", layer: int, hear: Callable[[float], None]) -> Iterator[Embedded]:
        end = first_clip + shard.entry.clips
        for low in range(first_clip, end, CLIPS_AT_ONCE):
            clips = read_clips(dataset, [Draw(0, clip) for clip in range(low, min(low + CLIPS_AT_ONCE, end))])
            features = model.features([clip.samples for clip in clips], SAMPLE_RATE_HZ, layer)
            for clip, of_clip in zip(clips, features, strict=True):
                names = [dataset.vocabulary[label] for label in clip.labels]
                duration_s = len(clip.samples) / SAMPLE_RATE_HZ
                hear(duration_s)
                yield Embedded(clip.key, duration_s, [of_clip], {"labels": names})

    name, source = shard.entry.name.removesuffix(SHARD_SUFFIX), str(shard.path)
    return Task(name, SHARD_SUFFIX, source, shard.entry.clips, lambda: shard.entry.hash, embed)


def hash_file(path: Path) -> str:
    """Hash a file's bytes, in the notation of the shards. Raises AudioError if it cannot be read."""
    try:
        return f"xxh3_128:{system.hash_file(path)}"
    except FileNotFoundError:
        raise AudioError("no such file") from None
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


def distinct(tasks: list[Task]) -> list[Task]:
    """Let files of one name, x.wav and x.flac, keep their extensions. Raises UserError if they are equal even so."""
    whole = [task.name + task.extension for task in tasks]
    holder: dict[str, Task] = {}
    for task, name in zip(tasks, whole, strict=True):
        if (first := holder.setdefault(name, task)) is not task:
            both = on_one_line(f"{first.source} and {task.source} would both become {name}")
            raise UserError(f"{both}; extract them to different --out folders")
    names = [task.name for task in tasks]
    while equal := {name for name, times in Counter(names).items() if times > 1}:  # again: x.wav.wav may meet x.wav
        names = [full if name in equal else name for name, full in zip(names, whole, strict=True)]
    if kept := [task.source for task, name in zip(tasks, names, strict=True) if name != task.name]:
        say(f"{len(kept)} files share their name, such as {on_one_line(kept[0])}; their features keep the extension")
    return [replace(task, name=name) for task, name in zip(tasks, names, strict=True)]


def path_of(out: Path, task: Task, suffix: str) -> Path:
    """Return where the features of a task go; a name that is too long for them is cut, and ends with its hash."""
    path = out / f"{task.name}.{suffix}"
    if len(os.fsencode(path.name)) <= MOST_NAME_BYTES:
        return path
    name, mark = os.fsencode(path.name.removesuffix(f".{suffix}")), hash_bytes(os.fsencode(path.name))[:16]
    room = MOST_NAME_BYTES - len(f"-{mark}.{suffix}")
    return path.with_name(f"{name[:room].decode(errors='ignore')}-{mark}.{suffix}")


def check_folder(out: Path, settings: Settings) -> None:
    """Refuse a folder that holds other files or features of other settings; delete what a killed run left."""
    if not out.is_dir():
        if out.exists():
            raise UserError(f"--out {out} is not a folder")
        return
    if not (out / SETTINGS_FILE).is_file():
        halves = set(out.glob(f"{SETTINGS_FILE}.*{TEMPORARY_SUFFIX}"))  # left by a run that was killed early
        if any(path not in halves and not path.is_dir() for path in out.rglob("*")):
            raise UserError(f"--out {out} holds files but no {SETTINGS_FILE}; give a new or empty folder")
        for half in halves:
            half.unlink()
        return
    for leftover in out.rglob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    try:
        found = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
        differing = [name for name, value in asdict(settings).items() if name != "model" and found.get(name) != value]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{out / SETTINGS_FILE} cannot be read; give another --out") from None
    if differing == ["fingerprint"]:
        raise UserError(f"--out {out} holds features of another model ({found['model']}); give another --out")
    if differing:
        name = differing[-1]
        raise UserError(
            f"--out {out} holds features with {name} {found.get(name)}, not {asdict(settings)[name]}; give another"
        )


def finish(task: Task, out: Path, settings: Settings, model: "Model", progress: "ClipProgress") -> None:
    """Write one file of features, unless it exists. Raises UserError if the source cannot be used."""
    path = path_of(out, task, settings.file_format)
    if os.path.exists(path):
        check_source(path, task)
        progress.kept += task.num_clips
        return
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=str(place)) as spool:
        arrays, metadata = features_of(task, settings, model, progress, spool)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / SETTINGS_FILE).exists():
            write_whole_file(out / SETTINGS_FILE, json.dumps(settings.as_dict(), indent=2).encode() + b"\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            WRITERS[settings.file_format](file, spool, arrays, json.dumps(metadata))


def features_of(
    task: Task, settings: Settings, model: "Model", progress: "ClipProgress", spool: IO[bytes]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Compute the arrays of one file into a spool; return where they lie, and the metadata. Raises UserError."""
    arrays: dict[str, Array] = {}
    clips: dict[str, dict[str, Any]] = {}
    first_s = 0.0
    for embedded in task.embed(model, settings.layer, progress.hear):
        arrays[embedded.key], first_s = to_spool(spool, embedded.parts, settings.granularity)
        shape = arrays[embedded.key].shape
        clips[embedded.key] = {"shape": shape, "duration_s": embedded.duration_s} | embedded.labels
        progress.advance()
    source = {"path": task.source, "hash": task.fingerprint()}
    times = {"hop_s": model.hop_s, "first_s": first_s}
    return arrays, {**settings.as_dict(), **times, "source": source, "clips": clips}


def to_spool(spool: IO[bytes], parts: Iterable["Features"], granularity: str) -> tuple[Array, float]:
    """Append the features of a clip, part by part; return where they lie, and the centre of the first in seconds."""
    from asda.inference.results import mean_utterance  # brings torch

    start, steps, chunks = spool.tell(), [], []
    shape: tuple[int, ...] = ()
    first_s = None
    for part in parts:
        first_s = float(part.times_s[0]) if first_s is None else first_s
        steps.append(len(part.times_s))
        if granularity == "utterance":
            chunks.append(part.utterance)
            continue
        array = (part.frames if granularity == "frame" else part.patches).numpy()
        shape = array.shape[1:]
        spool.write(array.tobytes())
    if granularity == "utterance":
        utterance_D = mean_utterance(chunks, steps).numpy()
        spool.write(utterance_D.tobytes())
        return Array(utterance_D.shape, start), first_s or 0.0
    return Array((sum(steps), *shape), start), first_s or 0.0


def check_source(path: Path, task: Task) -> None:
    """Refuse a finished file that was made from another source. Raises UserError."""
    try:
        found = read_metadata(path)["source"]["hash"]
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError):
        raise UserError(f"its features {path} cannot be read; delete the file to make it again") from None
    if found != task.fingerprint():
        raise UserError(f"the features {path} were made from other audio; delete the file, or give another --out")


class ClipProgress:
    """Counts clips, and shows progress on stderr: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, num_clips: int):
        self.kept = 0  # clips whose features existed
        self._num_clips = num_clips
        self._finished = 0  # clips of the tasks before this one
        self._made = 0  # clips
        self._audio_s = 0.0  # of the clips made
        self._started = self._reported = time.monotonic()
        self._bar = tqdm(total=num_clips, unit="clip", disable=not sys.stderr.isatty())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count one clip whose features were computed."""
        self._made += 1
        self._bar.update()

    def hear(self, audio_s: float) -> None:
        """Count seconds that were read."""
        self._audio_s += audio_s
        now = time.monotonic()
        if self._bar.disable and now - self._reported > REPORT_EVERY_S:
            rate = self._audio_s / (now - self._started)
            counts = f"{self._made} clips made, {self.kept} kept, of {self._num_clips}"
            print(f"{counts}; {self._audio_s:.0f} s of audio, {rate:.0f} s/s", file=sys.stderr)
            self._reported = now

    def finish(self, num_clips: int) -> None:
        """Count a task of so many clips that is done, kept, or given up."""
        self._finished += num_clips
        self._bar.update(self._finished - self._bar.n)

    def summary(self, out: Path) -> str:
        """Say what was done, with units."""
        if self.kept == self._num_clips:
            return f"{self.kept} of {self.kept} clips are already extracted in {out}; nothing to do"
        seconds = time.monotonic() - self._started
        return (
            f"{self._made} clips in {seconds:.1f} s: {self._made / seconds:.1f} clips/s, "
            f"{self._audio_s / seconds:.0f} s of audio/s; {self.kept} clips were already extracted; {out}"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and extract."""
    extract(parse_args(argv))
