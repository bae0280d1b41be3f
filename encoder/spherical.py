"""Real spherical harmonics of unit directions, as polynomials in x, y, z (no angles, so no poles)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def encode_spherical_harmonics(directions: Float[Tensor, "P 3"], degree: int) -> Float[Tensor, "P D"]:
    """Evaluate the first ``degree`` bands (orthonormal on the sphere, no Condon-Shortley phase at m = 0).

    Args:
        directions: unit vectors.
        degree: number of bands, 1..5; band l has 2 l + 1 functions, m from -l to l.

    Returns:
        ``(P, degree**2)``. Band 0 is the constant sqrt(1 / (4 pi)) = 0.2821.

    Raises:
        ValueError: for a degree outside 1..5.

    Source: Sloan, "Stupid Spherical Harmonics (SH) Tricks", appendix A2.
    """
    if not 1 <= degree <= 5:
        raise ValueError(f"spherical harmonics: degree must be 1..5, got {degree}")
    x, y, z = directions.unbind(dim=1)
    xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z

    def norm(numerator: int, denominator: int) -> float:
        return math.sqrt(numerator / (denominator * math.pi))

    bands = [torch.full_like(x, norm(1, 4))]
    if degree > 1:
        bands += [-norm(3, 4) * y, norm(3, 4) * z, -norm(3, 4) * x]
    if degree > 2:
        bands += [
            norm(15, 4) * xy,
            -norm(15, 4) * yz,
            norm(5, 16) * (3 * zz - 1),
            -norm(15, 4) * xz,
            norm(15, 16) * (xx - yy),
        ]
    if degree > 3:
        bands += [
            -norm(35, 32) * y * (3 * xx - yy),
            norm(105, 4) * xy * z,
            -norm(21, 32) * y * (5 * zz - 1),
            norm(7, 16) * z * (5 * zz - 3),
            -norm(21, 32) * x * (5 * zz - 1),
            norm(105, 16) * z * (xx - yy),
            -norm(35, 32) * x * (xx - 3 * yy),
        ]
    if degree > 4:
        bands += [
            norm(315, 16) * xy * (xx - yy),
            -norm(315, 32) * yz * (3 * xx - yy),
            norm(45, 16) * xy * (7 * zz - 1),
            -norm(45, 32) * yz * (7 * zz - 3),
            norm(9, 256) * (35 * zz * zz - 30 * zz + 3),
            -norm(45, 32) * xz * (7 * zz - 3),
            norm(45, 64) * (xx - yy) * (7 * zz - 1),
            -norm(315, 32) * xz * (xx - 3 * yy),
            norm(315, 256) * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ]
    return torch.stack(bands, dim=1)
