"""The signed distance network on a hash grid: value and analytic gradient as one operation.

The eikonal loss and the normal that colours a sample both differentiate d sdf / d position,
so the gradient is an output like the value. ``reference.py`` lets autograd differentiate
twice; ``cpu.py`` writes both sweeps out, and ``cuda.py`` does all of it in one kernel per direction.

Where gradients are differences of values, values have to be differentiable instead: ``sdf_outputs`` and
``sdf_values``, without any gradient in the positions.
"""

import functools
from collections.abc import Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from encoder.hashgrid import OPTIONAL, GridGeometry
from utils.backend import available_anywhere, available_on_cpu, available_on_gpu, implementation

__all__ = ["IMPLEMENTATIONS", "OPTIONAL", "sdf_only", "sdf_outputs", "sdf_values", "sdf_with_gradient"]

IMPLEMENTATIONS = {
    "cpu": available_on_cpu,
    "cuda": functools.partial(available_on_gpu, least=(8, 0)),
    "reference": available_anywhere,
}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not.
``OPTIONAL`` (tiny-cuda-nn, whose grid serves with PyTorch's layers) is the same for wishes by name."""


def _known(backend: str) -> str:
    known = IMPLEMENTATIONS.keys() | OPTIONAL.keys()
    if backend not in known:
        raise ValueError(f"SDF network: backend must be one of {sorted(known)}, got {backend!r}")
    return backend


def sdf_with_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
    count: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "S C"], Float[Tensor, "S 3"]]:
    """Evaluate the network and the gradient of its first output.

    Args:
        positions: scene positions.
        table, geometry, active_levels: the hash grid, see :func:`encoder.hashgrid.encode`.
        weights, biases: of the linear layers, first to last, ``(out, in)`` and ``(out,)``; softplus between.
        beta: sharpness of softplus(x) = log(1 + exp(beta x)) / beta; NeuS uses 100.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`. The CPU and CUDA versions are
            differentiable once (through both results), the reference any number of times.
        count: rows of ``positions`` from here on are padding, whatever they hold: they give zeros and have no
            part in any gradient. ``None``: there is none.

    Returns:
        outputs ``(S, C)``: the last layer's outputs, the signed distance in column 0, then the
        encoding itself (a short way for colours, which have finer detail than a small network
        hands on); and d sdf / d position ``(S, 3)``.

    Raises:
        ValueError: for an unknown backend.

    Source: IDR (Yariv et al. 2020) for the network; the two sweeps are reverse-mode differentiation, see
        cpu.py.
    """
    module = implementation(__name__, _known(backend))
    return module.sdf_with_gradient(positions, table, geometry, active_levels, weights, biases, beta, count)


def sdf_only(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, " S"]:
    """Evaluate the signed distance alone, outside of autograd (pruning, occupancy, surface extraction)."""
    module = implementation(__name__, _known(backend))
    return module.sdf_only(positions, table, geometry, active_levels, weights, biases, beta, count)


def sdf_outputs(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S C"]:
    """Evaluate the network without its gradient: the outputs of :func:`sdf_with_gradient`.

    Differentiable in table, weights and biases. On a GPU the layers are PyTorch's, in float32.
    """
    module = implementation(__name__, _known(backend))
    return module.sdf_outputs(positions, table, geometry, active_levels, weights, biases, beta, count)


def sdf_values(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    weights: Sequence[Float[Tensor, "_ _"]],
    biases: Sequence[Float[Tensor, " _"]],
    beta: float,
    backend: str,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, " S"]:
    """Evaluate the signed distance alone, differentiable in table, weights and biases as it is.

    :func:`sdf_only` is the same outside of autograd, and faster.
    """
    module = implementation(__name__, _known(backend))
    return module.sdf_values(positions, table, geometry, active_levels, weights, biases, beta, count)
