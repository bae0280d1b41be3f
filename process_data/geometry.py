"""Where cameras look, which way is up, and balls around points: for normalisation and camera paths.

Turn, move or scale the cameras, and what the functions find turns, moves or scales with them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.spatial
from jaxtyping import Float64

from process_data.views import View
from utils.lens import lens_rays


def nearest_to_lines(
    origins: Float64[np.ndarray, "N 3"],
    directions: Float64[np.ndarray, "N 3"],
    fallback: Float64[np.ndarray, " 3"],
) -> Float64[np.ndarray, " 3"]:
    """Find the point with the least sum of distances to some lines.

    Distances rather than their squares (iteratively reweighted least squares), so that a few lines that pass
    elsewhere do not pull the point away.

    Args:
        origins: a point on each line.
        directions: unit vectors along the lines.
        fallback: where to go along directions that the lines leave open, as parallel ones do.
    """
    # Each term is the projection across one line.
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    offsets = origins - fallback
    weights = np.ones(len(origins))
    point = np.zeros(3)
    for _ in range(20):
        matrix = (weights[:, None, None] * across).mean(axis=0) + 1e-4 * np.eye(3)
        point = np.linalg.solve(matrix, np.einsum("n,nij,nj->i", weights, across, offsets) / len(origins))
        misses = np.linalg.norm(np.einsum("nij,nj->ni", across, point - offsets), axis=1)
        typical = float(np.median(misses))
        if typical < 1e-9 * np.abs(offsets).max():
            break
        # Lines nearer than a fifth of the typical miss count alike, or the nearest one would win alone.
        weights = 1.0 / np.maximum(misses / typical, 0.2)
        weights /= weights.mean()
    return fallback + point


def look_at_point(
    c2w: Float64[np.ndarray, "N 3 4"], fallback: Float64[np.ndarray, " 3"]
) -> Float64[np.ndarray, " 3"]:
    """Find the point nearest to all optical axes, or ``fallback`` if it lies behind most cameras."""
    centers, axes = c2w[:, :, 3], c2w[:, :, 2]
    point = nearest_to_lines(centers, axes, fallback)
    # Axes that diverge meet behind the cameras, where no one looks.
    is_behind = np.median(((point - centers) * axes).sum(axis=1)) <= 0.0
    return fallback if is_behind else point


def up_axis(c2w: Float64[np.ndarray, "N 3 4"]) -> Float64[np.ndarray, " 3"]:
    """Find the capture's up axis: the mean of the cameras' up vectors, across their right vectors.

    The plain mean leans towards the middle of an arc when the cameras look down; the right vectors of cameras
    that are held level all lie in the horizontal plane and correct that (on DTU the cameras roll by 2
    degrees about this axis, by 13 about the mean). On a small patch they say little and the mean stays.
    Minimises ``mean((u . right)^2) + e |u|^2 - 2 e (u . mean_up)``.

    Pictures turned by 90 degrees (portrait among landscape) are known by their steep right vectors, left out.
    Where the up vectors mostly cancel out, as from a drone that looks down, up is against the optical axes.

    Returns:
        A unit vector.
    """
    is_level = np.ones(len(c2w), bool)
    up = _up_of_level_cameras(c2w)
    for _ in range(3):
        is_level = np.abs(c2w[:, :, 0] @ up) < 0.5
        if 2 * is_level.sum() <= len(c2w):
            break
        up = _up_of_level_cameras(c2w[is_level])
    return up


def _up_of_level_cameras(c2w: Float64[np.ndarray, "N 3 4"]) -> Float64[np.ndarray, " 3"]:
    right, ups, forward = c2w[:, :, 0], -c2w[:, :, 1], c2w[:, :, 2]
    mean_up = ups.mean(axis=0)
    mean_forward = forward.mean(axis=0)
    if np.linalg.norm(mean_up) < 0.5 and mean_up @ mean_forward < 0.1:
        mean_up = mean_up - mean_forward
    # The first camera decides where these cancel out, too.
    mean_up = mean_up + 1e-6 * ups[0]
    up: Float64[np.ndarray, " 3"] = np.linalg.solve(right.T @ right / len(right) + 0.005 * np.eye(3), mean_up)
    return up / np.linalg.norm(up)


def enclosing_ball(points: Float64[np.ndarray, "P 3"]) -> tuple[Float64[np.ndarray, " 3"], float]:
    """Give centre and radius of the smallest ball around some points, to about 0.5 % of the radius.

    Source: Badoiu and Clarkson, "Smaller core-sets for balls", SODA 2003: step towards the farthest point,
    each time less far.
    """
    center = points.mean(axis=0)
    for step in range(1, 201):
        farthest = points[np.square(points - center).sum(axis=1).argmax()]
        center = center + (farthest - center) / (step + 1)
    return center, float(np.linalg.norm(points - center, axis=1).max())


def robust_ball(points: Float64[np.ndarray, "P 3"]) -> tuple[Float64[np.ndarray, " 3"], float]:
    """Centre and radius of a ball around nearly all points: thrice, the farthest 0.5 % are left out."""
    for _ in range(3):
        center, _ = enclosing_ball(points)
        distances = np.linalg.norm(points - center, axis=1)
        points = points[distances <= np.quantile(distances, 0.995)]
    return enclosing_ball(points)


def has_neighbors(positions: Float64[np.ndarray, "P 3"]) -> npt.NDArray[np.bool_]:
    """Whether each of 9 or more points has its 8 nearest neighbours about as near as is usual."""
    distances, _ = scipy.spatial.KDTree(positions).query(positions, k=9)
    # Logarithms, because densities differ by factors between a textured thing and a plain wall.
    logs = np.log(np.maximum(distances[:, 1:].mean(axis=1), 1e-300))
    median = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - median))
    near: npt.NDArray[np.bool_] = logs <= median + max(3.0 * spread, np.log(2.0))
    return near


def view_size(view: View) -> tuple[int, int]:
    """(width, height) that a view's intrinsics are for."""
    size = view.size if view.lens is None else view.lens.size
    # Capture loaders leave it out only where it is the file's, which build_scene fills in.
    assert size is not None, view.image_path
    return size


def view_directions(view: View, pixels: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 3"]:
    """Unit directions in the camera's axes through pixels; NaN where the lens sees nothing."""
    if view.lens is not None:
        return lens_rays(view.lens, pixels)
    homogeneous = np.column_stack([pixels, np.ones(len(pixels))])
    rays: Float64[np.ndarray, "P 3"] = np.linalg.solve(view.intrinsics, homogeneous.T).T
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def frame_share(views: Sequence[View], points: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, " P"]:
    """Share of the cameras in whose frame each point lies."""
    shown = np.zeros(len(points), np.int64)
    for view in views:
        pixels = np.nan_to_num(view.project(points), nan=-1.0)
        shown = shown + ((pixels >= 0.0) & (pixels < view_size(view))).all(axis=1)
    return shown / len(views)
