"""One surface of two fields: balls, floors and walls whose mesh is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from encoder import HashGridConfig
from models.backends import Backends
from models.background import Background, BackgroundConfig
from models.surroundings import SurroundedSurface
from utils.extraction import extract_surface
from utils.mesh_report import mesh_report
from utils.types import TriangleMesh

LEVEL = 10.0
EXTENT = 3.0


class Inside:
    """A surface made of a distance; its colour is red."""

    device = torch.device("cpu")

    def __init__(self, floor: bool) -> None:
        self.floor = floor

    def query_sdf(self, positions: Tensor) -> Tensor:
        return positions[:, 2] if self.floor else positions.norm(dim=1) - 0.5

    def query_gradient(self, positions: Tensor) -> Tensor:
        return 2.0 * positions

    def query_color(self, positions: Tensor, directions: Tensor) -> Tensor:
        return torch.tensor([1.0, 0, 0]).expand(len(positions), 3)


def background(monkeypatch: pytest.MonkeyPatch, low: float, high: float) -> Background:
    """Dense, and blue, where z lies between two heights."""
    grid = HashGridConfig(num_levels=2, log2_table_size=8, base_resolution=4, max_resolution=8)
    made = Background(BackgroundConfig(True, hash_grid=grid), 2.0, Backends.all("cpu"))

    def density(positions: Tensor) -> Tensor:
        depth = torch.minimum(positions[:, 2] - low, high - positions[:, 2])
        return LEVEL * torch.exp(20.0 * depth)

    def color(positions: Tensor, directions: Tensor, appearance: Tensor | None = None) -> Tensor:
        return torch.tensor([0.0, 0, 1]).expand(len(positions), 3)

    monkeypatch.setattr(made, "query_density", density)
    monkeypatch.setattr(made, "query_color", color)
    return made


def mesh_of(surface: SurroundedSurface, resolution: int = 120) -> TriangleMesh:
    return extract_surface(surface.query_sdf, resolution, EXTENT, clip_to_sphere=False)


def test_a_ball_before_a_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = background(monkeypatch, 1.6, 2.1)
    surface = SurroundedSurface(Inside(floor=False), wall, None, LEVEL, EXTENT)
    mesh = mesh_of(surface)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    ball = radius < 1.0
    np.testing.assert_allclose(radius[ball], 0.5, atol=0.01)
    assert ball.sum() > 1000
    height = mesh.vertices[~ball, 2]
    # A thin ramp says little about distances: a vertex may be half a voxel off.
    assert (np.minimum(np.abs(height - 1.6), np.abs(height - 2.1)) < 0.03).all()
    at = torch.tensor([[0.0, 0, 0.5], [0.0, 0, 1.6]])
    down = torch.tensor([[0.0, 0, -1.0]]).expand(2, 3)
    assert surface.query_color(at, down).tolist() == [[1, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(
        surface.query_gradient(at), torch.tensor([[0.0, 0, 1.0], [0.0, 0, -1.0]]), atol=1e-3, rtol=0
    )


def test_a_floor_goes_on_through_the_sphere(monkeypatch: pytest.MonkeyPatch) -> None:
    surface = SurroundedSurface(Inside(floor=True), background(monkeypatch, -9.0, 0.0), None, LEVEL, EXTENT)
    mesh = mesh_of(surface)
    assert np.abs(mesh.vertices[:, 2]).max() < 0.03, "no wall where the fields meet"
    # Up to the last layer of voxels, which is the extraction's own.
    assert np.ptp(mesh.vertices[:, 0]) > 2 * EXTENT - 0.2


def test_what_ends_at_the_sphere_is_closed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    surface = SurroundedSurface(Inside(floor=True), background(monkeypatch, 5.0, 6.0), None, LEVEL, EXTENT)
    mesh = mesh_of(surface)
    report = mesh_report(mesh)
    assert report["watertight"]
    assert report["volume"] == pytest.approx(2 / 3 * np.pi, rel=0.05)
