"""A configuration's file: JSON, overrides of its values, and what is wrong with either in one sentence."""

import difflib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from asda.config.base import Section, sections_of
from asda.config.presets import at
from asda.errors import UserError

# Keys of earlier versions, each with what to write instead.
RETIRED = {"data.workers": "data.threads threads read ahead; set data.threads, and leave data.workers out"}
MAX_CONFIG_BYTES = 1 << 20  # a run is described in a few kilobytes; more is not a config


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the tree in a file; raise UserError if it is not one."""
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


class RepeatedKeyError(ValueError):
    """A key is written twice in one object."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is written twice: JSON readers silently keep the last one."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(
            f"the key {next(n for n in names if names.count(n) > 1)!r} is written twice in one object"
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set "section.key=value" in a tree; raise UserError if it cannot be set."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"cannot read the override {override!r}; write it as section.key=value")
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RepeatedKeyError as error:
        raise UserError(f"cannot read the override {override!r}: {error}") from None
    except (ValueError, RecursionError):
        value = text
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"the override {override!r} goes through {section!r}, which is a value and not a section")
    tree[key] = value


def pop_retired_keys(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Take keys of earlier versions out of a tree; return "key=value" and what to write instead, for each."""
    found = []
    for dotted, instead in RETIRED.items():
        section, _, key = dotted.rpartition(".")
        part = at(tree, section)
        if isinstance(part, dict) and key in part:
            found.append((f"{dotted}={json.dumps(part.pop(key))}", instead))
    return found


def wrong_text(tree: dict[str, Any]) -> str:
    """Say which text of a tree no file can hold or be named: a zero byte, or what is not UTF-8; "" if none."""
    for where, text in _texts(tree):
        if wrong := next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), ""):
            return f"{where} holds the character {wrong!a}, which is not text; write it in UTF-8, without it"
    return ""


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key and every text of a tree, each with the words that say where it is."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"a key in {key or 'the config'}", name
            yield from _texts(item, f"{key}.{name}".lstrip("."))


def explain(error: ValidationError, kind: type[Section]) -> str:
    """Return the first complaint as one sentence, and the number of the others."""
    errors = [(keys_of(details, kind), details) for details in error.errors(include_url=False)]
    keys, first = errors[0]
    where = ".".join(map(str, keys)) or "the config"
    num_others = sum(other != keys for other, _ in errors)
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
        # A value of a union has a complaint for each of its types.
        rules = [e["msg"][0].lower() + e["msg"][1:] for other, e in errors if other == keys]
        sentence = f"{where} is {json.dumps(first['input'])[:80]}: {', or '.join(rules)}"
    return sentence + (f" (and {num_others} more like it)" if num_others else "")


def keys_of(error: ErrorDetails, kind: type[Section]) -> list[Any]:
    """Return the keys to a wrong value, without the members of unions that pydantic names too: pretrain, float."""
    location, keys = error["loc"], []
    unknown = location[-1:] if error["type"] == "extra_forbidden" else ()
    for part in location[: len(location) - len(unknown)]:
        if isinstance(part, int) or keys == ["_about"] or _dotted([*keys, part]) in known_keys(kind):
            keys.append(part)
    return [*keys, *unknown]


def _dotted(keys: list[Any]) -> str:
    return ".".join(str(key) for key in keys if not isinstance(key, int))  # positions in a list are no keys


def _nearest(keys: list[Any], kind: type[Section]) -> str:
    """Return '; did you mean data.train?' if a key looks like a known one, else the known ones."""
    known, dotted = known_keys(kind), _dotted(keys)
    if dotted in known:
        section = str(keys[0])
        return f"; it belongs to another {section}.{kind.model_fields[section].discriminator}"
    siblings = [k for k in known if k.rpartition(".")[0] == dotted.rpartition(".")[0]]
    by_name = {k.rpartition(".")[2]: k for k in known}
    close = difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.5)
    close = close or [by_name[n] for n in difflib.get_close_matches(str(keys[-1]), by_name, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(k.rpartition('.')[2] for k in siblings)}"


@cache
def known_keys(section: type[Section], prefix: str = "") -> dict[str, None]:
    """Return every dotted key of the tree, in its order."""
    keys = {}
    for name, field in section.model_fields.items():
        keys[prefix + (field.alias or name)] = None
        for part in sections_of(field.annotation):
            keys |= known_keys(part, f"{prefix}{name}.")
    return keys
