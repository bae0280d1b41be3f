r"""Gaussians for stretches of a pixel's cone: what lies there is asked for at once, not at a point.

::

             __..--|===|     a pixel's cone, cut at t0 and t1: a frustum, as wide as the pixel is there;
    camera <___    |===|     its Gaussian has the same mean, and varies as much along the ray and across it
               ``--|===|
                   t0  t1

A Gaussian is kept as its mean and a square root A of its covariance, A A^T. A map f that is linearised at the
mean takes it to f(mean) and J A (mip-NeRF 360, equation 9, for J Sigma J^T): variances stay positive whatever
rounding does, which of the covariance itself they do not where contraction shrinks one axis a million times
more than others.

Source: mip-NeRF (Barron et al. 2021), section 3.1; mip-NeRF 360 (Barron et al. 2022), section 2 and
equations 9 and 10.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.contraction import contract


@dataclass(frozen=True)
class Gaussians:
    """S Gaussians in space."""

    means: Float[Tensor, "S 3"]
    roots: Float[Tensor, "S 3 3"]
    """A, of which A A^T is the covariance."""

    @property
    def covariances(self) -> Float[Tensor, "S 3 3"]:
        """The covariances, A A^T."""
        return self.roots @ self.roots.mT

    def along(self, directions: Float[Tensor, "D 3"]) -> tuple[Float[Tensor, "S D"], Float[Tensor, "S D"]]:
        """Mean p^T mu and variance p^T A A^T p of the Gaussians' extent along each direction p."""
        means = self.means @ directions.T
        # One tall product instead of S small ones.
        roots = (self.roots.mT.reshape(-1, 3) @ directions.T).view(-1, 3, len(directions))
        return means, roots.square().sum(dim=1)

    @classmethod
    def cubes(cls, positions: Float[Tensor, "S 3"], side: float) -> "Gaussians":
        """Gaussians that vary as widely as cubes around some positions; with ``side`` 0 they are points."""
        root = torch.eye(3, dtype=positions.dtype, device=positions.device) * (side / 12.0**0.5)
        return cls(positions, root.expand(len(positions), 3, 3))


def frustum_moments(
    starts: Float[Tensor, "*batch"], ends: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Moments of a cone of radius 1 at distance 1 between two distances.

    With the middle c, half the length h and q = h / c: ::

        mean along      c (1 + 2 q^2 / (3 + q^2))
        variance along  h^2 (1/3 - 4/15 q^2 (12 - q^2) / (3 + q^2)^2)
        variance across c^2 (1/4 + 5/12 q^2 - 4/15 q^4 / (3 + q^2))

    Args:
        starts: of the stretches, not negative.
        ends: not before ``starts``.

    Returns:
        Mean distance, variance along the cone's axis, and variance along each axis across it (to be
        multiplied by the squared radius at distance 1).

    Source: mip-NeRF, equations 7 and 8, which are written so that thin frustums do not cancel; here with
        q for h so that they do not overflow either.
    """
    middles, halves = 0.5 * (starts + ends), 0.5 * (ends - starts)
    # At distance 0 a stretch without length has no ratio.
    squares = (halves / middles.clamp(min=1e-12)).square()
    sums = 3.0 + squares
    means = middles * (1.0 + 2.0 * squares / sums)
    along = halves.square() * (1.0 / 3.0 - 4.0 / 15.0 * squares * (12.0 - squares) / sums.square())
    across = middles.square() * (0.25 + 5.0 / 12.0 * squares - 4.0 / 15.0 * squares.square() / sums)
    return means, along, across


def cone_gaussians(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    radii: Float[Tensor, " R"],
    edges: Float[Tensor, "R N_plus_1"],
) -> Gaussians:
    """Gaussians for the N stretches of each of R cones, one ray after another.

    Args:
        origins: the cones' tips.
        directions: their axes, unit length.
        radii: at distance 1; 0 makes the cones lines.
        edges: distances along the axes, not falling.

    Source: mip-NeRF, equations 7, 8 and 16: t_var d d^T + r_var (I - d d^T).
    """
    means, along, across = frustum_moments(edges[:, :-1], edges[:, 1:])
    positions = origins[:, None] + means[..., None] * directions[:, None]
    axes = directions[:, :, None] * directions[:, None, :]
    identity = torch.eye(3, dtype=axes.dtype, device=axes.device)
    # d d^T and I - d d^T are projections: the roots of their sum are the sum of their roots.
    wide = (radii[:, None] * across.sqrt())[..., None, None] * (identity - axes)[:, None]
    roots = wide + along.sqrt()[..., None, None] * axes[:, None]
    return Gaussians(positions.flatten(0, 1), roots.flatten(0, 1))


def contract_gaussians(gaussians: Gaussians) -> Gaussians:
    """Map Gaussians into the ball of radius 2, linearised at their means; the unit ball stays as it is.

    Beyond it f(x) = (2 - 1 / |x|) x / |x| shrinks the radial direction u = x / |x| by 1 / |x|^2, the slope of
    2 - 1 / |x|, and what is perpendicular to it by |f| / |x|: ::

        J = (2 - 1 / |x|) / |x| (I - u u^T) + 1 / |x|^2 u u^T

    Source: mip-NeRF 360, equations 9 and 10.
    """
    length = gaussians.means.norm(dim=1).clamp(min=1.0)[:, None, None]
    # Within the unit ball both factors are 1, and u need not be a unit vector.
    u = gaussians.means[:, :, None] / length
    radial = u * (u.mT @ gaussians.roots)
    across = (2.0 - 1.0 / length) / length
    roots = across * gaussians.roots + (1.0 / length.square() - across) * radial
    return Gaussians(contract(gaussians.means), roots)
