"""From a capture's files to a Scene: decode the pictures, match their sizes, place the unit sphere, split.

Every format goes through :func:`build_scene`, so that sizes, masks, memory and normalisation are handled, and
refused, in one place.
"""

import logging
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from process_data.cameras import scale_intrinsics, split_views
from process_data.normalize import RegionMethod, Up, find_world_from_scene
from process_data.views import Capture, View, find_masks
from utils.errors import ConfigError, DataError
from utils.images import blend, has_transparency, open_picture, read_mask, read_rgba
from utils.parallel import map_in_threads
from utils.types import Cameras, ImageStack, Lens, Scene, SparsePoints

LOG = logging.getLogger(__name__)

_MASK_REMEDY = "255 marks the object, 0 the rest; or set dataset.apply_mask=false"
_MASK_PLACES = "masks/NAME.png, masks/NAME.jpg.png, NAME_mask.png or an alpha channel"


@dataclass(frozen=True)
class CaptureConfig:
    """What all formats of real captures share."""

    root_dir: str | None = None
    """Folder of the capture."""
    img_downscale: int | float = 1
    """Divide width and height by this, >= 1."""
    apply_mask: bool = False
    """Load masks: masks/NAME.png, masks/NAME.jpg.png, NAME_mask.png or the pictures' alpha channels."""
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
    estimated from the cameras; none: leave the axes as they are."""
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
        DataError: a picture or mask is missing, unreadable or of the wrong size; memory does not suffice; no
            unit sphere can be found.
        ConfigError: ``dataset.holdout`` or a key of the region does not fit the capture.
    """
    file_sizes = map_in_threads(lambda view: _file_size(view.image_path), capture.views, "sizes")
    views = _match_sizes(capture.views, file_sizes)
    # A capture that cannot be split is refused before minutes of decoding.
    train, test = _split(capture, config)
    if config.apply_mask:
        views = _with_masks(capture.root, views)
    sizes = [_downscaled(size, config.img_downscale) for size in file_sizes]
    images, masks = _load_pictures(views, file_sizes, sizes, config)
    depths = _load_maps([view.depth_path for view in views], sizes, 1)
    normals = _load_maps([view.normal_path for view in views], sizes, 3)

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


# ----------------------------------------------------------------------------------------------------------
# pixels


def _downscaled(size: tuple[int, int], downscale: int | float) -> tuple[int, int]:
    return max(1, round(size[0] / downscale)), max(1, round(size[1] / downscale))


class _StackWriter:
    """An ImageStack in the making, in memory or in a file that is mapped afterwards."""

    def __init__(self, sizes: Sequence[tuple[int, int]], channels: int, on_disk: bool) -> None:
        self.size = torch.tensor(sizes, dtype=torch.int64)
        self.channels = channels
        counts = self.size.prod(dim=1)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
        self.total = int(counts.sum())
        # It stays open until the pictures are in it, hence no context manager.
        self.file = tempfile.TemporaryFile(dir=_disk_folder()) if on_disk else None  # noqa: SIM115
        self.lock = threading.Lock()
        self.pixels = torch.empty(0 if on_disk else self.total, channels, dtype=torch.uint8)

    def write(self, index: int, image: npt.NDArray[np.uint8]) -> None:
        """Put one (H, W, C) picture in its place. Threads may do so at once."""
        start = int(self.offsets[index])
        flat = np.ascontiguousarray(image).reshape(-1, self.channels)
        if self.file is None:
            self.pixels[start : start + len(flat)] = torch.from_numpy(flat)
        else:
            # Written, not mapped: pages of a mapping would stay resident until memory runs short.
            with self.lock:
                self.file.seek(start * self.channels)
                self.file.write(flat.data)

    def finish(self) -> ImageStack:
        if self.file is None:
            return ImageStack(self.pixels, self.size, self.offsets)
        # The mapping outlives the file object, and the file has no name: both are gone with the last tensor.
        self.file.flush()
        mapped = mmap.mmap(self.file.fileno(), self.total * self.channels)
        self.file.close()
        pixels = torch.frombuffer(mapped, dtype=torch.uint8).view(self.total, self.channels)
        return ImageStack(pixels, self.size, self.offsets)


def _disk_folder() -> str:
    """Where large temporary files go: TMPDIR if set, else a folder that is not kept in memory."""
    if "TMPDIR" not in os.environ and os.path.isdir("/var/tmp"):
        return "/var/tmp"
    return tempfile.gettempdir()


def _use_disk(num_bytes: int, memory: str) -> bool:
    """Decide where pictures go, and refuse what fits nowhere.

    Raises:
        DataError: neither memory nor disk suffices.
    """
    free = psutil.virtual_memory().available
    on_disk = memory == "disk" or (memory == "auto" and num_bytes > free // 2)
    place = _disk_folder() if on_disk else "memory"
    room = shutil.disk_usage(place).free if on_disk else free
    gib = 2.0**30
    if num_bytes > 0.95 * room:
        raise DataError(
            "dataset.img_downscale",
            f"the pictures take {num_bytes / gib:.1f} GiB, and {place} has {room / gib:.1f} GiB free",
            "raise dataset.img_downscale, or give TMPDIR a folder with more room and set dataset.memory=disk",
        )
    if num_bytes > gib:
        LOG.info("the pictures take %.1f GiB of %.1f GiB free in %s", num_bytes / gib, room / gib, place)
    return on_disk


def _load_pictures(
    views: Sequence[View],
    file_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    config: CaptureConfig,
) -> tuple[ImageStack, ImageStack | None]:
    """Decode photographs and masks (or alpha channels) at their training sizes."""
    num_pixels = sum(width * height for width, height in sizes)
    on_disk = _use_disk(num_pixels * (4 if config.apply_mask else 3), config.memory)
    images = _StackWriter(sizes, 3, on_disk)
    masks = _StackWriter(sizes, 1, on_disk) if config.apply_mask else None
    under = 255 if config.background == "white" else 0

    def load(index: int) -> tuple[int, int, float]:
        view, size = views[index], sizes[index]
        rgb, alpha = read_rgba(view.image_path)
        rgb, alpha = _resize(rgb, alpha, size)
        is_matte = masks is not None and view.mask_path is None
        images.write(index, rgb if alpha is None or is_matte else blend(rgb, alpha, under))
        if masks is None:
            return 0, 255, 0.0
        if is_matte:
            mask = np.full(rgb.shape[:2], 255, np.uint8) if alpha is None else alpha
        else:
            mask = _area(_read_mask(view, file_sizes[index]), size)
            mask = np.where(mask >= 128, 255, 0).astype(np.uint8)
        masks.write(index, mask[..., None])
        return int(mask.min()), int(mask.max()), float(mask.mean()) / 255.0

    seen = map_in_threads(load, range(len(views)), "images")
    if masks is None:
        return images.finish(), None
    _check_masks(views, seen)
    return images.finish(), masks.finish()


def _area(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize by averaging the pixels that each new one covers: no aliasing, and exactly our convention."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _resize(
    rgb: UInt8[np.ndarray, "H W 3"], alpha: UInt8[np.ndarray, "H W"] | None, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"] | None]:
    """Resize a picture with straight alpha: colours count by how opaque they are."""
    if alpha is None or (rgb.shape[1], rgb.shape[0]) == size:
        return _area(rgb, size), alpha
    small = _area(alpha, size)
    weighted = _area(blend(rgb, alpha, 0), size).astype(np.float32)
    straight = weighted * 255.0 / np.maximum(small, 1)[..., None]
    return np.clip(straight + 0.5, 0, 255).astype(np.uint8), small


# ----------------------------------------------------------------------------------------------------------
# masks


def _with_masks(root: Path, views: Sequence[View]) -> tuple[View, ...]:
    """Find the masks of the views that name none; pictures with an alpha channel need none.

    Raises:
        DataError: a picture has neither a mask nor an alpha channel.
    """
    missing = [index for index, view in enumerate(views) if view.mask_path is None]
    found = dict(zip(missing, find_masks(root, [views[index].image_path for index in missing]), strict=True))
    views = tuple(
        replace(view, mask_path=found[index]) if found.get(index) else view
        for index, view in enumerate(views)
    )
    bare = [view.image_path for view in views if view.mask_path is None]
    opaque = [
        path
        for path, has_alpha in zip(bare, map_in_threads(_has_alpha, bare, "alpha"), strict=True)
        if not has_alpha
    ]
    if opaque:
        raise DataError(
            opaque[0],
            f"has no mask ({len(opaque)} of {len(views)} pictures have none)",
            f"add {_MASK_PLACES}, or set dataset.apply_mask=false",
        )
    first = next((view.mask_path for view in views if view.mask_path is not None), None)
    source = f"{len(views) - len(bare)} files such as {first}" if first else ""
    channels = f"{len(bare)} alpha channels" if bare else ""
    LOG.info("masks: %s", " and ".join(part for part in (source, channels) if part))
    return views


def _has_alpha(path: Path) -> bool:
    with open_picture(path) as picture:
        return has_transparency(picture)


def _read_mask(view: View, file_size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """Read a mask of the picture's own size, or of the size that its camera is for."""
    assert view.mask_path is not None
    mask = read_mask(view.mask_path)
    size = (mask.shape[1], mask.shape[0])
    if size not in (file_size, view.size):
        raise DataError(
            view.mask_path,
            f"{size[0]}x{size[1]} pixels, but {view.image_path.name} has {file_size[0]}x{file_size[1]}",
            "give the mask the size of its picture",
        )
    return mask


def _check_masks(views: Sequence[View], seen: Sequence[tuple[int, int, float]]) -> None:
    """Refuse masks that say nothing, and tell what share of the pictures they keep."""
    paths = [view.mask_path or view.image_path for view in views]
    if all(high == 0 for _, high, _ in seen):
        raise DataError(paths[0].parent, "every mask is black everywhere", _MASK_REMEDY)
    for path, (low, _, _) in zip(paths, seen, strict=True):
        if low == 255:
            raise DataError(path, "the mask is white everywhere and carries no information", _MASK_REMEDY)
    black = [path for path, (_, high, _) in zip(paths, seen, strict=True) if high == 0]
    if black:
        LOG.warning("%d of %d masks are black everywhere, first %s", len(black), len(seen), black[0])
    share = float(np.mean([mean for _, _, mean in seen]))
    LOG.info("masks: on average %.0f %% of a picture is foreground", 100.0 * share)


# ----------------------------------------------------------------------------------------------------------
# priors


def _load_maps(
    paths: Sequence[Path | None], sizes: Sequence[tuple[int, int]], channels: int
) -> ImageStack | None:
    """Read depth or normal maps (``.npy``) at the pictures' training sizes, in half precision.

    Normals are brought to -1..1 and unit length. ``None`` unless every view has one.
    """
    if any(path is None for path in paths):
        if any(path is not None for path in paths):
            missing = sum(path is None for path in paths)
            LOG.warning("%d of %d views have no prior map: none is used", missing, len(paths))
        return None
    maps = map_in_threads(
        lambda index: _read_map(Path(str(paths[index])), sizes[index], channels), range(len(paths)), "priors"
    )
    size = torch.tensor(sizes, dtype=torch.int64)
    counts = size.prod(dim=1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    pixels: Tensor = torch.cat([torch.from_numpy(values).view(-1, channels) for values in maps])
    return ImageStack(pixels, size, offsets)


def _read_map(path: Path, size: tuple[int, int], channels: int) -> npt.NDArray[np.float16]:
    """Read one map as (h, w, C)."""
    remedy = f"expected is a .npy array of {'(H, W)' if channels == 1 else '(3, H, W)'} numbers"
    try:
        values = np.asarray(np.load(path, allow_pickle=False), np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, f"not a readable .npy file ({error})", remedy) from error
    if channels == 3 and values.ndim == 3 and values.shape[0] == 3:
        values = values.transpose(1, 2, 0)
    values = values.reshape(*values.shape[:2], -1) if values.ndim >= 2 else values
    if values.ndim != 3 or values.shape[2] != channels:
        raise DataError(path, f"has shape {values.shape}", remedy)
    if not np.isfinite(values).all():
        raise DataError(path, "holds values that are not finite", remedy)
    values = cv2.resize(values, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], channels)
    if channels == 3:
        # Normals stored as colours lie in 0..1.
        values = values * 2.0 - 1.0 if values.min() >= 0.0 else values
        values = values / np.maximum(np.linalg.norm(values, axis=2, keepdims=True), 1e-6)
    return np.ascontiguousarray(values, np.float16)
