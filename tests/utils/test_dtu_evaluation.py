"""The DTU protocol on a miniature of DTU's folder whose distances are known, and against plain loops."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import trimesh

from utils import dtu_evaluation
from utils.dtu_evaluation import cull_by_masks, evaluate_dtu, points_on_mesh, thin_points
from utils.errors import DataError
from utils.mesh import face_areas_and_normals, write_mesh
from utils.types import Cameras, ImageStack, Scene, TriangleMesh

SIZE = (40.0, 40.0, 30.0)
GRID = 0.25
"""Millimetres between points: wider than the protocol's 0.2, so that none is thinned out."""
NOWHERE = np.full(3, -1e9), np.full(3, 1e9)


def patch(x: float, y: float, z: float, side: float = 4.0) -> np.ndarray:
    """A level square of points, a multiple of the spacing wide."""
    ticks = np.arange(round(side / GRID) + 1) * GRID
    u, v = np.meshgrid(x + ticks, y + ticks)
    return np.stack([u.ravel(), v.ravel(), np.full(u.size, z)], axis=1)


def write_points(path: Path, *parts: np.ndarray) -> Path:
    trimesh.PointCloud(np.concatenate(parts)).export(path)
    return path


def write_truth(
    folder: Path, *parts: np.ndarray, observed: np.ndarray | None = None, plane_height: float = -100.0
) -> Path:
    """DTU's folder for scan 7: a box from the origin to SIZE with voxels of 1 mm, all of them observed."""
    (folder / "ObsMask").mkdir(parents=True, exist_ok=True)
    (folder / "Points" / "stl").mkdir(parents=True, exist_ok=True)
    if observed is None:
        observed = np.ones([round(side) + 1 for side in SIZE], np.uint8)
    box = np.array([[0.0, 0.0, 0.0], SIZE])
    scipy.io.savemat(folder / "ObsMask" / "ObsMask7_10.mat", {"ObsMask": observed, "BB": box, "Res": 1.0})
    plane = np.array([[0.0], [0.0], [1.0], [-plane_height]])
    scipy.io.savemat(folder / "ObsMask" / "Plane7.mat", {"P": plane})
    write_points(folder / "Points" / "stl" / "stl007_total.ply", *parts)
    return folder


def measure(folder: Path, *parts: np.ndarray) -> dict[str, object]:
    return evaluate_dtu(write_points(folder / "points.ply", *parts), folder, 7)


def square(side: float, height: float, x: float = 0.0, y: float = 0.0) -> TriangleMesh:
    corners = np.array([[0.0, 0, 0], [side, 0, 0], [side, side, 0], [0, side, 0]])
    return TriangleMesh(corners + np.array([x, y, height]), np.array([[0, 1, 2], [0, 2, 3]]))


def test_parallel_planes(tmp_path: Path):
    write_truth(tmp_path, patch(10, 10, 10))
    report = measure(tmp_path, patch(10, 10, 10.5))
    for name in ("accuracy", "completeness", "overall"):
        assert report[name] == pytest.approx(0.5, abs=1e-6)
    assert report["accuracy_points"] == report["completeness_points"] == 17 * 17
    assert (report["accuracy_outliers"], report["completeness_outliers"]) == (0.0, 0.0)
    assert (report["scan"], report["unit"], report["culled"]) == (7, "mm", False)
    json.dumps(report)


def test_two_triangles_stand_for_their_plane(tmp_path: Path):
    write_truth(tmp_path, patch(10, 10, 10, 10.0))
    write_mesh(tmp_path / "mesh.ply", square(10, 12, 10, 10))
    report = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7)
    # Points lie at most 0.2 mm aside of one another, which 2 mm hide: sqrt(4 + 0.04) = 2.01.
    assert report["accuracy"] == pytest.approx(2.0, abs=0.01)
    assert report["completeness"] == pytest.approx(2.0, abs=0.01)
    assert 1000 < report["accuracy_points"] < 2500


def test_a_shifted_sphere_in_closed_form(tmp_path: Path):
    radius, shift, centre = 9.0, 5.0, np.array([18.0, 18.0, 12.0])
    # Fibonacci's points: evenly spread, 0.07 mm apart.
    index = np.arange(200_000) + 0.5
    height, angle = 1 - 2 * index / len(index), np.pi * (1 + 5**0.5) * index
    ring = np.sqrt(1 - height**2)
    directions = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    write_truth(tmp_path, centre + radius * directions)
    made = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    vertices = np.asarray(made.vertices) + centre + np.array([0.0, 0.0, shift])
    write_mesh(tmp_path / "mesh.ply", TriangleMesh(vertices, np.asarray(made.faces, np.int64)))
    report = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7)

    # A point at the cosine u off the shift is |sqrt(r^2 + 2 r s u + s^2) - r| away from the other sphere, and
    # u is uniform in -1..1. The integral without the bars, and where it changes its sign:
    def integral(u: float) -> float:
        return (radius**2 + 2 * radius * shift * u + shift**2) ** 1.5 / (3 * radius * shift) - radius * u

    turn = -shift / (2 * radius)
    mean = 0.5 * (integral(1.0) + integral(-1.0) - 2 * integral(turn))
    assert 0.9 * shift / 2 < mean < 1.1 * shift / 2
    for name in ("accuracy", "completeness", "overall"):
        # The 0.2 mm between points of the mesh are aside of the shift, which hides them.
        assert report[name] == pytest.approx(mean, rel=0.01)


def test_what_the_scanner_did_not_see_is_no_error_but_may_complete(tmp_path: Path):
    observed = np.ones([round(side) + 1 for side in SIZE], np.uint8)
    observed[20:] = 0
    write_truth(tmp_path, patch(5, 10, 10), patch(25, 10, 10), observed=observed)
    report = measure(tmp_path, patch(5, 10, 10.5), patch(25, 10, 13))
    assert report["accuracy"] == pytest.approx(0.5, abs=1e-6)
    assert report["completeness"] == pytest.approx((0.5 + 3.0) / 2, abs=1e-6)
    assert report["overall"] == pytest.approx((0.5 + 1.75) / 2, abs=1e-6)
    assert report["accuracy_points"] == 17 * 17


def test_scan_points_below_the_table_need_not_be_found(tmp_path: Path):
    write_truth(tmp_path, patch(5, 10, 10), patch(25, 10, 2), plane_height=5.0)
    report = measure(tmp_path, patch(5, 10, 10.5))
    assert report["completeness"] == pytest.approx(0.5, abs=1e-6)
    assert report["completeness_points"] == 17 * 17
    # They are surface all the same: what lies on them is accurate.
    assert measure(tmp_path, patch(5, 10, 10.5), patch(25, 10, 2.1))["accuracy"] == pytest.approx(
        0.3, abs=1e-6
    )


def test_far_outliers_are_left_out_and_told(tmp_path: Path):
    write_truth(tmp_path, patch(0, 0, 5), patch(36, 36, 5))
    # 20 mm are too far, 19.75 are not; the scan's second half has nothing within reach.
    report = measure(tmp_path, patch(0, 0, 5), patch(0, 0, 25))
    assert (report["accuracy_outliers"], report["completeness_outliers"]) == (0.5, 0.5)
    assert (report["accuracy"], report["completeness"]) == (0.0, 0.0)
    assert measure(tmp_path, patch(0, 0, 5), patch(0, 0, 24.75))["accuracy"] == pytest.approx(19.75 / 2)


@pytest.mark.parametrize(("x", "is_in"), [(-59.5, True), (-61.0, False), (159.5, True), (160.5, False)])
def test_box_grows_by_60_below_and_120_above(tmp_path: Path, x: float, is_in: bool):
    write_truth(tmp_path, patch(10, 10, 10), np.array([[x, 10.0, 10.0]]))
    report = measure(tmp_path, patch(10, 10, 10), np.array([[x, 10.0, 10.25]]))
    assert report["completeness_outliers"] == pytest.approx(0.0 if is_in else 1 / 290)
    assert report["completeness"] == pytest.approx(0.25 / 290 if is_in else 0.0)
    # Observed is nothing beyond the voxels.
    assert report["accuracy_points"] == 17 * 17


def test_voxels_are_centred_on_multiples_of_their_side(tmp_path: Path):
    write_truth(tmp_path, np.array([[10.0, 10.0, 10.0]]))
    observed = np.zeros((11, 11, 11), bool)
    observed[5, 6, 7] = True
    centre = np.array([-5.0, 3.0, 2.0]) + 2.0 * np.array([5, 6, 7])
    scipy.io.savemat(
        tmp_path / "ObsMask" / "ObsMask7_10.mat",
        {"ObsMask": observed, "BB": np.array([[-5.0, 3, 2], [15, 23, 22]]), "Res": 2.0},
    )
    # Farther than 0.2 from one another.
    inside = centre + np.array([[0.95, 0, 0], [-0.95, 0, 0], [0, 0.95, -0.95]])
    outside = centre + np.array([[1.05, 0.5, 0], [-1.05, 0.5, 0.5], [0, 1.05, -0.5]])
    assert measure(tmp_path, inside, outside)["accuracy_points"] == 3


def slow_thinning(points: np.ndarray, spacing: float, order: np.ndarray) -> np.ndarray:
    kept: list[int] = []
    for p in order:
        if not kept or np.linalg.norm(points[kept] - points[p], axis=1).min() > spacing:
            kept.append(int(p))
    return points[sorted(kept)]


def test_thinning_against_a_slow_loop():
    points = np.random.default_rng(4).uniform(-1, 1, (1500, 3))
    for seed in (0, 1):
        expected = slow_thinning(points, 0.2, np.random.default_rng(seed).permutation(1500))
        assert 200 < len(expected) < 800
        np.testing.assert_array_equal(thin_points(points, 0.2, seed), expected)
    assert len(thin_points(np.tile(points[:1], (50, 1)), 0.2)) == 1
    assert thin_points(np.empty((0, 3)), 0.2).shape == (0, 3)


def slow_sampling(corners: np.ndarray, spacing: float) -> list[np.ndarray]:
    """Grid points of one triangle: cells of spacing^2 between its sides, those below the diagonal."""
    a, b, c = corners
    first, second = np.linalg.norm(b - a), np.linalg.norm(c - a)
    step = spacing * np.sqrt(first * second / np.linalg.norm(np.cross(b - a, c - a)))
    n, m = int(first / step), int(second / step)
    shares = [((i + 0.5) / n, (j + 0.5) / m) for i in range(n) for j in range(m)]
    return [a + u * (b - a) + v * (c - a) for u, v in shares if u + v < 1]


def test_sampling_against_a_slow_loop():
    vertices = np.random.default_rng(5).standard_normal((12, 3))
    # The last triangle has no area.
    vertices = np.vstack([vertices, [[0, 0, 0], [1, 1, 1], [2, 2, 2]]])
    mesh = TriangleMesh(vertices, np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]))
    expected = [p for corners in vertices[mesh.faces[:4]] for p in slow_sampling(corners, 0.1)]
    points = points_on_mesh(mesh, *NOWHERE, spacing=0.1)
    np.testing.assert_allclose(points, np.concatenate([vertices, expected]), atol=1e-12)
    low, high = np.full(3, -0.5), np.full(3, 0.7)
    inside = ((points >= low) & (points < high)).all(axis=1)
    assert 0 < inside.sum() < len(points)
    np.testing.assert_array_equal(points_on_mesh(mesh, low, high, spacing=0.1), points[inside])


def test_samples_are_as_dense_as_the_spacing_says():
    ball = trimesh.creation.icosphere(subdivisions=0, radius=20.0)
    mesh = TriangleMesh(np.asarray(ball.vertices), np.asarray(ball.faces, np.int64))
    count = len(points_on_mesh(mesh, *NOWHERE)) - len(mesh.vertices)
    assert count == pytest.approx(face_areas_and_normals(mesh)[0].sum() / 0.2**2, rel=0.05)


def test_whole_protocol_against_plain_numpy(tmp_path: Path):
    generator = np.random.default_rng(6)
    observed = generator.random([round(side) + 1 for side in SIZE]) > 0.4
    truth = generator.uniform([0, 0, 0], SIZE, (800, 3)).astype(np.float32).astype(np.float64)
    write_truth(tmp_path, truth, observed=observed.astype(np.uint8), plane_height=8.0)
    corners = generator.uniform(-5, 40, (40, 1, 3)) + generator.normal(0, 1.0, (40, 3, 3))
    corners = corners.astype(np.float32).astype(np.float64)
    write_mesh(tmp_path / "mesh.ply", TriangleMesh(corners.reshape(-1, 3), np.arange(120).reshape(40, 3)))

    samples = np.concatenate([corners.reshape(-1, 3), *(slow_sampling(face, 0.2) for face in corners)])
    points = slow_thinning(samples, 0.2, np.random.default_rng(3).permutation(len(samples)))
    looked_at = [
        p
        for p in points
        if all(0 <= i < n for i, n in zip(np.rint(p), observed.shape, strict=True))
        and observed[tuple(np.rint(p).astype(int))]
    ]
    above = truth[truth[:, 2] > 8.0]
    to_truth = np.linalg.norm(np.stack(looked_at)[:, None] - truth, axis=2).min(axis=1)
    to_mesh = np.linalg.norm(above[:, None] - points, axis=2).min(axis=1)
    report = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7, seed=3)
    assert (report["accuracy_points"], report["completeness_points"]) == (len(to_truth), len(to_mesh))
    assert report["accuracy"] == pytest.approx(to_truth[to_truth < 20].mean(), abs=1e-9)
    assert report["completeness"] == pytest.approx(to_mesh[to_mesh < 20].mean(), abs=1e-9)
    assert report == evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7, seed=3)
    other = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7, seed=4)
    assert other["overall"] != report["overall"]
    assert other["overall"] == pytest.approx(report["overall"], rel=0.01)


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_truth(tmp_path, patch(10, 10, 10))
    expected = measure(tmp_path, patch(10, 11, 11.5))
    monkeypatch.setattr(dtu_evaluation, "_QUERIES_AT_ONCE", 7)
    assert measure(tmp_path, patch(10, 11, 11.5)) == expected


WORLD_FROM_SCENE = np.array([[0.0, -5, 0, 10], [5, 0, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]])


def masked_scene(radius: float = 40.0) -> Scene:
    """One camera 5 in front of the origin sees a disk of pixels; another, with an empty mask, looks away."""
    c2w = torch.eye(4)[:3].repeat(2, 1, 1)
    c2w[:, 2, 3] = -5.0
    c2w[1, :, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    intrinsics = torch.tensor([[100.0, 0, 100], [0, 100, 80], [0, 0, 1]]).repeat(2, 1, 1)
    size = torch.tensor([[200, 160]] * 2)
    v, u = np.mgrid[:160, :200] + 0.5
    disk = (255 * (np.hypot(u - 100, v - 80) < radius)).astype(np.uint8)[..., None]
    return Scene(
        "miniature",
        Cameras(c2w, intrinsics, size),
        ImageStack.from_images([np.zeros((160, 200, 3), np.uint8)] * 2),
        ("a.png", "b.png"),
        (0,),
        (1,),
        torch.from_numpy(WORLD_FROM_SCENE),
        masks=ImageStack.from_images([disk, np.zeros_like(disk)]),
    )


def crumbs(x: np.ndarray, y: np.ndarray) -> TriangleMesh:
    """Tiny triangles at (x, y, 0) of the scene, in world coordinates."""
    centres = np.stack([x, y, np.zeros_like(x)], axis=1)
    corners = centres[:, None] + 1e-4 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    world = corners.reshape(-1, 3) @ WORLD_FROM_SCENE[:3, :3].T + WORLD_FROM_SCENE[:3, 3]
    return TriangleMesh(world, np.arange(3 * len(x)).reshape(-1, 3))


@pytest.mark.parametrize("dilation", [0.0, 0.1])
def test_masks_cut_at_their_grown_outline(dilation: float):
    # 20 pixels for each unit; the mask grows by a share of the 200 pixels of the picture's width.
    radius = np.linspace(0.02, 3.9, 300)
    angle = 2.4 * np.arange(300)
    edge = (40.0 + 200 * dilation) / 20
    mesh = crumbs(radius * np.cos(angle), radius * np.sin(angle))
    kept = cull_by_masks(mesh, masked_scene(), dilation)
    scene_from_world = np.linalg.inv(WORLD_FROM_SCENE)
    found = np.linalg.norm(kept.vertices @ scene_from_world[:2, :3].T + scene_from_world[:2, 3], axis=1)
    assert found.max() == pytest.approx(edge, abs=1.5 / 20)
    assert len(kept.faces) == pytest.approx((radius < edge).sum(), abs=6)


def test_what_no_picture_shows_is_kept_and_broken_faces_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dtu_evaluation, "_VERTICES_AT_ONCE", 2)
    # In the mask, in the picture beside the mask, beside the picture.
    mesh = crumbs(np.array([0.0, 3.0, 6.0]), np.zeros(3))
    assert len(cull_by_masks(mesh, masked_scene(), 0.0).faces) == 2
    bridge = replace(mesh, faces=np.array([[0, 1, 2], [0, 1, 3]]))
    assert len(cull_by_masks(bridge, masked_scene(), 0.0).faces) == 1
    with pytest.raises(DataError, match=r"miniature: no face of the mesh lies inside the masks"):
        cull_by_masks(replace(mesh, faces=mesh.faces[1:2]), masked_scene(), 0.0)
    with pytest.raises(DataError, match=r"miniature: .*; set dataset\.apply_mask=true"):
        cull_by_masks(mesh, replace(masked_scene(), masks=None))


def test_culled_meshes_are_measured_without_their_debris(tmp_path: Path):
    # 20 pixels for 5 mm about (10, 20): the mask, grown by 50 / 1600 of 200 pixels, has a radius of 11.6 mm.
    surface = trimesh.Trimesh(*astuple(square(8, 30.5, 6, 16))[:2], process=False).subdivide()
    outside, inside = square(4, 34, 6, 34), square(2, 34, 9, 19)
    parts = [TriangleMesh(surface.vertices, surface.faces.astype(np.int64)), outside, inside]
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])[:3]
    mesh = TriangleMesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)]),
    )
    write_mesh(tmp_path / "mesh.ply", mesh)
    truth = patch(6, 16, 30, 8.0)
    write_truth(tmp_path, truth, observed=np.ones((41, 41, 51), np.uint8))
    whole = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7)
    culled = evaluate_dtu(tmp_path / "mesh.ply", tmp_path, 7, scene=masked_scene())
    assert culled["culled"] is True
    assert whole["accuracy"] > 1.5
    assert culled["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert culled["completeness"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "name", ["ObsMask/ObsMask7_10.mat", "ObsMask/Plane7.mat", "Points/stl/stl007_total.ply"]
)
def test_a_missing_file_is_named_with_its_source(tmp_path: Path, name: str):
    write_truth(tmp_path, patch(10, 10, 10))
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"no such file; .*https://roboimagedata\.compute\.dtu\.dk") as caught:
        measure(tmp_path, patch(10, 10, 10))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path):
    write_truth(tmp_path, patch(10, 10, 10))
    file = tmp_path / "ObsMask" / "ObsMask7_10.mat"
    scipy.io.savemat(file, {"ObsMask": np.ones((3, 3, 3)), "BB": np.zeros((2, 3))})
    with pytest.raises(DataError, match=r"ObsMask7_10\.mat: holds no Res"):
        measure(tmp_path, patch(10, 10, 10))
    scipy.io.savemat(file, {"ObsMask": np.ones((3, 3)), "BB": np.zeros((2, 3)), "Res": 1.0})
    with pytest.raises(DataError, match=r"ObsMask7_10\.mat: BB, Res, ObsMask have the shapes"):
        measure(tmp_path, patch(10, 10, 10))
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"ObsMask7_10\.mat: cannot be read"):
        measure(tmp_path, patch(10, 10, 10))
    write_truth(tmp_path, patch(10, 10, 10))
    scipy.io.savemat(tmp_path / "ObsMask" / "Plane7.mat", {"P": np.ones(3)})
    with pytest.raises(DataError, match=r"Plane7\.mat: P has 3 numbers instead of 4"):
        measure(tmp_path, patch(10, 10, 10))


def test_a_mesh_in_other_units_is_told(tmp_path: Path):
    write_truth(tmp_path, patch(30, 30, 20))
    with pytest.raises(DataError, match=r"points\.ply: no part of it is within 20 mm .*world units"):
        measure(tmp_path, patch(30, 30, 20) / 100)
