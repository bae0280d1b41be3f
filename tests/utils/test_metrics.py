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
from utils.mesh import sample_surface, write_mesh
from utils.metrics import (
    chamfer_distance,
    depth_errors,
    evaluate_meshes,
    lpips_or_none,
    normal_errors,
    psnr,
    ssim,
)
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


def slow_ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Equation 13 of Wang et al. window by window, one channel; windows that leave the image are left out."""
    ticks = np.arange(-5, 6)
    window = np.exp(-(ticks[:, None] ** 2 + ticks[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = np.empty((x.shape[0] - 10, x.shape[1] - 10))
    for i, j in np.ndindex(values.shape):
        a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        values[i, j] = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
        values[i, j] /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    return values


def test_ssim_window_by_window():
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(19, 23, 3, generator=generator)
    rgb = (target + 0.3 * torch.rand(19, 23, 3, generator=generator)).clamp(0, 1)
    x, y = rgb.double().numpy(), target.double().numpy()
    expected = np.mean([slow_ssim_map(x[..., c], y[..., c]) for c in range(3)], axis=0)
    assert ssim(rgb, target) == pytest.approx(expected.mean(), abs=1e-12)
    mask = (torch.rand(19, 23, generator=generator) > 0.7).float()
    inside = mask[5:-5, 5:-5].numpy() > 0.5
    assert 0 < inside.sum() < inside.size
    assert ssim(rgb, target, mask) == pytest.approx(expected[inside].mean(), abs=1e-12)
    assert ssim(rgb, target, torch.ones(19, 23)) == pytest.approx(ssim(rgb, target), abs=1e-12)
    assert np.isnan(ssim(rgb, target, torch.zeros(19, 23)))


def test_masked_ssim_does_not_see_far_pixels():
    target = torch.rand(40, 40, 3)
    rgb = target.clone()
    rgb[:, 30:] = 0.0
    mask = torch.zeros(40, 40)
    mask[:, :25] = 1.0  # Windows end at column 29.
    assert ssim(rgb, target, mask) == pytest.approx(1.0, abs=1e-12)
    assert ssim(rgb, target) < 0.9


def test_lpips_is_a_number_or_a_reason():
    image = torch.rand(64, 64, 3)
    value, reason = lpips_or_none(image, image)
    assert (value is None) == bool(reason)


def test_masked_lpips_sees_differences_inside_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "lpips_missing", lambda: None)
    monkeypatch.setattr(metrics, "_lpips_network", lambda device: lambda x, y: (x - y).abs().mean())
    target = torch.full((64, 80, 3), 0.5)
    rgb, mask = target.clone(), torch.zeros(64, 80)
    rgb[:32] += 0.25
    rgb[32:] -= 0.5
    mask[:32] = 1.0
    # The network sees -1..1, hence twice the difference.
    assert lpips_or_none(rgb, target)[0] == pytest.approx(0.5 * 0.5 + 0.5 * 1.0)
    assert lpips_or_none(rgb, target, mask)[0] == pytest.approx(0.5 * 0.5)
    assert lpips_or_none(rgb[:60], target[:60], mask[:60])[0] is None


def test_depth_errors_by_hand():
    # Missing truth (0), infinite truth and the masked pixel do not count.
    target = torch.tensor([[2.0, 4.0, 10.0, 1.0], [0.0, float("inf"), 5.0, 8.0]])
    depth = torch.tensor([[2.0, 5.0, 8.1, 0.0], [3.0, 1.0, 50.0, 9.0]])
    mask = torch.ones(2, 4)
    mask[1, 2] = 0.0
    errors = depth_errors(depth, target, mask)
    assert errors["abs_rel"] == pytest.approx((0 + 0.25 + 0.19 + 1 + 0.125) / 5, abs=1e-7)
    assert errors["rmse"] == pytest.approx(((0 + 1 + 1.9**2 + 1 + 1) / 5) ** 0.5, abs=1e-6)
    # 5 / 4 is not below 1.25; 10 / 8.1 is; a depth of 0 is infinitely far off.
    assert errors["delta_1.25"] == pytest.approx(3 / 5)
    assert depth_errors(depth, target)["abs_rel"] == pytest.approx((1.565 + 9) / 6, abs=1e-6)
    assert all(np.isnan(value) for value in depth_errors(depth, target, torch.zeros(2, 4)).values())


def test_normal_errors_against_known_turns():
    angles = np.array([[0.0, 0.01, 5.0, 11.0], [11.5, 90.0, 135.0, 180.0]])
    generator = np.random.default_rng(2)
    target = generator.standard_normal((2, 4, 3))
    target /= np.linalg.norm(target, axis=-1, keepdims=True)
    axis = np.cross(target, generator.standard_normal((2, 4, 3)))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    turn = np.deg2rad(angles)[..., None]
    normal = np.cos(turn) * target + np.sin(turn) * np.cross(axis, target)
    # Lengths do not matter.
    errors = normal_errors(torch.from_numpy(0.3 * normal), torch.from_numpy(target))
    assert errors["mean_degrees"] == pytest.approx(angles.mean(), abs=1e-9)
    assert errors["median_degrees"] == pytest.approx(np.median(angles), abs=1e-9)
    assert errors["share_below_11.25"] == 0.5
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 1, 0, 0]])
    errors = normal_errors(torch.from_numpy(normal), torch.from_numpy(target), mask)
    assert errors["median_degrees"] == pytest.approx(5.0, abs=1e-9)
    assert errors["mean_degrees"] == pytest.approx((0.01 + 5 + 90) / 3, abs=1e-9)


def test_normals_of_length_zero():
    up = torch.tensor([0.0, 0.0, 1.0]).expand(2, 2, 3).clone()
    nothing = torch.zeros(2, 2, 3)
    assert normal_errors(nothing, up)["mean_degrees"] == 90.0
    assert all(np.isnan(value) for value in normal_errors(up, nothing).values())


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


def test_chamfer_against_all_triangles(monkeypatch: pytest.MonkeyPatch):
    # With every face of these small meshes among the candidates, nothing is approximate.
    monkeypatch.setattr(metrics, "NUM_CANDIDATES", 10_000)
    generator = np.random.default_rng(3)
    meshes = [ball(1.0, 1), ball(1.1, 1)]
    meshes = [
        replace(m, vertices=m.vertices + 0.1 * generator.standard_normal(m.vertices.shape)) for m in meshes
    ]
    samples = [sample_surface(mesh, 150, seed)[0] for mesh, seed in zip(meshes, (7, 8), strict=True)]

    def slow_distances(points: np.ndarray, mesh: TriangleMesh) -> np.ndarray:
        each = [
            trimesh.triangles.closest_point(np.tile(corners, (len(points), 1, 1)), points)
            for corners in mesh.vertices[mesh.faces]
        ]
        return np.linalg.norm(points - np.stack(each), axis=2).min(axis=0)

    to_b, to_a = slow_distances(samples[0], meshes[1]), slow_distances(samples[1], meshes[0])
    thresholds = (0.05, 0.1, 0.15)
    scores = chamfer_distance(*meshes, num_samples=150, seed=7, thresholds=thresholds)
    assert scores["accuracy"] == pytest.approx(to_b.mean(), abs=1e-9)
    assert scores["completeness"] == pytest.approx(to_a.mean(), abs=1e-9)
    assert scores["chamfer"] == pytest.approx((to_a.mean() + to_b.mean()) / 2, abs=1e-9)
    for threshold in thresholds:
        precision, recall = (to_b <= threshold).mean(), (to_a <= threshold).mean()
        assert 0 < precision < 1
        assert scores[f"precision@{threshold:g}"] == pytest.approx(precision)
        assert scores[f"recall@{threshold:g}"] == pytest.approx(recall)
        assert scores[f"fscore@{threshold:g}"] == pytest.approx(2 / (1 / precision + 1 / recall))
    monkeypatch.undo()
    assert chamfer_distance(*meshes, num_samples=150, seed=7)["chamfer"] == pytest.approx(
        scores["chamfer"], rel=0.01
    )


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
    scores = chamfer_distance(half, whole, num_samples=10_000, thresholds=(1e-3,))
    share = metrics.face_areas_and_normals(half)[0].sum() / metrics.face_areas_and_normals(whole)[0].sum()
    assert scores["precision@0.001"] == 1.0
    assert scores["recall@0.001"] == pytest.approx(share, abs=0.005)
    assert scores["fscore@0.001"] == pytest.approx(2 * share / (1 + share), abs=0.005)


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
    assert (report["precision@0.5%"], report["recall@2%"]) == (0.0, 1.0)
    assert sum("@" in name for name in report) == 9
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
