"""Contraction: all of space in a ball, or a cube, of radius 2, so that a bounded field reaches everywhere.

What lies within the unit ball (or cube) stays as it is; beyond, distances shrink like 1 / |x|:

    |x|    0 ---- 1 ---- 2 ---- 4 ---- 10 --- infinity
    |y|    0 ---- 1 --- 1.5 -- 1.75 -- 1.9 --- 2

The Euclidean norm gives a ball, whose surroundings fill 52 % of a hash grid's cube; the largest coordinate's
gives the cube itself, at the price of creases where the largest coordinate changes.

Source: mip-NeRF 360 (Barron et al. 2022), equation 10; with the largest coordinate as MERF (Reiser et al.
2023, equation 5) and nerfacto (Tancik et al. 2023) have it, the other coordinates scaled along.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from utils.types import Scene

ContractionNorm = Literal["l2", "linf"]
"""Euclidean length, or the largest coordinate's absolute value."""

CONTRACTED_RADIUS = 2.0
"""Where infinity lies, in either norm."""


def _norm(positions: Float[Tensor, "*batch 3"], norm: ContractionNorm) -> Float[Tensor, "*batch 1"]:
    if norm == "l2":
        return positions.norm(dim=-1, keepdim=True)
    return positions.abs().amax(dim=-1, keepdim=True)


def contract(positions: Float[Tensor, "*batch 3"], norm: ContractionNorm = "l2") -> Float[Tensor, "*batch 3"]:
    """Map all of space into radius 2; what has a norm of at most 1 stays as it is.

    x -> (2 - 1 / |x|) x / |x| for |x| > 1: with either norm (4, 0, 0) becomes (1.75, 0, 0); (4, 4, 0) becomes
    (1.75, 1.75, 0) with ``linf``. Gradients are finite everywhere.

    Source: mip-NeRF 360, equation 10; for ``linf`` see the module.
    """
    length = _norm(positions, norm).clamp(min=1.0)
    return (2.0 - 1.0 / length) / length * positions


def camera_radius(scene: Scene) -> float:
    """Radius of the ball around the origin that holds the training cameras and the unit sphere, scene units.

    In units of it nothing is contracted that cameras look at from close by (mip-NeRF 360 brings all cameras
    into the unit cube).
    """
    centers = scene.cameras.c2w[list(scene.train_indices), :, 3]
    return max(1.0, float(centers.norm(dim=1).max()))
