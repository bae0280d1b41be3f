"""Draw a capture before it is trained on: a picture, an interactive page and a coloured geometry file.

::

    folder/
      inspect.png     cameras from above and from the side, photographs with overlays, what was measured
      inspect.html    the same in 3-D, for any browser, without a network
      inspect.ply     cameras, points, sphere and axes in the world's frame, where exported meshes lie too
"""

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from process_data.inspection.measure import Inspection, frustum, frustum_size, inspect
from process_data.inspection.picture import (
    AXES,
    HELD_OUT,
    SPHERE,
    TRAINING,
    draw_inspection,
)
from process_data.inspection.viewer import viewer_page
from utils.errors import ExportError
from utils.images import write_png
from utils.mesh import transform_mesh, write_mesh
from utils.types import Scene, TriangleMesh

LOG = logging.getLogger(__name__)

_MOST_POINTS = 20000
"""Points in the geometry file; each is a small tetrahedron, because viewers hide loose vertices."""


def inspect_scene(scene: Scene, folder: Path) -> list[Path]:
    """Draw a capture into ``inspect.png``, ``inspect.html`` and ``inspect.ply`` and log what was found.

    Returns:
        The files, in that order.

    Raises:
        ExportError: a file cannot be written.
    """
    inspection = inspect(scene.metric())
    paths = [folder / f"inspect.{suffix}" for suffix in ("png", "html", "ply")]
    write_png(paths[0], draw_inspection(inspection))
    try:
        paths[1].write_text(viewer_page(inspection), encoding="utf-8")
    except OSError as error:
        raise ExportError(
            paths[1], f"cannot be written ({error.strerror})", "check free space and permissions"
        ) from error
    write_mesh(paths[2], transform_mesh(inspection_mesh(inspection), scene.world_from_scene.numpy()))
    for fact in inspection.facts:
        LOG.info("%s", fact)
    for warning in inspection.warnings:
        LOG.warning("%s", warning)
    if not inspection.report.fits:
        LOG.warning("%s", inspection.report.table())
    return paths


class _MeshBuilder:
    """Collects coloured triangles."""

    def __init__(self) -> None:
        self.vertices: list[Float64[np.ndarray, "_ 3"]] = []
        self.faces: list[Int64[np.ndarray, "_ 3"]] = []
        self.colors: list[UInt8[np.ndarray, "_ 3"]] = []
        self.count = 0

    def add(
        self,
        vertices: Float64[np.ndarray, "V 3"],
        faces: Int64[np.ndarray, "F 3"],
        colors: UInt8[np.ndarray, "V 3"] | tuple[int, int, int],
    ) -> None:
        self.vertices.append(vertices)
        self.faces.append(faces + self.count)
        self.colors.append(np.broadcast_to(np.asarray(colors, np.uint8), vertices.shape))
        self.count += len(vertices)

    def rod(self, path: Float64[np.ndarray, "K 3"], thickness: float, color: tuple[int, int, int]) -> None:
        """A three-sided tube along each segment of a path."""
        for start, end in pairwise(path):
            along = end - start
            side = np.cross(along, np.eye(3)[np.argmin(np.abs(along))])
            side *= thickness / max(1e-12, float(np.linalg.norm(side)))
            other = np.cross(along, side) / max(1e-12, float(np.linalg.norm(along)))
            angle = np.arange(3)[:, None] * (2.0 * np.pi / 3.0)
            ring = np.cos(angle) * side + np.sin(angle) * other
            corner = np.arange(3)
            after = (corner + 1) % 3
            faces = np.concatenate(
                [np.stack([corner, after, after + 3], 1), np.stack([corner, after + 3, corner + 3], 1)]
            )
            self.add(np.concatenate([start + ring, end + ring]), faces, color)

    def mesh(self) -> TriangleMesh:
        return TriangleMesh(
            np.concatenate(self.vertices), np.concatenate(self.faces), None, np.concatenate(self.colors)
        )


def inspection_mesh(inspection: Inspection) -> TriangleMesh:
    """Cameras, points, three great circles of the unit sphere and the axes as triangles, in scene space."""
    scene, builder = inspection.scene, _MeshBuilder()
    length = frustum_size(scene)
    for view in range(len(scene.cameras)):
        corners = frustum(scene, view, length)
        color = HELD_OUT if view in scene.test_indices else TRAINING
        thickness = 0.012 * length
        builder.rod(corners[[0, 1, 2, 3, 4, 1]], thickness, color)
        for corner in (2, 3, 4):
            builder.rod(corners[[0, corner]], thickness, color)
        # A bar at the picture's upper edge shows which way the camera is held.
        top = corners[1:3] + 0.12 * (corners[1:3] - corners[[4, 3]])
        builder.rod(top, 2.0 * thickness, color)
    angle = np.linspace(0.0, 2.0 * np.pi, 97)
    circle = np.stack([np.cos(angle), np.sin(angle), 0.0 * angle], axis=1)
    for shift in range(3):
        builder.rod(np.roll(circle, shift, axis=1), 0.004, SPHERE)
    for row in range(3):
        builder.rod(np.stack([np.zeros(3), 0.6 * np.eye(3)[row]]), 0.01, AXES[row])

    step = max(1, -(-len(inspection.points) // _MOST_POINTS))
    points, colors = inspection.points[::step], inspection.point_colors[::step]
    corners = 0.006 * np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    faces = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    builder.add(
        (points[:, None] + corners).reshape(-1, 3),
        (faces + 4 * np.arange(len(points))[:, None, None]).reshape(-1, 3),
        np.repeat(colors, 4, axis=0),
    )
    return builder.mesh()
