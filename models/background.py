"""What lies beyond the unit sphere: a second radiance field over contracted space.

Positions outside the unit ball are contracted into a ball of radius 2 (mip-NeRF 360, Barron et al. 2022,
equation 10), and a small hash-grid NeRF lives there. Samples are spaced evenly in inverse distance
(NeRF++, Zhang et al. 2020), from where a ray leaves the unit sphere to the far distance; the last sample
is opaque, so that every ray ends somewhere.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig, encode_spherical_harmonics
from models.backends import Backends
from models.compositing import accumulate, render_weights
from models.contraction import CONTRACTED_RADIUS, contract
from models.fields import make_network
from models.gradient_scaling import scale_gradients
from models.mlp import Precision
from utils.types import Rays


@dataclass(frozen=True)
class BackgroundConfig:
    """Radiance field outside the unit sphere, for captures without masks."""

    enabled: bool = False
    """False composites over a plain colour instead (captures with masks)."""
    wait: float = 0.0
    """Fraction of training during which the field learns only from rays that miss the unit sphere, so that
    the surface has to explain all that may stand inside."""
    num_samples: int = 16
    """Samples per ray."""
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
        if self.num_samples < 1:
            raise ValueError(f"model.background.num_samples: must be at least 1, got {self.num_samples}")
        if not self.far > 2:
            raise ValueError(f"model.background.far: must be above 2 (the sphere's diameter), got {self.far}")


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

    def distances(self, rays: Rays, generator: torch.Generator | None) -> Float[Tensor, "R E"]:
        """Bin edges along each ray, ``num_samples + 1`` of them, even in inverse distance, jittered as one.

        A ray that misses the unit sphere starts at its point closest to the centre.
        """
        closest = -(rays.origins * rays.directions).sum(dim=1)
        start = torch.where(rays.far > rays.near, rays.far, closest).clamp(0.05, 0.5 * self.far)
        fractions = torch.linspace(0, 1, self.num_samples + 1, device=start.device).expand(len(rays), -1)
        if generator is not None:
            jitter = torch.rand(len(rays), 1, generator=generator, device=start.device) - 0.5
            # The first and the last edge stay: no gap behind the sphere, and an end at the far distance.
            inner = fractions[:, 1:-1] + jitter / self.num_samples
            fractions = torch.cat([fractions[:, :1], inner, fractions[:, -1:]], dim=1)
        return 1.0 / ((1.0 - fractions) / start[:, None] + fractions / self.far)

    def forward(
        self,
        rays: Rays,
        generator: torch.Generator | None,
        num_rays: Int64[Tensor, ""] | None = None,
        appearance: Float[Tensor, "R A"] | None = None,
    ) -> Float[Tensor, "R 3"]:
        """RGB in (0, 1) behind the unit sphere; without a generator the samples are not jittered.

        Of rays from ``num_rays`` on, which is on the device, the colours mean nothing. ``appearance`` are the
        vectors of the rays' images, where there are any.
        """
        count = None if num_rays is None else num_rays * self.num_samples
        edges = self.distances(rays, generator)
        middles = 0.5 * (edges[:, 1:] + edges[:, :-1])
        positions = rays.origins[:, None] + middles[..., None] * rays.directions[:, None]
        encoded = self.grid(contract(positions.reshape(-1, 3)), float(self.grid.num_levels), count)
        raw = self.density_network(encoded, count)
        # exp(x - 1), with the exponent bounded so that neither the value nor its gradient overflows.
        density = torch.exp((raw[:, 0] - 1.0).clamp(max=15.0))
        # Optical depth is measured in contracted units (about the change of 1 / t), so that far bins, which
        # are hundreds of units long, do not turn opaque at the faintest density.
        lengths = (1.0 / edges[:, :-1] - 1.0 / edges[:, 1:]).reshape(-1) * self.num_samples
        alpha = 1.0 - torch.exp(-density * lengths)
        alpha = torch.cat(
            [alpha.view(len(rays), self.num_samples)[:, :-1], torch.ones_like(alpha[: len(rays), None])],
            dim=1,
        )
        alpha = alpha.reshape(-1)
        directions = encode_spherical_harmonics(rays.directions, self.direction_degree)
        if appearance is not None:
            directions = torch.cat([directions, appearance], dim=1)
        directions = directions.repeat_interleave(self.num_samples, dim=0)
        rgb = torch.sigmoid(self.color_network(torch.cat([raw[:, 1:], directions], dim=1), count))
        if self.gradient_scaling > 0:
            alpha, rgb = scale_gradients(alpha, rgb, middles.reshape(-1), self.gradient_scaling)
        offsets = torch.arange(len(rays) + 1, device=alpha.device) * self.num_samples
        weights = render_weights(alpha, offsets, self.backend)
        return accumulate(weights, rgb, offsets, self.backend)
