"""Pictures of a sweep's runs side by side: each held-out view, and the meshes.

    strips/<view>.png     photograph | run | run ...      colour, and the normals below it
    strips/meshes.png     one row per run: its mesh from six sides, as in save/mesh.png

Where a sweep runs on several scenes each has pictures of its own, with the scene's name in front.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from systems.sweep.plan import PlannedRun, Sweep
from systems.sweep.standing import Standing
from systems.sweep.table import SCENE_KEYS, scene_of
from utils.errors import DataError
from utils.images import panel, read_rgba, write_png

MAX_VIEWS = 6
COLUMNS = 6
"""Tiles in a row; more go below."""
TILE_WIDTHS = (200, 400)
"""Pictures are made at least and at most so wide, pixels."""
MESH_WIDTH = 1536
_PARTS, _GAP = 5, 4
"""Of a picture in ``save/test``: colour, photograph, normal, depth, opacity, and the pixels between them."""
_LABEL_HEIGHT = 24

Picture = UInt8[np.ndarray, "_ _ 3"]


def write_strips(sweep: Sweep, standings: Mapping[str, Standing], folder: Path) -> list[Path]:
    """Write the pictures of all runs that are done.

    Args:
        sweep: gives the runs.
        standings: of each run by its digest.
        folder: of the sweep.

    Returns:
        Paths of the pictures, the meshes of a scene behind its views.

    Raises:
        DataError: a run's picture cannot be read.
        ExportError: a picture cannot be written.
    """
    scenes: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in sweep.runs:
        if standings[run.digest].state == "done":
            scenes.setdefault(scene_of(sweep, run), []).append(run)
    written = []
    for runs in scenes.values():
        saves = {run.name: _save_of(standings[run.digest]) for run in runs}
        strips = {view: view_strip(view, saves) for view in _common_views(list(saves.values()))}
        meshes = {name: save / "mesh.png" for name, save in saves.items() if (save / "mesh.png").is_file()}
        if meshes:
            strips["meshes"] = mesh_strip(meshes)
        for name, picture in strips.items():
            written.append(folder / "strips" / f"{_scene_name(sweep, runs[0])}{name}.png")
            write_png(written[-1], picture)
    return written


def view_strip(view: str, saves: Mapping[str, Path]) -> Picture:
    """The photograph of a view, then colour over normals of every run.

    Args:
        view: stem of the picture's name in ``save/test``.
        saves: folder ``save`` of each run by its label, at least one.

    Raises:
        DataError: a picture cannot be read or is none that ``--test`` writes.
    """
    tiles: list[Picture] = []
    for label, save in saves.items():
        rgb, photograph, normal = split_panel(save / "test" / f"{view}.png")
        if not tiles:
            photograph = _fit(photograph)
            tiles.append(labelled("photograph", np.vstack([photograph, np.full_like(photograph, 255)])))
        tiles.append(labelled(label, np.vstack([_fit(rgb), _fit(normal)])))
    rows = [panel(tiles[start : start + COLUMNS], _GAP) for start in range(0, len(tiles), COLUMNS)]
    return _stack(rows)


def mesh_strip(pictures: Mapping[str, Path]) -> Picture:
    """Contact sheets by label, one below the other.

    Raises:
        DataError: a picture cannot be read.
    """
    rows = []
    for label, path in pictures.items():
        sheet = read_rgba(path)[0]
        rows.append(labelled(label, _resize(sheet, min(sheet.shape[1], MESH_WIDTH))))
    return _stack(rows)


def split_panel(path: Path) -> tuple[Picture, Picture, Picture]:
    """Colour, photograph and normal of a picture that ``--test`` wrote.

    Raises:
        DataError: it cannot be read, or has another layout.
    """
    picture = read_rgba(path)[0]
    width, rest = divmod(picture.shape[1] - (_PARTS - 1) * _GAP, _PARTS)
    if rest or width < 1:
        raise DataError(path, "is no picture that --test writes", "test that run again")
    rgb, photograph, normal = (
        picture[:, start : start + width] for start in (0, width + _GAP, 2 * (width + _GAP))
    )
    return rgb, photograph, normal


def labelled(text: str, picture: Picture) -> Picture:
    """The picture with a line of text above it, made smaller and cut off where it is too long."""
    width = picture.shape[1]
    text = text.encode("ascii", "replace").decode()

    def length(text: str, scale: float) -> int:
        return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0])

    scale = min(0.5, max(0.35, 0.5 * (width - 8) / max(length(text, 0.5), 1)))
    if length(text, scale) > width - 8:
        while len(text) > 1 and length(text + "...", scale) > width - 8:
            text = text[:-1]
        text += "..."
    band = np.full((_LABEL_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(band, text, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([band, picture])


def _save_of(standing: Standing) -> Path:
    assert standing.trial is not None  # A run that is done has one.
    return standing.trial / "save"


def _common_views(saves: Sequence[Path]) -> list[str]:
    """Views that every run has, at most ``MAX_VIEWS`` of them, spread over all."""
    found = [{path.stem for path in (save / "test").glob("*.png")} for save in saves]
    views = sorted(set.intersection(*found))
    stride = max(1, math.ceil(len(views) / MAX_VIEWS))
    return views[::stride]


def _scene_name(sweep: Sweep, run: PlannedRun) -> str:
    """What the names of a scene's pictures begin with; nothing where there is one scene."""
    values = [str(run.setting(key)) for key in sweep.varying if key in SCENE_KEYS]
    parts = [re.sub(r"[^\w.@+-]+", "-", Path(value).name) for value in values]
    return "".join(f"{part}-" for part in parts)


def _fit(picture: Picture) -> Picture:
    low, high = TILE_WIDTHS
    return _resize(picture, min(max(picture.shape[1], low), high))


def _resize(picture: Picture, width: int) -> Picture:
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    # Averaged where it shrinks; where it grows the pixels stay visible as such.
    kind = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, (width, height), interpolation=kind))


def _stack(rows: Sequence[Picture]) -> Picture:
    """Rows below one another, the shorter ones filled up with white."""
    width = max(row.shape[1] for row in rows)
    filled = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.vstack(filled)
