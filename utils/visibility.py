"""Which photographs show which part of a mesh, from where, and cutting off what none of them does.

A signed distance closes every surface, also where no camera looked: behind a thing photographed from one
side there is a bulge, below it a bottom, both invented. They can be cut away, or only be marked.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from utils.errors import ExportError
from utils.lens import project
from utils.mesh import face_areas_and_normals, face_components, select_faces, vertex_normals
from utils.raster import NEAR, render_mesh
from utils.types import Scene, TriangleMesh

MOST_VIEWS = 100
"""More views show little more; as many are looked through, evenly chosen."""
_PIXELS = 512
"""Along the longer side of the depth maps that tell what stands in front."""
_TOLERANCE = 0.01
"""What is so little behind the nearest surface is that surface, scene units, besides what a pixel spans."""
_LEAST_COSINE = 0.02
"""Of the angle at which a surface is seen, where the depth is reckoned that a pixel of it spans."""
_NEGLIGIBLE = 0.005
"""Share of the surface, or of the unit sphere, if that is less (surroundings may be vast): smaller unseen
patches are folds between what is seen, and stay; smaller seen patches that nothing seen connects to others
are debris, and go."""


def views_to_look_through(scene: Scene) -> list[int]:
    """The training views, or ``MOST_VIEWS`` of them, evenly chosen."""
    views = scene.train_indices
    chosen = np.linspace(0, len(views) - 1, min(len(views), MOST_VIEWS)).round().astype(int)
    return [views[index] for index in chosen]


@dataclass(frozen=True)
class Sight:
    """What :func:`views_to_look_through` show of a mesh: in the frame, from outside, unhidden."""

    views: npt.NDArray[np.int64]
    """How many of them show each vertex, ``(V,)``."""
    towards: npt.NDArray[np.float32]
    """Unit vectors from each vertex to where they look from on average, weighted by the squared cosine of the
    angle to the normal; zeros where none does, ``(V, 3)``."""


def sight_of(mesh: TriangleMesh, scene: Scene) -> Sight:
    """Look at a mesh through the training cameras.

    Args:
        mesh: in metric scene space.
        scene: gives the cameras.
    """
    cameras = replace(scene.cameras, ndc=None)
    mesh = replace(mesh, normals=vertex_normals(mesh), colors=None)
    assert mesh.normals is not None
    positions = torch.from_numpy(mesh.vertices).float()
    views = np.zeros(len(mesh.vertices), np.int64)
    total = np.zeros((len(mesh.vertices), 3))
    for view in views_to_look_through(scene):
        c2w = cameras.c2w[view].double().numpy()
        towards = c2w[:, 3] - mesh.vertices
        towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-12)
        cosine = (towards * mesh.normals).sum(axis=1)
        is_candidate = project(cameras, view, positions)[2].numpy() & (cosine > 0)
        is_exposed = _is_exposed(mesh, c2w, is_candidate, cosine)
        views += is_exposed
        total += (is_exposed * cosine**2)[:, None] * towards
    length = np.linalg.norm(total, axis=1, keepdims=True)
    towards = np.divide(total, length, out=np.zeros_like(total), where=length > 0)
    return Sight(views, towards.astype(np.float32))


def _is_exposed(
    mesh: TriangleMesh,
    c2w: npt.NDArray[np.float64],
    is_candidate: npt.NDArray[np.bool_],
    cosine: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:
    """Which candidates have nothing in front, whatever the camera's lens; ``cosine`` of all vertices."""
    is_exposed = np.zeros(len(mesh.vertices), bool)
    # A lens may look anywhere: depth maps along the axes of a cube, mostly along one of them alone.
    in_camera = (mesh.vertices - c2w[:, 3]) @ c2w[:, :3]
    longest = np.abs(in_camera).argmax(axis=1)
    is_ahead = np.take_along_axis(in_camera, longest[:, None], axis=1)[:, 0] > 0
    for axis in range(3):
        for sign, is_there in ((1.0, is_ahead), (-1.0, ~is_ahead)):
            chosen = np.nonzero(is_candidate & (longest == axis) & is_there)[0]
            if len(chosen) == 0:
                continue
            turn = np.roll(np.eye(3), 2 - axis, axis=1)
            turn[:, 2] *= sign
            turn[:, 1] *= sign  # No mirror.
            pose = np.column_stack([c2w[:, :3] @ turn, c2w[:, 3]])
            is_exposed[chosen] = _is_nearest(mesh, pose, chosen, cosine[chosen])
    return is_exposed


def _is_nearest(
    mesh: TriangleMesh,
    pose: npt.NDArray[np.float64],
    chosen: npt.NDArray[np.int64],
    cosine: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:
    """Which of the ``chosen`` vertices, within 45 degrees of a camera's axis, have nothing in front."""
    in_camera = (mesh.vertices[chosen] - pose[:, 3]) @ pose[:, :3]
    depth = in_camera[:, 2]
    tangents = in_camera[:, :2] / np.maximum(depth, NEAR)[:, None]
    # A depth map that just holds them: as fine as it can be.
    low, high = tangents.min(axis=0), tangents.max(axis=0)
    focal = _PIXELS / max(float((high - low).max()), 1e-9)
    intrinsics = np.array([[focal, 0.0, -focal * low[0]], [0.0, focal, -focal * low[1]], [0.0, 0.0, 1.0]])
    width, height = np.maximum(np.ceil(focal * (high - low)).astype(int), 1)
    render = render_mesh(mesh, pose, intrinsics, (int(width), int(height)))
    nearest = np.where(render.mask, render.depth, np.inf)
    column, row = np.clip((focal * (tangents - low)).astype(int), 0, [width - 1, height - 1]).T
    cosine = np.maximum(cosine, _LEAST_COSINE)
    spanned = depth / focal * np.sqrt(1.0 - np.minimum(cosine, 1.0) ** 2) / cosine
    return depth < nearest[row, column] + _TOLERANCE + spanned


def cut_unseen(mesh: TriangleMesh, views: npt.NDArray[np.int64], min_views: int) -> TriangleMesh:
    """Drop the faces of which no corner is in enough views, but for small gaps between others.

    What the cut has severed stays, each part of it, if it is larger than debris.

    Args:
        mesh: in scene space.
        views: ``(V,)`` as :class:`Sight` has them.
        min_views: at least 1.

    Raises:
        ExportError: nothing would be left.
    """
    areas = face_areas_and_normals(mesh)[0]
    least = _NEGLIGIBLE * min(float(areas.sum()), 4.0 * np.pi)
    is_unseen: npt.NDArray[np.bool_] = np.all((views < min_views)[mesh.faces], axis=1)
    is_left = ~is_unseen
    is_left[is_unseen] = _patch_areas(mesh, is_unseen, areas) <= least
    is_kept = is_left.copy()
    is_kept[is_left] = _patch_areas(mesh, is_left, areas) > least
    if is_unseen.all() or not is_kept.any():
        raise ExportError(
            "export.unseen", f"{min_views} training view(s) see no part of the mesh", "set it to keep"
        )
    return select_faces(mesh, is_kept)


def _patch_areas(
    mesh: TriangleMesh, chosen: npt.NDArray[np.bool_], areas: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """For each of the chosen faces the area of the connected patch of these that it belongs to."""
    patches = face_components(replace(mesh, faces=mesh.faces[chosen]))
    return np.bincount(patches, areas[chosen]).astype(np.float64)[patches]
