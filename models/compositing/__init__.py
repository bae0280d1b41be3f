"""Alpha compositing of packed samples: weights along each ray, and weighted sums per ray."""

from jaxtyping import Float, Int64
from torch import Tensor

from models.compositing.optional import available_nerfacc
from utils.backend import available_anywhere, available_on_cpu, available_on_gpu, implementation

IMPLEMENTATIONS = {"cpu": available_on_cpu, "cuda": available_on_gpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

OPTIONAL = {"nerfacc": available_nerfacc}
"""Likewise, of libraries that are imported only when they are asked for by name."""


def render_weights(
    alpha: Float[Tensor, " S"], offsets: Int64[Tensor, " R_plus_1"], backend: str
) -> Float[Tensor, " S"]:
    """Weight of each sample in its pixel: w_i = T_i alpha_i with T_i = prod_{j < i} (1 - alpha_j).

    Args:
        alpha: opacity of each sample in [0, 1], ray by ray.
        offsets: the samples of ray r are ``offsets[r]:offsets[r + 1]``; rows behind them are padding.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`.

    Returns:
        Weights in [0, 1]; their sum along a ray is its opacity, at most 1. One ray with
        alpha 0.4, 0.8, 0.5 gives 0.4, 0.48, 0.06. Padding weighs 0.

    Source: Max 1995; NeuS (Wang et al. 2021), equation 11.
    """
    return implementation("models.compositing", backend).render_weights(alpha, offsets)


def accumulate(
    weights: Float[Tensor, " S"],
    values: Float[Tensor, "S C"],
    offsets: Int64[Tensor, " R_plus_1"],
    backend: str,
) -> Float[Tensor, "R C"]:
    """Sum ``weights * values`` over the samples of each ray; a ray without samples gives zeros.

    Args:
        weights: of each sample, of the same type as the values.
        values: C numbers per sample. Those of padding rows may be anything, and get no gradient.
        offsets: as for :func:`render_weights`.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`.
    """
    return implementation("models.compositing", backend).accumulate(weights, values, offsets)
