"""Captures described by a ``transforms.json``, as instant-ngp, nerfstudio and many scanning apps write it.

::

    root_dir/
      transforms.json          cameras and poses; dataset.root_dir may also name the file itself
      images/0001.jpg ...      photographs, where each frame's file_path says
      masks/0001.png ...       foreground masks, only read with ``apply_mask``; or a frame's mask_path

    {"fl_x": 1375.5, "fl_y": 1374.5, "cx": 554.6, "cy": 965.3, "w": 1080, "h": 1920,
     "k1": 0.058, "k2": -0.081, "p1": -0.001, "p2": 0.0002,
     "frames": [{"file_path": "images/0001.jpg", "transform_matrix": [[...], [...], [...], [...]]}, ...]}

Everything about the camera may stand at the top, for all frames, or in a frame, which then goes first.
``transform_matrix`` is camera to world with OpenGL's camera axes (x right, y up, z backward); files that do
not keep to that are read with ``convention`` and ``poses``, or ``convention=auto``. Pixels have their centres
at +0.5, so cx and cy are taken as written.

nerfstudio turns (``applied_transform``) and scales (``applied_scale``) the world of the capture before it
writes poses and sparse points; both are undone here, so that exports lie in the original world. instant-ngp's
``scale`` and ``offset`` only say how *it* maps the poses into its unit cube, and move nothing here.

Source: instant-ngp, src/nerf_loader.cu and docs/nerf_dataset_tips.md, https://github.com/NVlabs/instant-ngp;
nerfstudio, data conventions and nerfstudio_dataparser.py, https://github.com/nerfstudio-project/nerfstudio.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from process_data.capture import CaptureConfig, build_scene
from process_data.formats.transforms_file import (
    Frame,
    checked_array,
    checked_number,
    find_file,
    find_json,
    frame_view,
    homogeneous,
    read_frames,
    read_json,
)
from process_data.geometry import up_axis
from process_data.inspection.conventions import Axes, Direction, check_matrices, require_convention
from process_data.views import Capture, checked_pose
from utils.errors import DataError
from utils.types import Scene, SparsePoints

LOG = logging.getLogger(__name__)

_LAYOUT = (
    "expected is a folder with transforms.json, or that file itself; "
    "for transforms_train.json set dataset.name=blender"
)
_NGP_SCALE, _NGP_OFFSET = 0.33, 0.5
"""instant-ngp maps poses into its unit cube by ``scale * position + offset``; these are its defaults."""


@dataclass(frozen=True)
class TransformsConfig(CaptureConfig):
    """Where a capture with a transforms.json lies and how to read it."""

    name: str = "transforms"
    """Format of the capture."""
    convention: Literal["auto", "opengl", "opencv"] = "opengl"
    """Camera axes of the poses: opengl (x right, y up, z backward) or opencv (x right, y down, z forward);
    auto: these and poses as the photographs show."""
    poses: Literal["c2w", "w2c"] = "c2w"
    """What transform_matrix maps: camera to world, or world to camera; not used with convention=auto."""
    use_aabb: bool = False
    """Without an aabb in the file: take instant-ngp's box, its unit cube times aabb_scale, as the region."""


def load_transforms(config: TransformsConfig) -> Scene:
    """Load a capture with a transforms.json.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent, or the photographs do not
            show the poses' convention; the line names the file.
        ConfigError: ``dataset.holdout`` or a key of the region does not fit the capture.
    """
    path = find_json(config.root_dir, "transforms.json", _LAYOUT)
    content = read_json(path)
    world_from_file = _world_from_file(content, path)
    frames, test_views = _split(read_frames(content, path), content, path)
    _report_unused(frames)
    convention, poses = config.convention, config.poses
    if convention == "auto":
        convention, poses = _find_convention(frames, path)
    views = tuple(
        frame_view(frame, convention, poses, world_from_file, config.apply_mask) for frame in frames
    )
    region, up = _region(content, path, world_from_file, config.use_aabb), _up(content, path, world_from_file)
    if region is not None and up is None:
        # A box has no upper side.
        up = up_axis(np.stack([view.c2w for view in views]))
    capture = Capture(
        path.parent,
        views,
        points=_read_points(content, path, world_from_file),
        world_from_scene=region,
        test_views=test_views,
        up=up,
    )
    return build_scene(capture, config)


# ----------------------------------------------------------------------------------------------------------
# the world, splits and extras


def _find_convention(frames: Sequence[Frame], path: Path) -> tuple[Axes, Direction]:
    """The camera axes and the direction under which rays through matched features meet."""
    # Neither changes intrinsics, lens and size, which are all that is taken from these views.
    views = [frame_view(frame, "opengl", "c2w", np.eye(4), use_mask=False) for frame in frames]
    report = check_matrices(
        np.stack([homogeneous(np.asarray(frame.entry["transform_matrix"], np.float64)) for frame in frames]),
        np.stack([view.intrinsics for view in views]),
        [view.lens for view in views],
        [view.image_path for view in views],
        [view.size for view in views if view.size is not None],
    )
    chosen = require_convention(report, path)
    LOG.info("%s", report.table())
    return chosen


def _world_from_file(content: dict[str, Any], path: Path) -> Float64[np.ndarray, "4 4"]:
    """The inverse of what nerfstudio did to the world before it wrote the poses."""
    file_from_world = np.eye(4)
    if content.get("applied_transform") is not None:
        applied = content["applied_transform"]
        checked_pose(applied, path, "applied_transform")
        file_from_world = homogeneous(np.asarray(applied, np.float64))
    if content.get("applied_scale") is not None:
        scale = checked_number(content["applied_scale"], path, "applied_scale")
        if not scale > 0:
            raise DataError(path, f"applied_scale is {scale:g}", "write a factor above 0, or remove it")
        file_from_world = np.diag([scale, scale, scale, 1.0]) @ file_from_world
    if not np.array_equal(file_from_world, np.eye(4)):
        LOG.info("applied_transform and applied_scale are undone: the world is that of the original capture")
    return np.linalg.inv(file_from_world)


def _split(
    frames: list[Frame], content: dict[str, Any], path: Path
) -> tuple[list[Frame], tuple[int, ...] | None]:
    """The frames to load, and which of them nerfstudio's lists hold out; ``None`` without such lists."""
    lists = {
        split: _listed_photos(content, path, f"{split}_filenames")
        for split in ("train", "val", "test")
        if content.get(f"{split}_filenames") is not None
    }
    if not lists:
        return frames, None
    held_out = lists.get("test") or lists.get("val") or set()
    listed = set().union(*lists.values())
    train = lists.get("train", {frame.photo for frame in frames} - listed)
    both = sorted(train & held_out)
    if both:
        LOG.warning(
            "%s: %d photographs are listed for training and for measuring, and are held out: %s",
            path,
            len(both),
            both[0].name,
        )
    kept = [frame for frame in frames if frame.photo in train | held_out]
    if all(frame.photo in held_out for frame in kept):
        raise DataError(
            path,
            "no photograph is left to train on",
            "correct train_filenames and test_filenames, or remove them",
        )
    if len(kept) < len(frames):
        LOG.info(
            "%s: %d of %d photographs are left out, as train_filenames, val_filenames and test_filenames say",
            path,
            len(frames) - len(kept),
            len(frames),
        )
    return kept, tuple(index for index, frame in enumerate(kept) if frame.photo in held_out)


def _listed_photos(content: dict[str, Any], path: Path, key: str) -> set[Path]:
    names = content[key]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(path, f"{key} is not a list of texts", f"list values of file_path, or remove {key}")
    found = (find_file(path.parent, name) for name in names)
    return {photo for photo in found if photo is not None}


def _report_unused(frames: Sequence[Frame]) -> None:
    """Say once what of the capture is not used."""
    for frame in frames:
        moving = frame.photo.with_name(f"dynamic_mask_{frame.photo.stem}.png")
        if moving.is_file():
            LOG.warning("%s and its like mark moving things, not the object: they are not used", moving)
            break


def _read_points(
    content: dict[str, Any], path: Path, world_from_file: Float64[np.ndarray, "4 4"]
) -> SparsePoints | None:
    """The sparse points that the file names, in the world; ``None`` if there are none."""
    name = content.get("ply_file_path")
    if name is None:
        return None
    ply_path = path.parent / str(name).replace("\\", "/")
    try:
        is_there = ply_path.is_file()
    except (OSError, ValueError) as error:
        what = f"ply_file_path {str(name)[:80]!r} cannot be looked up ({error.__class__.__name__})"
        raise DataError(path, what, "correct ply_file_path, or remove it") from error
    if not is_there:
        LOG.warning("%s: ply_file_path names %s, which does not exist: no sparse points", path, name)
        return None
    import trimesh  # Only captures with sparse points need it.

    try:
        cloud = trimesh.load(ply_path, file_type="ply", process=False)
        positions = np.array(cloud.vertices, np.float64).reshape(-1, 3)
        rgba = np.asarray(
            cloud.colors if isinstance(cloud, trimesh.PointCloud) else cloud.visual.vertex_colors
        )
    except Exception as error:  # The parser raises whatever a damaged file makes it stumble over.
        remedy = f"copy it again from the original, or remove ply_file_path from {path.name}"
        raise DataError(ply_path, f"not a readable PLY file ({error})", remedy) from error
    colors = np.full((len(positions), 3), 128, np.uint8)
    if rgba.shape[:1] == (len(positions),) and rgba.ndim == 2:
        colors = rgba[:, :3].astype(np.uint8)
    is_finite = np.isfinite(positions).all(axis=1)
    positions, colors = positions[is_finite], colors[is_finite]
    if len(positions) == 0:
        LOG.warning("%s holds no points", ply_path)
        return None
    LOG.info("%d sparse points from %s", len(positions), ply_path)
    return SparsePoints(
        positions @ world_from_file[:3, :3].T + world_from_file[:3, 3],
        colors,
        np.full(len(positions), np.nan),
        np.zeros((0, 2), np.int64),
    )


def _region(
    content: dict[str, Any], path: Path, world_from_file: Float64[np.ndarray, "4 4"], use_aabb: bool
) -> Float64[np.ndarray, "4 4"] | None:
    """The unit sphere that the file names: around ``aabb`` or ``render_aabb``, or within instant-ngp's box.

    ``aabb`` is in the frame of the poses, ``render_aabb`` in instant-ngp's unit cube, with axes (y, z, x).
    """
    scale, offset = _ngp_mapping(content, path)
    key = next((key for key in ("aabb", "render_aabb") if content.get(key) is not None), None)
    if key is not None:
        corners = checked_array(content[key], (2, 3), path, key)
        if key == "render_aabb":
            corners = (corners[:, [2, 0, 1]] - offset) / scale
        center, radius = corners.mean(axis=0), float(np.linalg.norm(corners[1] - corners[0])) / 2
        if not radius > 0:
            raise DataError(path, f"{key} is empty", f"write two corners that differ, or remove {key}")
    elif use_aabb:
        key = "the unit cube of instant-ngp, times aabb_scale,"
        side = content.get("aabb_scale")
        side = 1.0 if side is None else checked_number(side, path, "aabb_scale")
        if not side > 0:
            raise DataError(path, f"aabb_scale is {side:g}", "write a factor above 0, or remove it")
        center, radius = (0.5 - offset) / scale, 0.5 * side / scale
    else:
        return None
    LOG.info("%s gives the region: centre %s, radius %.4g in the poses' frame", key, center.round(4), radius)
    file_from_scene = np.diag([radius, radius, radius, 1.0])
    file_from_scene[:3, 3] = center
    return world_from_file @ file_from_scene


def _ngp_mapping(content: dict[str, Any], path: Path) -> tuple[float, Float64[np.ndarray, " 3"]]:
    """(scale, offset) by which instant-ngp takes the poses into its unit cube."""
    scale, offset = content.get("scale"), content.get("offset")
    if offset is None:
        offset = _NGP_OFFSET
    if isinstance(offset, int | float):
        offset = [offset] * 3
    factor = _NGP_SCALE if scale is None else checked_number(scale, path, "scale")
    if not factor > 0:
        raise DataError(path, f"scale is {factor:g}", "write a factor above 0, or remove it")
    return factor, checked_array(offset, (3,), path, "offset")


def _up(
    content: dict[str, Any], path: Path, world_from_file: Float64[np.ndarray, "4 4"]
) -> Float64[np.ndarray, " 3"] | None:
    """instant-ngp's ``up``, in the world; ``None`` if the file does not give it."""
    if content.get("up") is None:
        return None
    up = world_from_file[:3, :3] @ checked_array(content["up"], (3,), path, "up")
    length = float(np.linalg.norm(up))
    if not length > 0:
        raise DataError(path, "up is zero", "write a direction, or remove up")
    return up / length
