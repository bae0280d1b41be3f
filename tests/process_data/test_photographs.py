"""Source views by brute force, and windows that hold what the pictures show around their pixel."""

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from process_data.batches import Priors, RayBatches
from process_data.cameras import rays_from_pixels
from process_data.photographs import MAX_SOURCES, select_sources
from utils.errors import ConfigError
from utils.ndc import NDC
from utils.types import Batch, Cameras, ImageStack, Lens, Scene, SparsePoints, Windows

KEY = "key.of.windows"


def scene_of(num_views: int = 30, spread: float = 1.0) -> Scene:
    """Pictures of different sizes full of noise, from cameras in a cone, all looking inwards."""
    draw = np.random.default_rng(0)
    poses, images = [], []
    for _ in range(num_views):
        center = draw.normal(size=3) * spread + [0.0, 0.0, -2.5]
        forward = -center / np.linalg.norm(center)
        right = np.cross([0.0, 1.0, 0.0], forward)
        right /= np.linalg.norm(right)
        poses.append(np.stack([right, np.cross(forward, right), forward, center], axis=1))
        width, height = draw.integers(8, 16, 2)
        images.append(draw.integers(0, 256, (height, width, 3)).astype(np.uint8))
    stack = ImageStack.from_images(images)
    matrix = torch.tensor([[20.0, 0, 5], [0, 22, 6], [0, 0, 1]])
    return Scene(
        name="noise",
        cameras=Cameras(torch.tensor(np.array(poses)).float(), matrix.repeat(num_views, 1, 1), stack.size),
        images=stack,
        image_names=tuple(str(view) for view in range(num_views)),
        train_indices=tuple(view for view in range(num_views) if view % 4),
        test_indices=tuple(range(0, num_views, 4)),
        world_from_scene=torch.eye(4, dtype=torch.float64),
    )


def angle(cameras: Cameras, first: int, second: int) -> float:
    a, b = (cameras.c2w[view, :, 3].double() for view in (first, second))
    return float(torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(), a @ b)))


def test_sources_are_the_nearest_that_are_not_too_near() -> None:
    scene = scene_of()
    found = select_sources(scene.cameras, None, scene.train_indices)
    assert found.shape == (30, MAX_SOURCES)
    lengths = set()
    for view in range(30):
        expected = sorted(
            (angle(scene.cameras, view, other), other) for other in scene.train_indices if other != view
        )
        expected = [(degrees, other) for degrees, other in expected if 5 <= degrees <= 45][:MAX_SOURCES]
        listed = [other for other in found[view].tolist() if other >= 0]
        assert listed == ([other for _, other in expected] if view in scene.train_indices else [])
        assert found[view, len(listed) :].tolist() == [-1] * (MAX_SOURCES - len(listed))
        lengths.add(len(listed))
    assert {0, MAX_SOURCES} < lengths


def test_views_that_share_points_come_first() -> None:
    scene, draw = scene_of(), np.random.default_rng(1)
    seen = draw.random((200, 30)) < draw.random(30)
    # Some points are listed twice.
    observations = np.argwhere(seen)
    observations = np.concatenate([observations, observations[:300]])
    observations = observations[observations[:, 0].argsort(kind="stable")]
    points = SparsePoints(
        np.zeros((200, 3)), np.zeros((200, 3), np.uint8), np.zeros(200), observations.astype(np.int64)
    )
    found = select_sources(scene.cameras, points, scene.train_indices)
    compared = 0
    for view in scene.train_indices:
        expected = sorted(
            (-int((seen[:, view] & seen[:, other]).sum()), angle(scene.cameras, view, other), other)
            for other in scene.train_indices
            if 5 <= angle(scene.cameras, view, other) <= 45
        )
        listed = [other for other in found[view].tolist() if other >= 0]
        assert listed == [other for *_, other in expected][:MAX_SOURCES]
        compared += len(listed)
    assert compared > 50
    assert not np.array_equal(found, select_sources(scene.cameras, None, scene.train_indices))


def windows_of(batch: Batch) -> Windows:
    assert batch.windows is not None
    return batch.windows()


def test_windows_hold_the_neighbouring_pixels_and_their_rays() -> None:
    scene = scene_of()
    priors = Priors(windows=KEY, window_rays=150, window_width=5)
    batch = RayBatches(scene, seed=2, priors=priors).draw(200)
    windows = windows_of(batch)
    assert len(windows) == 150
    sources = select_sources(scene.cameras, None, scene.train_indices)
    whole = 0
    for ray in range(150):
        view = int(batch.rays.camera_indices[ray])
        picture = scene.images.image(view).numpy()
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        color = (batch.rgb[ray] * 255).round().byte().numpy()
        (row, column), *others = np.argwhere((picture == color).all(axis=2))
        assert not others, "the picture's colours are all different"
        height, width = grey.shape
        is_whole = 2 <= row < height - 2 and 2 <= column < width - 2
        assert bool(windows.is_whole[ray]) == is_whole
        assert windows.sources[ray].tolist() == sources[view].tolist()
        if not is_whole:
            continue
        whole += 1
        expected = grey[row - 2 : row + 3, column - 2 : column + 3].reshape(-1) / 255.0
        np.testing.assert_allclose(windows.grey[ray].numpy(), expected, atol=1e-6)
        pixels = torch.tensor(
            [[column + u + 0.5, row + v + 0.5] for v, u in itertools.product(range(-2, 3), range(-2, 3))]
        )
        rays = rays_from_pixels(scene.cameras, torch.full((25,), view), pixels.float())
        torch.testing.assert_close(windows.directions[ray], rays.directions)
    assert 20 < whole < 150
    assert len(windows_of(RayBatches(scene, priors=priors).draw(9))) == 9


def test_windows_leave_the_draws_as_they_are() -> None:
    plain, other = (
        RayBatches(scene_of(), seed=3, priors=priors).draw(50) for priors in (Priors(), Priors(windows=KEY))
    )
    assert plain.windows is None
    assert torch.equal(plain.rgb, other.rgb)


def test_captures_that_cannot_be_compared_name_the_key() -> None:
    scene, priors = scene_of(), Priors(windows=KEY)
    alone = rf"^{KEY}: no two of the 1 training views see the scene's centre from directions 5 to 45"
    with pytest.raises(ConfigError, match=alone):
        RayBatches(scene, indices=[1], priors=priors)
    with pytest.raises(ConfigError, match=rf"^{KEY}: no two of the 22 .*; set it to 0, or hold out fewer"):
        RayBatches(scene_of(spread=0.01), priors=priors)
    lens = Lens("SIMPLE_RADIAL", (20.0, 5.0, 6.0, 0.1), (10, 12))
    bent = replace(scene, cameras=replace(scene.cameras, lenses=(lens,) * 30))
    with pytest.raises(ConfigError, match=rf"^{KEY}: .* lenses distort; set it to 0, or undistort"):
        RayBatches(bent, priors=priors)
    ndc = NDC(torch.eye(3, 4, dtype=torch.float64), tan_x=0.8, tan_y=0.5, near=2.0)
    warped = replace(scene, cameras=replace(scene.cameras, ndc=ndc))
    with pytest.raises(ConfigError, match=rf"^{KEY}: .* dataset\.ndc warps"):
        RayBatches(warped, priors=priors)
