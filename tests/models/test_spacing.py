"""Spacing along rays: values by hand, order, and ends that stay where they are."""

import pytest
import torch

from models.spacing import Spacing, distances_from_s

every = pytest.mark.parametrize("spacing", ["linear", "reciprocal", "piecewise"])


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("linear", [0.5, 2.875, 5.25, 10.0]),
        # 1 / t from 2 to 0.1.
        ("reciprocal", [0.5, 1 / 1.525, 1 / 1.05, 10.0]),
        # g from 0.25 to 0.95: 0.425 is 2 x 0.425 near, 0.6 is 1 / (2 x 0.4) far.
        ("piecewise", [0.5, 0.85, 1.25, 10.0]),
    ],
)
def test_by_hand(spacing: Spacing, expected: list[float]) -> None:
    s = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    t = distances_from_s(s, torch.tensor([0.5]), torch.tensor([10.0]), spacing)
    torch.testing.assert_close(t, torch.tensor([expected]))


@every
@pytest.mark.parametrize(("near", "far"), [(0.05, 1e3), (0.2, 0.9), (1.0, 100.0), (3.0, 1e6)])
def test_single_precision_keeps_order_and_ends(spacing: Spacing, near: float, far: float) -> None:
    s = torch.linspace(0, 1, 2000)[None]
    t = distances_from_s(s, torch.tensor([near]), torch.tensor([far]), spacing)[0]
    assert t.isfinite().all()
    assert (t.diff() >= 0).all()
    assert float(t[0]) == pytest.approx(near)
    assert float(t[-1]) == pytest.approx(far, rel=1e-2 if far < 1e5 else 0.5)
    assert ((t >= near) & (t <= far)).all()


def test_near_zero() -> None:
    for spacing in ("linear", "piecewise"):
        t = distances_from_s(torch.tensor([[0.0, 0.5]]), torch.zeros(1), torch.tensor([1e3]), spacing)
        assert float(t[0, 0]) == 0.0
        assert t.isfinite().all()
