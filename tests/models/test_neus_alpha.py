"""NeuS's alpha against the formula of the paper: values, limits and derivatives."""

import math

import pytest
import torch
from helpers_gradients import assert_same_gradient
from torch import Tensor

from models.neus import neus_alpha


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


@pytest.mark.parametrize("cos_anneal", [0.0, 0.5, 1.0])
def test_alpha_has_finite_gradients_everywhere(cos_anneal: float) -> None:
    sdf, cosine, lengths = torch.meshgrid(
        torch.tensor([-2.0, -0.1, -1e-4, 0.0, 1e-4, 0.1, 2.0]),
        torch.tensor([-1.0, -0.3, 0.0, 0.3, 1.0]),
        torch.tensor([0.0, 1e-4, 0.01, 1.0]),
        indexing="ij",
    )
    sdf, cosine, lengths = (tensor.flatten().requires_grad_() for tensor in (sdf, cosine, lengths))
    for value in (1e-6, 1.0, 1e3, 1e6):
        inv_s = torch.tensor(value, requires_grad=True)
        alpha = neus_alpha(sdf, cosine, lengths, inv_s, cos_anneal)
        assert ((alpha >= 0) & (alpha <= 1)).all()
        for gradient in torch.autograd.grad(alpha.sum(), [sdf, cosine, lengths, inv_s]):
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
