"""Resampling photographs to pinholes, for formats that know no other camera.

The pinhole keeps the lens's focal length (so nothing is blurred in the middle) and its frame is cut to the
largest rectangle around the centre that the lens sees in full: no pixel is invented, and what falls outside
the rectangle is lost. ::

    undistorted picture of a barrel-shaped lens      . . .-------. . .
                                                     .  +---------+  .
    the frame that is kept                           . /|         |\\ .
                                                     .  +---------+  .
                                                     . . .-------. . .

Angles are worked out on the lens itself (``utils/lens.py``), for every camera model of COLMAP.

Source of the idea: the image undistorter of COLMAP with blank_pixels = 0 (Schoenberger and Frahm, CVPR 2016).
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float64, UInt8

from process_data.views import View
from utils.errors import ExportError
from utils.lens import lens_rays, pinhole_part, project_to_lens

WIDEST = 150.0
"""Degrees: a pinhole that shows more spends nearly all of its pixels on its border."""
_SMALLEST_SHARE = 0.2
"""Share of a view's width and height that a pinhole must keep."""
_LARGEST_GROWTH = 2.0
"""How many times as wide as the photograph an undistorted picture may be."""
_REMEDY = "use --convert colmap, which keeps every lens, or transforms, which keeps those of OpenCV"


@dataclass(frozen=True)
class Window:
    """What a view sees in full, as a rectangle at distance 1 before the camera (x/z, y/z)."""

    left: float
    top: float
    right: float
    bottom: float


def frame_size(view: View) -> tuple[int, int]:
    """(width, height) of a view that is known to have one."""
    if view.size is None:
        raise ValueError(f"{view.image_path} has no size")
    return view.size


def pinhole_view(view: View) -> View:
    """The pinhole that a view's photograph is resampled to, with the view's focal length.

    Raises:
        ExportError: the lens is too wide for a pinhole.
    """
    window, size = find_window(view), frame_size(view)
    intrinsics = view.intrinsics if view.lens is None else pinhole_part(view.lens)
    focal = np.array([intrinsics[0, 0], intrinsics[1, 1]])
    extent = np.array([window.right - window.left, window.bottom - window.top])
    focal *= min(1.0, float((_LARGEST_GROWTH * np.array(size) / (extent * focal)).min()))
    # A frame that is cut to whole pixels stays inside of the window; the millionth undoes rounding where the
    # window is the whole picture.
    width, height = np.maximum(np.floor(extent * focal + 1e-6), 1).astype(int).tolist()
    matrix = np.array(
        [[focal[0], 0.0, -window.left * focal[0]], [0.0, focal[1], -window.top * focal[1]], [0.0, 0.0, 1.0]]
    )
    return replace(view, intrinsics=matrix, size=(width, height), lens=None)


def shared_pinhole(views: list[View]) -> list[View]:
    """One pinhole for all views, square-pixelled and centred, that shows only what each of them sees.

    Raises:
        ExportError: a lens is too wide for a pinhole, or the views share too little.
    """
    windows = [find_window(view) for view in views]
    half = np.array(
        [[min(-window.left, window.right), min(-window.top, window.bottom)] for window in windows]
    )
    extent = np.array([[window.right - window.left, window.bottom - window.top] for window in windows])
    common = half.min(axis=0)
    worst = int((2 * common / extent).min(axis=1).argmin())
    if not (2 * common / extent[worst] > _SMALLEST_SHARE).all():
        raise ExportError(
            views[worst].image_path.name,
            "one centred pinhole for all views would show too little of it",
            _REMEDY,
        )
    pinholes = [view.intrinsics if view.lens is None else pinhole_part(view.lens) for view in views]
    focal = float(np.median([(matrix[0, 0] + matrix[1, 1]) / 2 for matrix in pinholes]))
    largest = np.array([frame_size(view) for view in views]).max(axis=0)
    focal *= min(1.0, float((_LARGEST_GROWTH * largest / (2 * common * focal)).min()))
    # In float32 cameras 0.5 * 800 may have become 399.99998.
    width, height = np.maximum(np.floor(2 * common * focal + 1e-3), 1).astype(int).tolist()
    matrix = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    return [replace(view, intrinsics=matrix, size=(width, height), lens=None) for view in views]


def find_window(view: View) -> Window:
    """Find the largest rectangle around a view's centre that its picture shows in full.

    Raises:
        ExportError: the view spans :data:`WIDEST` degrees or more.
    """
    width, height = frame_size(view)
    row = np.stack([np.linspace(0, width, 257), np.full(257, height / 2)], axis=1)
    column = np.stack([np.full(257, width / 2), np.linspace(0, height, 257)], axis=1)
    across, down = _seen_rays(view, row), _seen_rays(view, column)
    for rays in (across, down):
        angle = _span(rays)
        # Seen from the side, a view may reach beyond the horizon before it is that wide.
        if angle >= WIDEST or rays[:, 2].min() < 0.05:
            raise ExportError(
                view.image_path.name, f"its lens spans {angle:.0f} degrees, too wide for a pinhole", _REMEDY
            )
    left, right = across[[0, -1], 0] / across[[0, -1], 2]
    top, bottom = down[[0, -1], 1] / down[[0, -1], 2]
    middle = _rays(view, np.array([[width / 2, height / 2]]))[0]
    x, y = middle[:2] / middle[2]
    share = _largest_share(view, np.array([left - x, top - y]), np.array([right - x, bottom - y]), (x, y))
    return Window(
        float(x + share * (left - x)),
        float(y + share * (top - y)),
        float(x + share * (right - x)),
        float(y + share * (bottom - y)),
    )


def _largest_share(
    view: View,
    upper_left: Float64[np.ndarray, " 2"],
    lower_right: Float64[np.ndarray, " 2"],
    center: tuple[float, float],
) -> float:
    """Shrink a rectangle around ``center`` until the view shows all of it; gives the factor."""
    steps = np.linspace(0.0, 1.0, 33)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    offsets = upper_left + grid * (lower_right - upper_left)

    def is_seen(share: float) -> bool:
        plane = np.array(center) + share * offsets
        rays = np.concatenate([plane, np.ones((len(plane), 1))], axis=1)
        pixels = _pixels(view, rays)
        inside = ((pixels >= -1e-3) & (pixels <= np.array(frame_size(view)) + 1e-3)).all(axis=1)
        if not inside.all():
            return False
        # Distortion polynomials fold back: a direction beyond their range lands inside of the picture, at a
        # pixel whose own direction is another one.
        back = _rays(view, pixels)
        return bool((np.abs(back / back[:, 2:] - rays).max(axis=1) < 1e-3 * (1 + np.abs(plane).max())).all())

    if is_seen(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        share = 0.5 * (low + high)
        low, high = (share, high) if is_seen(share) else (low, share)
    return low


def _rays(view: View, pixels: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 3"]:
    """Unit directions in the camera's axes; NaN where the lens has none."""
    if view.lens is not None:
        return lens_rays(view.lens, pixels)
    # Written out, because BLAS takes many threads and ten times as long for so narrow a product.
    k = view.intrinsics
    y = (pixels[:, 1] - k[1, 2]) / k[1, 1]
    x = (pixels[:, 0] - k[0, 2] - k[0, 1] * y) / k[0, 0]
    length = np.sqrt(x * x + y * y + 1.0)
    return np.stack([x / length, y / length, 1.0 / length], axis=1)


def _pixels(view: View, rays: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 2"]:
    """Pixels at which directions in the camera's axes appear."""
    if view.lens is not None:
        return project_to_lens(view.lens, rays)
    k = view.intrinsics
    x, y = rays[:, 0] / rays[:, 2], rays[:, 1] / rays[:, 2]
    return np.stack([k[0, 0] * x + k[0, 1] * y + k[0, 2], k[1, 1] * y + k[1, 2]], axis=1)


def _seen_rays(view: View, line: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "Q 3"]:
    """Directions along a line of pixels, without the ends at which the lens sees nothing."""
    rays = _rays(view, line)
    valid: Bool[np.ndarray, " P"] = np.isfinite(rays).all(axis=1)
    again = np.full_like(line, np.nan)
    again[valid] = _pixels(view, rays[valid])
    # A panorama's first and last columns are one direction, which comes back as either.
    if view.lens is None or view.lens.model != "EQUIRECTANGULAR":
        valid &= np.abs(again - line).max(axis=1) < 0.01
    middle = len(line) // 2
    if not valid[middle]:
        raise ExportError(view.image_path.name, "its lens sees nothing at the picture's centre", _REMEDY)
    gaps = np.flatnonzero(~valid)
    first = int(gaps[gaps < middle].max(initial=-1)) + 1
    last = int(gaps[gaps > middle].min(initial=len(line)))
    return rays[first:last]


def _span(rays: Float64[np.ndarray, "P 3"]) -> float:
    """Angle in degrees that a fan of directions sweeps, also beyond 180."""
    steps = np.clip((rays[1:] * rays[:-1]).sum(axis=1), -1.0, 1.0)
    return float(np.degrees(np.arccos(steps).sum()))


def lost_share(source: View, target: View) -> float:
    """Share (0..1) of the source's picture that the target does not show."""
    width, height = frame_size(source)
    u, v = (np.arange(64) + 0.5) / 64 * width, (np.arange(64) + 0.5) / 64 * height
    rays = _rays(source, np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2))
    shown = np.isfinite(rays).all(axis=1) & (rays[:, 2] > 0)
    pixels = _pixels(target, rays[shown])
    inside = ((pixels >= 0) & (pixels < np.array(frame_size(target)))).all(axis=1)
    return 1.0 - float(inside.sum()) / len(rays)


def resample(
    image: UInt8[np.ndarray, "H W C"], source: View, target: View, is_mask: bool
) -> UInt8[np.ndarray, "h w C"]:
    """Show what ``source`` photographed as ``target``, a pinhole at the same place, sees it.

    Args:
        image: pixels of ``source``.
        source: the camera of ``image``.
        target: a pinhole that shows nothing outside of what ``source`` sees.
        is_mask: masks are interpolated linearly, photographs with a Lanczos window, which keeps them sharp.
    """
    source_matrix = source.intrinsics if source.lens is None else pinhole_part(source.lens)
    shrink = float(np.max(np.diag(source_matrix)[:2] / np.diag(target.intrinsics)[:2]))
    # Where pixels grow, each becomes the mean of several finer ones: reading one place would alias.
    finer = max(1, int(np.ceil(shrink - 0.25)))
    width, height = frame_size(target)
    u, v = (np.arange(width * finer) + 0.5) / finer, (np.arange(height * finer) + 0.5) / finer
    rays = _rays(target, np.stack(np.meshgrid(u, v), axis=-1).reshape(-1, 2))
    # OpenCV counts pixel centres as integers.
    maps = (_pixels(source, rays) - 0.5).astype(np.float32).reshape(len(v), len(u), 2)
    fine: npt.NDArray[np.uint8] = cv2.remap(
        image,
        maps,
        None,
        cv2.INTER_LINEAR if is_mask else cv2.INTER_LANCZOS4,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if finer > 1:
        fine = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(fine, np.uint8).reshape(height, width, image.shape[2])
