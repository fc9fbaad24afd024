"""Convert published checkpoints of EAT, ASDA, SSLAM and AST to asda's layout, and ours to the official one."""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from asda.checkpoint.manifest import TEMPORARY
from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import check_target, read_weights, write_weights
from asda.config.model import ModelConfig, PretrainConfig
from asda.config.run import Description
from asda.data.labels import read_labels
from asda.errors import UserError, exit_with_sentence
from asda.official.fairseq import Wishes, from_official, to_official
from asda.official.fairseq_settings import input_notes
from asda.official.huggingface_ast import from_hugging_face, is_ast
from asda.official.safe_load import plain, safe_load

EXAMPLES = """
examples
  asda convert EAT-base_epoch30_pt.pt --out weights/eat
      a pre-trained checkpoint; then: deepspeed asda/train.py ... objective.init_from=weights/eat preset=eat
  asda convert EAT-base_epoch30_ft.pt --out weights/eat_as2m
      a fine-tuned one; with 527 classes it gets AudioSet's labels, others take --labels FILE
  asda convert EAT-base_epoch30_pretrain/ --out weights/eat
      a folder from Hugging Face (config.json, model.safetensors), or its model.safetensors alone
  asda convert ast-finetuned-audioset-10-10-0.4593/ --out weights/ast
      an AST from Hugging Face; then: deepspeed asda/train.py --config configs/esc50_ast.json
  asda convert runs/as2m --to official --out asda.pt
      a run, a checkpoint of it or converted weights, as a file that fairseq with the official code loads

what is read
  .pt files of fairseq, pre-trained or fine-tuned, in fp32 or fp16, and model.safetensors from Hugging Face, of EAT, of
  SSLAM (the same network) and of ASDA; of AST folders from Hugging Face (model.safetensors or pytorch_model.bin,
  config.json for sizes and labels, preprocessor_config.json for mean and std of the log-mel). No code in a file is run,
  and fairseq is not needed. Sizes come from the shapes. What no checkpoint records is assumed, and a line says so:
  lambda, the mean and std of the log-mel, labels.
"""
COLUMN = 12  # characters of the first column
MIB = 1 << 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read these arguments, or the command line."""
    parser = argparse.ArgumentParser(
        prog="asda convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("input", type=Path, help="the checkpoint: a file, or a folder")
    add("--out", required=True, type=Path, help="the folder to write; with --to official the file")
    add("--to", choices=("asda", "official"), default="asda", help="the layout to write (default %(default)s)")
    add(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads, where no cfg says (default: 64 features each)",
    )
    add("--mean", type=float, metavar="X", help="mean of the log-mel it was trained on (default: by dataset)")
    add("--std", type=float, metavar="X", help="standard deviation of it")
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="class names of a classifier, one per line, in their order",
    )
    add("--preset", choices=("released", "paper"), help="lambda of an ASDA only: 0.1 as released (default), or 0.3")
    add("--force", action="store_true", help="replace --out")
    return parser.parse_args(argv)


def to_ours(args: argparse.Namespace) -> list[str]:
    """Read an official checkpoint, write a folder; lines about both."""
    check_target(args.out, args.force)
    file, cfg = read_official(args.input)
    if is_ast(file):
        beside = args.input if args.input.is_dir() else args.input.parent
        config, preprocessor = (_json_beside(beside / name) for name in ("config.json", "preprocessor_config.json"))
        converted = from_hugging_face(file, config, preprocessor, _wishes(args), args.input.name)
    else:
        converted = from_official(file, cfg, _wishes(args), args.input.name)
    if args.preset and converted.description.preset != args.preset:
        raise UserError(
            f"--preset {args.preset} is for an ASDA, whose lambda no file tells, and {args.input.name} is a network of "
            f"preset {converted.description.preset}; leave --preset out"
        )
    try:
        write_weights(args.out, converted.description, converted.weights, args.force)
    except SafetensorError as error:
        raise UserError(f"cannot write {args.out}: {error}; free space, or choose another --out") from None
    return [
        *described(converted.description, converted.weights),
        *(row("note", note) for note in converted.notes),
        row("written", _sizes(args.out)),
    ]


def to_theirs(args: argparse.Namespace) -> list[str]:
    """Read weights of ours, write an official checkpoint; lines about both."""
    if args.out.exists() and (not args.force or args.out.is_dir()):
        raise UserError(f"{args.out} exists; --force replaces a file, or choose another --out")
    folder = resolve_checkpoint(args.input)
    description = read_description(folder)
    stems = [stem for stem in ("model", "teacher") if (folder / f"{stem}.safetensors").is_file()]
    weights = {stem: read_weights(folder, stem) for stem in stems}
    write_torch_file(to_official(description, weights), args.out)
    return [
        *described(description, weights),
        *(row("note", note) for note in input_notes(description)),
        row("written", f"{args.out} ({args.out.stat().st_size / MIB:.1f} MiB)"),
    ]


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a checkpoint, and its cfg as plain data ({} without one).

    Raises:
        UserError: the file is damaged, of another kind, or would run code.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.is_file()), files[0])
        if not path.is_file():
            raise UserError(f"there is no {path}; give a .pt file, or a folder from Hugging Face")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), _hugging_face_cfg(path.with_name("config.json"))
    file = safe_load(path)
    if not isinstance(file, dict):
        raise UserError(f"{path} holds a {type(file).__name__}; a checkpoint is a dictionary of tensors")
    try:
        cfg = plain(file.get("cfg"))
    except RecursionError:
        raise UserError(f"{path} has a cfg that is nested without end; the checkpoint is damaged") from None
    return file, cfg if isinstance(cfg, dict) else {}


def write_torch_file(content: dict[str, Any], path: Path) -> None:
    """Write a file with torch.save: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMPORARY, delete=False) as file:
        try:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)  # temporary files are their owner's alone
            Path(file.name).rename(path)
        except BaseException as error:
            Path(file.name).unlink(missing_ok=True)
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch buries what the disk said
            raise


def described(description: Description, weights: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    """What weights are, as lines of a table."""
    model, data = description.model, description.data
    name, attention = "AST", ""
    if isinstance(model, ModelConfig):
        name = "EAT or SSLAM (one network)" if model.attention_lambda == "absent" else "ASDA"
        attention = f", lambda {model.attention_lambda}"
    kind = "pre-trained" if isinstance(description.objective, PretrainConfig) else "fine-tuned"
    counts = {
        part: sum(tensor.numel() for key, tensor in weights["model"].items() if key.split(".")[0] in names)
        for part, names in {"encoder": ("encoder",), "decoder": ("decoder",), "classifier": ("norm", "head")}.items()
    } | {"teacher": sum(tensor.numel() for tensor in weights.get("teacher", {}).values())}
    labels = description.labels
    return [
        row("what", f"{name}, {kind}"),
        row(
            "size",
            f"{model.depth} blocks of width {model.width}, {model.heads} heads, MLP {model.mlp_ratio:g} x{attention}",
        ),
        row("parameters", ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)),
        row("input", f"{data.frames} log-mel frames, mean {data.log_mel.mean:g}, std {data.log_mel.std:g}"),
        *([row("labels", f"{len(labels)}: {', '.join(labels[:3])}, ...")] if labels else []),
    ]


def row(name: str, words: str) -> str:
    """One line of the table."""
    return f"{name:{COLUMN}}{words}"


def _wishes(args: argparse.Namespace) -> Wishes:
    labels = read_labels(args.labels) if args.labels else None
    if args.heads is not None and args.heads < 1:
        raise UserError(f"--heads {args.heads} must be at least 1")
    return Wishes(args.heads, args.mean, args.std, labels, args.preset)


def _read_safetensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint, or a folder that holds one")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def _hugging_face_cfg(path: Path) -> dict[str, Any]:
    """What config.json beside the weights says, in the places of a fairseq cfg."""
    config = _json_beside(path)
    network = {key: config.get(key) for key in ("num_heads", "norm_eps", "norm_affine", "layer_norm_first")}
    return {"model": network} if config else {}


def _json_beside(path: Path) -> dict[str, Any]:
    """A JSON object beside the weights; {} when there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a JSON {type(config).__name__}; a config is one JSON object")
    return config


def _sizes(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    return f"{folder}: config.json, " + ", ".join(f"{f.name} ({f.stat().st_size / MIB:.1f} MiB)" for f in files)


def convert(args: argparse.Namespace) -> None:
    """Convert in the direction of --to, and say what was read and written."""
    print("\n".join(to_theirs(args) if args.to == "official" else to_ours(args)))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    convert(parse_args(argv))


if __name__ == "__main__":
    exit_with_sentence(main)
