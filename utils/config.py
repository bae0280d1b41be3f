"""Configs: YAML files and command-line overrides onto frozen dataclasses. Only this module knows OmegaConf.

    base files  ──┐
    the YAML    ──┼─ merge ─> raw tree ─ check names and keys ─> schema with values ─ resolve ─> Config
    key=value   ──┘

The schema is made of the dataclasses that the rooms keep beside their classes. A section such as ``model``
may offer several of them by name; ``model.name`` chooses. Whatever is wrong becomes one :class:`ConfigError`
line that begins with the dotted key (or file and line) at fault.

A YAML may carry ``base:``, one path or a list of paths relative to that YAML. They are merged in order, each
over the one before, and the file itself over them all; bases may have bases.

It may also say what is otherwise on a GPU (``on_cuda:``, a tree of keys) and with how much of its memory
(``on_vram:``, such trees by GiB). These lie over the file that has them and over its bases, and below files
that have it as a base: whoever is more specific has the last word.

Pitfall: a field typed ``Any`` (schedules: a number or a list of ``[fraction, value]`` pairs) holds lists,
never tuples, after loading, so that a config read back from ``parsed.yaml`` equals the one written to it.
"""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationValidationError,
    OmegaConfBaseException,
)

from utils.errors import ConfigError
from utils.schema import (
    dataclass_of,
    describe,
    fields_of,
    hint_at,
    keys_of,
    nearest_key,
    setting_at,
    unknown_key,
)

Number = int | float
Sections = Mapping[str, type | Mapping[str, type]]
"""Each top-level section's dataclass, or its dataclasses by name."""

NAME_TEMPLATE = "${model.name}-${dataset.name}-${basename:${dataset.root_dir}}"


@dataclass(frozen=True)
class Config:
    """A finished config: frozen objects for the rooms, and the same as plain values for the record."""

    name: str
    """Folder of the experiment below the outputs folder."""
    tag: str
    """First part of the trial's folder name."""
    seed: int
    """Seed of every random generator, 0 .. 2^32 - 1."""
    dataset: Any
    model: Any
    system: Any
    trainer: Any
    export: Any
    test: Any
    tree: dict[str, Any]
    """Every key with its final value: no interpolations, lists for tuples."""

    def to_yaml(self) -> str:
        """Write the whole config as YAML that :func:`load_config` reads back to an equal config."""
        return OmegaConf.to_yaml(OmegaConf.create(self.tree))


def load_config(
    path: str | Path,
    overrides: Sequence[str],
    sections: Sections,
    device: str = "cpu",
    vram: int | None = None,
) -> Config:
    """Read a YAML file with its bases, apply overrides, and build the frozen config objects.

    Args:
        path: a YAML file; also the ``parsed.yaml`` of a finished run.
        overrides: ``key=value`` strings with dotted keys and YAML values, the last one wins.
        sections: the schema, by top-level section; a dictionary by name is chosen from by ``<section>.name``.
        device: ``cpu`` or ``cuda``, for which ``on_cuda`` is meant.
        vram: on a GPU, memory to fit into, GiB, for which ``on_vram`` has settings.

    Returns:
        The config. ``system.name`` is the model's name unless it is given.

    Raises:
        ConfigError: file missing or malformed, key unknown, value of the wrong type or out of range.
    """
    raw = _read(Path(path), (), device, vram)
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
    if "system" in sections:
        raw = _merge(OmegaConf.create({"system": {"name": "${model.name}"}}), raw)

    schema = _choose_classes(raw, sections)
    config = _typed(container(raw), schema)
    tree = _plain(_resolve(config, schema))
    # The second pass starts from plain values, as a later run that reads parsed.yaml does: both are equal.
    typed = _typed(tree, schema)
    return Config(**{key: _build(typed, key) for key in schema}, tree=tree)


@dataclass(frozen=True)
class _Scalars:
    """The top-level keys that are no sections."""

    name: str = NAME_TEMPLATE
    tag: str = "run"
    seed: int = 42


# ------------------------------------------------------------------------------------------------------------
# Resolvers: ``${name:arguments}`` in a YAML
# ------------------------------------------------------------------------------------------------------------


def calc_exp_lr_decay_rate(factor: Number, n: Number) -> float:
    """Per-step factor of an exponential decay that reaches ``factor`` after ``n`` steps: 0.01, 2 -> 0.1."""
    return float(factor ** (1.0 / n))


def basename(path: str | None) -> str:
    """Last part of a path, ``"none"`` where there is no path: ``inputs/dtu_scan65/`` -> ``dtu_scan65``."""
    return "none" if path is None else os.path.basename(os.path.abspath(path)) or "none"


_RESOLVERS: dict[str, Any] = {
    "calc_exp_lr_decay_rate": calc_exp_lr_decay_rate,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": basename,
}
for _name, _resolver in _RESOLVERS.items():
    OmegaConf.register_resolver(_name, _resolver, replace=True, annotation_validation="off")


# ------------------------------------------------------------------------------------------------------------
# Reading: files, bases, overrides
# ------------------------------------------------------------------------------------------------------------


def _read(path: Path, above: tuple[Path, ...], device: str, vram: int | None) -> DictConfig:
    """One YAML over its bases. ``above`` are the files that asked for this one, outermost first."""
    if path.resolve() in above:
        chain = " -> ".join(file.name for file in (*above, path))
        raise ConfigError(path, f"base files go in a circle ({chain})", "remove one of these base: entries")
    above = (*above, path.resolve())
    config = load_yaml(path)
    bases = container(config).get("base")
    config.pop("base", None)
    bases = [bases] if isinstance(bases, str) else bases or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            path, "base: must be a path or a list of paths", "write base: [base/one.yaml, base/two.yaml]"
        )
    merged = OmegaConf.create({})
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, above, device, vram))
    on_cuda, on_vram = (config.pop(key, None) or OmegaConf.create({}) for key in ("on_cuda", "on_vram"))
    merged = _merge(merged, config)
    if device != "cuda":
        return merged
    with_memory = container(on_vram).get(vram) or {}
    return _merge(_merge(merged, on_cuda), OmegaConf.create(with_memory))


def load_yaml(path: Path) -> DictConfig:
    """Parse one YAML file that holds a mapping.

    Raises:
        ConfigError: one line for every way in which this fails.
    """
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        siblings = sorted(file.name for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
        remedy = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise ConfigError(path, "no such file", remedy) from None
    except OSError as error:
        raise ConfigError(path, error.strerror or str(error), "give a readable YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(path, "not a text file", "give a YAML file in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}", f"malformed YAML ({error.problem})", "correct that line") from None
    except yaml.YAMLError as error:
        raise ConfigError(path, f"malformed YAML ({_first_line(error)})", "correct the file") from None
    except GrammarParseError as error:
        what = f"malformed interpolation in {error.full_key} ({_first_line(error)})"
        raise ConfigError(path, what, "write ${key} or ${resolver:arguments}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(path, "holds a list", "write a mapping of keys to values")
    return config


def _parse_override(override: str) -> DictConfig:
    """``a.b=value`` as a tree of its own."""
    key, equals, value = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(
            f"override {override!r}", "not of the form key=value", "write e.g. trainer.max_steps=3000"
        )
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(
            key, f"value {value!r} is malformed ({problem})", "quote it for the shell and YAML"
        ) from None


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """Untyped merge; where only one side is a mapping, the upper side replaces the lower."""
    return typing.cast(DictConfig, OmegaConf.merge(below, above))


# ------------------------------------------------------------------------------------------------------------
# Raw tree -> typed tree -> resolved values -> objects
# ------------------------------------------------------------------------------------------------------------


def _choose_classes(raw: DictConfig, sections: Sections) -> dict[str, Any]:
    """Type of every top-level key, with the dataclass of each section that is chosen by name."""
    schema: dict[str, Any] = {**(fields_of(_Scalars) or {}), **sections}
    for key in raw:
        # A misspelt section comes before the complaint that the section meant has no name.
        if key not in schema:
            raise unknown_key(str(key), container(raw)[key], schema, schema)
    for section, offered in sections.items():
        if isinstance(offered, type):
            continue
        known = ", ".join(sorted(offered))
        try:
            name = OmegaConf.select(raw, f"{section}.name")
        except OmegaConfBaseException:
            name = None
        if name is None:
            raise ConfigError(f"{section}.name", "not set", f"choose one of: {known}")
        if name not in offered:
            near = difflib.get_close_matches(str(name), offered, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? known: {known}" if near else f"choose one of: {known}"
            raise ConfigError(f"{section}.name", f"unknown name {name!r}", hint)
        schema[section] = offered[name]
    return schema


def container(config: DictConfig) -> dict[Any, Any]:
    """Plain nested dictionaries and lists, interpolations as text."""
    return typing.cast(dict[Any, Any], OmegaConf.to_container(config))


def _leaves(tree: Mapping[Any, Any], schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All given values by dotted key, after making sure that every key is known.

    A section without keys (``trainer:`` with everything below commented out) counts as empty.
    """

    def walk(tree: Mapping[Any, Any], fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if name not in fields:
                raise unknown_key(key, value, fields, schema)
            below = fields_of(fields[name])
            if below is not None and isinstance(value, Mapping):
                yield from walk(value, below, f"{key}.")
            elif below is None or value is not None or type(None) in typing.get_args(fields[name]):
                yield key, value

    return list(walk(tree, schema, ""))


def _typed(tree: Any, schema: Mapping[str, Any]) -> DictConfig:
    """The schema's defaults with the given values merged in and type-checked; interpolations stay."""
    leaves = _leaves(tree, schema)
    sections = [(key, hint) for key, hint in schema.items() if dataclass_of(hint)]
    root = dataclasses.make_dataclass("Tree", sections, bases=(_Scalars,), frozen=True, kw_only=True)
    defaults = OmegaConf.structured(_blank(root, {key for key, _ in leaves}))
    if "root_dir" not in (fields_of(schema.get("dataset")) or {}) and "name" not in tree:
        leaves.append(("name", NAME_TEMPLATE.rpartition("-")[0]))
    try:
        return _merge(defaults, _nested(leaves))
    except OmegaConfBaseException:
        # Not every OmegaConf error knows its key: merge the values one at a time to find the one at fault.
        for key, value in leaves:
            try:
                _merge(defaults, _nested([(key, value)]))
            except OmegaConfBaseException:
                raise _wrong_type(key, value, schema) from None
        raise


def _blank(cls: type, given: Set[str], prefix: str = "", default: object = None) -> Any:
    """An object of a schema class that holds the defaults but was never checked.

    OmegaConf would take the class itself, but it holds a field typed ``Any`` to the container type of its
    default, so that a tuple could never become a number.

    Args:
        cls: a dataclass.
        given: dotted keys for which a value will be merged over this.
        prefix: where the object stands in the tree, with a dot at the end.
        default: the object that the class around this one has as its default, if any.
    """
    blank: Any = object.__new__(cls)
    hints = fields_of(cls) or {}
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if default is not None:
            value = getattr(default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = MISSING if field.default is dataclasses.MISSING else field.default
        inner = dataclass_of(hint)
        if hint is Any:
            value = None if key in given else _plain(value)
        elif inner is not None and (value is not None or any(name.startswith(f"{key}.") for name in given)):
            below = value if dataclasses.is_dataclass(value) else None
            value = _blank(inner, given, f"{key}.", below)
        object.__setattr__(blank, field.name, value)
    return blank


def _nested(leaves: Sequence[tuple[str, Any]]) -> DictConfig:
    """Dotted keys with values as a tree."""
    tree: dict[str, Any] = {}
    for key, value in leaves:
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return OmegaConf.create(tree)


def _wrong_type(key: str, value: Any, schema: Mapping[str, Any]) -> ConfigError:
    """The error line for a value that does not fit its key."""
    hint = hint_at(schema, key)
    options = [str(option) for option in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else "correct the value"
    return ConfigError(key, f"expected {describe(hint)}, got {value!r}", remedy)


def _resolve(config: DictConfig, schema: Mapping[str, Any]) -> Any:
    """All values with interpolations computed, after making sure that none is missing."""
    given = container(config)
    for key in keys_of(schema):
        if setting_at(given, key) == "???":
            raise ConfigError(key, "has no value", f"set it in the config or with {key}=...")
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        value = setting_at(given, re.sub(r"\[.*", "", key))
        if isinstance(error, InterpolationKeyError):
            wanted = re.findall(r"'([^']*)'", str(error))[:1] or [""]
            near = nearest_key(wanted[0], schema)
            remedy = f"did you mean ${{{near}}}?" if near else "refer to a key of this config"
            raise ConfigError(key, f"{value} refers to {wanted[0]!r}, which does not exist", remedy) from None
        if isinstance(error, InterpolationValidationError):
            raise _wrong_type(key, value, schema) from None
        raise ConfigError(key, f"{value} cannot be computed ({_first_line(error)})", "correct it") from None


def _plain(value: Any) -> Any:
    """Dictionaries, lists, numbers, strings and null only: what any YAML reader understands."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _build(typed: DictConfig, key: str) -> Any:
    """The frozen dataclass object of one section, or the value of a top-level scalar."""
    value = typed[key]
    if isinstance(value, DictConfig):
        try:
            return OmegaConf.to_object(value)
        except OmegaConfBaseException:
            raise
        except ValueError as error:
            # Range checks live in __post_init__ of the dataclasses and begin with the dotted key themselves.
            where, colon, rest = str(error).partition(": ")
            what, _, remedy = (rest if colon else str(error)).partition("; ")
            where = _whole_key(where, _refused(value, key)) if colon else key
            raise ConfigError(where, what, remedy or "correct the value") from None
    if key in ("name", "tag") and (value in ("", ".", "..") or re.search(r"[/\\\0]", value)):
        raise ConfigError(key, f"{value!r} cannot be the name of a folder", "leave out slashes")
    if key == "seed" and not 0 <= value < 2**32:
        raise ConfigError(key, f"must be between 0 and 2^32 - 1, got {value}", "choose another seed")
    return value


def _refused(section: DictConfig, key: str) -> str:
    """Dotted key of the innermost dataclass that refuses its values, somewhere in the section at ``key``."""
    for name, below in typing.cast(Mapping[str, Any], section).items():
        if isinstance(below, DictConfig):
            try:
                OmegaConf.to_object(below)
            except ValueError:
                return _refused(below, f"{key}.{name}")
    return key


def _whole_key(where: str, section: str) -> str:
    """A key of a section that stands in several places, and so names its keys from itself on, in full.

    ``proposal.padding`` of ``model.background.proposal`` is ``model.background.proposal.padding``.
    """
    parent, _, last = section.rpartition(".")
    return f"{parent}.{where}" if parent and where.partition(".")[0] == last else where


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
