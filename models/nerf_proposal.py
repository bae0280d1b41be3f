"""NeRF on a hash grid whose samples proposals place, for scenes without bounds (nerfacto's recipe).

    ray ─> proposals (small density fields) ─> N intervals ─> density and colour ─> w_i ─> pixel

All of space is contracted into radius 2 (``contraction.py``), so that one field holds what the cameras look
at and all that lies behind it; every ray ends in its last interval, and there is no background but the scene
itself. Lengths count in units of the radius within which nothing is contracted (``model.unit``). Without
contraction rays run through the unit sphere, and the background colour is behind it.

Each ray has the same number of samples: unlike occupancy sampling (``nerf_ngp.py``), which skips what is
empty, this costs the same wherever a ray leads, and knows no box that something could lie outside of.

Near cameras few views overlap, and fog before a lens explains its picture: ``near`` keeps a distance, and
``gradient_scaling`` slows down what is learned there.

Source: mip-NeRF 360 (Barron et al. 2022), section 3, for proposals, contraction and losses; nerfacto (Tancik
et al. 2023) for hash grids in these places.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.appearance import AppearanceConfig, appearance_of, mean_appearance, per_image_modules
from models.backends import Backends
from models.contraction import CONTRACTED_RADIUS, ContractionNorm, contract
from models.density_field import DensityField, DensityFieldConfig
from models.density_surface import check_surface_density, density_normals
from models.gradient_scaling import check_reach
from models.proposal import ProposalConfig, ProposalSampler, dense_sums
from models.spacing import Spacing
from models.unbounded import Shading, UnboundedModel
from utils.errors import ConfigError
from utils.types import Budget, Progress, Rays, RenderOutput, Scene


@dataclass(frozen=True)
class ProposalNeRFConfig:
    """NeRF on a hash grid, sampled by proposals."""

    name: str = "nerf-proposal"
    backend: str = "auto"
    """Which version of the kernels; see model.backend of NeuS: auto, cpu, cuda, reference, or libraries."""
    density_field: DensityFieldConfig = field(default_factory=DensityFieldConfig)
    proposal: ProposalConfig = field(default_factory=ProposalConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    num_samples: int = 24
    """Samples per ray that are given a colour."""
    contraction: Literal["none", "l2", "linf"] = "linf"
    """Of space beyond the unit radius: into a ball, or into a cube, of radius 2; none: only what lies in the
    unit sphere is seen, for captures with masks."""
    unit: float = 0.0
    """Radius within which nothing is contracted, scene units, and what near and far count in. At least 1; 0:
    so long that a ball of it holds all training cameras. Without contraction it is 1."""
    near: float = 0.05
    """Where rays begin, units from the camera, above 0: floaters need room before the lens."""
    far: float = 1e3
    """Where they end, units."""
    spacing: Spacing = "piecewise"
    """What the first proposal's intervals are even in: distance up to one unit and its inverse beyond, or one
    of the two all along."""
    gradient_scaling: float = 0.0
    """Distance from a camera up to which gradients get fainter towards it, units (see
    ``gradient_scaling.py``). 0 leaves them alone."""
    surface_density: float = 10.0
    """Density of the level set that meshes show, 1 / scene units."""

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise ValueError(f"model.num_samples: must be at least 2, got {self.num_samples}")
        if self.unit != 0 and not 1 <= self.unit <= 1e6:
            raise ValueError(f"model.unit: must be 0 or lie in 1..1e6, got {self.unit:g}")
        if not 0 < self.near < self.far:
            raise ValueError(f"model.near: must lie in (0, far = {self.far:g}), got {self.near:g}")
        check_surface_density(self.surface_density)
        check_reach("model.gradient_scaling", self.gradient_scaling)


class ProposalNeRF(UnboundedModel):
    """Density and colour over all of space, and the proposals that place samples."""

    def __init__(self, config: ProposalNeRFConfig, scene: Scene, backends: Backends) -> None:
        norm: ContractionNorm | None = None if config.contraction == "none" else config.contraction
        super().__init__(config, scene, backends, is_contracted=norm is not None, is_opaque=norm is not None)
        self.config, self.norm = config, norm
        if norm is not None and scene.cameras.ndc is not None:
            raise ConfigError(
                "model.contraction",
                "nothing lies beyond a scene that dataset.ndc brings in from infinity",
                "set it to none, or dataset.ndc to false",
            )
        if norm is None:
            self.unit = 1.0
        bound = 1.0 if norm is None else CONTRACTED_RADIUS
        self.density_field = DensityField(config.density_field, bound, backends, config.appearance.inputs)
        self.embedding, self.exposure = per_image_modules(config.appearance, scene)
        self.sampler = ProposalSampler(
            *(config.proposal, config.num_samples),
            spacing=config.spacing,
            contraction=norm,
            bound=bound,
            ends=self.is_opaque,
            backends=backends,
        )

    @property
    def device(self) -> torch.device:
        """Where rays and positions have to live."""
        return self.density_field.grid.table.device

    @property
    def num_levels(self) -> int:
        """Levels of the field's hash grid, all of them open from the start."""
        return self.density_field.grid.num_levels

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their learning rate, the proposals' among the field's: ``grid`` and ``networks``."""
        groups: dict[str, list[nn.Parameter]] = {"grid": [], "networks": []}
        for name, parameter in self.named_parameters():
            groups["grid" if name.endswith("grid.table") else "networks"].append(parameter)
        return groups

    def _stretch(self, rays: Rays) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
        """Where each ray begins and ends, units."""
        near, far = torch.full_like(rays.near, self.config.near), torch.full_like(rays.far, self.config.far)
        if self.norm is None:
            near, far = torch.maximum(rays.near, near), torch.minimum(rays.far, far)
        return near, far

    def render(
        self,
        rays: Rays,
        progress: Progress,
        background_color: Float[Tensor, "3"],
        generator: torch.Generator | None = None,
        budget: Budget | None = None,
    ) -> RenderOutput:
        """Propose, query, composite: rays in, pixels out.

        Args:
            rays: in scene space; with contraction, where they meet the unit sphere is of no account.
            progress: how far the proposals' annealing is.
            background_color: behind the unit sphere where space is not contracted, 0..1.
            generator: jitters the samples (training); ``None`` takes the middles, and computes normals.
            budget: every ray has all its samples; those from its ``num_rays`` on do not count.
        """
        num_rays = None if budget is None else budget.num_rays
        count = None if num_rays is None else num_rays * self.config.num_samples
        if budget is not None:
            rays = budget.limit(rays)
        scaled = replace(rays, origins=rays.origins / self.unit)
        near, far = self._stretch(scaled)
        intervals, proposed = self.sampler(scaled, near, far, progress.proposal_anneal, generator, num_rays)
        density, features = self.density_field.density(intervals.positions, count)
        indices = torch.arange(len(rays), device=near.device).repeat_interleave(self.config.num_samples)
        appearance = appearance_of(self.embedding, rays.camera_indices)
        rgb = self.density_field.color(features, rays.directions, indices, count, appearance)
        lengths = intervals.lengths
        if self.norm is None:
            # A ray that misses the unit sphere sees nothing.
            lengths = torch.where((far > near)[:, None], lengths, 0.0)
        t_middle = intervals.t_middle
        weights, rgb = self.weigh(density, rgb, lengths, t_middle)
        values = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)
        pixels = dense_sums(weights, values, self.backends.compositing)
        distances = (t_middle * self.unit)[..., None]
        positions = (rays.origins[:, None] + distances * rays.directions[:, None]).flatten(0, 1)
        normal = torch.zeros_like(positions)
        if generator is None:
            normal = density_normals(self.query_density, positions)
        shading = Shading(
            *(proposed, intervals.s, t_middle, positions, normal),
            *(weights, pixels[:, :3], pixels[:, 3]),
        )
        return self.composite(rays, shading, progress, background_color, budget)

    def _contracted(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        positions = positions / self.unit
        return positions if self.norm is None else contract(positions, self.norm)

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density; within the unit radius per scene unit, beyond per contracted one. Differentiable."""
        return self.density_field.density(self._contracted(positions))[0] / self.unit

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen from ``directions`` (unit, pointing away from the viewer)."""
        appearance = mean_appearance(self.embedding, len(positions))
        return self.density_field.color_at(self._contracted(positions), directions, appearance)
