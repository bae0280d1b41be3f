"""The SDF network in plain PyTorch, autograd twice: what the fast versions are tested on; never optimised.

The hash grid's encoding is an argument, so that one that is differentiable twice brings its own speed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from encoder.hashgrid import GridGeometry
from encoder.hashgrid import reference as hashgrid_reference
from utils.padding import zero_padding

Encode = Callable[[Tensor, Tensor, GridGeometry, float | Tensor], Tensor]
"""(positions, table, geometry, active_levels) -> encoding, see :func:`encoder.hashgrid.encode`."""

Network = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], float], Tensor]
"""(features, weights, biases, beta) -> outputs, see :func:`network`."""


def network(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], beta: float) -> Tensor:
    """The layers alone: encodings ``(S, W)`` to the last layer's outputs, the signed distance in column 0."""
    hidden = features
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        # Beyond the threshold softplus is linear; e^-40 is below float64's resolution. The second derivative
        # of logaddexp would be inf / inf in float32 from beta x = -88 on.
        linear = torch.nn.functional.linear(hidden, weight, bias)
        hidden = torch.nn.functional.softplus(linear, beta=beta, threshold=40.0)
    return torch.nn.functional.linear(hidden, weights[-1], biases[-1])


def first_output(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of a network that gives the signed distance and nothing else."""
    return [*weights[:-1], weights[-1][:1]], [*biases[:-1], biases[-1][:1]]


def sdf_with_gradient(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
    encode: Encode = hashgrid_reference.encode,
) -> tuple[Tensor, Tensor]:
    """See the package's ``sdf_with_gradient``."""
    with torch.enable_grad():
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        # Padding may hold anything: NaN times a gradient of zero would be NaN in the parameters' gradients.
        features = encode(zero_padding(positions, count), table, geometry, active_levels)
        outputs = torch.cat([network(features, weights, biases, beta), features], dim=1)
        sdf = outputs[:, 0]
        (gradient,) = torch.autograd.grad(sdf, positions, torch.ones_like(sdf), create_graph=True)
        outputs = zero_padding(outputs, count)
    if not torch.is_grad_enabled():
        return outputs.detach(), gradient.detach()
    return outputs, gradient


def sdf_only(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
    encode: Encode = hashgrid_reference.encode,
) -> Tensor:
    """See the package's ``sdf_only``."""
    with torch.no_grad():
        features = encode(zero_padding(positions, count), table, geometry, active_levels)
        return zero_padding(network(features, weights, biases, beta), count)[:, 0]


def sdf_outputs(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
    encode: Encode = hashgrid_reference.encode,
    network: Network = network,
) -> Tensor:
    """See the package's ``sdf_outputs``."""
    features = encode(zero_padding(positions, count), table, geometry, active_levels)
    return zero_padding(torch.cat([network(features, weights, biases, beta), features], dim=1), count)


def sdf_values(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
    count: Tensor | None = None,
    encode: Encode = hashgrid_reference.encode,
    network: Network = network,
) -> Tensor:
    """See the package's ``sdf_values``."""
    features = encode(zero_padding(positions, count), table, geometry, active_levels)
    sdf = network(features, *first_output(weights, biases), beta)
    return zero_padding(sdf, count)[:, 0]
