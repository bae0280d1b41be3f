"""Windows around rays' pixels, and the other views in which a photometric loss looks for what they show.

Source views of a view are those that see the scene's centre from 5 to 45 degrees beside it: nearer ones say
little about depth, farther ones show a foreshortened or hidden surface. Among these come first the ones that
share most structure-from-motion points with it, or, where the capture does not tell, the nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from process_data.cameras import RayGenerator
from utils.errors import ConfigError
from utils.photographs import Photographs, Windows
from utils.types import Cameras, Rays, Scene, SparsePoints

MAX_SOURCES = 9
"""Source views of a view, at most (Geo-NeuS, section 4.1)."""
_ANGLES = (5.0, 45.0)
"""Degrees between source views as seen from the scene's centre."""


@dataclass(frozen=True)
class WindowDrawer:
    """Cuts windows around pixels of a scene's training views."""

    photographs: Photographs
    offsets: Float[Tensor, "K 2"]
    """Of a window's pixels from its middle one, row by row."""
    ray_generator: RayGenerator
    num_rays: int
    """So many of a batch's first rays get a window."""

    @classmethod
    def from_scene(
        cls, scene: Scene, views: Sequence[int], key: str, num_rays: int, width: int, generator: RayGenerator
    ) -> "WindowDrawer":
        """Prepare the photographs of a scene.

        Args:
            scene: the capture, on the CPU.
            views: those to draw from and to compare with.
            key: config key of the term that compares, for error messages.
            num_rays: so many of a batch's first rays get a window.
            width: of the windows in pixels, odd.
            generator: of the scene's rays, on the device where windows are drawn.

        Raises:
            ConfigError: the cameras have lenses that distort, or no view has a source view.
        """
        sources = sources_or_error(scene, views, key)
        device = generator.centers.device
        grey, starts = _grey_pictures(scene, views)
        rotations = scene.cameras.c2w[:, :, :3].double()
        projections = scene.cameras.intrinsics.double() @ rotations.transpose(1, 2)
        photographs = Photographs(
            torch.from_numpy(grey).to(device),
            starts.to(device),
            scene.cameras.size.to(device),
            projections.float().to(device),
            generator.centers,
            torch.from_numpy(sources).to(device),
        )
        steps = torch.arange(width, dtype=torch.float32, device=device) - width // 2
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 2)
        return cls(photographs, offsets, generator, num_rays)

    def draw(self, rays: Rays, pixels: Float[Tensor, "R 2"]) -> Windows:
        """Cut windows around the pixels (continuous, at centres) of the first rays."""
        views, middle = rays.camera_indices[: self.num_rays], pixels[: self.num_rays]
        pictures, count = self.photographs, len(self.offsets)
        around = middle[:, None] + self.offsets
        size = pictures.size.index_select(0, views)[:, None]
        is_whole = ((around >= 0.5) & (around <= size - 0.5)).all(dim=2).all(dim=1)
        # Pixel centres are k + 0.5, and the integer part of that is k.
        columns, rows = torch.minimum(around.long().clamp(min=0), size - 1).unbind(dim=2)
        flat = pictures.starts.index_select(0, views)[:, None] + rows * size[..., 0] + columns
        grey = pictures.grey.index_select(0, flat.flatten()).view(flat.shape).float() / 255.0
        repeated = views[:, None].expand(-1, count).flatten()
        directions = self.ray_generator.rays(repeated, around.flatten(0, 1)).directions
        return Windows(
            directions.view(len(views), count, 3),
            grey,
            is_whole,
            pictures.sources.index_select(0, views),
            pictures,
        )


def _grey_pictures(scene: Scene, views: Sequence[int]) -> tuple[npt.NDArray[np.uint8], Int64[Tensor, " N"]]:
    """Pictures of some of the views as one row of grey pixels, and where each view's begin."""
    counts = scene.images.size.prod(dim=1)
    starts = torch.zeros_like(counts)
    grey = np.empty(int(counts[list(views)].sum()), np.uint8)
    start = 0
    for view in views:
        starts[view] = start
        end = start + int(counts[view])
        grey[start:end] = cv2.cvtColor(scene.images.image(view).numpy(), cv2.COLOR_RGB2GRAY).reshape(-1)
        start = end
    return grey, starts


def select_sources(
    cameras: Cameras, points: SparsePoints | None, views: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Choose up to 9 source views for each view, best first.

    Args:
        cameras: N of them.
        points: where they say who saw them, views that share more come first; otherwise nearer ones do.
        views: to choose for, and to choose among.

    Returns:
        ``(N, 9)`` view indices; -1 where there are no more, and for views that are not to choose for.
    """
    chosen = np.asarray(sorted(views), np.int64)
    angles = _angles(cameras.c2w[chosen, :, 3].double().numpy())
    rank = angles
    if points is not None and len(points.observations) > 0:
        # Equal numbers of points, none above all, are told apart by the angle, which is below 180.
        rank = angles - 180.0 * _shared_points(points, chosen, len(cameras))
    is_good = (angles >= _ANGLES[0]) & (angles <= _ANGLES[1])
    sources = np.full((len(cameras), MAX_SOURCES), -1, np.int64)
    for row, view in enumerate(chosen.tolist()):
        order = np.argsort(rank[row], kind="stable")
        best = order[is_good[row, order]][:MAX_SOURCES]
        sources[view, : len(best)] = chosen[best]
    return sources


def sources_or_error(scene: Scene, views: Sequence[int], key: str) -> npt.NDArray[np.int64]:
    """Choose source views among some of a scene's, see :func:`select_sources`.

    Raises:
        ConfigError: the cameras have lenses that distort, or no view has a source view; it names ``key``, the
            config key of the term that compares.
    """
    if scene.cameras.lenses:
        what = "looks into photographs through pinholes, and this capture's lenses distort"
        raise ConfigError(key, what, "set it to 0, or undistort the capture")
    sources = select_sources(scene.cameras, scene.points, views)
    if (sources < 0).all():
        what = (
            f"no two of the {len(views)} training views see the scene's centre from directions "
            f"{_ANGLES[0]:g} to {_ANGLES[1]:g} degrees apart"
        )
        raise ConfigError(key, what, "set it to 0, or hold out fewer views")
    return sources


def _angles(centers: Float64[np.ndarray, "V 3"]) -> Float64[np.ndarray, "V V"]:
    """Degrees between the directions in which cameras lie, seen from the scene's centre."""
    directions = centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)
    return np.rad2deg(np.arccos(np.clip(directions @ directions.T, -1.0, 1.0)))


def _shared_points(
    points: SparsePoints, chosen: npt.NDArray[np.int64], num_views: int
) -> Float64[np.ndarray, "V V"]:
    """How many points each two of the chosen views both saw."""
    which, view = points.observations.T
    ones = np.ones(len(which))
    sees = scipy.sparse.csr_array((ones, (view, which)), shape=(num_views, len(points)))[chosen]
    # A view may list a point more than once.
    sees.data[:] = 1.0
    return np.asarray((sees @ sees.T).todense(), np.float64)
