"""Cameras: from pixels to rays, from projection matrices to poses, and which views are held out.

Frames (see also ``utils/types.py``)::

    pixel (u, v)  --K^-1-->  camera (x right, y down, z forward)  --c2w-->  scene (object in the unit sphere)

    +-----> u        Continuous pixel coordinates: the top-left pixel covers [0, 1) x [0, 1) and its centre is
    | [0,0][1,0]     (0.5, 0.5). With half the pixels every coordinate halves, so K scales without an offset.
    v [0,1][1,1]     Captures with pixel centres at integers (OpenCV, DTU) gain 0.5 in cx, cy on loading.

A ray is ``origin + t * direction`` with a unit direction, so t is a distance in scene units. It enters the
unit sphere at ``near`` and leaves it at ``far``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from utils.errors import ConfigError
from utils.lens import PIXEL_RADIUS, RayTable
from utils.ndc import NDC
from utils.types import Cameras, Rays


@dataclass(frozen=True)
class RayGenerator:
    """Cameras prepared for casting many rays: intrinsics inverted in float64, lenses tabulated."""

    rotations: Float32[Tensor, "N 3 3"]
    """What turns directions in a camera's axes into scene space, R; where there is no ``table`` what turns
    ``(u, v, 1)``, R K^-1."""
    centers: Float32[Tensor, "N 3"]
    """Camera centres in scene space."""
    radii: Float32[Tensor, " N"]
    """Radius of the disc that stands for a pixel, at distance 1 along the optical axis: the mean of a pixel's
    width and height, times :data:`utils.lens.PIXEL_RADIUS`."""
    table: RayTable | None
    """Where the cameras have lenses: what these make of pixels."""
    ndc: NDC | None
    """Where the scene is warped: what the rays go through last."""

    @classmethod
    def from_cameras(cls, cameras: Cameras, device: torch.device | str = "cpu") -> "RayGenerator":
        """Prepare all cameras; the result lives on ``device``."""
        rotations = cameras.c2w[:, :, :3].double()
        inverted = torch.linalg.inv(cameras.intrinsics.double())
        if not cameras.lenses:
            rotations = rotations @ inverted
        # The first two columns of K^-1: by what a pixel to the right and one below move the direction.
        radii = PIXEL_RADIUS * inverted[:, :, :2].norm(dim=1).mean(dim=1)
        table = RayTable.from_cameras(cameras, device) if cameras.lenses else None
        centers = cameras.c2w[:, :, 3].contiguous()
        ndc = None if cameras.ndc is None else cameras.ndc.to(device)
        return cls(
            *(rotations.float().contiguous().to(device), centers.to(device), radii.float().to(device)),
            *(table, ndc),
        )

    def rays(self, camera_indices: Int64[Tensor, " R"], pixels: Float[Tensor, "R 2"]) -> Rays:
        """Cast one ray per pixel.

        Args:
            camera_indices: the camera of each ray, 0..N-1.
            pixels: continuous ``(u, v)`` coordinates; pixel (column i, row j) has its centre at
                (i + 0.5, j + 0.5).
        """
        matrix = self.rotations.index_select(0, camera_indices)
        # Written out instead of a batched matrix product: for 3x3 matrices the product's overhead dominates.
        if self.table is None:
            directions = torch.addcmul(matrix[:, :, 2], matrix[:, :, 0], pixels[:, :1])
            directions = torch.addcmul(directions, matrix[:, :, 1], pixels[:, 1:])
        else:
            local, radii = self.table.look_up(camera_indices, pixels)
            directions = matrix[:, :, 2] * local[:, 2:]
            directions = torch.addcmul(directions, matrix[:, :, 0], local[:, :1])
            directions = torch.addcmul(directions, matrix[:, :, 1], local[:, 1:2])
        lengths = directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        directions = directions / lengths
        if self.table is None:
            radii = self.radii.index_select(0, camera_indices) / lengths[:, 0]
        origins = self.centers.index_select(0, camera_indices)
        if self.ndc is not None:
            origins, directions = self.ndc.warp_rays(origins, directions)
        near, far = intersect_unit_sphere(origins, directions)
        if self.ndc is not None:
            # The sphere goes on behind infinity, where there is nothing.
            far = torch.minimum(far, self.ndc.distance_to_infinity(origins, directions))
        # A disc is none after the warp.
        return Rays(
            *(origins, directions, near, far, camera_indices), radii=None if self.ndc is not None else radii
        )


def rays_from_pixels(
    cameras: Cameras, camera_indices: Int64[Tensor, " R"], pixels: Float[Tensor, "R 2"]
) -> Rays:
    """Cast one ray per pixel; :class:`RayGenerator` does the same without inverting K at every call.

    Args:
        cameras: N cameras in scene space.
        camera_indices: the camera of each ray, 0..N-1.
        pixels: continuous ``(u, v)`` coordinates, centres at +0.5.

    Returns:
        Rays with unit directions and the distances at which they enter and leave the unit sphere.
    """
    return RayGenerator.from_cameras(cameras, pixels.device).rays(camera_indices, pixels)


def intersect_unit_sphere(
    origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Find where rays enter and leave the unit sphere around the scene origin.

    Args:
        origins: ray origins, anywhere.
        directions: unit directions.

    Returns:
        ``near`` and ``far``, distances from the origin with ``near >= 0``. A ray that starts inside has
        ``near = 0``, a tangent has ``near = far``. A ray that misses, or leaves the sphere behind it, has
        ``near = 1, far = 0``.
    """
    along = (origins * directions).sum(dim=-1)
    # The squared distance of the line from the centre is taken from the perpendicular itself: the textbook
    # b^2 - (|o|^2 - 1) subtracts two large numbers and loses its digits in float32 when the camera is far.
    perpendicular = origins - along[:, None] * directions
    half_chord_squared = 1.0 - perpendicular.square().sum(dim=-1)
    half_chord = half_chord_squared.clamp(min=0.0).sqrt()
    near, far = (-along - half_chord).clamp(min=0.0), half_chord - along
    is_hit = (half_chord_squared >= 0.0) & (far >= 0.0)
    return torch.where(is_hit, near, 1.0), torch.where(is_hit, far, 0.0)


def grid_size(cameras: Cameras, index: int, scale: float = 1.0) -> tuple[int, int]:
    """Give (width, height) of the ray grid that :func:`image_rays` makes for a view at ``scale``."""
    if not scale > 0.0:
        raise ValueError(f"scale must be above 0, got {scale}")
    width, height = cameras.size[index].tolist()
    return max(1, round(width * scale)), max(1, round(height * scale))


def image_rays(cameras: Cameras, index: int, scale: float = 1.0) -> Rays:
    """Cast a ray through every pixel of one view, row by row.

    Args:
        cameras: N cameras in scene space.
        index: the view, 0..N-1.
        scale: below 1 for a coarser grid that covers the same picture (0.25 = a quarter of the width and
            height). The rays pass through the centres of the coarse pixels; :func:`grid_size` gives their
            number.
    """
    columns, rows = grid_size(cameras, index, scale)
    width, height = cameras.size[index].tolist()
    device = cameras.c2w.device
    u = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5) * (width / columns)
    v = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) * (height / rows)
    pixels = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1).reshape(-1, 2)
    one = cameras[index : index + 1]
    rays = rays_from_pixels(one, torch.zeros(len(pixels), dtype=torch.int64, device=device), pixels)
    # A coarse pixel is wider by the mean of its two sides.
    widening = 0.5 * (width / columns + height / rows)
    return replace(
        rays,
        camera_indices=torch.full_like(rays.camera_indices, index),
        radii=None if rays.radii is None else widening * rays.radii,
    )


def scale_intrinsics(
    intrinsics: Float[Tensor, "*N 3 3"], factor: float | tuple[float, float]
) -> Float[Tensor, "*N 3 3"]:
    """Adapt K to an image resized by ``factor`` (new size / old size; one number, or one per axis).

    In continuous pixel coordinates a resize is a pure scaling, without a half-pixel term:
    ``K' = diag(sx, sy, 1) K``.
    """
    factor_x, factor_y = factor if isinstance(factor, tuple) else (factor, factor)
    return intrinsics * intrinsics.new_tensor([factor_x, factor_y, 1.0])[:, None]


def split_views(num_views: int, holdout: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split views 0..num_views-1 into those to train on and those held out for metrics.

    Args:
        num_views: how many views the capture has.
        holdout: 0 or ``None`` = hold nothing out; an integer k = views 0, k, 2k, ...; a list = exactly those
            views.

    Returns:
        ``(train, test)``, both ascending. ``split_views(5, 2) == ((1, 3), (0, 2, 4))``.

    Raises:
        ConfigError: ``dataset.holdout`` is of another type, names a view that does not exist, or leaves no
            view to train on.
    """
    where, remedy = "dataset.holdout", "give 0, a number k (every k-th view) or a list of view indices"
    if holdout is None:
        holdout = 0
    if isinstance(holdout, int):
        if holdout < 0:
            raise ConfigError(where, f"{holdout} is negative", remedy)
        chosen = set(range(0, num_views, holdout)) if holdout else set()
    elif isinstance(holdout, Sequence) and not isinstance(holdout, str):
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in holdout):
            raise ConfigError(where, f"{list(holdout)} holds something other than whole numbers", remedy)
        chosen = set(holdout)
        outside = sorted(index for index in chosen if not 0 <= index < num_views)
        if outside:
            raise ConfigError(
                where, f"view {outside[0]} does not exist", f"the capture's views are 0 to {num_views - 1}"
            )
    else:
        raise ConfigError(where, f"{holdout!r} is not understood", remedy)
    train = tuple(index for index in range(num_views) if index not in chosen)
    if not train:
        raise ConfigError(
            where, f"all {num_views} views are held out, none is left to train on", "hold out fewer views"
        )
    return train, tuple(sorted(chosen))


def decompose_projection(
    projection: Float64[np.ndarray, "3 4"],
) -> tuple[Float64[np.ndarray, "3 3"], Float64[np.ndarray, "3 4"]]:
    """Split a projection matrix ``P ~ K [R | t]`` into intrinsics and a camera-to-scene pose.

    Args:
        projection: maps homogeneous scene points to homogeneous pixels. Its scale and sign are of no account:
            a projective matrix means the same when multiplied by -3. A mirrored frame therefore cannot be
            told from a negative sign here; it shows in the pose, which then looks away from what the camera
            saw.

    Returns:
        ``(K, c2w)``: K upper triangular with a positive diagonal and ``K[2, 2] = 1``, skew kept; c2w with
        det R = +1.

    Raises:
        ValueError: the matrix is singular (no camera centre) or holds values that are not finite.

    Source:
        Hartley and Zisserman, Multiple View Geometry, 2nd edition, section 6.2.4 (RQ decomposition).
    """
    if not np.isfinite(projection).all():
        raise ValueError("the projection matrix holds values that are not finite")
    lengths = np.linalg.norm(projection[:, :3], axis=1)
    # Rows of unit length make the determinant a measure of shape alone, whatever the focal length and units.
    volume = np.linalg.det(projection[:, :3] / lengths[:, None]) if lengths.all() else 0.0
    if abs(volume) < 1e-7:
        raise ValueError("the projection matrix is singular")
    # The third row of K R is the unit vector R[2], which fixes the scale; det(K R) > 0 fixes the sign.
    scaled = projection * (np.sign(volume) / lengths[2])
    intrinsics, rotation = scipy.linalg.rq(scaled[:, :3])
    signs = np.sign(np.diag(intrinsics))
    intrinsics, rotation = intrinsics * signs, signs[:, None] * rotation
    center = -np.linalg.solve(scaled[:, :3], scaled[:, 3])
    c2w = np.concatenate([rotation.T, center[:, None]], axis=1)
    return intrinsics / intrinsics[2, 2], c2w
