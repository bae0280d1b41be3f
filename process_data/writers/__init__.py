"""Any loaded scene as a capture on disk: NeuS, Blender, transforms.json or COLMAP.

Cameras and points are written in world coordinates, so that captures converted to and fro stay where they are
and meshes of either fit the other; pictures are written as the scene holds them, at their training size.
What a format cannot hold (lens distortion, a split, the region of interest) is said in the log, with the
config keys that bring it back where there are any.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from process_data.views import natural_key
from process_data.writers.blender import write_blender
from process_data.writers.colmap import write_colmap
from process_data.writers.neus import write_neus
from process_data.writers.transforms import write_transforms
from process_data.writers.views import reported, world_views
from utils.errors import ExportError
from utils.types import Scene

LOG = logging.getLogger(__name__)

CaptureKind = Literal["neus", "blender", "transforms", "colmap"]

WRITERS: dict[CaptureKind, Callable[[Scene, Path], list[Path]]] = {
    "neus": write_neus,
    "blender": write_blender,
    "transforms": write_transforms,
    "colmap": write_colmap,
}


def write_capture(scene: Scene, folder: Path, kind: CaptureKind) -> list[Path]:
    """Write a scene as a capture; the writers' modules show the layouts.

    Args:
        scene: any loaded scene.
        folder: a new or empty folder; missing parents are made.
        kind: the format.

    Returns:
        What was written.

    Raises:
        ExportError: the folder is not empty or cannot be written; a lens is too wide for the format.
    """
    _make_empty(folder)
    written = WRITERS[kind](scene, folder)
    if scene.depths is not None or scene.normals is not None:
        LOG.warning("depth and normal maps are not written")
    keys = _keys_to_restore(scene, kind)
    if keys:
        LOG.info("%s does not hold everything; to train on the same views and region: %s", kind, keys)
    return written


def _make_empty(folder: Path) -> None:
    """Make a folder, and refuse one that holds something."""
    with reported(folder):
        if folder.exists() and not folder.is_dir():
            raise ExportError(folder, "is a file, not a folder", "choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ExportError(folder, "is not empty", "choose a new folder, or empty this one")


def _keys_to_restore(scene: Scene, kind: CaptureKind) -> str:
    """Config keys that say what the format leaves out: held-out views and the region of interest."""
    keys = []
    order = list(range(len(scene.cameras)))
    if kind == "colmap":
        names = [view.image_path for view in world_views(scene)]
        # Views of a COLMAP model are counted in the order of their names.
        order.sort(key=lambda index: natural_key(names[index]))
    if scene.test_indices and kind in ("neus", "colmap"):
        held_out = sorted(order.index(index) for index in scene.test_indices)
        keys.append(f"dataset.holdout={str(held_out).replace(' ', '')}")
    if kind in ("blender", "colmap"):
        similarity = scene.world_from_scene.numpy()
        center = ",".join(f"{value:.6g}" for value in similarity[:3, 3])
        radius = np.cbrt(np.linalg.det(similarity[:3, :3]))
        keys.append(f"dataset.region_center=[{center}] dataset.region_radius={radius:.6g}")
    return " ".join(keys)
