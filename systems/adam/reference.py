"""AdamW's update of one parameter in plain PyTorch, on any device."""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor


def update_(
    parameter: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    *,
    lr: float | Float[Tensor, ""],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    corrections: Float64[Tensor, "2"],
    finite: Bool[Tensor, ""],
    skip_untouched: bool,
) -> None:
    """Update a parameter and its means in place; see :class:`systems.adam.Adam`.

    Args:
        corrections: 1 - beta^t for both betas.
    """
    is_updated = finite & (gradient != 0.0) if skip_untouched else finite
    mean = torch.lerp(exp_avg, gradient, 1.0 - betas[0])
    square = betas[1] * exp_avg_sq + (1.0 - betas[1]) * gradient * gradient
    denominator = square.sqrt() / corrections[1].sqrt() + eps
    updated = parameter - lr * weight_decay * parameter - lr / corrections[0] * mean / denominator
    for old, new in ((parameter, updated), (exp_avg, mean), (exp_avg_sq, square)):
        old.copy_(torch.where(is_updated, new, old))
