from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from process_data.paths import orbit_path
from utils.types import Cameras, ImageStack, Scene

TARGET = np.array([0.1, -0.05, 0.2])


def looking_at(center: np.ndarray, up: np.ndarray, target: np.ndarray = TARGET) -> np.ndarray:
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    return np.column_stack([right, np.cross(forward, right), forward, center])


def scene_at(
    centers: np.ndarray, up: tuple[float, float, float] = (0, 0, 1), size: tuple[int, int] = (9, 7)
) -> Scene:
    n = len(centers)
    c2w = torch.from_numpy(np.stack([looking_at(center, np.array(up)) for center in centers])).float()
    intrinsics = torch.tensor([[[50.0, 0, 4.5], [0, 50, 3.5], [0, 0, 1]]]).repeat(n, 1, 1)
    intrinsics[:, 0, 0] += torch.arange(n)
    images = ImageStack.from_images([np.zeros((size[1], size[0], 3), np.uint8) for _ in range(n)])
    return Scene(
        name="path",
        cameras=Cameras(c2w, intrinsics, images.size.clone()),
        images=images,
        image_names=tuple(str(i) for i in range(n)),
        train_indices=tuple(range(n)),
        test_indices=(),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def on_sphere(azimuth: np.ndarray, elevation: np.ndarray, distance: np.ndarray | float) -> np.ndarray:
    azimuth, elevation = np.radians(azimuth), np.radians(elevation)
    direction = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    return TARGET + np.stack(direction, axis=-1) * np.asarray(distance)[..., None]


def ring() -> np.ndarray:
    return on_sphere(np.arange(0, 360, 15.0), np.full(24, 30.0), 3.0)


def hemisphere() -> np.ndarray:
    rng = np.random.default_rng(0)
    return on_sphere(rng.uniform(0, 360, 80), rng.uniform(0, 90, 80), rng.uniform(2.5, 3.5, 80))


def patch() -> np.ndarray:
    azimuth, elevation = np.meshgrid(np.arange(150, 231, 10.0), np.arange(10, 61, 10.0))
    return on_sphere(azimuth.ravel(), elevation.ravel(), np.linspace(2.9, 3.2, azimuth.size))


def wide_arc() -> np.ndarray:
    return on_sphere(np.arange(-100, 101, 10.0), np.full(21, 50.0), 3.0)


def three() -> np.ndarray:
    return on_sphere(np.array([0.0, 30, 15]), np.array([0.0, 0, 20]), np.array([2.0, 3, 4]))


def two() -> np.ndarray:
    return on_sphere(np.array([170.0, -150]), np.array([20.0, 20]), 3.0)


def one() -> np.ndarray:
    return on_sphere(np.array([40.0]), np.array([70.0]), 3.0)


LAYOUTS = [ring, hemisphere, patch, wide_arc, three, two, one]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(unit(a) @ unit(b).T, -1, 1)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_path_is_valid_smooth_closed_and_level(layout: Callable[[], np.ndarray]) -> None:
    centers = layout()
    path = orbit_path(scene_at(centers), 40)
    assert len(path) == 40
    c2w = path.c2w.double().numpy()
    rotations, positions = c2w[:, :, :3], c2w[:, :, 3]
    np.testing.assert_allclose(
        rotations.transpose(0, 2, 1) @ rotations, np.tile(np.eye(3), (40, 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-5)
    reach = np.linalg.norm(centers - TARGET, axis=1)
    distance = np.linalg.norm(positions - TARGET, axis=1)
    # A single optical axis leaves the target open along it.
    if len(centers) > 1:
        assert reach.min() - 2e-3 < distance.min() <= distance.max() < reach.max() + 2e-3
        assert (unit(TARGET - positions) * rotations[:, :, 2]).sum(axis=1).min() > np.cos(np.radians(0.2))
    # Level and upright: the right vector has no component along up, the down vector points down.
    assert np.abs(rotations[:, 2, 0]).max() < 0.05
    assert rotations[:, 2, 1].max() < 0
    # Closed, without a jump: 9 degrees a step on a full circle, 16 in the middle of a swing over 200 degrees.
    turn = np.einsum("tij,tij->t", rotations, np.roll(rotations, 1, axis=0))
    assert np.degrees(np.arccos(np.clip((turn - 1) / 2, -1, 1))).max() < 17
    assert (path.size % 2 == 0).all()


@pytest.mark.parametrize(
    ("layout", "farthest"), [(ring, 8), (patch, 8), (wide_arc, 6), (three, 15.1), (hemisphere, 20)]
)
def test_no_frame_looks_from_where_no_camera_was(layout: Callable[[], np.ndarray], farthest: float) -> None:
    centers = layout()
    positions = orbit_path(scene_at(centers), 60).c2w[:, :, 3].double().numpy()
    assert degrees_between(positions - TARGET, centers - TARGET).min(axis=1).max() < farthest


def test_ring_goes_all_the_way_round_and_patch_stays() -> None:
    around = orbit_path(scene_at(ring()), 36).c2w[:, :, 3].double().numpy() - TARGET
    azimuth = np.degrees(np.unwrap(np.arctan2(around[:, 1], around[:, 0])))
    np.testing.assert_allclose(np.diff(azimuth), 10, atol=0.1)
    np.testing.assert_allclose(np.degrees(np.arcsin(around[:, 2] / 3)), 30, atol=0.1)

    inside = orbit_path(scene_at(patch()), 36).c2w[:, :, 3].double().numpy() - TARGET
    azimuth = np.degrees(np.mod(np.arctan2(inside[:, 1], inside[:, 0]), 2 * np.pi))
    elevation = np.degrees(np.arcsin(inside[:, 2] / np.linalg.norm(inside, axis=1)))
    # The largest ellipse in the rectangle 150..230 x 10..60 touches its sides.
    np.testing.assert_allclose([azimuth.min(), azimuth.max()], [150, 230], atol=3)
    np.testing.assert_allclose([elevation.min(), elevation.max()], [10, 60], atol=3)


def test_line_of_cameras_is_swept_from_end_to_end() -> None:
    swing = orbit_path(scene_at(wide_arc()), 40).c2w[:, :, 3].double().numpy() - TARGET
    azimuth = np.degrees(np.arctan2(swing[:, 1], swing[:, 0]))
    np.testing.assert_allclose([azimuth.min(), azimuth.max()], [-100, 100], atol=1.5)


def test_single_camera_stands_still() -> None:
    scene = scene_at(one())
    path = orbit_path(scene, 3)
    for frame in range(3):
        torch.testing.assert_close(path.c2w[frame], scene.cameras.c2w[0], atol=1e-4, rtol=0)


def test_held_out_cameras_do_not_shape_the_path() -> None:
    scene = scene_at(np.concatenate([patch(), ring()]))
    reduced = replace(scene, train_indices=tuple(range(54)), test_indices=tuple(range(54, 78)))
    torch.testing.assert_close(orbit_path(reduced, 7).c2w, orbit_path(scene_at(patch()), 7).c2w)


def test_intrinsics_of_thetypical_view_with_even_size() -> None:
    path = orbit_path(scene_at(three(), size=(9, 7)), 2)
    assert path.size.tolist() == [[8, 6]] * 2
    assert path.intrinsics[:, 0, 0].tolist() == [51.0] * 2


def test_any_world_up_and_rolled_cameras() -> None:
    path = orbit_path(scene_at(ring()[:, [1, 2, 0]], up=(0, 1, 0)), 8)
    assert path.c2w[:, 1, 1].max() < 0
    with pytest.raises(ValueError, match="num_steps"):
        orbit_path(scene_at(ring()), 0)


def test_cameras_that_look_outward_give_a_path() -> None:
    scene = scene_at(ring())
    outward = scene.cameras.c2w.clone()
    outward[:, :, [0, 2]] *= -1
    turned = replace(scene, cameras=Cameras(outward, scene.cameras.intrinsics, scene.cameras.size))
    assert torch.isfinite(orbit_path(turned, 5).c2w).all()
