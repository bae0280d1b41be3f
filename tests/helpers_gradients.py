"""Comparisons that a missing gradient cannot pass."""

from torch import Tensor


def assert_no_lost_gradient(actual: Tensor, expected: Tensor) -> None:
    """Fail where a row is all zero on one side only, however small the other side's numbers are."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    lost = _zero_rows(actual) != _zero_rows(expected)
    assert not lost.any(), f"zero on one side only in rows {lost.nonzero().flatten().tolist()[:10]}"


def assert_same_gradient(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Compare up to ``tolerance`` times the largest expected number, and row by row for lost gradients."""
    assert actual is not None
    assert expected is not None
    assert actual.isfinite().all()
    assert_no_lost_gradient(actual, expected)
    if expected.numel() > 0:
        difference = (actual.double() - expected.double()).abs().max()
        assert difference <= tolerance * expected.abs().max(), (difference, expected.abs().max())


def _zero_rows(gradient: Tensor) -> Tensor:
    return (gradient == 0).flatten(1).all(dim=1) if gradient.dim() > 1 else gradient == 0
