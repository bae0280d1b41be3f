"""From signed distance to opacity: the laws of NeuS and of VolSDF side by side.

                 NeuS                                    VolSDF
    learned      inv_s                                   beta = 1 / sharpness
    profile      logistic CDF F(inv_s sdf)               Laplace CDF Psi(-sdf), mean 0, scale beta
    a sample     the share of F that is lost between     a medium of density Psi / beta, as thick as the
                 the ends of its interval                interval is long
    weight       peaks where sdf = 0                     peaks within about beta of it: behind by 0.27 beta
                                                         head-on, in front on rays that graze
    from behind  transparent                             as opaque as from the front

Both have one learned number, the sharpness in 1 / scene units, and both become a hard surface as it grows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

DensityName = Literal["neus", "volsdf"]
"""A key of :data:`DENSITIES`."""


MIN_BETA = 1e-4
"""VolSDF's lower bound on beta, scene units."""


@dataclass(frozen=True)
class Density:
    """What a method does with signed distances."""

    alpha: Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], Tensor]
    """sdf, cosine, lengths, sharpness, cos_anneal to opacities, see :func:`neus_alpha`."""
    presence: Callable[[Tensor, Tensor], Tensor]
    """sdf, sharpness to how much of a surface is there, 0..1, see :func:`logistic_presence`."""
    sharpness: Callable[[Tensor], Tensor]
    """From the logarithm that is learned."""


def neus_alpha(
    sdf: Float[Tensor, " S"],
    cosine: Float[Tensor, " S"],
    lengths: Float[Tensor, " S"],
    sharpness: Float[Tensor, ""],
    cos_anneal: float | Float[Tensor, ""],
) -> Float[Tensor, " S"]:
    """Opacity of a sample from its signed distance (NeuS, equation 13, the discrete form of section 3.3).

    The distances at the interval's ends are extrapolated along the ray, sdf -+ |c| length / 2, with
    c = -(relu(-cosine / 2 + 1/2) (1 - r) + relu(-cosine) r); alpha = max((F(prev) - F(next)) / F(prev), 0),
    F the logistic function of inv_s * sdf. Surfaces seen from behind (cosine > 0) are transparent once r = 1.

    Args:
        sdf: at the sample's middle.
        cosine: ray direction times unit normal, -1..1. The unit normal (as in instant-nsr-pl) rather than
            NeuS's raw gradient keeps early steps bounded, while the gradient's length is still far from 1.
        lengths: of the sample's interval.
        sharpness: inv_s, a scalar tensor so that it can be learned.
        cos_anneal: r in 0..1; 0 is the softened cosine that helps at the start.

    Returns:
        alpha in [0, 1].
    """
    relu = torch.nn.functional.relu
    falling = relu(0.5 - 0.5 * cosine) * (1.0 - cos_anneal) + relu(-cosine) * cos_anneal
    half = 0.5 * falling * lengths
    # (F(p) - F(n)) / F(p) = 1 - F(n) / F(p); in logarithms no digits are lost far inside or far outside.
    log_ratio = torch.nn.functional.logsigmoid((sdf - half) * sharpness) - torch.nn.functional.logsigmoid(
        (sdf + half) * sharpness
    )
    return -torch.expm1(log_ratio.clamp(max=0.0))


def logistic_presence(sdf: Float[Tensor, " P"], sharpness: Float[Tensor, ""]) -> Float[Tensor, " P"]:
    """Logistic density relative to its peak, 4 F(inv_s d) (1 - F(inv_s d)); 0.01 at |d| = 6 / inv_s."""
    profile = torch.sigmoid(sdf * sharpness)
    return 4.0 * profile * (1.0 - profile)


def volsdf_alpha(
    sdf: Float[Tensor, " S"],
    cosine: Float[Tensor, " S"],
    lengths: Float[Tensor, " S"],
    sharpness: Float[Tensor, ""],
    cos_anneal: float | Float[Tensor, ""],
) -> Float[Tensor, " S"]:
    """Opacity of a sample from VolSDF's density (Yariv et al. 2021, equations 2, 3 and 5).

    alpha = 1 - exp(-sigma length) with sigma = Psi(-sdf) / beta, Psi the CDF of the Laplace distribution
    with mean 0 and scale beta: e^(-sdf / beta) / 2 outside, 1 - e^(sdf / beta) / 2 inside.

    Args:
        sdf: at the sample's middle.
        cosine: not used: a density looks the same from everywhere, also from behind.
        lengths: of the sample's interval; the density is taken as constant along it.
        sharpness: 1 / beta, a scalar tensor so that it can be learned.
        cos_anneal: not used.

    Returns:
        alpha in [0, 1]; 1 - e^-1 deep inside for an interval of length beta.
    """
    scaled = sdf * sharpness
    # Each branch is kept from overflowing where the other one is meant: inf times 0 would be a NaN gradient.
    outside = 0.5 * torch.exp(-scaled.clamp(min=0.0))
    inside = 1.0 - 0.5 * torch.exp(scaled.clamp(max=0.0))
    optical_depth = sharpness * torch.where(scaled >= 0.0, outside, inside) * lengths
    return -torch.expm1(-optical_depth)


def laplace_presence(sdf: Float[Tensor, " P"], sharpness: Float[Tensor, ""]) -> Float[Tensor, " P"]:
    """Laplace density relative to its peak, e^(-|d| / beta); 0.01 at |d| = 4.6 beta.

    It is the slope of VolSDF's profile, not the profile, which stays high inside: there a ray has lost its
    light before it leaves this shell.
    """
    return torch.exp(-sdf.abs() * sharpness)


DENSITIES: dict[DensityName, Density] = {
    "neus": Density(neus_alpha, logistic_presence, lambda logarithm: logarithm.exp().clamp(1e-6, 1e6)),
    # As in VolSDF's code the bound is added to beta, which a clamp would keep from ever learning again.
    "volsdf": Density(
        volsdf_alpha, laplace_presence, lambda logarithm: 1.0 / ((-logarithm).exp() + MIN_BETA)
    ),
}
"""By ``model.density``."""
