"""NeuS (Wang et al. 2021) on a hash grid: a signed distance field rendered as a volume.

A pixel is sum_i w_i c_i with w_i from alphas that come from signed distances, by NeuS's law or by VolSDF's
(see ``opacity.py``). Sampling follows an occupancy grid; before gradients and colours are computed, what lies
behind the first surface is dropped, or all samples are placed anew where the light ends.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.appearance import AppearanceConfig, appearance_of, mean_appearance
from models.backends import Backends
from models.background import BackgroundConfig
from models.bounded import BoundedModel, Shading, jitter_of
from models.chunks import in_chunks
from models.fields import RadianceConfig, RadianceField, SDFConfig, SDFField
from models.gradient_scaling import check_reach
from models.marching import drop_hidden
from models.marching.importance import place_by_importance
from models.model import SurfaceModel
from models.occupancy import OccupancyConfig
from models.opacity import DENSITIES, MIN_BETA, DensityName
from models.reflection import ReflectiveRadiance
from utils.types import Budget, Progress, Rays, RaySamples, RenderOutput, Scene


@dataclass(frozen=True)
class NeuSConfig:
    """NeuS with a hash grid."""

    name: str = "neus"
    backend: str = "auto"
    """Which version of the kernels: auto takes the fastest that runs here; cpu (Numba), cuda (Triton) and
    reference (plain PyTorch) are ours; nerfacc, tinycudann or nerfacc+tinycudann serve what they have, where
    they are installed, and auto the rest."""
    sdf: SDFConfig = field(default_factory=SDFConfig)
    radiance: RadianceConfig = field(default_factory=RadianceConfig)
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    density: DensityName = "neus"
    """How opacity follows from signed distance: by NeuS's law or by VolSDF's."""
    initial_inv_s: float = 20.0
    """Sharpness of NeuS's logistic density at the start: its width is about 1.8 / inv_s scene units."""
    initial_beta: float = 0.01
    """Scale of VolSDF's Laplace density at the start, scene units. VolSDF's own 0.1 is for runs of hours: in
    short ones the shape settles in the haze, and beta stays."""
    min_step: float = 0.0034
    """Shortest marching step, scene units (instant-nsr-pl: 2 sqrt(3) / 1024)."""
    max_step: float = 0.0136
    """Longest marching step; the step is ``step_per_width / inv_s`` between these two."""
    step_per_width: float = 1.0
    """Marching step in units of 1 / inv_s or of beta: a wide density needs no fine steps."""
    min_transmittance: float = 1e-3
    """Samples that less than this share of a ray's light reaches are dropped; 0 keeps all."""
    importance: int = 0
    """Samples per ray, placed where a march of ``max_step`` finds its light to end (NeuS's up-sampling, see
    ``marching/importance.py``); 0 renders the samples that are marched."""
    gradient_scaling: float = 0.0
    """Distance from a camera up to which gradients get fainter towards it, scene units, against floaters
    before the lens (see ``gradient_scaling.py``): where the views begin to overlap. 0 leaves them alone."""

    def __post_init__(self) -> None:
        if not 0 < self.min_step <= self.max_step:
            raise ValueError(
                f"model.min_step: must lie in (0, max_step = {self.max_step}], got {self.min_step}"
            )
        if not 1e-3 <= self.initial_inv_s <= 1e5:
            raise ValueError(f"model.initial_inv_s: must lie in 1e-3..1e5, got {self.initial_inv_s}")
        if not MIN_BETA < self.initial_beta <= 10:
            raise ValueError(f"model.initial_beta: must lie in ({MIN_BETA}, 10], got {self.initial_beta}")
        if not 0 <= self.min_transmittance < 1:
            raise ValueError(f"model.min_transmittance: must lie in [0, 1), got {self.min_transmittance}")
        if not 0 <= self.importance <= 1024:
            raise ValueError(f"model.importance: must lie in 0..1024, got {self.importance}")
        check_reach("model.gradient_scaling", self.gradient_scaling)


class NeuS(BoundedModel):
    """Signed distance, radiance, sharpness, occupancy, and a background where there are no masks."""

    def __init__(self, config: NeuSConfig, scene: Scene, backends: Backends) -> None:
        super().__init__(backends)
        self.config = config
        self.sdf_field = SDFField(config.sdf, backends)
        head = ReflectiveRadiance if config.radiance.head == "reflection" else RadianceField
        outputs, extra = self.sdf_field.output_width, config.appearance.inputs
        self.radiance = head(config.radiance, outputs, backends, extra)
        self.density = DENSITIES[config.density]
        sharpness = (
            config.initial_inv_s if config.density == "neus" else 1.0 / (config.initial_beta - MIN_BETA)
        )
        # inv_s = exp(10 v) as in NeuS: Adam's steps on v change the sharpness by a factor, whatever its size.
        self.variance = nn.Parameter(torch.tensor(sharpness).log() / 10.0)
        self.surround(config, scene)

    @property
    def device(self) -> torch.device:
        """Where rays and positions have to live."""
        return self.variance.device

    @property
    def num_levels(self) -> int:
        """Levels of the surface's hash grid, which open one after another."""
        return self.sdf_field.grid.num_levels

    def inv_s(self, progress: Progress) -> Float[Tensor, ""]:
        """Sharpness: 1 / beta of VolSDF's density, or NeuS's, of standard deviation pi / (sqrt(3) inv_s).

        Learned, unless the progress prescribes it.
        """
        if progress.inv_s is None:
            return self.density.sharpness(10.0 * self.variance)
        if isinstance(progress.inv_s, Tensor):
            return progress.inv_s
        # Filled on the device: a copy from the host would wait for it.
        return torch.full((), progress.inv_s, device=self.variance.device)

    def scalars(self, progress: Progress) -> dict[str, float]:
        """For the history: ``inv_s``, with VolSDF's density ``beta`` = 1 / inv_s, and ``occupied``."""
        inv_s = float(self.inv_s(progress).detach())
        sharpness = {"inv_s": inv_s} | ({"beta": 1.0 / inv_s} if self.config.density == "volsdf" else {})
        return sharpness | super().scalars(progress)

    def step_size(self, progress: Progress) -> Float[Tensor, ""]:
        """Marching step for the present sharpness, scene units; a tensor, so that no host waits for it.

        With importance sampling it is the longest one: others refine it.
        """
        config = self.config
        shortest = config.max_step if config.importance > 0 else config.min_step
        step = (config.step_per_width / self.inv_s(progress).detach()).clamp(shortest, config.max_step)
        # NaN becomes the shortest step, so that the trainer gets to see the bad step.
        return torch.nan_to_num(step, nan=shortest)

    def sample(
        self,
        rays: Rays,
        progress: Progress,
        generator: torch.Generator | None,
        budget: Budget | None = None,
    ) -> tuple[RaySamples, int | Int64[Tensor, ""]]:
        """March, then drop what is hidden, or sample by importance.

        Returns the samples, and how many were marched.
        """
        rays, step, jitter = rays.detach(), self.step_size(progress), jitter_of(rays, generator)
        by_importance, threshold = self.config.importance, self.config.min_transmittance
        looks_ahead = by_importance > 0 or threshold > 0
        samples, num_marched = self.march(rays, step, jitter, budget, looks_ahead)
        if looks_ahead and len(samples) > 0:
            count, rendered = (None, None) if budget is None else (samples.count, budget.rendered)
            sdf = self.query_sdf(samples.positions(rays), progress, count)
            inv_s = self.inv_s(progress).detach()
            if by_importance > 0:
                samples = place_by_importance(
                    *(samples, sdf, inv_s, jitter, by_importance),
                    *(self.config.density, self.backends.compositing),
                    capacity=rendered,
                )
            else:
                samples = drop_hidden(
                    *(samples, sdf, inv_s, step, threshold, self.config.density, self.backends.marching),
                    capacity=rendered,
                )
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
        samples, num_marched = self.sample(rays, progress, generator, budget)
        count = None if budget is None else samples.count
        positions, directions = samples.positions(rays), samples.directions(rays)
        outputs, gradient, laplacian = self.sdf_field.with_laplacian(positions, progress.active_levels, count)
        normal = torch.nn.functional.normalize(gradient, dim=1, eps=1e-6)
        appearance = appearance_of(self.embedding, rays.camera_indices)
        rgb = self.radiance(outputs, rays.directions, samples.ray_indices, normal, count, appearance)
        sdf = outputs[:, 0]
        cosine = (directions * normal).sum(dim=1)
        lengths = samples.t_ends - samples.t_starts
        alpha = self.density.alpha(sdf, cosine, lengths, self.inv_s(progress), progress.cos_anneal)
        shading = Shading(samples, num_marched, positions, alpha, rgb, normal, appearance)
        render = self.composite(rays, shading, progress, background_color, generator, budget)
        return replace(render, sdf=sdf, gradient=gradient, laplacian=laplacian)

    def update_occupancy(self, progress: Progress, generator: torch.Generator) -> None:
        """Refresh the occupancy grid from the present field.

        A point's presence is the logistic or Laplace density relative to its peak: scale-free, and empty deep
        inside the object as well, which no ray reaches. It is taken at the distance less half a cell's
        diagonal: the density may be far thinner than a cell, and one random point must not overlook it (cells
        closed by mistake tear holes).
        """
        half_diagonal = 3**0.5 / self.config.occupancy.resolution

        def presence(positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
            distance = (self.query_sdf(positions, progress).abs() - half_diagonal).clamp(min=0.0)
            return self.density.presence(distance, self.inv_s(progress).detach())

        self.occupancy.update(presence, generator, progress.fraction)

    def frozen_at(self, progress: Progress, extent: float = 1.0) -> SurfaceModel:
        """The surface as it is at this progress, ready to be asked without naming it again."""
        return self.surrounded(FrozenSurface(self, progress), extent)

    def query_sdf(
        self,
        positions: Float[Tensor, "P 3"],
        progress: Progress,
        count: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, " P"]:
        """Signed distance at any number of positions, outside of autograd.

        With a ``count`` on the device, only that many of the positions are real; the rest give zeros.
        """
        if count is not None:
            return self.sdf_field.sdf(positions, progress.active_levels, count)
        return in_chunks(lambda chunk: self.sdf_field.sdf(chunk, progress.active_levels), positions)

    def query_field(
        self, positions: Float[Tensor, "P 3"], progress: Progress
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, "P 3"]]:
        """Signed distance and gradient, differentiable in the parameters: for losses off the rays."""
        outputs, gradient = self.sdf_field(positions, progress.active_levels)
        return outputs[:, 0], gradient

    @torch.no_grad()
    def query_gradient(self, positions: Float[Tensor, "P 3"], progress: Progress) -> Float[Tensor, "P 3"]:
        """d sdf / d position (not normalised), outside of autograd."""
        return in_chunks(lambda chunk: self.sdf_field(chunk, progress.active_levels)[1], positions)

    @torch.no_grad()
    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"], progress: Progress
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen from ``directions`` (unit, pointing away from the viewer), outside of autograd.

        It is that of no particular photograph (see ``models/appearance.py``).
        """

        def colors(chunk: Tensor) -> Tensor:
            at, towards = chunk[:, :3].contiguous(), chunk[:, 3:]
            outputs, gradient = self.sdf_field(at, progress.active_levels)
            normal = torch.nn.functional.normalize(gradient, dim=1, eps=1e-6)
            appearance = mean_appearance(self.embedding, len(at))
            rows = torch.arange(len(at), device=at.device)
            return self.radiance(outputs, towards, rows, normal, appearance=appearance)

        return in_chunks(colors, torch.cat([positions, directions], dim=1))


@dataclass(frozen=True)
class FrozenSurface:
    """A model at one moment of its annealing, for whoever asks about the surface: export, previews, tests."""

    model: NeuS
    progress: Progress

    @property
    def device(self) -> torch.device:
        """Where positions have to live."""
        return self.model.device

    def query_sdf(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Signed distance, positive outside."""
        return self.model.query_sdf(positions, self.progress)

    def query_gradient(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """Gradient of the signed distance, not normalised."""
        return self.model.query_gradient(positions, self.progress)

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions that point away from the viewer."""
        return self.model.query_color(positions, directions, self.progress)
