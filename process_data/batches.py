"""Ray batches: pixels drawn over all training images, with the colours that the photographs show there.

Every pixel of every training image is equally likely: one flat index runs over them all, so images of
different sizes are weighted by their area and no image is favoured. Draws come from a generator of this
object's own, whose state goes into checkpoints; a resumed run therefore sees exactly the rays that an
uninterrupted one would have seen. Where a loss looks at patches, a batch begins with these.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int32, Int64
from torch import Tensor

from process_data.cameras import RayGenerator, image_rays
from process_data.patches import PatchSampler, check_patch_size
from process_data.photographs import WindowDrawer, sources_or_error
from utils.backend import restore_generator
from utils.errors import ConfigError
from utils.types import Batch, ImageStack, Scene


@dataclass(frozen=True)
class Priors:
    """What batches bring along beside colours and masks; what is ``None`` costs nothing."""

    depth: str | None = None
    """Config key of the loss term that compares depths."""
    normal: str | None = None
    """Config key of the loss term that compares normals."""
    points: str | None = None
    """Config key of the loss term that looks at structure-from-motion points."""
    points_per_batch: int = 512
    """So many points are drawn, with replacement."""
    max_error: float = 1.5
    """Largest mean reprojection error of a point, pixels, where it is known."""
    patches: str | None = None
    """Config key of the patches' size, where a loss term looks at patches."""
    patch_size: int = 11
    """Pixels along a patch's side."""
    num_patches: int = 4
    """So many patches lead each batch."""
    windows: str | None = None
    """Config key of the loss term that looks for windows of a photograph in others."""
    window_rays: int = 128
    """So many of a batch's first rays get a window."""
    window_width: int = 11
    """Of these, pixels; odd."""


class RayBatches:
    """Draws training batches from a scene.

    Args:
        scene: the capture, on the CPU.
        indices: views to draw from; the scene's training views if ``None``.
        device: where batches are made; the pixel buffers are copied there.
        seed: seed of the draws.
        foreground_fraction: share of the rays, 0..1, that is drawn from the masks only; the rest is uniform.
        foreground_margin: pixels by which the masks are widened for this, so that silhouettes are seen from
            both sides.
        priors: what batches bring along beside colours and masks.

    Raises:
        ConfigError: ``foreground_fraction`` is out of range, or above 0 without masks; the scene does not
            have what ``priors`` asks for, or is warped (``dataset.ndc``); its lenses distort where a term
            needs pinholes; a picture is smaller than a patch.
        ValueError: ``indices`` is empty or names a view that does not exist.
    """

    def __init__(
        self,
        scene: Scene,
        indices: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        foreground_fraction: float = 0.0,
        foreground_margin: int = 8,
        priors: Priors | None = None,
    ) -> None:
        views = torch.tensor(scene.train_indices if indices is None else list(indices), dtype=torch.int64)
        if len(views) == 0 or int(views.min()) < 0 or int(views.max()) >= len(scene.images):
            raise ValueError(f"indices must name views 0..{len(scene.images) - 1}, got {views.tolist()}")
        if not 0.0 <= foreground_fraction <= 1.0:
            raise ConfigError(
                "trainer.foreground_share",
                f"{foreground_fraction} is not in 0..1",
                "give a share of the rays",
            )
        self.device = torch.device(device)
        self.foreground_fraction = foreground_fraction
        self.generator = torch.Generator(self.device).manual_seed(seed)

        # Position k of the draw lies in view v for ends[v - 1] <= k < ends[v]; adding shift[v] gives the
        # pixel's place in the scene's flat buffer, which also holds the views that are not drawn from.
        counts = scene.images.size[views].prod(dim=1)
        ends = counts.cumsum(0)
        starts = ends - counts
        self.num_pixels = int(ends[-1])
        self._foreground: Int32[Tensor, " K"] | Int64[Tensor, " K"] | None = None
        if foreground_fraction > 0.0:
            found = _foreground_positions(scene.masks, views, starts, foreground_margin)
            self._foreground = found.to(self.device)

        self._views = views.to(self.device)
        self._ends = ends.to(self.device)
        self._starts = starts.to(self.device)
        self._shifts = (scene.images.offsets[views] - starts).to(self.device)
        self._widths = scene.images.size[views, 0].to(self.device)
        self._rgb = scene.images.pixels.to(self.device)
        self._mask = None if scene.masks is None else scene.masks.pixels[:, 0].to(self.device)
        self._ray_generator = RayGenerator.from_cameras(scene.cameras, self.device)

        self.priors = Priors() if priors is None else priors
        self._rotations = scene.cameras.c2w[:, :, :3].to(self.device)
        self._world_scale = scene.world_scale
        self._depth = self._normal = self._points = None
        if self.priors.depth is not None:
            self._depth = _prior_map(scene, scene.depths, self.priors.depth, "depth").to(self.device)
        if self.priors.normal is not None:
            self._normal = _prior_map(scene, scene.normals, self.priors.normal, "normal").to(self.device)
        if self.priors.points is not None:
            self._points = _sparse_points(scene, views, self.priors.points, self.priors.max_error)
            self._points = self._points.to(self.device)
        self._patches: PatchSampler | None = None
        if self.priors.patches is not None:
            self._patches = PatchSampler(
                *(scene, views, starts),
                patch_size=self.priors.patch_size,
                num_patches=self.priors.num_patches,
                device=self.device,
                key=self.priors.patches,
            )
        self._windows: WindowDrawer | None = None
        if self.priors.windows is not None:
            _refuse_warped(scene, self.priors.windows)
            self._windows = WindowDrawer.from_scene(
                *(scene, views.tolist(), self.priors.windows),
                *(self.priors.window_rays, self.priors.window_width, self._ray_generator),
            )

    @property
    def num_patch_rays(self) -> int:
        """Rays of the patches that lead a batch, which has at least these; 0 without patches."""
        return 0 if self._patches is None else self._patches.num_rays

    def draw(self, num_rays: int) -> Batch:
        """Draw a batch of ``num_rays`` rays through pixel centres (with replacement), patches first.

        Raises:
            ValueError: there are fewer than :attr:`num_patch_rays`.
        """
        if num_rays < self.num_patch_rays:
            raise ValueError(
                f"num_rays must be at least {self.num_patch_rays} for the patches, got {num_rays}"
            )
        positions = self._draw_positions(num_rays - self.num_patch_rays)
        if self._patches is not None:
            chosen = self._patches.draw(self.generator, self._foreground, self.foreground_fraction)
            positions = torch.cat([chosen, positions])
        slot = torch.searchsorted(self._ends, positions, right=True)
        width = self._widths[slot]
        local = positions - self._starts[slot]
        pixels = torch.stack([local % width, local // width], dim=-1).float() + 0.5
        flat = positions + self._shifts[slot]
        rgb = self._rgb.index_select(0, flat).float() / 255.0
        mask = None if self._mask is None else self._mask.index_select(0, flat).float() / 255.0
        views = self._views[slot]
        batch = Batch(self._ray_generator.rays(views, pixels), rgb, mask)
        if self._windows is not None:
            # Cut when a term asks for them: before its weight rises above 0 they would be in vain.
            batch = replace(batch, windows=partial(self._windows.draw, batch.rays, pixels))
        return self._with_priors(batch, views, flat)

    def _with_priors(self, batch: Batch, views: Int64[Tensor, " R"], flat: Int64[Tensor, " R"]) -> Batch:
        """Add what the priors say about the pixels at ``flat`` of the scene's buffers."""
        if self._depth is not None:
            depth = self._depth.index_select(0, flat)[:, 0].float() / self._world_scale
            axes = self._rotations[:, :, 2].index_select(0, views)
            batch = replace(batch, depth=depth, axis_cosine=(batch.rays.directions * axes).sum(dim=1))
        if self._normal is not None:
            local = self._normal.index_select(0, flat).float()
            normal = (self._rotations.index_select(0, views) * local[:, None]).sum(dim=2)
            # Half precision is short of unit length by up to a thousandth.
            batch = replace(batch, normal=torch.nn.functional.normalize(normal, dim=1))
        if self._points is not None:
            chosen = self._integers(len(self._points), self.priors.points_per_batch)
            batch = replace(batch, points=self._points.index_select(0, chosen))
        if self._patches is not None:
            size, count = self._patches.patch_size, self._patches.num_patches
            batch = replace(batch, patch_size=size, num_patches=count)
        return batch

    def _draw_positions(self, num_rays: int) -> Int64[Tensor, " R"]:
        """Draw single positions in 0..num_pixels-1; every stretch of them has its share of the foreground."""
        anywhere = self._integers(self.num_pixels, num_rays)
        if self._foreground is None:
            return anywhere
        chosen = self._foreground[self._integers(len(self._foreground), num_rays)].long()
        # Where the running share of foreground rays passes a whole number. On a GPU only a batch's first so
        # many rays may find room, and both kinds have to be among them.
        share = torch.arange(num_rays + 1, dtype=torch.float64, device=self.device) * self.foreground_fraction
        return torch.where(share.floor().diff() > 0, chosen, anywhere)

    def _integers(self, end: int, count: int) -> Int64[Tensor, " K"]:
        return torch.randint(end, (count,), generator=self.generator, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Give what must be kept to go on with exactly the same draws."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        restore_generator(self.generator, state["generator"])


def _foreground_positions(
    masks: ImageStack | None, views: Int64[Tensor, " N"], starts: Int64[Tensor, " N"], margin: int
) -> Int32[Tensor, " K"] | Int64[Tensor, " K"]:
    """List the positions of the pixels in the widened masks of the chosen views, counted from ``starts``."""
    if masks is None:
        raise ConfigError(
            "trainer.foreground_share", "the scene has no masks", "set dataset.apply_mask=true, or 0 here"
        )
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1))
    # Four bytes instead of eight, where they reach: DTU at full size has 30 million foreground pixels.
    num_pixels = int(starts[-1]) + int(masks.size[views[-1]].prod())
    kind = np.int32 if num_pixels < 2**31 else np.int64
    found = []
    for view, start in zip(views.tolist(), starts.tolist(), strict=True):
        widened = cv2.dilate(masks.image(view)[..., 0].numpy(), kernel)
        found.append((np.flatnonzero(widened) + start).astype(kind))
    positions = torch.from_numpy(np.concatenate(found))
    if len(positions) == 0:
        raise ConfigError(
            "trainer.foreground_share", "the masks of all training views are black", "set it to 0"
        )
    return positions


def check_priors(scene: Scene, priors: Priors, max_rays: int) -> None:
    """Make sure that the scene has what batches of at most ``max_rays`` will have to bring along.

    Raises:
        ConfigError: it does not, or it is warped (``dataset.ndc``); or a batch has no room for the patches.
    """
    views = torch.tensor(scene.train_indices, dtype=torch.int64)
    if priors.depth is not None:
        _prior_map(scene, scene.depths, priors.depth, "depth")
    if priors.normal is not None:
        _prior_map(scene, scene.normals, priors.normal, "normal")
    if priors.points is not None:
        _sparse_points(scene, views, priors.points, priors.max_error)
    if priors.patches is not None:
        check_patch_size(scene, views, priors.patch_size, priors.patches)
        wanted = priors.num_patches * priors.patch_size**2
        if wanted > max_rays:
            what = f"{max_rays} are fewer than the {wanted} rays of the patches"
            remedy = f"set it to {wanted}, or system.num_patches or system.patch_size lower"
            raise ConfigError("trainer.max_rays", what, remedy)
    if priors.windows is not None:
        _refuse_warped(scene, priors.windows)
        sources_or_error(scene, scene.train_indices, priors.windows)


def _refuse_warped(scene: Scene, key: str) -> None:
    if scene.cameras.ndc is not None:
        what = "what was measured in the world cannot be compared in the space that dataset.ndc warps"
        raise ConfigError(key, what, "set it to 0, or dataset.ndc=false")


def _prior_map(scene: Scene, maps: ImageStack | None, key: str, kind: str) -> Float16[Tensor, "total C"]:
    """Give the values of all pixels of the scene's depth or normal maps."""
    _refuse_warped(scene, key)
    if maps is None:
        what = f"the capture does not have a {kind} map for every view"
        embedded = {"depth": "dataset.depths=sensor", "normal": "dataset.normals=true"}[kind]
        raise ConfigError(key, what, f"add them (to the embedded scene by {embedded}), or set it to 0")
    return maps.pixels


def _sparse_points(
    scene: Scene, views: Int64[Tensor, " N"], key: str, max_error: float
) -> Float32[Tensor, "P 3"]:
    """Choose the points in the unit sphere that some of the views saw, and saw well, where that is known."""
    _refuse_warped(scene, key)
    if scene.points is None or len(scene.points) == 0:
        remedy = "set it to 0 (the embedded scene has some with dataset.num_points=2000)"
        raise ConfigError(key, "the capture has no structure-from-motion points", remedy)
    points = scene.points
    # Errors that are not known are NaN, and then the comparison is false.
    is_good = (np.linalg.norm(points.positions, axis=1) < 1.0) & ~(points.errors > max_error)
    if len(points.observations) > 0:
        is_training = np.isin(points.observations[:, 1], views.numpy())
        is_good &= np.isin(np.arange(len(points)), points.observations[is_training, 0])
    if not is_good.any():
        what = (
            f"of the capture's {len(points)} points none is in the unit sphere, seen by a training view and "
            f"wrong by at most {max_error:g} pixels"
        )
        raise ConfigError(key, what, "set it to 0, or raise system.sparse_max_error")
    return torch.from_numpy(points.positions[is_good]).float()


def full_image(scene: Scene, index: int, device: torch.device | str = "cpu") -> Batch:
    """Give all pixels of one view, row by row, as one batch.

    Args:
        scene: the capture.
        index: the view, 0..N-1.
        device: where the batch is put.
    """
    rays = image_rays(scene.cameras, index).to(device)
    rgb: Float[Tensor, "R 3"] = scene.images.image(index).reshape(-1, 3).float() / 255.0
    mask = None if scene.masks is None else scene.masks.image(index).reshape(-1).float() / 255.0
    return Batch(rays, rgb.to(device), None if mask is None else mask.to(device))
