"""The hash grid on a GPU, outside of autograd: raw operations that launch the kernels of cuda_kernels.py."""

import triton
from jaxtyping import Float, Int64
from torch import Tensor
from triton.runtime import KernelInterface

from encoder.hashgrid.cuda_kernels import input_gradient_kernel, interpolate_kernel, table_gradient_kernel
from encoder.hashgrid.geometry import GridGeometry

BLOCK = 128
"""Samples per program: one per thread of four warps."""


def _readable(table: Tensor, geometry: GridGeometry) -> Tensor:
    return (table.half() if geometry.reads_half else table).contiguous()


def _launch(
    kernel: KernelInterface,
    positions: Tensor,
    inputs: tuple[Tensor | None, ...],
    result: Tensor,
    *,
    num_features: int,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    count: Tensor | None,
) -> Tensor:
    levels = geometry.on(positions.device)
    kernel[(triton.cdiv(len(positions), BLOCK),)](
        positions.contiguous(),
        *inputs,
        levels.cells,
        levels.offsets,
        levels.masks,
        geometry.level_weights_on(positions.device, active_levels),
        geometry.bound,
        count,
        len(positions),
        result,
        NUM_LEVELS=geometry.num_levels,
        NUM_FEATURES=num_features,
        PADDED_FEATURES=triton.next_power_of_2(num_features),
        BLOCK=BLOCK,
    )
    return result


def _interpolate(
    positions: Tensor,
    directions: Tensor | None,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    count: Tensor | None,
) -> Tensor:
    num_features = table.shape[1]
    return _launch(
        interpolate_kernel,
        positions,
        (directions, _readable(table, geometry)),
        positions.new_empty(len(positions), 3 + geometry.num_levels * num_features),
        num_features=num_features,
        geometry=geometry,
        active_levels=active_levels,
        count=count,
    )


def _differentiate(
    positions: Tensor,
    directions: Tensor | None,
    table: Tensor,
    cotangent: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    count: Tensor | None,
) -> Tensor:
    return _launch(
        input_gradient_kernel,
        positions,
        (directions, _readable(table, geometry), cotangent.contiguous()),
        positions.new_empty(len(positions), 3),
        num_features=table.shape[1],
        geometry=geometry,
        active_levels=active_levels,
        count=count,
    )


def features(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S W"]:
    """See the package's ``encode``; like all below outside of autograd."""
    return _interpolate(positions, None, table, geometry, active_levels, count)


def direction_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    direction: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S W"]:
    """``J direction`` for each sample."""
    return _interpolate(positions, direction.contiguous(), table, geometry, active_levels, count)


def input_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    cotangent: Float[Tensor, "S W"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S 3"]:
    """``J^T cotangent`` for each sample."""
    return _differentiate(positions, None, table, cotangent, geometry, active_levels, count)


def mixed_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    cotangent: Float[Tensor, "S W"],
    direction: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S 3"]:
    """``d <cotangent, J direction> / d position`` for each sample."""
    return _differentiate(positions, direction.contiguous(), table, cotangent, geometry, active_levels, count)


def table_gradient(
    positions: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    features_per_level: int,
    d_features: Float[Tensor, "S W"] | None,
    cotangent: Float[Tensor, "S W"] | None = None,
    direction: Float[Tensor, "S 3"] | None = None,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "entries F"]:
    """Table gradient of ``<d_features, features> + sum_s <cotangent_s, J_s direction_s>``, either or both."""
    given = (d_features, cotangent, direction)
    return _launch(
        table_gradient_kernel,
        positions,
        tuple(None if tensor is None else tensor.contiguous() for tensor in given),
        positions.new_zeros(geometry.num_entries, features_per_level),
        num_features=features_per_level,
        geometry=geometry,
        active_levels=active_levels,
        count=count,
    )
