"""The colour head for shiny surfaces: mirrors, lobes, light, and what its colours depend on."""

import math

import numpy as np
import pytest
import torch
from helpers_triton import DEVICE, needs_triton
from torch import Tensor, nn

from encoder import encode_spherical_harmonics
from models.backends import Backends
from models.fields import RadianceConfig
from models.reflection import ReflectiveRadiance, encode_reflection, reflect, srgb_from_light
from utils.mesh import srgb_from_linear

CPU = Backends.all("cpu")


def unit(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=dtype), dim=1)


# Reflected directions and their encoding


def test_reflect_by_hand() -> None:
    toward = torch.tensor([[0.0, 0.6, 0.8], [0.0, 0.6, 0.8], [1.0, 0.0, 0.0]])
    normal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, -0.6, 0.8], [0.0, -0.6, 0.8], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(reflect(toward, normal), expected)


def test_angles_in_and_out_are_equal_and_in_one_plane() -> None:
    toward, normal = unit(50, torch.float64), unit(50, torch.float64)
    away = reflect(toward, normal)
    torch.testing.assert_close(away.norm(dim=1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close((away * normal).sum(dim=1), (toward * normal).sum(dim=1))
    volume = torch.linalg.det(torch.stack([toward, normal, away], dim=1))
    torch.testing.assert_close(volume, torch.zeros(50, dtype=torch.float64))


def test_a_mirror_sees_every_detail() -> None:
    directions = unit(20)
    encoded = encode_reflection(directions, torch.zeros(20, 1), 4)
    assert torch.equal(encoded, encode_spherical_harmonics(directions, 4))


def lobe_mean(direction: Tensor, roughness: float, degree: int) -> Tensor:
    """Spherical harmonics averaged over a von Mises-Fisher lobe, by quadrature in its own frame."""
    z, weights = np.polynomial.legendre.leggauss(100)
    phi = 2 * math.pi * np.arange(12) / 12
    share = weights * np.exp((z - 1) / roughness)
    share = np.repeat(share / share.sum(), 12) / 12
    z, phi = (grid.ravel() for grid in np.meshgrid(z, phi, indexing="ij"))
    around = np.stack([np.sqrt(1 - z * z) * np.cos(phi), np.sqrt(1 - z * z) * np.sin(phi), z], axis=1)
    frame, _ = np.linalg.qr(np.stack([direction.numpy(), [0.3, 0.5, 0.1], [0.2, -0.7, 0.4]], axis=1))
    axes = np.stack([frame[:, 1], frame[:, 2], direction.numpy()])
    harmonics = encode_spherical_harmonics(torch.from_numpy(around @ axes), degree)
    return torch.from_numpy(share) @ harmonics


@pytest.mark.parametrize(("roughness", "tolerance"), [(0.01, 0.001), (0.05, 0.008), (0.3, 0.1)])
def test_roughness_averages_over_a_lobe(roughness: float, tolerance: float) -> None:
    """Equation 8 is an approximation, the better the narrower the lobe."""
    directions = unit(2, torch.float64)
    encoded = encode_reflection(directions, torch.full((2, 1), roughness, dtype=torch.float64), 5)
    for row, direction in zip(encoded, directions, strict=True):
        torch.testing.assert_close(row, lobe_mean(direction, roughness, 5), atol=tolerance, rtol=0)


def test_gradients_of_the_encoding_reach_normal_and_roughness() -> None:
    toward, normal = unit(4, torch.float64), unit(4, torch.float64).requires_grad_()
    roughness = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)

    def encoded(normal: Tensor, roughness: Tensor) -> Tensor:
        return encode_reflection(reflect(toward, normal), roughness, 5)

    assert torch.autograd.gradcheck(encoded, (normal, roughness))


# Light


def test_srgb_of_light() -> None:
    light = torch.linspace(0, 1, 300, dtype=torch.float64).view(-1, 3)
    levels = (255 * srgb_from_light(light)).round().numpy().astype(np.uint8)
    assert np.array_equal(levels, srgb_from_linear(light.numpy()))
    assert srgb_from_light(torch.tensor([[0.0, 0.2140, 7.0]]))[0].tolist() == pytest.approx(
        [0.0, 0.5, 1.0], abs=1e-4
    )


def test_gradient_of_srgb_in_the_dark_and_beyond_white() -> None:
    inside = torch.tensor([[1e-4, 3e-3, 4e-3], [0.1, 0.5, 0.99]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(srgb_from_light, inside)
    light = torch.tensor([[0.0, 1.0, 1.7]], requires_grad=True)
    (slope,) = torch.autograd.grad(srgb_from_light(light).sum(), light)
    assert slope[0].tolist() == pytest.approx([12.92, 1.055 / 2.4, 1.055 / 2.4], rel=1e-5)


# The head


def head_without_features(**settings: int) -> ReflectiveRadiance:
    """One and the same polished material everywhere."""
    head = ReflectiveRadiance(RadianceConfig(**settings), 5, CPU)
    with torch.no_grad():
        last = [layer for layer in head.material.modules() if isinstance(layer, nn.Linear)][-1]
        last.weight.zero_()
        last.bias.copy_(torch.randn(len(last.bias)))
    return head


def test_what_shows_the_same_surroundings_at_the_same_angle_looks_alike() -> None:
    head, features = head_without_features(), torch.zeros(1, 5)
    toward, normal = unit(1), unit(1)
    away = reflect(toward, normal)[0]
    # A turn about the reflected direction changes view and normal, and neither it nor their angle.
    cross = torch.linalg.cross(away.expand(3, 3), torch.eye(3)).t()
    turned = torch.linalg.matrix_exp(1.3 * cross)
    zero = torch.zeros(1, dtype=torch.int64)
    first = head(features, -toward, zero, normal)
    second = head(features, -toward @ turned.t(), zero, normal @ turned.t())
    torch.testing.assert_close(second, first)
    assert (head(features, -unit(1), zero, normal) - first).abs().max() > 1e-3


def test_without_tint_only_diffuse_light_is_left() -> None:
    head = ReflectiveRadiance(RadianceConfig(), 5, CPU)
    last = [layer for layer in head.material.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[3:6] = -100.0
    features, normal = torch.randn(1, 5).repeat(6, 1), unit(1).repeat(6, 1)
    rgb = head(features, unit(6), torch.arange(6), normal)
    torch.testing.assert_close(rgb, rgb[:1].expand(6, 3))


def test_depends_on_all_its_inputs() -> None:
    head = ReflectiveRadiance(RadianceConfig(), 5, CPU)
    inputs = [torch.randn(6, 5), unit(6), unit(6)]
    features, directions, normal = (tensor.requires_grad_() for tensor in inputs)
    rgb = head(features, directions, torch.arange(6), normal)
    assert ((rgb > 0) & (rgb < 1 + 1e-6)).all()
    for gradient in torch.autograd.grad(rgb.sum(), [features, directions, normal]):
        assert gradient.any(dim=1).all()


def test_gradient_of_the_head() -> None:
    # A smooth stretch of the networks: a kink of a ReLU within the differences' step is unlikely.
    head = ReflectiveRadiance(RadianceConfig(hidden_width=8), 5, CPU).double()
    features, directions = torch.randn(4, 5, dtype=torch.float64), unit(2, torch.float64)
    normal = unit(4, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (features, directions, normal)]
    rays = torch.tensor([1, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda f, d, n: head(f, d, rays, n), inputs)


def test_directions_are_per_ray() -> None:
    head = ReflectiveRadiance(RadianceConfig(direction_degree=3), 5, CPU)
    features, directions, normal = torch.randn(6, 5), unit(3), unit(6)
    rays = torch.tensor([2, 0, 0, 1, 2, 2])
    rgb = head(features, directions, rays, normal)
    torch.testing.assert_close(rgb, head(features, directions[rays], torch.arange(6), normal))
    nothing = head(features[:0], directions, rays[:0], normal[:0])
    assert nothing.shape == (0, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("cuda", marks=needs_triton)])
def test_padding_has_no_part(backend: str) -> None:
    device = DEVICE if backend == "cuda" else torch.device("cpu")
    config = RadianceConfig(hidden_width=16, precision="float32")
    head = ReflectiveRadiance(config, 5, Backends.all(backend)).to(device)
    features, normal = torch.randn(9, 5, device=device), unit(9).to(device)
    directions, rays = unit(3).to(device), torch.arange(9, device=device) // 3
    count = torch.tensor(6, device=device)
    gradients = []
    for rows, real in ((slice(6), None), (slice(9), count)):
        rgb = head(features[rows], directions, rays[rows], normal[rows], real)[:6]
        loss = (rgb * torch.arange(1.0, 4.0, device=device)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(head.parameters())))
    for alone, padded in zip(*gradients, strict=True):
        assert alone.any()
        torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)
