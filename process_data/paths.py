"""Camera paths for the test video: a smooth closed orbit through what the training cameras saw.

Directions from the look-at point to the cameras are given by azimuth and elevation about the up axis::

    closed ring      cameras all around:   every azimuth, at the median elevation
    ellipse          cameras on a patch:   the largest ellipse inside the patch that the cameras cover
    back and forth   cameras on a line:    the same ellipse with no height

so that no frame looks from where no camera was. The distance is the cameras' median distance throughout.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.spatial
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from process_data.geometry import look_at_point, up_axis
from utils.types import Cameras, Scene

_RING_GAP = np.radians(90.0)
"""Cameras whose largest gap in azimuth is below this cover a full circle."""
_LINE_WIDTH = np.radians(2.0)
"""Cameras that scatter less than this (root mean square) about a line count as a line."""


def orbit_path(scene: Scene, num_steps: int) -> Cameras:
    """Make the camera path of the test video.

    Args:
        scene: the capture; its training cameras say where one can look from.
        num_steps: number of frames, >= 1; the frame after the last would be the first again.

    Returns:
        ``num_steps`` cameras that look at the point nearest to all optical axes, with the intrinsics of a
        typical training view cut to an even width and height (video codecs need that).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    c2w = scene.cameras.c2w[list(scene.train_indices)].double().numpy()
    # The object is at the origin by contract.
    target, up = look_at_point(c2w, np.zeros(3)), up_axis(c2w)
    offsets = c2w[:, :, 3] - target
    distances = np.linalg.norm(offsets, axis=1)
    frame = _polar_frame(offsets, up)
    local = offsets / distances[:, None] @ frame.T
    azimuth = np.arctan2(local[:, 1], local[:, 0])
    elevation = np.arcsin(np.clip(local[:, 2], -1.0, 1.0))

    phase = np.arange(num_steps) * (2.0 * np.pi / num_steps)
    gap, gap_end = _largest_gap(azimuth[np.abs(elevation) < np.radians(75.0)])
    if gap < _RING_GAP:
        angles = np.stack([azimuth[0] + phase, np.full(num_steps, np.median(elevation))], axis=1)
    else:
        # Azimuths are counted on from the gap, so that a patch across +-180 degrees stays in one piece.
        unwrapped = gap_end + np.mod(azimuth - gap_end, 2.0 * np.pi)
        angles = _inscribed_ellipse(np.stack([unwrapped, elevation], axis=1), phase)

    horizontal = np.cos(angles[:, 1])
    directions = np.stack(
        [horizontal * np.cos(angles[:, 0]), horizontal * np.sin(angles[:, 0]), np.sin(angles[:, 1])], axis=1
    )
    centers = target + np.median(distances) * directions @ frame
    intrinsics, size = typical_view(scene)
    return Cameras(
        torch.from_numpy(_look_at(centers, target, up)).float(),
        intrinsics.expand(num_steps, 3, 3).contiguous(),
        size.expand(num_steps, 2).contiguous(),
    )


def _polar_frame(
    offsets: Float64[np.ndarray, "N 3"], up: Float64[np.ndarray, " 3"]
) -> Float64[np.ndarray, "3 3"]:
    """Build rows (forward, left, up): azimuth 0 is the cameras' mean, or any if that is the pole."""
    level = offsets.mean(axis=0)
    level = level - (level @ up) * up
    if np.linalg.norm(level) < 1e-6 * np.linalg.norm(offsets, axis=1).max():
        level = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    forward = level / np.linalg.norm(level)
    return np.stack([forward, np.cross(up, forward), up])


def _largest_gap(azimuth: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Give the widest stretch of the circle without a camera and the azimuth at which it ends."""
    if len(azimuth) == 0:
        return 2.0 * np.pi, -np.pi
    ordered = np.sort(azimuth)
    gaps = np.diff(ordered, prepend=ordered[-1] - 2.0 * np.pi)
    widest = int(gaps.argmax())
    return float(gaps[widest]), float(ordered[widest])


def _inscribed_ellipse(
    angles: Float64[np.ndarray, "N 2"], phase: Float64[np.ndarray, " T"]
) -> Float64[np.ndarray, "T 2"]:
    """Trace the largest circle inside the convex hull of the whitened points, mapped back: an ellipse.

    Points on a line (or two, or one) have no inside; the path then swings along them from end to end.
    """
    center = angles.mean(axis=0)
    _, spread, axes = np.linalg.svd(angles - center, full_matrices=False)
    # The spreads are root sums of squares over the points.
    if len(angles) < 3 or spread[1] < _LINE_WIDTH * np.sqrt(len(angles)):
        along = (angles - center) @ axes[0]
        middle, half = (along.max() + along.min()) / 2.0, (along.max() - along.min()) / 2.0
        return center + (middle + half * np.cos(phase))[:, None] * axes[0]
    whitened = (angles - center) @ axes.T / spread
    hull: Any = scipy.spatial.ConvexHull(whitened)
    normals, bounds = hull.equations[:, :2], -hull.equations[:, 2]
    # Chebyshev centre: the largest r with n . c + r <= b on every edge of the hull.
    solution = scipy.optimize.linprog(
        [0.0, 0.0, -1.0],
        A_ub=np.column_stack([normals, np.ones(len(normals))]),
        b_ub=bounds,
        bounds=[(None, None), (None, None), (0.0, None)],
    )
    circle = solution.x[:2] + solution.x[2] * np.stack([np.cos(phase), np.sin(phase)], axis=1)
    return center + circle * spread @ axes


def _look_at(
    centers: Float64[np.ndarray, "T 3"], target: Float64[np.ndarray, " 3"], up: Float64[np.ndarray, " 3"]
) -> Float64[np.ndarray, "T 3 4"]:
    """Build level camera-to-scene poses (OpenCV axes) that look from the centres at the target."""
    forward = target - centers
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    return np.stack([right, down, forward, centers], axis=2)


def typical_view(scene: Scene) -> tuple[Float32[Tensor, "1 3 3"], Int64[Tensor, "1 2"]]:
    """Give K (1, 3, 3) and even (width, height) (1, 2) of the training view with the median focal length."""
    cameras = scene.cameras
    by_focal_length = sorted(scene.train_indices, key=lambda index: float(cameras.intrinsics[index, 0, 0]))
    typical = by_focal_length[len(by_focal_length) // 2]
    # One row or column less at the far edge leaves K as it is.
    size = (cameras.size[typical] // 2 * 2).clamp(min=2)
    return cameras.intrinsics[typical : typical + 1], size[None]
