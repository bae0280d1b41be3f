"""Integrated positional encoding: against means over many draws, and what its directions are."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from encoder.frequency import encode_frequency
from encoder.integrated import encode_integrated, icosahedron_directions, integrated_width


def test_by_hand() -> None:
    # sin(1) e^-0.02 and sin(2) e^-0.08 for a variance of 0.04, then the cosines.
    found = encode_integrated(torch.tensor([[1.0]]), torch.tensor([[0.04]]), 2)
    few = [math.exp(-0.02), math.exp(-0.08)]
    expected = [math.sin(1) * few[0], math.sin(2) * few[1], math.cos(1) * few[0], math.cos(2) * few[1]]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_mean_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    variances = torch.rand(3, 4, generator=generator, dtype=torch.float64) * 0.3
    draws = torch.randn(200_000, 3, 4, generator=generator, dtype=torch.float64) * variances.sqrt() + means
    found = encode_integrated(means, variances, 3)
    mean = torch.cat(
        [f(draws * 2**octave).mean(dim=0) for f in (torch.sin, torch.cos) for octave in range(3)], dim=1
    )
    # A mean of 200,000 numbers within -1..1 has a standard deviation of at most 0.0022.
    torch.testing.assert_close(found, mean, atol=0.009, rtol=0)
    assert (mean.abs() > 0.1).any(dim=0).sum() > 12, "most features have something to say"


def test_points_are_encoded_as_by_frequency() -> None:
    means = torch.randn(5, 3)
    found = encode_integrated(means, torch.zeros(5, 3), 4)
    plain = encode_frequency(means, 4)[:, 3:].view(5, 4, 2, 3)
    torch.testing.assert_close(found, plain.transpose(1, 2).flatten(1))


def test_what_is_wider_than_a_wave_averages_out() -> None:
    found = encode_integrated(torch.tensor([[0.3]]), torch.tensor([[1.0]]), 12).view(2, 12)
    assert (found[:, 4:].abs() < 1e-6).all()
    assert torch.isfinite(encode_integrated(torch.tensor([[2.0]]), torch.tensor([[1e30]]), 12)).all()


def test_width() -> None:
    directions = icosahedron_directions()
    assert encode_integrated(torch.zeros(2, 21), torch.zeros(2, 21), 12).shape[1] == 504
    assert integrated_width(len(directions), 12) == 504


def test_directions_are_an_icosahedrons_split_once() -> None:
    directions = icosahedron_directions().double().numpy()
    assert directions.shape == (21, 3)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, atol=1e-7)
    both = np.concatenate([directions, -directions])
    hull = ConvexHull(both)
    # 20 faces are cut in four.
    assert len(hull.vertices) == 42
    assert len(hull.simplices) == 80
    degrees = np.bincount(hull.simplices.ravel())
    assert sorted(degrees) == [5] * 12 + [6] * 30
    corners = both[degrees == 5]
    cosines = np.unique(np.round(corners @ corners.T, 6))
    np.testing.assert_allclose(cosines, [-1, -1 / math.sqrt(5), 1 / math.sqrt(5), 1], atol=1e-6)


def test_directions_see_all_ways_alike() -> None:
    # The symmetry of the icosahedron makes the mean of p p^T a third of the identity.
    directions = icosahedron_directions().double()
    moment = directions.T @ directions / len(directions)
    torch.testing.assert_close(moment, torch.eye(3, dtype=torch.float64) / 3, atol=1e-6, rtol=0)


@pytest.mark.parametrize("octaves", [0, 5])
def test_gradient_is_that_of_differences(octaves: int) -> None:
    means = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    variances = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: encode_integrated(m, v, octaves), (means, variances))
