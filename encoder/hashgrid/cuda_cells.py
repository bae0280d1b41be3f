"""Where a position lies in a level of the hash grid: the device functions that all Triton kernels share.

They repeat ``cpu.py``'s ``_locate`` and ``_corner_index``, for blocks of positions of any shape.
"""

from typing import no_type_check

import triton
import triton.language as tl

from encoder.hashgrid.geometry import PRIME_Y, PRIME_Z

_PRIME_Y = tl.constexpr(PRIME_Y)
_PRIME_Z = tl.constexpr(PRIME_Z)


@no_type_check
@triton.jit
def locate(position, bound, cells):
    """Cell index, fraction inside the cell and d fraction / d position along one axis (0 outside the box).

    ``position`` is a block of coordinates, ``cells`` the cells per axis (int32) of the level or of each
    element's level, broadcastable to it. NaN lands in cell 0 with a fraction of NaN: memory is safe.
    """
    n = cells.to(tl.float32)
    unit = (position / bound + 1.0) * 0.5
    is_inside = (unit >= 0.0) & (unit <= 1.0)
    slope = tl.where(is_inside, n / (2.0 * bound), 0.0)
    # A NaN compares false with everything, so it stays what it is here and is caught below.
    unit = tl.where(unit < 0.0, 0.0, tl.where(unit > 1.0, 1.0, unit))
    scaled = unit * n
    cell = tl.where(scaled == scaled, scaled, 0.0).to(tl.int32)
    cell = tl.maximum(tl.minimum(cell, cells - 1), 0)
    return cell, scaled - cell.to(tl.float32), slope


@no_type_check
@triton.jit
def corner_row(cx, cy, cz, cells, offset, mask):
    """Row in the table (int64) of a grid vertex: row-major where ``mask`` is 0, else the spatial hash."""
    vertices = (cells + 1).to(tl.int64)
    dense = (cz.to(tl.int64) * vertices + cy.to(tl.int64)) * vertices + cx.to(tl.int64)
    hashed = cx.to(tl.uint32) ^ (cy.to(tl.uint32) * _PRIME_Y) ^ (cz.to(tl.uint32) * _PRIME_Z)
    hashed = (hashed & mask.to(tl.uint32)).to(tl.int64)
    return offset + tl.where(mask == 0, dense, hashed)
