"""Mesh against render: gaps between two spheres whose depths are known, and the picture that shows them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import trimesh
from tiny import tiny_scene
from torch import Tensor

from process_data.cameras import image_rays
from systems.mesh_against_render import compare_with_render, spread_views
from utils.memory import Chunks
from utils.ndc import NDC
from utils.types import Lens, Progress, Rays, Scene, TriangleMesh

PROGRESS = Progress(1.0, 1.0, 4.0, {})


def ball(radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> TriangleMesh:
    made = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    vertices = np.asarray(made.vertices) + np.array(centre)
    return TriangleMesh(
        vertices,
        np.asarray(made.faces, np.int64),
        colors=np.full(vertices.shape, 200, np.uint8),
    )


def distances(rays: Rays, radius: float) -> Tensor:
    """To a sphere around the origin along the rays, 0 where they miss it; double precision."""
    origins, directions = rays.origins.double(), rays.directions.double()
    along = -(origins * directions).sum(dim=1)
    inside = radius**2 - (origins + along[:, None] * directions).square().sum(dim=1)
    return torch.where(inside > 0, along - inside.clamp(min=0).sqrt(), 0.0)


class Sphere:
    """Renders a sphere of 80 % opacity, whose depth is weighted by it as a model's is."""

    device = torch.device("cpu")

    def __init__(self, radius: float) -> None:
        self.radius = radius

    def render(self, rays: Rays, progress: Progress, background: Tensor) -> Any:
        distance = distances(rays, self.radius).float()
        opacity = 0.8 * (distance > 0).float()
        plain = torch.zeros(len(rays), 3)
        return SimpleNamespace(rgb=plain, opacity=opacity, depth=opacity * distance, normal=plain)


def compare(scene: Scene, mesh: TriangleMesh, radius: float, path: Path) -> Any:
    return compare_with_render(scene, mesh, Sphere(radius), PROGRESS, path, Chunks("rays", 500, "key"))


def test_gap_of_two_spheres(tmp_path: Path) -> None:
    scene = tiny_scene()
    report = compare(scene, ball(0.5), 0.45, tmp_path / "gap.png")
    gaps, only_one, either = [], 0, 0
    for name in report["views"]:
        view = scene.image_names.index(name)
        rays = image_rays(scene.cameras, view)
        cosine = rays.directions.double() @ scene.cameras.c2w[view, :, 2].double()
        mesh, render = distances(rays, 0.5), distances(rays, 0.45)
        both = (mesh > 0) & (render > 0)
        gaps += ((mesh - render).abs() * cosine)[both].tolist()
        only_one += int(((mesh > 0) ^ (render > 0)).sum())
        either += int(((mesh > 0) | (render > 0)).sum())
    assert 0.05 < np.median(gaps) < 0.08
    assert report["median_depth_difference_percent"] == pytest.approx(100 * np.median(gaps), rel=0.01)
    assert report["p95_depth_difference_percent"] == pytest.approx(100 * np.percentile(gaps, 95), rel=0.02)
    # The world is 2.5 times as large as the scene.
    assert report["median_depth_difference_world"] == pytest.approx(2.5 * np.median(gaps), rel=0.01)
    assert report["only_one"] == pytest.approx(only_one / either, abs=0.01)
    assert report["only_one"] > 0.1


def test_the_picture_says_which_is_in_front(tmp_path: Path) -> None:
    scene = tiny_scene()
    compare(scene, ball(0.5), 0.45, tmp_path / "front.png")
    compare(scene, ball(0.45), 0.5, tmp_path / "behind.png")
    front, behind = (iio.imread(tmp_path / f"{name}.png").astype(int) for name in ("front", "behind"))
    # Caption, four views and the scale, with gaps of 4; four columns with gaps of 4.
    assert front.shape == (20 + 4 + 4 * 36 + 24, 4 * 32 + 3 * 4, 3)
    shown = scene.image_names.index(compare(scene, ball(0.5), 0.45, tmp_path / "again.png")["views"][0])
    assert np.array_equal(front[24:56, :32], scene.images.image(shown).numpy())
    middle = (24 + 16, 3 * 36 + 16)
    red, _, blue = front[middle]
    assert blue > red + 50
    red, _, blue = behind[middle]
    assert red > blue + 50
    # The mesh's own colour in its column; a rim of it alone is black, of the render alone grey.
    assert front[24 + 16, 2 * 36 + 16].tolist() == [200, 200, 200]
    assert (front[24:56, 3 * 36 :] == 0).all(axis=2).sum() > 20
    assert (behind[24:56, 3 * 36 :] == 140).all(axis=2).sum() > 20


def test_lenses_do_not_come_into_it(tmp_path: Path) -> None:
    scene = tiny_scene()
    lens = Lens("SIMPLE_RADIAL", (40.0, 16.0, 16.0, 0.3), (32, 32))
    bent = replace(scene, cameras=replace(scene.cameras, lenses=(lens,) * len(scene.cameras)))
    assert compare(bent, ball(0.5), 0.45, tmp_path / "a.png") == compare(
        scene, ball(0.5), 0.45, tmp_path / "b.png"
    )


def test_nothing_in_common(tmp_path: Path) -> None:
    report = compare(tiny_scene(), ball(0.1, (0, 0, 40)), 0.45, tmp_path / "gap.png")
    assert report["median_depth_difference_world"] is None
    assert report["p95_depth_difference_percent"] is None
    assert report["only_one"] == 1.0
    assert (tmp_path / "gap.png").is_file()


def test_a_warped_scene_is_left_out(tmp_path: Path) -> None:
    scene = tiny_scene()
    ndc = NDC(torch.eye(4, dtype=torch.float64)[:3], 1.0, 1.0, 1.0)
    warped = replace(scene, cameras=replace(scene.cameras, ndc=ndc))
    assert compare(warped, ball(0.5), 0.45, tmp_path / "gap.png") is None
    assert not (tmp_path / "gap.png").exists()


def test_views_are_spread_and_different() -> None:
    scene = tiny_scene()
    chosen = spread_views(scene)
    assert len(set(chosen)) == 4
    assert set(chosen) <= set(scene.train_indices)
    centres = scene.cameras.c2w[:, :, 3]
    nearest = torch.cdist(centres[chosen], centres[chosen]).fill_diagonal_(9.0).min()
    first = list(scene.train_indices[:4])
    assert nearest > torch.cdist(centres[first], centres[first]).fill_diagonal_(9.0).min()
    assert spread_views(scene, 100) == list(scene.train_indices)
    one_place = replace(scene, cameras=replace(scene.cameras, c2w=scene.cameras.c2w[:1].repeat(10, 1, 1)))
    assert len(set(spread_views(one_place))) == 4
