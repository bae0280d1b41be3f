"""Blender's and NeuS's own camera formulas against our rays; other formats have this beside their loaders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from process_data.cameras import rays_from_pixels
from process_data.formats.blender import BlenderConfig, load_blender
from process_data.formats.dtu import DTUConfig, load_dtu
from utils.types import Scene

WIDTH, HEIGHT = 101, 77
POINTS = np.random.default_rng(0).uniform(-0.6, 0.6, (40, 3))


def opengl_poses() -> np.ndarray:
    """Camera-to-world matrices around the origin, axes right, up, back."""
    poses = []
    for index in range(4):
        back = np.array([np.sin(1.3 * index), 0.3 * index - 0.4, np.cos(1.3 * index)])
        back /= np.linalg.norm(back)
        right = np.cross([0.1, 1.0, 0.0], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.column_stack([right, np.cross(back, right), back, 3.5 * back])
        poses.append(pose)
    return np.array(poses)


def misses(scene: Scene, view: int, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Pixels (of the loaded picture) by which our rays through full-size ``pixels`` pass world ``points``."""
    cameras = scene.cameras
    scale = cameras.size[view].numpy() / np.array([WIDTH, HEIGHT])
    here = torch.full((len(pixels),), view)
    rays = rays_from_pixels(cameras, here, torch.from_numpy(pixels * scale).float())
    scene_from_world = np.linalg.inv(scene.world_from_scene.numpy())
    inside = points @ scene_from_world[:3, :3].T + scene_from_world[:3, 3]
    offsets = inside - rays.origins.double().numpy()
    along = offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    return np.linalg.norm(along - rays.directions.double().numpy(), axis=1) * float(
        cameras.intrinsics[view, 0, 0]
    )


@pytest.mark.parametrize("downscale", [1, 2, 3])
def test_blender(tmp_path: Path, downscale: int) -> None:
    angle = 0.7
    frames = [
        {"file_path": f"./train/r_{index}", "transform_matrix": pose.tolist()}
        for index, pose in enumerate(opengl_poses())
    ]
    (tmp_path / "train").mkdir()
    picture = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    picture[20:50, 30:70] = 255
    for index in range(len(frames)):
        Image.fromarray(picture).save(tmp_path / "train" / f"r_{index}.png")
    content = {"camera_angle_x": angle, "frames": frames}
    (tmp_path / "transforms_train.json").write_text(json.dumps(content))
    scene = load_blender(BlenderConfig(root_dir=str(tmp_path), img_downscale=downscale))
    focal = 0.5 * WIDTH / np.tan(0.5 * angle)
    for view, pose in enumerate(opengl_poses()):
        x, y, z = ((POINTS - pose[:3, 3]) @ pose[:3, :3]).T
        pixels = np.column_stack([WIDTH / 2 + focal * x / -z, HEIGHT / 2 - focal * y / -z])
        assert misses(scene, view, POINTS, pixels).max() < 0.05


@pytest.mark.parametrize("downscale", [1, 2, 3])
def test_neus(tmp_path: Path, downscale: int) -> None:
    intrinsics = np.array([[130.0, 0.8, 47.0], [0.0, 125.0, 41.0], [0.0, 0.0, 1.0]])
    scale_mat = np.diag([2.0, 2.0, 2.0, 1.0])
    scale_mat[:3, 3] = [0.1, -0.2, 0.3]
    matrices = {}
    (tmp_path / "image").mkdir()
    for index, pose in enumerate(opengl_poses()):
        opencv = pose @ np.diag([1.0, -1.0, -1.0, 1.0])
        projection = np.eye(4)
        projection[:3] = intrinsics @ np.linalg.inv(opencv)[:3]
        matrices |= {f"world_mat_{index}": projection, f"scale_mat_{index}": scale_mat}
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(tmp_path / "image" / f"{index:03d}.png")
    np.savez(tmp_path / "cameras_sphere.npz", **matrices)
    scene = load_dtu(DTUConfig(root_dir=str(tmp_path), img_downscale=downscale))
    for view in range(4):
        homogeneous = (POINTS @ matrices[f"world_mat_{view}"][:3, :3].T) + matrices[f"world_mat_{view}"][
            :3, 3
        ]
        # NeuS's pixels have their centres at whole numbers, ours at + 0.5.
        pixels = homogeneous[:, :2] / homogeneous[:, 2:] + 0.5
        assert misses(scene, view, POINTS, pixels).max() < 0.05
