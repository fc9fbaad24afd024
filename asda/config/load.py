"""A configuration's file: JSON, overrides of its values, and what is wrong with either in one sentence."""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from asda.errors import UserError

MAX_CONFIG_BYTES = 1 << 20  # a run is described in a few kilobytes; more is not a config


def read_json_object(path: Path) -> dict[str, Any]:
    """The tree in a file; UserError where it is none."""
    if not path.is_file():
        raise UserError(f"there is no config file {path}; the ones that come with asda are in configs/")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {num_bytes} bytes; a config has at most {MAX_CONFIG_BYTES}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a JSON {type(tree).__name__}; a config is one JSON object")
    return tree


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is written twice: JSON readers keep the last one in silence."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is written twice in one object")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set "section.key=value" in a tree; UserError where that cannot be."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"cannot read the override {override!r}; write it as section.key=value")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"the override {override!r} goes through {section!r}, which is a value and not a section")
    tree[key] = value


def explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first complaint as one sentence; the count of the others after it."""
    errors = error.errors(include_url=False)
    first, keys = errors[0], keys_of(errors[0]["loc"])
    where = ".".join(map(str, keys)) or "the config"
    others = [other for other in errors[1:] if keys_of(other["loc"]) != keys]
    if first["type"] == "extra_forbidden":
        sentence = f"unknown key {where}{_nearest(keys, kind)}"
    elif first["type"] == "missing":
        sentence = f"the key {where} is missing"
    elif first["type"] == "value_error":
        sentence = first["msg"].removeprefix("Value error, ")
    elif first["type"] == "union_tag_invalid":
        tags = first.get("ctx", {})
        key = str(tags.get("discriminator")).strip("'")
        sentence = f"{where}.{key} is {tags.get('tag')!r}; it must be one of {tags.get('expected_tags')}"
    else:
        # A value that may be of several types has a complaint of each.
        rules = [e["msg"][0].lower() + e["msg"][1:] for e in errors if keys_of(e["loc"]) == keys]
        sentence = f"{where} is {json.dumps(first['input'])[:80]}: {', or '.join(rules)}"
    more = f" (and {len(others)} more like it)" if others else ""
    return sentence + more


def keys_of(location: tuple[Any, ...]) -> list[Any]:
    """The keys of the file in a pydantic location, which also names the branches of unions: pretrain, float."""
    branches = ("pretrain", "classify", "asda", "ast", "LogMelStats", "str", "float", "constrained-float")
    return [key for key in location if key not in branches and not str(key).startswith(("list[", "literal["))]


def _nearest(keys: list[Any], kind: type[BaseModel]) -> str:
    """'; did you mean data.train?' for a key that looks like a known one."""
    known = known_keys(kind)
    dotted = ".".join(str(key) for key in keys if not isinstance(key, int))  # places in a list are no keys
    if dotted in known:
        tag = {"objective": "objective.kind", "model": "model.architecture"}.get(str(keys[0]), "kind")
        return f"; it belongs to another {tag}"
    siblings = [k for k in known if k.rpartition(".")[0] == dotted.rpartition(".")[0]]
    by_name = {k.rpartition(".")[2]: k for k in known}
    close = difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.5)
    close = close or [by_name[n] for n in difflib.get_close_matches(str(keys[-1]), by_name, n=1, cutoff=0.6)]
    return (
        f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    )


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + (field.alias or name))
        for part in _sections_of(field.annotation):
            keys += known_keys(part, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections_of(part)]
