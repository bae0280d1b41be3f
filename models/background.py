"""What lies beyond the unit sphere: a second radiance field over contracted space.

A small hash-grid NeRF lives in contracted space (mip-NeRF 360, Barron et al. 2022, equation 10), which is not
contracted within the ball that holds the cameras: what surrounds an object is seen as closely as the object.
Samples are spaced evenly in inverse distance (NeRF++, Zhang et al. 2020), from where a ray leaves the unit
sphere to the far distance, or placed where proposals expect something (see ``proposal.py``); the last sample
is opaque, so that every ray ends somewhere.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGridConfig
from models.backends import Backends
from models.contraction import CONTRACTED_RADIUS, contract
from models.density_field import DensityField, DensityFieldConfig
from models.density_surface import check_surface_density
from models.mlp import Precision
from models.proposal import (
    ProposalConfig,
    ProposalSampler,
    RayIntervals,
    dense_sums,
    ray_intervals,
    scaled_weights,
)
from utils.types import RayHistogram, Rays


@dataclass(frozen=True)
class BackgroundConfig:
    """Radiance field outside the unit sphere, for captures without masks."""

    enabled: bool = False
    """False composites over a plain colour instead (captures with masks)."""
    wait: float = 0.0
    """Fraction of training during which the field learns only from rays that miss the unit sphere, so that
    the surface has to explain all that may stand inside."""
    sampler: Literal["inverse_distance", "proposal"] = "inverse_distance"
    """Where the samples are: even in inverse distance, or where small density fields expect something, which
    the loss term ``interlevel`` trains."""
    proposal: ProposalConfig = field(
        default_factory=lambda: ProposalConfig(num_samples=(32, 24), max_resolutions=(64, 128))
    )
    """These fields."""
    num_samples: int = 16
    """Samples per ray that are given a colour."""
    far: float = 100.0
    """Distance of the last sample, scene units."""
    hash_grid: HashGridConfig = field(
        default_factory=lambda: HashGridConfig(num_levels=10, log2_table_size=17, max_resolution=1024)
    )
    hidden_width: int = 32
    """Units of the density's and the colour's one hidden layer each."""
    direction_degree: int = 3
    """Bands of spherical harmonics for the view direction (1..5)."""
    surface_density: float = 10.0
    """Density of the level set that meshes with ``export.extent`` show of it, 1 / scene units."""
    precision: Precision = "tf32"
    """Of the matrix products on a GPU (CPUs compute in float32)."""

    def __post_init__(self) -> None:
        if not 0 <= self.wait <= 1:
            raise ValueError(f"model.background.wait: must lie in 0..1, got {self.wait}")
        lowest = 2 if self.sampler == "proposal" else 1
        if self.num_samples < lowest:
            raise ValueError(
                f"model.background.num_samples: must be at least {lowest}, got {self.num_samples}"
            )
        check_surface_density(self.surface_density, "model.background.surface_density")
        for key, high in (("hidden_width", 4096), ("direction_degree", 5)):
            if not 1 <= getattr(self, key) <= high:
                given = getattr(self, key)
                raise ValueError(f"model.background.{key}: must lie in 1..{high}, got {given}")
        if not self.far > 2:
            raise ValueError(f"model.background.far: must be above 2 (the sphere's diameter), got {self.far}")

    @property
    def density_field(self) -> DensityFieldConfig:
        """Of density and colour."""
        return DensityFieldConfig(
            hash_grid=self.hash_grid,
            hidden_width=self.hidden_width,
            feature_width=8,
            color_width=self.hidden_width,
            color_layers=1,
            direction_degree=self.direction_degree,
            precision=self.precision,
        )


@dataclass(frozen=True)
class Backdrop:
    """What rays show beyond the unit sphere."""

    rgb: Float[Tensor, "R 3"]
    """In (0, 1)."""
    histograms: tuple[RayHistogram, ...]
    """Where along its way from the sphere to the far distance the light of a ray ends: the proposals', then
    that of the samples that were given a colour. All weights of a ray sum to 1."""


class Background(nn.Module):
    """Colour of rays beyond the unit sphere.

    Args:
        config: sizes.
        unit: radius of the ball within which nothing is contracted, scene units, at least 1.
        backends: of the kernels.
        appearance_width: numbers of an image's appearance.
        gradient_scaling: see ``gradient_scaling.py``, scene units; 0: none.
    """

    def __init__(
        self,
        config: BackgroundConfig,
        unit: float,
        backends: Backends,
        appearance_width: int = 0,
        gradient_scaling: float = 0.0,
    ) -> None:
        super().__init__()
        self.unit: Tensor
        # With the weights: another choice of training cameras would be another unit.
        self.register_buffer("unit", torch.tensor(unit))
        self.gradient_scaling = gradient_scaling
        self.num_samples, self.far = config.num_samples, config.far
        self.backend = backends.compositing
        self.density_field = DensityField(config.density_field, CONTRACTED_RADIUS, backends, appearance_width)
        self.sampler = (
            ProposalSampler(
                *(config.proposal, config.num_samples),
                spacing="reciprocal",
                contraction="l2",
                bound=CONTRACTED_RADIUS,
                ends=True,
                backends=backends,
            )
            if config.sampler == "proposal"
            else None
        )

    @property
    def device(self) -> torch.device:
        """Where rays and positions have to live."""
        return self.density_field.grid.table.device

    @property
    def num_proposals(self) -> int:
        """Fields that place the samples; 0 where they are evenly spaced."""
        return 0 if self.sampler is None else len(self.sampler.fields)

    def start(self, rays: Rays) -> Float[Tensor, " R"]:
        """Where the samples begin: behind the unit sphere, or, beside it, at a ray's closest point to it."""
        closest = -(rays.origins * rays.directions).sum(dim=1)
        return torch.where(rays.far > rays.near, rays.far, closest).clamp(0.05, 0.5 * self.far)

    def even_intervals(
        self,
        rays: Rays,
        near: Float[Tensor, " R"],
        far: Float[Tensor, " R"],
        generator: torch.Generator | None,
    ) -> RayIntervals:
        """``num_samples`` intervals along each ray, even in inverse distance, jittered as one."""
        fractions = torch.linspace(0, 1, self.num_samples + 1, device=near.device).expand(len(rays), -1)
        if generator is not None:
            jitter = torch.rand(len(rays), 1, generator=generator, device=near.device) - 0.5
            # The first and the last edge stay: no gap behind the sphere, and an end at the far distance.
            inner = fractions[:, 1:-1] + jitter / self.num_samples
            fractions = torch.cat([fractions[:, :1], inner, fractions[:, -1:]], dim=1)
        return ray_intervals(rays, fractions, near, far, "reciprocal", "l2")

    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None,
        num_rays: Int64[Tensor, ""] | None = None,
        appearance: Float[Tensor, "R A"] | None = None,
        proposal_anneal: float | Float[Tensor, ""] = 1.0,
    ) -> Backdrop:
        """What lies behind the unit sphere; without a generator the samples are not jittered.

        Of rays from ``num_rays`` on, which is on the device, the results mean nothing. ``appearance`` are the
        vectors of the rays' images, where there are any; ``proposal_anneal`` is the exponent on the
        proposals' weights.
        """
        count = None if num_rays is None else num_rays * self.num_samples
        near = self.start(rays) / self.unit
        far = torch.full_like(near, self.far) / self.unit
        scaled = replace(rays, origins=rays.origins / self.unit)
        if self.sampler is None:
            intervals = self.even_intervals(scaled, near, far, generator)
            proposed: tuple[RayHistogram, ...] = ()
        else:
            intervals, proposed = self.sampler(scaled, near, far, proposal_anneal, generator, num_rays)
        density, features = self.density_field.density(intervals.positions, count)
        indices = torch.arange(len(rays), device=near.device).repeat_interleave(self.num_samples)
        rgb = self.density_field.color(features, rays.directions, indices, count, appearance)
        distances = intervals.t_middle * self.unit
        weights, rgb = scaled_weights(
            density,
            rgb,
            intervals.lengths,
            distances,
            ends=True,
            reach=self.gradient_scaling,
            backend=self.backend,
        )
        rgb = dense_sums(weights, rgb, self.backend)
        return Backdrop(rgb, (*proposed, RayHistogram(intervals.s, weights)))

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units where space is not contracted; differentiable."""
        return self.density_field.density(contract(positions / self.unit))[0] / self.unit

    def query_color(
        self,
        positions: Float[Tensor, "P 3"],
        directions: Float[Tensor, "P 3"],
        appearance: Float[Tensor, "P A"] | None = None,
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""
        return self.density_field.color_at(contract(positions / self.unit), directions, appearance)
