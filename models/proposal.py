"""Proposal sampling: small density fields that learn where the samples of a large one are needed.

    s = 0 |--|--|--|--|--|--|--|--|--|--| 1    even intervals            ─> density 0 ─> weights
          |----|--|-|||-|--|-----|------|      where these weigh most    ─> density 1 ─> weights
          |------|---||||||---|---------|      where these weigh most    ─> the model's own field

Each proposal is a hash grid with a tiny network. It is not trained on colours: the interlevel loss holds its
weights above those of the level below (``systems/histogram_losses.py``). Samples are placed outside of
autograd, so that neither teaches the other where to look.

Optical depth is density times the length of an interval in the space in which the fields live: scene units
within radius 1, and shrinking beyond where space is contracted. There, far intervals, hundreds of units long,
would be opaque at the faintest density; and what matters of a proposal is only that its weights bound others.

Source: mip-NeRF 360 (Barron et al. 2022), section 3; hash-grid fields as nerfacto's (Tancik et al. 2023).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder import HashGrid, HashGridConfig
from models.backends import Backends
from models.compositing import accumulate, render_weights
from models.contraction import ContractionNorm, contract
from models.density_field import density_of
from models.fields import make_network
from models.gradient_scaling import scale_gradients
from models.mlp import Precision
from models.resampling import anneal, resample_intervals
from models.spacing import Spacing, distances_from_s
from utils.types import RayHistogram, Rays


@dataclass(frozen=True)
class ProposalConfig:
    """Fields that propose where samples are needed."""

    num_samples: tuple[int, ...] = (64, 48)
    """Samples per ray of each proposal."""
    max_resolutions: tuple[int, ...] = (64, 256)
    """Cells per axis of the finest level of each proposal's hash grid."""
    num_levels: int = 5
    """Levels of each of these grids."""
    log2_table_size: int = 15
    """A level keeps at most 2^this entries (nerfacto: 17)."""
    base_resolution: int = 16
    """Cells per axis of the coarsest level."""
    hidden_width: int = 16
    """Units of each network's one hidden layer."""
    padding: float = 0.01
    """Added to all weights of a ray before new samples are drawn (nerfacto's): the fraction of them that is
    spread evenly over the intervals is at least padding x intervals / (1 + padding x intervals)."""
    precision: Precision = "tf32"
    """Of the matrix products on a GPU (CPUs compute in float32)."""

    def __post_init__(self) -> None:
        if not self.num_samples or min(self.num_samples) < 2:
            raise ValueError(
                f"proposal.num_samples: must be one number per proposal, each at least 2, "
                f"got {list(self.num_samples)}"
            )
        if len(self.max_resolutions) != len(self.num_samples):
            raise ValueError(
                f"proposal.max_resolutions: must be as many numbers as num_samples has "
                f"({len(self.num_samples)}), got {list(self.max_resolutions)}"
            )
        if self.hidden_width < 1:
            raise ValueError(f"proposal.hidden_width: must be at least 1, got {self.hidden_width}")
        if self.padding < 0:
            raise ValueError(f"proposal.padding: must not be negative, got {self.padding}")
        for resolution in self.max_resolutions:
            try:
                self.hash_grid(resolution)
            except ValueError as error:
                key, _, what = str(error).removeprefix("hash_grid.").partition(": ")
                key = "max_resolutions" if key == "max_resolution" else key
                raise ValueError(f"proposal.{key}: {what}") from None

    def hash_grid(self, max_resolution: int) -> HashGridConfig:
        """The grid of one proposal."""
        return HashGridConfig(
            num_levels=self.num_levels,
            log2_table_size=self.log2_table_size,
            base_resolution=self.base_resolution,
            max_resolution=max_resolution,
        )


@dataclass(frozen=True)
class RayIntervals:
    """N intervals that tile a stretch of each of R rays, and where fields see them."""

    s: Float[Tensor, "R N_plus_1"]
    """Edges in normalised distance, 0..1."""
    t: Float[Tensor, "R N_plus_1"]
    """Edges in distance, scene units."""
    positions: Float[Tensor, "R_N 3"]
    """The intervals' middles where the fields live (contracted, if space is), one ray after another."""
    lengths: Float[Tensor, "R N"]
    """Of the intervals, measured there."""

    @property
    def t_middle(self) -> Float[Tensor, "R N"]:
        """Distances of the middles, scene units."""
        return 0.5 * (self.t[:, 1:] + self.t[:, :-1])


def ray_intervals(
    rays: Rays,
    s: Float[Tensor, "R N_plus_1"],
    near: Float[Tensor, " R"],
    far: Float[Tensor, " R"],
    spacing: Spacing,
    contraction: ContractionNorm | None,
) -> RayIntervals:
    """The intervals between edges in normalised distance, as fields see them.

    Gradients pass to the rays' origins and directions, but not to where on the rays the edges are.

    Args:
        rays: origins and directions; their unit sphere plays no part.
        s: edges, 0 at ``near`` and 1 at ``far``, not falling.
        near: scene units, above 0.
        far: above ``near``.
        spacing: see ``spacing.py``.
        contraction: of the space in which the fields live; ``None``: none.
    """
    with torch.no_grad():
        t = distances_from_s(s, near, far, spacing)

    def points(distances: Tensor) -> Tensor:
        positions = rays.origins[:, None] + distances[..., None] * rays.directions[:, None]
        return positions if contraction is None else contract(positions, contraction)

    lengths = points(t).diff(dim=1).norm(dim=2)
    middles = points(0.5 * (t[:, 1:] + t[:, :-1]))
    return RayIntervals(s, t, middles.flatten(0, 1), lengths)


def opacities(
    density: Float[Tensor, " R_N"], lengths: Float[Tensor, "R N"], ends: bool
) -> Float[Tensor, "R N"]:
    """Opacity 1 - exp(-density_i length_i) of each interval.

    Args:
        density: one ray after another.
        lengths: of the intervals.
        ends: whether the last interval is opaque, so that all of a ray's light ends in one of them.

    Source: NeRF (Mildenhall et al. 2020), equation 3.
    """
    alpha = -torch.expm1(-density.view_as(lengths) * lengths)
    return torch.cat([alpha[:, :-1], torch.ones_like(alpha[:, :1])], dim=1) if ends else alpha


def dense_weights(alpha: Float[Tensor, "R N"], backend: str) -> Float[Tensor, "R N"]:
    """:func:`models.compositing.render_weights` of N intervals on every ray."""
    num_rays, num = alpha.shape
    offsets = torch.arange(num_rays + 1, device=alpha.device) * num
    return render_weights(alpha.reshape(-1), offsets, backend).view(num_rays, num)


def dense_sums(
    weights: Float[Tensor, "R N"], values: Float[Tensor, "R_N C"], backend: str
) -> Float[Tensor, "R C"]:
    """:func:`models.compositing.accumulate` of N intervals on every ray."""
    num_rays, num = weights.shape
    offsets = torch.arange(num_rays + 1, device=weights.device) * num
    return accumulate(weights.reshape(-1), values, offsets, backend)


def scaled_weights(
    density: Float[Tensor, " R_N"],
    rgb: Float[Tensor, "R_N 3"],
    lengths: Float[Tensor, "R N"],
    distances: Float[Tensor, "R N"],
    *,
    ends: bool,
    reach: float,
    backend: str,
) -> tuple[Float[Tensor, "R N"], Float[Tensor, "R_N 3"]]:
    """Weights of intervals, and ``rgb`` as it is; gradients fade where the camera is nearer than ``reach``.

    Args:
        density: one ray after another.
        rgb: the same.
        lengths: of the intervals, in the density's units.
        distances: of their middles from the camera, in those of ``reach``.
        ends: whether the last interval is opaque.
        reach: see ``gradient_scaling.py``; 0: gradients stay as they are.
        backend: of the compositing kernels.
    """
    alpha = opacities(density, lengths, ends)
    if reach > 0:
        flat, rgb = scale_gradients(alpha.reshape(-1), rgb, distances.reshape(-1), reach)
        alpha = flat.view_as(alpha)
    return dense_weights(alpha, backend), rgb


def composite_weights(
    density: Float[Tensor, " R_N"], lengths: Float[Tensor, "R N"], ends: bool, backend: str
) -> Float[Tensor, "R N"]:
    """Weights w_i = T_i (1 - exp(-density_i length_i)): :func:`opacities`, then :func:`dense_weights`."""
    return dense_weights(opacities(density, lengths, ends), backend)


class ProposalField(nn.Module):
    """Density alone, on a small hash grid: a proposal's."""

    def __init__(self, config: ProposalConfig, max_resolution: int, bound: float, backends: Backends) -> None:
        super().__init__()
        self.grid = HashGrid(config.hash_grid(max_resolution), bound, backends.hash_grid)
        widths = [self.grid.width, config.hidden_width, 1]
        self.network = make_network(widths, backends.network, config.precision)

    def forward(
        self, positions: Float[Tensor, "S 3"], count: Int64[Tensor, ""] | None = None
    ) -> Float[Tensor, " S"]:
        """Density per unit of the field's space; of rows from ``count`` on it means nothing."""
        encoded = self.grid(positions, float(self.grid.num_levels), count)
        return density_of(self.network(encoded, count)[:, 0])


class ProposalSampler(nn.Module):
    """Places a fixed number of samples on each ray, where proposals expect its light to end.

    Args:
        config: the proposals.
        num_samples: intervals per ray that come out, at least 2.
        spacing: what the first, even intervals are even in.
        contraction: of the space in which the fields live; ``None``: none.
        bound: half the side of the cube that the fields cover, contracted units.
        ends: whether every ray ends in its last interval, the background being part of the scene.
        backends: of the grids, networks and compositing.
    """

    def __init__(
        self,
        config: ProposalConfig,
        num_samples: int,
        *,
        spacing: Spacing,
        contraction: ContractionNorm | None,
        bound: float,
        ends: bool,
        backends: Backends,
    ) -> None:
        super().__init__()
        self._counts = (*config.num_samples, num_samples)
        self._padding, self._spacing, self._contraction = config.padding, spacing, contraction
        self._ends, self._backend = ends, backends.compositing
        self.fields = nn.ModuleList(
            ProposalField(config, resolution, bound, backends) for resolution in config.max_resolutions
        )

    def forward(
        self,
        rays: Rays,
        near: Float[Tensor, " R"],
        far: Float[Tensor, " R"],
        exponent: float | Float[Tensor, ""],
        generator: torch.Generator | None,
        num_rays: Int64[Tensor, ""] | None = None,
    ) -> tuple[RayIntervals, tuple[RayHistogram, ...]]:
        """Intervals for the model's own field, and what the proposals said.

        Args:
            rays: origins and directions; their unit sphere plays no part.
            near: where the intervals begin, scene units, above 0.
            far: where they end, above ``near``.
            exponent: on the proposals' weights, 0..1: low in the beginning, when they know little.
            generator: one jitter per ray and level; ``None``: none.
            num_rays: on the device; of rays from here on the results mean nothing but are finite.

        Returns:
            The intervals, see :func:`ray_intervals`, and a histogram of each proposal, whose weights are
            differentiable in the proposals' parameters.
        """
        # An opening that is no opening, as padding's may be, must not turn into numbers that are none.
        far = torch.maximum(far, near + 1e-3)
        still = replace(rays, origins=rays.origins.detach(), directions=rays.directions.detach())
        edges = torch.zeros(len(rays), 2, device=near.device)
        edges[:, 1] = 1.0
        weights = torch.ones_like(near)[:, None]
        histograms = []
        for level, count in enumerate(self._counts):
            padding = self._padding if level > 0 else 0.0
            likely = anneal(edges, weights, exponent)
            edges = resample_intervals(edges, likely, count, generator, padding=padding)
            if level < len(self.fields):
                intervals = ray_intervals(still, edges, near, far, self._spacing, self._contraction)
                real = None if num_rays is None else num_rays * count
                density = self.fields[level](intervals.positions, real)
                weights = composite_weights(density, intervals.lengths, self._ends, self._backend)
                histograms.append(RayHistogram(edges, weights))
        final = ray_intervals(rays, edges, near, far, self._spacing, self._contraction)
        return final, tuple(histograms)
