"""NeRF on a hash grid with occupancy-grid sampling (instant-ngp, Müller et al. 2022).

A pixel is sum_i w_i c_i with alpha_i = 1 - exp(-density_i length_i) (NeRF, Mildenhall et al. 2020,
equation 3). Cells of the occupancy grid are open while they hold any density; before colours are computed,
what lies behind enough density is dropped.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from models.appearance import AppearanceConfig, appearance_of, mean_appearance
from models.backends import Backends
from models.background import BackgroundConfig
from models.bounded import BoundedModel, Shading, jitter_of
from models.chunks import in_chunks
from models.density_field import DensityField, DensityFieldConfig
from models.density_surface import DensitySurface, check_surface_density, density_normals
from models.gradient_scaling import check_reach
from models.marching.transmittance import drop_dark
from models.model import SurfaceModel
from models.occupancy import OccupancyConfig
from utils.types import Budget, Progress, Rays, RaySamples, RenderOutput, Scene


@dataclass(frozen=True)
class NGPConfig:
    """NeRF on a hash grid with an occupancy grid."""

    name: str = "nerf-ngp"
    backend: str = "auto"
    """Which version of the kernels; see model.backend of NeuS: auto, cpu, cuda, reference, or libraries."""
    density_field: DensityFieldConfig = field(default_factory=DensityFieldConfig)
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    occupancy: OccupancyConfig = field(default_factory=lambda: OccupancyConfig(decay=0.8, below_mean=True))
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    step: float = 0.0068
    """Marching step, scene units (instant-nsr-pl: 0.0034, 2 sqrt(3) / 1024)."""
    min_transmittance: float = 1e-3
    """Samples that less than this share of a ray's light reaches are dropped; 0 keeps all."""
    gradient_scaling: float = 0.0
    """Distance from a camera up to which gradients get fainter towards it, scene units (see
    ``gradient_scaling.py``). 0 leaves them alone."""
    surface_density: float = 10.0
    """Density of the level set that meshes show, 1 / scene units."""

    def __post_init__(self) -> None:
        if not 1e-5 <= self.step <= 1:
            raise ValueError(f"model.step: must lie in 1e-5..1, got {self.step}")
        if not 0 <= self.min_transmittance < 1:
            raise ValueError(f"model.min_transmittance: must lie in [0, 1), got {self.min_transmittance}")
        check_surface_density(self.surface_density)
        check_reach("model.gradient_scaling", self.gradient_scaling)


class NGP(BoundedModel):
    """Density and colour in the unit sphere, occupancy, and a background where there are no masks."""

    def __init__(self, config: NGPConfig, scene: Scene, backends: Backends) -> None:
        super().__init__(backends)
        self.config = config
        self.density_field = DensityField(config.density_field, 1.0, backends, config.appearance.inputs)
        self.surround(config, scene)

    @property
    def device(self) -> torch.device:
        """Where rays and positions have to live."""
        return self.density_field.grid.table.device

    @property
    def num_levels(self) -> int:
        """Levels of the hash grid, all of them open from the start."""
        return self.density_field.grid.num_levels

    def sample(
        self, rays: Rays, generator: torch.Generator | None, budget: Budget | None = None
    ) -> tuple[RaySamples, int | Int64[Tensor, ""]]:
        """March, then drop what is hidden. Returns the samples, and how many were marched."""
        rays, jitter, threshold = rays.detach(), jitter_of(rays, generator), self.config.min_transmittance
        samples, num_marched = self.march(rays, self.config.step, jitter, budget, threshold > 0)
        if threshold > 0 and len(samples) > 0:
            count, rendered = (None, None) if budget is None else (samples.count, budget.rendered)
            with torch.no_grad():
                alpha = _alpha(self.density_field.density(samples.positions(rays), count)[0], samples)
            samples = drop_dark(samples, alpha, threshold, self.backends.compositing, capacity=rendered)
        return samples, num_marched

    def render(
        self,
        rays: Rays,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None = None,
        budget: Budget | None = None,
    ) -> RenderOutput:
        """March, query, composite; arguments as of :meth:`models.model.Model.render`."""
        if budget is not None:
            rays = budget.limit(rays)
        samples, num_marched = self.sample(rays, generator, budget)
        count = None if budget is None else samples.count
        positions = samples.positions(rays)
        density, features = self.density_field.density(positions, count)
        appearance = appearance_of(self.embedding, rays.camera_indices)
        rgb = self.density_field.color(features, rays.directions, samples.ray_indices, count, appearance)
        normal = torch.zeros_like(positions)
        if generator is None:
            normal = density_normals(lambda at: self.density_field.density(at, count)[0], positions)
        shading = Shading(samples, num_marched, positions, _alpha(density, samples), rgb, normal, appearance)
        return self.composite(rays, shading, progress, background_color, generator, budget)

    def update_occupancy(self, progress: Progress, generator: torch.Generator) -> None:
        """Refresh the occupancy grid: a cell holds the opacity of one marching step in it."""

        def presence(positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
            density = in_chunks(self.query_density, positions)
            return -torch.expm1(-density * self.config.step)

        self.occupancy.update(presence, generator, progress.fraction)

    def frozen_at(self, progress: Progress, extent: float = 1.0) -> SurfaceModel:
        """The level set of the density, ready to be asked."""
        del progress
        surface = DensitySurface(self, self.config.surface_density, self.occupancy.occupied)
        return self.surrounded(surface, extent)

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units; differentiable."""
        return self.density_field.density(positions)[0]

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen from ``directions`` (unit, pointing away from the viewer)."""
        appearance = mean_appearance(self.embedding, len(positions))
        return self.density_field.color_at(positions, directions, appearance)


def _alpha(density: Float[Tensor, " S"], samples: RaySamples) -> Float[Tensor, " S"]:
    return -torch.expm1(-density * (samples.t_ends - samples.t_starts))
