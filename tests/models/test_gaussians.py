"""Gaussians of cones: against points drawn in them, and contraction against differences in float64."""

import math

import pytest
import torch
from torch import Tensor

from models.contraction import contract
from models.gaussians import Gaussians, cone_gaussians, contract_gaussians, frustum_moments

DOUBLE = torch.float64


def unit(vector: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor([vector], dtype=DOUBLE))


def points_in_frustum(t0: float, t1: float, radius: float, count: int = 400_000) -> Tensor:
    """Uniform draws in the cone around z with ``radius`` at z = 1: z by its cube, then a disc."""
    generator = torch.Generator().manual_seed(3)
    u, angle, share = torch.rand(3, count, generator=generator, dtype=DOUBLE)
    z = (t0**3 + u * (t1**3 - t0**3)) ** (1 / 3)
    across = radius * z * share.sqrt()
    angle = 2 * math.pi * angle
    return torch.stack([across * angle.cos(), across * angle.sin(), z], dim=1)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 2.0), (2.0, 2.1), (0.5, 40.0)])
def test_moments_are_those_of_points_in_the_frustum(t0: float, t1: float) -> None:
    points = points_in_frustum(t0, t1, radius=0.3)
    mean, along, across = frustum_moments(*torch.tensor([[t0], [t1]], dtype=DOUBLE))
    variances = points.var(dim=0)
    assert mean.item() == pytest.approx(points[:, 2].mean().item(), rel=3e-3)
    assert along.item() == pytest.approx(variances[2].item(), rel=8e-3)
    assert 0.3**2 * across.item() == pytest.approx(variances[:2].mean().item(), rel=8e-3)


@pytest.mark.parametrize(("t0", "t1"), [(5.0, 5.00001), (3e5, 1e6), (0.2, 1e6), (0.0, 0.0)])
def test_thin_and_long_frustums_survive_float32(t0: float, t1: float) -> None:
    # The moments of t with density proportional to t^2, as fractions of integrals.
    def moment(power: int) -> float:
        n = power + 3
        return sum(t0**k * t1 ** (n - 1 - k) for k in range(n)) / n  # (t1^n - t0^n) / (n (t1 - t0))

    found = frustum_moments(*torch.tensor([[t0], [t1]]))
    assert all(torch.isfinite(value).all() for value in found)
    if t1 > 0:
        mean = moment(1) / moment(0)
        assert found[0].item() == pytest.approx(mean, rel=1e-6)
        assert found[2].item() == pytest.approx(moment(2) / moment(0) / 4, rel=1e-5)
        if t1 > 1.1 * t0:
            assert found[1].item() == pytest.approx(moment(2) / moment(0) - mean**2, rel=1e-4)
        else:
            assert found[1].item() == pytest.approx((t1 - t0) ** 2 / 12, rel=0.05)


def test_cones_lie_along_their_rays() -> None:
    origins = torch.tensor([[1.0, 2, 3], [-1, 0, 0.5]], dtype=DOUBLE)
    directions = torch.cat([unit([1, -2, 0.5]), unit([0, 0, 1])])
    radii = torch.tensor([0.01, 0.2], dtype=DOUBLE)
    edges = torch.tensor([[1.0, 2, 4, 4], [0, 0.5, 1, 3]], dtype=DOUBLE)
    found = cone_gaussians(origins, directions, radii, edges)
    assert found.means.shape == (6, 3)
    for ray in range(2):
        for k in range(3):
            mean, along, across = frustum_moments(edges[ray, k], edges[ray, k + 1])
            d = directions[ray]
            axis = torch.outer(d, d)
            expected = along * axis + radii[ray] ** 2 * across * (torch.eye(3, dtype=DOUBLE) - axis)
            torch.testing.assert_close(found.covariances[3 * ray + k], expected)
            torch.testing.assert_close(found.means[3 * ray + k], origins[ray] + mean * d)


def test_extent_along_directions() -> None:
    torch.manual_seed(1)
    gaussians = Gaussians(torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, 3, dtype=DOUBLE))
    directions = torch.randn(5, 3, dtype=DOUBLE)
    means, variances = gaussians.along(directions)
    torch.testing.assert_close(means, torch.einsum("di,si->sd", directions, gaussians.means))
    expected = torch.einsum("di,sij,dj->sd", directions, gaussians.covariances, directions)
    torch.testing.assert_close(variances, expected)


def test_cubes_vary_as_uniform_points_in_them() -> None:
    cubes = Gaussians.cubes(torch.zeros(2, 3), 0.6)
    torch.testing.assert_close(cubes.covariances, (0.36 / 12 * torch.eye(3)).repeat(2, 1, 1))
    assert (Gaussians.cubes(torch.zeros(2, 3), 0.0).roots == 0).all()


def jacobian(position: Tensor, step: float = 1e-6) -> Tensor:
    """Of the contraction, by central differences."""
    offsets = step * torch.eye(3, dtype=DOUBLE)
    ahead, behind = contract(position + offsets), contract(position - offsets)
    return ((ahead - behind) / (2 * step)).T


@pytest.mark.parametrize("distance", [0.0, 0.4, 0.99, 1.01, 1.7, 12.0, 300.0])
def test_contraction_is_linearised_by_its_jacobian(distance: float) -> None:
    torch.manual_seed(2)
    means = distance * torch.nn.functional.normalize(torch.randn(6, 3, dtype=DOUBLE))
    gaussians = Gaussians(means, torch.randn(6, 3, 3, dtype=DOUBLE))
    found = contract_gaussians(gaussians)
    for k in range(6):
        at = jacobian(means[k])
        expected = at @ gaussians.covariances[k] @ at.T
        torch.testing.assert_close(found.covariances[k], expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.means, contract(means))


def test_far_cones_keep_their_variances_in_float32() -> None:
    """Rays from cameras at 1 that end a million units away: they shrink most along themselves."""
    directions = torch.nn.functional.normalize(torch.randn(20, 3, dtype=DOUBLE))
    origins = torch.nn.functional.normalize(torch.randn(20, 3, dtype=DOUBLE))
    edges = torch.tensor([0.2, 0.5, 2.0, 10.0, 1e3, 1e6], dtype=DOUBLE).expand(20, 6)
    radii = torch.full((20,), 1e-3, dtype=DOUBLE)
    exact = contract_gaussians(cone_gaussians(origins, directions, radii, edges))
    single = cone_gaussians(origins.float(), directions.float(), radii.float(), edges.float())
    single = contract_gaussians(single)
    axes = torch.nn.functional.normalize(torch.randn(21, 3))
    variances, expected = single.along(axes)[1].double(), exact.along(axes.double())[1]
    # Times 4^11, the finest octave's square, an error of 1e-9 is 0.4 % of what damps it.
    torch.testing.assert_close(variances, expected, atol=1e-9, rtol=1e-3)
    assert (variances >= 0).all()
