"""Loss terms: values by hand, finite gradients where they bite, and zeros with a gradient for empty input."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from systems import losses

TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rgb_l1": lambda x: losses.rgb_l1(x, torch.full_like(x, 0.25)),
    "rgb_l2": lambda x: losses.rgb_l2(x, torch.full_like(x, 0.25)),
    "rgb_charbonnier": lambda x: losses.rgb_charbonnier(x, torch.full_like(x, 0.25)),
    "eikonal": losses.eikonal,
    "mask_bce": lambda x: losses.mask_bce(x[:, 0], torch.ones_like(x[:, 0])),
    "opacity_entropy": lambda x: losses.opacity_entropy(x[:, 0]),
    "sparsity": lambda x: losses.sparsity(x[:, 0], 20.0),
}


def test_colour_terms_by_hand() -> None:
    rgb = torch.tensor([[0.5, 0.0, 1.0], [0.2, 0.2, 0.2]])
    target = torch.tensor([[0.0, 0.0, 0.6], [0.2, 0.2, 0.5]])
    assert float(losses.rgb_l1(rgb, target)) == pytest.approx((0.5 + 0.4 + 0.3) / 6)
    assert float(losses.rgb_l2(rgb, target)) == pytest.approx((0.25 + 0.16 + 0.09) / 6)
    by_hand = sum(math.sqrt(r * r + 1e-6) for r in (0.5, 0, 0.4, 0, 0, 0.3)) / 6
    assert float(losses.rgb_charbonnier(rgb, target)) == pytest.approx(by_hand)
    assert float(losses.rgb_charbonnier(rgb, rgb)) == pytest.approx(1e-3)


def test_eikonal_by_hand() -> None:
    gradient = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -0.5]])
    assert float(losses.eikonal(gradient)) == pytest.approx((16.0 + 0.0 + 1.0 + 0.25) / 4, rel=1e-5)


def test_mask_bce_by_hand() -> None:
    opacity, mask = torch.tensor([0.8, 0.3, 0.5]), torch.tensor([1.0, 0.0, 0.5])
    by_hand = -(math.log(0.8) + math.log(0.7) + math.log(0.5)) / 3
    assert float(losses.mask_bce(opacity, mask)) == pytest.approx(by_hand, rel=1e-5)
    # A ray that is wrong beyond doubt costs -log(0.001), not infinity.
    assert float(losses.mask_bce(torch.zeros(2), torch.ones(2))) == pytest.approx(-math.log(1e-3), rel=1e-4)


def test_opacity_entropy_by_hand() -> None:
    assert float(losses.opacity_entropy(torch.tensor([0.5]))) == pytest.approx(math.log(2), rel=1e-6)
    by_hand = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(losses.opacity_entropy(torch.tensor([0.9, 0.1]))) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.opacity_entropy(torch.tensor([0.0, 1.0]))) < 0.01


def test_sparsity_by_hand() -> None:
    sdf = torch.tensor([0.0, 0.1, -0.1, 10.0])
    assert float(losses.sparsity(sdf, 20.0)) == pytest.approx((1 + 2 * math.exp(-2)) / 4, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_nothing_gives_a_zero_that_can_be_differentiated(name: str) -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    value = TERMS[name](empty)
    assert value.shape == ()
    assert float(value.detach()) == 0.0
    value.backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
def test_gradients_stay_finite_at_the_edges(name: str, value: float) -> None:
    x = torch.full((4, 3), value, requires_grad=True)
    loss = TERMS[name](x)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_nan_comes_out_as_nan(name: str) -> None:
    """An exception instead (PyTorch's cross entropy raises one) would end a run that can skip the step."""
    x = torch.full((4, 3), 0.5)
    x[1] = torch.nan
    assert torch.isnan(TERMS[name](x))


@pytest.mark.parametrize("name", TERMS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    x = torch.rand(5, 3, dtype=torch.float64) * 0.3 + 0.3
    x.requires_grad_()
    if name in ("mask_bce", "opacity_entropy"):
        assert torch.autograd.gradcheck(TERMS[name], (x,), atol=1e-6)
        return
    assert torch.autograd.gradcheck(TERMS[name], (x,), eps=1e-7, atol=1e-5)


def test_a_descent_step_moves_the_right_way() -> None:
    opacity = torch.tensor([0.4, 0.6], requires_grad=True)
    losses.mask_bce(opacity, torch.tensor([1.0, 0.0])).backward()
    assert opacity.grad is not None
    assert opacity.grad[0] < 0 < opacity.grad[1]
    gradient = torch.tensor([[0.5, 0.0, 0.0], [2.0, 0.0, 0.0]], requires_grad=True)
    losses.eikonal(gradient).backward()
    assert gradient.grad is not None
    assert gradient.grad[0, 0] < 0 < gradient.grad[1, 0]


@pytest.mark.parametrize("name", TERMS)
def test_only_the_rows_to_keep_count(name: str) -> None:
    values = torch.rand(7, 3)
    keep = torch.tensor([True, False, True, True, False, True, False])
    poisoned = torch.where(keep[:, None], values, torch.nan)
    targets = {"rgb_l1", "rgb_l2", "rgb_charbonnier"}

    def term(rows: Tensor, kept: Tensor | None) -> Tensor:
        if name in targets:
            return getattr(losses, name)(rows, torch.full_like(rows, 0.25), kept)
        if name == "eikonal":
            return losses.eikonal(rows, kept)
        if name == "mask_bce":
            return losses.mask_bce(rows[:, 0], torch.ones_like(rows[:, 0]), kept)
        if name == "sparsity":
            return losses.sparsity(rows[:, 0], 20.0, kept)
        return losses.opacity_entropy(rows[:, 0], kept)

    torch.testing.assert_close(term(poisoned, keep), TERMS[name](values[keep]))
    assert float(term(values, torch.zeros(7, dtype=torch.bool))) == 0.0
