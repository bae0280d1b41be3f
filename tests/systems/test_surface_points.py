"""Points on the surface: on it, as many on every part of its area, and none at the sphere's border."""

import math

import pytest
import torch
from torch import Tensor

from systems.surface_points import is_on_surface, points_in_ball, points_near_surface
from utils.types import Field

CENTRES = torch.tensor([[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]])
RADII = torch.tensor([0.4, 0.2])


def two_balls(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance with a slope of 1.5, as of a field that is not quite a distance."""
    away = positions[:, None] - CENTRES
    lengths = away.norm(dim=2)
    sdf, which = (lengths - RADII).min(dim=1)
    rows = torch.arange(len(positions))
    return 1.5 * sdf, 1.5 * away[rows, which] / lengths[rows, which, None]


def test_points_fill_the_ball_evenly() -> None:
    points = points_in_ball(20000, torch.Generator().manual_seed(0))
    assert float(points.norm(dim=1).max()) <= 1.0
    # E x^2 = 1/5 in a ball; half of it lies within a radius of 0.5^(1/3).
    assert torch.allclose(points.square().mean(dim=0), torch.full((3,), 0.2), atol=0.005)
    assert abs(float((points.norm(dim=1) < 0.5 ** (1 / 3)).float().mean()) - 0.5) < 0.01
    assert torch.allclose(points.mean(dim=0), torch.zeros(3), atol=0.01)


def on_surface(field: Field, count: int, seed: int) -> Tensor:
    points, counts = points_near_surface(field, count, torch.Generator().manual_seed(seed))
    assert points.shape == (count, 3)
    assert not points.requires_grad
    return points[counts & is_on_surface(points, field(points)[0])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_lie_on_the_surface_by_its_area(seed: int) -> None:
    points = on_surface(two_balls, 6000, seed)
    assert len(points) > 1500
    assert float(two_balls(points)[0].abs().max()) < 3e-3
    # Four times the area, four times the points.
    on_large = points[:, 0] < 0
    assert abs(float(on_large.float().mean()) - 0.8) < 0.02
    normal = (points[on_large] - CENTRES[0]) / RADII[0]
    spread = normal.T @ normal / len(normal)
    assert torch.allclose(spread, torch.eye(3) / 3, atol=0.02)


def test_a_thin_rod_has_little_more_than_its_share() -> None:
    def ball_and_rod(positions: Tensor) -> tuple[Tensor, Tensor]:
        """A ball of radius 0.4, and beside it a rod of radius 0.015 and length 1.2 along z."""
        points = positions.detach().requires_grad_()
        along = points[:, 2].clamp(-0.6, 0.6)
        axis = torch.stack([torch.full_like(along, 0.7), torch.zeros_like(along), along], dim=1)
        with torch.enable_grad():
            sdf = torch.minimum(points.norm(dim=1) - 0.4, (points - axis).norm(dim=1) - 0.015)
            (gradient,) = torch.autograd.grad(sdf.sum(), points)
        return sdf.detach(), gradient

    points = on_surface(ball_and_rod, 8000, 0)
    share = float((points[:, 0] > 0.5).float().mean())
    expected = 1.2 * 0.015 / (1.2 * 0.015 + 2 * 0.4**2)
    assert expected < share < 2 * expected


def test_what_has_not_arrived_does_not_count() -> None:
    def far(positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(positions),), 0.3), torch.zeros_like(positions)

    assert len(on_surface(far, 50, 0)) == 0
    points, _ = points_near_surface(far, 50, torch.Generator().manual_seed(0))
    assert torch.isfinite(points).all()


def test_a_surface_at_the_border_does_not_count() -> None:
    def shell(positions: Tensor) -> tuple[Tensor, Tensor]:
        radius = positions.norm(dim=1)
        return radius - 0.999, positions / radius[:, None]

    points, counts = points_near_surface(shell, 50, torch.Generator().manual_seed(0))
    assert counts.any()
    assert math.isclose(float(points[counts].norm(dim=1).mean()), 0.999, rel_tol=1e-4)
    assert len(on_surface(shell, 50, 0)) == 0
