"""A configuration's file: JSON, overrides of its values, and what is wrong with either in one sentence."""

import difflib
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from asda.config.base import Section, alternatives, sections_of
from asda.errors import UserError, say

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


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is written twice: JSON readers silently keep the last one."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is written twice in one object")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set "section.key=value" in a tree; raise UserError if it cannot be set."""
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


def refuse_retired_keys(tree: dict[str, Any], path: str | Path) -> None:
    """Raise UserError if a user's configuration has a key of an earlier version."""
    for key, value in _pop_retired_keys(tree).items():
        raise UserError(f"{path}: {key}={json.dumps(value)} is no longer a key: {RETIRED[key]}")


def drop_retired_keys(tree: dict[str, Any], path: str | Path) -> None:
    """Take keys of earlier versions out of a configuration that a run has stored, and say so."""
    for key, value in _pop_retired_keys(tree).items():
        say(f"{path}: ignoring {key}={json.dumps(value)}, which an earlier version wrote: {RETIRED[key]}")


def _pop_retired_keys(tree: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for dotted in RETIRED:
        *sections, key = dotted.split(".")
        part: Any = tree
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict) and key in part:
            found[dotted] = part.pop(key)
    return found


def explain(error: ValidationError, kind: type[Section]) -> str:
    """Return the first complaint as one sentence, and the number of the others."""
    errors = error.errors(include_url=False)
    first, keys = errors[0], keys_of(errors[0]["loc"], kind)
    where = ".".join(map(str, keys)) or "the config"
    others = [other for other in errors[1:] if keys_of(other["loc"], kind) != keys]
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
        rules = [e["msg"][0].lower() + e["msg"][1:] for e in errors if keys_of(e["loc"], kind) == keys]
        sentence = f"{where} is {json.dumps(first['input'])[:80]}: {', or '.join(rules)}"
    more = f" (and {len(others)} more like it)" if others else ""
    return sentence + more


def keys_of(location: tuple[Any, ...], kind: type[Section]) -> list[Any]:
    """Return the keys of a pydantic location, without the members of unions that it names too: pretrain, float."""
    keys, types = [], [kind]
    for part in location:
        if len(types) > 1:  # a union: pydantic names the member that it tried
            types = [member for member in types if _label(member) == part][:1]
            continue
        keys.append(part)
        types = _inside(types[0], part) if types else []
    return keys


def _label(member: Any) -> Any:
    """Return pydantic's name for a member of a union; None for a value, which holds no keys."""
    if get_origin(member) is list:
        return f"list[{get_args(member)[0].__name__}]"
    if not sections_of(member):
        return None
    tags = [field.annotation for field in member.model_fields.values() if get_origin(field.annotation) is Literal]
    return next((get_args(tag)[0] for tag in tags if len(get_args(tag)) == 1), member.__name__)


def _inside(kind: Any, key: Any) -> list[Any]:
    """Return the types that the value of a key in a section, or of an entry in a list, may have."""
    if isinstance(kind, type) and issubclass(kind, Section):
        found = [field.annotation for name, field in kind.model_fields.items() if key in (name, field.alias)]
        return alternatives(found[0]) if found else []
    return [member for entry in get_args(kind)[:1] for member in alternatives(entry)]


def _nearest(keys: list[Any], kind: type[Section]) -> str:
    """Return '; did you mean data.train?' if a key looks like a known one, else the known ones."""
    known = known_keys(kind)
    dotted = ".".join(str(key) for key in keys if not isinstance(key, int))  # positions in a list are no keys
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


def known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return every dotted key of the tree."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + (field.alias or name))
        for part in sections_of(field.annotation):
            keys += known_keys(part, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))
