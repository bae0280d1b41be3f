"""Ray marching through an occupancy grid, and dropping the samples that nothing can see.

    near                          far
     |--x--x--x--|--.--.--|--x--x--|      x sample (cell occupied)   . empty cell, skipped
        <-> step

A ray's lattice positions are t_k = near + (k + jitter) * step; a sample stands for half a step on either
side, [t_k - step / 2, t_k + step / 2).

The grid may have several levels around one another, each twice as large as the one inside, with the same
number of cells:

    +---------------+
    |   level 1     |   a position is looked up in the finest level that contains it; what lies beyond the
    |   +-------+   |   coarsest belongs to the outermost cells there
    |   |level 0|   |
    |   |[-1, 1]|   |
    |   +-------+   |
    |   [-2, 2]     |
    +---------------+
"""

from jaxtyping import Bool, Float
from torch import Tensor

from models.compositing.optional import available_nerfacc
from models.marching.packing import select
from models.opacity import DensityName
from utils.backend import available_anywhere, available_on_cpu, available_on_gpu, implementation
from utils.types import Rays, RaySamples

IMPLEMENTATIONS = {"cpu": available_on_cpu, "cuda": available_on_gpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

OPTIONAL = {"nerfacc": available_nerfacc}
"""Likewise, of libraries that are imported only when they are asked for by name."""


def march(
    rays: Rays,
    occupied: Bool[Tensor, "K G G G"] | Bool[Tensor, "G G G"],
    step: float | Float[Tensor, ""],
    jitter: Float[Tensor, " R"],
    backend: str,
    capacity: int | None = None,
) -> RaySamples:
    """Place samples at a fixed step wherever a ray runs through occupied cells between its near and far.

    Args:
        rays: in scene space; one with ``near > far`` gets no samples, nor does one that is not a number.
        occupied: cells indexed ``[z, y, x]``; level k of K covers [-2^k, 2^k]^3. Without a first axis it is
            level 0 alone.
        step: distance between samples, scene units, > 0.
        jitter: per ray in [0, 1): shifts its lattice by that part of a step; 0.5 is the unshifted one.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`.
        capacity: rows of the result. Rays are served in their order; the first whose samples do not all fit,
            and all behind it, get none (see :attr:`RaySamples.is_served`). ``None`` packs without a limit,
            for which ``cuda`` waits for the device once. ``nerfacc`` waits in any case.
    """
    levels = occupied if occupied.dim() == 4 else occupied[None]
    return implementation("models.marching", backend).march(
        *(rays.origins, rays.directions, rays.near, rays.far, levels, step, jitter), capacity=capacity
    )


def drop_hidden(
    samples: RaySamples,
    sdf: Float[Tensor, " S"],
    sharpness: float | Float[Tensor, ""],
    step: float | Float[Tensor, ""],
    threshold: float,
    density: DensityName,
    backend: str,
    capacity: int | None = None,
) -> RaySamples:
    """Keep the samples in front of which a ray still has more than ``threshold`` of its light.

    The transmittance comes from the signed distances alone, so that neither gradients nor colours have to be
    computed for what cannot be seen. That is all VolSDF's opacities need; for NeuS's the slope along the ray
    is estimated from neighbouring samples (clamped to [-1, 0]).

    Args:
        samples: as marched.
        sdf: at the samples' middles.
        sharpness: inv_s of NeuS's logistic density, 1 / beta of VolSDF's.
        step: the marching step.
        threshold: 0 keeps everything that any light reaches; 1e-3 is invisible in 8-bit pictures.
        density: whose opacities, see ``models/opacity.py``.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`.
        capacity: as for :func:`march`; a ray that ``samples`` do not serve stays without.
    """
    keep = implementation("models.marching", backend).visible(
        sdf, samples.t_middle, samples.offsets, sharpness, step, threshold, density
    )
    return select(samples, keep, capacity)
