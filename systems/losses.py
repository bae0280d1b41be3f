"""Loss terms: pure functions from tensors to one unweighted scalar each.

An empty input gives a zero that belongs to the graph, so that a step without samples can be differentiated.
"""

from jaxtyping import Float
from torch import Tensor


def _mean(values: Tensor) -> Tensor:
    # A mean over nothing is NaN; the sum of nothing is a zero that still belongs to the graph.
    return values.sum() / max(values.numel(), 1)


def _cross_entropy(opacity: Tensor, target: Tensor) -> Tensor:
    # PyTorch's own raises on NaN (on a GPU it ends the process), and the trainer could not skip the step. The
    # opacity is kept within [1e-3, 1 - 1e-3], where the logarithms and their slopes are bounded.
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return -(target * clamped.log() + (1.0 - target) * (1.0 - clamped).log())


def rgb_l1(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Mean absolute difference (NeuS)."""
    return _mean((rgb - target).abs())


def rgb_l2(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"]) -> Float[Tensor, ""]:
    """Mean squared difference (NeRF)."""
    return _mean((rgb - target).square())


def rgb_charbonnier(
    rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], padding: float = 1e-3
) -> Float[Tensor, ""]:
    """Mean of sqrt(r^2 + padding^2): quadratic near zero, absolute beyond (mip-NeRF 360, section 4)."""
    return _mean(((rgb - target).square() + padding**2).sqrt())


def eikonal(gradient: Float[Tensor, "S 3"]) -> Float[Tensor, ""]:
    """Mean of (|d sdf / dx| - 1)^2 (IGR, Gropp et al. 2020, equation 2)."""
    # The square root's slope at zero is infinite; 1e-12 keeps a vanishing gradient's derivative finite.
    return _mean(((gradient.square().sum(dim=1) + 1e-12).sqrt() - 1.0).square())


def mask_bce(opacity: Float[Tensor, " R"], mask: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    """Binary cross entropy between opacity, kept within [1e-3, 1 - 1e-3], and mask (NeuS)."""
    return _mean(_cross_entropy(opacity, mask))


def opacity_entropy(opacity: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    """Binary entropy of the opacity: zero when every ray is empty or opaque (instant-nsr-pl's ``opaque``)."""
    return _mean(_cross_entropy(opacity, opacity.clamp(1e-3, 1 - 1e-3)))


def sparsity(sdf: Float[Tensor, " S"], scale: float) -> Float[Tensor, ""]:
    """Mean of exp(-scale |sdf|): samples are pushed off the zero level unless the pictures hold them there.

    Args:
        sdf: at the samples.
        scale: 1 / width of the penalised shell, 1 / scene units.

    Source: SparseNeuS (Long et al. 2022), equation 11.
    """
    return _mean((-scale * sdf.abs()).exp())
