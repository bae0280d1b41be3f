"""The synthetic scenes' ground truth: the field at points, true distances, and the surface as a fine mesh.

Everything here is in scene space.
"""

from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.spatial import KDTree
from torch import Tensor

from process_data import synthetic_render
from process_data.synthetic_field import FIGURINE, FIGURINE_TABLE, GLOSSY, NICHE, ROOM, SPHERE, THIN, WALL
from utils.extraction import extract_surface
from utils.types import TriangleMesh

SceneName = Literal["figurine", "sphere", "figurine-table", "thin", "glossy", "wall", "niche", "room"]
SCENES: dict[str, int] = {
    "figurine": FIGURINE,
    "sphere": SPHERE,
    "figurine-table": FIGURINE_TABLE,
    "thin": THIN,
    "glossy": GLOSSY,
    "wall": WALL,
    "niche": NICHE,
    "room": ROOM,
}
"""Names in configs -> numbers in the compiled field."""

_HALF_BOX = 0.88
"""Every scene fits into the cube of this half side."""


def signed_distance(
    points: Float[np.ndarray, "P 3"], scene: SceneName = "figurine"
) -> Float64[np.ndarray, " P"]:
    """The scene's field: zero exactly on the surface, negative inside, never beyond the true distance.

    Exact for ``sphere``. For the figurine it is a bound (see ``synthetic_field``): its slope is at most 1
    everywhere and mostly 0.84 at the surface. :func:`exact_distance` is the slower, true distance.

    Args:
        points: positions in scene space.
        scene: which scene.
    """
    points = np.ascontiguousarray(points, dtype=np.float64)
    values = np.empty(len(points))
    synthetic_render.distances(SCENES[scene], points, values)
    return values


def exact_distance(
    points: Float[np.ndarray, "P 3"], scene: SceneName = "figurine"
) -> Float64[np.ndarray, " P"]:
    """True signed distance to the surface, negative inside: to 1e-5 scene units near it, 5e-4 far from it.

    The nearest vertex of a fine ground-truth mesh is slid along the surface to the point nearest to each
    query.

    Args:
        points: positions in scene space.
        scene: which scene.
    """
    points = np.ascontiguousarray(points, dtype=np.float64)
    tree = _surface_tree(scene)
    _, nearest = tree.query(points)
    feet = np.ascontiguousarray(tree.data[nearest])
    synthetic_render.slide_to_nearest(SCENES[scene], points, feet)
    return np.copysign(np.linalg.norm(points - feet, axis=1), signed_distance(points, scene))


@cache
def _surface_tree(scene: SceneName) -> KDTree:
    return KDTree(ground_truth_mesh(scene, 256).vertices)


def ground_truth_mesh(scene: SceneName, resolution: int = 256) -> TriangleMesh:
    """The scene's surface: marching cubes, then every vertex moved onto the zero level (to less than 1e-6).

    Args:
        scene: which scene.
        resolution: cells along the side of the scene's box (1.76 scene units). 256 gives edges of
            about 0.007; below 64 thin parts may break.

    Returns:
        A watertight mesh in scene space with unit normals and sRGB colours as seen along the normal.

    Raises:
        ValueError: ``resolution`` is not positive.
    """

    def sdf(positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        return torch.from_numpy(signed_distance(positions.double().numpy(), scene)).float()

    mesh = extract_surface(sdf, resolution, _HALF_BOX, clip_to_sphere=False)
    vertices = mesh.vertices.copy()
    normals, colors = np.empty_like(vertices), np.empty_like(vertices)
    synthetic_render.settle(SCENES[scene], vertices, normals, colors)
    return TriangleMesh(
        vertices, mesh.faces, normals.astype(np.float32), np.round(colors * 255.0).astype(np.uint8)
    )
