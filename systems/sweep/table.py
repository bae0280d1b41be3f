"""The table of a sweep: settings that vary against results, as Markdown, CSV and a spreadsheet.

Numbers are compared where they can be: among the runs on one scene and its pictures. Over several scenes or
seeds there is a second table, of the means of all runs that agree in everything else.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from systems.sweep.plan import Metric, PlannedRun, Sweep
from systems.sweep.standing import Standing
from systems.sweep.xlsx import Cell, write_xlsx
from utils.errors import UserError

SCENE_KEYS = frozenset(
    f"dataset.{key}"
    for key in (
        *("name", "root_dir", "scene", "num_images", "image_size", "img_downscale", "images_dir"),
        *("holdout", "eval_split", "eval_step"),
    )
)
"""Keys that change what is measured, so that results stand beside one another only where these agree."""


@dataclass(frozen=True)
class Table:
    """A header and rows of cells as long as it."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def scene_of(sweep: Sweep, run: PlannedRun) -> tuple[str, ...]:
    """What a run is measured on: its values of the sweep's varying scene keys, as text."""
    return tuple(_text(run.setting(key)) for key in sweep.varying if key in SCENE_KEYS)


def runs_table(sweep: Sweep, standings: Mapping[str, Standing], folder: Path) -> Table:
    """One line per run: name, settings that vary, state, metrics, steps, minutes, folder, why it failed.

    The best value of each metric among the runs on one scene is bold, if there are two or more to compare.

    Args:
        sweep: gives runs and metrics.
        standings: of each run by its digest.
        folder: of the sweep; links are relative to it.
    """
    metrics = _shown_metrics(sweep, standings)
    best = _best(
        [
            (run.digest, scene_of(sweep, run), standings[run.digest].values)
            for run in sweep.runs
            if _is_done(run, standings)
        ],
        metrics,
    )
    rows = []
    for run in sweep.runs:
        standing = standings[run.digest]
        values = standing.values if standing.state == "done" else {}
        link = None if standing.trial is None else _relative_url(standing.trial, folder) + "/"
        rows.append(
            (
                Cell(run.name),
                *(Cell(_plain(run.setting(key))) for key in sweep.varying),
                Cell(standing.state),
                *(Cell(values.get(m.path), (run.digest, m.path) in best) for m in metrics),
                *(Cell(standing.values.get(name)) for name in _counts(metrics)),
                Cell(None if standing.trial is None else standing.trial.name, link=link),
                Cell(standing.message or None),
            )
        )
    names = (metric.name for metric in metrics)
    return Table(
        ("run", *sweep.varying, "state", *names, *_counts(metrics), "folder", "message"), tuple(rows)
    )


def means_table(sweep: Sweep, standings: Mapping[str, Standing]) -> Table | None:
    """Means over scenes and seeds of the runs that agree in everything else; ``None`` without any to average.

    The best mean of each metric is bold among those with all of their runs done.
    """
    repeated = [key for key in sweep.varying if key in SCENE_KEYS or key == "seed"]
    others = [key for key in sweep.varying if key not in repeated]
    if not repeated:
        return None
    groups: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in sweep.runs:
        groups.setdefault(tuple(_text(run.setting(key)) for key in others), []).append(run)
    metrics = [metric for metric in _shown_metrics(sweep, standings) if metric.is_higher_better is not None]
    means: list[dict[str, Any]] = []
    for runs in groups.values():
        done = [standings[run.digest].values for run in runs if _is_done(run, standings)]
        columns = {metric.path: [values.get(metric.path) for values in done] for metric in metrics}
        means.append({path: _mean(column) for path, column in columns.items()})
    complete = [all(_is_done(run, standings) for run in runs) for runs in groups.values()]
    best = _best([(k, (), mean) for k, mean in enumerate(means) if complete[k]], metrics)
    rows = tuple(
        (
            *(Cell(_plain(runs[0].setting(key))) for key in others),
            Cell(f"{sum(_is_done(run, standings) for run in runs)} of {len(runs)}"),
            *(Cell(means[k][metric.path], (k, metric.path) in best) for metric in metrics),
        )
        for k, runs in enumerate(groups.values())
    )
    return Table((*others, "runs", *(metric.name for metric in metrics)), rows)


def write_tables(
    sweep: Sweep, standings: Mapping[str, Standing], folder: Path, pictures: Sequence[Path] = ()
) -> Path:
    """Write ``table.md``, ``table.csv`` and ``table.xlsx`` into the sweep's folder.

    Args:
        sweep: gives runs and metrics.
        standings: of each run by its digest.
        folder: of the sweep.
        pictures: shown below the table of ``table.md``.

    Returns:
        Path of ``table.md``.

    Raises:
        UserError: the folder cannot be written.
    """
    table, means = runs_table(sweep, standings, folder), means_table(sweep, standings)
    page = [f"# {sweep.name}", "", f"Config `{sweep.config}`.", "", *_markdown(table)]
    if means is not None:
        page += ["", "Means over scenes and seeds:", "", *_markdown(means)]
    for path in pictures:
        page += ["", f"![{path.stem}]({_relative_url(path, folder)})"]
    lines = io.StringIO()
    csv.writer(lines).writerows([table.header, *([cell.value for cell in row] for row in table.rows)])
    sheets = {"runs": _with_header(table)} | ({} if means is None else {"means": _with_header(means)})
    try:
        # Renamed into place: whoever has one of them open never sees half of it.
        partial = folder / "table.partial"
        partial.write_text("\n".join(page) + "\n", encoding="utf-8")
        partial.replace(folder / "table.md")
        partial.write_text(lines.getvalue(), encoding="utf-8", newline="")
        partial.replace(folder / "table.csv")
        write_xlsx(partial, sheets)
        partial.replace(folder / "table.xlsx")
    except OSError as error:
        raise UserError(
            folder,
            f"the table cannot be written ({error})",
            "free disk space, close programs that have it open",
        ) from error
    return folder / "table.md"


# ------------------------------------------------------------------------------------------------------------


def _is_done(run: PlannedRun, standings: Mapping[str, Standing]) -> bool:
    return standings[run.digest].state == "done"


def _shown_metrics(sweep: Sweep, standings: Mapping[str, Standing]) -> list[Metric]:
    """Those asked for; of the default ones those that any run has."""
    done = [standing.values for standing in standings.values() if standing.state == "done"]
    return [
        metric
        for metric in sweep.metrics
        if not sweep.has_default_metrics or any(values.get(metric.path) is not None for values in done)
    ]


def _counts(metrics: Sequence[Metric]) -> list[str]:
    """Columns that stand behind the metrics unless they are among them."""
    return [name for name in ("steps", "minutes") if name not in [metric.path for metric in metrics]]


def _best(
    rows: Sequence[tuple[Any, tuple[str, ...], Mapping[str, Any]]], metrics: Sequence[Metric]
) -> set[tuple[Any, str]]:
    """Which row is best in which metric, within each group; equal ones all are.

    Args:
        rows: identity, group and values of each.
        metrics: those without a better direction have no best.
    """
    best = set()
    for metric in metrics:
        groups: dict[tuple[str, ...], list[tuple[Any, float]]] = {}
        for identity, group, values in rows:
            value = values.get(metric.path)
            if isinstance(value, (int, float)) and math.isfinite(value):
                groups.setdefault(group, []).append((identity, value))
        for members in groups.values():
            if metric.is_higher_better is None or len(members) < 2:
                continue
            top = (max if metric.is_higher_better else min)(value for _, value in members)
            best |= {(identity, metric.path) for identity, value in members if value == top}
    return best


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else None


def _plain(value: Any) -> str | int | float | bool:
    """A setting as a cell's value: numbers stay numbers, lists and mappings become JSON."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _relative_url(path: Path, folder: Path) -> str:
    return quote(path.relative_to(folder).as_posix(), safe="/=,@+")


def _with_header(table: Table) -> list[list[Cell]]:
    return [[Cell(name, is_bold=True) for name in table.header], *(list(row) for row in table.rows)]


def _markdown(table: Table) -> list[str]:
    """Lines of a table; without failures it has no column for their messages."""
    kept = [
        k
        for k, name in enumerate(table.header)
        if name != "message" or any(row[k].value is not None for row in table.rows)
    ]
    lines = [
        "| " + " | ".join(table.header[k] for k in kept) + " |",
        "|" + "---|" * len(kept),
    ]
    return lines + ["| " + " | ".join(_in_markdown(row[k]) for k in kept) + " |" for row in table.rows]


def _in_markdown(cell: Cell) -> str:
    value = cell.value
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("|", "\\|")
    if cell.link:
        return f"[{text}]({cell.link})"
    return f"**{text}**" if cell.is_bold else text
