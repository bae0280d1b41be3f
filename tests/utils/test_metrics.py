"""Metrics: by hand, against scikit-image, and on spheres whose distances are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from skimage.metrics import structural_similarity

from utils import metrics
from utils.errors import DataError
from utils.mesh import write_mesh
from utils.metrics import chamfer_distance, evaluate_meshes, lpips_or_none, psnr, ssim
from utils.types import TriangleMesh


def ball(radius: float = 1.0, subdivisions: int = 5) -> TriangleMesh:
    made = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return TriangleMesh(np.asarray(made.vertices), np.asarray(made.faces, np.int64))


def test_psnr_by_hand():
    target = torch.full((4, 5, 3), 0.5)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-4)
    assert psnr(target, target) == float("inf")
    mask = torch.zeros(4, 5)
    mask[0, 0] = 1.0
    wrong = target.clone()
    wrong[0, 0] += 0.01
    wrong[1:] += 0.3
    assert psnr(wrong, target, mask) == pytest.approx(40.0, abs=1e-3)
    assert np.isnan(psnr(target, target, torch.zeros(4, 5)))


def test_ssim_agrees_with_scikit_image():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(31, 44, 3, generator=generator)
    rgb = (target + 0.2 * torch.rand(31, 44, 3, generator=generator)).clamp(0, 1)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = structural_similarity(
        rgb.double().numpy(), target.double().numpy(), channel_axis=-1, **settings
    )
    assert ssim(rgb, target) == pytest.approx(expected, abs=1e-9)
    assert ssim(target, target) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11"):
        ssim(rgb[:10], target[:10])


def test_lpips_is_a_number_or_a_reason():
    image = torch.rand(64, 64, 3)
    value, reason = lpips_or_none(image, image)
    assert (value is None) == bool(reason)


def test_triangle_distance_against_a_slow_reference():
    generator = np.random.default_rng(1)
    corners, points = generator.standard_normal((30, 3, 3)), 2 * generator.standard_normal((200, 3))
    vertices, faces = corners.reshape(-1, 3), np.arange(90).reshape(30, 3)
    candidates = np.tile(np.arange(30), (200, 1))
    ours, hits = metrics._closest_triangles(points, vertices, faces, candidates)
    reference = np.stack(
        [
            np.linalg.norm(points - trimesh.triangles.closest_point(np.tile(c, (200, 1, 1)), points), axis=1)
            for c in corners
        ],
        axis=1,
    )
    np.testing.assert_allclose(ours, reference.min(axis=1), atol=1e-9)
    assert np.array_equal(hits, reference.argmin(axis=1))


def test_scaled_sphere_is_its_difference_in_radius_away():
    scores = chamfer_distance(ball(1.0), ball(1.05), num_samples=20_000, thresholds=(0.04, 0.06))
    assert scores["accuracy"] == pytest.approx(0.05, abs=5e-4)
    assert scores["completeness"] == pytest.approx(0.05, abs=5e-4)
    assert scores["chamfer"] == pytest.approx(0.05, abs=5e-4)
    assert scores["hausdorff_95"] == pytest.approx(0.05, abs=1e-3)
    assert (scores["fscore@0.04"], scores["fscore@0.06"]) == (0.0, 1.0)
    assert scores["normal_consistency"] > 0.999


def test_shifted_sphere():
    # A point at angle a from the shift d lies |sqrt(1 + 2 d cos a + d^2) - 1| ~ d |cos a| away: d / 2 on
    # average.
    moved = replace(ball(), vertices=ball().vertices + np.array([0.02, 0, 0]))
    scores = chamfer_distance(ball(), moved, num_samples=20_000)
    assert scores["chamfer"] == pytest.approx(0.01, rel=0.02)
    assert scores["hausdorff_95"] == pytest.approx(0.95 * 0.02, rel=0.02)


def test_missing_half_hurts_completeness_alone():
    whole = ball()
    half = replace(whole, faces=whole.faces[whole.vertices[whole.faces][:, :, 2].min(axis=1) >= 0])
    scores = chamfer_distance(half, whole, num_samples=10_000)
    assert scores["accuracy"] < 1e-4
    assert scores["completeness"] > 0.1


def test_large_and_small_triangles_meet():
    # Two triangles against many: samples find the large ones, centroids the small ones.
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    square = TriangleMesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))
    fine = trimesh.Trimesh(corners, square.faces)
    for _ in range(6):
        fine = fine.subdivide()
    lifted = TriangleMesh(
        np.asarray(fine.vertices) + np.array([0, 0, 0.001]), np.asarray(fine.faces, np.int64)
    )
    scores = chamfer_distance(square, lifted, num_samples=2_000)
    assert scores["accuracy"] == pytest.approx(0.001, rel=1e-6)
    assert scores["completeness"] == pytest.approx(0.001, rel=1e-6)


def test_anchors_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "MAX_ANCHORS", 4_000)
    scores = chamfer_distance(ball(1.0), ball(1.05), num_samples=2_000)
    # A point then meets a triangle beside the closest one, off by less than the anchors' spacing of 0.056.
    assert scores["chamfer"] == pytest.approx(0.05, abs=5e-3)


def test_evaluate_files(tmp_path: Path):
    write_mesh(tmp_path / "a.ply", ball(100.0))
    write_mesh(tmp_path / "b.obj", ball(101.0))
    report = evaluate_meshes(tmp_path / "a.ply", tmp_path / "b.obj", num_samples=5_000)
    assert report["gt_radius"] == pytest.approx(101.0)
    assert report["chamfer"] == pytest.approx(1.0, rel=0.02)
    assert report["chamfer_relative"] == pytest.approx(1.0 / 101, rel=0.02)
    assert (report["fscore@0.5%"], report["fscore@2%"]) == (0.0, 1.0)
    assert report["normal_consistency"] > 0.99
    json.dumps(report)


def test_evaluate_against_points(tmp_path: Path):
    write_mesh(tmp_path / "a.ply", ball(1.0))
    trimesh.PointCloud(ball(1.02, 4).vertices).export(tmp_path / "points.ply")
    report = evaluate_meshes(tmp_path / "a.ply", tmp_path / "points.ply", num_samples=5_000)
    assert report["completeness"] == pytest.approx(0.02, abs=1e-3)
    assert report["accuracy"] < 0.08
    assert "normal_consistency" not in report
    with pytest.raises(DataError, match="has no faces"):
        evaluate_meshes(tmp_path / "points.ply", tmp_path / "a.ply")


def test_evaluate_names_the_file_at_fault(tmp_path: Path):
    write_mesh(tmp_path / "a.ply", ball(1.0, 1))
    with pytest.raises(DataError, match=r"none\.ply"):
        evaluate_meshes(tmp_path / "a.ply", tmp_path / "none.ply")
    flat = TriangleMesh(np.zeros((3, 3)), np.array([[0, 1, 2]]))
    write_mesh(tmp_path / "flat.ply", flat)
    with pytest.raises(DataError, match="area"):
        evaluate_meshes(tmp_path / "a.ply", tmp_path / "flat.ply")
