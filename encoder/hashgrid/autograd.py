"""Derivatives of the hash grid up to the second, for every version that offers five raw operations.

Features are linear in the table t: W(x) t with interpolation weights W, and J = dW/dx t their Jacobian. What
a version offers is outside of autograd; the derivatives of the first three are again among the five:

    operation                              in x              in the table                in g
    features            W t                input_gradient    table_gradient
    input_gradient      n = J^T g          mixed_gradient    table_gradient of g, dn     direction_gradient
    table_gradient      W^T g              input_gradient                                features
    direction_gradient  J dn
    mixed_gradient      d <g, J dn> / dx

(g is a cotangent of the features, dn one of n.)
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from encoder.hashgrid.geometry import GridGeometry


@dataclass(frozen=True)
class Grid:
    """Everything that the operations take beside what they are differentiated in."""

    operations: ModuleType
    """The module that offers them."""
    geometry: GridGeometry
    active_levels: float | Tensor
    count: Tensor | None
    """Rows from here on are padding: their results are zero, and they give no gradient."""

    @property
    def arguments(self) -> tuple[GridGeometry, float | Tensor, Tensor | None]:
        """In the order of the operations' last parameters."""
        return self.geometry, self.active_levels, self.count

    def for_cotangents(self) -> "Grid":
        """The same, for a cotangent in the table's place: of that no half-precision copy may be read."""
        return replace(self, geometry=replace(self.geometry, reads_half=False))


class _Encode(torch.autograd.Function):
    """features = W(positions) table."""

    @staticmethod
    def forward(ctx: FunctionCtx, positions: Tensor, table: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(positions, table)
        ctx.grid = grid  # type: ignore[attr-defined]
        return grid.operations.features(positions, table, *grid.arguments)

    @staticmethod
    def backward(ctx, d_features):  # type: ignore[no-untyped-def]
        positions, table = ctx.saved_tensors
        d_positions = d_table = None
        if ctx.needs_input_grad[0]:
            d_positions = _InputGradient.apply(positions, table, d_features, ctx.grid)
        if ctx.needs_input_grad[1]:
            d_table = _TableGradient.apply(positions, d_features, table.shape[1], ctx.grid)
        return d_positions, d_table, None


class _InputGradient(torch.autograd.Function):
    """n = J(positions, table)^T cotangent; linear in the table and in the cotangent."""

    @staticmethod
    def forward(ctx: FunctionCtx, positions: Tensor, table: Tensor, cotangent: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(positions, table, cotangent)
        ctx.grid = grid  # type: ignore[attr-defined]
        return grid.operations.input_gradient(positions, table, cotangent, *grid.arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_gradient):  # type: ignore[no-untyped-def]
        positions, table, cotangent = ctx.saved_tensors
        grid: Grid = ctx.grid
        d_positions = d_table = d_cotangent = None
        if ctx.needs_input_grad[0]:
            d_positions = grid.operations.mixed_gradient(
                positions, table, cotangent, d_gradient, *grid.arguments
            )
        if ctx.needs_input_grad[1]:
            d_table = grid.operations.table_gradient(
                *(positions, grid.geometry, grid.active_levels, table.shape[1]),
                *(None, cotangent, d_gradient, grid.count),
            )
        if ctx.needs_input_grad[2]:
            d_cotangent = grid.operations.direction_gradient(positions, table, d_gradient, *grid.arguments)
        return d_positions, d_table, d_cotangent, None


class _TableGradient(torch.autograd.Function):
    """d_table = W(positions)^T d_features: the encoding transposed, whose derivative is the encoding."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, positions: Tensor, d_features: Tensor, features_per_level: int, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(positions, d_features)
        ctx.grid = grid  # type: ignore[attr-defined]
        return grid.operations.table_gradient(
            *(positions, grid.geometry, grid.active_levels, features_per_level),
            *(d_features, None, None, grid.count),
        )

    @staticmethod
    def backward(ctx, dd_table):  # type: ignore[no-untyped-def]
        positions, d_features = ctx.saved_tensors
        grid = ctx.grid.for_cotangents()
        d_positions = dd_features = None
        # The first three columns do not depend on the table.
        if ctx.needs_input_grad[0]:
            d_positions = _InputGradient.apply(positions, dd_table, _without_position(d_features), grid)
        if ctx.needs_input_grad[1]:
            dd_features = _without_position(_Encode.apply(positions, dd_table, grid))
        return d_positions, dd_features, None, None


def _without_position(features: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(features[:, :3]), features[:, 3:]], dim=1)


def encode(positions: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """See the package's ``encode``."""
    return _Encode.apply(positions, table, grid)
