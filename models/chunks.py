"""Fields asked about any number of positions, piece by piece, outside of training."""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK = {"cpu": 2**14, "cuda": 2**20}
"""Positions per evaluation: few on a CPU, so that intermediate values stay in the cache; on a GPU as many as
keep it busy."""


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a row-wise function to a tall matrix piece by piece, so that memory stays bounded."""
    size = _CHUNK[rows.device.type]
    if len(rows) <= size:
        return function(rows)
    return torch.cat([function(chunk) for chunk in rows.split(size)])
