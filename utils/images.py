"""Pictures in and out: decode image files to 8 bits, write PNGs, turn depth and normals into colours.

Pixels are taken as stored: an EXIF orientation tag is *not* applied, because camera parameters describe the
stored pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image

from utils.errors import DataError, ExportError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
"""File suffixes (lower case) that count as pictures in a capture folder."""


# Pillow takes pictures beyond 180 megapixels for an attack; stitched panoramas are larger than that. What a
# capture's pictures need in memory is checked when it is loaded.
Image.MAX_IMAGE_PIXELS = 1_000_000_000


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture with Pillow; its pixels are decoded when they are asked for.

    Pillow rather than OpenCV, because OpenCV fills the missing part of a truncated JPEG with grey and reports
    success.

    Raises:
        DataError: the file is missing, empty, truncated or not a picture, on opening or inside the block.
    """
    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError as error:
        raise DataError(path, "no such file", "check the path") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            path, f"too large a picture ({error})", "resize it with any picture editor, then its camera too"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(path, "the file is empty (0 bytes)", "copy it again from the original") from error
        reason = str(error).replace(str(path), "the file")
        raise DataError(
            path, f"not a readable picture ({reason})", "copy it again from the original"
        ) from error


def _decode(path: Path) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
    """Decode a picture to 8-bit RGB and straight alpha, ``None`` where the file has no transparency."""
    with open_picture(path) as picture:
        if picture.mode.startswith("I") or picture.mode == "F":
            values = np.asarray(picture).astype(np.float64)
            grey = _from_unit(values, path) if picture.mode == "F" else _from_sixteen_bits(values)
            return np.dstack([grey, grey, grey]), None
        if not has_transparency(picture):
            return np.array(picture.convert("RGB")), None
        rgba = np.array(picture.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])


def has_transparency(picture: Image.Image) -> bool:
    """Whether a picture has an alpha channel or a colour that counts as transparent."""
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _from_sixteen_bits(values: Float64[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling.
    return np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8)


def _from_unit(values: Float64[np.ndarray, "H W"], path: Path) -> UInt8[np.ndarray, "H W"]:
    # Written so that NaN is refused, too.
    if not (values.min() >= 0.0 and values.max() <= 1.0):
        raise DataError(
            path,
            f"holds floating-point values from {values.min():g} to {values.max():g}, not 0 to 1",
            "save it with 8 or 16 bits per channel",
        )
    return to_uint8(values)


def read_rgba(path: Path) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
    """Read a picture as 8-bit sRGB with straight alpha, or ``None`` where it is opaque everywhere.

    Grey and palette pictures are expanded, 16 bits and floating-point greys of 0..1 are scaled to 8.

    Raises:
        DataError: the file is missing, empty, truncated or not a picture, or its values are out of range.
    """
    rgb, alpha = _decode(path)
    return rgb, None if alpha is None or alpha.min() == 255 else alpha


def blend(
    rgb: UInt8[np.ndarray, "H W 3"], alpha: UInt8[np.ndarray, "H W"], under: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Composite straight colours over a grey of 0..255."""
    share = alpha[..., None].astype(np.uint16)
    return ((rgb * share + np.uint16(under) * (255 - share) + 127) // 255).astype(np.uint8)


def read_mask(path: Path) -> UInt8[np.ndarray, "H W"]:
    """Read a mask as 8-bit grey, 255 = foreground; soft edges are kept.

    The brightest colour channel counts, so that a coloured label is foreground. In a picture of one colour
    with a transparency channel the transparency is the mask. Masks stored as 0 and 1 are stretched to 0 and
    255.

    Raises:
        DataError: the file is missing, empty, truncated or not a picture.
    """
    rgb, alpha = _decode(path)
    mask = rgb.max(axis=2)
    if alpha is not None:
        is_plain = mask.min() == mask.max() and alpha.min() < 255
        mask = alpha if is_plain else np.minimum(mask, alpha)
    return np.where(mask > 0, 255, 0).astype(np.uint8) if mask.max() == 1 else np.ascontiguousarray(mask)


def write_png(
    path: Path, image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 4"] | UInt8[np.ndarray, "H W"]
) -> None:
    """Write an 8-bit RGB, RGBA (straight alpha) or grey picture, making the parent folders.

    Raises:
        ExportError: the folder or file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Level 3 writes three times as fast as the default at a few per cent more bytes.
        Image.fromarray(image).save(path, format="PNG", compress_level=3)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(
            path,
            f"cannot be written ({reason})",
            "check free space and permissions, or choose another folder",
        ) from error


def to_uint8(image: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Round values in 0..1 to 0..255; values outside are clipped and NaN becomes 0."""
    return (np.clip(np.nan_to_num(image, nan=0.0), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def depth_to_rgb(
    depth: Float32[np.ndarray, "H W"], opacity: Float32[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Colour depth with the Turbo map: near is red, far is blue, white where nothing is hit.

    Args:
        depth: distance along the ray, any unit, opacity-weighted (as in ``RenderOutput``).
        opacity: 0..1. The range of colours spans the 2nd to 98th percentile of the depth where it exceeds
            0.5, so that a few stray pixels do not flatten the picture.
    """
    is_solid = (opacity > 0.5) & np.isfinite(depth)
    white = np.full((*depth.shape, 3), 255, np.uint8)
    if not is_solid.any():
        return white
    # An opacity-weighted mean falls short of the surface where the opacity is below 1.
    surface = depth / np.maximum(opacity, 0.5)
    low, high = np.percentile(surface[is_solid], [2.0, 98.0])
    nearness = (high - surface) / max(high - low, 1e-9)
    colours = cv2.cvtColor(cv2.applyColorMap(to_uint8(nearness), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    share = np.clip(opacity, 0.0, 1.0)[..., None]
    return to_uint8((colours * share + white * (1.0 - share)) / 255.0)


def normal_to_rgb(
    normal: Float32[np.ndarray, "H W 3"], c2w: Float32[np.ndarray, "3 4"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Colour normals by ``(n + 1) / 2``; a zero normal (nothing hit) is mid-grey.

    Args:
        normal: in scene space, length <= 1.
        c2w: given, the picture is in the viewer's frame: red = to the right, green = up, blue = towards the
            viewer, so that a wall seen face-on has the familiar light blue (128, 128, 255). Absent, the scene
            axes are coloured.
    """
    if c2w is not None:
        # Row vectors times R give R^T n; the camera's y points down and its z away from the viewer.
        normal = (normal @ c2w[:, :3]) * np.array([1.0, -1.0, -1.0], np.float32)
    return to_uint8(0.5 * normal + 0.5)


def panel(images: list[UInt8[np.ndarray, "_ _ 3"]], gap: int = 4) -> UInt8[np.ndarray, "H W 3"]:
    """Put pictures side by side with white gaps; lower ones are filled up with white at the bottom.

    Args:
        images: at least one, heights and widths may differ.
        gap: pixels between neighbours.
    """
    if not images:
        raise ValueError("a panel needs at least one picture")
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] for image in images) + gap * (len(images) - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for image in images:
        canvas[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return canvas
