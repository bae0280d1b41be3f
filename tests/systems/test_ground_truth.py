"""Errors of rendered views against a surface that is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from process_data.cameras import image_rays
from process_data.synthetic import SyntheticConfig, load_synthetic
from systems.ground_truth import known_surface, surface_errors
from systems.rendering import ViewRender
from utils.types import Lens, Scene

RADIUS = 0.5


@pytest.fixture(scope="module")
def scene() -> Scene:
    return load_synthetic(SyntheticConfig(scene="sphere", num_images=4, image_size=64, holdout=2))


def sphere_seen(scene: Scene, view: int, radius: float) -> ViewRender:
    """What a perfect renderer of a sphere around the origin shows: distances along rays, and normals."""
    rays = image_rays(scene.cameras, view)
    middle = -(rays.origins * rays.directions).sum(dim=1)
    inside = radius**2 - (rays.origins.square().sum(dim=1) - middle**2)
    hits = inside > 0
    distance = torch.where(hits, middle - inside.clamp(min=0).sqrt(), 0.0)
    normal = torch.where(hits[:, None], (rays.origins + distance[:, None] * rays.directions) / radius, 0.0)
    shape = (64, 64)
    rgb = torch.ones(*shape, 3)
    return ViewRender(rgb, hits.float().view(shape), distance.view(shape), normal.view(*shape, 3))


def test_the_true_surface_has_no_errors(scene: Scene) -> None:
    surface = known_surface(scene)
    assert surface is not None
    np.testing.assert_allclose(np.linalg.norm(surface.vertices, axis=1), RADIUS, atol=1e-5)
    errors = surface_errors(sphere_seen(scene, 1, RADIUS), surface, scene.cameras, 1)
    assert errors["depth_abs_rel"] < 2e-4
    assert errors["depth_rmse"] < 2e-3
    assert errors["normal_degrees"] < 0.5


def test_a_smaller_sphere_is_too_far_away(scene: Scene) -> None:
    surface = known_surface(scene)
    assert surface is not None
    view, shrunk = sphere_seen(scene, 1, RADIUS), sphere_seen(scene, 1, 0.45)
    errors = surface_errors(shrunk, surface, scene.cameras, 1)
    both = shrunk.opacity > 0.5
    # Depths, not distances along the rays; relative to the truth.
    cosine = image_rays(scene.cameras, 1).directions @ scene.cameras.c2w[1, :, 2]
    difference = ((shrunk.depth - view.depth) * cosine.view(64, 64))[both].double()
    assert errors["depth_rmse"] == pytest.approx(float(difference.square().mean().sqrt()), rel=0.01)
    relative = difference / (view.depth * cosine.view(64, 64))[both]
    assert errors["depth_abs_rel"] == pytest.approx(float(relative.mean()), rel=0.01)
    assert errors["normal_degrees"] > 3


def test_nothing_in_common_has_no_errors(scene: Scene) -> None:
    surface = known_surface(scene)
    assert surface is not None
    empty = ViewRender(
        torch.ones(64, 64, 3), torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64, 3)
    )
    assert all(np.isnan(value) for value in surface_errors(empty, surface, scene.cameras, 1).values())


def test_where_the_surface_is_not_known(scene: Scene) -> None:
    assert known_surface(replace(scene, reference_mesh=None)) is None
    lens = Lens("SIMPLE_RADIAL", (60.0, 32.0, 32.0, 0.1), (64, 64))
    assert known_surface(replace(scene, cameras=replace(scene.cameras, lenses=(lens,) * 4))) is None
