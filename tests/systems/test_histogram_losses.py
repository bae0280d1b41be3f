"""Losses on histograms of weights: against their definitions as double loops, and padding that holds NaN."""

import pytest
import torch
from torch import Tensor

from systems.histogram_losses import distortion, interlevel
from utils.types import RayHistogram


def histogram(num_rays: int, num: int, seed: int = 0) -> RayHistogram:
    """Uneven intervals within 0..1, of which some are empty, and one has no length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(num_rays, num + 2, dtype=torch.float64, generator=generator) + 0.02
    lengths[0, 1] = 0.0
    edges = lengths.cumsum(1)
    edges = (edges / edges[:, -1:])[:, :-1]
    weights = torch.rand(num_rays, num, dtype=torch.float64, generator=generator)
    weights[:, 2] = 0.0
    weights[edges.diff(dim=1) == 0] = 0.0
    return RayHistogram(edges, weights / (1.1 * weights.sum(dim=1, keepdim=True)))


def interlevel_by_definition(outer: RayHistogram, inner: RayHistogram) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for ray in range(len(inner.weights)):
        for i, weight in enumerate(inner.weights[ray]):
            start, end = inner.edges[ray, i], inner.edges[ray, i + 1]
            bound = torch.zeros((), dtype=torch.float64)
            for j, proposed in enumerate(outer.weights[ray]):
                if outer.edges[ray, j] < end and start < outer.edges[ray, j + 1]:
                    bound = bound + proposed
            total = total + torch.relu(weight - bound) ** 2 / (weight + 1.1920929e-07)
    return total / len(inner.weights)


def distortion_by_definition(histogram: RayHistogram) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for edges, weights in zip(histogram.edges, histogram.weights, strict=True):
        middles = (edges[1:] + edges[:-1]) / 2
        for i in range(len(weights)):
            for j in range(len(weights)):
                total = total + weights[i] * weights[j] * (middles[i] - middles[j]).abs()
            total = total + weights[i] ** 2 * (edges[i + 1] - edges[i]) / 3
    return total / len(histogram.weights)


@pytest.mark.parametrize(("num_outer", "num_inner"), [(7, 5), (5, 12), (3, 3)])
def test_interlevel_against_its_definition(num_outer: int, num_inner: int) -> None:
    outer, inner = histogram(4, num_outer, seed=1), histogram(4, num_inner, seed=2)
    # Proposals with little weight, so that most of the light is missed.
    outer = RayHistogram(outer.edges, (0.2 * outer.weights).requires_grad_())
    loss, expected = interlevel(outer, inner), interlevel_by_definition(outer, inner)
    assert expected > 0.01
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, outer.weights)
    (expected_gradient,) = torch.autograd.grad(expected, outer.weights)
    torch.testing.assert_close(gradient, expected_gradient)


def test_interlevel_by_hand() -> None:
    # Light 0.6 in [0.4, 0.6], of which the proposal sees 0.1 + 0.2, and 0.3 in [0.6, 1], where it sees 0.2.
    outer = RayHistogram(torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.1, 0.2]]))
    inner = RayHistogram(torch.tensor([[0.0, 0.4, 0.6, 1.0]]), torch.tensor([[0.0, 0.6, 0.3]]))
    expected = 0.3**2 / 0.6 + 0.1**2 / 0.3
    assert float(interlevel(outer, inner)) == pytest.approx(expected, rel=1e-5)


def test_a_proposal_that_is_the_level_itself_misses_nothing() -> None:
    inner = histogram(5, 9)
    assert float(interlevel(inner, inner)) == pytest.approx(0.0, abs=1e-20)
    generous = RayHistogram(inner.edges, 2.0 * inner.weights)
    assert float(interlevel(generous, inner)) == 0.0


def test_intervals_that_merely_touch_do_not_share_weight() -> None:
    inner = RayHistogram(torch.tensor([[0.0, 0.25, 0.5, 1.0]]), torch.tensor([[0.2, 0.4, 0.2]]))
    loss = interlevel(RayHistogram(inner.edges, 0.5 * inner.weights), inner)
    assert float(loss) == pytest.approx(0.05 + 0.1 + 0.05, rel=1e-5)


def test_interlevel_teaches_the_proposal_alone() -> None:
    inner, outer = histogram(3, 6, seed=1), histogram(3, 4, seed=2)
    for tensor in (inner.edges, inner.weights, outer.edges, outer.weights):
        tensor.requires_grad_()
    interlevel(outer, inner).backward()
    assert inner.edges.grad is None
    assert inner.weights.grad is None
    assert outer.edges.grad is None
    assert outer.weights.grad is not None
    # Weight that comes to a proposal is never too much.
    assert (outer.weights.grad <= 0).all()
    assert (outer.weights.grad < 0).any()


def test_interlevel_gradcheck() -> None:
    outer, inner = histogram(2, 5, seed=1), histogram(2, 7, seed=2)
    weights = (0.3 * outer.weights).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: interlevel(RayHistogram(outer.edges, w), inner), weights)


@pytest.mark.parametrize("num", [1, 2, 15])
def test_distortion_against_its_definition(num: int) -> None:
    made = histogram(4, max(num, 3))
    made = RayHistogram(made.edges[:, : num + 1], made.weights[:, :num])
    torch.testing.assert_close(distortion(made), distortion_by_definition(made))


def test_distortion_by_hand() -> None:
    one = RayHistogram(torch.tensor([[0.2, 0.5]]), torch.tensor([[1.0]]))
    assert float(distortion(one)) == pytest.approx(0.1)
    two = RayHistogram(torch.tensor([[0.0, 0.2, 0.8, 1.0]]), torch.tensor([[0.5, 0.0, 0.5]]))
    assert float(distortion(two)) == pytest.approx(2 * 0.25 * 0.8 + 2 * 0.25 * 0.2 / 3)


def test_distortion_gradcheck() -> None:
    made = histogram(2, 6)
    weights = made.weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: distortion(RayHistogram(made.edges, w)), weights)


def test_single_precision_keeps_the_digits() -> None:
    made = histogram(3, 128)
    single = RayHistogram(made.edges.float(), made.weights.float())
    assert float(distortion(single)) == pytest.approx(float(distortion(made)), rel=1e-5)


def test_padding_reaches_nothing() -> None:
    outer, inner = histogram(6, 5, seed=1), histogram(6, 7, seed=2)
    keep = torch.tensor([True, True, False, True, False, False])

    def spoiled(made: RayHistogram) -> RayHistogram:
        edges, weights = made.edges.clone(), made.weights.clone()
        edges[~keep], weights[~keep] = float("nan"), float("nan")
        return RayHistogram(edges, weights.requires_grad_())

    def few(made: RayHistogram) -> RayHistogram:
        return RayHistogram(made.edges[keep], made.weights[keep])

    bad_outer, bad_inner = spoiled(outer), spoiled(inner)
    loss = interlevel(bad_outer, bad_inner, keep) + distortion(bad_inner, keep)
    torch.testing.assert_close(loss, interlevel(few(outer), few(inner)) + distortion(few(inner)))
    loss.backward()
    for made in (bad_outer, bad_inner):
        assert made.weights.grad is not None
        assert made.weights.grad.isfinite().all()
        assert not made.weights.grad[~keep].any()


@pytest.mark.parametrize("keep", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_rays(keep: Tensor | None) -> None:
    weights = torch.zeros(0, 4, requires_grad=True)
    nothing = RayHistogram(torch.zeros(0, 5), weights)
    loss = interlevel(nothing, nothing, keep) + distortion(nothing, keep)
    assert float(loss) == 0.0
    loss.backward()


def test_nothing_served() -> None:
    made = histogram(3, 4)
    weights = made.weights.requires_grad_()
    loss = distortion(RayHistogram(made.edges, weights), torch.zeros(3, dtype=torch.bool))
    assert float(loss) == 0.0
    loss.backward()
