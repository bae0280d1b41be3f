"""Rows of padding, which buffers of a fixed size end with: what they hold must reach nothing."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def zero_padding(rows: Float[Tensor, "S C"], count: Int64[Tensor, ""] | None) -> Float[Tensor, "S C"]:
    """The same rows, those from ``count`` on replaced by zeros, which no gradient passes.

    Args:
        rows: anything, NaN included, in the padding.
        count: how many rows are real, on their device; ``None``: all.
    """
    if count is None:
        return rows
    is_real = torch.arange(len(rows), device=rows.device) < count
    return torch.where(is_real[:, None], rows, 0.0)
