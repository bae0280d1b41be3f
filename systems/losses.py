"""Loss terms: pure functions from tensors to one unweighted scalar each.

An empty input gives a zero that belongs to the graph, so that a step without samples can be differentiated.
With ``keep`` the mean is over these rows alone, and what the others hold has no part in it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Keep = Bool[Tensor, " rows"] | None
"""Rows that count; ``None``: all."""


def _mean(values: Tensor, keep: Tensor | None) -> Tensor:
    # A mean over nothing is NaN; the sum of nothing is a zero that still belongs to the graph.
    if keep is None:
        return values.sum() / max(values.numel(), 1)
    per_row = values.flatten(1).mean(dim=1) if values.dim() > 1 else values
    return torch.where(keep, per_row, 0.0).sum() / keep.sum().clamp(min=1)


def _cross_entropy(opacity: Tensor, target: Tensor) -> Tensor:
    # PyTorch's own raises on NaN (on a GPU it ends the process), and the trainer could not skip the step. The
    # opacity is kept within [1e-3, 1 - 1e-3], where the logarithms and their slopes are bounded.
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return -(target * clamped.log() + (1.0 - target) * (1.0 - clamped).log())


def rgb_l1(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean absolute difference (NeuS)."""
    return _mean((rgb - target).abs(), keep)


def rgb_l2(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean squared difference (NeRF)."""
    return _mean((rgb - target).square(), keep)


def rgb_charbonnier(
    rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None, padding: float = 1e-3
) -> Float[Tensor, ""]:
    """Mean of sqrt(r^2 + padding^2): quadratic near zero, absolute beyond (mip-NeRF 360, section 4)."""
    return _mean(((rgb - target).square() + padding**2).sqrt(), keep)


def eikonal(gradient: Float[Tensor, "S 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean of (|d sdf / dx| - 1)^2 (IGR, Gropp et al. 2020, equation 2)."""
    # The square root's slope at zero is infinite; 1e-12 keeps a vanishing gradient's derivative finite.
    return _mean(((gradient.square().sum(dim=1) + 1e-12).sqrt() - 1.0).square(), keep)


def mask_bce(opacity: Float[Tensor, " R"], mask: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """Binary cross entropy between opacity, kept within [1e-3, 1 - 1e-3], and mask (NeuS)."""
    return _mean(_cross_entropy(opacity, mask), keep)


def opacity_entropy(opacity: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """Binary entropy of the opacity: zero when every ray is empty or opaque (instant-nsr-pl's ``opaque``)."""
    return _mean(_cross_entropy(opacity, opacity.clamp(1e-3, 1 - 1e-3)), keep)


def sparsity(sdf: Float[Tensor, " S"], scale: float, keep: Keep = None) -> Float[Tensor, ""]:
    """Mean of exp(-scale |sdf|): samples are pushed off the zero level unless the pictures hold them there.

    Args:
        sdf: at the samples.
        scale: 1 / width of the penalised shell, 1 / scene units.

    Source: SparseNeuS (Long et al. 2022), equation 11.
    """
    return _mean((-scale * sdf.abs()).exp(), keep)
