"""What sensors and networks say about each pixel: depth and normal maps, found, read and brought to size.

::

    depth/NAME.npy .png .tif    (H, W) along the optical axis, in units of dataset.depth_unit; 0 = not known
    normal/NAME.npy .png .tif   (H, W, 3) or (3, H, W) in the camera's axes (x right, y down, z forward), as
                                -1..1 or as colours (0..1, 8 or 16 bits); 0 0 0 = not known

NAME is that of the photograph; ``NAME_depth.npy`` and the like beside it are found as well (``find_maps``).
A smaller picture's pixel takes the mean of what is known below it: holes are no depth of 0.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32

from process_data.views import View, find_maps
from utils.errors import ConfigError, DataError
from utils.parallel import map_in_threads
from utils.types import ImageStack

LOG = logging.getLogger(__name__)

_HALF = float(np.finfo(np.float16).max)
_SHORTEST = 0.5
"""Colours closer than this to grey are no direction."""


def with_priors(root: Path, views: Sequence[View]) -> tuple[View, ...]:
    """Find the depth and normal maps of the views that name none."""
    depths = find_maps(root, [view.image_path for view in views], "depth")
    normals = find_maps(root, [view.image_path for view in views], "normal")
    return tuple(
        replace(view, depth_path=view.depth_path or depth, normal_path=view.normal_path or normal)
        for view, depth, normal in zip(views, depths, normals, strict=True)
    )


def without_priors(root: Path, views: Sequence[View]) -> tuple[View, ...]:
    """The same views without the maps that they name; maps of the first one are mentioned in the log."""
    first = with_priors(root, views[:1])[0]
    if first.depth_path is not None:
        terms = "system.loss.depth or system.loss.depth_prior above 0"
        LOG.info("there are depth maps, which are not used; training with %s uses them", terms)
    if first.normal_path is not None:
        terms = "system.loss.normal_prior above 0"
        LOG.info("there are normal maps, which are not used; training with %s uses them", terms)
    return tuple(replace(view, depth_path=None, normal_path=None) for view in views)


def load_depths(
    views: Sequence[View], sizes: Sequence[tuple[int, int]], unit: float | None
) -> ImageStack | None:
    """Read depth maps at the pictures' training sizes, in half precision; ``None`` unless all views have one.

    Args:
        views: with their paths.
        sizes: (width, height) wanted.
        unit: world units per stored unit; ``None``: 1, and refused for pictures of whole numbers.

    Raises:
        DataError: a map is unreadable, of the wrong shape, not finite or beyond half precision; or nothing
            is known in any.
        ConfigError: the unit is needed.
    """

    def read(path: Path, size: tuple[int, int]) -> Float32[np.ndarray, "H W C"]:
        return _resized_depth(_read_depth(path, unit), size)

    return _load([view.depth_path for view in views], sizes, 1, read)


def load_normals(views: Sequence[View], sizes: Sequence[tuple[int, int]]) -> ImageStack | None:
    """Read normal maps at the pictures' training sizes, unit or zero; ``None`` unless all views have one.

    Raises:
        DataError: a map is unreadable, of the wrong shape or not finite; or nothing is known in any.
    """

    def read(path: Path, size: tuple[int, int]) -> Float32[np.ndarray, "H W C"]:
        return _resized_normal(_read_normal(path), size)

    return _load([view.normal_path for view in views], sizes, 3, read)


def _load(
    paths: Sequence[Path | None],
    sizes: Sequence[tuple[int, int]],
    channels: int,
    read: Callable[[Path, tuple[int, int]], npt.NDArray[np.float32]],
) -> ImageStack | None:
    if any(path is None for path in paths):
        if any(path is not None for path in paths):
            missing = sum(path is None for path in paths)
            LOG.warning("%d of %d views have no prior map: none is used", missing, len(paths))
        return None
    size = torch.tensor(sizes, dtype=torch.int64)
    counts = size.prod(dim=1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    pixels = torch.empty(int(counts.sum()), channels, dtype=torch.float16)
    is_known = np.zeros(len(paths), bool)

    def load(index: int) -> None:
        start = int(offsets[index])
        values = np.ascontiguousarray(read(Path(str(paths[index])), sizes[index]), np.float16)
        is_known[index] = values.any()
        pixels[start : start + int(counts[index])] = torch.from_numpy(values).view(-1, channels)

    map_in_threads(load, range(len(paths)), "priors")
    if not is_known.any():
        # Such maps would leave their loss term at 0 for the whole training.
        raise _nothing_known(Path(str(paths[0])), channels)
    LOG.info("%s maps: %d files such as %s", "depth" if channels == 1 else "normal", len(paths), paths[0])
    return ImageStack(pixels, size, offsets)


def _nothing_known(path: Path, channels: int) -> DataError:
    if channels == 1:
        what = "no depth map holds a value above 0"
        remedy = (
            "check dataset.depth_unit, that depths are positive, and how much is known at img_downscale=1"
        )
    else:
        what = "no normal map holds a direction, all are 0 0 0 or grey"
        remedy = "write them as -1..1 or as colours"
    return DataError(path, what, f"{remedy}, or leave out the loss terms that look at the maps")


def _read_array(path: Path, remedy: str) -> npt.NDArray[np.generic]:
    """An array or a picture as stored; colours in the order red, green, blue."""
    if path.suffix.lower() != ".npy":
        # OpenCV, because Pillow has no pictures of three channels with 16 bits.
        picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
        if picture is None:
            raise DataError(path, "not a readable picture", remedy)
        return picture[..., 2::-1] if picture.ndim == 3 else picture
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(path, f"not a readable .npy file ({error})", remedy) from error


def _checked(
    path: Path, values: npt.NDArray[np.generic], channels: int, remedy: str
) -> Float32[np.ndarray, "H W C"]:
    shape = values.shape
    if channels == 3 and len(shape) == 3 and shape[0] == 3:
        values = values.transpose(1, 2, 0)
    values = values.reshape(*values.shape[:2], -1) if values.ndim >= 2 and values.size else values
    if values.ndim != 3 or values.shape[2] != channels or values.size == 0:
        raise DataError(path, f"has shape {shape}", remedy)
    try:
        numbers = values.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(path, f"does not hold numbers ({error})", remedy) from error
    if not np.isfinite(numbers).all():
        raise DataError(path, "holds values that are not finite", "write 0 where nothing is known")
    return numbers


def _read_depth(path: Path, unit: float | None) -> Float32[np.ndarray, "H W 1"]:
    remedy = "expected is a .npy array of (H, W) numbers, or a .png or .tif of one channel"
    stored = _read_array(path, remedy)
    is_picture = path.suffix.lower() != ".npy"
    if is_picture and stored.ndim == 3 and (stored == stored[..., :1]).all():
        stored = stored[..., 0]  # Grey, written as colours.
    if is_picture and unit is None and np.issubdtype(stored.dtype, np.integer):
        what = f"{path} and its like hold whole numbers, which may mean any unit"
        raise ConfigError(
            "dataset.depth_unit",
            what,
            "give world units per stored unit: 0.001 for millimetres in a world of metres (for "
            "system.loss.depth_prior alone any will do)",
        )
    depth = _checked(path, stored, 1, remedy) * np.float32(1.0 if unit is None else unit)
    largest = float(np.abs(depth).max())
    if largest > _HALF:
        what = f"holds depths up to {largest:g}, above 65504, the largest in half precision"
        raise DataError(path, what, "store it in metres")
    return depth


def _resized_depth(
    depth: Float32[np.ndarray, "H W 1"], size: tuple[int, int]
) -> Float32[np.ndarray, "h w 1"]:
    is_known = (depth > 0).astype(np.float32)
    if is_known.all():
        return cv2.resize(depth, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], 1)
    # A mean over a hole is a depth that nothing has: only what is known counts, where it is half or more.
    share = cv2.resize(is_known, size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(depth * is_known, size, interpolation=cv2.INTER_AREA)
    mean = np.where(share > 0.499, total / np.maximum(share, 1e-6), 0.0)
    return mean.astype(np.float32).reshape(size[1], size[0], 1)


def _read_normal(path: Path) -> Float32[np.ndarray, "H W 3"]:
    remedy = "expected is a .npy array of (3, H, W) or (H, W, 3) numbers, or a .png or .tif of three channels"
    stored = _read_array(path, remedy)
    normal = _checked(path, stored, 3, remedy)
    if stored.dtype in (np.uint8, np.uint16):
        normal = normal / np.float32(255 if stored.dtype == np.uint8 else 65535)
    is_known = (normal != 0).any(axis=2, keepdims=True)
    if normal.min() >= 0.0:
        normal = normal * 2.0 - 1.0
        is_known &= np.linalg.norm(normal, axis=2, keepdims=True) > _SHORTEST
    return np.where(is_known, normal, np.float32(0))


def _resized_normal(
    normal: Float32[np.ndarray, "H W 3"], size: tuple[int, int]
) -> Float32[np.ndarray, "h w 3"]:
    mean = cv2.resize(normal, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], 3)
    return mean / np.maximum(np.linalg.norm(mean, axis=2, keepdims=True), 1e-6)
