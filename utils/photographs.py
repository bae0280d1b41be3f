"""Photographs as a loss looks into them: grey pixels and pinholes on the device, windows around rays.

Frames and letters as in ``utils/types.py``; besides, K pixels of a window and M views of a ray.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

_NEAREST = 1e-3
"""Positions nearer to a camera's plane than that, scene units, are not projected."""


@dataclass(frozen=True)
class Photographs:
    """Grey pictures of N pinhole views, to look up what they show at positions in scene space."""

    grey: UInt8[Tensor, " total"]
    """All pictures that there are, row by row, one after another."""
    starts: Int64[Tensor, " N"]
    """Index in ``grey`` of each view's first pixel; meaningless for views that are not in it."""
    size: Int64[Tensor, "N 2"]
    """(width, height), at least 2 x 2."""
    projections: Float32[Tensor, "N 3 3"]
    """K R^T: what turns a position relative to the camera's centre into ``depth * (u, v, 1)``."""
    centers: Float32[Tensor, "N 3"]
    """Camera centres in scene space."""
    sources: Int64[Tensor, "N M"]
    """The views that show what a view shows, best first; -1: there are no more."""

    def project(
        self, views: Int64[Tensor, "R M"], positions: Float[Tensor, "R K 3"]
    ) -> tuple[Float[Tensor, "R M 2 K"], Bool[Tensor, "R M K"]]:
        """See where each ray's positions appear in each of its views; differentiable in the positions.

        Returns:
            Continuous pixels, and whether the picture shows them: in front of the camera, and between the
            centres of four pixels. Elsewhere they are arbitrary but finite, if the positions are.
        """
        r, m = views.shape
        matrix = self.projections.index_select(0, views.flatten()).to(positions.dtype)
        center = self.centers.index_select(0, views.flatten()).to(positions.dtype)
        shift = (matrix @ center[:, :, None]).view(r, 3 * m, 1)
        image = torch.baddbmm(-shift, matrix.view(r, 3 * m, 3), positions.transpose(1, 2)).view(r, m, 3, -1)
        depth = image[:, :, 2:]
        is_in_front = depth > _NEAREST
        pixels = image[:, :, :2] / torch.where(is_in_front, depth, 1.0)
        end = self.size.index_select(0, views.flatten()).view(r, m, 2, 1) - 0.5
        is_inside = ((pixels >= 0.5) & (pixels <= end)).all(dim=2)
        return pixels, is_in_front[:, :, 0] & is_inside

    def look_up(
        self, views: Int64[Tensor, "R M"], pixels: Float[Tensor, "R M 2 K"]
    ) -> Float[Tensor, "R M K"]:
        """Grey values, 0..1, between four pixel centres; differentiable in the pixels.

        Beyond the centres of a picture's outermost pixels the values mean nothing.
        """
        size = self.size[views][..., None]
        position = pixels - 0.5
        # NaN becomes some integer, and that one is brought into the picture, too.
        corner = torch.minimum(position.detach().long().clamp(min=0), size - 2)
        right, down = (position - corner).unbind(dim=2)
        width = size[:, :, 0]
        first = self.starts[views][..., None] + corner[:, :, 1] * width + corner[:, :, 0]

        def read(indices: Tensor) -> Tensor:
            return self.grey.index_select(0, indices.flatten()).view(indices.shape).to(pixels.dtype)

        upper = torch.lerp(read(first), read(first + 1), right)
        lower = torch.lerp(read(first + width), read(first + width + 1), right)
        return torch.lerp(upper, lower, down) / 255.0


@dataclass(frozen=True)
class Windows:
    """Square windows of photographs around the pixels of a batch's first R rays, and where else to look."""

    directions: Float[Tensor, "R K 3"]
    """Of rays through the windows' pixels, row by row; unit, in scene space. Their origin is the ray's."""
    grey: Float[Tensor, "R K"]
    """What the photograph shows there, 0..1."""
    is_whole: Bool[Tensor, " R"]
    """Whether the window lies in the picture; what it holds means nothing otherwise."""
    sources: Int64[Tensor, "R M"]
    """Views to compare with, best first; -1: there are no more."""
    photographs: Photographs

    def __post_init__(self) -> None:
        r, k = self.grey.shape
        assert self.directions.shape == (r, k, 3) and self.is_whole.shape == (r,) and len(self.sources) == r

    def __len__(self) -> int:
        return self.grey.shape[0]
