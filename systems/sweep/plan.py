"""What a sweep's YAML file asks for: every run with its settings, checked before the first one starts.

    name: losses                             # folder below outputs/sweeps; the file's name if not given
    config: ../neus-synthetic.yaml           # beside this file, or from the working directory
    common: {trainer.max_minutes: 2}         # for all runs; or a list of key=value
    runs:                                    # named runs, and what each changes
      - {name: full}
      - {name: no-eikonal, set: {system.loss.eikonal: 0}}
    grid: {seed: [1, 2, 3]}                  # all combinations; with runs as well, each of them with each
    metrics: [psnr_masked, chamfer]          # columns: short names, or paths such as mesh.components
    commands: [train, test]                  # or [train], [train, mesh]
    launcher: local                          # or ray
    parallel: 1                              # runs at once; with ray as many as it has room for
    resources: {num_gpus: 1}                 # what ray sets aside for each run

Later wins: config, ``common``, ``set`` and ``grid``, the command line. The settings of a run make a hash that
stands in its folder's name: a changed setting (or another version of the code, with other keys) is another
run, and one that only got another name is still the same.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systems.ground_truth import SURFACE_ERRORS
from utils.config import Sections, container, load_config, load_yaml
from utils.errors import ConfigError, UserError
from utils.schema import setting_at

LAUNCHERS = ("local", "ray")
COMMANDS = (("train", "test"), ("train", "mesh"), ("train",))
"""What a run can be asked to do; ``--test`` exports the mesh as well."""
_KEYS = (
    *("name", "config", "common", "runs", "grid"),
    *("metrics", "commands", "launcher", "parallel", "resources"),
)

_SHORT = {
    **{name: f"mean.{name}" for name in ("psnr", "psnr_masked", "ssim", "lpips", *SURFACE_ERRORS)},
    **{
        name: f"geometry.{name}"
        for name in ("chamfer", "accuracy", "completeness", "hausdorff_95", "normal_consistency")
    },
    **{name: f"mesh.{name}" for name in ("vertices", "faces", "components", "boundary_edges", "watertight")},
    **{name: name for name in ("steps", "minutes", "frames")},
}
"""Short names of metrics by where they stand: in metrics.json, or (without a dot) in runs.csv."""
_IS_HIGHER_BETTER = {
    **dict.fromkeys(("psnr", "psnr_masked", "ssim", "normal_consistency", "watertight"), True),
    **dict.fromkeys(("lpips", "chamfer", "accuracy", "completeness", "hausdorff_95", "minutes"), False),
    **dict.fromkeys(SURFACE_ERRORS, False),
    **dict.fromkeys(("components", "boundary_edges", "nonmanifold_edges"), False),
}
DEFAULT_METRICS = ("psnr", "psnr_masked", "ssim", "lpips", "chamfer")


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    name: str
    """As the sweep's file says it."""
    path: str
    """Dotted path in metrics.json, or a column of runs.csv."""

    @property
    def is_higher_better(self) -> bool | None:
        """``None`` where neither direction is better, as for a count of steps."""
        last = self.path.partition(".")[2] or self.path
        return True if last.startswith("fscore@") else _IS_HIGHER_BETTER.get(last)


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """Unique in its sweep; the given name, and what it has of the grid."""
    overrides: tuple[str, ...]
    """``key=value`` for run.py."""
    tree: Mapping[str, Any]
    """Every config key with its final value."""
    digest: str
    """Hash of all of them, 8 hexadecimal digits."""

    def setting(self, key: str) -> Any:
        """Final value of a dotted key, ``None`` where there is none."""
        return setting_at(self.tree, key)


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, understood."""

    name: str
    config: Path
    runs: tuple[PlannedRun, ...]
    varying: tuple[str, ...]
    """Dotted keys in which its runs differ."""
    metrics: tuple[Metric, ...]
    has_default_metrics: bool
    """Whether the file leaves the metrics to us; then those that no run has are left out."""
    commands: tuple[str, ...]
    launcher: str
    parallel: int | None
    """Runs at once; ``None``: as the launcher has room."""
    resources: Mapping[str, int | float]
    """Of each run, for Ray."""


def load_sweep(
    path: Path, overrides: Sequence[str], sections: Sections, device: str = "cpu", vram: int | None = None
) -> Sweep:
    """Read a sweep's file and make sure that each of its runs has a valid config.

    Args:
        path: the YAML file, see above.
        overrides: ``key=value`` for all runs, over everything in the file.
        sections: the schema of configs, as :func:`utils.config.load_config` takes it.
        device: ``cpu`` or ``cuda``.
        vram: GPU memory to fit into, GiB.

    Raises:
        ConfigError: the file or the config is missing or malformed, a key or metric is unknown, there is
            nothing to run, or a run's config is invalid; the run is named.
    """
    raw = container(load_yaml(path))
    for key in raw:
        _check_choice(path, "key", key, _KEYS)
    name = raw.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.@+-]*", name):
        raise ConfigError(
            f"{path}: name", f"{name!r} cannot be the name of a folder", "use letters, digits, - and _"
        )
    config = _find_config(path, raw.get("config"))
    drawn = _combine(path, _named_runs(path, raw.get("runs")), _grid(path, raw.get("grid")))
    swept = list(dict.fromkeys(key for _, settings in drawn for key in settings))
    for override in overrides:
        if override.partition("=")[0] in swept:
            raise ConfigError(override, f"{path} varies this key", "change its values there")
    common = _common(path, raw.get("common"))
    runs = []
    for label, settings in drawn:
        texts = (*common, *(_override(key, value) for key, value in settings.items()), *overrides)
        runs.append(_plan(path, label, texts, config, sections, device, vram))
    _check_distinct(path, runs)
    chosen = raw.get("metrics")
    return Sweep(
        *(name, config, tuple(runs), tuple(key for key in swept if _differs(runs, key))),
        metrics=_metrics(path, DEFAULT_METRICS if chosen is None else chosen),
        has_default_metrics=chosen is None,
        commands=_commands(path, raw.get("commands", ["train", "test"])),
        launcher=_check_choice(f"{path}: launcher", "launcher", raw.get("launcher", "local"), LAUNCHERS),
        parallel=_parallel(path, raw.get("parallel")),
        resources=_resources(path, raw.get("resources") or {}),
    )


def check_captures(sweep: Sweep) -> None:
    """Make sure that the captures of all runs are there, rather than find out hours later.

    Raises:
        UserError: ``dataset.root_dir`` of a run does not exist.
    """
    for run in sweep.runs:
        root = run.setting("dataset.root_dir")
        if root is not None and not Path(root).expanduser().exists():
            raise UserError(root, f"no such folder, which run {run.name} needs", "check dataset.root_dir")


# ------------------------------------------------------------------------------------------------------------
# Parts of the file
# ------------------------------------------------------------------------------------------------------------


def _check_choice(where: object, kind: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(where, f"unknown {kind} {value!r}", remedy)
    return str(value)


def _find_config(path: Path, given: Any) -> Path:
    if not isinstance(given, str):
        raise ConfigError(
            f"{path}: config", "not given", "write config: ../neus-dtu.yaml, relative to this file"
        )
    places = [path.parent / given, Path(given)]
    # Where there is none, reading the first says so, with the nearest name that exists.
    return next((place for place in places if place.is_file()), places[0])


def _common(path: Path, given: Any) -> list[str]:
    """Settings of all runs as overrides."""
    if isinstance(given, Mapping):
        return [_override(key, value) for key, value in given.items()]
    if given is None or (isinstance(given, list) and all(isinstance(item, str) for item in given)):
        return list(given or [])
    raise ConfigError(
        f"{path}: common", "not a mapping and not a list of key=value", "write common: {trainer.max_steps: 9}"
    )


def _named_runs(path: Path, given: Any) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each entry of ``runs``."""
    where, example = f"{path}: runs", "write - {name: no-mask, set: {system.loss.mask: 0}}"
    if given is None:
        return []
    if not isinstance(given, list):
        raise ConfigError(where, "not a list", example)
    runs = []
    for entry in given:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ConfigError(where, f"{entry!r} has no name", example)
        for key in entry:
            _check_choice(f"{where}: {entry['name']}", "key", key, ("name", "set"))
        settings = entry.get("set") or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}: {entry['name']}: set", "not a mapping of keys to values", example)
        runs.append((entry["name"], dict(settings)))
    return runs


def _grid(path: Path, given: Any) -> list[dict[str, Any]]:
    """All combinations of the grid's values; the last key changes fastest."""
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: grid", "not a mapping of keys to lists", "write grid: {seed: [1, 2]}")
    for key, values in given.items():
        if not isinstance(values, list) or not values:
            what = "empty list" if values == [] else f"{values!r} is not a list of values"
            raise ConfigError(f"{path}: grid: {key}", what, "write e.g. seed: [1, 2, 3]")
    return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


def _combine(
    path: Path, named: list[tuple[str, dict[str, Any]]], grid: list[dict[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """Each named run with each point of the grid: their names and settings."""
    if not any(grid) and not named:
        raise ConfigError(path, "nothing to run", "give grid: {key: [values]} or runs: [{name, set}]")
    twice = sorted(
        {key for _, settings in named for key in settings} & {key for point in grid for key in point}
    )
    if twice:
        raise ConfigError(f"{path}: {twice[0]}", "is in runs and in grid", "leave it out of one of them")
    keys = [key for point in grid[:1] for key in point]
    # A key with a single value tells nothing, unless there is nothing else to tell.
    short = _short_keys([key for key in keys if any(p[key] != grid[0][key] for p in grid)] or keys)
    drawn = []
    for (name, settings), point in itertools.product(named or [("", {})], grid or [{}]):
        parts = [f"{short[key]}={_short_value(value)}" for key, value in point.items() if key in short]
        drawn.append((",".join(([name] if name else []) + parts), settings | point))
    return drawn


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of each dotted key, as many as tell it from the others."""

    def tail(key: str, length: int) -> str:
        return ".".join(key.split(".")[-length:])

    lengths = {
        key: next(
            length
            for length in range(1, len(key.split(".")) + 1)
            if sum(tail(other, length) == tail(key, length) for other in keys) == 1
        )
        for key in keys
    }
    return {key: tail(key, length) for key, length in lengths.items()}


def _short_value(value: Any) -> str:
    return Path(value).name if isinstance(value, str) else json.dumps(value, default=str).replace(" ", "")


def _metrics(path: Path, given: Any) -> tuple[Metric, ...]:
    if not isinstance(given, (list, tuple)) or not given:
        raise ConfigError(f"{path}: metrics", "not a list of names", "write metrics: [psnr_masked, chamfer]")
    metrics = []
    for name in map(str, given):
        is_path = name.startswith(("mean.", "geometry.", "mesh."))
        if not is_path:
            _check_choice(f"{path}: metrics", "metric", name, tuple(_SHORT))
        metrics.append(Metric(name, name if is_path else _SHORT[name]))
    return tuple(metrics)


def _commands(path: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or tuple(given) not in COMMANDS:
        known = ", ".join(f"[{', '.join(commands)}]" for commands in COMMANDS)
        raise ConfigError(f"{path}: commands", f"{given!r} cannot be done", f"give one of {known}")
    return tuple(given)


def _parallel(path: Path, given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or given < 1):
        raise ConfigError(f"{path}: parallel", f"expected 1 or more, got {given!r}", "give a number of runs")
    return given


def _resources(path: Path, given: Any) -> Mapping[str, int | float]:
    example = "write resources: {num_cpus: 4, num_gpus: 1}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: resources", "not a mapping", example)
    for key, value in given.items():
        _check_choice(f"{path}: resources", "key", key, ("num_cpus", "num_gpus"))
        if not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{path}: resources: {key}", f"expected a number, got {value!r}", example)
    return dict(given)


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------


def _override(key: Any, value: Any) -> str:
    # JSON is YAML that means the same wherever it stands: a quoted "1" stays text, a list stays a list.
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def _plan(
    path: Path,
    name: str,
    overrides: tuple[str, ...],
    config: Path,
    sections: Sections,
    device: str,
    vram: int | None,
) -> PlannedRun:
    try:
        tree = load_config(config, overrides, sections, device, vram).tree
    except ConfigError as error:
        what, _, remedy = str(error).rpartition("; ")
        raise ConfigError(f"{path}: run {name}", what, remedy) from error
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return PlannedRun(name, overrides, tree, digest)


def _check_distinct(path: Path, runs: Sequence[PlannedRun]) -> None:
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{path}: runs", f"{count} runs are called {name}", "give each a name of its own")
    first: dict[str, str] = {}
    for run in runs:
        if run.digest in first:
            raise ConfigError(
                *(
                    path,
                    f"runs {first[run.digest]} and {run.name} have the same settings",
                    "remove one of them",
                )
            )
        first[run.digest] = run.name


def _differs(runs: Sequence[PlannedRun], key: str) -> bool:
    return any(run.setting(key) != runs[0].setting(key) for run in runs)
