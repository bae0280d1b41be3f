"""Multiresolution hash grid (Müller et al. 2022, "Instant Neural Graphics Primitives"), in several versions.

``reference.py`` is plain PyTorch, ``cpu.py`` Numba, ``cuda.py`` the place of the Triton kernels. A row of the
encoding is the position divided by the grid's bound (3 numbers), then each level's F interpolated features.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from encoder.hashgrid import cpu, cuda, reference
from encoder.hashgrid.geometry import GridGeometry, HashGridConfig
from utils.backend import available_anywhere, available_on_cpu

__all__ = [
    "IMPLEMENTATIONS",
    "GridGeometry",
    "HashGrid",
    "HashGridConfig",
    "encode",
    "features_and_jacobian",
    "table_gradient",
]

_NO_JACOBIAN = np.zeros((0, 3, 0), np.float32)
_NO_ROWS = np.zeros((0, 3), np.float32)


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().contiguous().numpy()


def _run_encode(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float,
    jacobian: npt.NDArray[np.float32],
) -> Tensor:
    width = 3 + geometry.num_levels * table.shape[1]
    features = torch.empty(len(positions), width)
    cpu.encode_kernel(
        _array(positions),
        _array(table),
        geometry.cells,
        geometry.offsets,
        geometry.masks,
        geometry.level_weights(active_levels),
        np.float32(geometry.bound),
        features.numpy(),
        jacobian,
    )
    return features


def features_and_jacobian(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float,
) -> tuple[Float[Tensor, "S W"], Float[Tensor, "S 3 W"]]:
    """Encode on the CPU together with d features / d position, outside of autograd.

    For fused operations that write their own backward pass; its other half is :func:`table_gradient`.
    """
    jacobian = torch.empty(len(positions), 3, 3 + geometry.num_levels * table.shape[1])
    features = _run_encode(positions, table, geometry, active_levels, jacobian.numpy())
    return features, jacobian


def table_gradient(
    positions: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float,
    features_per_level: int,
    d_features: Float[Tensor, "S W"],
    cotangent: Float[Tensor, "S W"] | None = None,
    direction: Float[Tensor, "S 3"] | None = None,
) -> Float[Tensor, "entries F"]:
    """Table gradient of ``<d_features, features> + sum_s <cotangent_s, J_s direction_s>`` (CPU)."""
    d_table = torch.zeros(geometry.num_entries, features_per_level)
    cpu.table_gradient_kernel(
        _array(positions),
        geometry.cells,
        geometry.offsets,
        geometry.masks,
        geometry.level_weights(active_levels),
        np.float32(geometry.bound),
        _array(d_features),
        _NO_ROWS if cotangent is None else _array(cotangent),
        _NO_ROWS if direction is None else _array(direction),
        d_table.numpy(),
    )
    return d_table


class _Encode(torch.autograd.Function):
    """features = W(positions) table."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, positions: Tensor, table: Tensor, geometry: GridGeometry, active_levels: float
    ) -> Tensor:
        ctx.save_for_backward(positions, table)
        ctx.geometry, ctx.active_levels = geometry, active_levels  # type: ignore[attr-defined]
        return _run_encode(positions, table, geometry, active_levels, _NO_JACOBIAN)

    @staticmethod
    def backward(ctx, d_features):  # type: ignore[no-untyped-def]
        positions, table = ctx.saved_tensors
        grid = ctx.geometry, ctx.active_levels
        d_positions = d_table = None
        if ctx.needs_input_grad[0]:
            d_positions = _InputGradient.apply(positions, table, d_features, *grid)
        if ctx.needs_input_grad[1]:
            d_table = _TableGradient.apply(positions, d_features, table.shape[1], *grid)
        return d_positions, d_table, None, None


class _InputGradient(torch.autograd.Function):
    """n = J(positions, table)^T cotangent; linear in the table and in the cotangent."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        positions: Tensor,
        table: Tensor,
        cotangent: Tensor,
        geometry: GridGeometry,
        active_levels: float,
    ) -> Tensor:
        _, jacobian = features_and_jacobian(positions, table, geometry, active_levels)
        ctx.save_for_backward(positions, table, cotangent, jacobian)
        ctx.geometry, ctx.active_levels = geometry, active_levels  # type: ignore[attr-defined]
        return torch.bmm(jacobian, cotangent[:, :, None]).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_gradient):  # type: ignore[no-untyped-def]
        positions, table, cotangent, jacobian = ctx.saved_tensors
        d_positions = d_table = None
        if ctx.needs_input_grad[0]:
            # The mixed second derivatives of the trilinear weights. Training never asks for them
            # (positions are data), so the reference serves.
            with torch.enable_grad():
                point = positions.detach().requires_grad_()
                features = reference.encode(point, table.detach(), ctx.geometry, ctx.active_levels)
                (gradient,) = torch.autograd.grad(features, point, cotangent, create_graph=True)
            (d_positions,) = torch.autograd.grad(gradient, point, d_gradient)
        if ctx.needs_input_grad[1]:
            d_table = table_gradient(
                positions,
                ctx.geometry,
                ctx.active_levels,
                table.shape[1],
                torch.zeros_like(cotangent),
                cotangent,
                d_gradient,
            )
        d_cotangent = torch.bmm(d_gradient[:, None, :], jacobian).squeeze(1)
        return d_positions, d_table, d_cotangent, None, None


class _TableGradient(torch.autograd.Function):
    """d_table = W(positions)^T d_features: the encoding transposed, whose derivative is the encoding."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        positions: Tensor,
        d_features: Tensor,
        features_per_level: int,
        geometry: GridGeometry,
        active_levels: float,
    ) -> Tensor:
        ctx.save_for_backward(positions, d_features)
        ctx.geometry, ctx.active_levels = geometry, active_levels  # type: ignore[attr-defined]
        return table_gradient(positions, geometry, active_levels, features_per_level, d_features)

    @staticmethod
    def backward(ctx, dd_table):  # type: ignore[no-untyped-def]
        positions, d_features = ctx.saved_tensors
        grid = ctx.geometry, ctx.active_levels
        d_positions = None
        # The first three columns do not depend on the table.
        if ctx.needs_input_grad[0]:
            cotangent = torch.cat([torch.zeros_like(d_features[:, :3]), d_features[:, 3:]], dim=1)
            d_positions = _InputGradient.apply(positions, dd_table, cotangent, *grid)
        encoded = _Encode.apply(positions, dd_table, *grid)
        d_features = torch.cat([torch.zeros_like(encoded[:, :3]), encoded[:, 3:]], dim=1)
        return d_positions, d_features, None, None, None


def _encode_cpu(positions: Tensor, table: Tensor, geometry: GridGeometry, active_levels: float) -> Tensor:
    return _Encode.apply(positions, table, geometry, active_levels)


IMPLEMENTATIONS = {"cuda": cuda.available, "cpu": available_on_cpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""

_ENCODE = {"cpu": _encode_cpu, "reference": reference.encode}


def encode(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float,
    backend: str,
) -> Float[Tensor, "S W"]:
    """Encode positions; differentiable twice with respect to positions and table.

    Args:
        positions: in ``[-geometry.bound, geometry.bound]``; outside, features are those of the
            nearest face and their derivative is zero.
        table: all levels' entries. The CPU version takes float32 only.
        active_levels: how many levels are open (coarse to fine), 0..L; a fractional part fades
            the next one in; closed levels give zeros.
        backend: a key of :data:`IMPLEMENTATIONS`.

    Returns:
        ``(S, 3 + L * F)``: position / bound, then level 0's features, level 1's, ...

    Raises:
        ValueError: for an unknown backend, or a table that does not fit the geometry.

    Source: Müller et al. 2022, equations 1-4; coarse to fine: Neuralangelo (Li et al. 2023, section 3.3).
    """
    if backend not in _ENCODE:
        raise ValueError(f"hash grid: backend must be one of {sorted(_ENCODE)}, got {backend!r}")
    if len(table) != geometry.num_entries:
        raise ValueError(f"hash grid: table must have {geometry.num_entries} rows, got {len(table)}")
    return _ENCODE[backend](positions, table, geometry, active_levels)


class HashGrid(nn.Module):
    """A hash grid's trainable table together with its geometry and backend."""

    def __init__(self, config: HashGridConfig, bound: float, backend: str) -> None:
        super().__init__()
        self.geometry = GridGeometry.from_config(config, bound)
        self.backend = backend
        # U(-1e-4, 1e-4): small enough for the sphere initialisation to hold, not zero, so that levels can
        # come to differ.
        table = torch.empty(self.geometry.num_entries, config.features_per_level).uniform_(-1e-4, 1e-4)
        self.table = nn.Parameter(table)
        self.width = 3 + config.num_levels * config.features_per_level

    @property
    def num_levels(self) -> int:
        """L, coarse and fine together."""
        return self.geometry.num_levels

    def forward(self, positions: Float[Tensor, "S 3"], active_levels: float) -> Float[Tensor, "S W"]:
        """See :func:`encode`."""
        return encode(positions, self.table, self.geometry, active_levels, self.backend)
