"""From a capture's files to a Scene: decode the pictures, match their sizes, place the unit sphere, split.

Every format goes through :func:`build_scene`, so that sizes, masks, memory and normalisation are handled, and
refused, in one place.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float64

from process_data.cameras import scale_intrinsics, split_views
from process_data.normalize import RegionMethod, Up, find_world_from_scene
from process_data.pictures import load_pictures, with_masks
from process_data.priors import load_depths, load_normals, with_priors, without_priors
from process_data.views import Capture, View, find_masks
from utils.errors import ConfigError, DataError
from utils.images import open_picture
from utils.parallel import map_in_threads
from utils.types import Cameras, Lens, Scene, SparsePoints

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureConfig:
    """What all formats of real captures share."""

    root_dir: str | None = None
    """Folder of the capture."""
    img_downscale: int | float = 1
    """Divide width and height by this, >= 1."""
    apply_mask: bool = False
    """Load masks: masks/NAME.png, masks/NAME.jpg.png, NAME_mask.png or the pictures' alpha channels."""
    use_priors: bool | None = None
    """Load depth and normal maps: depth/NAME.npy (.png, .tif), NAME_depth.npy or what the format names, and
    the same with normal; null: not, but run.py makes it true for training if a loss term looks at them."""
    depth_unit: float | None = None
    """World units per unit stored in depth maps, above 0: 0.001 for millimetres in a world of metres; null:
    1, but for pictures of whole numbers (png) it must be given."""
    background: Literal["black", "white"] = "white"
    """Plain colour behind masked objects, and under transparent pixels if apply_mask is off."""
    holdout: Any = 0
    """Views kept out of training: 0 = none (or those that the format itself names), k = every k-th, or a list
    of indices."""
    test_steps: int = 60
    """Frames of the test video, >= 1."""
    region: RegionMethod = "auto"
    """How the unit sphere is found: given (by the format), masks (their visual hull), points (sparse points
    without outliers), lookat (where the cameras look), cameras (their centroid, for rooms); auto takes the
    first that the capture allows."""
    region_center: Any = None
    """Centre of the unit sphere in world coordinates, [x, y, z]; null: found as region says."""
    region_radius: float | None = None
    """Radius of the unit sphere in world units; null: found as region says."""
    region_scale: float = 1.0
    """Factor on the radius, however it was found; above 1 adds surroundings."""
    up: Up = "auto"
    """Axis of the world that becomes the scene's +z: x, y, z, -x, -y, -z; auto: as the format says, or
    estimated from the cameras if it names no region; none: leave the axes as they are."""
    memory: Literal["auto", "ram", "disk"] = "auto"
    """Where decoded pictures are kept: disk maps a temporary file; auto does that when they would fill over
    half of the free memory."""

    def __post_init__(self) -> None:
        if not 1 <= self.img_downscale < float("inf"):
            raise ConfigError(
                "dataset.img_downscale",
                f"{self.img_downscale} is not 1 or more",
                "give 1 for full size, 2 for half",
            )
        if not 0.01 <= self.region_scale <= 100:
            raise ConfigError(
                "dataset.region_scale",
                f"{self.region_scale} is not in 0.01..100",
                "1 keeps the sphere that was found",
            )
        if self.depth_unit is not None and not 0 < self.depth_unit < float("inf"):
            raise ConfigError(
                "dataset.depth_unit", f"{self.depth_unit} is not above 0", "give world units, or null"
            )
        if self.region_radius is not None and not 0 < self.region_radius < float("inf"):
            raise ConfigError(
                "dataset.region_radius", f"{self.region_radius} is not above 0", "give world units, or null"
            )
        if self.region_center is not None:
            center = np.array(self.region_center, dtype=object)
            if center.shape != (3,) or not all(isinstance(x, int | float) for x in center):
                raise ConfigError(
                    "dataset.region_center", f"{self.region_center!r} is no point", "give [x, y, z], or null"
                )
        if self.test_steps < 1:
            raise ConfigError(
                "dataset.test_steps", f"{self.test_steps} is below 1", "give a number of frames"
            )


def build_scene(capture: Capture, config: CaptureConfig) -> Scene:
    """Make a Scene of a capture.

    Raises:
        DataError: a picture, mask or prior map is missing, unreadable or of the wrong size; memory does not
            suffice; no unit sphere can be found.
        ConfigError: ``dataset.holdout``, ``dataset.depth_unit`` or a key of the region does not fit the
            capture.
    """
    file_sizes = map_in_threads(lambda view: _file_size(view.image_path), capture.views, "sizes")
    views = _match_sizes(capture.views, file_sizes)
    # A capture that cannot be split is refused before minutes of decoding.
    train, test = _split(capture, config)
    if config.apply_mask:
        views = with_masks(capture.root, views)
    elif any(find_masks(capture.root, [views[0].image_path])):
        LOG.info("there are masks, which are not used; dataset.apply_mask=true uses them")
    choose = with_priors if config.use_priors else without_priors
    views = choose(capture.root, views)
    sizes = [_downscaled(size, config.img_downscale) for size in file_sizes]
    images, masks = load_pictures(
        views, file_sizes, sizes, config.apply_mask, config.background, config.memory
    )
    depths = load_depths(views, sizes, config.depth_unit)
    normals = load_normals(views, sizes)

    world_from_scene = find_world_from_scene(
        replace(capture, views=views),
        masks,
        config.region,
        config.region_center,
        config.region_radius,
        config.region_scale,
        config.up,
    )
    to_scene = _SceneFrame(world_from_scene)
    intrinsics = np.stack(
        [
            scale_intrinsics(
                torch.from_numpy(view.intrinsics), (size[0] / _size(view)[0], size[1] / _size(view)[1])
            ).numpy()
            for view, size in zip(views, sizes, strict=True)
        ]
    )
    return Scene(
        name=capture.root.name,
        cameras=Cameras(
            torch.from_numpy(np.stack([to_scene.pose(view.c2w) for view in views])).float(),
            torch.from_numpy(intrinsics).float(),
            images.size.clone(),
            _lenses(views),
        ),
        images=images,
        image_names=_names(capture.root, [view.image_path for view in views]),
        train_indices=train,
        test_indices=test,
        world_from_scene=torch.from_numpy(world_from_scene),
        masks=masks,
        background_color=(0.0, 0.0, 0.0) if config.background == "black" else (1.0, 1.0, 1.0),
        points=None if capture.points is None else to_scene.points(capture.points),
        depths=depths,
        normals=normals,
    )


# ----------------------------------------------------------------------------------------------------------
# views


class _SceneFrame:
    """Carries poses and points from world to scene."""

    def __init__(self, world_from_scene: Float64[np.ndarray, "4 4"]) -> None:
        self.scale = np.cbrt(np.linalg.det(world_from_scene[:3, :3]))
        self.rotation = world_from_scene[:3, :3] / self.scale
        self.center = world_from_scene[:3, 3]

    def positions(self, world: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 3"]:
        return (world - self.center) @ self.rotation / self.scale

    def pose(self, c2w: Float64[np.ndarray, "3 4"]) -> Float64[np.ndarray, "3 4"]:
        center = self.positions(c2w[None, :, 3])[0]
        return np.concatenate([self.rotation.T @ c2w[:, :3], center[:, None]], axis=1)

    def points(self, points: SparsePoints) -> SparsePoints:
        return replace(points, positions=self.positions(points.positions))


def _size(view: View) -> tuple[int, int]:
    assert view.size is not None  # :func:`_match_sizes` fills it in.
    return view.size


def _lenses(views: Sequence[View]) -> tuple[Lens, ...]:
    """One lens per view if any of them has one."""
    if all(view.lens is None for view in views):
        return ()
    return tuple(view.lens or _pinhole(view) for view in views)


def _pinhole(view: View) -> Lens:
    """A view without a lens among others that have one."""
    k = view.intrinsics
    if abs(k[0, 1]) > 1e-6 * k[0, 0]:
        raise DataError(
            view.image_path,
            "its intrinsics have skew, while other views have lens distortion",
            "undistort the pictures",
        )
    return Lens("PINHOLE", (k[0, 0], k[1, 1], k[0, 2], k[1, 2]), _size(view))


def _names(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    """File names, or where those are not unique the paths below ``root`` with _ for /."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(
        "_".join(path.relative_to(root).parts if path.is_relative_to(root) else path.parts) for path in paths
    )


def _split(capture: Capture, config: CaptureConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training and held-out views: ``dataset.holdout`` if it is set, else what the format says."""
    if capture.test_views is None or config.holdout not in (0, None):
        return split_views(len(capture.views), config.holdout)
    return split_views(len(capture.views), list(capture.test_views))


def _file_size(path: Path) -> tuple[int, int]:
    """(width, height) from a picture's header."""
    with open_picture(path) as picture:
        return picture.size


def _match_sizes(views: Sequence[View], file_sizes: Sequence[tuple[int, int]]) -> tuple[View, ...]:
    """Fill in missing sizes, and let pictures that are all resized alike keep the cameras of another size.

    Raises:
        DataError: one picture's size does not fit its camera, while others' do, or its shape differs.
    """
    views = tuple(
        view if view.size is not None else replace(view, size=size)
        for view, size in zip(views, file_sizes, strict=True)
    )
    factors = [
        (size[0] / _size(view)[0], size[1] / _size(view)[1])
        for view, size in zip(views, file_sizes, strict=True)
    ]
    usual = float(np.median([x for x, _ in factors]))
    for view, size, factor in zip(views, file_sizes, factors, strict=True):
        # Half a pixel of rounding per side is what a resize leaves; for tiny pictures that would allow
        # anything.
        slack = min(0.1, 1.5 / min(size))
        if abs(factor[0] / factor[1] - 1) > 2 * slack or abs(factor[0] / usual - 1) > slack:
            raise DataError(
                view.image_path,
                f"{size[0]}x{size[1]} pixels, but its camera is for {_size(view)[0]}x{_size(view)[1]}",
                "resize all pictures alike or none, and do not turn them (tools that honour EXIF may have)",
            )
    if abs(usual - 1) > 1e-3:
        LOG.info("pictures are %.4g times the size that their cameras are for: K is scaled", usual)
    return views


def _downscaled(size: tuple[int, int], downscale: int | float) -> tuple[int, int]:
    return max(1, round(size[0] / downscale)), max(1, round(size[1] / downscale))
