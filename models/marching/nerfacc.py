"""Occupancy-grid ray marching by nerfacc (Li et al. 2023), whose lattice and levels are ours.

nerfacc adds step after step to reach a position, so distances differ from ours by roundings. Beyond the
coarsest level it places no samples. Every call waits for the device.
"""

import nerfacc
import torch
from torch import Tensor

from models.marching.cuda import visible
from models.marching.packing import pack
from utils.types import RaySamples

__all__ = ["march", "visible"]


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
    half = 2.0 ** torch.arange(len(occupied), device=near.device)[:, None].expand(-1, 3)
    _, samples, _ = nerfacc.traverse_grids(
        origins.contiguous(),
        directions.contiguous(),
        occupied.permute(0, 3, 2, 1).contiguous(),  # indexed [x, y, z] there
        torch.cat([-half, half], dim=1),
        # Its samples lie in the middles of steps from here on: k + 1/2 steps where ours lie k + jitter.
        near_planes=near + (jitter - 0.5) * step,
        far_planes=far.contiguous(),
        step_size=step,
        cone_angle=0.0,
    )
    offsets = torch.zeros(len(near) + 1, dtype=torch.int64, device=near.device)
    offsets[1:] = samples.packed_info[:, 1].cumsum(0)
    return pack(samples.vals, samples.ray_indices, offsets, step, capacity)
