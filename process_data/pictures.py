"""Decoding: photographs, masks and prior maps at their training sizes, as 8 bits, in memory or on disk."""

import logging
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import torch
from jaxtyping import UInt8

from process_data.views import View, find_masks
from utils.errors import DataError
from utils.images import blend, has_transparency, open_picture, read_mask, read_rgba
from utils.parallel import map_in_threads
from utils.types import ImageStack

LOG = logging.getLogger(__name__)

_MASK_REMEDY = "255 marks the object, 0 the rest; or set dataset.apply_mask=false"
_MASK_PLACES = "masks/NAME.png, masks/NAME.jpg.png, NAME_mask.png or an alpha channel"


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


def _use_disk(num_bytes: int, memory: str, num_prior_bytes: int = 0) -> bool:
    """Decide where pictures go, and refuse what fits nowhere.

    Args:
        num_bytes: of the pictures and masks.
        memory: where they are kept, see ``CaptureConfig``.
        num_prior_bytes: of the prior maps, which are always in memory.

    Raises:
        DataError: neither memory nor disk suffices.
    """
    free = psutil.virtual_memory().available
    in_memory = num_bytes + num_prior_bytes
    on_disk = memory == "disk" or (memory == "auto" and in_memory > free // 2)
    folder = _disk_folder()
    if on_disk and memory == "auto" and in_memory <= 0.95 * free:
        # More than half of the memory is still better than a disk without room.
        on_disk = num_bytes <= 0.95 * shutil.disk_usage(folder).free
    what = "the pictures and prior maps" if num_prior_bytes else "the pictures"
    more_room = "give TMPDIR a folder with more room and set dataset.memory=disk"
    needs = [(what, in_memory, free, "memory", more_room)]
    if on_disk:
        needs = [("the pictures", num_bytes, shutil.disk_usage(folder).free, folder, more_room)]
        if num_prior_bytes:
            needs.append(("the prior maps", num_prior_bytes, free, "memory", "remove the maps"))
    for what, need, room, place, remedy in needs:
        if need > 0.95 * room:
            raise DataError(
                "dataset.img_downscale",
                f"{what} take {_readable(need)}, and {place} has {_readable(room)} free",
                f"raise dataset.img_downscale, or {remedy}",
            )
    for what, need, room, place, _ in needs:
        LOG.info("%s take %s of %s free in %s", what, _readable(need), _readable(room), place)
    return on_disk


def _readable(num_bytes: int) -> str:
    gib = num_bytes / 2.0**30
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{1024 * gib:.3g} MiB"


def load_pictures(
    views: Sequence[View],
    file_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    use_masks: bool,
    background: Literal["black", "white"],
    memory: Literal["auto", "ram", "disk"],
) -> tuple[ImageStack, ImageStack | None]:
    """Decode photographs and masks (or alpha channels) at their training sizes.

    Args:
        views: with mask paths where the masks are not alpha channels.
        file_sizes: (width, height) of the files.
        sizes: (width, height) wanted.
        use_masks: whether masks are wanted.
        background: under transparent pixels, where the transparency is not the mask.
        memory: where the pictures are kept, see ``CaptureConfig``.

    Raises:
        DataError: a file is unreadable or of the wrong size, masks say nothing, or memory does not suffice.
    """
    num_pixels = sum(width * height for width, height in sizes)
    # load_depths() and load_normals() take half-precision maps that every view has.
    num_priors = all(view.depth_path for view in views) + 3 * all(view.normal_path for view in views)
    on_disk = _use_disk(num_pixels * (4 if use_masks else 3), memory, 2 * num_priors * num_pixels)
    images = _StackWriter(sizes, 3, on_disk)
    masks = _StackWriter(sizes, 1, on_disk) if use_masks else None
    under = 255 if background == "white" else 0

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


def with_masks(root: Path, views: Sequence[View]) -> tuple[View, ...]:
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
