"""Methods whose samples proposals place, over all of space: what surrounds the field, and pixels' last steps.

s = 0 |-----|--|-|||-|--|-----|---| 1        edges of N intervals, as many on every ray
 near                               far      distances, in units (``model.unit``), within which space is
                                             not contracted
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.appearance import Exposure, ImageEmbedding
from models.backends import Backends
from models.contraction import camera_radius
from models.density_surface import DensitySurface, dense_cells
from models.model import Model
from models.proposal import dense_sums, scaled_weights
from utils.types import Budget, Progress, RayHistogram, Rays, RenderOutput, Scene


@dataclass(frozen=True)
class Shading:
    """What a field shows in N intervals on each of R rays, one ray after another."""

    proposed: tuple[RayHistogram, ...]
    """What the proposals said."""
    edges: Float[Tensor, "R N_plus_1"]
    """Of the intervals, in normalised distance."""
    t_middle: Float[Tensor, "R N"]
    """Distances of their middles, units."""
    positions: Float[Tensor, "R_N 3"]
    """Of these, scene space."""
    normal: Float[Tensor, "R_N 3"]
    """Unit, or zeros where nobody asks for it."""
    weights: Float[Tensor, "R N"]
    color: Float[Tensor, "R 3"]
    """Sums of weights times colours."""
    opacity: Float[Tensor, " R"]
    """Sums of weights."""


class UnboundedModel(Model):
    """A field over all of space, and proposals that place the same number of samples on every ray.

    Args:
        config: has ``unit``, ``gradient_scaling``, ``surface_density`` and ``proposal.num_samples``.
        scene: its training cameras say how long a unit is that the config leaves open.
        backends: of the kernels.
        is_contracted: whether there is anything beyond the unit sphere.
        is_opaque: whether every ray ends in its last interval.
    """

    unit: float
    """Radius within which nothing is contracted, scene units."""
    embedding: ImageEmbedding | None
    exposure: Exposure | None

    def __init__(
        self, config: Any, scene: Scene, backends: Backends, is_contracted: bool, is_opaque: bool
    ) -> None:
        super().__init__(backends)
        self.unit = config.unit or camera_radius(scene)
        self.reach = math.inf if is_contracted else 1.0
        self.is_opaque = is_opaque
        self._proposed, self._level = config.proposal.num_samples, config.surface_density
        self._scaling_reach = config.gradient_scaling

    @property
    def num_proposals(self) -> int:
        """How often proposals are asked where samples are needed."""
        return len(self._proposed)

    @abstractmethod
    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units; differentiable."""

    @abstractmethod
    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""

    def weigh(
        self,
        density: Float[Tensor, " R_N"],
        rgb: Float[Tensor, "R_N 3"],
        lengths: Float[Tensor, "R N"],
        t_middle: Float[Tensor, "R N"],
    ) -> tuple[Float[Tensor, "R N"], Float[Tensor, "R_N 3"]]:
        """Weights of intervals whose ``lengths`` count where the density does, and colours as they are.

        Gradients get fainter near the cameras where that is asked for; ``t_middle`` are distances in units.
        """
        return scaled_weights(
            density,
            rgb,
            lengths,
            t_middle,
            ends=self.is_opaque,
            reach=self._scaling_reach,
            backend=self.backends.compositing,
        )

    def composite(
        self,
        rays: Rays,
        shading: Shading,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        budget: Budget | None,
    ) -> RenderOutput:
        """Put behind each ray's colour what is there; arguments as of :meth:`render`.

        The depth is the geometric mean of the distances, times the opacity: of the arithmetic one the sky
        would have the say wherever it has the slightest weight.
        """
        color, opacity, weights = shading.color, shading.opacity, shading.weights
        if self.exposure is not None:
            color = self.exposure(color, rays.camera_indices, opacity)
        with torch.set_grad_enabled(torch.is_grad_enabled() and progress.learns_from_geometry):
            log_distance = (shading.t_middle * self.unit).log().view(-1, 1)
            geometry = torch.cat([shading.normal, log_distance], dim=1)
            seen = dense_sums(weights, geometry, self.backends.compositing)
            mean = torch.exp(seen[:, 3] / opacity.clamp(min=1e-6))
        num_samples = weights.shape[1]
        is_served = None if budget is None else budget.counts(len(rays))
        total = sum(self._proposed) + num_samples
        return RenderOutput(
            rgb=color + (1.0 - opacity[:, None]) * background_color,
            opacity=opacity,
            depth=opacity * mean,
            normal=seen[:, :3],
            positions=shading.positions,
            weights=weights.flatten(),
            num_marched=total * (len(rays) if budget is None else budget.num_rays),
            is_sample=None if is_served is None else is_served.repeat_interleave(num_samples),
            is_served=is_served,
            histograms=(*shading.proposed, RayHistogram(shading.edges, weights)),
        )

    def frozen_at(self, progress: Progress, extent: float = 1.0) -> DensitySurface:
        """The level set of the density, ready to be asked."""
        del progress
        return DensitySurface(self, self._level, dense_cells(self, 0.1 * self._level, extent), extent)
