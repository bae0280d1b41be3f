"""The contraction of space: values by hand, smoothness, order, an inverse and gradients, in both norms."""

import pytest
import torch
from torch import Tensor

from models.contraction import ContractionNorm, contract

both = pytest.mark.parametrize("norm", ["l2", "linf"])


def length_of(positions: Tensor, norm: ContractionNorm) -> Tensor:
    order = 2 if norm == "l2" else float("inf")
    return torch.linalg.vector_norm(positions, order, dim=-1)


def test_euclidean_by_hand() -> None:
    positions = torch.tensor(
        [[4.0, 0, 0], [0, -2.0, 0], [0, 3.0, 4.0], [0.3, 0.4, 0.0], [0, 0, 0], [0, 0, 1e6]]
    )
    expected = torch.tensor(
        [[1.75, 0, 0], [0, -1.5, 0], [0, 1.08, 1.44], [0.3, 0.4, 0.0], [0, 0, 0], [0, 0, 2.0]]
    )
    torch.testing.assert_close(contract(positions), expected)


def test_largest_coordinate_by_hand() -> None:
    positions = torch.tensor(
        [[4.0, 4.0, 0], [0, -2.0, 1.0], [0, 3.0, 4.0], [0.9, -0.9, 0.9], [0, 0, 0], [1e6, 0, -1e6]]
    )
    expected = torch.tensor(
        [[1.75, 1.75, 0], [0, -1.5, 0.75], [0, 1.3125, 1.75], [0.9, -0.9, 0.9], [0, 0, 0], [2.0, 0, -2.0]]
    )
    torch.testing.assert_close(contract(positions, "linf"), expected)


@both
def test_continuous_and_smooth_across_the_unit_length(norm: ContractionNorm) -> None:
    directions = torch.randn(50, 3, dtype=torch.float64)
    directions /= length_of(directions, norm)[:, None]
    inside, outside = contract(directions * (1 - 1e-6), norm), contract(directions * (1 + 1e-6), norm)
    torch.testing.assert_close(outside - inside, 2e-6 * directions, atol=1e-11, rtol=0)


@both
def test_keeps_order_and_stays_below_two(norm: ContractionNorm) -> None:
    direction = torch.randn(1, 3)
    direction /= length_of(direction, norm)
    distances = torch.logspace(-2, 5, 300)
    lengths = length_of(contract(distances[:, None] * direction, norm), norm)
    assert (lengths.diff() >= 0).all()
    assert (lengths <= 2.0 + 1e-6).all()
    expected = torch.where(distances > 1, 2 - 1 / distances, distances)
    torch.testing.assert_close(lengths, expected)


def uncontract(contracted: Tensor, norm: ContractionNorm) -> Tensor:
    """The inverse by hand: of a length above 1, 2 - 1 / x = y."""
    length = length_of(contracted, norm)[..., None].clamp(min=1.0)
    return contracted / length / (2.0 - length)


@both
def test_inverse(norm: ContractionNorm) -> None:
    positions = torch.randn(7, 60, 3, dtype=torch.float64) * torch.logspace(-3, 4, 60)[:, None].double()
    torch.testing.assert_close(uncontract(contract(positions, norm), norm), positions, rtol=1e-9, atol=0)
    contracted = torch.randn(100, 3, dtype=torch.float64)
    contracted *= 1.99 / length_of(contracted, norm)[:, None].clamp(min=1.99)
    torch.testing.assert_close(contract(uncontract(contracted, norm), norm), contracted)


@both
def test_finite_gradients(norm: ContractionNorm) -> None:
    positions = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [1e20, 0, 0], [5.0, 5.0, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(contract(positions, norm).sum(), positions)
    assert gradient.isfinite().all()


@both
def test_derivatives(norm: ContractionNorm) -> None:
    positions = (3.0 * torch.randn(20, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contract(x, norm), positions)
