"""The camera path of the test video by its name: an orbit, a ride along the training cameras, or a file.

A file holds poses in *world* coordinates with OpenGL axes (x right, y up, z backward), in one of two forms::

    {"camera_angle_x": 0.7, "frames": [{"transform_matrix": [[...], [...], [...], [0, 0, 0, 1]]}, ...]}
    {"camera_path": [{"camera_to_world": [16 numbers, row by row], "fov": 50.0}, ...]}

that of transforms.json, whose angle of view (radians, horizontal) may be left out, or that of nerfstudio's
viewer, whose ``fov`` is vertical, in degrees. The viewer's own files are in its normalised frame, which is
not the world.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from scipy.interpolate import CubicSpline

from process_data.formats.transforms_file import checked_number, read_json
from process_data.geometry import look_at_point, up_axis
from process_data.paths import orbit_path, typical_view
from utils.errors import ConfigError
from utils.types import Cameras, Scene

_FRAMES_PER_KEY = 4
"""A ride passes a training camera every so many frames at most, however many there are."""
_STEEP = 0.98
"""Above this cosine between view and vertical there is no level; a frame then keeps its camera's roll."""

Poses = Float64[np.ndarray, "T 3 4"]


def camera_path(scene: Scene, path: str, num_steps: int) -> Cameras:
    """Make the camera path of the test video.

    Args:
        scene: the capture.
        path: ``orbit`` (see ``paths.py``), ``interp`` (a ride along the training cameras) or a JSON file.
        num_steps: number of frames, >= 1; a file says itself how many there are.

    Returns:
        Cameras in scene space, of an even width and height.

    Raises:
        ConfigError: ``test.path`` is neither of these, or the file does not hold a path.
    """
    if path == "orbit":
        cameras = orbit_path(scene, num_steps)
    elif path == "interp":
        cameras = _with_typical_view(scene, interpolated_poses(scene, num_steps))
    elif path.endswith(".json"):
        cameras = _read_path(scene, Path(path))
    else:
        raise ConfigError(
            "test.path", f"{path!r} is not known", "give orbit, interp or a JSON file with poses"
        )
    return replace(cameras, ndc=scene.cameras.ndc)


def _with_typical_view(scene: Scene, poses: Poses) -> Cameras:
    intrinsics, size = typical_view(scene)
    count = len(poses)
    return Cameras(
        torch.from_numpy(poses).float(),
        intrinsics.expand(count, 3, 3).contiguous(),
        size.expand(count, 2).contiguous(),
    )


def interpolated_poses(scene: Scene, num_steps: int) -> Poses:
    """A closed, smooth and level ride past training cameras, each near the one before.

    Around what the cameras look at, directions and distances are interpolated, not positions: between two
    cameras on opposite sides the way leads around the object, and never nearer to it than the nearest camera.
    """
    c2w = scene.cameras.c2w[list(scene.train_indices)].double().numpy()
    keys = c2w[_tour(c2w[:, :, 3], max(3, num_steps // _FRAMES_PER_KEY))]
    if len(keys) < 3:
        return np.repeat(keys[:1], num_steps, axis=0)
    target, up = look_at_point(c2w, np.zeros(3)), up_axis(c2w)
    offsets = keys[:, :, 3] - target
    distances = np.linalg.norm(offsets, axis=1)
    outward = offsets / distances[:, None]

    gaps = np.linalg.norm(np.diff(keys[:, :, 3], axis=0, append=keys[:1, :, 3]), axis=1)
    at = np.concatenate([[0.0], np.cumsum(np.maximum(gaps, 1e-6 * distances.mean()))])
    when = np.arange(num_steps) * (at[-1] / num_steps)

    def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        closed = np.concatenate([values, values[:1]])
        found: npt.NDArray[np.float64] = CubicSpline(at, closed, bc_type="periodic")(when)
        return found

    def smooth_directions(values: Float64[np.ndarray, "K 3"]) -> Float64[np.ndarray, "T 3"]:
        found = smooth(values)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    radius = np.exp(smooth(np.log(distances)).clip(np.log(distances.min()), np.log(distances.max())))
    centers = target + radius[:, None] * smooth_directions(outward)
    forward, own_up = smooth_directions(keys[:, :, 2]), smooth_directions(-keys[:, :, 1])
    is_steep = np.abs(forward @ up) > _STEEP
    right = np.cross(forward, np.where(is_steep[:, None], own_up, up))
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    return np.stack([right, np.cross(forward, right), forward, centers], axis=2)


def _tour(centers: Float64[np.ndarray, "N 3"], count: int) -> list[int]:
    """At most ``count`` of the cameras, spread out, in the order of a short round trip."""
    chosen = [0]
    nearest = np.linalg.norm(centers - centers[0], axis=1)
    while len(chosen) < min(count, len(centers)) and nearest.max() > 0:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(centers - centers[chosen[-1]], axis=1))
    order, rest = [chosen[0]], set(chosen[1:])
    while rest:
        last = centers[order[-1]]
        order.append(min(sorted(rest), key=lambda index: float(np.linalg.norm(centers[index] - last))))
        rest.remove(order[-1])
    return _uncrossed(order, centers)


def _uncrossed(order: list[int], centers: Float64[np.ndarray, "N 3"]) -> list[int]:
    """Turn stretches of a round trip around while that makes it shorter (2-opt, Croes 1958)."""
    count, is_shorter = len(order), True

    def length(a: int, b: int) -> float:
        return float(np.linalg.norm(centers[order[a % count]] - centers[order[b % count]]))

    while is_shorter:
        is_shorter = False
        for i in range(count - 2):
            for j in range(i + 2, count if i > 0 else count - 1):
                if length(i, j) + length(i + 1, j + 1) < length(i, i + 1) + length(j, j + 1) - 1e-9:
                    order[i + 1 : j + 1] = order[i + 1 : j + 1][::-1]
                    is_shorter = True
    return order


def _read_path(scene: Scene, file: Path) -> Cameras:
    content = read_json(file)
    frames = content.get("frames", content.get("camera_path"))
    if not isinstance(frames, list) or not frames:
        raise ConfigError("test.path", f"{file} has no frames", 'give "frames" or "camera_path" with poses')
    world = np.stack([_pose(file, number, frame) for number, frame in enumerate(frames)])
    scene_from_world = np.linalg.inv(scene.world_from_scene.numpy())
    c2w = scene_from_world @ world @ np.diag([1.0, -1.0, -1.0, 1.0])
    c2w[:, :3, :3] /= np.cbrt(np.linalg.det(c2w[:, :3, :3]))[:, None, None]
    cameras = _with_typical_view(scene, c2w[:, :3])
    intrinsics = cameras.intrinsics.clone()
    for number, frame in enumerate(frames):
        focal_length = _focal_length(file, content, frame, cameras.size[number].tolist())
        if focal_length is not None:
            intrinsics[number, 0, 0] = intrinsics[number, 1, 1] = focal_length
    return replace(cameras, intrinsics=intrinsics)


def _pose(file: Path, number: int, frame: Any) -> Float64[np.ndarray, "4 4"]:
    """Camera to world, OpenGL axes."""
    where, remedy = f"{file}, frame {number}", "give 4 x 4 numbers, a rotation and a position"
    matrix = frame.get("transform_matrix", frame.get("camera_to_world")) if isinstance(frame, dict) else None
    try:
        pose = np.asarray(matrix, dtype=np.float64).reshape(4, 4)
    except (TypeError, ValueError) as error:
        raise ConfigError("test.path", f"{where}: no pose", remedy) from error
    axes = pose[:3, :3] / np.cbrt(max(np.linalg.det(pose[:3, :3]), 1e-30))
    if not np.isfinite(pose).all() or not np.allclose(axes @ axes.T, np.eye(3), atol=1e-2):
        raise ConfigError("test.path", f"{where}: the pose is no rotation with a position", remedy)
    return pose


def _focal_length(
    file: Path, content: dict[str, Any], frame: dict[str, Any], size: list[int]
) -> float | None:
    """Of a frame, in pixels of the video; ``None`` where the file does not say."""
    width, height = size
    if "fov" in frame:
        return 0.5 * height / math.tan(0.5 * math.radians(_angle(frame["fov"], file, "fov", 180.0)))
    if "camera_angle_x" in content:
        return (
            0.5 * width / math.tan(0.5 * _angle(content["camera_angle_x"], file, "camera_angle_x", math.pi))
        )
    return None


def _angle(value: Any, file: Path, what: str, end: float) -> float:
    angle = checked_number(value, file, what)
    if not 0 < angle < end:
        raise ConfigError("test.path", f"{file}: {what} is {angle:g}", f"give an angle between 0 and {end:g}")
    return angle
