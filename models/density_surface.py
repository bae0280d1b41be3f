"""The surface of a radiance field: the level set of its density.

Surface extraction and everything after it ask for a signed distance. A density gives the side of a position
at once and the distance only roughly, as follows:

    in cells that are sampled   a thin ramp, tanh(log(level / density)) * 0.001: never too far from zero for
                                the extraction to pass over
    elsewhere                   the distance to the nearest of these cells, which is positive: nothing there
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from models.chunks import in_chunks

_RAMP = 1e-3
"""Largest value where there may be a surface, scene units: far below the distance within which the extraction
looks again, at any resolution up to 4000."""

_CELLS_AT_ONCE = 2**15


def check_surface_density(density: float, key: str = "model.surface_density") -> None:
    """Raise a ``ValueError`` that names the config key of a level set's density outside of 1e-3..1e5."""
    if not 1e-3 <= density <= 1e5:
        raise ValueError(f"{key}: must lie in 1e-3..1e5, got {density:g}")


@runtime_checkable
class DensityModel(Protocol):
    """What a surface asks of a radiance field, in scene space."""

    @property
    def device(self) -> torch.device:
        """Where it wants its positions."""

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units, differentiable in the positions."""

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""


def density_normals(
    density: Callable[[Float[Tensor, "S 3"]], Float[Tensor, " S"]], positions: Float[Tensor, "S 3"]
) -> Float[Tensor, "S 3"]:
    """Unit vectors that point to where the density falls; zeros where it is flat."""
    with torch.enable_grad():
        at = positions.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(density(at).sum(), at)
    return -torch.nn.functional.normalize(gradient, dim=1, eps=1e-12)


@torch.no_grad()
def dense_cells(
    model: DensityModel, least: float, extent: float = 1.0, size: int = 128
) -> Bool[Tensor, "G G G"]:
    """Where a model that has no occupancy grid may have a surface.

    Args:
        model: the radiance field.
        least: density, well below the surface's.
        extent: half a side of the cube of cells, scene units.
        size: cells per axis. To look at 128^3 before a mesh of 256^3 is extracted costs an eighth.

    Returns:
        Cells over [-extent, extent]^3, indexed ``[z, y, x]``, with this density in their middle or in that of
        a neighbour.
    """
    ticks = extent * ((torch.arange(size, device=model.device) + 0.5) * (2.0 / size) - 1.0)
    z, y, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
    positions = torch.stack([x, y, z], dim=-1).view(-1, 3)
    # Few at once: the paper's networks take kilobytes for each.
    density = torch.cat([model.query_density(part) for part in positions.split(_CELLS_AT_ONCE)])
    density = density.view(1, 1, size, size, size)
    return torch.nn.functional.max_pool3d(density, kernel_size=3, stride=1, padding=1)[0, 0] > least


class DensitySurface:
    """Where a density passes a level, for whoever asks about a surface: export, previews, tests.

    Args:
        model: the radiance field.
        level: density of the surface, 1 / scene units.
        occupied: cells indexed ``[z, y, x]``, outside of which there is nothing; ``None``: there may be
            something anywhere.
        extent: the cells cover [-extent, extent]^3, scene units.
    """

    def __init__(
        self,
        model: DensityModel,
        level: float,
        occupied: Bool[Tensor, "G G G"] | None,
        extent: float = 1.0,
    ) -> None:
        self.model, self.level, self.extent = model, level, extent
        self._gap: Float[Tensor, "G G G"] | None = None
        if occupied is not None and bool(occupied.any()):
            cell = 2.0 * extent / len(occupied)
            gap = torch.from_numpy(distance_transform_edt(~occupied.cpu().numpy())).float() * cell
            # From anywhere in a cell to anywhere in another it may be a diagonal less than between centres.
            self._gap = (gap - 3**0.5 * cell).clamp(min=0.0).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where positions have to live."""
        return self.model.device

    @torch.no_grad()
    def query_sdf(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Negative where the density is above the level; see the module for what the value says."""

        def ramp(chunk: Tensor) -> Tensor:
            density = self.model.query_density(chunk)
            return _RAMP * torch.tanh(torch.log(self.level / density.clamp(min=1e-10)))

        if self._gap is None:
            return in_chunks(ramp, positions)
        size = len(self._gap)
        cells = ((positions / self.extent + 1.0) * (0.5 * size)).floor().long().clamp(0, size - 1)
        x, y, z = cells.unbind(1)
        values = _RAMP + self._gap[z, y, x]
        near = values == _RAMP
        values[near] = in_chunks(ramp, positions[near])
        return values

    def query_gradient(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """Unit normals, which point to where the density falls."""
        return in_chunks(lambda chunk: density_normals(self.model.query_density, chunk), positions)

    @torch.no_grad()
    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""
        return in_chunks(
            lambda chunk: self.model.query_color(chunk[:, :3].contiguous(), chunk[:, 3:]),
            torch.cat([positions, directions], dim=1),
        )
