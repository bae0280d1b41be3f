"""Camera paths by name: a ride along the cameras that stays outside and upright, and paths from files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_paths import TARGET, hemisphere, on_sphere, ring, scene_at

from process_data import load_scene
from process_data.camera_paths import camera_path
from process_data.paths import orbit_path
from process_data.synthetic import SyntheticConfig
from process_data.synthetic_mesh import signed_distance
from utils.errors import ConfigError, DataError
from utils.types import Cameras


def centers_of(cameras: Cameras) -> np.ndarray:
    return cameras.c2w[:, :, 3].double().numpy()


def test_the_orbit_is_what_it_was() -> None:
    scene = scene_at(ring())
    assert torch.equal(camera_path(scene, "orbit", 12).c2w, orbit_path(scene, 12).c2w)


def test_a_ride_around_a_ring_follows_it() -> None:
    path = camera_path(scene_at(ring()), "interp", 96)
    offsets = centers_of(path) - TARGET
    assert np.abs(np.linalg.norm(offsets, axis=1) - 3.0).max() < 1e-3
    assert np.abs(offsets[:, 2] - 1.5).max() < 0.01
    turned = np.unwrap(np.arctan2(offsets[:, 1], offsets[:, 0]))
    # Once around, at an even pace, and closed.
    assert abs(turned[-1] - turned[0]) == pytest.approx(2 * np.pi * 95 / 96, rel=1e-3)
    assert np.abs(np.diff(turned)).max() < 1.1 * np.abs(np.diff(turned)).min()


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_frames_are_poses_that_turn_slowly_and_stay_upright(order: str) -> None:
    centers = hemisphere()
    if order == "shuffled":
        centers = np.random.default_rng(5).permutation(centers)
    path = camera_path(scene_at(centers), "interp", 240)
    rotation = path.c2w[:, :, :3].double()
    assert float((rotation @ rotation.mT - torch.eye(3)).abs().max()) < 1e-5
    assert float(torch.linalg.det(rotation).min()) > 0.99
    forward = rotation[:, :, 2]
    cosine = (forward * forward.roll(1, 0)).sum(dim=1)
    assert float(cosine.min()) > np.cos(np.radians(25))
    # Level: x has no part in the vertical, wherever there is a horizon.
    level = forward[:, 2].abs() < 0.97
    # The vertical itself is estimated from the cameras.
    assert float(rotation[level, 2, 0].abs().max()) < 2e-3
    assert float(rotation[level, 2, 1].max()) < 0


def test_two_sides_are_joined_around_the_object() -> None:
    azimuth = np.array([0.0, 10, 20, 180, 190, 200])
    path = camera_path(scene_at(on_sphere(azimuth, np.full(6, 20.0), 2.0)), "interp", 60)
    assert np.linalg.norm(centers_of(path) - TARGET, axis=1).min() > 1.99


def test_few_cameras_stand_still() -> None:
    path = camera_path(scene_at(ring()[:2]), "interp", 8)
    assert len(path) == 8
    assert torch.equal(path.c2w, path.c2w[:1].expand(8, 3, 4))


@pytest.mark.parametrize("kind", ["orbit", "interp"])
@pytest.mark.parametrize("name", ["figurine", "thin", "glossy", "wall", "niche"])
def test_no_frame_is_inside_of_a_bundled_scene(kind: str, name: str) -> None:
    scene = load_scene(SyntheticConfig(scene=name, num_images=24, image_size=16))  # type: ignore[arg-type]
    path = camera_path(scene, kind, 100)
    distance = signed_distance(centers_of(path), name)  # type: ignore[arg-type]
    assert distance.min() > 0.5


def file_with(tmp_path: Path, content: object) -> str:
    path = tmp_path / "ride.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_poses_of_a_file_are_world_and_opengl(tmp_path: Path) -> None:
    scene = scene_at(ring())
    world_from_scene = torch.eye(4, dtype=torch.float64)
    world_from_scene[:3, :3] *= 20.0
    world_from_scene[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    scene = replace(scene, world_from_scene=world_from_scene)
    poses = []
    for c2w in scene.cameras.c2w[:5].double().numpy():
        pose = np.eye(4)
        pose[:3, :3] = c2w[:, :3] @ np.diag([1.0, -1.0, -1.0])
        pose[:3, 3] = 20.0 * c2w[:, 3] + [1.0, 2.0, 3.0]
        poses.append(pose)
    frames = [{"transform_matrix": pose.tolist()} for pose in poses]
    path = camera_path(scene, file_with(tmp_path, {"frames": frames}), 100)
    torch.testing.assert_close(path.c2w, scene.cameras.c2w[:5], atol=1e-5, rtol=0)
    assert torch.equal(path.intrinsics[0], orbit_path(scene, 1).intrinsics[0])
    rides = [{"camera_to_world": pose.ravel().tolist(), "fov": 90.0} for pose in poses]
    path = camera_path(scene, file_with(tmp_path, {"camera_path": rides}), 100)
    torch.testing.assert_close(path.c2w, scene.cameras.c2w[:5], atol=1e-5, rtol=0)
    # The typical picture is 8 x 6 pixels.
    assert path.intrinsics[:, 1, 1].tolist() == pytest.approx([3.0] * 5)
    wide = {"camera_angle_x": np.pi / 2, "frames": frames}
    path = camera_path(scene, file_with(tmp_path, wide), 1)
    assert path.intrinsics[:, 0, 0].tolist() == pytest.approx([4.0] * 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"frames": []}, "has no frames"),
        ({"poses": [1]}, "has no frames"),
        ({"frames": [{"transform_matrix": [[1, 2], [3, 4]]}]}, "frame 0: no pose"),
        ({"frames": [{}]}, "frame 0: no pose"),
        ({"frames": [{"transform_matrix": np.diag([1, 2, 3, 1]).tolist()}]}, "no rotation"),
        ({"frames": [{"transform_matrix": np.zeros((4, 4)).tolist()}]}, "no rotation"),
    ],
)
def test_files_without_a_path_are_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"test\.path: .*{message}"):
        camera_path(scene_at(ring()), file_with(tmp_path, content), 10)


def test_unknown_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"test\.path: 'spiral' is not known"):
        camera_path(scene_at(ring()), "spiral", 10)
    with pytest.raises(DataError, match=r"ride\.json"):
        camera_path(scene_at(ring()), str(tmp_path / "ride.json"), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fov": None}, "fov is 'None', not a number"),
        ({"fov": 0}, "fov is 0"),
        ({"fov": 180.0}, "fov is 180"),
        ({"camera_angle_x": -0.5}, "camera_angle_x is -0.5"),
        ({"camera_angle_x": 4.0}, "camera_angle_x is 4"),
        ({"camera_angle_x": "wide"}, "camera_angle_x is 'wide', not a number"),
    ],
)
def test_angles_that_are_none_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    frame: dict[str, object] = {"transform_matrix": np.eye(4).tolist()}
    content: dict[str, object] = {"frames": [frame]}
    (frame if "fov" in change else content).update(change)
    with pytest.raises((ConfigError, DataError), match=message):
        camera_path(scene_at(ring()), file_with(tmp_path, content), 1)


def test_a_short_ride_moves() -> None:
    path = camera_path(scene_at(ring()), "interp", 6)
    assert np.linalg.norm(np.diff(centers_of(path), axis=0), axis=1).min() > 0.5
