"""Points spread evenly over the surface: for terms that judge it by its area, not by how often it is seen."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from utils.types import Field

_CANDIDATES = 8
"""Random points of the unit ball for each that is wanted; the nearest to the surface are taken."""
_SHELL = 0.05
"""Farther candidates do not count, scene units: around what is thinner than this shell there is more room for
them than its area deserves (1.4 times as much around a rod of radius 0.015, 4 times without a limit)."""
_STEPS = 2
"""Newton's, from a candidate to the surface."""
_ARRIVED = 3e-3
"""Distance at which a point is on the surface, scene units."""
_RADIUS = 0.99
"""What lies at the sphere's border is where the field ends, and no surface."""


@torch.no_grad()
def points_in_ball(count: int, generator: torch.Generator) -> Float[Tensor, "P 3"]:
    """Random points of the unit ball, on the generator's device."""
    device = generator.device
    directions = torch.nn.functional.normalize(torch.randn((count, 3), generator=generator, device=device))
    # A ball's volume grows with the cube of its radius.
    return torch.rand((count, 1), generator=generator, device=device).pow(1 / 3) * directions


@torch.no_grad()
def points_near_surface(
    field: Field, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "P 3"], Bool[Tensor, " P"]]:
    """Random points in the unit ball, moved onto the zero level set: about as many on every part of its area.

    Those of a ball's random points that are near the surface fill a shell around it, whose volume goes by the
    area.

    Args:
        field: signed distance and gradient.
        count: how many; always as many come back.
        generator: of the candidates.

    Returns:
        ``(positions, counts)``: ``counts`` is false for points from far away, which make up the number.
        Whether the others have arrived :func:`is_on_surface` says.
    """
    positions = points_in_ball(_CANDIDATES * count, generator)
    sdf, gradient = field(positions)
    nearest = sdf.abs().topk(count, largest=False).indices
    positions, sdf, gradient = (part.index_select(0, nearest) for part in (positions, sdf, gradient))
    counts = sdf.abs() < _SHELL
    for step in range(_STEPS):
        if step > 0:
            sdf, gradient = field(positions)
        # Where the field is flat a step would lead anywhere.
        slope = gradient.square().sum(dim=1, keepdim=True).clamp(min=0.25)
        positions = positions - sdf[:, None] * gradient / slope
    return positions, counts


def is_on_surface(positions: Float[Tensor, "P 3"], sdf: Float[Tensor, " P"]) -> Bool[Tensor, " P"]:
    """Whether points with these signed distances lie on the surface, and not at the sphere."""
    return (sdf.abs() < _ARRIVED) & is_in_field(positions)


def is_in_field(positions: Float[Tensor, "P 3"]) -> Bool[Tensor, " P"]:
    """Whether points lie well within the unit sphere, beyond which nothing is learned."""
    return positions.norm(dim=1) < _RADIUS
