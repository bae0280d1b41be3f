"""Where the masks of many views allow the object to be: its visual hull on a grid, and a ball around it.

::

      camera 1              A voxel stays if few of the views that show it see it outside of their masks.
         \\  \\               Views whose frame it leaves say nothing, so the frame may cut the object.
          \\  \\____
    camera 2 -\\ # \\----    Coarse grid first, in a box that grows while the hull touches its sides; then a
            ---\\ # \\---    fine one around what is left.
                \\   \\ .    <- tail, if no camera looks from the side

Masks are read at low resolution. A voxel is outside of a mask only if no part of it projects inside, so that
thin parts survive; the hull is at most a voxel too large.

Source: Laurentini, "The visual hull concept for silhouette-based image understanding", PAMI 1994; Cheung et
al., "A real time system for robust 3D voxel reconstruction of human motions", CVPR 2000 (voxels kept against
some of the views).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import scipy.ndimage
from jaxtyping import Float32, Float64, UInt8

from process_data.geometry import nearest_to_lines, view_directions, view_size
from process_data.views import View
from utils.types import ImageStack

LOG = logging.getLogger(__name__)

_MASK_SIDE = 200
"""Longer side of the masks that are read, in pixels."""
_MOST_VIEWS = 60
"""More views than this say little more; as many are chosen evenly."""
_COARSE, _FINE = 32, 56
"""Voxels along the longest side of the grids."""
_TOLERANCES = (0.1, 0.25)
"""Share of the views that may see a hull voxel outside of their masks; the second where the first leaves
nothing."""
_LEAST_SEEN = 0.34
"""Share of the views that have to show a voxel."""
_HULL_SHARE = 0.95
"""Share of the hull that the ball holds at least; a tail that no camera sees from the side may stick out."""
_LEAST_OVERLAP = 0.4
"""Overlap (intersection over union) of a mask with the hull's shadow below which the mask is called odd."""
_RIM_RAYS = 120
"""Rays along the rim of each mask that the ball must reach."""


@dataclass(frozen=True)
class _Silhouette:
    """One view's mask, small, ready for looking up projected voxels."""

    view: View
    distance: Float32[np.ndarray, "H W"]
    """Pixels of the small mask to the nearest foreground; 0 inside."""
    scale: Float64[np.ndarray, " 2"]
    """Small pixels per pixel of the camera, along u and v."""
    ray: Float64[np.ndarray, " 3"]
    """World direction through the middle of the foreground."""
    spread: float
    """Tangent of the angle between that ray and the foreground's farthest pixel."""

    @property
    def focal(self) -> float:
        """Focal length in small pixels."""
        return float(np.mean(self.scale * np.diag(self.view.intrinsics)[:2]))


def mask_ball(
    views: Sequence[View], masks: ImageStack, rotation: Float64[np.ndarray, "3 3"]
) -> tuple[Float64[np.ndarray, " 3"], float] | None:
    """Find the smallest ball that covers the object in all masks and holds nearly all of their visual hull.

    The hull alone would not do: cameras on one side leave it a long tail on the other, which hides behind
    the object in every view. Masks, or parts of them, that the hull does not explain are ignored.

    Args:
        views: cameras in the world, with sizes.
        masks: one per view, of any size, 255 = foreground. Those that are black or white everywhere are
            ignored.
        rotation: columns are the axes of the grid, in world coordinates.

    Returns:
        Centre and radius in the world, or ``None`` if the hull is empty: masks and cameras do not fit.
    """
    silhouettes = _silhouettes(views, masks)
    hull = _carve_twice(silhouettes, rotation) if len(silhouettes) >= 2 else None
    if hull is None:
        return None
    voxels, side = hull
    _warn_of_odd_masks(silhouettes, voxels, side)
    rims = [_rim_rays(silhouette, voxels, side) for silhouette in silhouettes]
    origins = np.concatenate(
        [
            np.broadcast_to(silhouette.view.c2w[:, 3], rays.shape)
            for silhouette, rays in zip(silhouettes, rims, strict=True)
        ]
    )
    rays = np.concatenate(rims)
    # As in :func:`enclosing_ball`, with the point of each line nearest to the centre.
    center = voxels.mean(axis=0)
    radius = 0.0
    for step in range(1, 301):
        offsets = origins - center
        feet = offsets - (offsets * rays).sum(axis=1, keepdims=True) * rays
        distances = np.linalg.norm(feet, axis=1)
        radius = float(distances.max(initial=0.0))
        if step < 300 and radius > 0.0:
            center = center + feet[distances.argmax()] / (step + 1)
    held = float(np.quantile(np.linalg.norm(voxels - center, axis=1), _HULL_SHARE))
    return center, max(radius, held)


def _carve_twice(
    silhouettes: Sequence[_Silhouette], rotation: Float64[np.ndarray, "3 3"]
) -> tuple[Float64[np.ndarray, "P 3"], float] | None:
    """Give the centres of the hull's voxels in the world and the side of a voxel; ``None`` if it is empty."""
    origins = np.stack([silhouette.view.c2w[:, 3] for silhouette in silhouettes])
    rays = np.stack([silhouette.ray for silhouette in silhouettes])
    middle = nearest_to_lines(origins, rays, origins.mean(axis=0))
    depths = ((middle - origins) * rays).sum(axis=1)
    spreads = np.array([silhouette.spread for silhouette in silhouettes])
    half = 1.3 * float(np.median(np.abs(depths) * spreads))
    if not half > 0.0:
        return None
    low, high = np.full(3, -half), np.full(3, half)
    for _ in range(6):
        voxels, corners, side = _carve(silhouettes, middle, rotation, low, high, _COARSE)
        if len(voxels) == 0:
            return None
        touches_low, touches_high = corners[0] - low < 0.5 * side, high - corners[1] < 0.5 * side
        if not (touches_low.any() or touches_high.any()):
            break
        low = np.where(touches_low, low - half, low)
        high = np.where(touches_high, high + half, high)
    # The true surface may leave its coarse voxel by no more than the voxel's own size.
    voxels, _, side = _carve(silhouettes, middle, rotation, corners[0] - side, corners[1] + side, _FINE)
    return (voxels, side) if len(voxels) else None


def _rim_rays(
    silhouette: _Silhouette, voxels: Float64[np.ndarray, "P 3"], side: float
) -> Float64[np.ndarray, "R 3"]:
    """World directions along the rim of a mask where the hull reaches it."""
    inside = (silhouette.distance == 0.0).astype(np.uint8)
    explained = _shadow(silhouette, voxels, side)
    rim = inside & (1 - cv2.erode(inside, np.ones((3, 3), np.uint8), borderValue=0)) & explained
    rows, columns = np.nonzero(rim)
    chosen = np.column_stack([columns, rows])[:: 1 + len(rows) // _RIM_RAYS] + 0.5
    rays = view_directions(silhouette.view, chosen / silhouette.scale)
    return rays[np.isfinite(rays).all(axis=1)] @ silhouette.view.c2w[:, :3].T


def _shadow(
    silhouette: _Silhouette, voxels: Float64[np.ndarray, "P 3"], side: float
) -> UInt8[np.ndarray, "H W"]:
    """Where the hull appears in a small mask (1), widened by a voxel and a half."""
    pixels, is_shown = _look_up(silhouette, voxels)
    shadow = np.zeros(silhouette.distance.shape, np.uint8)
    column, row = pixels[is_shown].astype(int).T
    shadow[row, column] = 1
    away = float(np.median(np.linalg.norm(voxels - silhouette.view.c2w[:, 3], axis=1)))
    reach = int(np.ceil(1.5 * side * silhouette.focal / max(away, 1e-12)))
    return np.asarray(cv2.dilate(shadow, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)), np.uint8)


def _warn_of_odd_masks(
    silhouettes: Sequence[_Silhouette], voxels: Float64[np.ndarray, "P 3"], side: float
) -> None:
    """Name the pictures whose mask shows something else than the hull that most masks agree on."""
    odd = []
    for silhouette in silhouettes:
        inside, shadow = silhouette.distance == 0.0, _shadow(silhouette, voxels, side) > 0
        overlap = float((inside & shadow).sum() / (inside | shadow).sum())
        if overlap < _LEAST_OVERLAP:
            odd.append(f"{silhouette.view.image_path.name} ({100.0 * overlap:.0f} %)")
    if odd:
        LOG.warning(
            "%d of %d masks show something else than the others do (overlap with their common shape): %s; "
            "correct them or remove these pictures",
            *(len(odd), len(silhouettes), ", ".join(odd[:5]) + (" ..." if len(odd) > 5 else "")),
        )


def _silhouettes(views: Sequence[View], masks: ImageStack) -> list[_Silhouette]:
    """Prepare the masks that say something."""
    useful = []
    for index, view in enumerate(views):
        mask = masks.image(index).numpy()[..., 0]
        factor = min(1.0, _MASK_SIDE / max(mask.shape))
        size = (max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor)))
        inside = cv2.resize(mask, size, interpolation=cv2.INTER_AREA) >= 96
        if inside.any() and not inside.all():
            useful.append((view, inside))
    if len(useful) > _MOST_VIEWS:
        chosen = np.linspace(0, len(useful) - 1, _MOST_VIEWS).round().astype(int)
        useful = [useful[index] for index in chosen]
    return [_silhouette(view, inside) for view, inside in useful]


def _silhouette(view: View, inside: npt.NDArray[np.bool_]) -> _Silhouette:
    scale = np.array([inside.shape[1], inside.shape[0]]) / np.array(view_size(view))
    rows, columns = np.nonzero(inside)
    pixels = np.column_stack([columns, rows]) + 0.5
    # The middle of the range, not the mean: a thin part counts as much as a thick one.
    middle = (pixels.min(axis=0) + pixels.max(axis=0)) / 2.0
    border = np.concatenate([middle[None], pixels[:: max(1, len(pixels) // 500)]])
    directions = view_directions(view, border / scale)
    ray = directions[0] if np.isfinite(directions[0]).all() else np.array([0.0, 0.0, 1.0])
    cosine = float(np.clip(np.nanmin(directions @ ray), 0.2, 1.0))
    distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 3)
    spread = np.sqrt(1.0 - cosine**2) / cosine
    return _Silhouette(view, np.asarray(distance, np.float32), scale, view.c2w[:, :3] @ ray, spread)


def _carve(
    silhouettes: Sequence[_Silhouette],
    middle: Float64[np.ndarray, " 3"],
    rotation: Float64[np.ndarray, "3 3"],
    low: Float64[np.ndarray, " 3"],
    high: Float64[np.ndarray, " 3"],
    resolution: int,
) -> tuple[Float64[np.ndarray, "P 3"], Float64[np.ndarray, "2 3"], float]:
    """Carve a box ``low..high``, given about ``middle`` along the columns of ``rotation``.

    Returns:
        The world centres of the voxels that stay, none for an empty hull; the bounds of those voxels, in the
        coordinates of the box; the side of a voxel.
    """
    side = float((high - low).max() / resolution)
    counts = np.maximum(1, np.ceil((high - low) / side - 1e-6)).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(count) for count in counts), indexing="ij"), axis=-1)
    local = low + (grid.reshape(-1, 3) + 0.5) * side
    centers = middle + local @ rotation.T
    share = _share_outside(silhouettes, centers, 0.5 * side)
    for tolerance in _TOLERANCES:
        stays = _main_parts((share <= tolerance).reshape(counts)).reshape(-1)
        if stays.any():
            break
    if not stays.any():
        return np.empty((0, 3)), np.zeros((2, 3)), side
    corners = np.stack([local[stays].min(axis=0) - 0.5 * side, local[stays].max(axis=0) + 0.5 * side])
    return centers[stays], corners, side


def _share_outside(
    silhouettes: Sequence[_Silhouette], centers: Float64[np.ndarray, "P 3"], half_side: float
) -> Float64[np.ndarray, " P"]:
    """Share of the views showing a voxel that see it outside of their masks; 1 where too few show it."""
    seen, outside = np.zeros(len(centers)), np.zeros(len(centers))
    for silhouette in silhouettes:
        pixels, is_shown = _look_up(silhouette, centers)
        column, row = pixels[is_shown].astype(int).T
        away = np.linalg.norm(centers[is_shown] - silhouette.view.c2w[:, 3], axis=1)
        # Half a pixel more, because the distance is from the pixel's centre.
        reach = half_side * silhouette.focal / np.maximum(away, 1e-12) + 0.5
        seen[is_shown] += 1.0
        outside[is_shown] += silhouette.distance[row, column] > reach
    is_known = seen >= max(2.0, _LEAST_SEEN * len(silhouettes))
    return np.where(is_known, outside / np.maximum(seen, 1.0), 1.0)


def _look_up(
    silhouette: _Silhouette, centers: Float64[np.ndarray, "P 3"]
) -> tuple[Float64[np.ndarray, "P 2"], npt.NDArray[np.bool_]]:
    """Pixels of the small mask at which world points appear, and whether they lie in the frame."""
    pixels = silhouette.view.project(centers) * silhouette.scale
    pixels = np.nan_to_num(pixels, nan=-1.0, posinf=-1.0, neginf=-1.0)
    height, width = silhouette.distance.shape
    is_shown: npt.NDArray[np.bool_] = ((pixels >= 0.0) & (pixels < [width, height])).all(axis=1)
    return pixels, is_shown


def _main_parts(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Drop parts below a twentieth of the largest: what views that agree by chance leave floating."""
    labels, number = scipy.ndimage.label(inside, structure=np.ones((3, 3, 3)))
    if number <= 1:
        return inside
    volumes = np.bincount(labels.reshape(-1))
    volumes[0] = 0
    kept: npt.NDArray[np.bool_] = (volumes >= 0.05 * volumes.max())[labels] & inside
    return kept
