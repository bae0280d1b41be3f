"""Spacing of samples along a ray: normalised distance s in 0..1, along which even steps are taken.

A monotone function g warps distance t; s = (g(t) - g(near)) / (g(far) - g(near)). ``linear`` steps suit
bounded scenes, ``reciprocal`` ones (even in inverse distance, as disparities are) unbounded scenes, and
``piecewise`` is linear up to one scene unit and reciprocal beyond, so that the first half of the steps covers
the neighbourhood of the camera and the second half all that is further off:

    g(t) = t / 2 for t < 1,   1 - 1 / (2 t) beyond       0 |-----linear-----|---reciprocal---| 1
                                                       t = 0                1     2    10  infinity

Source: NeRF++ (Zhang et al. 2020) for inverse distance; mip-NeRF 360 (Barron et al. 2022), equation 11, for
s; nerfacto (Tancik et al. 2023) for the piecewise function.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Spacing = Literal["linear", "reciprocal", "piecewise"]
"""What is even in s: distance, its inverse, or the one near and the other far."""


def _warp(distances: Tensor, spacing: Spacing) -> Tensor:
    if spacing == "linear":
        return distances
    if spacing == "reciprocal":
        return -1.0 / distances
    return torch.where(distances < 1.0, 0.5 * distances, 1.0 - 0.5 / distances.clamp(min=1.0))


def _unwarp(warped: Tensor, spacing: Spacing) -> Tensor:
    if spacing == "linear":
        return warped
    if spacing == "reciprocal":
        return -1.0 / warped
    return torch.where(warped < 0.5, 2.0 * warped, 0.5 / (1.0 - warped.clamp(min=0.5)))


def distances_from_s(
    s: Float[Tensor, "R K"], near: Float[Tensor, " R"], far: Float[Tensor, " R"], spacing: Spacing
) -> Float[Tensor, "R K"]:
    """Distances t along rays, scene units, of normalised distances s.

    Args:
        s: 0 at ``near``, 1 at ``far``.
        near: above 0 (with ``linear`` and ``piecewise`` 0 as well).
        far: above ``near``.
        spacing: what is even in s. Half-way between 1 and 3 lies 2 with ``linear``, 1.5 with the others.
    """
    near, far = near[:, None], far[:, None]
    t = _unwarp(torch.lerp(_warp(near, spacing), _warp(far, spacing), s), spacing)
    # Rounding must not lead out of the ray's stretch.
    return torch.minimum(torch.maximum(t, near), far)
