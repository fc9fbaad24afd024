"""The part of the command line of asda shards that says where clips come from."""

import argparse
from pathlib import Path

from asda.errors import UserError
from asda.sharding.sources import SOURCES
from asda.sharding.sources.listing import SourceOptions

SOURCE_HELP = """
sources: what --input is, and how the splits are named
  audioset        segments CSVs, or a folder with *_segments.csv. --audio holds Y<id>.wav, <id>.m4a,
                  <id>_<start in ms>.flac or the like, in any subfolders; longer files are whole videos and are cut.
                  Segments without a file are counted. Splits: balanced_train, unbalanced_train, eval
  csv             a table with columns, below; also with semicolons or tabs, in UTF-16, or JSON lines (.jsonl, .ndjson)
  eat             train.tsv (root, then file<TAB>samples; also pack.h5/key), train.lbl (id<TAB>MIDs),
                  label_descriptors.csv beside them, or their folder. --audio replaces the root.
                  Splits: stems of the tsv
  esc50           the folder with meta/esc50.csv and audio/; --where esc10=True for ESC-10. Splits: fold1 to fold5
  folder          a folder with one subfolder per class, or with files only, which get no labels. Folders such as
                  train/, val/ and test/ on top are the splits train, valid and test, with the classes below them
  fsd50k          the unpacked archive with FSD50K.ground_truth/. Splits: train, val, test (its eval)
  hdf5            PANNs' packs of waveforms, or a folder of them. Splits: their stems without _part00
  parquet         files with a column struct<bytes, path>, as Hugging Face writes them, or a folder of them; other
                  columns as in a table. Splits: train-00000-of-00004.parquet and the like, or a folder's name
  speechcommands  the unpacked archive, v0.01 or v0.02; _background_noise_ is left out. Splits: train, valid, test
  tar             webdataset tars, or a folder of them: key.flac beside key.json, key.cls or key.txt with the labels;
                  a key ends at its first dot. Splits: train-000000.tar and the like, or a folder's name

audio files: what libsndfile reads (WAV, FLAC, Ogg, Opus, MP3, AIFF ...); M4A, AAC, MP4 and WebM with asda[m4a],
HDF5 packs with asda[hdf5], parquet with asda[parquet]. Hidden files (.x, ._x, __MACOSX) are left out.

columns of a table, in any case; others are named and not used
  path, file_name, filename, file, filepath, audio, wav ...   absolute, or relative to the table; no addresses
  label, labels, tags, category, class, species ...           class names, several separated by ";" or as a list:
                                                              dog;barks or ["dog", "barks"]
  split or fold                                               the first present
  start and end, onset and offset, start and duration ...     in seconds: the clip is this part of the file

cutting and channels
  --cut 10 makes of rec.wav, 25 s long, the clips rec_0-10, rec_10-20 and rec_20-25, of the labels of rec.wav, all in
  one split. Recordings may have any length. --channel 0 takes the left channel of stereo, if both cancel each other.
"""


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where clips come from."""
    add = parser.add_argument_group("where clips come from").add_argument
    add("--source", required=True, choices=SOURCES, help="what --input is; each is explained below")
    add("--input", required=True, type=Path, nargs="+", metavar="PATH", help="what to read; see the sources below")
    add("--audio", type=Path, metavar="FOLDER", help="audioset, eat: folder of the audio, at any depth")
    add(
        "--class-labels", type=Path, metavar="CSV", help="audioset, eat, hdf5: index,mid,name (default: AudioSet's 527)"
    )
    add("--sample-rate", type=int, metavar="HZ", help="hdf5, eat: if a pack names none (default 32000)")
    add(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="csv, esc50, parquet, tar: only rows with this value; repeatable",
    )
    add("--no-labels", action="store_true", help="write clips without labels")
    add = parser.add_argument_group("how tables and folders are read").add_argument
    add("--path-column", metavar="NAME", help="csv: the column of the files")
    add("--label-column", metavar="NAME", help="csv, parquet, tar: the column of the classes")
    add("--label-separator", metavar="CHAR", help="csv, parquet, tar: between several labels in a cell (default ;)")
    add("--no-segments", action="store_true", help="csv: whole files, whatever columns of start and end say")
    add("--top-folders", choices=("classes", "splits"), help="folder: what they are, if train/ is beside dog/")
    add = parser.add_argument_group("how recordings are read").add_argument
    add("--cut", type=float, metavar="S", help="cut longer recordings into clips of S seconds")
    add("--channel", type=int, metavar="N", help="take this channel, counted from 0, in place of the mean of all")


def options_from(args: argparse.Namespace, label_names: tuple[str, ...] | None) -> SourceOptions:
    """Turn the arguments of add_source_arguments into options. Raises UserError."""
    if args.sample_rate is not None and args.sample_rate < 1:
        raise UserError(f"--sample-rate {args.sample_rate} must be above 0, in Hz")
    if args.label_separator == "":
        raise UserError("--label-separator is empty; give the text between two labels, as in --label-separator ','")
    return SourceOptions(
        use_labels=not args.no_labels,
        where=tuple(map(parse_where, args.where)),
        audio=args.audio,
        class_labels=args.class_labels,
        sample_rate_hz=args.sample_rate,
        path_column=args.path_column,
        label_column=args.label_column,
        label_separator=args.label_separator,
        use_segments=not args.no_segments,
        top_folders=args.top_folders,
        label_names=label_names,
    )


def parse_where(text: str) -> tuple[str, str]:
    """Read COLUMN=VALUE. Raises UserError."""
    column, equals, value = text.partition("=")
    if not column or not equals:
        raise UserError(f"--where {text}: write COLUMN=VALUE, as in --where language=ar")
    return column, value
