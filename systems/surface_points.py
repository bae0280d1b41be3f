"""Points spread evenly over the surface: for terms that judge it by its area, not by how often it is seen."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from utils.types import Field

_CANDIDATES = 4
"""Random points of the unit ball for each that is wanted; the nearest to the surface are taken."""
_STEPS = 2
"""Newton's, from a candidate to the surface."""
_NEAR = 3e-3
"""Distance at which a point has arrived, scene units."""
_RADIUS = 0.99
"""A surface at the sphere's own border is where the field ends, and no surface."""


@torch.no_grad()
def points_in_ball(count: int, generator: torch.Generator) -> Float[Tensor, "P 3"]:
    """Random points of the unit ball, on the generator's device."""
    device = generator.device
    directions = torch.nn.functional.normalize(torch.randn((count, 3), generator=generator, device=device))
    # A ball's volume grows with the cube of its radius.
    return torch.rand((count, 1), generator=generator, device=device).pow(1 / 3) * directions


@torch.no_grad()
def points_on_surface(
    field: Field, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "P 3"], Bool[Tensor, " P"]]:
    """Random points on the zero level set in the unit ball, about as many on every part of its area.

    Those of a ball's random points that are nearest to the surface fill a shell around it, whose volume goes
    by the area, and are moved onto it.

    Args:
        field: signed distance and gradient.
        count: how many; always as many come back.
        generator: of the candidates.

    Returns:
        ``(positions, is_on_surface)``: those that have not arrived, or lie at the sphere, do not count.
    """
    positions = points_in_ball(_CANDIDATES * count, generator)
    sdf, gradient = field(positions)
    nearest = sdf.abs().topk(count, largest=False).indices
    positions, sdf, gradient = (part.index_select(0, nearest) for part in (positions, sdf, gradient))
    for _ in range(_STEPS):
        # Where the field is flat a step would lead anywhere.
        slope = gradient.square().sum(dim=1, keepdim=True).clamp(min=0.25)
        positions = positions - sdf[:, None] * gradient / slope
        sdf, gradient = field(positions)
    return positions, (sdf.abs() < _NEAR) & (positions.norm(dim=1) < _RADIUS)
