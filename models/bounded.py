"""Methods whose field lives in the unit sphere: what surrounds it, and how a ray becomes a pixel.

camera ---- near [ samples where the occupancy grid is open ] far ---- background field, or a plain colour
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.appearance import Exposure, ImageEmbedding, per_image_modules
from models.background import Background
from models.compositing import accumulate, render_weights
from models.contraction import camera_radius
from models.gradient_scaling import scale_gradients
from models.marching import march
from models.model import Model, SurfaceModel
from models.occupancy import OccupancyGrid, observable_cells
from models.surroundings import SurroundedSurface
from utils.errors import ConfigError
from utils.types import Budget, Progress, RayHistogram, Rays, RaySamples, RenderOutput, Scene

_HIDDEN = 1e-3
"""Share of a ray's light below which nothing is asked of the background: a quarter of an 8-bit step."""


@dataclass(frozen=True)
class Shading:
    """What a field says at S samples on R rays."""

    samples: RaySamples
    num_marched: int | Int64[Tensor, ""]
    """Samples before those that nothing can see were dropped."""
    positions: Float[Tensor, "S 3"]
    alpha: Float[Tensor, " S"]
    rgb: Float[Tensor, "S 3"]
    normal: Float[Tensor, "S 3"]
    """Unit, or zeros where nobody asks for it."""
    appearance: Float[Tensor, "R A"] | None
    """Of the rays' images, for the background."""


class BoundedModel(Model):
    """A field in the unit sphere with an occupancy grid, perhaps a background, perhaps light per image.

    A subclass makes its field first and calls :meth:`surround` last, so that parameters are drawn in an order
    that does not depend on what surrounds them.
    """

    background: Background | None
    occupancy: OccupancyGrid
    embedding: ImageEmbedding | None
    exposure: Exposure | None

    def surround(self, config: Any, scene: Scene) -> None:
        """Make everything around the field.

        Args:
            config: has sections ``background``, ``occupancy`` and ``appearance``, and ``gradient_scaling``.
            scene: says what can be seen, and which images are trained on.

        Raises:
            ConfigError: a background behind a scene that is warped (``dataset.ndc``).
        """
        if config.background.enabled and scene.cameras.ndc is not None:
            raise ConfigError(
                "model.background.enabled",
                "nothing lies behind a scene that dataset.ndc brings in from infinity",
                "set one of the two to false",
            )
        self.background = None
        if config.background.enabled:
            width, reach = config.appearance.inputs, config.gradient_scaling
            unit = camera_radius(scene)
            self.background = Background(config.background, unit, self.backends, width, reach)
            self.reach = math.inf
        self.occupancy = OccupancyGrid(config.occupancy, observable_cells(scene, config.occupancy))
        self.embedding, self.exposure = per_image_modules(config.appearance, scene)
        self._wait, self._reach = config.background.wait, config.gradient_scaling
        self._surface_density = config.background.surface_density

    def surrounded(self, surface: SurfaceModel, extent: float) -> SurfaceModel:
        """The surface of the field, and, where ``extent`` reaches beyond the sphere, of the background."""
        if extent == 1.0 or self.background is None:
            return surface
        return SurroundedSurface(surface, self.background, self.embedding, self._surface_density, extent)

    @property
    def num_proposals(self) -> int:
        """Those that place the background's samples."""
        return 0 if self.background is None else self.background.num_proposals

    def stage(self, progress: Progress) -> bool:
        """Whether the background waits: what rays through the unit sphere show then teaches it nothing."""
        return self.background is not None and progress.fraction < self._wait

    def scalars(self, progress: Progress) -> dict[str, float]:
        """For the history: ``occupied``, the share of cells that are sampled."""
        del progress
        return {"occupied": self.occupancy.share}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their learning rate: ``grid``, ``networks``, perhaps ``variance``, ``background``."""
        groups: dict[str, list[nn.Parameter]] = {"grid": [], "networks": []}
        for name, parameter in self.named_parameters():
            if name == "variance" or name.startswith("background."):
                groups.setdefault(name.partition(".")[0], []).append(parameter)
            else:
                groups["grid" if name.endswith("grid.table") else "networks"].append(parameter)
        return groups

    def march(
        self,
        rays: Rays,
        step: float | Float[Tensor, ""],
        jitter: Float[Tensor, " R"],
        budget: Budget | None,
        looks_ahead: bool,
    ) -> tuple[RaySamples, int | Int64[Tensor, ""]]:
        """:func:`models.marching.march` where the occupancy grid is open: samples, and how many they are.

        A budget has more room for them where the model ``looks_ahead``: not all are rendered then.
        """
        capacity = None if budget is None else budget.marched if looks_ahead else budget.rendered
        occupied, backend = self.occupancy.occupied, self.backends.marching
        samples = march(rays, occupied, step, jitter, backend, capacity)
        return samples, len(samples) if budget is None else samples.count

    def composite(
        self,
        rays: Rays,
        shading: Shading,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None,
        budget: Budget | None,
    ) -> RenderOutput:
        """Sum the samples of each ray and put behind them what is there; arguments as of :meth:`render`."""
        samples, alpha, rgb, backend = shading.samples, shading.alpha, shading.rgb, self.backends.compositing
        if self._reach > 0:
            alpha, rgb = scale_gradients(alpha, rgb, samples.t_middle, self._reach)
        weights = render_weights(alpha, samples.offsets, backend)
        values = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)
        pixels = accumulate(weights, values, samples.offsets, backend)
        color, opacity = pixels[:, :3], pixels[:, 3]
        if self.exposure is not None:
            color = self.exposure(color, rays.camera_indices, opacity)
        if self.background is None:
            behind = background_color.expand(len(rays), 3)
            histograms: tuple[RayHistogram, ...] = ()
        else:
            behind, histograms = self._behind(rays, opacity, shading, progress, generator, budget)
            if self.exposure is not None:
                behind = self.exposure(behind, rays.camera_indices)
            if self.stage(progress):
                behind = torch.where((rays.far > rays.near)[:, None], behind.detach(), behind)
        with torch.set_grad_enabled(torch.is_grad_enabled() and progress.learns_from_geometry):
            geometry = torch.cat([shading.normal, samples.t_middle[:, None]], dim=1)
            seen = accumulate(weights, geometry, samples.offsets, backend)
        return RenderOutput(
            rgb=color + (1.0 - opacity[:, None]) * behind,
            opacity=opacity,
            depth=seen[:, 3],
            normal=seen[:, :3],
            positions=shading.positions,
            weights=weights,
            num_marched=shading.num_marched,
            is_sample=samples.is_sample,
            is_served=None if budget is None else budget.served(samples.is_served),
            histograms=histograms,
        )

    def _behind(
        self,
        rays: Rays,
        opacity: Float[Tensor, " R"],
        shading: Shading,
        progress: Progress,
        generator: torch.Generator | None,
        budget: Budget | None,
    ) -> tuple[Float[Tensor, "R 3"], tuple[RayHistogram, ...]]:
        """What the background shows, and how its light is spread, of the rays that reach it."""
        assert self.background is not None
        anneal = progress.proposal_anneal
        if budget is not None:
            seen = self.background(rays, generator, budget.num_rays, shading.appearance, anneal)
            return seen.rgb, seen.histograms
        # With buffers that fit, what nobody sees costs nothing: black stands for it.
        reaches = (opacity.detach() < 1.0 - _HIDDEN).nonzero().squeeze(1)
        appearance = None if shading.appearance is None else shading.appearance[reaches]
        seen = self.background(rays[reaches], generator, None, appearance, anneal)
        rgb = torch.zeros_like(rays.origins).index_put((reaches,), seen.rgb)
        return rgb, seen.histograms


def jitter_of(rays: Rays, generator: torch.Generator | None) -> Float[Tensor, " R"]:
    """Shift of each ray's lattice in training; without a generator there is none, 0.5."""
    if generator is None:
        return torch.full_like(rays.near, 0.5)
    return torch.rand(len(rays), generator=generator, device=rays.near.device)
