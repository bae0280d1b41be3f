import math

import pytest
import torch
from torch import Tensor

from process_data.cameras import intersect_unit_sphere, rays_from_pixels
from utils.errors import ConfigError
from utils.ndc import NDC, average_pose, frame_of
from utils.types import Cameras

SIDE = 1.0 / math.sqrt(3.0)
"""Half width of the cube that the frustum fills."""
PLAIN = NDC(torch.eye(3, 4, dtype=torch.float64), tan_x=0.8, tan_y=0.5, near=2.0)
"""A reference camera at the origin."""


def turn(angle: float, axis: int) -> Tensor:
    matrix = torch.eye(3, dtype=torch.float64)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def forward_facing(num_views: int = 12) -> Cameras:
    """Cameras scattered about (3, -2, 7) that look roughly along one slanted direction."""
    generator = torch.Generator().manual_seed(1)
    base = turn(0.7, 1) @ turn(-0.4, 0) @ turn(0.3, 2)
    angles = 0.15 * torch.randn(num_views, 3, generator=generator, dtype=torch.float64)
    shifts = 0.4 * torch.randn(num_views, 3, generator=generator, dtype=torch.float64)
    poses = []
    for (x, y, z), shift in zip(angles.tolist(), shifts, strict=True):
        rotation = base @ turn(x, 0) @ turn(y, 1) @ turn(z, 2)
        center = torch.tensor([3.0, -2.0, 7.0], dtype=torch.float64) + base @ shift
        poses.append(torch.cat([rotation, center[:, None]], dim=1))
    intrinsics = torch.tensor([[90.0, 0, 52], [0, 95, 33], [0, 0, 1]]).expand(num_views, 3, 3).clone()
    size = torch.tensor([[101, 67]]).expand(num_views, 2).clone()
    return Cameras(torch.stack(poses).float(), intrinsics, size)


def warp_of(cameras: Cameras, near: float = 2.0) -> NDC:
    return frame_of(cameras.c2w, cameras.intrinsics, cameras.size, near)


def corner_rays(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Origins and directions through all corners of all pictures."""
    views = torch.arange(len(cameras)).repeat_interleave(4)
    corners = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).repeat(len(cameras), 1)
    rays = rays_from_pixels(cameras, views, corners * cameras.size[views])
    return rays.origins, rays.directions


def test_points_by_hand() -> None:
    points = torch.tensor([[0, 0, 2.0], [1.6, -1.0, 2.0], [8.0, 5.0, 10.0], [0, 0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[0, 0, -1.0], [1, -1, -1], [1, 1, 0.6], [0, 0, 0]], dtype=torch.float64) * SIDE
    torch.testing.assert_close(PLAIN.to_field(points), expected)
    torch.testing.assert_close(PLAIN.to_metric(expected), points)


def test_a_ray_by_hand() -> None:
    # Through (1, 0, 2) on the near plane and (1.5, 0, 4), towards x/z = 1/4 at infinity.
    origins, directions = PLAIN.warp_rays(
        torch.tensor([[0.5, 0, 0]], dtype=torch.float64), torch.tensor([[1.0, 0, 4]], dtype=torch.float64)
    )
    start = torch.tensor([[0.5 / 0.8, 0, -1.0]], dtype=torch.float64) * SIDE
    infinity = torch.tensor([[0.25 / 0.8, 0, 1.0]], dtype=torch.float64) * SIDE
    torch.testing.assert_close(origins, start)
    torch.testing.assert_close(directions, torch.nn.functional.normalize(infinity - start))
    far = PLAIN.distance_to_infinity(origins, directions)
    torch.testing.assert_close(origins + far[:, None] * directions, infinity)


def test_near_plane_and_infinity() -> None:
    warp = warp_of(forward_facing())
    pose = warp.c2w
    beyond = torch.tensor([2.0, 1e12], dtype=torch.float64)
    axis = pose[:, 3] + beyond[:, None] * pose[:, 2]
    torch.testing.assert_close(warp.to_field(axis)[:, 2], torch.tensor([-SIDE, SIDE], dtype=torch.float64))


def test_there_and_back() -> None:
    warp = warp_of(forward_facing())
    generator = torch.Generator().manual_seed(2)
    depth = 2.0 * torch.exp(6 * torch.rand(500, 1, generator=generator, dtype=torch.float64))
    slopes = 2 * torch.rand(500, 2, generator=generator, dtype=torch.float64) - 1
    points = torch.cat([slopes * depth, depth], dim=1) @ warp.c2w[:, :3].t() + warp.c2w[:, 3]
    torch.testing.assert_close(warp.to_metric(warp.to_field(points)), points, rtol=1e-9, atol=1e-9)
    # In single precision depth comes back from 1 - 2 near / z with an error that grows as z^2 / near.
    error = (warp.to_metric(warp.to_field(points.float())) - points).norm(dim=1)
    assert bool((error < 1e-6 * (depth[:, 0] ** 2 + 20)).all())


def test_behind_infinity_and_behind_the_camera_stay_finite() -> None:
    field = torch.tensor([[0.0, 0.1, SIDE], [0.2, 0.0, 0.9]])
    assert bool(PLAIN.to_metric(field).isfinite().all())
    behind = PLAIN.to_field(torch.tensor([[0.0, 0.0, -3.0], [1.0, 1.0, 0.0]]))
    assert bool(behind.isfinite().all())
    assert bool((behind.norm(dim=1) > 1).all())


def test_lines_map_to_lines_in_order() -> None:
    cameras = forward_facing()
    warp = warp_of(cameras)
    origins, directions = corner_rays(cameras)
    origins, directions = origins.double(), directions.double() * 3.0
    starts, ways = warp.warp_rays(origins, directions)
    torch.testing.assert_close(ways.norm(dim=1), torch.ones_like(ways[:, 0]))
    along_before = torch.full_like(ways[:, 0], -1e-9)
    for t in (2.0, 3.0, 10.0, 300.0, 1e6):
        points = warp.to_field(origins + t * directions)
        offset = points - starts
        along = (offset * ways).sum(dim=1)
        assert float((offset - along[:, None] * ways).norm(dim=1).max()) < 1e-9
        assert bool((along > along_before).all())
        assert bool((along < warp.distance_to_infinity(starts, ways)).all())
        along_before = along


def test_rays_start_on_the_near_plane_or_beyond() -> None:
    origins = torch.tensor([[0.1, 0.0, -5.0], [0.1, 0.0, 1.9], [0.1, 0.0, 3.0]])
    starts, _ = PLAIN.warp_rays(origins, torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3))
    torch.testing.assert_close(starts[:2, 2], torch.full((2,), -SIDE))
    torch.testing.assert_close(starts[2:], PLAIN.to_field(origins[2:]))


@pytest.mark.parametrize("near", [0.05, 0.5, 2.0, 30.0])
def test_what_all_cameras_see_lies_inside_the_cube(near: float) -> None:
    cameras = forward_facing()
    warp = warp_of(cameras, near)
    starts, ways = warp.warp_rays(*corner_rays(cameras))
    ends = starts + warp.distance_to_infinity(starts, ways)[:, None] * ways
    assert float(torch.stack([starts, ends]).abs().max()) < SIDE * (1 + 1e-5)
    # No wider than needed: some corner touches each pair of sides.
    reach = torch.cat([starts, ends]).abs().amax(dim=0)
    torch.testing.assert_close(reach[:2], torch.full((2,), SIDE), rtol=1e-4, atol=0)
    # The cube lies in the unit sphere, so every ray hits it.
    near_t, far_t = intersect_unit_sphere(starts, ways)
    assert bool((near_t < far_t).all())


def test_rays_backwards_miss_and_keep_gradients_finite() -> None:
    directions = torch.tensor(
        [[0.0, 0, -1], [1, 0, 0], [1, 0, 1e-9], [0, 0, 0], [0.1, 0.1, 1]], requires_grad=True
    )
    origins = torch.zeros(5, 3, requires_grad=True)
    starts, ways = PLAIN.warp_rays(origins, directions)
    near, far = intersect_unit_sphere(starts, ways)
    assert (near < far).tolist() == [False, False, False, False, True]
    torch.autograd.backward([(starts * torch.arange(3.0)).sum() + (ways * torch.arange(3.0)).sum()])
    for leaf in (origins, directions):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert bool((leaf.grad[4] != 0).any())


def test_gradients() -> None:
    warp = warp_of(forward_facing())
    points = warp.c2w[:, 3] + torch.tensor([[3.0], [9.0]], dtype=torch.float64) * warp.c2w[:, 2] + 0.1
    points.requires_grad_(True)
    assert torch.autograd.gradcheck(warp.to_field, (points,))
    field = warp.to_field(points).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(warp.to_metric, (field,))
    origins = (points.detach() - 6.0 * warp.c2w[:, 2]).requires_grad_(True)
    directions = (warp.c2w[:, 2] + torch.tensor([[0.1, 0.2, 0.0], [0.0, -0.3, 0.1]])).requires_grad_(True)
    assert torch.autograd.gradcheck(warp.warp_rays, (origins, directions))


def test_average_pose() -> None:
    poses = torch.eye(3, 4, dtype=torch.float64).repeat(2, 1, 1)
    poses[0, :, :3], poses[1, :, :3] = turn(0.3, 1), turn(-0.3, 1)
    poses[:, :, 3] = torch.tensor([[1.0, 0, 0], [3, 0, 4]])
    expected = torch.cat([torch.eye(3), torch.tensor([[2.0], [0], [2]])], dim=1).double()
    torch.testing.assert_close(average_pose(poses), expected)
    rotation = average_pose(forward_facing().c2w)[:, :3]
    torch.testing.assert_close(rotation.t() @ rotation, torch.eye(3, dtype=torch.float64))
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0)


def test_captures_that_do_not_face_forward_are_refused() -> None:
    cameras = forward_facing(4)
    around = cameras.c2w.clone()
    for view in range(4):
        around[view, :, :3] = turn(0.5 * math.pi * view, 1).float()
    with pytest.raises(ConfigError, match=r"dataset\.ndc: the cameras have no common viewing direction; "):
        frame_of(around, cameras.intrinsics, cameras.size, 1.0)
    for view in range(4):
        around[view, :, :3] = turn(1.4 * (view - 1.5), 1).float()
    with pytest.raises(ConfigError, match=r"dataset\.ndc: the cameras see more than the half space"):
        frame_of(around, cameras.intrinsics, cameras.size, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        warp_of(cameras, 0.0)
