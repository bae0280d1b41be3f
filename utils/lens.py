"""Lenses: from pixels to directions and back, for every camera model of COLMAP, distortion included.

The formulas are pycolmap's (double precision, in C++); the pinhole case needs none. What is ours is
:class:`RayTable`, which turns any of them into a few table reads per ray, so that a training step costs the
same whatever the lens and distorted photographs are used as they are, never resampled.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from utils.types import Cameras, Lens

LOG = logging.getLogger(__name__)

PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")
"""Models that bend nothing."""
PIXEL_RADIUS = 2.0 / math.sqrt(12.0)
"""Radius of the disc whose points vary along an axis as those of a pixel of width 1: r^2 / 4 = 1 / 12
(mip-NeRF, Barron et al. 2021, section 3.1)."""
_TOLERANCE = 0.005
"""Pixels by which an interpolated ray may miss the true one."""
_FINEST = 1025
"""Nodes per axis that a table has at most."""
_SMALL = 65
"""Nodes per axis that a table may have however small the picture."""
_BORDER = 0.05
"""Share of a picture's longer side: so near to where a lens sees nothing, its table may be coarse."""


def _colmap_camera(lens: Lens) -> Any:
    import pycolmap  # Takes a while to load, and captures without distortion do without it.

    width, height = lens.size
    return pycolmap.Camera(model=lens.model, width=width, height=height, params=list(lens.params))


def lens_fault(lens: Lens) -> str | None:
    """What makes a lens unusable, in words; ``None`` if nothing does."""
    import pycolmap

    known = [name for name in pycolmap.CameraModelId.__members__ if name != "INVALID"]
    if lens.model not in known:
        return f"camera model {lens.model} is not one of COLMAP's ({', '.join(known)})"
    width, height = lens.size
    if width < 1 or height < 1:
        return f"its picture has {width} x {height} pixels"
    wanted = pycolmap.Camera.create_from_model_name(1, lens.model, 1.0, width, height)
    if len(lens.params) != len(wanted.params):
        return (
            f"{lens.model} has {len(wanted.params)} parameters ({wanted.params_info}), not {len(lens.params)}"
        )
    if not np.isfinite(lens.params).all():
        return "its parameters hold values that are not finite"
    if _colmap_camera(lens).has_bogus_params(0.05, 50.0, 10.0):
        return f"its parameters {lens.params} are absurd for a picture of {width} x {height} pixels"
    if not np.isfinite(lens_rays(lens, np.array([[width / 2, height / 2]]))).all():
        return f"its parameters {lens.params} give no direction for the middle of its picture"
    return None


def pinhole_part(lens: Lens) -> Float64[np.ndarray, "3 3"]:
    """The intrinsics of a lens without its distortion, for pixels of ``lens.size``."""
    camera = _colmap_camera(lens)
    if not camera.focal_length_idxs():
        # A panorama has none; its width spans the full circle, which gives pixels per radian at its middle.
        focal = lens.size[0] / (2.0 * np.pi)
        return np.array([[focal, 0.0, lens.size[0] / 2], [0.0, focal, lens.size[1] / 2], [0.0, 0.0, 1.0]])
    return np.asarray(camera.calibration_matrix(), np.float64)


def lens_rays(lens: Lens, pixels: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 3"]:
    """Unit directions in the camera's axes through pixels of ``lens.size``; NaN where the model has none.

    Fisheye lenses see beyond 90 degrees off their axis, where z is negative.
    """
    rays = np.array(_colmap_camera(lens).cam_ray_from_img(pixels), np.float64).reshape(-1, 3)
    return _with_wide_rays(lens, pixels, rays) if lens.model.endswith("FISHEYE") else rays


def _with_wide_rays(
    lens: Lens, pixels: Float64[np.ndarray, "P 2"], rays: Float64[np.ndarray, "P 3"]
) -> Float64[np.ndarray, "P 3"]:
    """Correct a fisheye's rays that lie 90 degrees off its axis and more; NaN beyond 180 degrees.

    COLMAP undistorts a pixel to ``theta * (cos phi, sin phi)`` and turns that into a point with z = 1, which
    there is only where theta is below 90 degrees. Beyond, it takes theta itself for the distance from the
    axis, and 95 degrees becomes atan(1.66) = 58.9. Such a ray still holds theta and phi, but does not lead
    back to its pixel.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        offset = rays[:, :2] / rays[:, 2:]
    theta = np.linalg.norm(offset, axis=1)
    suspects = np.flatnonzero(theta >= np.pi / 2)
    if not len(suspects):
        return rays
    miss = np.abs(project_to_lens(lens, rays[suspects]) - pixels[suspects]).max(axis=1)
    # Not ">=", because what projects to nowhere is NaN.
    wide = suspects[~(miss < 0.5)]
    angle = theta[wide, None]
    rays[wide] = np.concatenate([np.sin(angle) * offset[wide] / angle, np.cos(angle)], axis=1)
    rays[wide[theta[wide] > np.pi]] = np.nan
    return rays


def project_to_lens(lens: Lens, points: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 2"]:
    """Pixels of ``lens.size`` at which points in the camera's axes appear; NaN where they do not.

    Points 90 degrees off the axis and more are NaN, too, even where a fisheye would see them.
    """
    return np.asarray(_colmap_camera(lens).img_from_cam(points), np.float64).reshape(-1, 2)


def project(
    cameras: Cameras, index: int, positions: Float[Tensor, "P 3"]
) -> tuple[Float[Tensor, "P 2"], Float[Tensor, " P"], Bool[Tensor, " P"]]:
    """See where scene positions (of the warped space, if the cameras have one) appear in one view.

    Returns:
        Continuous pixels; depth along the optical axis; whether the picture shows the position (in front of
        the camera and inside the frame). Pixels of positions that it does not show are arbitrary.
    """
    if cameras.ndc is not None:
        positions = cameras.ndc.to_metric(positions)
    c2w, (width, height) = cameras.c2w[index], cameras.size[index].tolist()
    in_camera = (positions - c2w[:, 3]) @ c2w[:, :3]
    depth = in_camera[:, 2]
    if cameras.lenses:
        lens = cameras.lenses[index]
        exact = project_to_lens(lens, in_camera.double().numpy())
        scale = np.array([width, height]) / np.array(lens.size)
        pixels = torch.from_numpy(np.nan_to_num(exact * scale, nan=-1.0)).to(positions.dtype)
    else:
        homogeneous = in_camera @ cameras.intrinsics[index].t()
        pixels = homogeneous[:, :2] / depth.clamp(min=1e-6)[:, None]
        pixels = torch.where(depth[:, None] > 0, pixels, -1.0)
    shown = (pixels >= 0).all(dim=1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
    return pixels, depth, shown


@dataclass(frozen=True)
class RayTable:
    """Camera-space directions of some lenses on regular grids over their pictures, read bilinearly, and how
    wide a pixel is there.

    Grids are as fine as it takes to be exact to a few thousandths of a pixel, except at the border of what a
    lens sees: perspective lenses are tabulated as (x/z, y/z, 1), which a pinhole makes linear, wider ones as
    unit vectors.
    """

    nodes: Float32[Tensor, "K 4"]
    """The grids of all different lenses, row by row, one after another: a direction, and the radius at
    distance 1 of the disc that stands for a pixel."""
    starts: Int64[Tensor, " N"]
    """Where each camera's grid begins in ``nodes``."""
    counts: Int64[Tensor, "N 2"]
    """Columns and rows of each camera's grid."""
    cells_per_pixel: Float32[Tensor, "N 2"]

    @classmethod
    def from_cameras(cls, cameras: Cameras, device: torch.device | str) -> "RayTable":
        """Tabulate the lenses of ``cameras``; equal ones share a grid."""
        grids: list[Float32[np.ndarray, "K 4"]] = []
        found: dict[tuple[Lens, tuple[int, ...]], tuple[int, tuple[int, int]]] = {}
        starts, counts, total = [], [], 0
        for lens, size in zip(cameras.lenses, cameras.size.tolist(), strict=True):
            key = (lens, tuple(size))
            if key not in found:
                grid = _tabulate(lens, max(size[0] / lens.size[0], size[1] / lens.size[1]))
                found[key] = (total, (grid.shape[1], grid.shape[0]))
                radii = _radii(grid, *size)[..., None]
                grids.append(np.concatenate([grid, radii], axis=2).reshape(-1, 4).astype(np.float32))
                total += len(grids[-1])
            start, count = found[key]
            starts.append(start)
            counts.append(count)
        number = torch.tensor(counts, dtype=torch.int64)
        return cls(
            torch.from_numpy(np.concatenate(grids)).to(device),
            torch.tensor(starts, dtype=torch.int64).to(device),
            number.to(device),
            ((number - 1) / cameras.size).float().to(device),
        )

    def look_up(
        self, camera_indices: Int64[Tensor, " R"], pixels: Float[Tensor, "R 2"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, " R"]]:
        """What lies behind pixels of the cameras' pictures.

        Returns:
            Directions (not normalised) in the camera's axes, and the pixels' radii
            (:attr:`utils.types.Rays.radii`).
        """
        position = pixels * self.cells_per_pixel.index_select(0, camera_indices)
        count = self.counts.index_select(0, camera_indices)
        corner = torch.minimum(position.floor().long().clamp(min=0), count - 2)
        fraction = position - corner
        first = self.starts.index_select(0, camera_indices) + corner[:, 1] * count[:, 0] + corner[:, 0]
        below = first + count[:, 0]
        upper = torch.lerp(self.nodes[first], self.nodes[first + 1], fraction[:, :1])
        lower = torch.lerp(self.nodes[below], self.nodes[below + 1], fraction[:, :1])
        found = torch.lerp(upper, lower, fraction[:, 1:])
        return found[:, :3], found[:, 3]


def _radii(
    grid: Float64[np.ndarray, "rows columns 3"], width: int, height: int
) -> Float64[np.ndarray, "rows columns"]:
    """Radii at distance 1 of the discs that stand for pixels, at the nodes of a grid over width x height.

    They follow from angles: on the plane z = 1 the outer pixels of a wide lens lie far apart.
    """
    rows, columns, _ = grid.shape
    bearings = grid / np.linalg.norm(grid, axis=2, keepdims=True)
    right = np.linalg.norm(np.gradient(bearings, axis=1), axis=2) * ((columns - 1) / width)
    down = np.linalg.norm(np.gradient(bearings, axis=0), axis=2) * ((rows - 1) / height)
    radii: Float64[np.ndarray, "rows columns"] = 0.5 * PIXEL_RADIUS * (right + down)
    return radii


def _tabulate(lens: Lens, scale: float) -> Float64[np.ndarray, "rows columns 3"]:
    """Directions on a grid fine enough for pictures ``scale`` times as large as the lens's."""
    width, height = lens.size
    columns, rows = _nodes(width * scale), _nodes(height * scale)
    # More than a node per pixel gains nothing, except in tiny pictures.
    most_columns = min(_FINEST, max(_SMALL, round(width * scale) + 1))
    most_rows = min(_FINEST, max(_SMALL, round(height * scale) + 1))
    sees = np.ones((1, 1), bool)
    while True:
        u, v = np.linspace(0.0, width, columns), np.linspace(0.0, height, rows)
        grid = _directions(lens, u, v, sees)
        middle = _directions(lens, (u[1:] + u[:-1]) / 2, (v[1:] + v[:-1]) / 2, sees)
        is_perspective = _is_perspective(lens, grid)
        if is_perspective:
            grid, middle = grid / grid[..., 2:], middle / middle[..., 2:]
        cell = scale * float(np.hypot(u[1] - u[0], v[1] - v[0]))
        error = _middle_error(grid, middle, is_perspective) * cell
        if _is_fine(error) or (columns, rows) == (most_columns, most_rows):
            break
        columns, rows = min(2 * columns - 1, most_columns), min(2 * rows - 1, most_rows)
        # Two nodes around those with a direction: of what lies farther out, COLMAP would find that there is
        # none only after a hundred iterations per pixel.
        sees = scipy.ndimage.binary_dilation(np.isfinite(grid).all(axis=2), iterations=2)
    invalid = ~np.isfinite(grid).all(axis=2)
    if invalid.all():
        raise ValueError(f"the parameters {lens.params} of {lens.model} give no directions")
    if invalid.any():
        share = 100.0 * invalid.mean()
        LOG.warning(
            "%.1f %% of a picture lies where its %s lens sees nothing; mask it out", share, lens.model
        )
        nearest = scipy.ndimage.distance_transform_edt(invalid, return_distances=False, return_indices=True)
        grid = grid[tuple(nearest)]
    return grid


def _nodes(pixels: float) -> int:
    """Nodes along a picture's side for cells of about 16 pixels: an odd number, so that one is its middle."""
    return 2 * max(4, round(pixels / 32)) + 1


def _is_perspective(lens: Lens, grid: Float64[np.ndarray, "R C 3"]) -> bool:
    """Whether rays are best tabulated on the plane z = 1."""
    lowest = np.fmin.reduce(grid[..., 2], axis=None)
    return bool(_colmap_camera(lens).is_perspective() and lowest > 0.1)


def _directions(
    lens: Lens,
    u: Float64[np.ndarray, " C"],
    v: Float64[np.ndarray, " R"],
    sees: Bool[np.ndarray, "rows columns"],
) -> Float64[np.ndarray, "R C 3"]:
    """Unit directions through nodes all over the picture; NaN where a coarser grid shows none."""
    (width, height), (rows, columns) = lens.size, sees.shape
    row = np.round(v / height * (rows - 1)).astype(np.int64)
    column = np.round(u / width * (columns - 1)).astype(np.int64)
    wanted = sees[np.ix_(row, column)]
    grid = np.full((len(v), len(u), 3), np.nan)
    grid[wanted] = lens_rays(lens, np.stack(np.meshgrid(u, v), axis=-1)[wanted])
    return grid


def _middle_error(
    grid: Float64[np.ndarray, "rows columns 3"], middle: Float64[np.ndarray, "R C 3"], is_perspective: bool
) -> Float64[np.ndarray, "R C"]:
    """By how much interpolation misses the middle of each cell, as a share of the cell's diagonal.

    Measured on the cell itself, because what a pixel is in directions differs all over a wide picture.
    """
    first, second = grid[1:, 1:] - grid[:-1, :-1], grid[1:, :-1] - grid[:-1, 1:]
    diagonal = np.maximum(np.linalg.norm(first, axis=2), np.linalg.norm(second, axis=2))
    guess = (grid[1:, 1:] + grid[1:, :-1] + grid[:-1, 1:] + grid[:-1, :-1]) / 4
    if not is_perspective:
        # Only the direction counts, and the mean of four unit vectors is a little shorter than one.
        guess /= np.linalg.norm(guess, axis=2, keepdims=True)
    return np.asarray(np.linalg.norm(guess - middle, axis=2) / diagonal, np.float64)


def _is_fine(error: Float64[np.ndarray, "R C"]) -> bool:
    """Whether errors in pixels, NaN where the lens sees nothing, are small but near its border.

    There the direction changes infinitely fast with the pixel, so that no grid would ever be fine enough.
    """
    valid = np.isfinite(error)
    if valid.all():
        return bool(error.max() < _TOLERANCE)
    border = _BORDER * max(error.shape)
    distance = scipy.ndimage.distance_transform_edt(valid)
    # A border of fewer than two cells says nothing yet.
    return bool(border >= 2.0 and (error[distance > border] < _TOLERANCE).all())
