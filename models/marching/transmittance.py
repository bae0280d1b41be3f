"""Dropping the samples that a radiance field hides from view."""

import torch
from jaxtyping import Float
from torch import Tensor

from models.compositing import render_weights
from models.marching.packing import select
from utils.types import RaySamples


@torch.no_grad()
def drop_dark(
    samples: RaySamples,
    alpha: Float[Tensor, " S"],
    threshold: float,
    backend: str,
    capacity: int | None = None,
) -> RaySamples:
    """Keep the samples in front of which a ray still has more than ``threshold`` of its light.

    Args:
        samples: as marched; may be padded.
        alpha: their opacities, 0..1.
        threshold: in [0, 1); 1e-3 is invisible in 8-bit pictures.
        backend: of the compositing.
        capacity: as for :func:`models.marching.march`; a ray that ``samples`` do not serve stays without.
    """
    # A bad number stays on its ray; the sums run over all rays at once and need the digits.
    weights = render_weights(alpha, samples.offsets, backend).double().nan_to_num(0.0)
    before = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    spent = before[:-1] - before[samples.offsets[samples.ray_indices]]
    keep = 1.0 - spent > threshold
    if samples.is_sample is not None:
        keep &= samples.is_sample
    return select(samples, keep, capacity)
