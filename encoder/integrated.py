"""Integrated positional encoding: what a frequency encoding of a Gaussian's points is on average.

Waves shorter than a Gaussian average out, so that a network is only told what a pixel can resolve:

    E[sin(2^l x)] = sin(2^l mu) exp(-4^l sigma^2 / 2)      for x ~ N(mu, sigma^2), likewise for the cosine

A position has three coordinates, but mip-NeRF 360 encodes its extent along 21 directions: axes alone cannot
tell a Gaussian that lies askew from a round one.

Source: mip-NeRF (Barron et al. 2021), equations 13 and 14; mip-NeRF 360 (Barron et al. 2022), supplement
("off-axis positional encoding").
"""

from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def integrated_width(directions: int, num_frequencies: int) -> int:
    """Width of :func:`encode_integrated`'s result.

    >>> integrated_width(21, 12)
    504
    """
    return 2 * directions * num_frequencies


def icosahedron_directions() -> Float[Tensor, "21 3"]:
    """Unit vectors through half the vertices of an icosahedron whose edges are split in two.

    It has 12 vertices and 30 edges' middles, pushed out to the sphere. Of each pair of opposite ones, which
    say the same, the one is kept whose last coordinate that is not 0 is positive.
    """
    golden = (1.0 + 5.0**0.5) / 2.0
    corners = np.array(
        [
            np.roll([0.0, first, second * golden], shift)
            for shift in range(3)
            for first in (-1.0, 1.0)
            for second in (-1.0, 1.0)
        ]
    )
    # Its edges have length 2; the next shortest way between two vertices has 2 golden.
    middles = [(a + b) / 2.0 for a, b in combinations(corners, 2) if np.linalg.norm(a - b) < 2.5]
    vertices = np.concatenate([corners, middles])
    vertices /= np.linalg.norm(vertices, axis=1, keepdims=True)
    # Weights that grow by more than the coordinates differ make a comparison from the last one on.
    vertices = vertices[np.round(vertices, 6) @ [1.0, 1e3, 1e6] > 0]
    order = np.lexsort(np.round(vertices, 6).T)
    return torch.from_numpy(vertices[order]).float()


def encode_integrated(
    means: Float[Tensor, "S D"], variances: Float[Tensor, "S D"], num_frequencies: int
) -> Float[Tensor, "S W"]:
    """Mean of sin(2^l x) and cos(2^l x) for l = 0 .. num_frequencies - 1 and normally distributed x.

    Args:
        means: of each coordinate; positions along some directions, say.
        variances: of each coordinate, not negative; with 0 this is the plain frequency encoding.
        num_frequencies: octaves.

    Returns:
        ``(S, 2 * D * num_frequencies)``: the sines, D of each octave, then the cosines.

    Source: mip-NeRF, equation 14.
    """
    scales = 2.0 ** torch.arange(num_frequencies, dtype=means.dtype, device=means.device)[:, None]
    angles = (means[:, None] * scales).flatten(1)
    damping = torch.exp(-0.5 * (variances[:, None] * scales.square()).flatten(1))
    return torch.cat([angles.sin() * damping, angles.cos() * damping], dim=1)
