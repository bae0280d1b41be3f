"""Occupancy-grid ray marching in plain PyTorch: every lattice position is looked up; never optimised."""

import math

import torch
from torch import Tensor


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupied: Tensor,
    step: float,
    jitter: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package's ``march``."""
    resolution = occupied.shape[0]
    steps = int(((far - near).clamp(min=0).max().item() if len(far) else 0) / step) + 1
    middles = near[:, None] + (torch.arange(steps, device=near.device) + jitter[:, None]) * step
    positions = origins[:, None] + middles[..., None] * directions[:, None]
    cells = ((positions + 1) * (0.5 * resolution)).floor().long().clamp(0, resolution - 1)
    x, y, z = cells.unbind(-1)
    is_sample = occupied[z, y, x] & (middles < far[:, None])
    counts = is_sample.sum(dim=1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=near.device), counts.cumsum(0)])
    ray_indices = torch.repeat_interleave(torch.arange(len(near), device=near.device), counts)
    return middles[is_sample], ray_indices, offsets


def visible(
    sdf: Tensor, middles: Tensor, offsets: Tensor, inv_s: float, step: float, threshold: float
) -> Tensor:
    """See the package's ``visible``."""
    keep = torch.zeros(len(sdf), dtype=torch.bool, device=sdf.device)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        transmittance = 1.0
        for i in range(first, last):
            neighbours = [
                (j, k)
                for j, k in ((i - 1, i), (i, i + 1))
                if first <= j and k < last and middles[k] - middles[j] < 1.5 * step
            ]
            slopes = [float((sdf[k] - sdf[j]) / (middles[k] - middles[j])) for j, k in neighbours] or [-1.0]
            slope = max(min(sum(slopes) / len(slopes), 0.0), -1.0)
            after = (sdf[i] + slope * step / 2) * inv_s
            keep[i] = transmittance > threshold
            # 1 - F(next) / F(prev) = (1 - exp(next - prev)) F(-next), which stays exact deep inside.
            transmittance *= 1 - float(-math.expm1(slope * step * inv_s) * torch.sigmoid(-after))
    return keep
