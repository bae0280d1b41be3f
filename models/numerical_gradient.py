"""Gradient and Laplacian of a signed distance from its values around a point (Neuralangelo, Li et al. 2023).

The analytic gradient of a trilinear grid is local to a cell: it jumps at cell borders, and a loss on it
reaches the eight vertices of that cell alone. Differences over a cell's width take in the neighbours, so that
the eikonal loss and the colours' normals smooth the surface at the scale of the finest open level (section
3.1 there, equations 2 to 4).

With K taps at distance eps in unit directions d_k that balance, sum_k d_k = 0 and sum_k d_k d_k^T = K/3 I,

    gradient  = 3 / (K eps) sum_k d_k f(x + eps d_k)            exact for what is quadratic (K = 6) or linear
    Laplacian = 6 / eps^2 (mean_k f(x + eps d_k) - f(x))        the trace of the Hessian

K = 6 are central differences along the axes; K = 4, the corners of a tetrahedron, costs two evaluations less
and leaves a share of the second derivatives in the gradient: 3 eps / (2 K) sum_k d_k (d_k^T H d_k).

Pitfall: in float32 a distance is known to about 1e-7, so that the Laplacian's noise is 6e-7 / eps^2: 0.2 on
the default grid's finest level, where the curvature's weight has become small.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from encoder.hashgrid import GridGeometry

TAPS = {
    4: torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]]) / 3**0.5,
    6: torch.cat([torch.eye(3), -torch.eye(3)]),
}
"""Unit directions of the taps, by their number."""


def tap_distance(
    geometry: GridGeometry, active_levels: float | Float[Tensor, ""]
) -> float | Float[Tensor, ""]:
    """Distance eps of the taps, scene units: the edge of a cell of the finest open level.

    2 bound / (N_min b^(a - 1)) with a levels open, so that it falls geometrically while a level fades in. The
    grid rounds its resolutions down, by less than a cell. With
    levels of 16, 32 and 64 cells over [-1, 1], all of them open, eps is 1/32.

    Args:
        geometry: of the grid.
        active_levels: a; below 1 and above the number of levels eps is that of the first and the last. A
            tensor is read on its device.
    """
    coarsest, last = 2.0 * geometry.bound / geometry.config.base_resolution, geometry.num_levels - 1.0
    if isinstance(active_levels, Tensor):
        return coarsest * torch.pow(1.0 / geometry.config.growth, (active_levels - 1.0).clamp(0.0, last))
    return coarsest * (1.0 / geometry.config.growth) ** min(max(active_levels - 1.0, 0.0), last)


def numerical_derivatives(
    values: Callable[[Float[Tensor, "T 3"]], Float[Tensor, " T"]],
    positions: Float[Tensor, "S 3"],
    sdf: Float[Tensor, " S"],
    directions: Float[Tensor, "K 3"],
    distance: float | Float[Tensor, ""],
) -> tuple[Float[Tensor, "S 3"], Float[Tensor, " S"]]:
    """Gradient and Laplacian from taps, as differentiable in the parameters as the values are.

    Args:
        values: signed distance at T = S K positions, those of a sample's taps side by side.
        positions: x.
        sdf: f(x).
        directions: one of :data:`TAPS`, on the positions' device.
        distance: eps, scene units.

    Returns:
        d sdf / d position ``(S, 3)``, without unit, and its divergence ``(S,)``, 1 / scene units.
    """
    taps = positions[:, None, :] + distance * directions
    around = values(taps.view(-1, 3)).view(len(positions), len(directions))
    gradient = around @ directions * (3.0 / len(directions) / distance)
    laplacian = (around.mean(dim=1) - sdf) * (6.0 / distance / distance)
    return gradient, laplacian
