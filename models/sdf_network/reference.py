"""The SDF network in plain PyTorch, autograd twice: what the fast version is tested on; never optimised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from encoder.hashgrid import GridGeometry
from encoder.hashgrid import reference as hashgrid_reference


def _network(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], beta: float) -> Tensor:
    hidden = features
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        # Beyond the threshold softplus is linear; e^-40 is below float64's resolution. The second derivative
        # of logaddexp would be inf / inf in float32 from beta x = -88 on.
        linear = torch.nn.functional.linear(hidden, weight, bias)
        hidden = torch.nn.functional.softplus(linear, beta=beta, threshold=40.0)
    return torch.nn.functional.linear(hidden, weights[-1], biases[-1])


def sdf_with_gradient(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """See the package's ``sdf_with_gradient``."""
    with torch.enable_grad():
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        features = hashgrid_reference.encode(positions, table, geometry, active_levels)
        outputs = torch.cat([_network(features, weights, biases, beta), features], dim=1)
        sdf = outputs[:, 0]
        (gradient,) = torch.autograd.grad(sdf, positions, torch.ones_like(sdf), create_graph=True)
    if not torch.is_grad_enabled():
        return outputs.detach(), gradient.detach()
    return outputs, gradient


def sdf_only(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    beta: float,
) -> Tensor:
    """See the package's ``sdf_only``."""
    with torch.no_grad():
        features = hashgrid_reference.encode(positions, table, geometry, active_levels)
        return _network(features, weights, biases, beta)[:, 0]
