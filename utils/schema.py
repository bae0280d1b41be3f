"""What a tree of frozen dataclasses says about config keys: which exist, of which type, which is meant.

A schema maps each top-level key to a type; a section that is chosen by name may stand for all its dataclasses
as a dictionary by name. Used by ``utils/config.py``.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from utils.errors import ConfigError


def dataclass_of(hint: Any) -> type | None:
    """The dataclass that a type is or optionally is: ``Sdf`` for ``Sdf | None``, ``None`` for ``int``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [dataclass_of(option) for option in typing.get_args(hint)]
        return next((option for option in options if option is not None), None)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def fields_of(hint: Any) -> dict[str, Any] | None:
    """Keys and their types below a dataclass (an optional one, one of several by name), else ``None``."""
    if isinstance(hint, Mapping):
        merged: dict[str, Any] = {}
        for name, option in hint.items():
            for key, below in (fields_of(option) or {}).items():
                # A key may be a section in several of them, each with keys of its own.
                known = merged.get(key, below)
                merged[key] = below if known == below else {"": known, name: below}
        return merged
    cls = dataclass_of(hint)
    if cls is None:
        return None
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def keys_of(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections and leaves alike."""
    for key, hint in fields.items():
        yield prefix + key
        yield from keys_of(fields_of(hint) or {}, f"{prefix}{key}.")


def hint_at(fields: Mapping[str, Any], key: str) -> Any:
    """Type of a dotted key; the type of the whole field for a place inside a list or dictionary."""
    first, _, rest = re.sub(r"\[.*", "", key).partition(".")
    hint = fields.get(first, Any)
    below = fields_of(hint)
    return hint_at(below, rest) if rest and below is not None else hint


def nearest_key(key: str, schema: Mapping[str, Any]) -> str | None:
    """The known key most like ``key``: its last part counts most, its parents break ties."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    parent, _, last = key.rpartition(".")
    best, best_score = None, 0.0
    for known in keys_of(schema):
        known_parent, _, known_last = known.rpartition(".")
        same = likeness(last, known_last)
        score = 0.7 * same + 0.3 * likeness(parent, known_parent)
        if same >= 0.6 and score > best_score:
            best, best_score = known, score
    return best


def unknown_key(key: str, value: Any, siblings: Mapping[str, Any], schema: Mapping[str, Any]) -> ConfigError:
    """The error line for a key that the schema does not have; of a group, its first leaf is named."""
    while isinstance(value, Mapping) and value:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    near = nearest_key(key, schema)
    remedy = f"did you mean {near}?" if near else f"known here: {', '.join(siblings)}"
    return ConfigError(key, "unknown key", remedy)


def describe(hint: Any) -> str:
    """A type in words for error lines: ``float or null``, ``one of fp16, fp32``, ``a list of int``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} ({', '.join(describe(item) for item in arguments)})"
    if origin in (tuple, list):
        return f"a list of {describe(arguments[0])}"
    if origin is dict or fields_of(hint) is not None:
        return "a mapping of keys to values"
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


def as_written(value: Any) -> str:
    """A value as a config has it: ``true``, not ``True``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def setting_at(tree: Any, key: str) -> Any:
    """Value at a dotted key of plain nested dictionaries, ``None`` where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
