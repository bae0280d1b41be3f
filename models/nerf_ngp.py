"""NeRF on a hash grid with occupancy-grid sampling (instant-ngp, Müller et al. 2022).

A pixel is sum_i w_i c_i with alpha_i = 1 - exp(-density_i length_i) (NeRF, Mildenhall et al. 2020,
equation 3). Cells of the occupancy grid are open while they hold any density; before colours are computed,
what lies behind enough density is dropped.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.appearance import AppearanceConfig, per_image_modules
from models.backends import Backends
from models.background import Background, BackgroundConfig
from models.chunks import in_chunks
from models.compositing import accumulate, render_weights
from models.density_field import DensityField, DensityFieldConfig
from models.density_surface import DensitySurface, density_normals
from models.gradient_scaling import check_reach, scale_gradients
from models.marching import march
from models.marching.transmittance import drop_dark
from models.model import Model
from models.occupancy import OccupancyConfig, OccupancyGrid, observable_cells
from utils.errors import ConfigError
from utils.types import Budget, Progress, RayHistogram, Rays, RaySamples, RenderOutput, Scene


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
        if not 1e-3 <= self.surface_density <= 1e5:
            raise ValueError(f"model.surface_density: must lie in 1e-3..1e5, got {self.surface_density}")
        check_reach("model.gradient_scaling", self.gradient_scaling)


class NGP(Model):
    """Density and colour in the unit sphere, occupancy, and a background where there are no masks."""

    def __init__(self, config: NGPConfig, scene: Scene, backends: Backends) -> None:
        super().__init__(backends)
        if config.background.enabled and scene.cameras.ndc is not None:
            raise ConfigError(
                "model.background.enabled",
                "nothing lies behind a scene that dataset.ndc brings in from infinity",
                "set one of the two to false",
            )
        self.config = config
        extra = config.appearance.inputs
        self.density_field = DensityField(config.density_field, 1.0, backends, extra)
        self.background = (
            Background(config.background, backends, extra, config.gradient_scaling)
            if config.background.enabled
            else None
        )
        self.embedding, self.exposure = per_image_modules(config.appearance, scene)
        self.occupancy = OccupancyGrid(config.occupancy, observable_cells(scene, config.occupancy))

    @property
    def device(self) -> torch.device:
        """Where rays and positions have to live."""
        return self.density_field.grid.table.device

    @property
    def num_levels(self) -> int:
        """Levels of the hash grid, all of them open from the start."""
        return self.density_field.grid.num_levels

    def scalars(self, progress: Progress) -> dict[str, float]:
        """For the history: ``occupied``, the share of cells that are sampled."""
        return {"occupied": self.occupancy.share}

    @property
    def num_proposals(self) -> int:
        """Those that place the background's samples."""
        return 0 if self.background is None else self.background.num_proposals

    def stage(self, progress: Progress) -> bool:
        """What in :meth:`render` branches on the progress: a recorded step serves one stage."""
        return self.background is not None and progress.fraction < self.config.background.wait

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their learning rate: ``grid``, ``networks`` and any ``background``."""
        groups: dict[str, list[nn.Parameter]] = {"grid": [], "networks": []}
        if self.background is not None:
            groups["background"] = list(self.background.parameters())
        for name, parameter in self.named_parameters():
            if not name.startswith("background."):
                groups["grid" if name.endswith("grid.table") else "networks"].append(parameter)
        return groups

    def sample(
        self, rays: Rays, generator: torch.Generator | None, budget: Budget | None = None
    ) -> tuple[RaySamples, int | Int64[Tensor, ""]]:
        """March, then drop what is hidden. Returns the samples, and how many were marched."""
        rays = rays.detach()
        if generator is None:
            jitter = torch.full_like(rays.near, 0.5)
        else:
            jitter = torch.rand(len(rays), generator=generator, device=rays.near.device)
        marched, rendered = (None, None) if budget is None else (budget.marched, budget.rendered)
        threshold = self.config.min_transmittance
        samples = march(
            *(rays, self.occupancy.occupied, self.config.step, jitter, self.backends.marching),
            capacity=marched if threshold > 0 else rendered,
        )
        num_marched = len(samples) if budget is None else samples.count
        if threshold > 0 and len(samples) > 0:
            with torch.no_grad():
                count = None if budget is None else samples.count
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
        """March, query, composite: rays in, pixels out.

        Args:
            rays: in scene space.
            progress: of training.
            background_color: behind the unit sphere where no background field is learned, 0..1.
            generator: jitters the samples (training); ``None`` puts them on the unshifted lattice.
            budget: buffers of fixed size, see :class:`utils.types.Budget`.
        """
        if budget is not None:
            rays = budget.limit(rays)
        samples, num_marched = self.sample(rays, generator, budget)
        count = None if budget is None else samples.count
        positions = samples.positions(rays)
        density, features = self.density_field.density(positions, count)
        appearance = None if self.embedding is None else self.embedding(rays.camera_indices)
        rgb = self.density_field.color(features, rays.directions, samples.ray_indices, count, appearance)
        alpha = _alpha(density, samples)
        if self.config.gradient_scaling > 0:
            alpha, rgb = scale_gradients(alpha, rgb, samples.t_middle, self.config.gradient_scaling)
        weights = render_weights(alpha, samples.offsets, self.backends.compositing)
        values = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)
        pixels = accumulate(weights, values, samples.offsets, self.backends.compositing)
        color, opacity = pixels[:, :3], pixels[:, 3]
        if self.exposure is not None:
            color = self.exposure(color, rays.camera_indices, opacity)
        if self.background is None:
            behind = background_color.expand(len(rays), 3)
            histograms: tuple[RayHistogram, ...] = ()
        else:
            num_rays = None if budget is None else budget.num_rays
            backdrop = self.background(rays, generator, num_rays, appearance, progress.proposal_anneal)
            behind, histograms = backdrop.rgb, backdrop.histograms
            if self.exposure is not None:
                behind = self.exposure(behind, rays.camera_indices)
            if self.stage(progress):
                behind = torch.where((rays.far > rays.near)[:, None], behind.detach(), behind)
        with torch.no_grad():
            normal = torch.zeros_like(positions)
            if generator is None:
                normal = density_normals(lambda at: self.density_field.density(at, count)[0], positions)
            geometry = torch.cat([normal, samples.t_middle[:, None]], dim=1)
            seen = accumulate(weights.detach(), geometry, samples.offsets, self.backends.compositing)
        return RenderOutput(
            rgb=color + (1.0 - opacity[:, None]) * behind,
            opacity=opacity,
            depth=seen[:, 3],
            normal=seen[:, :3],
            positions=positions,
            weights=weights,
            num_marched=num_marched,
            is_sample=samples.is_sample,
            is_served=None if budget is None else budget.served(samples.is_served),
            histograms=histograms,
        )

    def update_occupancy(self, progress: Progress, generator: torch.Generator) -> None:
        """Refresh the occupancy grid: a cell holds the opacity of one marching step in it."""

        def presence(positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
            density = in_chunks(self.query_density, positions)
            return -torch.expm1(-density * self.config.step)

        self.occupancy.update(presence, generator, progress.fraction)

    def frozen_at(self, progress: Progress) -> DensitySurface:
        """The level set of the density, ready to be asked."""
        return DensitySurface(self, self.config.surface_density, self.occupancy.occupied)

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units; differentiable."""
        return self.density_field.density(positions)[0]

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen from ``directions`` (unit, pointing away from the viewer)."""
        _, features = self.density_field.density(positions)
        rows = torch.arange(len(positions), device=positions.device)
        appearance = None if self.embedding is None else self.embedding.mean(len(positions))
        return self.density_field.color(features, directions, rows, appearance=appearance)


def _alpha(density: Float[Tensor, " S"], samples: RaySamples) -> Float[Tensor, " S"]:
    return -torch.expm1(-density * (samples.t_ends - samples.t_starts))
