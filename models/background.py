"""What lies beyond the unit sphere: a second radiance field over contracted space.

Positions outside the unit ball are contracted into a ball of radius 2 (mip-NeRF 360, Barron et al. 2022,
equation 10), and a small hash-grid NeRF lives there. Samples are spaced evenly in inverse distance
(NeRF++, Zhang et al. 2020), from where a ray leaves the unit sphere to the far distance, or placed where
proposals expect something (see ``proposal.py``); the last sample is opaque, so that every ray ends somewhere.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig, encode_spherical_harmonics
from models.backends import Backends
from models.compositing import accumulate
from models.contraction import CONTRACTED_RADIUS
from models.density_field import density_of
from models.fields import make_network
from models.gradient_scaling import scale_gradients
from models.mlp import Precision
from models.proposal import (
    ProposalConfig,
    ProposalSampler,
    RayIntervals,
    dense_weights,
    opacities,
    ray_intervals,
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
        default_factory=lambda: HashGridConfig(num_levels=8, log2_table_size=15, max_resolution=256)
    )
    hidden_width: int = 32
    """Units of the density's and the colour's one hidden layer each."""
    direction_degree: int = 3
    """Bands of spherical harmonics for the view direction (1..5)."""
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
        if not self.far > 2:
            raise ValueError(f"model.background.far: must be above 2 (the sphere's diameter), got {self.far}")


@dataclass(frozen=True)
class Backdrop:
    """What rays show beyond the unit sphere."""

    rgb: Float[Tensor, "R 3"]
    """In (0, 1)."""
    histograms: tuple[RayHistogram, ...]
    """Where along its way from the sphere to the far distance the light of a ray ends: the proposals', then
    that of the samples that were given a colour. All weights of a ray sum to 1."""


class Background(nn.Module):
    """Colour of rays beyond the unit sphere."""

    _feature_width = 8

    def __init__(
        self,
        config: BackgroundConfig,
        backends: Backends,
        appearance_width: int = 0,
        gradient_scaling: float = 0.0,
    ) -> None:
        super().__init__()
        self.gradient_scaling = gradient_scaling
        self.num_samples, self.far = config.num_samples, config.far
        self.direction_degree = config.direction_degree
        self.backend = backends.compositing
        self.grid = HashGrid(config.hash_grid, bound=CONTRACTED_RADIUS, backend=backends.hash_grid)
        density_widths = [self.grid.width, config.hidden_width, 1 + self._feature_width]
        self.density_network = make_network(density_widths, backends.network, config.precision)
        inputs = self._feature_width + config.direction_degree**2 + appearance_width
        self.color_network = make_network(
            [inputs, config.hidden_width, 3], backends.network, config.precision
        )
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
        near = self.start(rays)
        far = torch.full_like(near, self.far)
        if self.sampler is None:
            intervals = self.even_intervals(rays, near, far, generator)
            proposed: tuple[RayHistogram, ...] = ()
        else:
            intervals, proposed = self.sampler(rays, near, far, proposal_anneal, generator, num_rays)
        encoded = self.grid(intervals.positions, float(self.grid.num_levels), count)
        raw = self.density_network(encoded, count)
        # Optical depth is measured in contracted units (about the change of 1 / t), so that far bins, which
        # are hundreds of units long, do not turn opaque at the faintest density.
        lengths = -(1.0 / intervals.t).diff(dim=1) * self.num_samples
        alpha = opacities(density_of(raw[:, 0]), lengths, ends=True)
        directions = encode_spherical_harmonics(rays.directions, self.direction_degree)
        if appearance is not None:
            directions = torch.cat([directions, appearance], dim=1)
        directions = directions.repeat_interleave(self.num_samples, dim=0)
        rgb = torch.sigmoid(self.color_network(torch.cat([raw[:, 1:], directions], dim=1), count))
        if self.gradient_scaling > 0:
            distances = intervals.t_middle.reshape(-1)
            flat, rgb = scale_gradients(alpha.reshape(-1), rgb, distances, self.gradient_scaling)
            alpha = flat.view_as(alpha)
        weights = dense_weights(alpha, self.backend)
        offsets = torch.arange(len(rays) + 1, device=near.device) * self.num_samples
        rgb = accumulate(weights.reshape(-1), rgb, offsets, self.backend)
        return Backdrop(rgb, (*proposed, RayHistogram(intervals.s, weights)))
