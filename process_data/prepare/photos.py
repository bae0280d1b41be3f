"""Collect the photos of a capture: find them, turn them upright, convert what COLMAP cannot read.

A photo that is upright 8-bit RGB already is copied byte for byte. Otherwise its pixels are written anew, with
the rotation that EXIF asks for carried out and the other EXIF tags kept: COLMAP takes the focal length from
them.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from process_data.prepare.frames import VIDEO_SUFFIXES, sharpness
from process_data.views import pictures_in
from utils.errors import DataError
from utils.images import blend, open_picture, read_rgba
from utils.parallel import map_in_threads

LOG = logging.getLogger(__name__)

_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".avif"})
_ORIENTATION = 0x0112
"""EXIF tag: how the stored pixels must be turned to be upright, 1 = not at all."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COPIED_FORMATS = ("JPEG", "MPO", "PNG")
_MIN_PHOTOS = 3


@dataclass(frozen=True)
class Collected:
    """A photo of the source and what became of it."""

    source: Path
    """The user's file."""
    path: Path
    """The upright picture in the capture's images/ folder."""
    size: tuple[int, int]
    """(width, height) of the upright picture in pixels."""
    orientation: int
    """EXIF orientation 1..8 of the source, carried out in ``path``."""
    sharpness: float
    """Variance of the Laplacian (``frames.sharpness``)."""


def photo_folder(source: Path) -> Path:
    """The folder that holds the photos: the source itself, or images/ inside it.

    Raises:
        DataError: there is none, or it holds no pictures that can be read.
    """
    folder = next((source / name for name in ("images", "image") if (source / name).is_dir()), source)
    if pictures_in(folder):
        return folder
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    suffixes = {path.suffix.lower() for path in files}
    if suffixes & _HEIC_SUFFIXES:
        what = "holds HEIC or AVIF pictures, which cannot be read"
        raise DataError(folder, what, "export them as JPEG (on an iPhone: Formats, Most Compatible)")
    videos = [path.name for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    remedy = (
        f"give the video itself: {folder / videos[0]}" if videos else "give a folder of JPEG or PNG photos"
    )
    raise DataError(folder, "holds no pictures", remedy)


def collect_photos(folder: Path, images: Path, max_size: int) -> list[Collected]:
    """Write the upright photos of a folder to ``images``.

    Args:
        folder: the user's photos, which stay as they are.
        images: folder to fill (made if missing).
        max_size: longest side of a written picture in pixels, 0 = as it is.

    Returns:
        The photos in natural order. One that cannot be read, or whose name differs from another's in its
        suffix only, is left out with a warning.

    Raises:
        DataError: fewer than 3 photos are left.
    """
    others = [path.name for path in folder.iterdir() if path.suffix.lower() in _HEIC_SUFFIXES]
    if others:
        LOG.warning(
            "%d HEIC or AVIF pictures are left out, first %s: export them as JPEG", len(others), others[0]
        )
    sources: dict[str, Path] = {}
    for path in pictures_in(folder):
        # Masks are found by the stem, so two photos of one stem cannot be told apart.
        first = sources.setdefault(path.stem.casefold(), path)
        if first is not path:
            LOG.warning("%s is left out: %s has the same name", path, first.name)
    images.mkdir(parents=True, exist_ok=True)

    def collect(source: Path) -> Collected | None:
        try:
            return collect_photo(source, images, max_size)
        except DataError as error:
            LOG.warning("left out: %s", error)
            return None

    photos = [
        photo for photo in map_in_threads(collect, list(sources.values()), "photos") if photo is not None
    ]
    require_photos(folder, len(photos))
    return photos


def require_photos(source: Path, num_photos: int) -> None:
    """Refuse a capture that is too small.

    Raises:
        DataError: fewer than 3 photos.
    """
    if num_photos < _MIN_PHOTOS:
        remedy = "20 to 150 photos from all around the object are usual"
        raise DataError(source, f"only {num_photos} usable photos, at least {_MIN_PHOTOS} are needed", remedy)


def collect_photo(source: Path, images: Path, max_size: int) -> Collected:
    """Write one upright photo to ``images``; see :func:`collect_photos`.

    Raises:
        DataError: the picture cannot be read or written.
    """
    with open_picture(source) as picture:
        form, exif = picture.format, picture.getexif()
        is_plain = picture.mode == "RGB" and "transparency" not in picture.info and form in _COPIED_FORMATS
    stated = exif.get(_ORIENTATION, 1)
    orientation = stated if stated in _TRANSPOSE else 1
    pixels = turn_upright(read_rgb(source), orientation)
    height, width = pixels.shape[:2]
    is_jpeg = form in ("JPEG", "MPO")
    path = images / (source.name if is_plain else source.stem + (".jpg" if is_jpeg else ".png"))
    try:
        if is_plain and orientation == 1 and not 0 < max_size < max(width, height):
            shutil.copyfile(source, path)
        else:
            if 0 < max_size < max(width, height):
                factor = max_size / max(width, height)
                width, height = max(1, round(width * factor)), max(1, round(height * factor))
                pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
            exif.pop(_ORIENTATION, None)
            settings = {"quality": 95, "subsampling": 0} if is_jpeg else {"compress_level": 3}
            Image.fromarray(pixels).save(path, "JPEG" if is_jpeg else "PNG", exif=exif, **settings)
    except OSError as error:
        remedy = "check free space and permissions"
        raise DataError(path, f"cannot be written ({error.strerror or error})", remedy) from error
    return Collected(source, path, (width, height), orientation, sharpness(pixels))


def read_rgb(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture's stored pixels as 8-bit sRGB, what is transparent over black.

    Raises:
        DataError: the file is missing, empty, truncated or not a picture.
    """
    rgb, alpha = read_rgba(path)
    return rgb if alpha is None else blend(rgb, alpha, 0)


def turn_upright(pixels: UInt8[np.ndarray, "..."], orientation: int) -> UInt8[np.ndarray, "..."]:
    """Carry out what an EXIF orientation (1..8) asks for, on ``(H, W)`` or ``(H, W, 3)``."""
    if orientation not in _TRANSPOSE:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TRANSPOSE[orientation]))
