"""Which photographs show which part of a mesh, and cutting off what none of them does.

A signed distance closes every surface, also where no camera looked: behind a thing photographed from one
side there is a bulge, below it a bottom, both invented. They can be cut away, or only be marked.
"""

from dataclasses import replace

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
"""What is so little behind the nearest surface is that surface, scene units: twice the usual voxel."""
_WIDEST = 5.0
"""Tangent of the angle to the optical axis (79 degrees) beyond which nothing counts as seen."""
_MOST_OF_A_GAP = 0.005
"""Unseen patches smaller than this share of the surface are folds between what is seen, and stay."""


def count_views(mesh: TriangleMesh, scene: Scene) -> npt.NDArray[np.int64]:
    """How many training views show each vertex: in the frame, from outside, with nothing in front.

    Args:
        mesh: in metric scene space.
        scene: gives the training cameras; of more than ``MOST_VIEWS`` as many are looked through.

    Returns:
        ``(V,)``.
    """
    cameras = replace(scene.cameras, ndc=None)
    mesh = replace(mesh, normals=vertex_normals(mesh), colors=None)
    positions = torch.from_numpy(mesh.vertices).float()
    views = np.zeros(len(mesh.vertices), np.int64)
    for view in scene.train_indices[:: 1 + (len(scene.train_indices) - 1) // MOST_VIEWS]:
        in_frame = project(cameras, view, positions)[2].numpy()
        if in_frame.any():
            views += in_frame & _is_exposed(mesh, cameras.c2w[view].double().numpy())
    return views


def _is_exposed(mesh: TriangleMesh, c2w: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Vertices that are seen from outside, and with nothing in front, from a camera without a frame."""
    in_camera = (mesh.vertices - c2w[:, 3]) @ c2w[:, :3]
    depth = in_camera[:, 2]
    tangents = in_camera[:, :2] / np.where(depth > NEAR, depth, 1.0)[:, None]
    assert mesh.normals is not None
    is_exposed = ((c2w[:, 3] - mesh.vertices) * mesh.normals).sum(axis=1) > 0
    is_exposed &= (depth > NEAR) & (np.abs(tangents) < _WIDEST).all(axis=1)
    if not is_exposed.any():
        return is_exposed
    # A depth map that just holds them: as fine as it can be, whatever the lens.
    low, high = tangents[is_exposed].min(axis=0), tangents[is_exposed].max(axis=0)
    focal = _PIXELS / max(float((high - low).max()), 1e-9)
    intrinsics = np.array([[focal, 0.0, -focal * low[0]], [0.0, focal, -focal * low[1]], [0.0, 0.0, 1.0]])
    width, height = np.maximum(np.ceil(focal * (high - low)).astype(int), 1)
    render = render_mesh(mesh, c2w, intrinsics, (int(width), int(height)))
    nearest = np.where(render.mask, render.depth, np.inf)
    column, row = np.clip((focal * (tangents - low)).astype(int), 0, [width - 1, height - 1]).T
    return is_exposed & (depth < nearest[row, column] + _TOLERANCE)


def cut_unseen(mesh: TriangleMesh, views: npt.NDArray[np.int64], min_views: int) -> TriangleMesh:
    """Drop the faces of which no corner is in enough views, but for small gaps between others.

    Args:
        mesh: in any frame.
        views: ``(V,)`` as :func:`count_views` gives.
        min_views: at least 1.

    Raises:
        ExportError: nothing would be left.
    """
    is_unseen = (views < min_views)[mesh.faces].all(axis=1)
    if is_unseen.all():
        raise ExportError(
            "export.unseen", f"{min_views} training view(s) see no part of the mesh", "set it to keep"
        )
    areas = face_areas_and_normals(mesh)[0]
    patches = face_components(replace(mesh, faces=mesh.faces[is_unseen]))
    is_large = np.bincount(patches, areas[is_unseen]) > _MOST_OF_A_GAP * areas.sum()
    is_cut = np.zeros(len(mesh.faces), bool)
    is_cut[np.nonzero(is_unseen)[0][is_large[patches]]] = True
    return select_faces(mesh, ~is_cut)
