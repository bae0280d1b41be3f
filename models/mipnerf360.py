"""mip-NeRF 360 (Barron et al. 2022): unbounded scenes, rendered from cones instead of lines.

A small network proposes where a ray's light ends, twice; a large one is asked only there. Every sample is a
Gaussian for a stretch of the pixel's cone, by which the networks know what is too fine to be seen. ::

    s = 0 |---|---|---|---|---|---|---| 1    64 intervals, even in s    ─> proposal network ─> weights
          |-----|--|-|||-|--|-----|---|      64 where these are large   ─> proposal network ─> weights
          |--------|---||||-----|-----|      32 where these are large   ─> large network ─> weights, colours

s is even in inverse distance between near and far (equation 11), or in distance for bounded scenes. Space
outside of a ball is contracted into a shell around it (equation 10). Lengths count in units of that ball's
radius (``model.unit``): the authors bring all cameras into it, and so does the default.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.appearance import AppearanceConfig, appearance_of, mean_appearance, per_image_modules
from models.backends import Backends
from models.density_surface import check_surface_density
from models.gaussians import Gaussians, cone_gaussians
from models.gradient_scaling import check_reach
from models.integrated_fields import ColorHead, DensityMLP, EncodingConfig, LayersConfig, Precision
from models.proposal import composite_weights
from models.resampling import anneal, dilate, resample_intervals
from models.spacing import distances_from_s
from models.unbounded import Shading, UnboundedModel
from utils.errors import ConfigError
from utils.types import Budget, Progress, RayHistogram, Rays, RenderOutput, Scene


@dataclass(frozen=True)
class MipProposalConfig(LayersConfig):
    """The network that proposes where samples are needed; one for all proposals."""

    num_samples: tuple[int, ...] = (64, 64)
    """Intervals per ray of each proposal."""

    def __post_init__(self) -> None:
        _check_layers("model.proposal", self)
        if not self.num_samples or min(self.num_samples) < 2:
            given = list(self.num_samples)
            raise ValueError(f"model.proposal.num_samples: must be one or more numbers above 1, got {given}")


@dataclass(frozen=True)
class MipRadianceConfig(LayersConfig):
    """The network that is rendered."""

    hidden_width: int = 128
    hidden_layers: int = 4
    num_samples: int = 32
    """Intervals per ray."""
    bottleneck_width: int = 64
    """Numbers that the colour knows of a sample."""
    view_width: int = 64
    """Units of the layer that brings these and the view direction together."""

    def __post_init__(self) -> None:
        _check_layers("model.radiance", self)
        for key, low in (("num_samples", 2), ("bottleneck_width", 1), ("view_width", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"model.radiance.{key}: must be at least {low}, got {getattr(self, key)}")


@dataclass(frozen=True)
class MipNeRF360Config:
    """mip-NeRF 360; the paper's widths and depths are in ``confs/base/mipnerf360.yaml``, for GPUs."""

    name: str = "mipnerf360"
    backend: str = "auto"
    """Which version of the compositing kernels: auto, cpu, cuda or reference."""
    unit: float = 0.0
    """Length that near, far and the ball of uncontracted space count in, scene units; 0: so long that the
    ball holds all training cameras and the unit sphere."""
    near: float = 0.2
    """Where rays begin, units from the camera, above 0."""
    far: float = 1e6
    """Where they end, units."""
    spacing: Literal["reciprocal", "linear"] = "reciprocal"
    """What is even in s: inverse distance, or distance, for bounded scenes."""
    opaque_background: bool = True
    """Whether every ray ends in its last interval, what is far being part of the scene; false shows the
    background colour there."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    proposal: MipProposalConfig = field(default_factory=MipProposalConfig)
    radiance: MipRadianceConfig = field(default_factory=MipRadianceConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    dilation: float = 0.5
    """By this share of a mean interval's length a proposal is widened before it is sampled."""
    dilation_bias: float = 0.0025
    """And by this much of s, however short intervals are."""
    precision: Precision = "float32"
    """Of the hidden layers' matrix products: bfloat16 is what the authors' TPUs round their factors to."""
    gradient_scaling: float = 0.0
    """Distance from a camera up to which gradients get fainter towards it, units (see
    ``gradient_scaling.py``). 0 leaves them alone."""
    surface_density: float = 5.0
    """Density of the level set that meshes show, 1 / scene units; after long runs, in which surfaces become
    opaque, any higher one shows nearly the same."""

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far:
            raise ValueError(f"model.near: must lie in (0, far = {self.far:g}), got {self.near:g}")
        for key, low, high in (
            ("unit", 0, 1e6),
            ("dilation", 0, 100),
            ("dilation_bias", 0, 1),
        ):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"model.{key}: must lie in {low:g}..{high:g}, got {getattr(self, key):g}")
        check_surface_density(self.surface_density)
        check_reach("model.gradient_scaling", self.gradient_scaling)


def _check_layers(where: str, layers: LayersConfig) -> None:
    for key, high in (("hidden_width", 4096), ("hidden_layers", 16)):
        if not 1 <= getattr(layers, key) <= high:
            raise ValueError(f"{where}.{key}: must lie in 1..{high}, got {getattr(layers, key)}")


class MipNeRF360(UnboundedModel):
    """Proposals and a radiance field on Gaussians, over all of space."""

    def __init__(self, config: MipNeRF360Config, scene: Scene, backends: Backends) -> None:
        super().__init__(config, scene, backends, config.encoding.contracted, config.opaque_background)
        if scene.cameras.ndc is not None:
            what = "mipnerf360 brings infinity in by itself, and its cones have no place in warped space"
            raise ConfigError("dataset.ndc", what, "set it to false")
        self.config = config
        self.pixel_width = _pixel_width(scene)
        precision = config.precision
        self.proposal = DensityMLP(config.encoding, config.proposal, precision)
        self.radiance = DensityMLP(config.encoding, config.radiance, precision)
        self.color = ColorHead(
            self.radiance.feature_width,
            config.radiance.bottleneck_width,
            config.radiance.view_width,
            config.encoding.direction_frequencies,
            config.appearance.inputs,
        )
        # Last, so that the networks start out alike with them and without.
        self.embedding, self.exposure = per_image_modules(config.appearance, scene)

    @property
    def device(self) -> torch.device:
        """Where rays have to live."""
        return self.radiance.directions.device

    @property
    def num_levels(self) -> int:
        """0: there is no hash grid."""
        return 0

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by their learning rate and the norm to which their gradients are clipped together."""
        groups: dict[str, list[nn.Parameter]] = {"networks": [], "proposals": []}
        for name, parameter in self.named_parameters():
            groups["proposals" if name.startswith("proposal.") else "networks"].append(parameter)
        return groups

    def sample(
        self, rays: Rays, progress: Progress, generator: torch.Generator | None
    ) -> tuple[Float[Tensor, "R N_plus_1"], tuple[RayHistogram, ...]]:
        """Ask the proposals where a ray's light ends.

        Returns:
            Edges in s of the intervals to render, without a gradient, and the proposals' histograms, whose
            weights have one.
        """
        config = self.config
        # Proposals say where to look, but not from where: cameras learn from what is seen alone.
        origins, directions = rays.origins.detach(), rays.directions.detach()
        # 0 and 1, made on the device: a copy from the host would wait for it.
        edges = torch.arange(2, dtype=origins.dtype, device=origins.device).expand(len(rays), 2)
        weights = torch.ones_like(edges[:, :1])
        mean_length = 1.0
        histograms: list[RayHistogram] = []
        for count in config.proposal.num_samples:
            edges = self._resample(edges, weights, count, mean_length, progress, generator)
            distances = self._distances(edges)
            density, _ = self.proposal(self._cones(origins, directions, rays.radii, distances))
            lengths = distances.diff(dim=1)
            weights = composite_weights(density, lengths, self.is_opaque, self.backends.compositing)
            histograms.append(RayHistogram(edges, weights))
            mean_length /= count
        edges = self._resample(edges, weights, config.radiance.num_samples, mean_length, progress, generator)
        return edges, tuple(histograms)

    def _resample(
        self,
        edges: Float[Tensor, "R N_plus_1"],
        weights: Float[Tensor, "R N"],
        count: int,
        mean_length: float,
        progress: Progress,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "R count_plus_1"]:
        """Edges of ``count`` intervals where the weights are large; the very first ones are even."""
        if mean_length < 1.0:
            amount = self.config.dilation * mean_length + self.config.dilation_bias
            edges, weights = dilate(edges, weights, amount)
        likely = anneal(edges, weights, progress.proposal_anneal)
        return resample_intervals(edges, likely, count, generator)

    def _distances(self, edges: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """Distances along rays, units, of edges in s."""
        near = torch.full_like(edges[:, 0], self.config.near)
        far = torch.full_like(near, self.config.far)
        return distances_from_s(edges, near, far, self.config.spacing)

    def _cones(
        self,
        origins: Float[Tensor, "R 3"],
        directions: Float[Tensor, "R 3"],
        radii: Float[Tensor, " R"] | None,
        distances: Float[Tensor, "R N_plus_1"],
    ) -> Gaussians:
        """Gaussians in units; rays that do not know how wide they are are lines."""
        radii = torch.zeros_like(distances[:, 0]) if radii is None else radii
        return cone_gaussians(origins / self.unit, directions, radii, distances)

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
            rays: in scene space; where they meet the unit sphere is of no account.
            progress: how far the proposals' annealing is.
            background_color: behind rays that end nowhere, 0..1.
            generator: jitters the samples (training); ``None`` takes the middles, and computes normals.
            budget: every ray is rendered whatever it says; those behind its ``num_rays`` do not count.
        """
        edges, proposed = self.sample(rays, progress, generator)
        distances = self._distances(edges)
        cones = self._cones(rays.origins, rays.directions, rays.radii, distances)
        if generator is None:
            density, features, slope = self._with_slope(cones)
            normal = -nn.functional.normalize(slope, dim=1, eps=1e-12)
        else:
            density, features = self.radiance(cones)
            normal = torch.zeros_like(cones.means)
        rgb = self.color(features, rays.directions, appearance_of(self.embedding, rays.camera_indices))
        t_middle = 0.5 * (distances[:, 1:] + distances[:, :-1])
        weights, rgb = self.weigh(density, rgb, distances.diff(dim=1), t_middle)
        opacity = weights.sum(dim=1)
        color = (weights[..., None] * rgb.view(*weights.shape, 3)).sum(dim=1)
        shading = Shading(
            *(proposed, edges, t_middle, cones.means.detach() * self.unit, normal),
            *(weights, color, opacity),
        )
        return self.composite(rays, shading, progress, background_color, budget)

    def _with_slope(
        self, cones: Gaussians
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, "S F"], Float[Tensor, "S 3"]]:
        """Density, features, and d density / d mean, outside of autograd."""
        with torch.enable_grad():
            means = cones.means.detach().requires_grad_()
            density, features = self.radiance(Gaussians(means, cones.roots))
            (slope,) = torch.autograd.grad(density.sum(), means)
        return density.detach(), features.detach(), slope

    def query_density(self, positions: Float[Tensor, "P 3"]) -> Float[Tensor, " P"]:
        """Density, 1 / scene units, averaged over the width of a pixel; differentiable."""
        return self.radiance(self._cubes(positions))[0] / self.unit

    def query_color(
        self, positions: Float[Tensor, "P 3"], directions: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "P 3"]:
        """Colour 0..1 seen along unit directions, that of no particular photograph; differentiable."""
        _, features = self.radiance(self._cubes(positions))
        appearance = mean_appearance(self.embedding, len(positions))
        return self.color(features, directions, appearance).clamp(0.0, 1.0)

    def _cubes(self, positions: Float[Tensor, "P 3"]) -> Gaussians:
        # Of points the finest octaves speak, too, which the cones of training have mostly averaged out.
        return Gaussians.cubes(positions / self.unit, self.pixel_width / self.unit)


def _pixel_width(scene: Scene) -> float:
    """Width of a typical pixel of the training views at the scene's origin, scene units."""
    views = list(scene.train_indices)
    focal = scene.cameras.intrinsics[views][:, [0, 1], [0, 1]].mean(dim=1)
    return float((scene.cameras.c2w[views, :, 3].norm(dim=1) / focal).median())
