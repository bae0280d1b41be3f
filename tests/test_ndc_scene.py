"""A forward-facing capture in warped space, from rays to the exported mesh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from models import build_model
from models.background import BackgroundConfig
from models.neus import NeuSConfig
from process_data.cameras import RayGenerator
from systems.export import ExportConfig, export_mesh
from tests.systems.tiny import tiny_scene
from utils.errors import ConfigError
from utils.lens import project
from utils.ndc import NDC
from utils.types import Cameras, Scene

NEAR = 0.5
WALL = 3.0


def facing_cameras(n: int = 3) -> Cameras:
    c2w = torch.eye(4)[:3].repeat(n, 1, 1)
    c2w[:, 0, 3] = torch.linspace(-0.2, 0.2, n)
    intrinsics = torch.tensor([[40.0, 0.0, 20.0], [0.0, 40.0, 16.0], [0.0, 0.0, 1.0]]).repeat(n, 1, 1)
    size = torch.tensor([[40, 32]]).repeat(n, 1)
    ndc = NDC(torch.eye(4, dtype=torch.float64)[:3], 1.0, 0.8, NEAR)
    return Cameras(c2w, intrinsics, size, ndc=ndc)


def test_rays_and_projection_agree_in_the_warped_space() -> None:
    cameras = facing_cameras()
    points = torch.tensor([[0.3, -0.2, 2.0], [-0.1, 0.4, 5.0], [0.0, 0.0, 60.0]])
    assert cameras.ndc is not None
    field = cameras.ndc.to_field(points)
    for view in range(3):
        pixels, _, shown = project(cameras, view, field)
        assert shown.all()
        rays = RayGenerator.from_cameras(cameras).rays(torch.full((3,), view), pixels)
        offset = field - rays.origins
        along = (offset * rays.directions).sum(dim=1)
        gap = (offset - along[:, None] * rays.directions).norm(dim=1)
        assert gap.max() < 1e-5
        assert ((along > rays.near) & (along < rays.far)).all()
        # Infinity ends the ray, although the sphere goes on.
        end = rays.origins + rays.far[:, None] * rays.directions
        assert (end[:, 2] <= 3**-0.5 + 1e-5).all()


def test_the_world_is_looked_at_without_the_warp() -> None:
    scene = warped_scene()
    assert scene.metric().cameras.ndc is None
    pixels, depth, _ = project(scene.metric().cameras, 1, torch.tensor([[0.0, 0.0, 2.0]]))
    u = 20.0 - 40.0 * float(scene.cameras.c2w[1, 0, 3]) / 2.0
    torch.testing.assert_close(pixels, torch.tensor([[u, 16.0]]), atol=1e-4, rtol=0)
    assert depth.item() == pytest.approx(2.0)


class Wall:
    """A wall at z = WALL before the cameras, as its field looks in the warped space."""

    device = torch.device("cpu")
    z = (1.0 - 2.0 * NEAR / WALL) / 3**0.5

    def query_sdf(self, positions: torch.Tensor) -> torch.Tensor:
        inside_cube = torch.maximum(positions[:, 0].abs(), positions[:, 1].abs()) - 0.5
        return torch.maximum((positions[:, 2] - self.z).abs() - 0.05, inside_cube)

    def query_gradient(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 0.0, -1.0]]).expand(len(positions), 3)

    def query_color(self, positions: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        return positions.abs()


class Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder


class Settings:
    def __init__(self, **export: Any) -> None:
        self.export = ExportConfig(resolution=64, cull_shells=False, **export)


def warped_scene() -> Scene:
    scene = tiny_scene()
    cameras = facing_cameras(len(scene.cameras))
    return replace(scene, cameras=replace(cameras, size=scene.cameras.size), masks=None, reference_mesh=None)


def test_the_exported_mesh_is_metric(tmp_path: Path) -> None:
    scene = replace(warped_scene(), world_from_scene=torch.diag(torch.tensor([2.0, 2, 2, 1])).double())
    export_mesh(Settings(), scene, Wall(), Folder(tmp_path), 1)
    mesh = trimesh.load(tmp_path / "save" / "mesh.ply", process=False)
    in_scene = np.asarray(mesh.vertices) / 2.0
    # Front and back of the slab: z = 2 near / (1 - sqrt(3) (z_field -+ 0.05)).
    front, back = (2 * NEAR / (1 - 3**0.5 * (Wall.z + shift)) for shift in (-0.05, 0.05))
    assert in_scene[:, 2].min() == pytest.approx(front, rel=0.01)
    assert in_scene[:, 2].max() == pytest.approx(back, rel=0.01)
    # The sides follow the frustum, x = 0.5 sqrt(3) tan_x z, less a voxel at the rounded edge.
    assert np.abs(in_scene[:, 0]).max() == pytest.approx(0.5 * 3**0.5 * back, rel=0.08)
    facing = mesh.vertex_normals[np.abs(in_scene[:, 2] - front) < 0.01 * front]
    assert len(facing) > 100
    assert np.median(facing[:, 2]) == pytest.approx(-1.0, abs=1e-3)


def test_the_back_of_a_wall_is_cut(tmp_path: Path) -> None:
    scene = replace(warped_scene(), world_from_scene=torch.eye(4).double())
    export_mesh(Settings(unseen="cut"), scene, Wall(), Folder(tmp_path), 1)
    depth = np.asarray(trimesh.load(tmp_path / "save" / "mesh.ply", process=False).vertices)[:, 2]
    front, back = (2 * NEAR / (1 - 3**0.5 * (Wall.z + shift)) for shift in (-0.05, 0.05))
    assert depth.min() == pytest.approx(front, rel=0.01)
    # Its outer sides are in the frames of some cameras, its back is in none.
    assert (depth < front + 0.02 * (back - front)).mean() > 0.5
    assert depth.max() < back - 0.02 * (back - front)


def test_a_background_behind_infinity_is_refused() -> None:
    config = NeuSConfig(background=BackgroundConfig(enabled=True))
    with pytest.raises(ConfigError, match=r"^model.background.enabled: nothing lies behind .*; set one"):
        build_model(config, warped_scene(), torch.device("cpu"))
