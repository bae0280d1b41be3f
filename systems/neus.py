"""NeuS's training rules: which loss terms, how they are weighted, and what anneals when."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models import Model
from process_data.batches import Priors
from systems import losses
from systems.photo_consistency import photo_consistency
from systems.schedules import Schedule, check_schedule, proposal_exponent, value_at
from systems.surface_points import is_in_field, is_on_surface, points_in_ball, points_near_surface
from systems.system import System, SystemConfig, check_weights, given, histogram_terms, pixel_terms
from utils.errors import ConfigError
from utils.types import Batch, Field, Progress, RenderOutput

GEOMETRY_TERMS = frozenset({"depth", "depth_prior", "normal_prior"})
"""Terms that look at rendered depths or normals."""


@dataclass(frozen=True)
class LossConfig:
    """Weight of each term: a number, or a schedule of [fraction, value] pairs; with 0 it is not computed."""

    rgb_l1: Any = 1.0
    rgb_l2: Any = 0.0
    rgb_charbonnier: Any = 0.0
    eikonal: Any = 0.1
    mask: Any = 0.0
    """Binary cross entropy of opacity and mask; needs masks."""
    mask_iou: Any = 0.0
    """1 - intersection over union of opacity and mask; needs masks. Typical: 0.1."""
    free_space: Any = 0.0
    """How deep inside the surface points are that the masks show to be empty; needs masks. Typical: 1."""
    opacity: Any = 0.0
    sparsity: Any = 0.0
    sparse_points: Any = 0.0
    """|sdf| at structure-from-motion points (Geo-NeuS, equation 7); needs these. Typical: 0.1 to 1."""
    depth: Any = 0.0
    """L1 of rendered and given depth, scene units; needs depth maps in the world's unit (of a sensor or
    multi-view stereo). Typical: 0.1 to 1."""
    depth_prior: Any = 0.0
    """Error of depths up to a scale and a shift in each view, as a share of their variance (MonoSDF,
    equations 11 and 12); needs depth maps in any unit, and counts views with at least 8 rays in the batch.
    Typical: 0.1."""
    normal_prior: Any = 0.0
    """L1 and angle between rendered and given normals (MonoSDF, equation 13); needs normal maps. Typical:
    0.05 (theirs)."""
    photo_consistency: Any = 0.0
    """1 - correlation of a photograph's windows with what other views show where the surface's tangent plane
    carries them (Geo-NeuS, section 3.3); needs pinholes, and a surface that is roughly there. Theirs: 0.5;
    0.1 from 40 % of training on neither helped nor harmed (benchmarks/README.md)."""
    eikonal_random: Any = 0.0
    """The eikonal term at random points of the unit ball, where no ray has to pass. Typical: 0.01 to 0.1."""
    eikonal_near: Any = 0.0
    """The eikonal term at random points beside the samples with the largest weights. Typical: 0.01 to 0.1."""
    laplacian: Any = 0.0
    """|Laplacian of the sdf| at the samples, Neuralangelo's curvature loss (equation 10); with numerical
    gradients it costs nothing more. Typical: 5e-4 (theirs), falling as levels open."""
    curvature: Any = 0.0
    """Normal curvature along random tangents at the samples (after PermutoSDF). Typical: 5e-4, falling as
    levels open."""
    smoothness: Any = 0.0
    """Normal curvature along random tangents at points spread evenly over the surface: photographs outweigh
    it where many look, and little else speaks where few do. Typical: 1e-4, from the middle of training on."""
    interlevel: Any = 0.0
    """How much of the background's light its proposals miss (mip-NeRF 360, equation 13), which learn from
    nothing else; needs model.background.sampler=proposal. Typical: 1."""
    distortion: Any = 0.0
    """How far the background's light is spread along a ray (mip-NeRF 360, equation 15); needs the same.
    Typical: 0.002 (nerfacto) to 0.01."""
    ssim: Any = 0.0
    """1 - structural similarity of patches (Wang et al. 2004). 3D Gaussian splatting takes 0.25 of the L1
    weight (Kerbl et al. 2023); with the small batches of a CPU 0.02 did harm (benchmarks/README.md)."""
    lpips: Any = 0.0
    """Perceptual distance of patches (Zhang et al. 2018); needs the package lpips and a patch_size of 32 or
    more. No weight has been measured yet; HumanNeRF (Weng et al. 2022) takes 5 times that of rgb_l2."""

    def __post_init__(self) -> None:
        check_weights(self)


@dataclass(frozen=True)
class NeuSSystemConfig(SystemConfig):
    """Loss terms and annealing of NeuS."""

    name: str = "neus"
    loss: LossConfig = LossConfig()
    sparsity_scale: float = 20.0
    """1 / width of the shell that the sparsity term acts on, 1 / scene units."""
    sparse_max_error: float = 1.5
    """Largest reprojection error of points in the sparse_points term, pixels, where it is known."""
    sparse_points_per_step: int = 512
    """Points drawn for the sparse_points term."""
    free_space_points: int = 256
    """Points that the free_space term looks at, one on each of a batch's last rays."""
    random_points_per_step: int = 1024
    """Points of the eikonal_random term, and most samples that the eikonal_near, laplacian and curvature
    terms look at (the Laplacian of numerical gradients is looked at everywhere)."""
    curvature_step: float = 0.01
    """Distance of the points that the laplacian and curvature terms compare, scene units: about a cell of the
    finest level that matters. Numerical gradients have a step of their own."""
    surface_points_per_step: int = 256
    """Most points of the smoothness term, at least 1; eight times as many are looked at to find them."""
    smoothness_step: float = 0.03
    """Distance of the points whose gradients the smoothness term compares, scene units, 1e-4..0.5: waves that
    are shorter stay."""
    near_std: float = 0.02
    """Standard deviation of the eikonal_near term's points from their samples, per axis, scene units,
    1e-4..0.5."""
    consistency_rays: int = 128
    """So many of a batch's first rays (of patches, if it has any) the photo_consistency term looks at."""
    consistency_patch: int = 11
    """Width of its windows in pixels, odd."""
    cos_anneal_end: float = 0.1
    """Fraction of training after which NeuS's true cosine is used (0 = from the start)."""
    proposal_anneal_end: float = 0.1
    """Fraction of training after which the background's samples are drawn as its proposals say; before, more
    evenly (0 = from the start)."""
    inv_s: Any = None
    """Sharpness of the density, 1 / scene units, prescribed instead of learned: a number, or a schedule of
    [fraction, value] pairs, geometric between them."""
    initial_levels: float = 4.0
    """Hash-grid levels open at the start (coarse to fine)."""
    levels_start: float = 0.0
    """Fraction of training up to which only these are open."""
    levels_end: float = 0.3
    """Fraction of training at which all levels are open."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("cos_anneal_end", "proposal_anneal_end", "levels_start", "levels_end"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"system.{key}: must lie in 0..1, got {getattr(self, key)}")
        if self.inv_s is not None:
            _check_sharpness(self.inv_s)
        if self.levels_start > self.levels_end:
            levels = f"levels_end {self.levels_end}, got {self.levels_start}"
            raise ValueError(f"system.levels_start: must not be above {levels}")
        counts = ("sparse_points_per_step", "free_space_points", "random_points_per_step")
        for key in (*counts, "surface_points_per_step", "consistency_rays"):
            if getattr(self, key) < 1:
                raise ValueError(f"system.{key}: must be at least 1, got {getattr(self, key)}")
        if not self.sparse_max_error > 0:
            raise ValueError(f"system.sparse_max_error: must be above 0, got {self.sparse_max_error}")
        for key in ("curvature_step", "smoothness_step", "near_std"):
            if not 1e-4 <= getattr(self, key) <= 0.5:
                raise ValueError(f"system.{key}: must lie in 1e-4..0.5, got {getattr(self, key)}")
        if not (3 <= self.consistency_patch <= 31 and self.consistency_patch % 2 == 1):
            what = f"must be odd and lie in 3..31, got {self.consistency_patch}"
            raise ValueError(f"system.consistency_patch: {what}")
        if self.initial_levels < 0:
            raise ValueError(f"system.initial_levels: must not be negative, got {self.initial_levels}")


class NeuSSystem(System[NeuSSystemConfig]):
    """Judges a NeuS render: schedules and unweighted loss terms. It holds no state."""

    needs_masks = ("mask", "mask_iou", "free_space")

    def check_training(self, model: Model) -> None:
        """Also: the model has a signed distance.

        Raises:
            ConfigError: it has none.
        """
        if type(model).query_field is Model.query_field:
            what = f"neus judges signed distances, which {type(model).__name__} does not have"
            raise ConfigError("system.name", what, "leave it out: it is model.name then")
        super().check_training(model)

    @property
    def priors(self) -> Priors:
        """What batches have to bring along for the terms that are on at some time."""
        return replace(
            super().priors,
            depth=self.key_of("depth", "depth_prior"),
            normal=self.key_of("normal_prior"),
            points=self.key_of("sparse_points"),
            points_per_batch=self.config.sparse_points_per_step,
            max_error=self.config.sparse_max_error,
            windows=self.key_of("photo_consistency"),
            window_rays=self.config.consistency_rays,
            window_width=self.config.consistency_patch,
        )

    def progress_at(self, fraction: float) -> Progress:
        """Everything that depends on the fraction (0..1) of training done."""
        config = self.config
        anneal = 1.0 if config.cos_anneal_end == 0 else min(fraction / config.cos_anneal_end, 1.0)
        opened = value_at([[config.levels_start, 0.0], [config.levels_end, 1.0]], fraction)
        first = min(config.initial_levels, self.num_levels)
        weights = self.weights_at(fraction)
        levels = first + opened * (self.num_levels - first)
        learns = not GEOMETRY_TERMS.isdisjoint(weights)
        inv_s = None if config.inv_s is None else math.exp(value_at(_logarithms(config.inv_s), fraction))
        proposals = proposal_exponent(fraction, config.proposal_anneal_end)
        return Progress(fraction, anneal, levels, weights, learns, inv_s, proposals)

    def loss_terms(
        self,
        render: RenderOutput,
        batch: Batch,
        progress: Progress,
        field: Field,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The unweighted terms that have a weight now.

        Args:
            render: of the batch's rays.
            batch: with what :attr:`priors` asks for.
            progress: which terms there are.
            field: the surface off the rays, for the terms that look at it there.
            generator: of random points, on the device; only such terms draw from it.
        """
        samples = render.is_sample
        terms: dict[str, Callable[[], Tensor]] = (
            pixel_terms(render, batch)
            | histogram_terms(render)
            | {
                "eikonal": lambda: losses.eikonal(given(render.gradient), samples),
                "free_space": lambda: self._free_space(batch, field, generator),
                "sparsity": lambda: losses.sparsity(given(render.sdf), self.config.sparsity_scale, samples),
                "sparse_points": lambda: losses.sparse_points(field(given(batch.points))[0]),
                "depth": lambda: _depth(render, batch),
                "depth_prior": lambda: _depth_prior(render, batch),
                "normal_prior": lambda: _normal_prior(render, batch),
                "photo_consistency": lambda: photo_consistency(render, batch, given(batch.windows)(), field),
                "eikonal_random": lambda: self._eikonal_random(field, generator),
                "eikonal_near": lambda: self._eikonal_near(render, field, generator),
                "laplacian": lambda: self._laplacian(render, field),
                "curvature": lambda: self._curvature(render, field, generator),
                "smoothness": lambda: self._smoothness(field, generator),
            }
        )
        return {name: terms[name]() for name in progress.loss_weights}

    def _free_space(self, batch: Batch, field: Field, generator: torch.Generator) -> Tensor:
        # The last ones: single rays, where patches lead a batch. That they are rendered is not needed.
        last = slice(-self.config.free_space_points, None)
        rays, mask = batch.rays[last], given(batch.mask)[last]
        share = torch.rand(len(rays), generator=generator, device=generator.device)
        distance = torch.lerp(rays.near, rays.far, share)
        positions = torch.addcmul(rays.origins, rays.directions, distance[:, None])
        is_empty = (mask == 0.0) & (rays.near < rays.far)
        return losses.free_space(field(positions)[0], is_empty)

    def _eikonal_random(self, field: Field, generator: torch.Generator) -> Tensor:
        positions = points_in_ball(self.config.random_points_per_step, generator)
        return losses.eikonal(field(positions)[1])

    def _eikonal_near(self, render: RenderOutput, field: Field, generator: torch.Generator) -> Tensor:
        weights = render.weights.detach()
        if render.is_sample is not None:
            weights = torch.where(render.is_sample, weights, -1.0)
        chosen = weights.topk(min(self.config.random_points_per_step, len(weights))).indices
        positions = render.positions.index_select(0, chosen)
        noise = torch.randn(positions.shape, generator=generator, device=generator.device)
        keep = None if render.is_sample is None else render.is_sample.index_select(0, chosen)
        return losses.eikonal(field(positions + self.config.near_std * noise)[1], keep)

    def _laplacian(self, render: RenderOutput, field: Field) -> Tensor:
        if render.laplacian is not None:
            return losses.laplacian(render.laplacian, render.is_sample)
        # Rays come in random order, and so do the first ones' samples (of patches, where there are any).
        first, step = slice(self.config.random_points_per_step), self.config.curvature_step
        positions = losses.axis_neighbours(render.positions[first], step)
        neighbours = field(positions.flatten(0, 1))[0].view(-1, 6)
        keep = None if render.is_sample is None else render.is_sample[first]
        return losses.laplacian(losses.second_differences(given(render.sdf)[first], neighbours, step), keep)

    def _curvature(self, render: RenderOutput, field: Field, generator: torch.Generator) -> Tensor:
        # Rays come in random order, and so do the first ones' samples (of patches, where there are any).
        first, step = slice(self.config.random_points_per_step), self.config.curvature_step
        gradient, positions = given(render.gradient)[first], render.positions[first]
        keep = None if render.is_sample is None else render.is_sample[first]
        return _curvature_along_noise(field, positions, gradient, step, generator, keep)

    def _smoothness(self, field: Field, generator: torch.Generator) -> Tensor:
        positions, keep = points_near_surface(field, self.config.surface_points_per_step, generator)
        sdf, gradient = field(positions)
        keep = keep & is_on_surface(positions, sdf.detach())
        step = self.config.smoothness_step
        return _curvature_along_noise(field, positions, gradient, step, generator, keep)


def _curvature_along_noise(
    field: Field,
    positions: Float[Tensor, "S 3"],
    gradient: Float[Tensor, "S 3"],
    step: float,
    generator: torch.Generator,
    keep: Bool[Tensor, " S"] | None,
) -> Tensor:
    """Mean absolute normal curvature at positions with this gradient, each along a random tangent."""
    noise = torch.randn(gradient.shape, generator=generator, device=generator.device)
    tangent = losses.tangents(gradient.detach(), noise)
    beside = positions + step * tangent
    _, shifted = field(beside)
    # Where nothing is learned, gradients mean nothing.
    keep = is_in_field(beside) if keep is None else keep & is_in_field(beside)
    return losses.curvature(gradient, shifted, tangent, step, keep)


def _check_sharpness(schedule: Any) -> None:
    check_schedule("system.inv_s", schedule)
    values = [schedule] if isinstance(schedule, (int, float)) else [value for _, value in schedule]
    if min(values) < 1e-3:
        raise ValueError(f"system.inv_s: must be at least 1e-3, got {min(values):g}")


def _logarithms(schedule: Schedule) -> Schedule:
    if isinstance(schedule, (int, float)):
        return math.log(schedule)
    return [(fraction, math.log(value)) for fraction, value in schedule]


# What is rendered against what was measured


def _rendered_depth(render: RenderOutput, batch: Batch) -> Float[Tensor, " R"]:
    """Mean depth along the optical axis, scene units; beside the surface anything finite."""
    return render.mean_depth * given(batch.axis_cosine)


def _depth(render: RenderOutput, batch: Batch) -> Tensor:
    target, rays = given(batch.depth), batch.rays
    # What was measured in front of the unit sphere or behind it is none of the surface.
    distance = target / given(batch.axis_cosine)
    is_inside = (target > 0) & (distance > rays.near) & (distance < rays.far)
    return losses.depth_l1(
        _rendered_depth(render, batch), target, render.shows_surface(batch.mask) & is_inside
    )


def _depth_prior(render: RenderOutput, batch: Batch) -> Tensor:
    target = given(batch.depth)
    keep = render.shows_surface(batch.mask) & (target > 0)
    return losses.depth_prior(_rendered_depth(render, batch), target, batch.rays.camera_indices, keep)


def _normal_prior(render: RenderOutput, batch: Batch) -> Tensor:
    target = given(batch.normal)
    keep = render.shows_surface(batch.mask) & (target.square().sum(dim=1) > 0.5)
    normal = torch.nn.functional.normalize(render.normal, dim=1, eps=1e-6)
    return losses.normal_prior(normal, target, keep)
