"""Packed alpha compositing by nerfacc (Li et al. 2023).

Its transmittance is a product whose gradient divides by 1 - alpha: fully opaque samples get a wrong one.
Every call waits for the device.
"""

import nerfacc
import torch
from torch import Tensor


def render_weights(alpha: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``render_weights``."""
    # nerfacc leaves rows of no ray uninitialised, so that padding is kept away from it.
    count = int(offsets[-1])
    packed_info = torch.stack([offsets[:-1], offsets.diff()], dim=1)
    weights, _ = nerfacc.render_weight_from_alpha(alpha[:count], packed_info=packed_info)
    return torch.nn.functional.pad(weights, (0, len(alpha) - count))


def accumulate(weights: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """See the package's ``accumulate``."""
    count, num_rays = int(offsets[-1]), len(offsets) - 1
    rays = torch.arange(num_rays, device=offsets.device)
    ray_indices = torch.repeat_interleave(rays, offsets.diff(), output_size=count)
    return nerfacc.accumulate_along_rays(
        weights[:count], values=values[:count], ray_indices=ray_indices, n_rays=num_rays
    )
