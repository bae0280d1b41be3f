"""Look at a mesh without a graphics card: a z-buffer rasteriser and a clay-shaded contact sheet.

Pixel (i, j) is covered when its centre (j + 0.5, i + 0.5) lies in the projected triangle, the pixel
convention of ``utils.types``. Cameras have OpenCV axes. Attributes are interpolated with perspective
correction.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import numpy as np
import numpy.typing as npt
from numba import njit

from utils.mesh import vertex_normals
from utils.types import TriangleMesh

Floats = npt.NDArray[np.float64]
NEAR = 1e-6
"""Faces with a vertex closer than this to a perspective camera's plane are not drawn."""
SIDES = (
    (1.0, 0.0, 0.0),
    (-1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, -1.0, 0.0),
    (0.0, 0.0, 1.0),
    (0.0, 0.0, -1.0),
)
"""Where the viewer of each picture of a contact sheet stands: +x -x +y -y +z -z."""


@dataclass(frozen=True)
class MeshRender:
    """A picture of a mesh; background pixels are zero everywhere, -1 in ``face_indices``."""

    face_indices: npt.NDArray[np.int64]
    """``(H, W)`` the face seen, -1 = none."""
    depth: npt.NDArray[np.float32]
    """``(H, W)`` distance along the camera's z axis."""
    normal: npt.NDArray[np.float32]
    """``(H, W, 3)`` unit, in the frame of the mesh."""
    color: npt.NDArray[np.float32] | None
    """``(H, W, 3)`` sRGB 0..1; ``None`` when the mesh has no colours."""

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """``(H, W)`` where the mesh is seen."""
        return self.face_indices >= 0


def render_mesh(
    mesh: TriangleMesh,
    c2w: npt.NDArray[np.floating],
    intrinsics: npt.NDArray[np.floating],
    size: tuple[int, int],
    orthographic: bool = False,
) -> MeshRender:
    """Rasterise a mesh, both sides of each face.

    Args:
        mesh: its normals are used when present, else those of the geometry.
        c2w: ``(3, 4)`` camera pose in the frame of the mesh, OpenCV axes.
        intrinsics: ``(3, 3)``; an orthographic camera maps (x, y, 1) instead of (x / z, y / z, 1) to pixels.
        size: (width, height) in pixels.
        orthographic: parallel projection; nothing is too near then.

    Returns:
        The picture.
    """
    rotation, centre = np.asarray(c2w, np.float64)[:, :3], np.asarray(c2w, np.float64)[:, 3]
    in_camera = (mesh.vertices - centre) @ rotation
    depth = in_camera[:, 2]
    homogeneous = in_camera.copy()
    homogeneous[:, 2] = 1.0
    faces = mesh.faces
    if orthographic:
        inverse_depth = np.ones(len(depth))
    else:
        inverse_depth = 1.0 / np.where(depth > NEAR, depth, 1.0)
        homogeneous[:, :2] *= inverse_depth[:, None]
    pixels = homogeneous @ np.asarray(intrinsics, np.float64).T
    drawn = np.arange(len(faces)) if orthographic else np.nonzero((depth[faces] > NEAR).all(axis=1))[0]

    width, height = size
    nearest = np.full((height, width), np.inf)
    face_indices = np.full((height, width), -1, np.int64)
    weights = np.zeros((height, width, 3))
    _rasterise(
        pixels[:, :2].copy(), depth.copy(), inverse_depth, faces, drawn, nearest, face_indices, weights
    )

    hit = face_indices >= 0
    corners, at = faces[face_indices[hit]], weights[hit]
    source = vertex_normals(mesh) if mesh.normals is None else mesh.normals
    normal = np.zeros((height, width, 3), np.float32)
    blended = _blend(source, corners, at)
    normal[hit] = blended / np.maximum(np.linalg.norm(blended, axis=1, keepdims=True), 1e-12)
    color = None
    if mesh.colors is not None:
        color = np.zeros((height, width, 3), np.float32)
        color[hit] = _blend(mesh.colors, corners, at) / 255.0
    return MeshRender(face_indices, np.where(hit, nearest, 0.0).astype(np.float32), normal, color)


def contact_sheet(mesh: TriangleMesh, size: int = 384) -> npt.NDArray[np.uint8]:
    """Six sides of a mesh in parallel projection, +x -x +y -y +z -z: grey clay, and its colours below if any.

    The light sits at the viewer and the normals are those of the geometry, so that dents and noise show. Back
    faces (seen through holes, or turned inside out) are reddish. From the sides z points up, from above and
    below y does.

    Args:
        mesh: in any units; it fills the pictures.
        size: side of each picture in pixels, drawn at twice that and averaged.

    Returns:
        ``(size or 2 * size, 6 * size, 3)``, sRGB.
    """
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    centre, radius = 0.5 * (low + high), max(0.5 * float((high - low).max()), 1e-12)
    bare = replace(mesh, normals=vertex_normals(mesh))
    focal = 0.95 * size / radius
    intrinsics = np.array([[focal, 0.0, size], [0.0, focal, size], [0.0, 0.0, 1.0]])
    clay, painted = [], []
    for side in SIDES:
        towards_viewer = np.array(side)
        pose = _look_along(-towards_viewer, centre + 2.0 * radius * towards_viewer)
        view = render_mesh(bare, pose, intrinsics, (2 * size, 2 * size), orthographic=True)
        facing = view.normal.astype(np.float64) @ towards_viewer
        clay.append(_average(_clay(facing, view.mask)))
        if view.color is not None:
            painted.append(_average(np.where(view.mask[..., None], view.color, 1.0)))
    rows = [np.concatenate(row, axis=1) for row in (clay, painted) if row]
    return np.rint(255.0 * np.concatenate(rows, axis=0)).astype(np.uint8)


def _look_along(forward: Floats, centre: Floats) -> Floats:
    """Pose ``(3, 4)`` at ``centre`` looking along ``forward``, z up (y up when looking along z)."""
    up = np.array([0.0, 1.0, 0.0]) if abs(forward[2]) > 0.9 else np.array([0.0, 0.0, 1.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward, centre], axis=1)


def _clay(facing: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Grey clay under a headlight, on white: brightness from the cosine between normal and viewer."""
    shade = (0.12 + 0.78 * np.abs(facing) ** 0.9)[..., None]
    front, back = shade * np.array([1.0, 0.98, 0.95]), shade * np.array([1.0, 0.55, 0.5])
    return np.where(mask[..., None], np.where(facing[..., None] >= 0, front, back), 1.0)


def _average(image: npt.NDArray[np.floating]) -> Floats:
    """Mean over blocks of 2 x 2 pixels."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return image.reshape(height, 2, width, 2, 3).astype(np.float64).mean(axis=(1, 3))


def _blend(source: npt.NDArray[np.generic], corners: npt.NDArray[np.int64], weights: Floats) -> Floats:
    """Interpolate vertex rows ``(V, 3)`` at P points with corner indices and weights ``(P, 3)``."""
    return np.einsum("pkc,pk->pc", source[corners].astype(np.float64), weights)


@no_type_check
@njit(cache=True)
def _rasterise(pixels, depth, inverse_depth, faces, drawn, nearest, face_indices, weights):
    """Z-buffer: for each pixel centre the nearest face, its depth and its perspective-correct corner weights.

    Weights on screen become weights on the triangle by w_i / z_i, normalised; ``inverse_depth`` of ones means
    parallel projection, where both are the same.
    """
    height, width = nearest.shape
    for f in drawn:
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, bx, by, cx, cy = (
            pixels[a, 0],
            pixels[a, 1],
            pixels[b, 0],
            pixels[b, 1],
            pixels[c, 0],
            pixels[c, 1],
        )
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        # Bounds are clipped as floats: a vertex far outside the picture does not fit into an integer.
        first_x = int(max(np.ceil(min(ax, bx, cx) - 0.5), 0.0))
        last_x = int(min(np.floor(max(ax, bx, cx) - 0.5), width - 1.0))
        first_y = int(max(np.ceil(min(ay, by, cy) - 0.5), 0.0))
        last_y = int(min(np.floor(max(ay, by, cy) - 0.5), height - 1.0))
        for i in range(first_y, last_y + 1):
            for j in range(first_x, last_x + 1):
                x, y = j + 0.5, i + 0.5
                wa = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
                wb = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
                wc = 1.0 - wa - wb
                if wa < 0 or wb < 0 or wc < 0:
                    continue
                wa, wb, wc = wa * inverse_depth[a], wb * inverse_depth[b], wc * inverse_depth[c]
                total = wa + wb + wc
                wa, wb, wc = wa / total, wb / total, wc / total
                z = wa * depth[a] + wb * depth[b] + wc * depth[c]
                if z < nearest[i, j]:
                    nearest[i, j], face_indices[i, j] = z, f
                    weights[i, j, 0], weights[i, j, 1], weights[i, j, 2] = wa, wb, wc
