"""The signed distance network on a hash grid: value and analytic gradient as one operation.

The eikonal loss and the normal that colours a sample both differentiate d sdf / d position,
so the gradient is an output like the value. ``reference.py`` lets autograd differentiate
twice; ``cpu.py`` writes both sweeps out.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from encoder.hashgrid import GridGeometry
from models.sdf_network import cpu, reference
from utils.backend import available_anywhere, available_on_cpu

IMPLEMENTATIONS = {"cpu": available_on_cpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

_MODULES = {"cpu": cpu, "reference": reference}


def sdf_with_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float,
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S 3"]]:
    """Evaluate the network and the gradient of its first output.

    Args:
        positions: scene positions.
        table, geometry, active_levels: the hash grid, see :func:`encoder.hashgrid.encode`.
        weights, biases: of the linear layers, first to last, ``(out, in)`` and ``(out,)``; softplus between.
        beta: sharpness of softplus(x) = log(1 + exp(beta x)) / beta; NeuS uses 100.
        backend: a key of :data:`IMPLEMENTATIONS`. The CPU version is differentiable once (in table, weights
            and biases, through both results), the reference any number of times (in the positions, too).

    Returns:
        outputs ``(S, C)``: the last layer's outputs, the signed distance in column 0, then the
        encoding itself (a short way for colours, which have finer detail than a small network
        hands on); and d sdf / d position ``(S, 3)``.

    Source: IDR (Yariv et al. 2020) for the network; the two sweeps are reverse-mode differentiation, see
        cpu.py.
    """
    return _MODULES[backend].sdf_with_gradient(
        positions, table, geometry, active_levels, weights, biases, beta
    )


def sdf_only(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float,
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
) -> Float[Tensor, " S"]:
    """Evaluate the signed distance alone, outside of autograd (pruning, occupancy, surface extraction)."""
    return _MODULES[backend].sdf_only(positions, table, geometry, active_levels, weights, biases, beta)
