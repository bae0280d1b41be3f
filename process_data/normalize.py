"""Placing the unit sphere: where the object of interest is, how large it is, and which way is up.

The sphere holds what will be reconstructed. ``dataset.region`` says how it is found::

    given     the format names it (NeuS's scale_mat)
    masks     ball around what the masks show (their visual hull)
    points    ball around the sparse points that lie before most cameras and near where they look
    lookat    centre: the point nearest to all optical axes; radius: what fills the frames
    cameras   for rooms: ball around the cameras and all sparse points; without points, around their median

    auto      given, or masks where they are loaded; or, by where the cameras look:

              \\ | /                                   <- o ->
             -- x --   at one point: points, lookat     o   o    outwards: cameras
              / | \\                                   <- o ->

Sparse points are cleaned of outliers first: large reprojection errors, few observations, and points whose
neighbours are much farther away than usual.

The result turns the scene so that +z is up. Everything is found from cameras, masks and points relative to
each other, so a capture that is moved, turned or scaled as a whole gives the same scene.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from process_data.geometry import (
    frame_share,
    has_neighbors,
    nearest_to_lines,
    robust_ball,
    up_axis,
    view_directions,
    view_size,
)
from process_data.views import Capture, View
from process_data.visual_hull import mask_ball
from utils.errors import ConfigError, DataError
from utils.types import ImageStack, SparsePoints

LOG = logging.getLogger(__name__)

RegionMethod = Literal["auto", "given", "masks", "points", "lookat", "cameras"]
Up = Literal["auto", "x", "y", "z", "-x", "-y", "-z", "none"]

_BY_HAND = "set dataset.region_center=[x,y,z] and dataset.region_radius"
_LEAST_POINTS = 50
"""Fewer sparse points do not say how large a thing is."""
_MOST_POINTS, _MOST_VIEWS = 20_000, 100
"""More points or views say little more; as many are chosen evenly."""
_COVER = 0.65
"""Share of the cameras whose frame a point of the region must lie in, relative to the best covered ones."""
_REACH = 2.0
"""Points farther from the target than this many times the distance that holds 75 % are surroundings."""
_POINT_MARGIN, _MASK_MARGIN = 1.1, 1.04
"""Factors on the radius: points do not reach every end of a thing, masks are read at low resolution."""


@dataclass(frozen=True)
class _Region:
    """A sphere in the world, and how it was found."""

    method: str
    center: Float64[np.ndarray, " 3"]
    radius: float


def find_world_from_scene(
    capture: Capture,
    masks: ImageStack | None,
    method: RegionMethod = "auto",
    center: Any = None,
    radius: float | None = None,
    scale: float = 1.0,
    up: Up = "auto",
) -> Float64[np.ndarray, "4 4"]:
    """Find the similarity from the unit sphere to the region of interest in the world.

    Args:
        capture: one or more views with their sizes, and points, in the world's frame.
        masks: one per view where they are loaded, of any size.
        method: how the sphere is found; see the module's docstring.
        center: (x, y, z) in the world, instead of what is found.
        radius: in world units, above 0, instead of what is found.
        scale: factor on the radius, however it was found, above 0.
        up: the world's axis that becomes the scene's +z. ``auto``: as the format defines it (a capture with a
            ``world_from_scene`` keeps its axes), else estimated from the cameras; then the first camera
            looks along +y. ``none``: the scene's axes are the world's.

    Returns:
        Rotation times one positive scale, and a translation.

    Raises:
        ConfigError: the method asks for what the capture does not have; center, radius or scale are no
            numbers of use.
        DataError: no sphere can be found: too few views, cameras all at one place or with parallel axes, an
            empty visual hull, no points left.
    """
    _check_by_hand(center, radius, scale)
    poses = np.stack([view.c2w for view in capture.views])
    for view in capture.views:
        if not np.isfinite(view.c2w).all():
            raise DataError(
                view.image_path, "its pose holds values that are not finite", "write the poses again"
            )
    given = capture.world_from_scene
    if given is not None:
        _check_similarity(capture, given)
    rotation = _rotation(capture, poses, up)
    if center is None or radius is None:
        region = _find_region(capture, poses, masks, method, rotation)
    else:
        region = _Region("as set", np.zeros(3), 1.0)
    if center is not None:
        region = _Region(f"{region.method}, centre as set", np.array(center, np.float64), region.radius)
    if radius is not None:
        region = _Region(f"{region.method}, radius as set", region.center, float(radius))
    if not 0.0 < region.radius * scale < np.inf:
        raise DataError(capture.root, f"the radius found is {region.radius * scale}", _BY_HAND)
    world_from_scene = np.eye(4)
    world_from_scene[:3, :3] = rotation * (region.radius * scale)
    world_from_scene[:3, 3] = region.center
    _log(region, scale, poses)
    return world_from_scene


def _check_by_hand(center: Any, radius: float | None, scale: float) -> None:
    """Refuse numbers that no sphere can have.

    Raises:
        ConfigError: one of them is not finite, or not above 0.
    """
    if center is not None and (np.shape(center) != (3,) or not np.isfinite(center).all()):
        raise ConfigError("dataset.region_center", f"{center!r} is no point", "give [x, y, z], or null")
    if radius is not None and not 0.0 < radius < np.inf:
        raise ConfigError("dataset.region_radius", f"{radius} is not above 0", "give world units, or null")
    if not 0.0 < scale < np.inf:
        raise ConfigError(
            "dataset.region_scale", f"{scale} is not above 0", "1 keeps the sphere that was found"
        )


def _check_similarity(capture: Capture, matrix: Float64[np.ndarray, "4 4"]) -> None:
    """Refuse a format's matrix that is no similarity.

    Raises:
        DataError: it is not finite, has scale 0, is mirrored or sheared.
    """
    remedy = f"correct the file, or choose another dataset.region, or {_BY_HAND}"
    if not np.isfinite(matrix).all():
        raise DataError(capture.root, "the region it names holds values that are not finite", remedy)
    factor = float(np.cbrt(np.linalg.det(matrix[:3, :3])))
    if not factor > 0.0 or np.abs(matrix[:3, :3].T @ matrix[:3, :3] / factor**2 - np.eye(3)).max() > 1e-3:
        raise DataError(capture.root, "the region it names is no rotation with one positive scale", remedy)


def _log(region: _Region, scale: float, poses: Float64[np.ndarray, "N 3 4"]) -> None:
    radius = region.radius * scale
    outside = int((np.linalg.norm(poses[:, :, 3] - region.center, axis=1) > radius).sum())
    LOG.info(
        "region: %s, centre [%.5g, %.5g, %.5g], radius %.5g in world units, %d of %d cameras outside it; "
        "dataset.region_scale, region_center and region_radius change it",
        region.method,
        *region.center,
        radius,
        outside,
        len(poses),
    )


# ----------------------------------------------------------------------------------------------------------
# axes


def _rotation(capture: Capture, poses: Float64[np.ndarray, "N 3 4"], up: Up) -> Float64[np.ndarray, "3 3"]:
    """Rotation from scene to world axes: its last column is up."""
    if up == "none":
        return np.eye(3)
    if up != "auto":
        axis = np.eye(3)["xyz".index(up[-1])] * (-1.0 if up.startswith("-") else 1.0)
        return _turned_to(axis, np.eye(3)[[1, 0, 0]["xyz".index(up[-1])]])
    if capture.up is None and capture.world_from_scene is not None:
        turn = capture.world_from_scene[:3, :3]
        return turn / np.cbrt(np.linalg.det(turn))
    if capture.up is not None:
        if not (np.isfinite(capture.up).all() and np.linalg.norm(capture.up) > 0.0):
            raise DataError(capture.root, f"its up vector {capture.up} is no direction", "set dataset.up=z")
        axis = capture.up / np.linalg.norm(capture.up)
        # The world's x axis stays as it is if it can: up = z leaves the axes alone.
        return _turned_to(axis, np.eye(3)[0] if abs(axis[0]) < 0.9 else np.eye(3)[1])
    axis = up_axis(poses)
    right, forward = poses[0, :, 0], poses[0, :, 2]
    # A picture turned by 90 degrees has a steep right vector.
    is_level = abs(right @ axis) < 0.7
    return _turned_to(axis, right if is_level else np.cross(forward, axis))


def _turned_to(up: Float64[np.ndarray, " 3"], right: Float64[np.ndarray, " 3"]) -> Float64[np.ndarray, "3 3"]:
    """Columns x, y, z with z = up and x as near to ``right`` as that allows."""
    x = right - (right @ up) * up
    x = x / np.linalg.norm(x)
    return np.column_stack([x, np.cross(up, x), up])


# ----------------------------------------------------------------------------------------------------------
# which method


def _find_region(
    capture: Capture,
    poses: Float64[np.ndarray, "N 3 4"],
    masks: ImageStack | None,
    method: RegionMethod,
    rotation: Float64[np.ndarray, "3 3"],
) -> _Region:
    """Find the sphere by one method; ``auto`` decides which.

    Raises:
        ConfigError: the method asks for what the capture does not have.
        DataError: no sphere can be found.
    """
    given = capture.world_from_scene
    if method == "given" or (method == "auto" and given is not None):
        if given is None:
            raise _lacking(method, "this format names no region", "set dataset.region=auto")
        return _Region("given", given[:3, 3].copy(), float(np.cbrt(np.linalg.det(given[:3, :3]))))
    _check_baseline(capture, poses)
    if method == "masks" or (method == "auto" and masks is not None):
        if masks is None:
            raise _lacking(method, "no masks are loaded", "set dataset.apply_mask=true")
        return _region_of_masks(capture, masks, rotation)
    target = _common_target(poses)
    points = np.empty((0, 3)) if capture.points is None else _clean(capture.points)
    if method == "cameras" or (method == "auto" and target is None and not _is_facing(poses)):
        return _region_of_room(poses, points)
    looked_at = _looked_at(capture.views, poses, points, target)
    if method == "lookat" or (method == "auto" and len(looked_at) < _LEAST_POINTS):
        return _region_of_axes(capture, poses, target)
    return _region_of_points(capture, looked_at)


def _lacking(method: str, what: str, remedy: str) -> ConfigError:
    return ConfigError("dataset.region", f"{method}, but {what}", remedy)


def _check_baseline(capture: Capture, poses: Float64[np.ndarray, "N 3 4"]) -> None:
    """Refuse cameras that see no depth.

    Raises:
        DataError: fewer than two, or all at one place.
    """
    if len(poses) < 2:
        raise DataError(capture.root, f"{len(poses)} view(s) do not say where the object is", _BY_HAND)
    centers = poses[:, :, 3]
    extent = np.abs(centers - centers.mean(axis=0)).max()
    if not extent > 1e-9 * np.abs(centers).max():
        raise DataError(
            capture.root,
            "all cameras stand at one place, which leaves depth open",
            f"check the poses, or {_BY_HAND}",
        )


def _common_target(poses: Float64[np.ndarray, "N 3 4"]) -> Float64[np.ndarray, " 3"] | None:
    """The point that the cameras look at, or ``None`` if there is none: rooms, parallel axes."""
    centers, axes = poses[:, :, 3], poses[:, :, 2]
    # The least eigenvalue is the mean squared sine of the angles to the direction that the axes share.
    across = np.eye(3) - (axes[:, :, None] * axes[:, None, :]).mean(axis=0)
    if np.linalg.eigvalsh(across)[0] < np.sin(np.radians(2.0)) ** 2:
        return None
    target = nearest_to_lines(centers, axes, centers.mean(axis=0))
    offsets = target - centers
    cosines = (offsets * axes).sum(axis=1) / np.maximum(np.linalg.norm(offsets, axis=1), 1e-12)
    looks_at_it = cosines > np.cos(np.radians(30.0))
    return target if looks_at_it.mean() >= 0.7 else None


def _is_facing(poses: Float64[np.ndarray, "N 3 4"]) -> bool:
    """Whether the cameras look the same way, at something flat or far away, rather than around."""
    return float(np.linalg.norm(poses[:, :, 2].mean(axis=0))) > 0.8


# ----------------------------------------------------------------------------------------------------------
# the methods


def _region_of_masks(capture: Capture, masks: ImageStack, rotation: Float64[np.ndarray, "3 3"]) -> _Region:
    ball = mask_ball(capture.views, masks, rotation)
    if ball is None:
        raise DataError(
            capture.root,
            "the masks' visual hull is empty: masks and cameras do not fit each other",
            f"check which mask belongs to which picture, or choose another dataset.region, or {_BY_HAND}",
        )
    center, radius = ball
    return _Region("masks", center, _MASK_MARGIN * radius)


def _region_of_axes(
    capture: Capture, poses: Float64[np.ndarray, "N 3 4"], target: Float64[np.ndarray, " 3"] | None
) -> _Region:
    if target is None:
        raise DataError(
            capture.root,
            "the cameras look at no common point (their axes are parallel or diverge)",
            f"set dataset.region=points if there are sparse points, or dataset.region=cameras, or {_BY_HAND}",
        )
    return _Region("lookat", target, _framed_radius(capture.views, poses, target))


def _framed_radius(
    views: Sequence[View], poses: Float64[np.ndarray, "N 3 4"], target: Float64[np.ndarray, " 3"]
) -> float:
    """Radius of the ball around ``target`` that reaches the corners of the frames: ``distance sin(fov / 2)``.

    Across the corners, because pictures are often aimed a little beside the middle of what they show.
    """
    distances = np.linalg.norm(poses[:, :, 3] - target, axis=1)
    radius = np.median([d * np.sin(_half_angle(view)) for view, d in zip(views, distances, strict=True)])
    # A stray camera at the object must not shrink the ball to nothing.
    usual = distances[distances > 0.25 * np.median(distances)]
    return float(min(radius, 0.9 * usual.min()))


def _half_angle(view: View) -> float:
    """Half the field of view across a picture's corners in radians, at most 60 degrees."""
    width, height = view_size(view)
    corners = np.array([[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]])
    cosines = np.nan_to_num(view_directions(view, corners)[:, 2], nan=0.0)
    return float(np.arccos(np.clip(np.median(cosines), 0.5, 1.0)))


def _region_of_points(capture: Capture, looked_at: Float64[np.ndarray, "P 3"]) -> _Region:
    if capture.points is None:
        raise _lacking("points", "this capture has none", f"set dataset.region=lookat, or {_BY_HAND}")
    if len(looked_at) < _LEAST_POINTS:
        raise DataError(
            capture.root,
            f"{len(looked_at)} of {len(capture.points)} sparse points are where the cameras look",
            f"set dataset.region=lookat, or {_BY_HAND}",
        )
    center, radius = robust_ball(looked_at)
    return _Region("points", center, _POINT_MARGIN * radius)


def _region_of_room(poses: Float64[np.ndarray, "N 3 4"], points: Float64[np.ndarray, "P 3"]) -> _Region:
    """Ball around the cameras and what they look at."""
    centers = poses[:, :, 3]
    if len(points) >= _LEAST_POINTS:
        center, radius = robust_ball(points)
        reach = np.linalg.norm(centers - center, axis=1)
        return _Region("cameras", center, _POINT_MARGIN * max(radius, float(np.quantile(reach, 0.95))))
    center = np.median(centers, axis=0)
    # Who takes pictures of a room stands about halfway between its middle and its walls.
    return _Region("cameras", center, 3.0 * float(np.linalg.norm(centers - center, axis=1).mean()))


# ----------------------------------------------------------------------------------------------------------
# sparse points


def _clean(points: SparsePoints) -> Float64[np.ndarray, "P 3"]:
    """Positions without outliers, at most ``_MOST_POINTS``."""
    good = np.isfinite(points.positions).all(axis=1)
    if np.isfinite(points.errors).any():
        good = good & ~(points.errors > 4.0 * np.nanmedian(points.errors))
    if len(points.observations):
        # Two rays meet somewhere whatever they show; three are a check.
        is_checked = np.bincount(points.observations[:, 0], minlength=len(points)) >= 3
        if 2 * (good & is_checked).sum() >= good.sum():
            good = good & is_checked
    positions = points.positions[good]
    positions = positions[:: 1 + len(positions) // _MOST_POINTS]
    return positions[has_neighbors(positions)] if len(positions) >= _LEAST_POINTS else positions


def _looked_at(
    views: Sequence[View],
    poses: Float64[np.ndarray, "N 3 4"],
    points: Float64[np.ndarray, "P 3"],
    target: Float64[np.ndarray, " 3"] | None,
) -> Float64[np.ndarray, "K 3"]:
    """Points in the frames of most cameras and, if these look at a common target, near it."""
    if len(points) == 0:
        return points
    cover = frame_share(views[:: 1 + len(views) // _MOST_VIEWS], points)
    chosen = cover >= _COVER * np.quantile(cover, 0.95)
    if target is None:
        return points[chosen]
    distances = np.linalg.norm(points - target, axis=1)
    chosen = chosen & (distances < _framed_radius(views, poses, target))
    if chosen.any():
        # Around a thing full of points, few lie on what it stands on; where the points thin out, it ends.
        chosen = chosen & (distances < _REACH * np.quantile(distances[chosen], 0.75))
    return points[chosen]
