"""Points on the surface: on it, as many on every part of its area, and none at the sphere's border."""

import math

import torch
from torch import Tensor

from systems.surface_points import points_in_ball, points_on_surface

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


def test_points_lie_on_the_surface_by_its_area() -> None:
    points, is_there = points_on_surface(two_balls, 4000, torch.Generator().manual_seed(0))
    assert points.shape == (4000, 3)
    assert not points.requires_grad
    assert float(is_there.float().mean()) > 0.95
    assert float(two_balls(points[is_there])[0].abs().max()) < 3e-3
    on_large = points[is_there][:, 0] < 0
    # Four times the area, four times the points.
    share = float(on_large.float().mean())
    assert abs(share - 0.8) < 0.04
    normal = (points[is_there][on_large] - CENTRES[0]) / RADII[0]
    spread = normal.T @ normal / len(normal)
    assert torch.allclose(spread, torch.eye(3) / 3, atol=0.04)


def test_what_has_not_arrived_does_not_count() -> None:
    def far(positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(positions),), 0.3), torch.zeros_like(positions)

    points, is_there = points_on_surface(far, 50, torch.Generator().manual_seed(0))
    assert not is_there.any()
    assert torch.isfinite(points).all()


def test_a_surface_at_the_border_does_not_count() -> None:
    def shell(positions: Tensor) -> tuple[Tensor, Tensor]:
        radius = positions.norm(dim=1)
        return radius - 0.999, positions / radius[:, None]

    points, is_there = points_on_surface(shell, 50, torch.Generator().manual_seed(0))
    assert math.isclose(float(points.norm(dim=1).mean()), 0.999, rel_tol=1e-4)
    assert not is_there.any()
