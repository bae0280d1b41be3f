"""Writes a scene in the layout of NeRF-Synthetic (Blender) captures.

::

    folder/
      transforms_train.json               camera_angle_x, frames: file_path (no suffix), transform_matrix
      transforms_test.json                the held-out views, where there are any
      train/NAME.png test/NAME.png        RGB, or RGBA with the masks as straight alpha

``transform_matrix`` takes OpenGL camera axes (x right, y up, z back) to the world. One ``camera_angle_x``
(the horizontal field of view in radians) holds for all views: square pixels, principal point in the middle.
Views that differ from that are resampled to one camera that shows only what each of them sees.

Source: Mildenhall et al., NeRF, ECCV 2020.
"""

import math
from pathlib import Path

import numpy as np

from process_data.views import View
from process_data.writers.resample import frame_size, shared_pinhole
from process_data.writers.views import (
    opengl_matrix,
    report_resampling,
    view_pixels,
    world_views,
    write_json,
)
from utils.images import write_png
from utils.parallel import map_in_threads
from utils.types import Scene

_TOLERANCE = 0.02
"""Pixels by which a ray may miss the shared camera before its picture is resampled."""


def write_blender(scene: Scene, folder: Path) -> list[Path]:
    """Write a scene in Blender's layout; files of the same names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: a lens is too wide for a pinhole, the views share too little, a file cannot be written.
    """
    sources = world_views(scene)
    width, height = frame_size(sources[0])
    focal = float(np.mean([(view.intrinsics[0, 0] + view.intrinsics[1, 1]) / 2 for view in sources]))
    targets = sources
    if not all(_is_shared(view, focal, (width, height)) for view in sources):
        targets = shared_pinhole(sources)
        report_resampling(sources, targets, "Blender's layout")
        width, height = frame_size(targets[0])
        focal = float(targets[0].intrinsics[0, 0])

    held_out = set(scene.test_indices)
    parts = ["test" if index in held_out else "train" for index in range(len(sources))]
    paths = [folder / part / view.image_path for part, view in zip(parts, sources, strict=True)]

    def write(index: int) -> None:
        rgb, mask = view_pixels(scene, index, sources[index], targets[index])
        pixels = rgb if mask is None else np.dstack([rgb, mask])
        write_png(paths[index], pixels)

    map_in_threads(write, range(len(sources)), "writing")
    written = []
    for part in dict.fromkeys(parts):
        frames = [
            {
                "file_path": f"./{part}/{view.image_path.stem}",
                "transform_matrix": opengl_matrix(view).tolist(),
            }
            for view, other in zip(targets, parts, strict=True)
            if other == part
        ]
        content = {"camera_angle_x": 2.0 * math.atan(width / (2.0 * focal)), "frames": frames}
        written.append(folder / f"transforms_{part}.json")
        write_json(written[-1], content)
    return paths + written


def _is_shared(view: View, focal: float, size: tuple[int, int]) -> bool:
    """Whether a view is the centred, square-pixelled pinhole of this focal length and size."""
    if view.lens is not None or view.size != size:
        return False
    wanted = np.array([[focal, 0.0, size[0] / 2], [0.0, focal, size[1] / 2], [0.0, 0.0, 1.0]])
    corners = np.array([[u, v, 1.0] for u in (0.0, size[0]) for v in (0.0, size[1])])
    difference = corners @ (view.intrinsics @ np.linalg.inv(wanted)).T - corners
    return bool(np.abs(difference).max() < _TOLERANCE)
