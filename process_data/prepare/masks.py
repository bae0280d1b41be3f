"""Foreground masks of a capture: from a folder, an alpha channel, rembg, or the motion of a turning object.

Every mask is written as ``masks/<stem of the photo>.png``, 255 = foreground, 0 = the rest, upright and of the
size of its photo.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from process_data.prepare.photos import Collected, read_rgb, turn_upright
from process_data.views import find_masks, pictures_in
from utils.doctor import install_hint
from utils.errors import ConfigError, DataError
from utils.images import has_transparency, open_picture, read_mask, read_rgba, write_png
from utils.parallel import map_in_threads

LOG = logging.getLogger(__name__)

Mask = UInt8[np.ndarray, "H W"]
_MOTION_SIDE = 320
"""Turntable masks are estimated on copies with this longest side: noise and sharp edges average out."""
_MOTION_PICTURES = 41
"""Pictures whose median is taken for the static background."""
_MIN_DIFFERENCE = 10.0
"""Grey levels (0..255) below which a difference to the static background is noise."""


def mask_folder(photos_folder: Path) -> Path | None:
    """The masks/ (or mask/) folder that belongs to a folder of photos, inside it or beside images/."""
    places = [photos_folder]
    if photos_folder.name in ("images", "image"):
        places.append(photos_folder.parent)
    found = [place / name for place in places for name in ("masks", "mask") if (place / name).is_dir()]
    return found[0] if found else None


def match_masks(folder: Path, photo_names: list[str]) -> list[Path]:
    """Find the mask of each photo by its stem.

    Accepted for IMG_1.jpg are ``IMG_1.png`` (or another picture suffix), ``IMG_1.jpg.png`` (COLMAP's way) and
    ``IMG_1_mask.png``; upper and lower case are the same.

    Args:
        folder: holds the masks.
        photo_names: file names of the photos.

    Returns:
        One mask per photo.

    Raises:
        DataError: a photo has no mask.
    """
    by_stem = {path.stem.casefold(): path for path in pictures_in(folder)}
    found: list[Path | None] = []
    for name in photo_names:
        stem = Path(name).stem
        keys = [key.casefold() for key in (name, stem, f"{stem}_mask")]
        found.append(next((by_stem[key] for key in keys if key in by_stem), None))
    return _one_each(folder, photo_names, found, ".png")


def masks_beside(folder: Path, photo_names: list[str]) -> list[Path]:
    """Find ``IMG_1_mask.png`` beside each ``IMG_1.jpg``.

    Returns:
        One mask per photo, or nothing where no photo has one.

    Raises:
        DataError: some photos have a mask, and one has none.
    """
    found = find_masks(folder, [folder / name for name in photo_names])
    return _one_each(folder, photo_names, found, "_mask.png") if any(found) else []


def _one_each(folder: Path, photo_names: list[str], found: list[Path | None], ending: str) -> list[Path]:
    missing = [name for name, mask in zip(photo_names, found, strict=True) if mask is None]
    if missing:
        what = f"no mask for {len(missing)} of {len(photo_names)} photos, first {missing[0]}"
        raise DataError(folder, what, f"add {Path(missing[0]).stem}{ending}, or give masks=none")
    return [mask for mask in found if mask is not None]


def make_masks(kind: str, photos: list[Collected], photos_folder: Path, target: Path) -> str | None:
    """Write the masks of all photos.

    Args:
        kind: ``auto``, ``none``, ``folder``, ``alpha`` or ``rembg``.
        photos: upright photos in natural order.
        photos_folder: where the user's photos lie.
        target: folder to fill (made when there are masks).

    Returns:
        Where the masks are from, in words; ``None`` when there are none.

    Raises:
        ConfigError: ``masks=rembg`` and it is not installed.
        DataError: masks that were asked for by name are missing, unreadable or of another size.
    """
    if kind == "none":
        return None
    if kind in ("auto", "folder"):
        folder, names = mask_folder(photos_folder), [photo.source.name for photo in photos]
        paths = masks_beside(photos_folder, names) if folder is None else match_masks(folder, names)
        if paths:
            files = dict(zip(names, paths, strict=True))
            _write_masks(photos, target, lambda photo: fit_mask(files[photo.source.name], photo))
            return f"masks from {folder or photos_folder}"
    if kind == "folder":
        remedy = "put the masks there, or give masks=none"
        raise DataError(photos_folder / "masks", "no such folder", remedy)
    if kind == "rembg":
        _write_masks(photos, target, _rembg())
        return "masks by rembg"
    if all(map_in_threads(_has_alpha, photos, "alpha")):
        _write_masks(photos, target, _alpha)
        return "masks from the photos' alpha channels"
    if kind == "alpha":
        what = "not all photos have an alpha channel with transparent pixels"
        raise DataError(photos_folder, what, "give masks=folder, masks=rembg or masks=none")
    return None


def fit_mask(path: Path, photo: Collected) -> Mask:
    """Read a mask and bring it to the upright photo's size.

    A mask of the upright shape is taken as it is. One of the shape of the stored, lying pixels is turned as
    EXIF asks for. An upside-down photo has one shape for both: its mask is taken as upright, which is how
    viewers show the photo.

    Raises:
        DataError: unreadable, or of another shape than the photo.
    """
    mask = read_mask(path)
    width, height = photo.size
    if not _is_alike(mask, width, height):
        mask = turn_upright(mask, photo.orientation)
    if not _is_alike(mask, width, height):
        what = f"{mask.shape[1]}x{mask.shape[0]} pixels do not fit {photo.source.name} ({width}x{height})"
        raise DataError(path, what, "give the mask the size of its photo, or masks=none")
    return _resized(mask, (width, height))


def _is_alike(mask: Mask, width: int, height: int) -> bool:
    """Whether a mask has the shape of a picture, up to a scale and a rounded pixel."""
    scaled_height = mask.shape[0] * width / mask.shape[1]
    return abs(scaled_height - height) <= max(1.0, width / mask.shape[1])


def _resized(mask: Mask, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """The mask at (width, height), 0 or 255."""
    if (mask.shape[1], mask.shape[0]) != size:
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR)
    return np.where(mask >= 128, 255, 0).astype(np.uint8)


def _write_masks(photos: list[Collected], target: Path, make: Callable[[Collected], Mask]) -> None:
    def write(photo: Collected) -> float:
        mask = make(photo)
        write_png(target / f"{photo.path.stem}.png", mask)
        return float(mask.mean()) / 255.0

    shares = map_in_threads(write, photos, "masks")
    if max(shares) == 0.0 or min(shares) == 1.0:
        colour = "black" if max(shares) == 0.0 else "white"
        remedy = "255 marks the object, 0 the rest; or give masks=none"
        raise DataError(target, f"every mask is {colour} everywhere", remedy)
    empty = [photo.source.name for photo, share in zip(photos, shares, strict=True) if share == 0.0]
    if empty:
        LOG.warning(
            "%d of %d masks are black everywhere, first that of %s", len(empty), len(photos), empty[0]
        )


def _has_alpha(photo: Collected) -> bool:
    with open_picture(photo.source) as picture:
        if not has_transparency(picture):
            return False
    alpha = read_rgba(photo.source)[1]
    return alpha is not None and bool(alpha.min() < 128)


def _alpha(photo: Collected) -> Mask:
    alpha = read_rgba(photo.source)[1]
    assert alpha is not None
    return _resized(turn_upright(alpha, photo.orientation), photo.size)


def _rembg() -> Callable[[Collected], Mask]:
    """Foreground by a network of the optional package rembg."""
    try:
        import rembg
    except ImportError as error:
        what = f"rembg is not installed ({error})"
        raise ConfigError("masks", what, f"{install_hint('rembg')}, or give masks=none") from error
    try:
        session: Any = rembg.new_session()
    except Exception as error:  # It downloads its network; whatever goes wrong there comes from outside.
        raise ConfigError(
            "masks", f"rembg cannot start ({error})", "see rembg's notes on its models"
        ) from error

    def make(photo: Collected) -> Mask:
        with open_picture(photo.path) as picture:
            mask = rembg.remove(picture.convert("RGB"), session=session, only_mask=True)
        return _resized(np.array(mask.convert("L")), photo.size)

    return make


# ---------------------------------------------------------------------------------------------- turntable


def write_motion_masks(photos: list[Collected], target: Path) -> None:
    """Estimate where the turning object is, from what differs from the static background.

    Args:
        photos: taken by a camera that does not move; all of one size.
        target: folder for the masks.

    Raises:
        DataError: the pictures differ in size, or nothing moves.
    """
    sizes = {photo.size for photo in photos}
    if len(sizes) > 1:
        where, remedy = photos[0].source.parent, "leave out turntable=true, or give masks"
        raise DataError(where, "photos of a static camera have one size, these have several", remedy)
    width, height = photos[0].size
    factor = min(1.0, _MOTION_SIDE / max(width, height))
    small_size = (max(1, round(width * factor)), max(1, round(height * factor)))

    def shrink(photo: Collected) -> UInt8[np.ndarray, "h w 3"]:
        return cv2.resize(read_rgb(photo.path), small_size, interpolation=cv2.INTER_AREA)

    masks = motion_masks(np.stack(map_in_threads(shrink, photos, "motion")))
    if not masks.any():
        what = "nothing moves between the photos"
        raise DataError(
            photos[0].source.parent, what, "turntable=true is for an object that turns before a still camera"
        )
    by_path = {photo.path: mask for photo, mask in zip(photos, masks, strict=True)}
    _write_masks(
        photos, target, lambda photo: _resized(by_path[photo.path].astype(np.uint8) * 255, photo.size)
    )


def motion_masks(pictures: UInt8[np.ndarray, "N H W 3"]) -> Bool[np.ndarray, "N H W"]:
    """Where each picture of a static camera differs from the median of all.

    Inside the object the median is object as well, so a single picture shows holes there. They are filled
    with what lies inside the outline, and with pixels that keep changing over the whole series.

    Args:
        pictures: small sRGB copies.

    Returns:
        The object's masks: one connected piece each, a pixel or two too wide. All false where nothing moves.
    """
    chosen = np.unique(np.linspace(0, len(pictures) - 1, _MOTION_PICTURES).round().astype(int))
    background = np.median(pictures[chosen], axis=0)
    difference = np.stack([_blurred_difference(picture, background) for picture in pictures])
    threshold = max(_MIN_DIFFERENCE, _otsu(difference))
    # A static pixel differs rarely (a passing shadow); one of the object in about every other picture.
    changes_often = (difference > threshold).mean(axis=0) > 0.34
    side = max(3, round(max(pictures.shape[1:3]) / 40)) | 1
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    result = np.zeros(pictures.shape[:3], dtype=bool)
    for index, values in enumerate(difference):
        moving = ((values > threshold) | (changes_often & (values > 0.5 * threshold))).astype(np.uint8)
        moving = cv2.morphologyEx(moving, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        moving = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, disk)
        result[index] = _largest_piece_filled(moving)
    return result


def _blurred_difference(
    picture: UInt8[np.ndarray, "H W 3"], background: Float[np.ndarray, "H W 3"]
) -> Float32[np.ndarray, "H W"]:
    """Largest channel difference, smoothed against noise."""
    difference = np.abs(picture.astype(np.float32) - background.astype(np.float32)).max(axis=2)
    return cv2.GaussianBlur(difference, (0, 0), 1.0)


def _otsu(values: Float32[np.ndarray, "N H W"]) -> float:
    """Threshold between the two groups that the values fall into best (Otsu 1979), halved.

    Halved, because the object's differences spread from nothing to full contrast, and the upper group is
    drawn to the contrast.
    """
    levels = np.clip(values, 0, 255).astype(np.uint8).reshape(-1, 1)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return 0.5 * float(threshold)


def _largest_piece_filled(mask: UInt8[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The largest connected piece, its holes filled."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(mask)
    if outlines:
        largest = max(outlines, key=cv2.contourArea)
        cv2.drawContours(filled, [largest], -1, 1, thickness=cv2.FILLED)
    return filled.astype(bool)
