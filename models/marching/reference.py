"""Occupancy-grid ray marching in plain PyTorch: every lattice position is looked up; never optimised."""

import math

import torch
from torch import Tensor

from models.marching.packing import pack
from models.opacity import DensityName
from utils.types import RaySamples


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupied: Tensor,
    step: float | Tensor,
    jitter: Tensor,
    capacity: int | None,
) -> RaySamples:
    """See the package's ``march``."""
    step = float(step)
    num_levels, resolution = occupied.shape[:2]
    longest = (far - near).nan_to_num(0.0).clamp(min=0).max().item() if len(far) else 0.0
    ticks = torch.arange(int(longest / step) + 2, device=near.device)
    middles = near[:, None] + (ticks + jitter[:, None]) * step
    positions = origins[:, None] + middles[..., None] * directions[:, None]
    reaches = 2.0 ** torch.arange(num_levels - 1, device=near.device)
    level = (positions.abs().amax(dim=-1, keepdim=True) >= reaches).sum(dim=-1)
    scaled = positions * 0.5 ** level[..., None]
    cells = ((scaled + 1) * (0.5 * resolution)).floor().long().clamp(0, resolution - 1)
    x, y, z = cells.unbind(-1)
    is_sample = occupied[level, z, y, x] & (middles < far[:, None]) & ~positions.isnan().any(dim=-1)
    counts = is_sample.sum(dim=1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device=near.device), counts.cumsum(0)])
    ray_indices = torch.repeat_interleave(torch.arange(len(near), device=near.device), counts)
    return pack(middles[is_sample], ray_indices, offsets, step, capacity)


def visible(
    sdf: Tensor,
    middles: Tensor,
    offsets: Tensor,
    sharpness: float | Tensor,
    step: float | Tensor,
    threshold: float,
    density: DensityName,
) -> Tensor:
    """See the package's ``drop_hidden``."""
    sharpness, step = float(sharpness), float(step)
    keep = torch.zeros(len(sdf), dtype=torch.bool, device=sdf.device)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        transmittance = 1.0
        for i in range(first, last):
            keep[i] = transmittance > threshold
            if density == "volsdf":
                alpha = _laplace_alpha(float(sdf[i]), sharpness, step)
            else:
                slope = _slope(sdf[first:last], middles[first:last], i - first, step)
                alpha = _logistic_alpha(float(sdf[i]), slope, sharpness, step)
            transmittance *= 1 - alpha
    return keep


def _slope(sdf: Tensor, middles: Tensor, i: int, step: float) -> float:
    """Of the signed distance along one ray at its sample ``i``: mean over neighbours without a gap."""
    neighbours = [
        (j, k)
        for j, k in ((i - 1, i), (i, i + 1))
        if j >= 0 and k < len(sdf) and middles[k] - middles[j] < 1.5 * step
    ]
    slopes = [float((sdf[k] - sdf[j]) / (middles[k] - middles[j])) for j, k in neighbours] or [-1.0]
    return max(min(sum(slopes) / len(slopes), 0.0), -1.0)


def _logistic_alpha(sdf: float, slope: float, inv_s: float, step: float) -> float:
    # 1 - F(next) / F(prev) = (1 - exp(next - prev)) F(-next), which stays exact deep inside.
    after = torch.tensor((sdf + slope * step / 2) * inv_s)
    return float(-math.expm1(slope * step * inv_s) * torch.sigmoid(-after))


def _laplace_alpha(sdf: float, sharpness: float, step: float) -> float:
    tail = 0.5 * math.exp(-abs(sdf) * sharpness)
    return -math.expm1(-sharpness * step * (tail if sdf >= 0 else 1 - tail))
