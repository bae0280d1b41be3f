"""Triton kernels of the SDF network: hash grid, layers and both sweeps in one kernel per direction.

A program takes a block of samples through everything; the formulas are those of ``cpu.py``. A sample is a
column, so that a weight matrix multiplies from the left as it lies in memory: ::

    x   (K, BLOCK)       the grid's features, K = LEVELS_PADDED * FEATURES_PADDED, levels one after another
    e   (16, BLOCK)      position / bound in rows 0..2, ones in row 3, zeros
    z_1 = W_1[:, 3:] x + [W_1[:, :3] | b_1] e

The bias thus is one more column of W_1, in the gradients as well. While features are gathered they are
blocks ``(LEVELS_PADDED, BLOCK, FEATURES_PADDED)``: a thread reads a vertex's features at once, and
neighbouring threads read what neighbouring samples need of the same level, which mostly are the same lines of
memory. Matrix products keep float32's precision (three TF32 products each), because beta = 100 magnifies what
they lose. Padded units, features and outputs have weights of zero, so that they reach nothing.
"""

from typing import no_type_check

import triton
import triton.language as tl

from encoder.hashgrid.cuda_cells import corner_row, locate

_EXTRA = tl.constexpr(16)
"""Rows of e: the least side of a matrix in ``tl.dot``."""


# ---- matrices --------------------------------------------------------------------------------------------


@no_type_check
@triton.jit
def _dot(a, b, total=None):
    return tl.dot(a, b, total, input_precision="tf32x3")


@no_type_check
@triton.jit
def _read(matrix, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix ``(HEIGHT, WIDTH)``, padded with zeros to ``(ROWS, COLUMNS)``."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(matrix + row * WIDTH + column, mask=(row < HEIGHT) & (column < WIDTH), other=0.0)


@no_type_check
@triton.jit
def _feature_columns(
    LEVELS: tl.constexpr, FEATURES: tl.constexpr, LEVELS_PADDED: tl.constexpr, FEATURES_PADDED: tl.constexpr
):
    """Which column of the encoding each row of x is, and whether it is one."""
    k = tl.arange(0, LEVELS_PADDED * FEATURES_PADDED)
    if FEATURES == FEATURES_PADDED:
        column = 3 + k  # plainly consecutive, so that several are read at once
    else:
        column = 3 + (k // FEATURES_PADDED) * FEATURES + k % FEATURES_PADDED
    return column, (k // FEATURES_PADDED < LEVELS) & (k % FEATURES_PADDED < FEATURES)


@no_type_check
@triton.jit
def _read_first_layer(
    weight,
    bias,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LEVELS_PADDED: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
):
    """W_1[:, 3:] and [W_1[:, :3] | b_1], padded."""
    unit = tl.arange(0, HIDDEN_PADDED)[:, None]
    column, is_column = _feature_columns(LEVELS, FEATURES, LEVELS_PADDED, FEATURES_PADDED)
    extra = tl.arange(0, _EXTRA)[None, :]
    row = weight + unit * (3 + LEVELS * FEATURES)
    main = tl.load(row + column[None, :], mask=(unit < HIDDEN) & is_column[None, :], other=0.0)
    shift = tl.load(bias + unit, mask=unit < HIDDEN, other=0.0)
    rest = tl.load(row + extra, mask=(unit < HIDDEN) & (extra < 3), other=0.0)
    return main, tl.where(extra == 3, shift, rest)


@no_type_check
@triton.jit
def _as_rows(block, LEVELS_PADDED: tl.constexpr, FEATURES_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """(level, sample, feature) to (K, sample)."""
    return tl.reshape(tl.permute(block, (0, 2, 1)), (LEVELS_PADDED * FEATURES_PADDED, BLOCK))


@no_type_check
@triton.jit
def _as_levels(rows, LEVELS_PADDED: tl.constexpr, FEATURES_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """(K, sample) to (level, sample, feature)."""
    return tl.permute(tl.reshape(rows, (LEVELS_PADDED, FEATURES_PADDED, BLOCK)), (0, 2, 1))


# ---- samples ---------------------------------------------------------------------------------------------


@no_type_check
@triton.jit
def _num_real(count, num_samples):
    """Samples that are not padding."""
    return num_samples if count is None else tl.minimum(tl.load(count), num_samples).to(tl.int32)


@no_type_check
@triton.jit
def _read_vectors(vectors, first, num_real, bound, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows 0..2: a block of vectors divided by the bound; row 3: ``ONE``; zeros."""
    row, sample = tl.arange(0, _EXTRA)[:, None], tl.arange(0, BLOCK)[None, :]
    is_real = (row < 3) & (first + sample < num_real)
    coordinates = tl.load(vectors + first.to(tl.int64) * 3 + sample * 3 + row, mask=is_real, other=0.0)
    return tl.where(row == 3, ONE, coordinates / bound)


@no_type_check
@triton.jit
def _read_levels(cells, offsets, masks, level_weights, LEVELS: tl.constexpr, LEVELS_PADDED: tl.constexpr):
    """The grid's levels, each ``(LEVELS_PADDED, 1)``; padding is closed like levels of weight zero."""
    level = tl.arange(0, LEVELS_PADDED)[:, None]
    is_level = level < LEVELS
    weight = tl.load(level_weights + level, mask=is_level, other=0.0)
    n = tl.load(cells + level, mask=is_level, other=1)
    offset = tl.load(offsets + level, mask=is_level, other=0)
    return weight, n, offset, tl.load(masks + level, mask=is_level, other=0)


@no_type_check
@triton.jit
def _locate(positions, first, num_real, bound, cells, BLOCK: tl.constexpr):
    """For each level and sample: cell, fraction in it, and the fraction's slope, each along x, y, z."""
    sample = tl.arange(0, BLOCK)
    address = positions + first.to(tl.int64) * 3 + sample * 3
    is_real = first + sample < num_real
    x = tl.load(address, mask=is_real, other=0.0)[None, :]
    y = tl.load(address + 1, mask=is_real, other=0.0)[None, :]
    z = tl.load(address + 2, mask=is_real, other=0.0)[None, :]
    cx, fx, sx = locate(x, bound, cells)
    cy, fy, sy = locate(y, bound, cells)
    cz, fz, sz = locate(z, bound, cells)
    return (cx, cy, cz), (fx, fy, fz), (sx, sy, sz)


@no_type_check
@triton.jit
def _entries(
    corner: tl.constexpr,
    cell,
    cells,
    offset,
    mask,
    FEATURES: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
):
    """Where in the table the features of a cell's corner lie; bits 0, 1, 2 of ``corner`` are its x, y, z."""
    cx, cy, cz = cell
    row = corner_row(cx + corner % 2, cy + corner // 2 % 2, cz + corner // 4, cells, offset, mask)
    return (row * FEATURES)[:, :, None] + tl.arange(0, FEATURES_PADDED)[None, None, :]


@no_type_check
@triton.jit
def _weights(corner: tl.constexpr, fraction, slope):
    """A corner's trilinear weight, and its derivatives along the axes."""
    fx, fy, fz = fraction
    sx, sy, sz = slope
    wx = fx if corner % 2 == 1 else 1.0 - fx
    wy = fy if corner // 2 % 2 == 1 else 1.0 - fy
    wz = fz if corner // 4 == 1 else 1.0 - fz
    gx = (sx if corner % 2 == 1 else -sx) * (wy * wz)
    gy = (sy if corner // 2 % 2 == 1 else -sy) * (wx * wz)
    gz = (sz if corner // 4 == 1 else -sz) * (wx * wy)
    return wx * wy * wz, gx, gy, gz


@no_type_check
@triton.jit
def _is_entry(
    weight,
    first,
    num_real,
    FEATURES: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether there is something to read: an open level, a sample that is not padding, a feature."""
    is_real = first + tl.arange(0, BLOCK) < num_real
    is_open = (weight != 0.0) & is_real[None, :]
    return is_open[:, :, None] & (tl.arange(0, FEATURES_PADDED) < FEATURES)[None, None, :]


@no_type_check
@triton.jit
def _softplus(z, beta):
    """softplus(z) = log(1 + exp(beta z)) / beta and its slope; e in (0, 1] overflows nowhere."""
    e = tl.exp(-beta * tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.maximum(z, 0.0) + tl.log(1.0 + e) / beta, tl.where(z >= 0.0, inverse, e * inverse)


# ---- value alone -----------------------------------------------------------------------------------------


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def sdf_kernel(
    positions,
    table,
    cells,
    offsets,
    masks,
    level_weights,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    weight_out,
    count,
    num_samples,
    bound,
    beta,
    bias_out,
    sdf,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LEVELS_PADDED: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The network's first output, zeros for padding.

    ``weight_2`` is ``None`` without a second hidden layer.
    """
    first = tl.program_id(0) * BLOCK
    num_real = _num_real(count, num_samples)
    sample = tl.arange(0, BLOCK)
    address = sdf + first.to(tl.int64) + sample
    is_row = first + sample < num_samples
    if first >= num_real:
        tl.store(address, tl.zeros((BLOCK,), tl.float32), mask=is_row)
        return

    level_weight, n, offset, mask = _read_levels(cells, offsets, masks, level_weights, LEVELS, LEVELS_PADDED)
    cell, fraction, slope = _locate(positions, first, num_real, bound, n, BLOCK)
    is_entry = _is_entry(level_weight, first, num_real, FEATURES, FEATURES_PADDED, BLOCK)
    features = tl.zeros((LEVELS_PADDED, BLOCK, FEATURES_PADDED), tl.float32)
    for corner in tl.static_range(8):
        index = _entries(corner, cell, n, offset, mask, FEATURES, FEATURES_PADDED)
        w, _, _, _ = _weights(corner, fraction, slope)
        features += w[:, :, None] * tl.load(table + index, mask=is_entry, other=0.0).to(tl.float32)
    features *= level_weight[:, :, None]

    x = _as_rows(features, LEVELS_PADDED, FEATURES_PADDED, BLOCK)
    e = _read_vectors(positions, first, num_real, bound, 1.0, BLOCK)
    w_1, w_e = _read_first_layer(
        weight_1, bias_1, LEVELS, FEATURES, LEVELS_PADDED, FEATURES_PADDED, HIDDEN, HIDDEN_PADDED
    )
    h, _ = _softplus(_dot(w_e, e, _dot(w_1, x)), beta)
    unit = tl.arange(0, HIDDEN_PADDED)
    if weight_2 is not None:
        w_2 = _read(weight_2, HIDDEN, HIDDEN, HIDDEN_PADDED, HIDDEN_PADDED)
        b_2 = tl.load(bias_2 + unit, mask=unit < HIDDEN, other=0.0)
        h, _ = _softplus(_dot(w_2, h) + b_2[:, None], beta)
    w_sdf = tl.load(weight_out + unit, mask=unit < HIDDEN, other=0.0)
    value = tl.sum(w_sdf[:, None] * h, axis=0) + tl.load(bias_out)
    tl.store(address, tl.where(first + sample < num_real, value, 0.0), mask=is_row)


# ---- value and gradient ----------------------------------------------------------------------------------


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def forward_kernel(
    positions,
    table,
    cells,
    offsets,
    masks,
    level_weights,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    weight_out,
    count,
    num_samples,
    bound,
    beta,
    bias_out,
    outputs,
    gradient,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LEVELS_PADDED: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Outputs, encoding and gradient of a block of samples; nothing is written for padding.

    ``weight_2`` is ``None`` without a second hidden layer.
    """
    first = tl.program_id(0) * BLOCK
    num_real = _num_real(count, num_samples)
    if first >= num_real:
        return

    # Features and their derivatives along x, y, z, from the same eight reads.
    level_weight, n, offset, mask = _read_levels(cells, offsets, masks, level_weights, LEVELS, LEVELS_PADDED)
    cell, fraction, slope = _locate(positions, first, num_real, bound, n, BLOCK)
    is_entry = _is_entry(level_weight, first, num_real, FEATURES, FEATURES_PADDED, BLOCK)
    features = tl.zeros((LEVELS_PADDED, BLOCK, FEATURES_PADDED), tl.float32)
    along_x, along_y, along_z = features, features, features
    for corner in tl.static_range(8):
        index = _entries(corner, cell, n, offset, mask, FEATURES, FEATURES_PADDED)
        w, gx, gy, gz = _weights(corner, fraction, slope)
        value = tl.load(table + index, mask=is_entry, other=0.0).to(tl.float32)
        features += w[:, :, None] * value
        along_x += gx[:, :, None] * value
        along_y += gy[:, :, None] * value
        along_z += gz[:, :, None] * value
    x = _as_rows(features * level_weight[:, :, None], LEVELS_PADDED, FEATURES_PADDED, BLOCK)

    # Values.
    e = _read_vectors(positions, first, num_real, bound, 1.0, BLOCK)
    w_1, w_e = _read_first_layer(
        weight_1, bias_1, LEVELS, FEATURES, LEVELS_PADDED, FEATURES_PADDED, HIDDEN, HIDDEN_PADDED
    )
    h, s = _softplus(_dot(w_e, e, _dot(w_1, x)), beta)
    unit = tl.arange(0, HIDDEN_PADDED)
    w_sdf = tl.load(weight_out + unit, mask=unit < HIDDEN, other=0.0)
    if weight_2 is None:
        u = w_sdf[:, None] * s
    else:
        w_2 = _read(weight_2, HIDDEN, HIDDEN, HIDDEN_PADDED, HIDDEN_PADDED)
        b_2 = tl.load(bias_2 + unit, mask=unit < HIDDEN, other=0.0)
        h, s_2 = _softplus(_dot(w_2, h) + b_2[:, None], beta)
        u = _dot(tl.trans(w_2), w_sdf[:, None] * s_2) * s
    row = tl.arange(0, OUTPUTS_PADDED)
    b_out = tl.load(bias_out + row, mask=row < OUTPUTS, other=0.0)
    o = _dot(_read(weight_out, OUTPUTS, HIDDEN, OUTPUTS_PADDED, HIDDEN_PADDED), h) + b_out[:, None]

    # Gradient.
    g = _as_levels(_dot(tl.trans(w_1), u), LEVELS_PADDED, FEATURES_PADDED, BLOCK) * level_weight[:, :, None]
    g_e = _dot(tl.trans(w_e), u)
    nx = tl.sum(tl.sum(g * along_x, axis=2), axis=0)[None, :]
    ny = tl.sum(tl.sum(g * along_y, axis=2), axis=0)[None, :]
    nz = tl.sum(tl.sum(g * along_z, axis=2), axis=0)[None, :]

    extra = tl.arange(0, _EXTRA)[:, None]
    sample = tl.arange(0, BLOCK)
    is_real = first + sample < num_real
    normal = g_e / bound + tl.where(extra == 0, nx, tl.where(extra == 1, ny, nz))
    tl.store(
        gradient + first.to(tl.int64) * 3 + sample[None, :] * 3 + extra,
        normal,
        mask=(extra < 3) & is_real[None, :],
    )
    WIDTH: tl.constexpr = OUTPUTS + 3 + LEVELS * FEATURES
    block = outputs + first.to(tl.int64) * WIDTH + sample * WIDTH
    tl.store(block[:, None] + row[None, :], tl.trans(o), mask=is_real[:, None] & (row < OUTPUTS)[None, :])
    tl.store(block[None, :] + OUTPUTS + extra, e, mask=(extra < 3) & is_real[None, :])
    column, is_column = _feature_columns(LEVELS, FEATURES, LEVELS_PADDED, FEATURES_PADDED)
    tl.store(
        block[:, None] + OUTPUTS + column[None, :], tl.trans(x), mask=is_real[:, None] & is_column[None, :]
    )


# ---- backward --------------------------------------------------------------------------------------------


@no_type_check
@triton.jit(do_not_specialize=["num_samples"])
def backward_kernel(
    positions,
    table,
    cells,
    offsets,
    masks,
    level_weights,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    weight_out,
    count,
    num_samples,
    bound,
    beta,
    d_outputs,
    d_gradient,
    cotangents,
    d_parameters,
    LEVELS: tl.constexpr,
    FEATURES: tl.constexpr,
    LEVELS_PADDED: tl.constexpr,
    FEATURES_PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUTS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the table's gradient is made from, and this program's share of the parameters' gradients.

    ``cotangents`` (2, S, W) gets dh_0 and g_0, except for the columns of the position and for padding: nobody
    reads these. A program walks over every so manieth block, keeping its sums. ``d_parameters`` has a row a
    program: W_1, b_1, W_2, b_2 (where there is a second hidden layer), W_out, b_out one after another.
    """
    WIDTH: tl.constexpr = 3 + LEVELS * FEATURES
    num_real = _num_real(count, num_samples)
    unit, row, extra = tl.arange(0, HIDDEN_PADDED), tl.arange(0, OUTPUTS_PADDED), tl.arange(0, _EXTRA)
    column, is_column = _feature_columns(LEVELS, FEATURES, LEVELS_PADDED, FEATURES_PADDED)
    level_weight, n, offset, mask = _read_levels(cells, offsets, masks, level_weights, LEVELS, LEVELS_PADDED)

    # Sums over this program's blocks. The output layer's are transposed: matrix units want the long side
    # first.
    dw_1 = tl.zeros((HIDDEN_PADDED, LEVELS_PADDED * FEATURES_PADDED), tl.float32)
    dw_e = tl.zeros((HIDDEN_PADDED, _EXTRA), tl.float32)
    if weight_2 is not None:
        dw_2 = tl.zeros((HIDDEN_PADDED, HIDDEN_PADDED), tl.float32)
        db_2 = tl.zeros((HIDDEN_PADDED,), tl.float32)
    dw_out = tl.zeros((HIDDEN_PADDED, OUTPUTS_PADDED), tl.float32)
    dw_sdf = tl.zeros((HIDDEN_PADDED,), tl.float32)
    db_out = tl.zeros((OUTPUTS_PADDED,), tl.float32)

    for index_of_block in range(tl.program_id(0), tl.cdiv(num_real, BLOCK), tl.num_programs(0)):
        first = index_of_block * BLOCK
        # Zero, which the compiler cannot know: it would keep the weights in registers from block to block.
        opaque = tl.multiple_of(tl.minimum(num_real - first, 0), 16)
        sample = tl.arange(0, BLOCK)
        is_real = first + sample < num_real
        is_entry = _is_entry(level_weight, first, num_real, FEATURES, FEATURES_PADDED, BLOCK)
        upstream = d_gradient + first.to(tl.int64) * 3 + sample * 3
        dx = tl.load(upstream, mask=is_real, other=0.0)[None, :]
        dy = tl.load(upstream + 1, mask=is_real, other=0.0)[None, :]
        dz = tl.load(upstream + 2, mask=is_real, other=0.0)[None, :]

        # x, and dg_0 = J dn.
        cell, fraction, slope = _locate(positions, first, num_real, bound, n, BLOCK)
        features = tl.zeros((LEVELS_PADDED, BLOCK, FEATURES_PADDED), tl.float32)
        along_d = features
        for corner in tl.static_range(8):
            index = _entries(corner, cell, n, offset, mask, FEATURES, FEATURES_PADDED)
            w, gx, gy, gz = _weights(corner, fraction, slope)
            value = tl.load(table + index, mask=is_entry, other=0.0).to(tl.float32)
            features += w[:, :, None] * value
            along_d += (gx * dx + gy * dy + gz * dz)[:, :, None] * value
        x = _as_rows(features * level_weight[:, :, None], LEVELS_PADDED, FEATURES_PADDED, BLOCK)
        dg_0 = _as_rows(along_d * level_weight[:, :, None], LEVELS_PADDED, FEATURES_PADDED, BLOCK)
        e = _read_vectors(positions, first, num_real, bound, 1.0, BLOCK)
        de = _read_vectors(d_gradient, first, num_real, bound, 0.0, BLOCK)

        # Both sweeps again, and through them backwards.
        w_1, w_e = _read_first_layer(
            weight_1 + opaque,
            bias_1 + opaque,
            LEVELS,
            FEATURES,
            LEVELS_PADDED,
            FEATURES_PADDED,
            HIDDEN,
            HIDDEN_PADDED,
        )
        h, s = _softplus(_dot(w_e, e, _dot(w_1, x)), beta)
        du = _dot(w_e, de, _dot(w_1, dg_0))
        block = d_outputs + first.to(tl.int64) * (OUTPUTS + WIDTH) + sample[:, None] * (OUTPUTS + WIDTH)
        do = tl.load(block + row[None, :], mask=is_real[:, None] & (row < OUTPUTS)[None, :], other=0.0)
        db_out += tl.sum(do, axis=0)
        w_out = _read(weight_out + opaque, OUTPUTS, HIDDEN, OUTPUTS_PADDED, HIDDEN_PADDED)
        w_sdf = tl.load(weight_out + opaque + unit, mask=unit < HIDDEN, other=0.0)[:, None]
        if weight_2 is None:
            u = w_sdf * s
            dw_sdf += tl.sum(du * s, axis=1)
            dw_out = _dot(h, do, dw_out)
            dh = _dot(tl.trans(w_out), tl.trans(do))
        else:
            w_2 = _read(weight_2 + opaque, HIDDEN, HIDDEN, HIDDEN_PADDED, HIDDEN_PADDED)
            b_2 = tl.load(bias_2 + unit, mask=unit < HIDDEN, other=0.0)
            h_2, s_2 = _softplus(_dot(w_2, h) + b_2[:, None], beta)
            u_2 = w_sdf * s_2
            u = _dot(tl.trans(w_2), u_2) * s
            dg_1 = du * s
            du_2 = _dot(w_2, dg_1)
            dw_sdf += tl.sum(du_2 * s_2, axis=1)
            dw_out = _dot(h_2, do, dw_out)
            dz_2 = _dot(tl.trans(w_out), tl.trans(do)) * s_2 + du_2 * u_2 * (beta * (1.0 - s_2))
            dw_2 = _dot(u_2, tl.trans(dg_1), _dot(dz_2, tl.trans(h), dw_2))
            db_2 += tl.sum(dz_2, axis=1)
            dh = _dot(tl.trans(w_2), dz_2)
        dz_1 = dh * s + du * u * (beta * (1.0 - s))
        dw_1 = _dot(u, tl.trans(dg_0), _dot(dz_1, tl.trans(x), dw_1))
        dw_e = _dot(u, tl.trans(de), _dot(dz_1, tl.trans(e), dw_e))

        # dh_0, which goes where features came from, above g_0, which goes where their derivatives did: one
        # product of 2 BLOCK rows, because a Hopper's matrix units want 64.
        both = tl.permute(tl.join(dz_1, u), (2, 1, 0))
        both = _dot(tl.reshape(both, (2 * BLOCK, HIDDEN_PADDED)), w_1)
        stacked = tl.arange(0, 2 * BLOCK)[:, None]
        from_sample = first + stacked % BLOCK
        is_number = (from_sample < num_real) & is_column[None, :]
        upstream = d_outputs + from_sample.to(tl.int64) * (OUTPUTS + WIDTH) + OUTPUTS + column[None, :]
        both += tl.load(upstream, mask=is_number & (stacked < BLOCK), other=0.0)
        address = tl.where(stacked < BLOCK, 0, num_samples).to(tl.int64) + from_sample
        tl.store(cotangents + address * WIDTH + column[None, :], both, mask=is_number)

    size = HIDDEN * (WIDTH + 1) + OUTPUTS * (HIDDEN + 1)
    if weight_2 is not None:
        size += HIDDEN * (HIDDEN + 1)
    part = d_parameters + tl.program_id(0).to(tl.int64) * size
    is_unit = unit < HIDDEN
    matrix = part + unit[:, None] * WIDTH
    tl.store(matrix + column[None, :], dw_1, mask=is_unit[:, None] & is_column[None, :])
    tl.store(matrix + extra[None, :], dw_e, mask=is_unit[:, None] & (extra < 3)[None, :])
    part += HIDDEN * WIDTH
    # Row 3 of e, the ones, made the bias a column.
    tl.store(part + unit[:, None] + extra[None, :] * 0, dw_e, mask=is_unit[:, None] & (extra == 3)[None, :])
    part += HIDDEN
    if weight_2 is not None:
        matrix = part + unit[:, None] * HIDDEN + unit[None, :]
        tl.store(matrix, dw_2, mask=is_unit[:, None] & is_unit[None, :])
        tl.store(part + HIDDEN * HIDDEN + unit, db_2, mask=is_unit)
        part += HIDDEN * (HIDDEN + 1)
    is_output = row < OUTPUTS
    # The gradient of the distance starts with W_out[0].
    dw_out += tl.where(row[None, :] == 0, dw_sdf[:, None], 0.0)
    matrix = part + row[None, :] * HIDDEN + unit[:, None]
    tl.store(matrix, dw_out, mask=is_unit[:, None] & is_output[None, :])
    tl.store(part + OUTPUTS * HIDDEN + row, db_out, mask=is_output)
