import math

import numpy as np
import pytest
import torch

from process_data.cameras import (
    RayGenerator,
    decompose_projection,
    grid_size,
    image_rays,
    intersect_unit_sphere,
    rays_from_pixels,
    scale_intrinsics,
    split_views,
)
from utils.errors import ConfigError
from utils.types import Cameras


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return rotation * np.sign(np.linalg.det(rotation))


def random_cameras(count: int, seed: int = 0) -> Cameras:
    rng = np.random.default_rng(seed)
    c2w = np.stack([np.column_stack([random_rotation(rng), rng.normal(size=3) * 3]) for _ in range(count)])
    intrinsics = np.stack(
        [
            [[f, s, 9.3], [0, 1.1 * f, 5.2], [0, 0, 1]]
            for f, s in zip(rng.uniform(10, 90, count), rng.normal(size=count), strict=True)
        ]
    )
    return Cameras(
        torch.from_numpy(c2w).float(), torch.from_numpy(intrinsics).float(), torch.tensor([[20, 12]] * count)
    )


def camera_at_minus_z(width: int = 4, height: int = 2, focal: float = 2.0) -> Cameras:
    """At (0, 0, -3), axes as in the scene, looking at the origin, principal point in the middle."""
    c2w = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -3]]])
    intrinsics = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]])
    return Cameras(c2w, intrinsics, torch.tensor([[width, height]]))


def test_ray_by_hand() -> None:
    # (u, v) = (4, 1): (4 - 2) / 2 = 1 to the right, level, so the direction is (1, 0, 1) / sqrt 2.
    rays = rays_from_pixels(camera_at_minus_z(), torch.tensor([0, 0]), torch.tensor([[4.0, 1.0], [2.0, 1.0]]))
    root = math.sqrt(0.5)
    torch.testing.assert_close(rays.directions, torch.tensor([[root, 0, root], [0, 0, 1]]))
    torch.testing.assert_close(rays.origins, torch.tensor([[0.0, 0, -3]] * 2))
    assert rays.near[0] > rays.far[0], "it passes the sphere at distance 3 / sqrt 2"
    assert (rays.near[1].item(), rays.far[1].item()) == (2.0, 4.0)


def test_rays_invert_projection_for_any_camera() -> None:
    cameras = random_cameras(7)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(7, (200,), generator=generator)
    pixels = torch.rand(200, 2, generator=generator) * torch.tensor([20.0, 12.0])
    rays = RayGenerator.from_cameras(cameras).rays(index, pixels)
    torch.testing.assert_close(rays.directions.norm(dim=1), torch.ones(200))
    for ray in range(200):
        pose, matrix = cameras.c2w[index[ray]].double(), cameras.intrinsics[index[ray]].double()
        point = rays.origins[ray].double() + 2.5 * rays.directions[ray].double()
        seen = matrix @ (pose[:, :3].T @ (point - pose[:, 3]))
        assert seen[2] > 0, "in front of the camera"
        torch.testing.assert_close((seen[:2] / seen[2]).float(), pixels[ray], atol=2e-4, rtol=0)


def test_sphere_by_hand() -> None:
    origins = torch.tensor(
        [[0.0, 0, -3], [0, 0, 3], [0, 0, 0], [0, 0.5, 0], [0, 1, -3], [0, 1.001, -3], [0, 0, 1], [0, 0, 1]]
    )
    up, down = [0.0, 0.0, 1.0], [0.0, 0.0, -1.0]
    directions = torch.tensor([up, up, up, up, up, up, up, down])
    near, far = intersect_unit_sphere(origins, directions)
    h = math.sqrt(0.75)
    torch.testing.assert_close(near, torch.tensor([2.0, 1, 0, 0, 3, 1, 0, 0]))
    torch.testing.assert_close(far, torch.tensor([4.0, 0, 1, h, 3, 0, 0, 2]))


def test_sphere_points_lie_on_it_even_from_far_away() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(500, 3, generator=generator)
    targets = 0.95 * targets / targets.norm(dim=1, keepdim=True)
    origins = 50.0 * torch.nn.functional.normalize(torch.randn(500, 3, generator=generator), dim=1)
    directions = torch.nn.functional.normalize(targets - origins, dim=1)
    near, far = intersect_unit_sphere(origins, directions)
    assert (near < far).all()
    for t in (near, far):
        # 50 units away float32 resolves 4e-6; a few roundings more are allowed.
        torch.testing.assert_close(
            (origins + t[:, None] * directions).norm(dim=1), torch.ones(500), atol=5e-5, rtol=0
        )


def test_image_rays_go_row_by_row_through_pixel_centres() -> None:
    cameras = random_cameras(3)
    rays = image_rays(cameras, 2)
    assert len(rays) == 20 * 12
    assert (rays.camera_indices == 2).all()
    for column, row in ((0, 0), (19, 0), (3, 7), (19, 11)):
        one = rays_from_pixels(cameras, torch.tensor([2]), torch.tensor([[column + 0.5, row + 0.5]]))
        torch.testing.assert_close(rays.directions[row * 20 + column], one.directions[0])


def test_coarse_grid_is_centred_on_the_fine_one() -> None:
    cameras = camera_at_minus_z(8, 4)
    fine, coarse = image_rays(cameras, 0), image_rays(cameras, 0, scale=0.5)
    assert grid_size(cameras, 0, 0.5) == (4, 2)
    plane = [r.directions[:, :2] / r.directions[:, 2:] for r in (fine, coarse)]
    blocks = plane[0].view(2, 2, 4, 2, 2).mean(dim=(1, 3)).view(-1, 2)
    torch.testing.assert_close(plane[1], blocks)
    assert grid_size(cameras, 0, 0.01) == (1, 1)
    with pytest.raises(ValueError, match="scale"):
        image_rays(cameras, 0, scale=0.0)


def test_radii_by_hand() -> None:
    # A pixel is 1 / 2 wide at depth 1; along the second ray depth 1 is sqrt 2 away.
    rays = rays_from_pixels(camera_at_minus_z(), torch.tensor([0, 0]), torch.tensor([[2.0, 1.0], [4.0, 1.0]]))
    width = 0.5 * 2 / math.sqrt(12)
    torch.testing.assert_close(rays.radii, torch.tensor([width, width / math.sqrt(2)]))
    last = rays[1:].to("cpu").radii
    assert last is not None
    torch.testing.assert_close(last, rays.radii[1:])


def test_radii_come_from_the_step_to_the_next_pixels() -> None:
    cameras = random_cameras(5)
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(5, (50,), generator=generator)
    pixels = (torch.rand(50, 2, generator=generator) * torch.tensor([20.0, 12.0])).double()

    def on_plane(pixels: torch.Tensor) -> torch.Tensor:
        """Points that the pixels show at depth 1."""
        homogeneous = torch.cat([pixels, torch.ones(50, 1)], dim=1)
        return torch.linalg.solve(cameras.intrinsics.double()[index], homogeneous)

    middle = on_plane(pixels)
    steps = [(on_plane(pixels + torch.tensor(step)) - middle).norm(dim=1) for step in ([1.0, 0], [0, 1.0])]
    expected = 0.5 * (steps[0] + steps[1]) * 2 / math.sqrt(12) / middle.norm(dim=1)
    rays = rays_from_pixels(cameras, index, pixels.float())
    torch.testing.assert_close(rays.radii, expected.float(), rtol=1e-5, atol=0)


def test_coarse_pixels_are_wider() -> None:
    cameras = camera_at_minus_z(8, 4)
    coarse = image_rays(cameras, 0, scale=0.5)
    exact = rays_from_pixels(cameras, torch.zeros(8, dtype=torch.int64), pixels_of_grid(4, 2) * 2)
    torch.testing.assert_close(coarse.directions, exact.directions)
    torch.testing.assert_close(coarse.radii, 2 * exact.radii)


def pixels_of_grid(columns: int, rows: int) -> torch.Tensor:
    return torch.tensor([[u + 0.5, v + 0.5] for v in range(rows) for u in range(columns)])


def test_scaled_intrinsics_project_to_scaled_pixels() -> None:
    matrix = torch.tensor([[100.0, 3, 41], [0, 90, 29], [0, 0, 1]])
    point = torch.tensor([0.3, -0.2, 2.0])
    full, half = matrix @ point, scale_intrinsics(matrix, (0.5, 0.25)) @ point
    torch.testing.assert_close(half[:2] / half[2], full[:2] / full[2] * torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(scale_intrinsics(matrix[None], 0.5)[0, 0], matrix[0] / 2)


@pytest.mark.parametrize("factor", [1.0, -1.0, 250.0, -3e-4])
def test_projection_decomposes_whatever_its_scale(factor: float) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        intrinsics = np.array(
            [[rng.uniform(300, 3000), rng.normal() * 20, 411.2], [0, rng.uniform(300, 3000), 309], [0, 0, 1]]
        )
        rotation, center = random_rotation(rng), rng.normal(size=3) * 5
        projection = factor * intrinsics @ np.column_stack([rotation.T, -rotation.T @ center])
        found, pose = decompose_projection(projection)
        np.testing.assert_allclose(found, intrinsics, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(pose, np.column_stack([rotation, center]), rtol=1e-9, atol=1e-9)
        assert np.linalg.det(pose[:, :3]) == pytest.approx(1.0)


def test_singular_projection_is_refused() -> None:
    flat = np.array([[100.0, 0, 50, 1], [0, 100, 50, 2], [100, 100, 100, 3]])
    for bad, what in (
        (flat, "singular"),
        (np.zeros((3, 4)), "singular"),
        (np.full((3, 4), np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=what):
            decompose_projection(bad)


def test_split_views() -> None:
    assert split_views(5, 2) == ((1, 3), (0, 2, 4))
    assert split_views(3, 0) == split_views(3, None) == split_views(3, []) == ((0, 1, 2), ())
    assert split_views(4, [3, 1, 3]) == ((0, 2), (1, 3))
    assert split_views(3, 8) == ((1, 2), (0,))


@pytest.mark.parametrize("holdout", [1, -2, [0, 1, 2], [3], [-1], "8", 8.0, ["a"], [True]])
def test_impossible_holdout_is_an_error(holdout: object) -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.holdout: .*; "):
        split_views(3, holdout)
