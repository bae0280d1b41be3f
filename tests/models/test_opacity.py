"""Opacities of NeuS and VolSDF against the papers' formulas: values, limits and derivatives."""

import math

import numpy as np
import pytest
import torch
from helpers_gradients import assert_same_gradient
from torch import Tensor

from models.opacity import (
    DENSITIES,
    DensityName,
    laplace_presence,
    logistic_presence,
    neus_alpha,
    volsdf_alpha,
)


def alpha_of_the_paper(
    sdf: Tensor, cosine: Tensor, lengths: Tensor, inv_s: float, cos_anneal: float
) -> Tensor:
    """(F(p) - F(n)) / F(p) in float64, rearranged to (1 - e^(n - p)) / (1 + e^n): no difference of equals."""
    sdf, cosine, lengths = sdf.double(), cosine.double(), lengths.double()
    softened, true = (0.5 - 0.5 * cosine).clamp(min=0), (-cosine).clamp(min=0)
    slope = softened * (1 - cos_anneal) + true * cos_anneal
    p = (sdf + slope * lengths / 2) * inv_s
    n = (sdf - slope * lengths / 2) * inv_s
    return -torch.expm1(n - p) * torch.sigmoid(-n)


def scalar_alpha(sdf: float, cosine: float, length: float, inv_s: float, cos_anneal: float) -> float:
    one_each = torch.tensor([sdf]), torch.tensor([cosine]), torch.tensor([length])
    return float(neus_alpha(*one_each, torch.tensor(inv_s), cos_anneal))


def test_alpha_by_hand() -> None:
    # On the surface, head-on, F(1) = 0.7311 and F(-1) = 0.2689: (0.7311 - 0.2689) / 0.7311 = 1 - 1 / e.
    assert scalar_alpha(0.0, -1.0, 0.02, 100.0, 1.0) == pytest.approx(1 - math.exp(-1), rel=1e-6)
    # Along the surface the true cosine says transparent, the softened one half as long a way.
    assert scalar_alpha(0.0, 0.0, 0.04, 100.0, 1.0) == 0.0
    assert scalar_alpha(0.0, 0.0, 0.04, 100.0, 0.0) == pytest.approx(1 - math.exp(-1), rel=1e-6)
    # From behind nothing is seen in either.
    assert scalar_alpha(0.0, 1.0, 0.04, 100.0, 0.0) == 0.0
    assert scalar_alpha(0.0, 1.0, 0.04, 100.0, 1.0) == 0.0


@pytest.mark.parametrize("inv_s", [1.0, 20.0, 1000.0, 1e6])
@pytest.mark.parametrize("cos_anneal", [0.0, 0.3, 1.0])
def test_alpha_against_the_paper(inv_s: float, cos_anneal: float) -> None:
    sdf = torch.randn(2000) * (5 / inv_s)
    cosine = torch.rand(2000) * 2 - 1
    lengths = torch.rand(2000) * (4 / inv_s)
    actual = neus_alpha(sdf, cosine, lengths, torch.tensor(inv_s), cos_anneal)
    expected = alpha_of_the_paper(sdf, cosine, lengths, inv_s, cos_anneal)
    assert ((actual >= 0) & (actual <= 1)).all()
    torch.testing.assert_close(actual.double(), expected, atol=3e-6, rtol=0)


def test_alpha_far_from_the_surface() -> None:
    for inv_s in (1e3, 1e6):
        assert scalar_alpha(0.5, -1.0, 0.01, inv_s, 1.0) == 0.0
        # Deep inside F(n) / F(p) tends to e^(-inv_s length): opaque unless the interval is very short.
        assert scalar_alpha(-0.5, -1.0, 0.01, inv_s, 1.0) == pytest.approx(
            1 - math.exp(-inv_s * 0.01), abs=1e-3
        )
        assert scalar_alpha(0.0, -1.0, 0.01, inv_s, 1.0) == pytest.approx(1.0, abs=0.01)
    assert scalar_alpha(-0.5, -1.0, 1e-4, 1e3, 1.0) == pytest.approx(1 - math.exp(-0.1), abs=1e-4)
    # Just outside, where F(p) is 1 to all digits of float32, alpha is small but not lost.
    expected = math.exp(-19.5) - math.exp(-20.5)
    assert scalar_alpha(0.2, -1.0, 0.01, 100.0, 1.0) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("cos_anneal", [0.0, 0.5, 1.0])
def test_alpha_has_finite_gradients_everywhere(cos_anneal: float, density: DensityName) -> None:
    sdf, cosine, lengths = torch.meshgrid(
        torch.tensor([-2.0, -0.1, -1e-4, 0.0, 1e-4, 0.1, 2.0]),
        torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0]),
        torch.tensor([0.0, 1e-4, 0.01, 1.0]),
        indexing="ij",
    )
    sdf, cosine, lengths = (tensor.flatten().requires_grad_() for tensor in (sdf, cosine, lengths))
    for value in (1e-6, 1.0, 1e3, 1e6):
        sharpness = torch.tensor(value, requires_grad=True)
        alpha = DENSITIES[density].alpha(sdf, cosine, lengths, sharpness, cos_anneal)
        assert ((alpha >= 0) & (alpha <= 1)).all()
        inputs = [sdf, lengths, sharpness] + [cosine] * (density == "neus")
        for gradient in torch.autograd.grad(alpha.sum(), inputs):
            assert gradient.isfinite().all()


def test_alpha_has_the_derivatives_of_the_paper() -> None:
    sdf = (torch.randn(200) * 0.03).requires_grad_()
    cosine = (torch.rand(200) * 1.8 - 0.9).requires_grad_()
    lengths = (torch.rand(200) * 0.03).requires_grad_()
    inputs = [sdf, cosine, lengths]
    actual = torch.autograd.grad(neus_alpha(sdf, cosine, lengths, torch.tensor(100.0), 0.4).sum(), inputs)
    # The formula converts to float64 itself.
    expected = torch.autograd.grad(alpha_of_the_paper(sdf, cosine, lengths, 100.0, 0.4).sum(), inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same_gradient(mine, theirs, tolerance=1e-5)


def test_weights_peak_on_the_surface() -> None:
    # NeuS's point (its section 3.1): unlike a plain density, the weight is largest at sdf = 0 itself.
    t = torch.linspace(0, 1, 1001)
    alpha = neus_alpha(0.6137 - t, -torch.ones(1001), torch.full((1001,), 1e-3), torch.tensor(50.0), 1.0)
    weights = alpha * torch.cat([torch.ones(1), (1 - alpha).cumprod(0)[:-1]])
    assert t[weights.argmax()].item() == pytest.approx(0.6137, abs=2e-3)


# VolSDF


def density_of_the_paper(sdf: np.ndarray, beta: float) -> np.ndarray:
    """sigma = Psi_beta(-sdf) / beta, float64; Psi as equation 3 has it."""
    s = -sdf.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.where(s <= 0, 0.5 * np.exp(s / beta), 1 - 0.5 * np.exp(-s / beta)) / beta


def medium_alpha(sdf: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Of samples whose cosines must not matter."""
    return volsdf_alpha(sdf, torch.rand_like(sdf) * 2 - 1, lengths, torch.tensor(1 / beta), 0.3)


def test_density_by_hand() -> None:
    # On the surface sigma = 1 / (2 beta), ln 2 beta in front of it half of that, far inside 1 / beta.
    sdf, lengths = torch.tensor([0.0, 0.05 * math.log(2), -5.0, 5.0]), torch.full((4,), 0.1)
    alpha = medium_alpha(sdf, lengths, 0.05)
    expected = torch.tensor([1 - math.exp(-1), 1 - math.exp(-0.5), 1 - math.exp(-2), 0.0])
    torch.testing.assert_close(alpha, expected, atol=1e-6, rtol=1e-6)
    assert medium_alpha(torch.tensor([-1.0]), torch.tensor([0.0]), 0.05).item() == 0.0


@pytest.mark.parametrize("beta", [1e-4, 1e-2, 0.1, 3.0])
def test_density_against_the_paper(beta: float) -> None:
    sdf, lengths = torch.randn(2000) * 4 * beta, torch.rand(2000) * 3 * beta
    sigma = torch.from_numpy(density_of_the_paper(sdf.numpy(), beta))
    expected = -torch.expm1(-sigma * lengths.double())
    torch.testing.assert_close(medium_alpha(sdf, lengths, beta).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.5])
def test_transmittance_through_a_plane_against_quadrature(cosine: float) -> None:
    """Samples of a tenth of beta follow the integral of the density along the ray, from both sides."""
    beta, count = 0.05, 200
    step = 0.1 * beta
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) * step
    zero = 0.4137
    alpha = medium_alpha((cosine * (middles - zero)).float(), torch.full((count,), step), beta)
    transmittance = (1 - alpha.double()).cumprod(0)
    fine = np.linspace(0, count * step, 200 * count + 1)
    sigma = density_of_the_paper(cosine * (fine - zero), beta)
    depth = np.concatenate([[0], np.cumsum((sigma[1:] + sigma[:-1]) / 2 * np.diff(fine))])
    expected = torch.from_numpy(np.exp(-depth[200::200]))
    assert expected[-1] < 1e-2
    torch.testing.assert_close(transmittance, expected, atol=1e-3, rtol=0)


def test_density_has_the_derivatives_of_finite_differences() -> None:
    """In distance, length and beta; also exactly on the surface, where the two branches meet."""
    beta = 0.02
    sdf = (torch.randn(200) * 0.03).double()
    sdf[:2] = torch.tensor([0.0, -0.0])
    lengths = (torch.rand(200) * 0.03).double()
    leaves = [sdf, lengths, torch.tensor(1 / beta).double()]
    inputs = [value.float().requires_grad_() for value in leaves]
    cosine, towards = torch.zeros(200), torch.randn(200)

    def total(s: Tensor, length: Tensor, sharpness: Tensor) -> Tensor:
        return (towards.to(s.dtype) * volsdf_alpha(s, cosine.to(s.dtype), length, sharpness, 1.0)).sum()

    for k, mine in enumerate(torch.autograd.grad(total(*inputs), inputs)):
        theirs = torch.zeros_like(leaves[k])
        step = 1e-6 * float(leaves[k].abs().max())
        for row in range(leaves[k].numel()):
            shifted = [[value.clone() for value in leaves] for _ in range(2)]
            shifted[0][k].view(-1)[row] += step
            shifted[1][k].view(-1)[row] -= step
            theirs.view(-1)[row] = (total(*shifted[0]) - total(*shifted[1])) / (2 * step)
        assert_same_gradient(mine, theirs.float(), tolerance=1e-4)


def test_a_small_beta_is_a_hard_surface() -> None:
    for beta in (1e-3, 1e-4):
        before, after = medium_alpha(torch.tensor([0.01, -0.01]), torch.full((2,), 0.01), beta).tolist()
        assert before < 3e-4
        assert after > 1 - 1e-4
    assert before < 1e-40


def test_beta_learns_at_its_bound() -> None:
    betas = [1.0, 0.02, 1e-3, 1e-8]
    learned = torch.tensor([1 / beta for beta in betas]).log().requires_grad_()
    sharpness = DENSITIES["volsdf"].sharpness(learned)
    assert sharpness.tolist() == pytest.approx([1 / (beta + 1e-4) for beta in betas], rel=1e-4)
    sharpness.log().sum().backward()
    assert (learned.grad > 0).all()


@pytest.mark.parametrize(("cosine", "offset"), [(-1.0, -0.2694), (-0.5, 0.0), (-0.2, math.log(2.5))])
def test_where_the_weight_of_a_density_peaks(cosine: float, offset: float) -> None:
    """Where d sigma / dt = sigma^2. With u = sdf / beta: outside e^-u / 2 = c, that is u = -ln 2 c; inside,
    if c > 1/2, c e^u / 2 = (1 - e^u / 2)^2, that is e^u = 3 - sqrt(5) for c = 1."""
    beta, step = 0.03, 1e-4
    t = torch.arange(0, 1, step)
    sdf = cosine * (t - 0.6137)
    alpha = medium_alpha(sdf, torch.full((len(t),), step), beta)
    weights = alpha * torch.cat([torch.ones(1), (1 - alpha).cumprod(0)[:-1]])
    assert sdf[weights.argmax()].item() / beta == pytest.approx(offset, abs=0.02)


@pytest.mark.parametrize("density", DENSITIES)
def test_light_beyond_what_is_present_is_lost(density: DensityName) -> None:
    """What lies where presence is below the occupancy grid's 0.01 takes below 1 % of a head-on ray's light,
    and what is within lets below 2 % through."""
    sharpness = torch.tensor(50.0)
    t = torch.arange(-1, 1, 1e-3)
    law = DENSITIES[density]
    alpha = law.alpha(-t, -torch.ones_like(t), torch.full_like(t, 1e-3), sharpness, 1.0)
    is_present = law.presence(-t, sharpness) > 0.01
    assert 0.05 < is_present.float().mean() < 0.15
    assert 1 - (1 - alpha[~is_present & (t < 0)]).prod() < 0.01
    assert (1 - alpha[is_present]).prod() < 0.02


def test_presence_by_hand() -> None:
    sdf, sharpness = torch.tensor([0.0, 0.02, -0.02, 1e6]), torch.tensor(50.0)
    assert laplace_presence(sdf, sharpness).tolist() == pytest.approx([1.0, math.exp(-1), math.exp(-1), 0.0])
    logistic = 4 * math.exp(-1) / (1 + math.exp(-1)) ** 2
    assert logistic_presence(sdf, sharpness).tolist() == pytest.approx([1.0, logistic, logistic, 0.0])
