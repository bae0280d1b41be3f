"""Resampling along rays: against NumPy in double precision, and against definitions written as loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.resampling import (
    anneal,
    dilate,
    invert_cumulative,
    resample_intervals,
    sample_points,
)


def histogram(num_rays: int = 6, num: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Uneven intervals from 0 to 1; some without weight, one without length."""
    lengths = torch.rand(num_rays, num, dtype=dtype) + 0.05
    lengths[0, 3] = 0.0
    edges = torch.cat([torch.zeros(num_rays, 1, dtype=dtype), lengths.cumsum(1)], dim=1)
    weights = torch.rand(num_rays, num, dtype=dtype)
    weights[:, 4] = 0.0
    weights[0, 3] = 0.0
    return edges / edges[:, -1:], weights


def test_shares_by_hand() -> None:
    edges = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    weights = torch.tensor([[1.0, 3.0, 0.0]])
    shares = torch.tensor([[0.0, 0.125, 0.25, 0.5, 0.999999]])
    expected = torch.tensor([[0.0, 0.5, 1.0, 1.0 + 1 / 3, 2.0]])
    torch.testing.assert_close(invert_cumulative(edges, weights, shares), expected, atol=1e-5, rtol=0)


def test_a_share_at_an_interval_without_weight_lies_behind_it() -> None:
    edges = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    distances = invert_cumulative(edges, weights, torch.tensor([[0.0, 0.5, 0.75]]))
    torch.testing.assert_close(distances, torch.tensor([[1.0, 3.0, 3.5]]))


def test_shares_against_numpy() -> None:
    edges, weights = histogram()
    shares = torch.rand(6, 200, dtype=torch.float64)
    distances = invert_cumulative(edges, weights, shares)
    for ray in range(6):
        # Only where the cumulative sum rises does it have an inverse, which NumPy interpolates.
        cumulative = np.concatenate([[0.0], np.cumsum(weights[ray].numpy())])
        cumulative /= cumulative[-1]
        again = np.interp(distances[ray].numpy(), edges[ray].numpy(), cumulative)
        np.testing.assert_allclose(again, shares[ray].numpy(), atol=1e-12)


def test_no_sample_in_an_interval_without_weight() -> None:
    edges, weights = histogram(dtype=torch.float32)
    distances = invert_cumulative(edges, weights, torch.rand(6, 500))
    inside = (distances > edges[:, 4:5] + 1e-6) & (distances < edges[:, 5:6] - 1e-6)
    assert not inside.any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_rays_without_a_word_are_sampled_evenly(bad: float) -> None:
    edges, weights = histogram(dtype=torch.float32)
    weights[1] = bad
    drawn = resample_intervals(edges, weights, 8, None)
    torch.testing.assert_close(drawn[1], torch.linspace(0, 1, 9), atol=1e-5, rtol=0)
    assert drawn.isfinite().all()
    expected = resample_intervals(edges[:1], weights[:1], 8, None)
    torch.testing.assert_close(drawn[:1], expected)


def test_a_ray_without_length() -> None:
    edges = torch.full((2, 5), 0.5)
    drawn = resample_intervals(edges, torch.ones(2, 4), 3, torch.Generator().manual_seed(0))
    assert (drawn == 0.5).all()


def test_even_weights_give_even_intervals() -> None:
    edges = torch.linspace(0, 1, 5, dtype=torch.float64).expand(3, 5)
    drawn = resample_intervals(edges, torch.ones(3, 4, dtype=torch.float64), 10, None)
    torch.testing.assert_close(drawn, torch.linspace(0, 1, 11, dtype=torch.float64).expand(3, 11))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_intervals_against_numpy(seed: int | None) -> None:
    edges, weights = histogram()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    drawn = resample_intervals(edges, weights, 7, generator, padding=0.01)
    # One jitter for all samples of a ray.
    jitter = torch.full((6, 1), 0.5, dtype=torch.float64)
    if seed is not None:
        jitter = torch.rand(6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for ray in range(6):
        mass = np.where(np.diff(edges[ray].numpy()) > 0, weights[ray].numpy() + 0.01, 0.0)
        cumulative = np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
        shares = (np.arange(7) + float(jitter[ray])) / 7
        centers = np.interp(shares, cumulative, edges[ray].numpy())
        middles = (centers[1:] + centers[:-1]) / 2
        first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
        expected = np.concatenate([[max(first, 0.0)], middles, [min(last, 1.0)]])
        np.testing.assert_allclose(drawn[ray].numpy(), expected, atol=1e-12)


def test_intervals_stay_in_the_domain_and_in_order() -> None:
    edges, weights = histogram(200, 20, torch.float32)
    drawn = resample_intervals(edges, weights**8, 64, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 65)
    assert (drawn.diff(dim=1) >= 0).all()
    assert ((drawn >= 0) & (drawn <= 1)).all()


def test_too_few_intervals() -> None:
    with pytest.raises(ValueError, match="count must be at least 2"):
        resample_intervals(*histogram(), 1, None)


def test_points_are_distributed_like_the_weights() -> None:
    edges, weights = histogram()
    points = sample_points(edges, weights, 4000, torch.Generator().manual_seed(0))
    assert (points.diff(dim=1) >= 0).all()
    for ray in range(6):
        counted, _ = np.histogram(points[ray].numpy(), np.unique(edges[ray].numpy()))
        expected = weights[ray][edges[ray].diff() > 0]
        # Stratified: no interval is off by more than the strata at its two ends.
        np.testing.assert_allclose(counted / 4000, (expected / expected.sum()).numpy(), atol=2.5 / 4000)


def test_points_without_a_generator_are_the_strata_s_middles() -> None:
    edges, weights = histogram()
    points = sample_points(edges, weights, 5, None, padding=0.0)
    shares = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    expected = invert_cumulative(edges, weights, shares.expand(6, 5))
    torch.testing.assert_close(points, expected)


def test_no_gradient_passes() -> None:
    edges, weights = histogram()
    edges.requires_grad_()
    weights.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    assert not resample_intervals(edges, weights, 4, generator).requires_grad
    assert not sample_points(edges, weights, 4, generator).requires_grad
    assert not anneal(edges, weights, 0.5).requires_grad
    assert not any(made.requires_grad for made in dilate(edges, weights, 0.01))


@pytest.mark.parametrize("amount", [0.0, 0.003, 0.08, 2.0])
@pytest.mark.parametrize("num", [1, 2, 9])
def test_dilation_against_its_definition(amount: float, num: int) -> None:
    edges, weights = histogram(3, 9)
    edges, weights = edges[:, : num + 1], weights[:, :num]
    dilated, mass = dilate(edges, weights, amount)
    assert dilated.shape == (3, 3 * num + 1)
    assert (dilated.diff(dim=1) >= 0).all()
    if num > 1 or weights[:, 0].all():
        torch.testing.assert_close(mass.sum(dim=1), torch.ones(3, dtype=torch.float64))
    for ray in range(3):
        # At random places the density is the largest of those intervals that come within the amount.
        at = torch.rand(300, dtype=torch.float64)
        lengths = edges[ray].diff()
        density = torch.where(lengths > 0, weights[ray] / lengths, 0.0)
        holds = (at[:, None] >= edges[ray, :-1] - amount) & (at[:, None] < edges[ray, 1:] + amount)
        holds &= lengths > 0
        expected = torch.where(holds, density, 0.0).amax(dim=1)
        found = torch.searchsorted(dilated[ray], at, right=True) - 1
        is_in = (found >= 0) & (found < 3 * num)
        assert not expected[~is_in].any()
        found = found.clamp(0, 3 * num - 1)
        got = torch.where(is_in, mass[ray][found] / dilated[ray].diff()[found], 0.0)
        total = got.sum() / expected.sum()
        torch.testing.assert_close(got, expected * total, atol=1e-9, rtol=1e-9)


def test_dilation_of_nothing() -> None:
    edges, weights = histogram(dtype=torch.float32)
    dilated, mass = dilate(edges, 0.0 * weights, 0.01)
    assert dilated.isfinite().all()
    assert not mass.any()


def test_annealing_by_hand() -> None:
    edges = torch.tensor([[0.0, 0.2, 0.2, 1.0]])
    weights = torch.tensor([[0.25, 0.3, 0.0]])
    torch.testing.assert_close(anneal(edges, weights, 0.0), torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(anneal(edges, weights, torch.tensor(0.5)), torch.tensor([[0.5, 0.0, 0.0]]))
    torch.testing.assert_close(anneal(edges, weights, 1.0), torch.tensor([[0.25, 0.0, 0.0]]))
