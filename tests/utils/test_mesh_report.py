"""Holes: their number and area on shapes cut by hand, and which of them lie where photographs look."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from utils.mesh import select_faces
from utils.mesh_report import find_holes, mesh_report, observed_holes
from utils.ndc import NDC
from utils.types import Cameras, ImageStack, Scene, TriangleMesh


def sheet(cells: int = 10, side: float = 1.0) -> TriangleMesh:
    """A square in the plane z = 0 around the origin, two triangles per cell."""
    axis = np.linspace(-side / 2, side / 2, cells + 1)
    x, y = np.meshgrid(axis, axis)
    corner = (np.arange(cells)[:, None] * (cells + 1) + np.arange(cells)).reshape(-1)
    a, b, c, d = corner, corner + 1, corner + cells + 2, corner + cells + 1
    faces = np.stack([a, b, c, a, c, d], axis=1).reshape(-1, 3)
    return TriangleMesh(np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1), faces)


def without_cells(mesh: TriangleMesh, cells: int, *missing: tuple[int, int]) -> TriangleMesh:
    kept = np.ones(len(mesh.faces), bool)
    for row, column in missing:
        kept[2 * (row * cells + column) :][:2] = False
    return select_faces(mesh, kept)


def sphere(keep: float = 2.0, radius: float = 1.0, subdivisions: int = 5) -> TriangleMesh:
    """A sphere without its cap above the height ``keep``."""
    made = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    mesh = TriangleMesh(np.asarray(made.vertices), np.asarray(made.faces, np.int64))
    return select_faces(mesh, (mesh.vertices[mesh.faces][:, :, 2] < keep).all(axis=1))


def test_holes_of_a_sheet_by_hand():
    # Its own rim, a hole of one cell and one of two: areas 1, 1 / 100 and 2 / 100.
    mesh = without_cells(sheet(), 10, (2, 2), (6, 6), (6, 7))
    holes = find_holes(mesh)
    assert sorted(holes.areas) == pytest.approx([0.01, 0.02, 1.0])
    assert sorted(np.bincount(holes.labels)) == [4, 6, 40]
    report = mesh_report(mesh)
    assert (report["holes"], report["boundary_edges"], report["watertight"]) == (3, 50, False)
    assert report["hole_area"] == pytest.approx(1.03)


def test_a_closed_surface_has_none():
    report = mesh_report(sphere())
    assert (report["holes"], report["hole_area"], report["boundary_edges"]) == (0, 0.0, 0)
    assert report["watertight"] is True
    empty = mesh_report(TriangleMesh(np.empty((0, 3)), np.empty((0, 3), np.int64)))
    assert (empty["holes"], empty["hole_area"]) == (0, 0.0)


def test_the_mouth_of_a_cut_sphere_is_a_disk():
    mesh = sphere(keep=0.6)
    rim = np.unique(find_holes(mesh).edges)
    # The rim zigzags along the sphere's edges: on the circle at the height 0.6 it has the radius 0.8.
    around = mesh.vertices[rim, :2] / np.linalg.norm(mesh.vertices[rim, :2], axis=1, keepdims=True)
    mesh.vertices[rim] = np.column_stack([0.8 * around, np.full(len(rim), 0.6)])
    assert find_holes(mesh).areas == pytest.approx([np.pi * 0.64], rel=0.01)


def test_area_does_not_depend_on_how_the_rim_is_cut_into_edges():
    coarse = without_cells(sheet(4), 4, (1, 1))
    fine = without_cells(sheet(8), 8, (2, 2), (2, 3), (3, 2), (3, 3))
    for mesh in (coarse, fine):
        assert min(find_holes(mesh).areas) == pytest.approx(1 / 16)


def scene(num_views: int = 3, frame: float = 1.0, scale: float = 5.0) -> Scene:
    """Cameras 3 above the origin that look down; ``frame`` is half of what they see there."""
    c2w = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 3]]).repeat(num_views, 1, 1)
    focal = 50 * 3 / frame
    intrinsics = torch.tensor([[focal, 0, 50], [0, focal, 50], [0, 0, 1]]).repeat(num_views, 1, 1)
    size = torch.full((num_views, 2), 100)
    images = ImageStack.from_images([np.zeros((100, 100, 3), np.uint8)] * num_views)
    names = tuple(f"{view}.png" for view in range(num_views))
    world = torch.diag(torch.tensor([scale, scale, scale, 1.0], dtype=torch.float64))
    return Scene("sheet", Cameras(c2w, intrinsics, size), images, names, tuple(range(num_views)), (), world)


def test_the_cut_of_the_unit_sphere_is_no_hole():
    # A plane that reaches the wall, which cuts it to a disk of radius 1, with a hole in the middle.
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    k, n = np.arange(64), (np.arange(64) + 1) % 64
    inner = 64
    faces = np.concatenate([np.stack([k, n, inner + k], 1), np.stack([n, inner + n, inner + k], 1)])
    annulus = TriangleMesh(np.concatenate([ring, 0.2 * ring]), faces)
    report = observed_holes(annulus, scene(frame=1.5))
    assert mesh_report(annulus)["boundary_edges"] == 128
    assert (report["observed_boundary_edges"], report["observed_holes"]) == (64, 1)
    # In world units, which are five times as long.
    polygon = 0.5 * 64 * np.sin(2 * np.pi / 64) * 0.2**2
    assert report["observed_hole_area"] == pytest.approx(25 * polygon)


def test_what_one_camera_shows_is_not_observed():
    mesh = without_cells(sheet(), 10, (5, 5))
    three = scene(3, frame=2.0)
    assert observed_holes(mesh, three)["observed_holes"] == 2
    # Only the hole in the middle is in the frame now.
    assert observed_holes(mesh, scene(3, frame=0.3))["observed_boundary_edges"] == 4
    held_out = replace(three, train_indices=(0,), test_indices=(1, 2))
    assert observed_holes(mesh, held_out)["observed_holes"] == 2
    turned = three.cameras.c2w.clone()
    turned[1:, :, 1:3] *= -1.0
    away = replace(three, cameras=replace(three.cameras, c2w=turned))
    assert observed_holes(mesh, away)["observed_holes"] == 0
    assert observed_holes(sphere(), three)["observed_boundary_edges"] == 0


def warped(mesh: TriangleMesh, seen: Scene) -> tuple[TriangleMesh, Scene]:
    """Mesh and cameras as training sees them with ``dataset.ndc``."""
    ndc = NDC(seen.cameras.c2w[0].double(), 0.5, 0.4, near=1.0)
    vertices = ndc.to_field(torch.from_numpy(mesh.vertices)).numpy()
    return replace(mesh, vertices=vertices), replace(seen, cameras=replace(seen.cameras, ndc=ndc))


def test_holes_of_a_warped_mesh_are_measured_unwarped():
    mesh = without_cells(sheet(), 10, (5, 5))
    # Tilted by 45 degrees, which the warp stretches unevenly.
    tilted = replace(mesh, vertices=mesh.vertices @ np.array([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5], [0, 0, 1]]))
    in_field, seen = warped(tilted, scene(3, frame=0.3))
    report = observed_holes(in_field, seen)
    assert (report["observed_holes"], report["observed_boundary_edges"]) == (1, 4)
    assert report["observed_hole_area"] == pytest.approx(25 * 0.01, rel=1e-9)
    assert min(find_holes(in_field).areas) != pytest.approx(0.01, rel=0.5)


def test_a_warped_hole_at_infinity_has_an_area():
    far = sheet(1, side=0.2)
    for z in (3**-0.5, 3**-0.5 + 0.1):
        plane = replace(far, vertices=far.vertices + np.array([0, 0, z]))
        _, seen = warped(far, scene(3, frame=2.0))
        report = observed_holes(plane, seen)
        assert report["observed_holes"] == 1
        # The written mesh ends 2000 near distances away, where a frustum of these tangents is so wide.
        sides = 0.2 * 3**0.5 * 2000 * np.array([0.5, 0.4])
        assert report["observed_hole_area"] == pytest.approx(25 * sides.prod(), rel=1e-6)
