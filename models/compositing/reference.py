"""Packed alpha compositing in plain PyTorch: one ray after another. Never optimised."""

import torch
from torch import Tensor


def render_weights(alpha: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``render_weights``."""
    rays = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ray = alpha[first:last]
        transmittance = torch.cumprod(torch.cat([torch.ones_like(ray[:1]), 1 - ray[:-1]]), dim=0)
        rays.append(transmittance * ray)
    return torch.cat([*rays, alpha[:0], torch.zeros_like(alpha[offsets[-1] :])])


def accumulate(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``accumulate``."""
    ray_indices = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()
    )
    sums = torch.zeros(len(offsets) - 1, values.shape[1], dtype=values.dtype, device=values.device)
    count = len(ray_indices)
    return sums.index_add(0, ray_indices, weights[:count, None] * values[:count])
