"""What all writers of captures share: a scene's views in the world, their lenses, their pixels, their files.

Everything is float64. A scene keeps its cameras in float32, so what is written is exact to one part in ten
million.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from process_data.views import OPENCV_FROM_OPENGL, View
from process_data.writers.resample import frame_size, lost_share, pinhole_view, resample
from utils.errors import ExportError
from utils.images import write_png
from utils.lens import pinhole_part
from utils.parallel import map_in_threads
from utils.types import Lens, Scene

LOG = logging.getLogger(__name__)

_TWO_FOCALS = {
    "SIMPLE_PINHOLE": ("PINHOLE", 0),
    "SIMPLE_RADIAL": ("OPENCV", 4),
    "RADIAL": ("OPENCV", 4),
    "SIMPLE_RADIAL_FISHEYE": ("OPENCV_FISHEYE", 4),
    "RADIAL_FISHEYE": ("OPENCV_FISHEYE", 4),
    "SIMPLE_FISHEYE": ("FISHEYE", 0),
    "SIMPLE_DIVISION": ("DIVISION", 1),
}
"""Models with one focal length: the same formula with two of them, and how many parameters follow."""
_STRAIGHT = ("PINHOLE", "OPENCV", "FULL_OPENCV")
"""Models that are a pinhole when all parameters of their distortion are zero."""
_SKEW_TOLERANCE = 0.01
"""Pixels by which dropping a skew may move a ray."""


def world_views(scene: Scene) -> list[View]:
    """A scene's cameras in the world; ``image_path`` is a bare file name (.png) that no other view has."""
    similarity = scene.world_from_scene.numpy()
    scale = np.cbrt(np.linalg.det(similarity[:3, :3]))
    views = []
    for index, stem in enumerate(_stems(scene.image_names)):
        pose = scene.cameras.c2w[index].double().numpy()
        left, _, right = np.linalg.svd(similarity[:3, :3] @ pose[:, :3] / scale)
        center = similarity[:3, :3] @ pose[:, 3] + similarity[:3, 3]
        width, height = scene.cameras.size[index].tolist()
        intrinsics = scene.cameras.intrinsics[index].double().numpy()
        lens = None
        if scene.cameras.lenses:
            lens = scale_lens(scene.cameras.lenses[index], (width, height))
            intrinsics = pinhole_part(lens)
            lens = None if _is_straight(lens) else lens
        c2w = np.concatenate([left @ right, center[:, None]], axis=1)
        views.append(View(Path(f"{stem}.png"), c2w, intrinsics, (width, height), lens))
    return views


def _stems(names: Sequence[str]) -> list[str]:
    """File names without suffix; numbered where two would be the same on any file system."""
    stems = [Path(name).stem for name in names]
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{index:06d}_{stem}" for index, stem in enumerate(stems)]


def scale_lens(lens: Lens, size: tuple[int, int]) -> Lens:
    """The lens of a picture that was resized to ``size``.

    Focal lengths and principal point scale with the picture, distortion stays. A model with one focal length
    becomes the one with two where width and height scale differently (SIMPLE_RADIAL: OPENCV).
    """
    factor = (size[0] / lens.size[0], size[1] / lens.size[1])
    if lens.model == "EQUIRECTANGULAR":
        return Lens(lens.model, (float(size[0]), float(size[1])), size)
    if factor[0] != factor[1]:
        lens = with_two_focals(lens)
    scales: tuple[float, ...]
    scales = (factor[0], *factor) if lens.model in _TWO_FOCALS else (*factor, *factor)
    projection = tuple(value * scale for value, scale in zip(lens.params, scales, strict=False))
    return Lens(lens.model, projection + lens.params[len(scales) :], size)


def with_two_focals(lens: Lens) -> Lens:
    """The same lens in a model that has a focal length per axis."""
    if lens.model not in _TWO_FOCALS:
        return lens
    model, count = _TWO_FOCALS[lens.model]
    focal, cx, cy, *distortion = lens.params
    padding = [0.0] * (count - len(distortion))
    return Lens(model, (focal, focal, cx, cy, *distortion, *padding), lens.size)


def _is_straight(lens: Lens) -> bool:
    lens = with_two_focals(lens)
    return lens.model in _STRAIGHT and not any(lens.params[4:])


def has_skew(view: View) -> bool:
    """Whether a pinhole without skew would miss the view's rays."""
    # Skew moves pixels in proportion to their distance from the principal point's row.
    k, height = view.intrinsics, frame_size(view)[1]
    rows = max(abs(k[1, 2]), abs(height - k[1, 2]))
    return view.lens is None and bool(abs(k[0, 1]) * rows / k[1, 1] > _SKEW_TOLERANCE)


def to_pinholes(views: list[View], needs: Callable[[View], bool], format_name: str) -> list[View]:
    """Replace the views that a format cannot describe by pinholes, and say so in the log.

    Args:
        views: as photographed.
        needs: whether a view must be replaced.
        format_name: for the log.

    Raises:
        ExportError: a lens is too wide for a pinhole.
    """
    targets = [pinhole_view(view) if needs(view) else view for view in views]
    report_resampling(views, targets, format_name)
    return targets


def report_resampling(sources: list[View], targets: list[View], format_name: str) -> None:
    """Say in the log how many pictures are resampled, and how much of them is lost."""
    changed = [pair for pair in zip(sources, targets, strict=True) if pair[0] is not pair[1]]
    if not changed:
        return
    lost = 100.0 * float(np.mean([lost_share(source, target) for source, target in changed]))
    level = logging.WARNING if lost > 25.0 else logging.INFO
    before, after = frame_size(changed[0][0]), frame_size(changed[0][1])
    LOG.log(
        level,
        "%s cannot describe the cameras of %d of %d pictures: these are resampled to pinholes (the first "
        "from %dx%d to %dx%d pixels); %.1f %% of their area is lost%s",
        format_name,
        len(changed),
        len(sources),
        *before,
        *after,
        lost,
        "; colmap keeps every lens" if any(source.lens is not None for source, _ in changed) else "",
    )


def view_pixels(
    scene: Scene, index: int, source: View, target: View
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None]:
    """A view's picture and mask as ``target`` sees them; untouched where that is ``source`` itself."""
    rgb = scene.images.image(index).numpy()
    mask = None if scene.masks is None else scene.masks.image(index).numpy()
    if target is not source:
        rgb = resample(rgb, source, target, is_mask=False)
        mask = None if mask is None else resample(mask, source, target, is_mask=True)
    return rgb, None if mask is None else mask[..., 0]


def write_pictures(
    scene: Scene,
    sources: list[View],
    targets: list[View],
    image_paths: list[Path],
    mask_paths: list[Path],
) -> list[Path]:
    """Write all pictures, and masks where the scene has them, as PNG files.

    Returns:
        What was written.

    Raises:
        ExportError: a file cannot be written.
    """

    def write(index: int) -> None:
        rgb, mask = view_pixels(scene, index, sources[index], targets[index])
        write_png(image_paths[index], rgb)
        if mask is not None:
            write_png(mask_paths[index], mask)

    map_in_threads(write, range(len(sources)), "writing")
    return image_paths + (mask_paths if scene.masks is not None else [])


def square_matrix(pose: Float64[np.ndarray, "3 4"]) -> Float64[np.ndarray, "4 4"]:
    """A pose with its fourth row."""
    return np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])


def opengl_matrix(view: View) -> Float64[np.ndarray, "4 4"]:
    """A pose for formats whose camera axes are OpenGL's: x right, y up, z back."""
    matrix = square_matrix(view.c2w)
    matrix[:3, :3] = matrix[:3, :3] @ OPENCV_FROM_OPENGL
    return matrix


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with all digits of its numbers.

    Raises:
        ExportError: the file cannot be written.
    """
    with reported(path):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be written into one line.

    Raises:
        ExportError: the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise ExportError(
            path,
            f"cannot be written ({error.strerror or error})",
            "check free space and permissions, or choose another folder",
        ) from error
