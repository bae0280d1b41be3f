"""Writes a scene as one ``transforms.json``, as nerfstudio and instant-ngp read it.

::

    folder/
      transforms.json      camera_model, w, h, fl_x, fl_y, cx, cy, k1 ...; aabb, the region of interest;
                           frames: file_path, transform_matrix
      images/NAME.png
      masks/NAME.png       255 = foreground, where the scene has masks (``mask_path``)
      sparse_pc.ply        structure-from-motion points, where the scene has them (``ply_file_path``)

Intrinsics that all views share stand at the top, others in each frame. ``transform_matrix`` takes OpenGL
camera axes (x right, y up, z back) to the world. Held-out views are listed in ``test_filenames`` (and in
``val_filenames``, which nerfstudio measures on), the others in ``train_filenames``.

Lens distortion is kept where nerfstudio knows it: k1, k2, p1, p2 of OPENCV and k1 to k4 of OPENCV_FISHEYE.
Pictures of other lenses are resampled to pinholes. A file has one ``camera_model``, so where fisheye and
other lenses mix, the fisheye pictures are resampled as well.

Source: https://docs.nerf.studio/quickstart/data_conventions.html; Mueller et al., Instant NGP, SIGGRAPH 2022.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from process_data.views import View
from process_data.writers.resample import frame_size
from process_data.writers.views import (
    has_skew,
    opengl_matrix,
    reported,
    to_pinholes,
    with_two_focals,
    world_views,
    write_json,
    write_pictures,
)
from utils.types import Lens, Scene, SparsePoints

_DISTORTIONS = {"OPENCV": ("k1", "k2", "p1", "p2"), "OPENCV_FISHEYE": ("k1", "k2", "k3", "k4")}
"""What the parameters after fx, fy, cx, cy are called."""


def write_transforms(scene: Scene, folder: Path) -> list[Path]:
    """Write a scene as transforms.json; files of the same names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: a lens that must be resampled is too wide for a pinhole, or a file cannot be written.
    """
    return _write(scene, folder / "transforms.json", "", "sparse_pc.ply")


def write_cameras(scene: Scene, path: Path) -> list[Path]:
    """Write a scene as a file of this format with any name; its pictures go to a folder of that name.

    Raises:
        ExportError: as :func:`write_transforms`.
    """
    return _write(scene, path, f"{path.stem}/", f"{path.stem}/sparse_pc.ply")


def _write(scene: Scene, path: Path, prefix: str, points: str) -> list[Path]:
    folder = path.parent
    sources = world_views(scene)
    models = {_model(view) for view in sources}
    is_fisheye = models == {"OPENCV_FISHEYE"}
    targets = to_pinholes(sources, lambda view: has_skew(view) or not _is_kept(view, is_fisheye), path.name)

    images = [f"{prefix}images/{view.image_path.name}" for view in targets]
    masks = [f"{prefix}masks/{view.image_path.name}" for view in targets]
    written = write_pictures(
        scene, sources, targets, [folder / path for path in images], [folder / path for path in masks]
    )
    content: dict[str, Any] = {"camera_model": _file_model(targets)}
    if is_fisheye:
        # instant-ngp looks at this key only.
        content["is_fisheye"] = True
    intrinsics = [_intrinsics(view, str(content["camera_model"])) for view in targets]
    are_shared = all(values == intrinsics[0] for values in intrinsics)
    content |= intrinsics[0] if are_shared else {}
    content["frames"] = [
        {"file_path": image}
        | ({"mask_path": mask} if scene.masks is not None else {})
        | ({} if are_shared else values)
        | {"transform_matrix": opengl_matrix(view).tolist()}
        for view, image, mask, values in zip(targets, images, masks, intrinsics, strict=True)
    ]
    if scene.test_indices:
        held_out = set(scene.test_indices)
        content["train_filenames"] = [path for index, path in enumerate(images) if index not in held_out]
        content["val_filenames"] = content["test_filenames"] = [images[index] for index in scene.test_indices]
    content |= _region(scene.world_from_scene.numpy())
    if scene.points is not None:
        content["ply_file_path"] = points
        written.append(folder / points)
        _write_points(written[-1], scene.points, scene.world_from_scene.numpy())
    written.append(path)
    write_json(written[-1], content)
    return written


def _nerfstudio_lens(lens: Lens) -> Lens:
    """The lens in a model that nerfstudio knows, if its formula is one of those."""
    lens = with_two_focals(lens)
    if lens.model == "FISHEYE":
        return Lens("OPENCV_FISHEYE", (*lens.params, 0.0, 0.0, 0.0, 0.0), lens.size)
    if lens.model == "FULL_OPENCV" and not any(lens.params[8:]):
        return Lens("OPENCV", lens.params[:8], lens.size)
    return lens


def _model(view: View) -> str:
    return "PINHOLE" if view.lens is None else _nerfstudio_lens(view.lens).model


def _is_kept(view: View, is_fisheye: bool) -> bool:
    """Whether a view's lens can be written into a file of fisheye, or of perspective, lenses."""
    return _model(view) in (("OPENCV_FISHEYE",) if is_fisheye else ("PINHOLE", "OPENCV"))


def _file_model(views: list[View]) -> str:
    """The model that describes all views: the one with the most parameters."""
    models = {_model(view) for view in views}
    return next(model for model in ("OPENCV_FISHEYE", "OPENCV", "PINHOLE") if model in models)


def _intrinsics(view: View, file_model: str) -> dict[str, float | int]:
    """w, h, focal lengths, principal point and distortion under nerfstudio's names."""
    width, height = frame_size(view)
    values: dict[str, float | int] = {
        "w": width,
        "h": height,
        "fl_x": float(view.intrinsics[0, 0]),
        "fl_y": float(view.intrinsics[1, 1]),
        "cx": float(view.intrinsics[0, 2]),
        "cy": float(view.intrinsics[1, 2]),
    }
    names = _DISTORTIONS.get(file_model, ())
    distortion = (0.0,) * len(names) if view.lens is None else _nerfstudio_lens(view.lens).params[4:]
    return values | dict(zip(names, distortion, strict=True))


def _region(world_from_scene: Float64[np.ndarray, "4 4"]) -> dict[str, Any]:
    """The region of interest as instant-ngp's box: the cube whose corners lie on the sphere.

    instant-ngp fits this cube into its unit cube, and looks ``aabb_scale`` times as far: beyond the sphere.
    """
    center, radius = world_from_scene[:3, 3], np.cbrt(np.linalg.det(world_from_scene[:3, :3]))
    half = radius / np.sqrt(3.0)
    return {"aabb": [(center - half).tolist(), (center + half).tolist()], "aabb_scale": 16}


def _write_points(path: Path, points: SparsePoints, world_from_scene: Float64[np.ndarray, "4 4"]) -> None:
    """Write positions (world, 64 bits) and colours as a binary PLY file."""
    positions = points.positions @ world_from_scene[:3, :3].T + world_from_scene[:3, 3]
    layout = [(name, "<f8") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.empty(len(points), np.dtype(layout))
    for axis, name in enumerate("xyz"):
        rows[name] = positions[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        rows[name] = points.colors[:, channel]
    types = {"<f8": "double", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {types[kind]} {name}" for name, kind in layout]
    with reported(path):
        path.write_bytes("\n".join([*header, "end_header", ""]).encode() + rows.tobytes())
