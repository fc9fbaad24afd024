"""The work of `asda convert`: read one layout of a checkpoint, write the other, and describe both."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from asda.checkpoint.read import read_description, resolve_checkpoint
from asda.checkpoint.weights import check_target, read_weights, write_weights
from asda.commands.text import aligned
from asda.config.model import ModelConfig, PretrainConfig
from asda.config.run import Description
from asda.data.labels import read_labels
from asda.errors import UserError
from asda.official.fairseq import Wishes, from_official, to_official
from asda.official.fairseq_settings import input_notes
from asda.official.huggingface_ast import from_hugging_face, is_ast
from asda.official.safe_load import plain, safe_load
from asda.system import whole_file

MIB = 1 << 20


def to_asda(args: argparse.Namespace) -> list[str]:
    """Read an official checkpoint, write a folder, and return lines about both. Raises UserError."""
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
    return _lines(converted.description, converted.weights, converted.notes, _sizes(args.out))


def to_official_file(args: argparse.Namespace) -> list[str]:
    """Read weights of asda, write an official checkpoint, and return lines about both. Raises UserError."""
    if args.out.exists() and (not args.force or args.out.is_dir()):
        raise UserError(f"{args.out} exists; --force replaces a file, or choose another --out")
    folder = resolve_checkpoint(args.input)
    description = read_description(folder)
    stems = [stem for stem in ("model", "teacher") if (folder / f"{stem}.safetensors").is_file()]
    weights = {stem: read_weights(folder, stem) for stem in stems}
    write_torch_file(to_official(description, weights), args.out)
    return _lines(description, weights, input_notes(description), f"{args.out} ({_mib(args.out)})")


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a checkpoint, and its cfg as plain data ({} without one).

    Raises:
        UserError: the file is damaged, of another kind, or would run code.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        path = next((file for file in files if file.is_file()), files[0])
        if not path.is_file():
            raise UserError(f"{path} is missing; give a .pt file, or a folder from Hugging Face")
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
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch hides what the disk said
            raise


def _lines(
    description: Description, weights: dict[str, dict[str, torch.Tensor]], notes: Iterable[str], written: str
) -> list[str]:
    """Return the printed table: what the weights are, what was assumed, and what was written."""
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
    rows = {
        "what": f"{name}, {kind}",
        "size": f"{model.depth} blocks of width {model.width}, {model.heads} heads, MLP {model.mlp_ratio:g} x"
        + attention,
        "parameters": ", ".join(f"{part} {count:,}" for part, count in counts.items() if count),
        "input": f"{data.frames} log-mel frames, mean {data.log_mel.mean:g}, std {data.log_mel.std:g}",
    }
    if labels := description.labels:
        rows["labels"] = f"{len(labels)}: {', '.join(labels[:3])}, ..."
    noted = (line for note in notes for line in aligned({"note": note}))
    return [*aligned(rows), *noted, *aligned({"written": written})]


def _wishes(args: argparse.Namespace) -> Wishes:
    labels = read_labels(args.labels) if args.labels else None
    return Wishes(args.heads, args.mean, args.std, labels, args.preset)


def _read_safetensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint, or a folder that holds one")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def _hugging_face_cfg(path: Path) -> dict[str, Any]:
    """Return what config.json beside the weights says, in the places of a fairseq cfg."""
    config = _json_beside(path)
    network = {key: config.get(key) for key in ("num_heads", "norm_eps", "norm_affine", "layer_norm_first")}
    return {"model": network} if config else {}


def _json_beside(path: Path) -> dict[str, Any]:
    """Read a JSON object beside the weights; {} if the file is missing."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a JSON {type(config).__name__}; a config is one JSON object")
    return config


def _sizes(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    return f"{folder}: config.json, " + ", ".join(f"{file.name} ({_mib(file)})" for file in files)


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / MIB:.1f} MiB"
