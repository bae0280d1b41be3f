"""Writes a scene as photographs with a COLMAP model.

::

    folder/
      images/NAME.png
      masks/NAME.png           255 = foreground, where the scene has masks
      sparse/0/                cameras.bin images.bin points3D.bin rigs.bin frames.bin

Every camera model is kept; equal cameras are shared. Only skew has no place in COLMAP's models: pictures of
cameras with it are resampled. Structure-from-motion points keep their tracks; where a photograph shows one is
worked out by projecting it, since scenes do not keep the measured positions.

pycolmap makes the files, so they are COLMAP's own.

Source: https://colmap.github.io/format.html.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from process_data.views import View
from process_data.writers.resample import frame_size
from process_data.writers.views import has_skew, reported, to_pinholes, world_views, write_pictures
from utils.errors import ExportError
from utils.types import Lens, Scene, SparsePoints


def write_colmap(scene: Scene, folder: Path) -> list[Path]:
    """Write a scene with a COLMAP model; files of the same names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: a file cannot be written.
    """
    sources = world_views(scene)
    targets = to_pinholes(sources, has_skew, "COLMAP")
    written = write_pictures(
        scene,
        sources,
        targets,
        [folder / "images" / view.image_path for view in targets],
        [folder / "masks" / view.image_path for view in targets],
    )
    model_dir = folder / "sparse" / "0"
    with reported(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
    model = _reconstruction(targets, scene.points, scene.world_from_scene.numpy())
    try:
        model.write_binary(model_dir)
    except (RuntimeError, ValueError, OSError) as error:
        raise ExportError(
            model_dir, f"COLMAP cannot write its model ({error})", "check free space and permissions"
        ) from error
    return [*written, *sorted(model_dir.iterdir())]


def _reconstruction(
    views: list[View], points: SparsePoints | None, world_from_scene: Float64[np.ndarray, "4 4"]
) -> Any:
    """Make a ``pycolmap.Reconstruction``; image i + 1 is view i, point i + 1 point i."""
    import pycolmap  # Takes a while to load, and other formats do without it.

    model = pycolmap.Reconstruction()
    cameras: dict[Lens, int] = {}
    pixels, point_ids = _observed_pixels(views, points, world_from_scene)
    tracks: dict[int, Any] = {}
    for index, view in enumerate(views):
        lens = view.lens or _pinhole_lens(view)
        if lens not in cameras:
            cameras[lens] = len(cameras) + 1
            width, height = lens.size
            model.add_camera_with_trivial_rig(
                pycolmap.Camera(
                    model=lens.model,
                    width=width,
                    height=height,
                    params=list(lens.params),
                    camera_id=cameras[lens],
                )
            )
        image = pycolmap.Image(
            name=view.image_path.name,
            keypoints=pixels[index],
            camera_id=cameras[lens],
            image_id=index + 1,
        )
        rotation = view.c2w[:, :3].T
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(rotation), -rotation @ view.c2w[:, 3])
        model.add_image_with_trivial_frame(image, pose)
        for position, point in enumerate(point_ids[index].tolist()):
            tracks.setdefault(point, pycolmap.Track()).add_element(index + 1, position)
    if points is not None:
        _add_points(model, points, tracks, world_from_scene)
    return model


def _pinhole_lens(view: View) -> Lens:
    k = view.intrinsics
    return Lens("PINHOLE", (float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2])), frame_size(view))


def _observed_pixels(
    views: list[View], points: SparsePoints | None, world_from_scene: Float64[np.ndarray, "4 4"]
) -> tuple[list[Float64[np.ndarray, "K 2"]], list[Int64[np.ndarray, " K"]]]:
    """Where each view shows the points that it observed, and which these are."""
    pixels, indices = [], []
    for index, view in enumerate(views):
        if points is None:
            pixels.append(np.empty((0, 2)))
            indices.append(np.empty(0, np.int64))
            continue
        seen = np.unique(points.observations[points.observations[:, 1] == index, 0])
        where = view.project(_to_world(points.positions[seen], world_from_scene))
        # A resampled picture may have lost some.
        inside = ((where >= 0) & (where <= np.array(frame_size(view)))).all(axis=1)
        pixels.append(where[inside])
        indices.append(seen[inside])
    return pixels, indices


def _to_world(
    positions: Float64[np.ndarray, "P 3"], world_from_scene: Float64[np.ndarray, "4 4"]
) -> Float64[np.ndarray, "P 3"]:
    return np.asarray(positions @ world_from_scene[:3, :3].T + world_from_scene[:3, 3])


def _add_points(
    model: Any,
    points: SparsePoints,
    tracks: dict[int, Any],
    world_from_scene: Float64[np.ndarray, "4 4"],
) -> None:
    """Add all points with their tracks and errors."""
    import pycolmap

    for index, position in enumerate(_to_world(points.positions, world_from_scene)):
        point_id = model.add_point3D(position, tracks.get(index, pycolmap.Track()), points.colors[index])
        error = float(points.errors[index])
        # COLMAP's value for an error that was not measured.
        model.point3D(point_id).error = error if np.isfinite(error) else -1.0
