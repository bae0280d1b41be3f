"""Fainter gradients near the cameras, against floaters in front of them.

The volume between two neighbouring rays grows with the square of the distance t from the camera, and so the
same stretch of space gets samples, and gradients, in proportion to 1 / t^2: what is closest learns fastest,
and settles as fog before the lens, where no other view contradicts it. The gradients of what a sample has to
show are therefore multiplied by

    min((t / r)^2, 1)

on their way back, where r is the distance from which on the views overlap; values are what they were.

Source: Philip and Deschaintre, "Floaters No More: Radiance Field Gradient Scaling for Improved Near-Camera
Training", EGSR 2023 (section 4, with r = 1).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _ScaleGradients(torch.autograd.Function):
    """(distances, reach, alpha, rgb) -> (alpha, rgb), keeping the distances and nothing else."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, distances: Tensor, reach: float, alpha: Tensor, rgb: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(distances)
        ctx.reach = reach  # type: ignore[attr-defined]
        return alpha.view_as(alpha), rgb.view_as(rgb)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_alpha, d_rgb):  # type: ignore[no-untyped-def]
        (distances,) = ctx.saved_tensors
        scale = (distances / ctx.reach).clamp(0.0, 1.0).square()
        return None, None, d_alpha * scale, d_rgb * scale[:, None]


def scale_gradients(
    alpha: Float[Tensor, " S"],
    rgb: Float[Tensor, "S 3"],
    distances: Float[Tensor, " S"],
    reach: float,
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S 3"]]:
    """Give both back as they are; their gradients get fainter towards the camera.

    Args:
        alpha: opacities of the samples, or their densities.
        rgb: their colours.
        distances: of the samples along their rays, scene units, at least 0.
        reach: r above, scene units, above 0. At r / 2 a quarter of the gradients is left.
    """
    scaled_alpha, scaled_rgb = _ScaleGradients.apply(distances, reach, alpha, rgb)
    return scaled_alpha, scaled_rgb


def check_reach(key: str, reach: float) -> None:
    """Raise a ``ValueError`` that names the config key of a reach outside of 0..10."""
    if not 0 <= reach <= 10:
        raise ValueError(f"{key}: must lie in 0..10, got {reach}")
