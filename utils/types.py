"""Everything that crosses rooms; of the capture itself, in ``utils/scene.py``.

Shape letters used throughout the project:
    R rays · S packed samples (on rays) · P points · N images · H W pixels · L levels · C channels ·
    V vertices · F faces

Frames and conventions:
    *world*   the capture's own frame (DTU's millimetres, COLMAP's units).
    *scene*   the training frame: the object of interest sits inside the unit sphere at the origin.
              ``world_from_scene`` (a similarity) leads back, and every export goes through it.
    *camera*  OpenCV axes: x right, y down, z forward. ``c2w`` maps camera to scene.
    *pixels*  continuous image coordinates: the top-left pixel covers [0, 1) x [0, 1), its centre is
              (0.5, 0.5).

The dataclasses are frozen and check their shapes when built (below a microsecond); under pytest every
annotation is checked as well (jaxtyping + beartype). Absent is ``None``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from utils.photographs import Windows
from utils.scene import Cameras, ImageStack, Lens, Scene, SparsePoints, TriangleMesh

__all__ = [
    "Batch",
    "Budget",
    "Cameras",
    "Field",
    "ImageStack",
    "Lens",
    "Progress",
    "RayHistogram",
    "RaySamples",
    "Rays",
    "RenderOutput",
    "Scene",
    "SparsePoints",
    "TriangleMesh",
    "Windows",
]

Field = Callable[[Float[Tensor, "P 3"]], tuple[Float[Tensor, " P"], Float[Tensor, "P 3"]]]
"""Positions in scene space to signed distance and gradient, differentiable in the model's parameters."""


@dataclass(frozen=True)
class Rays:
    """R rays in scene space; ``near > far`` marks a ray that misses the unit sphere."""

    origins: Float[Tensor, "R 3"]
    directions: Float[Tensor, "R 3"]
    """Unit length."""
    near: Float[Tensor, " R"]
    far: Float[Tensor, " R"]
    """Where the ray enters and leaves the unit sphere (near >= 0)."""
    camera_indices: Int64[Tensor, " R"]
    """The capture's view that each ray belongs to, 0..N-1, for what is learned per image; -1: to none,
    as in a video."""
    radii: Float[Tensor, " R"] | None = None
    """Of the cone that stands for the ray's pixel, at distance 1 (mip-NeRF); ``None`` where none is known."""

    def __post_init__(self) -> None:
        r = self.origins.shape[0]
        assert self.origins.shape == (r, 3) and self.directions.shape == (r, 3)
        assert self.near.shape == (r,) and self.far.shape == (r,) and self.camera_indices.shape == (r,)
        assert self.radii is None or self.radii.shape == (r,)

    def __len__(self) -> int:
        return self.origins.shape[0]

    def detach(self) -> "Rays":
        """The same rays as constants; those of cameras that are refined have gradients."""
        return replace(self, origins=self.origins.detach(), directions=self.directions.detach())

    def to(self, device: torch.device | str) -> "Rays":
        """The same rays on another device."""
        return Rays(
            self.origins.to(device),
            self.directions.to(device),
            self.near.to(device),
            self.far.to(device),
            self.camera_indices.to(device),
            None if self.radii is None else self.radii.to(device),
        )

    def __getitem__(self, chosen: slice | Int64[Tensor, " K"]) -> "Rays":
        return Rays(
            self.origins[chosen],
            self.directions[chosen],
            self.near[chosen],
            self.far[chosen],
            self.camera_indices[chosen],
            None if self.radii is None else self.radii[chosen],
        )


@dataclass(frozen=True)
class Batch:
    """Rays and what the photographs show along them."""

    rays: Rays
    rgb: Float[Tensor, "R 3"]
    """0..1, sRGB."""
    mask: Float[Tensor, " R"] | None
    """1 = foreground; ``None`` when the capture has no masks (or they are not asked for)."""
    depth: Float[Tensor, " R"] | None = None
    """Along the optical axis, 0 where not known; scene units, if the capture's is in the world's.
    ``None`` (as in what follows): no loss term asks for it."""
    axis_cosine: Float[Tensor, " R"] | None = None
    """Depth along the optical axis over distance along the ray; comes with ``depth``."""
    normal: Float[Tensor, "R 3"] | None = None
    """Unit, in scene space; zeros where not known."""
    points: Float[Tensor, "P 3"] | None = None
    """Some of the structure-from-motion points, in scene space."""
    patch_size: int = 0
    """Pixels along a side of a patch. Patches are squares of adjacent pixels, each row by row, one after
    another in the first ``num_patches * patch_size ** 2`` rays."""
    num_patches: int = 0
    """0: all rays are drawn one by one."""
    windows: Callable[[], Windows] | None = None
    """Around the pixels of the first rays, to be found again in other views."""

    def __post_init__(self) -> None:
        r = len(self.rays)
        assert self.num_patches * self.patch_size**2 <= r
        assert self.rgb.shape == (r, 3)
        assert self.mask is None or self.mask.shape == (r,)
        assert self.depth is None or self.depth.shape == (r,)
        assert self.normal is None or self.normal.shape == (r, 3)

    def patches(self, rgb: Float[Tensor, "R 3"]) -> Float[Tensor, "num_patches patch_size patch_size 3"]:
        """Colours of the patches' pixels, taken from one for each ray."""
        side = self.patch_size
        return rgb[: self.num_patches * side**2].view(self.num_patches, side, side, 3)

    def whole_patches(self, is_served: Bool[Tensor, " R"]) -> Bool[Tensor, " num_patches"]:
        """Patches of which every ray is served."""
        area = self.patch_size**2
        return is_served[: self.num_patches * area].view(self.num_patches, area).all(dim=1)


@dataclass(frozen=True)
class RaySamples:
    """S samples on R rays, packed: those of ray r are ``offsets[r]:offsets[r + 1]``, sorted by distance.

    In buffers of fixed capacity the rows from ``offsets[-1]`` on are padding, which belongs to no ray: middle
    0 on ray 0.
    """

    t_starts: Float[Tensor, " S"]
    t_ends: Float[Tensor, " S"]
    """Each sample stands for the interval [t_start, t_end) of its ray; its position is the middle."""
    ray_indices: Int64[Tensor, " S"]
    offsets: Int64[Tensor, " R_plus_1"]
    is_served: Bool[Tensor, " R"] | None = None
    """With a fixed capacity: rays whose samples (if any) are all here. The others, the last ones, did not fit
    and have none. ``None``: nothing is padded and every ray is served."""

    def __post_init__(self) -> None:
        s = self.t_starts.shape[0]
        assert self.t_starts.shape == (s,) and self.t_ends.shape == (s,) and self.ray_indices.shape == (s,)

    def __len__(self) -> int:
        return self.t_starts.shape[0]

    @property
    def t_middle(self) -> Float[Tensor, " S"]:
        """Distance of each sample's position along its ray."""
        return 0.5 * (self.t_starts + self.t_ends)

    @property
    def count(self) -> Int64[Tensor, ""]:
        """Samples that belong to a ray, on the device."""
        return self.offsets[-1]

    @property
    def is_sample(self) -> Bool[Tensor, " S"] | None:
        """False for padding; ``None`` where there is none."""
        if self.is_served is None:
            return None
        return torch.arange(len(self), device=self.offsets.device) < self.count

    def positions(self, rays: Rays) -> Float[Tensor, "S 3"]:
        """Sample centres in scene space."""
        origins = rays.origins.index_select(0, self.ray_indices)
        return torch.addcmul(origins, self.directions(rays), self.t_middle[:, None])

    def directions(self, rays: Rays) -> Float[Tensor, "S 3"]:
        """The unit direction of each sample's ray."""
        return rays.directions.index_select(0, self.ray_indices)


@dataclass(frozen=True)
class RayHistogram:
    """How the weights of R rays are spread over N intervals each."""

    edges: Float[Tensor, "R N_plus_1"]
    """Normalised distance s, 0..1, not falling along a ray."""
    weights: Float[Tensor, "R N"]
    """Of the level that was rendered, or of a proposal."""

    def __post_init__(self) -> None:
        r, n = self.weights.shape
        assert self.edges.shape == (r, n + 1)


@dataclass(frozen=True)
class Budget:
    """Sizes of a training step's buffers on a GPU, where nobody waits to learn how much they hold.

    A batch has more rays than fit; they are rendered in order until a buffer is full.
    """

    num_rays: Int64[Tensor, ""]
    """So many of the batch's rays are looked at, on the device."""
    marched: int
    """Samples before those that nothing can see are dropped."""
    rendered: int
    """Samples after that."""

    def counts(self, num_rays: int) -> Bool[Tensor, " R"]:
        """Which of a batch's ``num_rays`` rays are looked at."""
        return torch.arange(num_rays, device=self.num_rays.device) < self.num_rays

    def limit(self, rays: Rays) -> Rays:
        """The same rays, of which those from ``num_rays`` on miss everything."""
        is_in = self.counts(len(rays))
        return replace(rays, near=torch.where(is_in, rays.near, 1.0), far=torch.where(is_in, rays.far, 0.0))

    def served(self, is_complete: Bool[Tensor, " R"] | None) -> Bool[Tensor, " R"]:
        """Which rays of the batch count: those before ``num_rays`` whose samples all found room."""
        assert is_complete is not None, "samples of a fixed capacity say which rays they serve"
        return is_complete & self.counts(len(is_complete))


@dataclass(frozen=True)
class RenderOutput:
    """What a model shows along R rays, and what the losses need per sample."""

    rgb: Float[Tensor, "R 3"]
    """Composited over the background."""
    opacity: Float[Tensor, " R"]
    """Sum of weights of the surface inside the unit sphere, 0..1."""
    depth: Float[Tensor, " R"]
    """Sum of weights times distance along the ray; divided by the opacity it is the mean distance."""
    normal: Float[Tensor, "R 3"]
    """Weighted mean of unit normals in scene space (length <= 1). Radiance fields have them outside of
    training only, where they are zeros."""
    positions: Float[Tensor, "S 3"]
    """Centres of the samples in scene space."""
    weights: Float[Tensor, " S"]
    num_marched: int | Int64[Tensor, ""]
    """Samples proposed by the marcher, before those that nothing can see were dropped."""
    sdf: Float[Tensor, " S"] | None = None
    """``None``, as the gradient, for radiance fields."""
    gradient: Float[Tensor, "S 3"] | None = None
    """d sdf / d position per sample."""
    is_sample: Bool[Tensor, " S"] | None = None
    """Samples that belong to a ray; the others are padding. ``None``: all."""
    is_served: Bool[Tensor, " R"] | None = None
    """Rays that were rendered; of the others the pixels mean nothing. ``None``: all."""
    laplacian: Float[Tensor, " S"] | None = None
    """Divergence of the gradient per sample, 1 / scene units; ``None`` where gradients are analytic."""
    histograms: tuple[RayHistogram, ...] = ()
    """Of methods that place samples by proposals: the proposals', then the last level's."""
    rgb_coarse: Float[Tensor, "R 3"] | None = None
    """Of methods with a coarse network that sees the photographs, too: what it shows."""

    @property
    def num_samples(self) -> int | Int64[Tensor, ""]:
        """Samples that were rendered; on the device where there is padding."""
        return len(self.weights) if self.is_sample is None else self.is_sample.sum()

    @property
    def num_rays(self) -> int | Int64[Tensor, ""]:
        """Rays that were rendered; on the device where not all were."""
        return len(self.rgb) if self.is_served is None else self.is_served.sum()

    @property
    def mean_depth(self) -> Float[Tensor, " R"]:
        """Mean distance of the surface along each ray; beside the surface anything finite."""
        return self.depth / self.opacity.clamp(min=0.5)

    def shows_surface(self, mask: Float[Tensor, " R"] | None) -> Bool[Tensor, " R"]:
        """Rays that show the surface, and not what is behind it: only there it has a depth and a normal.

        Args:
            mask: of the rays' pixels, if there are masks; the surface is inside.
        """
        is_surface = self.opacity.detach() > 0.5
        if mask is not None:
            is_surface = is_surface & (mask > 0.5)
        return is_surface if self.is_served is None else is_surface & self.is_served


@dataclass(frozen=True)
class Progress:
    """All that depends on how far training is: a pure function of the fraction done, made once a step.

    What is a number or a tensor is a tensor on the device in a step that is recorded once and replayed.
    """

    fraction: float
    """0 at the start, 1 at the end."""
    cos_anneal: float | Float[Tensor, ""]
    """NeuS's annealing ratio r: 0 = softened cosine, 1 = the true one."""
    active_levels: float | Float[Tensor, ""]
    """Hash-grid levels in use; a fractional part fades the next level in."""
    loss_weights: Mapping[str, float | Float[Tensor, ""]]
    """By name of the loss term. A term with weight 0 is not in here and not computed."""
    learns_from_geometry: bool = False
    """Whether a term looks at rendered depths or normals, which otherwise have no gradient."""
    inv_s: float | Float[Tensor, ""] | None = None
    """Prescribed sharpness of the density; ``None``: the learned one."""
    proposal_anneal: float | Float[Tensor, ""] = 1.0
    """Exponent of the proposals' weights when samples are drawn from them: 0 = evenly, 1 = as they say."""
