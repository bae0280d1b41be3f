"""One surface for what is in the unit sphere and for what surrounds it.

        background's level set        unit sphere            background's level set
    ------------------------------|---- surface ----|------------------------------

Both end at the sphere: a solid that sticks out of it on one side only is closed there.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.appearance import ImageEmbedding, mean_appearance
from models.background import Background
from models.density_surface import DensitySurface, dense_cells
from models.model import SurfaceModel

_WALL = 1e-3
"""Distance that is said of what touches the sphere, scene units: near zero, so that the extraction, which
looks only where distances are small, looks there."""


@dataclass(frozen=True)
class _Beyond:
    """The background as a radiance field that belongs to no particular photograph."""

    background: Background
    embedding: ImageEmbedding | None

    @property
    def device(self) -> torch.device:
        return self.background.device

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        return self.background.query_density(positions)

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        appearance = mean_appearance(self.embedding, len(positions))
        return self.background.query_color(positions, directions, appearance)


class SurroundedSurface:
    """A surface in the unit sphere, and the level set of a background's density outside of it.

    Args:
        inside: the surface.
        background: what surrounds it.
        embedding: of the images' appearance, where there is one.
        level: density of the background's surface, 1 / scene units.
        extent: half a side of the cube that will be asked about, scene units, above 1.
    """

    def __init__(
        self,
        inside: SurfaceModel,
        background: Background,
        embedding: ImageEmbedding | None,
        level: float,
        extent: float,
    ) -> None:
        self.inside = inside
        beyond = _Beyond(background, embedding)
        self.outside = DensitySurface(beyond, level, dense_cells(beyond, 0.1 * level, extent), extent)

    @property
    def device(self) -> torch.device:
        """Where positions have to live."""
        return self.inside.device

    def query_sdf(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Negative inside of either; at most the distance to the sphere, at which one ends."""
        radius = positions.norm(dim=1)
        is_inside = radius < 1.0
        values = torch.empty_like(radius)
        wall = (1.0 - radius[is_inside]).clamp(min=_WALL)
        values[is_inside] = self.inside.query_sdf(positions[is_inside]).clamp(-wall, wall)
        values[~is_inside] = self.outside.query_sdf(positions[~is_inside]).clamp(
            max=(radius[~is_inside] - 1.0).clamp(min=_WALL)
        )
        return values

    def query_gradient(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """The gradient of the surface inside, unit normals outside."""
        values = torch.empty_like(positions)
        for surface, chosen in self._parts(positions):
            values[chosen] = surface.query_gradient(positions[chosen])
        return values

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""
        values = torch.empty_like(positions)
        for surface, chosen in self._parts(positions):
            values[chosen] = surface.query_color(positions[chosen], directions[chosen])
        return values

    def _parts(
        self, positions: Float[Tensor, "P 3"]
    ) -> tuple[tuple[SurfaceModel, Bool[Tensor, " P"]], tuple[SurfaceModel, Bool[Tensor, " P"]]]:
        is_inside = positions.norm(dim=1) < 1.0
        return (self.inside, is_inside), (self.outside, ~is_inside)
