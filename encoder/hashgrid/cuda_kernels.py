"""Triton kernels of the multiresolution hash grid.

Memory layout (row-major):

    table                           (entries, F)   float32 or float16: levels one after another
    features, cotangent, products   (S, W)         float32: W = 3 + L * F, the position, then the levels
    positions, directions           (S, 3)         float32

One program owns a block of samples, one a thread, and walks it through the levels, coarse to fine. Programs
run more or less in step, so that they read the same level at a time and the second-level cache holds it; the
block's rows of W numbers, of which a level touches 4 F bytes, stay in the first-level cache meanwhile. A
sample's 8 vertices are read with 8 independent loads of F numbers each. The table's gradient is summed with
float32 atomics, in no particular order: its last bits differ from run to run.

Closed levels and padding (rows from ``count`` on) are not looked up; zeros are written there.
"""

from typing import no_type_check

import triton
import triton.language as tl

from encoder.hashgrid.cuda_cells import corner_row, locate


@no_type_check
@triton.jit
def _num_real(count, num_samples):
    """Rows that are not padding."""
    return num_samples if count is None else tl.minimum(tl.load(count), num_samples)


@no_type_check
@triton.jit
def _load_vectors(vectors, first, rows, is_real):
    """Coordinates of a block of rows of an (S, 3) matrix, zero where there is padding."""
    address = vectors + first * 3 + rows * 3
    x = tl.load(address, mask=is_real, other=0.0)
    y = tl.load(address + 1, mask=is_real, other=0.0)
    z = tl.load(address + 2, mask=is_real, other=0.0)
    return x, y, z


@no_type_check
@triton.jit
def _store_vectors(vectors, stride: tl.constexpr, first, rows, is_row, x, y, z):
    """Write a block of rows' first three columns."""
    address = vectors + first * stride + rows * stride
    tl.store(address, x, mask=is_row)
    tl.store(address + 1, y, mask=is_row)
    tl.store(address + 2, z, mask=is_row)


@no_type_check
@triton.jit
def _factors(corner: tl.constexpr, fx, fy, fz):
    """The three factors of a corner's trilinear weight; bits 0, 1, 2 of ``corner`` are its x, y, z."""
    wx = fx if corner & 1 else 1.0 - fx
    wy = fy if corner & 2 else 1.0 - fy
    wz = fz if corner & 4 else 1.0 - fz
    return wx, wy, wz


@no_type_check
@triton.jit
def _slopes(corner: tl.constexpr, wx, wy, wz, tx, ty, tz):
    """A corner weight's derivatives along the axes, each times a number: t_x dw/dx, t_y dw/dy, t_z dw/dz."""
    x = (tx if corner & 1 else -tx) * (wy * wz)
    y = (ty if corner & 2 else -ty) * (wx * wz)
    z = (tz if corner & 4 else -tz) * (wx * wy)
    return x, y, z


@no_type_check
@triton.jit
def _mixed_slopes(corner: tl.constexpr, wx, wy, wz, sx, sy, sz, dx, dy, dz):
    """Derivatives along the axes of a corner weight's slope along (dx, dy, dz)."""
    ax = sx if corner & 1 else -sx
    ay = sy if corner & 2 else -sy
    az = sz if corner & 4 else -sz
    xy, xz, yz = ax * ay * wz, ax * az * wy, ay * az * wx
    return xy * dy + xz * dz, xy * dx + yz * dz, xz * dx + yz * dy


@no_type_check
@triton.jit
def _entries(corner: tl.constexpr, cx, cy, cz, cells, offset, mask, num_features: tl.constexpr, feature):
    """Where in the table a corner's features lie, ``(BLOCK, F)``.

    The row is 64 bits wide and so are the products: tables of the largest configs have 2^32 numbers.
    """
    row = corner_row(cx + (corner & 1), cy + ((corner >> 1) & 1), cz + (corner >> 2), cells, offset, mask)
    return row[:, None] * num_features + feature[None, :]


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def interpolate_kernel(
    positions,
    directions,
    table,
    cells,
    offsets,
    masks,
    level_weights,
    bound,
    count,
    num_samples,
    result,
    NUM_LEVELS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    PADDED_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Features, or with ``directions`` their derivative J d along those; either is a sum over 8 corners."""
    WIDTH: tl.constexpr = 3 + NUM_LEVELS * NUM_FEATURES
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    feature = tl.arange(0, PADDED_FEATURES)
    num_real = _num_real(count, num_samples)
    is_row = first + rows < num_samples
    is_real = first + rows < num_real
    is_feature = (feature < NUM_FEATURES)[None, :]
    x, y, z = _load_vectors(positions, first, rows, is_real)
    if directions is None:
        _store_vectors(result, WIDTH, first, rows, is_row, x / bound, y / bound, z / bound)
    else:
        dx, dy, dz = _load_vectors(directions, first, rows, is_real)
        _store_vectors(result, WIDTH, first, rows, is_row, dx / bound, dy / bound, dz / bound)
    address = result + first * WIDTH + 3 + rows[:, None] * WIDTH + feature[None, :]

    for level in range(NUM_LEVELS):
        level_weight = tl.load(level_weights + level)
        total = tl.zeros([BLOCK, PADDED_FEATURES], tl.float32)
        if (level_weight != 0.0) & (first < num_real):
            n, offset, mask = tl.load(cells + level), tl.load(offsets + level), tl.load(masks + level)
            cx, fx, sx = locate(x, bound, n)
            cy, fy, sy = locate(y, bound, n)
            cz, fz, sz = locate(z, bound, n)
            for corner in tl.static_range(8):
                wx, wy, wz = _factors(corner, fx, fy, fz)
                if directions is None:
                    weight = wx * wy * wz
                else:
                    ex, ey, ez = _slopes(corner, wx, wy, wz, sx * dx, sy * dy, sz * dz)
                    weight = ex + ey + ez
                index = _entries(corner, cx, cy, cz, n, offset, mask, NUM_FEATURES, feature)
                value = tl.load(table + index, mask=is_real[:, None] & is_feature, other=0.0).to(tl.float32)
                total += (level_weight * weight)[:, None] * value
        tl.store(address + level * NUM_FEATURES, total, mask=is_row[:, None] & is_feature)


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def input_gradient_kernel(
    positions,
    directions,
    table,
    cotangent,
    cells,
    offsets,
    masks,
    level_weights,
    bound,
    count,
    num_samples,
    gradient,
    NUM_LEVELS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    PADDED_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """n = J^T g: over levels and corners, the derivatives of the corner's weight times <entry, g>.

    With ``directions``, the derivatives of <g, J direction> instead, those of the weight's slope along the
    direction. A weight is linear along each axis: only its mixed second derivatives are not zero.
    """
    WIDTH: tl.constexpr = 3 + NUM_LEVELS * NUM_FEATURES
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    feature = tl.arange(0, PADDED_FEATURES)
    num_real = _num_real(count, num_samples)
    is_row = first + rows < num_samples
    is_real = first + rows < num_real
    is_entry = is_real[:, None] & (feature < NUM_FEATURES)[None, :]
    x, y, z = _load_vectors(positions, first, rows, is_real)
    row_address = cotangent + first * WIDTH + rows * WIDTH
    if directions is None:
        gx = tl.load(row_address, mask=is_real, other=0.0) / bound
        gy = tl.load(row_address + 1, mask=is_real, other=0.0) / bound
        gz = tl.load(row_address + 2, mask=is_real, other=0.0) / bound
    else:
        dx, dy, dz = _load_vectors(directions, first, rows, is_real)
        gx = tl.zeros([BLOCK], tl.float32)
        gy = tl.zeros([BLOCK], tl.float32)
        gz = tl.zeros([BLOCK], tl.float32)
    address = row_address[:, None] + 3 + feature[None, :]

    for level in range(NUM_LEVELS):
        level_weight = tl.load(level_weights + level)
        if (level_weight != 0.0) & (first < num_real):
            n, offset, mask = tl.load(cells + level), tl.load(offsets + level), tl.load(masks + level)
            cx, fx, sx = locate(x, bound, n)
            cy, fy, sy = locate(y, bound, n)
            cz, fz, sz = locate(z, bound, n)
            g = level_weight * tl.load(address + level * NUM_FEATURES, mask=is_entry, other=0.0)
            for corner in tl.static_range(8):
                wx, wy, wz = _factors(corner, fx, fy, fz)
                if directions is None:
                    ex, ey, ez = _slopes(corner, wx, wy, wz, sx, sy, sz)
                else:
                    ex, ey, ez = _mixed_slopes(corner, wx, wy, wz, sx, sy, sz, dx, dy, dz)
                index = _entries(corner, cx, cy, cz, n, offset, mask, NUM_FEATURES, feature)
                value = tl.load(table + index, mask=is_entry, other=0.0).to(tl.float32)
                product = tl.sum(value * g, axis=1)
                gx += ex * product
                gy += ey * product
                gz += ez * product
    _store_vectors(gradient, 3, first, rows, is_row, gx, gy, gz)


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def table_gradient_kernel(
    positions,
    d_features,
    cotangent,
    directions,
    cells,
    offsets,
    masks,
    level_weights,
    bound,
    count,
    num_samples,
    d_table,
    NUM_LEVELS: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    PADDED_FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the gradient of <d_features, features> + sum_s <cotangent_s, J_s direction_s> to ``d_table``.

    A corner's entry receives w d_features + (dw/dx . direction) cotangent; either term may be left out.
    """
    WIDTH: tl.constexpr = 3 + NUM_LEVELS * NUM_FEATURES
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    feature = tl.arange(0, PADDED_FEATURES)
    num_real = _num_real(count, num_samples)
    is_real = first + rows < num_real
    is_entry = is_real[:, None] & (feature < NUM_FEATURES)[None, :]
    x, y, z = _load_vectors(positions, first, rows, is_real)
    if cotangent is not None:
        dx, dy, dz = _load_vectors(directions, first, rows, is_real)
    address = first * WIDTH + 3 + rows[:, None] * WIDTH + feature[None, :]

    for level in range(NUM_LEVELS):
        level_weight = tl.load(level_weights + level)
        if (level_weight != 0.0) & (first < num_real):
            n, offset, mask = tl.load(cells + level), tl.load(offsets + level), tl.load(masks + level)
            cx, fx, sx = locate(x, bound, n)
            cy, fy, sy = locate(y, bound, n)
            cz, fz, sz = locate(z, bound, n)
            column = address + level * NUM_FEATURES
            if d_features is not None:
                d = level_weight * tl.load(d_features + column, mask=is_entry, other=0.0)
            if cotangent is not None:
                g = level_weight * tl.load(cotangent + column, mask=is_entry, other=0.0)
            for corner in tl.static_range(8):
                wx, wy, wz = _factors(corner, fx, fy, fz)
                value = tl.zeros([BLOCK, PADDED_FEATURES], tl.float32)
                if d_features is not None:
                    value += (wx * wy * wz)[:, None] * d
                if cotangent is not None:
                    ex, ey, ez = _slopes(corner, wx, wy, wz, sx * dx, sy * dy, sz * dz)
                    value += (ex + ey + ez)[:, None] * g
                index = _entries(corner, cx, cy, cz, n, offset, mask, NUM_FEATURES, feature)
                tl.atomic_add(d_table + index, value, mask=is_entry, sem="relaxed")
