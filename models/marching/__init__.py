"""Ray marching through an occupancy grid, and dropping the samples that nothing can see.

    near                          far
     |--x--x--x--|--.--.--|--x--x--|      x sample (cell occupied)   . empty cell, skipped
        <-> step

A ray's lattice positions are t_k = near + (k + jitter) * step; a sample stands for half a step on either
side, [t_k - step / 2, t_k + step / 2).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.marching import cpu, reference
from utils.backend import available_anywhere, available_on_cpu
from utils.types import Rays, RaySamples

IMPLEMENTATIONS = {"cpu": available_on_cpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

_MODULES = {"cpu": cpu, "reference": reference}


def march(
    rays: Rays, occupied: Bool[Tensor, "G G G"], step: float, jitter: Float[Tensor, " R"], backend: str
) -> RaySamples:
    """Place samples at a fixed step wherever a ray runs through occupied cells between its near and far.

    Args:
        rays: in scene space; one with ``near > far`` gets no samples.
        occupied: cells over [-1, 1]^3, indexed ``[z, y, x]``.
        step: distance between samples, scene units.
        jitter: per ray in [0, 1): shifts its lattice by that part of a step; 0.5 is the unshifted one.
        backend: a key of :data:`IMPLEMENTATIONS`.
    """
    middles, ray_indices, offsets = _MODULES[backend].march(
        rays.origins, rays.directions, rays.near, rays.far, occupied, step, jitter
    )
    return RaySamples(middles - 0.5 * step, middles + 0.5 * step, ray_indices, offsets)


def drop_hidden(
    samples: RaySamples, sdf: Float[Tensor, " S"], inv_s: float, step: float, threshold: float, backend: str
) -> RaySamples:
    """Keep the samples in front of which a ray still has more than ``threshold`` of its light.

    The transmittance is estimated from the signed distances alone, with the slope along the ray
    taken from neighbouring samples (clamped to [-1, 0]), so that neither gradients nor colours
    have to be computed for what cannot be seen.

    Args:
        samples: as marched.
        sdf: at the samples' middles.
        inv_s: sharpness of NeuS's logistic density.
        step: the marching step.
        threshold: 0 keeps everything that any light reaches; 1e-3 is invisible in 8-bit pictures.
        backend: a key of :data:`IMPLEMENTATIONS`.
    """
    keep = _MODULES[backend].visible(sdf, samples.t_middle, samples.offsets, inv_s, step, threshold)
    counts = torch.cat([torch.zeros_like(samples.offsets[:1]), keep.to(torch.int64).cumsum(0)])
    return RaySamples(
        samples.t_starts[keep], samples.t_ends[keep], samples.ray_indices[keep], counts[samples.offsets]
    )
