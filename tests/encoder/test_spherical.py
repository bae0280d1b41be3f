"""Spherical harmonics: values against Legendre functions, orthonormality, and the addition theorem."""

import math

import numpy as np
import pytest
import torch
from scipy.special import lpmv
from torch import Tensor

from encoder import encode_spherical_harmonics


def random_directions(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=1)


def test_by_hand() -> None:
    poles = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    one = math.sqrt(3 / (4 * math.pi))
    expected = torch.tensor([[0.28209479, 0, one, 0], [0.28209479, 0, 0, -one]])
    torch.testing.assert_close(encode_spherical_harmonics(poles, 2), expected)


def harmonic(band: int, order: int, direction: list[float]) -> float:
    """The textbook definition, in angles."""
    x, y, z = direction
    m = abs(order)
    norm = math.sqrt(
        (2 * band + 1) / (4 * math.pi) * math.factorial(band - m) / math.factorial(band + m)
    ) * float(lpmv(m, band, z))
    if order == 0:
        return norm
    phi = math.atan2(y, x)
    return math.sqrt(2) * norm * (math.cos(m * phi) if order > 0 else math.sin(m * phi))


def test_against_legendre_functions() -> None:
    directions = random_directions(20)
    encoded = encode_spherical_harmonics(directions, 5)
    for row, direction in enumerate(directions.tolist()):
        expected = [harmonic(band, order, direction) for band in range(5) for order in range(-band, band + 1)]
        assert encoded[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_orthonormal_on_the_sphere() -> None:
    # Gauss-Legendre in z and even steps in the angle integrate products of two bands up to 4 exactly.
    z, weights = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * (2 * np.pi / 16)
    z, phi = np.meshgrid(z, phi, indexing="ij")
    radius = np.sqrt(1 - z**2)
    directions = torch.from_numpy(np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=-1)).reshape(
        -1, 3
    )
    encoded = encode_spherical_harmonics(directions, 5)
    areas = torch.from_numpy(np.repeat(weights, 16)) * (2 * math.pi / 16)
    torch.testing.assert_close(encoded.t() @ (areas[:, None] * encoded), torch.eye(25, dtype=torch.float64))


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_degrees_nest_and_bands_have_constant_length(degree: int) -> None:
    directions = random_directions(50)
    encoded = encode_spherical_harmonics(directions, degree)
    assert encoded.shape == (50, degree**2)
    assert torch.equal(encoded, encode_spherical_harmonics(directions, 5)[:, : degree**2])
    # Unsöld's theorem: a band's squares sum to (2 l + 1) / (4 pi) in every direction.
    last = encoded[:, (degree - 1) ** 2 :].square().sum(dim=1)
    torch.testing.assert_close(last, torch.full_like(last, (2 * degree - 1) / (4 * math.pi)))


@pytest.mark.parametrize("degree", [0, 6, -1])
def test_degree_out_of_range(degree: int) -> None:
    with pytest.raises(ValueError, match=r"degree must be 1\.\.5"):
        encode_spherical_harmonics(torch.zeros(1, 3), degree)


def test_empty() -> None:
    assert encode_spherical_harmonics(torch.zeros(0, 3), 4).shape == (0, 16)


def test_gradient() -> None:
    directions = random_directions(3).requires_grad_()
    torch.autograd.gradcheck(lambda d: encode_spherical_harmonics(d, 5), directions)
