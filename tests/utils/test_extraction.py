"""Surface extraction: no seams, no holes, nothing lost, bounded work, clear failures."""

import logging
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from torch import Tensor

from utils import extraction
from utils.errors import ExportError
from utils.extraction import extract_surface
from utils.marching_cubes import march_bricks, marching_table
from utils.memory import Chunks
from utils.mesh_report import mesh_report
from utils.types import TriangleMesh


def points_at_once(size: int) -> Chunks:
    return Chunks("points", size, "export.chunk")


def sphere(
    positions: Tensor, radius: float = 0.5, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Tensor:
    return (positions - torch.tensor(centre)).norm(dim=1) - radius


def torus(positions: Tensor) -> Tensor:
    return torch.stack([positions[:, :2].norm(dim=1) - 0.55, positions[:, 2]], dim=1).norm(dim=1) - 0.2


def bumpy(positions: Tensor) -> Tensor:
    """Smooth, with many parts, tunnels and ambiguous voxels; slope up to 1.6."""
    waves = torch.sin(9.0 * positions + torch.tensor([0.3, 1.1, 2.0]))
    return 0.1 * waves.sum(dim=1) + 0.02 * torch.cos(23.0 * positions[:, 0]) + 0.05


def dense(sdf: Callable[[Tensor], Tensor], resolution: int, bound: float = 1.0) -> np.ndarray:
    """The field on every node: what extraction avoids."""
    ticks = np.arange(resolution + 1) * (2 * bound / resolution) - bound
    grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 3)
    return sdf(torch.from_numpy(grid.astype(np.float32))).numpy().reshape((resolution + 1,) * 3)


def crossings(values: np.ndarray) -> np.ndarray:
    """Where the field is zero along each edge that changes sign, linearly interpolated; lattice units."""
    found = []
    for axis in range(3):
        low, high = (
            np.moveaxis(values, axis, 0)[part].astype(np.float64) for part in (slice(-1), slice(1, None))
        )
        nodes = np.argwhere((low < 0) != (high < 0))
        a, b = low[tuple(nodes.T)], high[tuple(nodes.T)]
        points = nodes.astype(np.float64)
        points[:, 0] += a / (a - b)
        found.append(points[:, {0: [0, 1, 2], 1: [1, 0, 2], 2: [1, 2, 0]}[axis]])
    return np.concatenate(found)


def num_crossings(values: np.ndarray) -> int:
    inside = values < 0
    return sum(int((np.diff(inside, axis=axis)).sum()) for axis in range(3))


def same(a: TriangleMesh, b: TriangleMesh) -> bool:
    return np.array_equal(a.vertices, b.vertices) and np.array_equal(a.faces, b.faces)


def test_one_negative_corner_is_one_triangle_facing_away_from_it():
    triangles, owners = marching_table()
    assert (triangles[1] >= 0).sum() == 3
    points = np.array([0.5 * np.eye(3)[owners[edge, 3]] + owners[edge, :3] for edge in triangles[1, :3]])
    normal = np.cross(points[1] - points[0], points[2] - points[0])
    np.testing.assert_allclose(normal / np.linalg.norm(normal), np.full(3, 3**-0.5))


def test_table_covers_each_crossed_edge_and_nothing_else():
    triangles, owners = marching_table()
    low = (owners[:, :3] @ np.array([1, 2, 4])).astype(int)
    high = low + (1 << owners[:, 3].astype(int))
    for case in range(256):
        crossed = {e for e in range(12) if (case >> low[e] & 1) != (case >> high[e] & 1)}
        assert set(triangles[case][triangles[case] >= 0].tolist()) == crossed


@pytest.mark.parametrize("seed", [0, 1])
def test_any_signs_at_all_give_a_closed_manifold(seed: int):
    # Random signs hold every case and every pair of neighbours; a positive rim closes the surface.
    values = np.random.default_rng(seed).standard_normal((24, 24, 24)).astype(np.float32)
    values[[0, -1]] = values[:, [0, -1]] = values[:, :, [0, -1]] = 1.0
    coords = np.argwhere(np.ones((3, 3, 3), bool))
    table = np.arange(27, dtype=np.int32).reshape(3, 3, 3)
    bricks = values.reshape(3, 8, 3, 8, 3, 8).transpose(0, 2, 4, 1, 3, 5).reshape(27, 512)
    vertices, faces = march_bricks(coords, table, np.ascontiguousarray(bricks), 23)
    report = mesh_report(TriangleMesh(vertices, faces))
    assert report["boundary_edges"] == 0
    assert report["nonmanifold_edges"] == 0
    assert len(vertices) == num_crossings(values)
    assert report["volume"] > 0


@pytest.mark.parametrize("resolution", [16, 37, 64, 129])
def test_sphere_is_closed_round_and_faces_outward(resolution: int):
    mesh = extract_surface(sphere, resolution)
    report = mesh_report(mesh)
    assert report["boundary_edges"] == 0
    assert report["nonmanifold_edges"] == 0
    assert report["euler_number"] == 2
    voxel = 2.0 / resolution
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.5).max() < 0.5 * voxel**2
    assert report["volume"] == pytest.approx(4 / 3 * np.pi * 0.125, rel=4 * voxel**2)


def test_torus_has_one_hole_through_it():
    assert mesh_report(extract_surface(torus, 50))["euler_number"] == 0


@pytest.mark.parametrize(("sdf", "resolution"), [(sphere, 60), (torus, 61), (bumpy, 48), (bumpy, 53)])
def test_same_surface_as_on_the_dense_grid(sdf: Callable[[Tensor], Tensor], resolution: int):
    values = dense(sdf, resolution)
    mesh = extract_surface(sdf, resolution, clip_to_sphere=False)
    assert len(mesh.vertices) == num_crossings(values)
    expected = crossings(values) * (2.0 / resolution) - 1.0
    assert cKDTree(expected).query(mesh.vertices)[0].max() < 1e-5
    assert cKDTree(mesh.vertices).query(expected)[0].max() < 1e-5
    assert mesh_report(mesh)["area"] == pytest.approx(area_of(values, resolution), rel=5e-3)


def area_of(values: np.ndarray, resolution: int) -> float:
    vertices, faces, _, _ = marching_cubes(values, 0.0, method="lorensen")
    a, b, c = (vertices[faces[:, i]].astype(np.float64) * 2.0 / resolution for i in range(3))
    return float(0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1).sum())


@pytest.mark.parametrize("resolution", [64, 75])
def test_batches_leave_no_trace(resolution: int, monkeypatch: pytest.MonkeyPatch):
    def field(positions: Tensor) -> Tensor:
        return (positions.double() ** 2).sum(dim=1).float() - 0.2

    whole = extract_surface(field, resolution)
    assert same(whole, extract_surface(field, resolution, chunks=points_at_once(777)))
    monkeypatch.setattr(extraction, "CELLS_AT_ONCE", 50)
    monkeypatch.setattr(extraction, "COARSE_CELLS", 2)
    pieces = extract_surface(field, resolution, chunks=points_at_once(999))
    assert same(whole, pieces)
    assert mesh_report(pieces)["boundary_edges"] == 0


@pytest.mark.parametrize("slope", [0.2, 1.0, 5.0, 40.0])
def test_closed_whatever_the_slope(slope: float):
    mesh = extract_surface(lambda p: slope * torus(p), 96)
    assert mesh_report(mesh)["boundary_edges"] == 0
    assert len(mesh.vertices) == len(extract_surface(torus, 96).vertices)


def test_the_surface_is_followed_where_the_search_missed_it():
    # A needle on a ball, in a field far steeper than assumed: between the ball and its tip nothing shows
    # at the corners of the coarse cells.
    def steep(positions: Tensor) -> Tensor:
        radius = (positions[:, 1:] - torch.tensor([0.111, 0.137])).norm(dim=1)
        needle = torch.maximum(radius - 2.5 / 128, (positions[:, 0] - 0.4).abs() - 0.4)
        return 10.0 * torch.minimum(sphere(positions, 0.3), needle)

    mesh = extract_surface(steep, 128)
    assert mesh_report(mesh)["boundary_edges"] == 0
    assert mesh_report(mesh)["components"] == 1
    assert len(mesh.vertices) == num_crossings(dense(steep, 128))


def test_thin_parts_are_found():
    # A disc one and a half voxels thick and a needle as thick: neither shows in the signs of the coarse
    # lattice.
    def thin(positions: Tensor) -> Tensor:
        radius, height = positions[:, :2].norm(dim=1), positions[:, 2]
        disc = torch.maximum(radius - 0.6, (height - 0.031).abs() - 1.5 / 128)
        needle = torch.maximum((positions[:, 1:] - 0.3).norm(dim=1) - 1.5 / 128, positions[:, 0].abs() - 0.7)
        return torch.minimum(disc, needle)

    mesh = extract_surface(thin, 128)
    report = mesh_report(mesh)
    assert report["components"] == 2
    assert report["boundary_edges"] == 0
    assert len(mesh.vertices) == num_crossings(dense(thin, 128))


def test_only_the_neighbourhood_of_the_surface_is_evaluated():
    count = 0

    def counted(positions: Tensor) -> Tensor:
        nonlocal count
        count += len(positions)
        assert len(positions) <= 5000
        return sphere(positions)

    extract_surface(counted, 200, chunks=points_at_once(5000))
    assert count < 0.15 * 201**3


def test_clipping_cuts_cleanly_at_the_unit_sphere(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "utils.extraction"):
        mesh = extract_surface(lambda p: p[:, 2] - 0.101, 64)
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 1.0
    assert mesh_report(mesh)["area"] == pytest.approx(np.pi * (1 - 0.101**2), rel=0.1)
    assert mesh_report(mesh)["components"] == 1
    assert "the unit sphere cut the surface" in caplog.text
    whole = extract_surface(lambda p: p[:, 2] - 0.101, 64, clip_to_sphere=False)
    assert mesh_report(whole)["area"] == pytest.approx(4.0)
    # The whole plane faces up.
    a, b, c = (whole.vertices[whole.faces[:, i]] for i in range(3))
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()


def test_the_work_is_announced_before_most_of_it_is_done(caplog: pytest.LogCaptureFixture):
    asked = {False: 0, True: 0}

    def field(positions: Tensor) -> Tensor:
        asked["bricks near it" in caplog.text] += len(positions)
        return sphere(positions)

    with caplog.at_level(logging.INFO, "utils.extraction"):
        mesh = extract_surface(field, 200)
    announcement = caplog.records[0].getMessage()
    pattern = r"extracting the surface at 200\^3: ([\d,]+) bricks near it, up to \d+\.\d\d GiB"
    found = re.fullmatch(pattern, announcement)
    assert found, announcement
    # A brick has 8 voxels a side, so a flat piece of surface in it has about 64 quads: the estimate is above.
    assert 0.1 < len(mesh.faces) / (128 * int(found[1].replace(",", ""))) < 1
    assert 0 < asked[False] < 0.1 * asked[True]


def test_box_of_another_size():
    mesh = extract_surface(lambda p: sphere(p, 1.5), 40, bound=2.0, clip_to_sphere=False)
    assert mesh_report(mesh)["volume"] == pytest.approx(4 / 3 * np.pi * 1.5**3, rel=0.02)


@pytest.mark.parametrize(
    ("sdf", "cause"),
    [
        (lambda p: sphere(p) + 2.0, "all outside"),
        (lambda p: sphere(p) - 9.0, "all inside"),
        (lambda p: sphere(p, 0.1, (0.98, 0.98, 0.98)), "outside the unit sphere"),
    ],
)
def test_no_surface_says_what_the_field_looks_like(sdf: Callable[[Tensor], Tensor], cause: str):
    with pytest.raises(ExportError, match=cause) as caught:
        extract_surface(sdf, 32)
    for word in ("min", "median", "max", "95 %"):
        assert word in str(caught.value)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ExportError, match="not finite"):
        extract_surface(lambda p: torch.full((len(p),), float("nan")), 16)


def test_more_bricks_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extraction, "MAX_BRICKS", 20)
    with pytest.raises(ExportError, match="resolution"):
        extract_surface(sphere, 128)


def test_caller_mistakes():
    with pytest.raises(ValueError, match="positive"):
        extract_surface(sphere, 0)
