"""Numba kernels of the multiresolution hash grid for the CPU.

Memory layout (row-major, float32):

    table     (entries, F)        levels one after another, see GridGeometry.offsets
    features  (S, W)              W = 3 + L * F: the position / bound, then each level's F features
    jacobian  (S, 3, W)           d features / d position; row d is contiguous, so contractions run over W

Both passes loop over levels outside and samples inside, so that one level's table stays in the second-level
cache while a block of samples reads it. In the table gradient each thread owns whole levels: no two threads
write to one entry, so there are no atomics and the sum is always taken in the same order (bit-reproducible).
"""

from typing import no_type_check

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from numba import njit, prange
from torch import Tensor

from encoder.hashgrid.geometry import PRIME_Y, PRIME_Z, GridGeometry

_BLOCK = 512
_PRIME_Y = np.uint32(PRIME_Y)
_PRIME_Z = np.uint32(PRIME_Z)
_NO_JACOBIAN = np.zeros((0, 3, 0), np.float32)
_NO_ROWS = np.zeros((0, 3), np.float32)


@no_type_check
@njit(inline="always")
def _locate(position, bound, cells):
    """Cell index, fraction inside the cell and d fraction / d position along one axis (0 outside the box)."""
    unit = (position / bound + np.float32(1.0)) * np.float32(0.5)
    slope = cells / (np.float32(2.0) * bound)
    if unit < np.float32(0.0) or unit > np.float32(1.0):
        unit = min(max(unit, np.float32(0.0)), np.float32(1.0))
        slope = np.float32(0.0)
    scaled = unit * cells
    # The lower bound is for NaN, which converts to a negative number: features are NaN then, memory is safe.
    cell = max(min(np.int32(scaled), np.int32(cells) - np.int32(1)), np.int32(0))
    return cell, scaled - np.float32(cell), slope


@no_type_check
@njit(inline="always")
def _corner_index(cx, cy, cz, vertices, dense, mask):
    """Entry of a grid vertex within its level: row-major when the level is dense, else the spatial hash."""
    if dense:
        return (np.int64(cz) * vertices + np.int64(cy)) * vertices + np.int64(cx)
    return np.int64(
        (np.uint32(cx) ^ (np.uint32(cy) * _PRIME_Y) ^ (np.uint32(cz) * _PRIME_Z)) & np.uint32(mask)
    )


@no_type_check
@njit(parallel=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy", cache=True)
def encode_kernel(positions, table, cells, offsets, masks, level_weights, bound, features, jacobian):
    """Fill all of ``features`` and, unless it has no rows, of ``jacobian``; both may come uninitialised.

    ``cells`` (L) cells per axis; ``offsets`` (L) first entry; ``masks`` (L) table size - 1, or 0 for a dense
    level; ``level_weights`` (L) in [0, 1] (coarse-to-fine).
    """
    num_samples = positions.shape[0]
    num_features = table.shape[1]
    with_jacobian = jacobian.shape[0] > 0
    for block in prange((num_samples + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, num_samples)
        for s in range(first, last):
            for d in range(3):
                features[s, d] = positions[s, d] / bound
                if with_jacobian:
                    for e in range(3):
                        jacobian[s, d, e] = np.float32(1.0) / bound if d == e else np.float32(0.0)
        for level in range(cells.shape[0]):
            level_weight = level_weights[level]
            column = 3 + level * num_features
            if level_weight == np.float32(0.0):
                features[first:last, column : column + num_features] = np.float32(0.0)
                if with_jacobian:
                    jacobian[first:last, :, column : column + num_features] = np.float32(0.0)
                continue
            n = np.float32(cells[level])
            vertices = np.int64(cells[level] + 1)
            offset = offsets[level]
            mask = masks[level]
            dense = mask == 0
            for s in range(first, last):
                cx, fx, sx = _locate(positions[s, 0], bound, n)
                cy, fy, sy = _locate(positions[s, 1], bound, n)
                cz, fz, sz = _locate(positions[s, 2], bound, n)
                gx = np.float32(1.0) - fx
                gy = np.float32(1.0) - fy
                gz = np.float32(1.0) - fz
                e000 = offset + _corner_index(cx, cy, cz, vertices, dense, mask)
                e100 = offset + _corner_index(cx + 1, cy, cz, vertices, dense, mask)
                e010 = offset + _corner_index(cx, cy + 1, cz, vertices, dense, mask)
                e110 = offset + _corner_index(cx + 1, cy + 1, cz, vertices, dense, mask)
                e001 = offset + _corner_index(cx, cy, cz + 1, vertices, dense, mask)
                e101 = offset + _corner_index(cx + 1, cy, cz + 1, vertices, dense, mask)
                e011 = offset + _corner_index(cx, cy + 1, cz + 1, vertices, dense, mask)
                e111 = offset + _corner_index(cx + 1, cy + 1, cz + 1, vertices, dense, mask)
                for f in range(num_features):
                    v000 = table[e000, f]
                    v100 = table[e100, f]
                    v010 = table[e010, f]
                    v110 = table[e110, f]
                    v001 = table[e001, f]
                    v101 = table[e101, f]
                    v011 = table[e011, f]
                    v111 = table[e111, f]
                    # Interpolate along x, then y, then z; the differences along the way are the derivatives.
                    x00 = gx * v000 + fx * v100
                    x10 = gx * v010 + fx * v110
                    x01 = gx * v001 + fx * v101
                    x11 = gx * v011 + fx * v111
                    y0 = gy * x00 + fy * x10
                    y1 = gy * x01 + fy * x11
                    features[s, column + f] = level_weight * (gz * y0 + fz * y1)
                    if with_jacobian:
                        d0 = gy * (v100 - v000) + fy * (v110 - v010)
                        d1 = gy * (v101 - v001) + fy * (v111 - v011)
                        jacobian[s, 0, column + f] = level_weight * sx * (gz * d0 + fz * d1)
                        jacobian[s, 1, column + f] = level_weight * sy * (gz * (x10 - x00) + fz * (x11 - x01))
                        jacobian[s, 2, column + f] = level_weight * sz * (y1 - y0)


@no_type_check
@njit(parallel=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy", cache=True)
def table_gradient_kernel(
    positions, cells, offsets, masks, level_weights, bound, d_features, cotangent, direction, d_table
):
    """Add to ``d_table`` the gradient of ``<d_features, features> + sum_s <cotangent_s, J_s direction_s>``.

    The second term is what a loss on the field's gradient asks for: with n = J^T g the field's gradient
    (g the cotangent of the features) and dn its upstream gradient, the table receives
    g_k * (d w_corner / d position . dn). It is left out when ``direction`` has no rows. ``d_features`` and
    ``cotangent`` are ``(S, W)``, ``direction`` is ``(S, 3)``.
    """
    num_samples = positions.shape[0]
    num_features = d_table.shape[1]
    second_order = direction.shape[0] > 0
    for level in prange(cells.shape[0]):
        level_weight = level_weights[level]
        if level_weight == np.float32(0.0):
            continue
        n = np.float32(cells[level])
        vertices = np.int64(cells[level] + 1)
        offset = offsets[level]
        mask = masks[level]
        dense = mask == 0
        column = 3 + level * num_features
        for s in range(num_samples):
            cx, fx, sx = _locate(positions[s, 0], bound, n)
            cy, fy, sy = _locate(positions[s, 1], bound, n)
            cz, fz, sz = _locate(positions[s, 2], bound, n)
            tx = np.float32(0.0)
            ty = np.float32(0.0)
            tz = np.float32(0.0)
            if second_order:
                tx = sx * direction[s, 0]
                ty = sy * direction[s, 1]
                tz = sz * direction[s, 2]
            for corner in range(8):
                ix = corner & 1
                iy = (corner >> 1) & 1
                iz = corner >> 2
                wx = fx if ix else np.float32(1.0) - fx
                wy = fy if iy else np.float32(1.0) - fy
                wz = fz if iz else np.float32(1.0) - fz
                weight = level_weight * wx * wy * wz
                # The corner weight's derivative along `direction`.
                slope = level_weight * (
                    (tx if ix else -tx) * wy * wz
                    + (ty if iy else -ty) * wx * wz
                    + (tz if iz else -tz) * wx * wy
                )
                entry = offset + _corner_index(cx + ix, cy + iy, cz + iz, vertices, dense, mask)
                for f in range(num_features):
                    value = weight * d_features[s, column + f]
                    if second_order:
                        value += slope * cotangent[s, column + f]
                    d_table[entry, f] += value


@no_type_check
@njit(parallel=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy", cache=True)
def mixed_gradient_kernel(
    positions, table, cells, offsets, masks, level_weights, bound, cotangent, direction, gradient
):
    """Add d <cotangent, J direction> / d position to ``gradient``, which comes as zeros.

    A trilinear function v has no second derivative along one axis; along two, say x and y, it is what
    v110 - v100 - v010 + v000 and the same on the far side interpolate to.
    """
    num_samples = positions.shape[0]
    num_features = table.shape[1]
    for block in prange((num_samples + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, num_samples)
        for level in range(cells.shape[0]):
            level_weight = level_weights[level]
            if level_weight == np.float32(0.0):
                continue
            column = 3 + level * num_features
            n = np.float32(cells[level])
            vertices = np.int64(cells[level] + 1)
            offset = offsets[level]
            mask = masks[level]
            dense = mask == 0
            for s in range(first, last):
                cx, fx, sx = _locate(positions[s, 0], bound, n)
                cy, fy, sy = _locate(positions[s, 1], bound, n)
                cz, fz, sz = _locate(positions[s, 2], bound, n)
                xy_near, xy_far = np.float32(0.0), np.float32(0.0)
                xz_near, xz_far = np.float32(0.0), np.float32(0.0)
                yz_near, yz_far = np.float32(0.0), np.float32(0.0)
                for corner in range(8):
                    ix, iy, iz = corner & 1, (corner >> 1) & 1, corner >> 2
                    entry = offset + _corner_index(cx + ix, cy + iy, cz + iz, vertices, dense, mask)
                    v = np.float32(0.0)
                    for f in range(num_features):
                        v += cotangent[s, column + f] * table[entry, f]
                    xy = v if ix == iy else -v
                    xz = v if ix == iz else -v
                    yz = v if iy == iz else -v
                    if iz == 0:
                        xy_near += xy
                    else:
                        xy_far += xy
                    if iy == 0:
                        xz_near += xz
                    else:
                        xz_far += xz
                    if ix == 0:
                        yz_near += yz
                    else:
                        yz_far += yz
                dxy = level_weight * sx * sy * ((np.float32(1.0) - fz) * xy_near + fz * xy_far)
                dxz = level_weight * sx * sz * ((np.float32(1.0) - fy) * xz_near + fy * xz_far)
                dyz = level_weight * sy * sz * ((np.float32(1.0) - fx) * yz_near + fx * yz_far)
                gradient[s, 0] += dxy * direction[s, 1] + dxz * direction[s, 2]
                gradient[s, 1] += dxy * direction[s, 0] + dyz * direction[s, 2]
                gradient[s, 2] += dxz * direction[s, 0] + dyz * direction[s, 1]


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().contiguous().numpy()


def _real_rows(positions: Tensor, count: Tensor | None) -> npt.NDArray[np.float32]:
    """Positions without their padding; the kernels stop where these end."""
    return _array(positions if count is None else positions[: int(count)])


def _run_encode(
    positions: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    active_levels: float | Tensor,
    count: Tensor | None,
    jacobian: npt.NDArray[np.float32],
) -> Tensor:
    width = 3 + geometry.num_levels * table.shape[1]
    allocate = torch.empty if count is None else torch.zeros
    features = allocate(len(positions), width)
    encode_kernel(
        _real_rows(positions, count),
        _array(table),
        geometry.cells,
        geometry.offsets,
        geometry.masks,
        geometry.level_weights(float(active_levels)),
        np.float32(geometry.bound),
        features.numpy(),
        jacobian,
    )
    return features


def features(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S W"]:
    """See the package's ``encode``; like all below outside of autograd."""
    return _run_encode(positions, table, geometry, active_levels, count, _NO_JACOBIAN)


def features_and_jacobian(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "S W"], Float[Tensor, "S 3 W"]]:
    """Encode together with d features / d position.

    For fused operations that write their own backward pass; its other half is :func:`table_gradient`.
    """
    allocate = torch.empty if count is None else torch.zeros
    jacobian = allocate(len(positions), 3, 3 + geometry.num_levels * table.shape[1])
    encoded = _run_encode(positions, table, geometry, active_levels, count, jacobian.numpy())
    return encoded, jacobian


def input_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    cotangent: Float[Tensor, "S W"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S 3"]:
    """``J^T cotangent`` for each sample."""
    _, jacobian = features_and_jacobian(positions, table, geometry, active_levels, count)
    return torch.bmm(jacobian, cotangent[:, :, None]).squeeze(2)


def direction_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    direction: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S W"]:
    """``J direction`` for each sample."""
    _, jacobian = features_and_jacobian(positions, table, geometry, active_levels, count)
    return torch.bmm(direction[:, None, :], jacobian).squeeze(1)


def mixed_gradient(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    cotangent: Float[Tensor, "S W"],
    direction: Float[Tensor, "S 3"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S 3"]:
    """``d <cotangent, J direction> / d position`` for each sample; only refined cameras ask for it."""
    gradient = torch.zeros(len(positions), 3)
    mixed_gradient_kernel(
        _real_rows(positions, count),
        _array(table),
        geometry.cells,
        geometry.offsets,
        geometry.masks,
        geometry.level_weights(float(active_levels)),
        np.float32(geometry.bound),
        _array(cotangent),
        _array(direction),
        gradient.numpy(),
    )
    return gradient


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
    width = 3 + geometry.num_levels * features_per_level
    d_table = torch.zeros(geometry.num_entries, features_per_level)
    table_gradient_kernel(
        _real_rows(positions, count),
        geometry.cells,
        geometry.offsets,
        geometry.masks,
        geometry.level_weights(float(active_levels)),
        np.float32(geometry.bound),
        np.zeros((len(positions), width), np.float32) if d_features is None else _array(d_features),
        _NO_ROWS if cotangent is None else _array(cotangent),
        _NO_ROWS if direction is None else _array(direction),
        d_table.numpy(),
    )
    return d_table
