"""Occupancy-grid ray marching on CUDA: one warp a ray, a block of its lattice positions at a time.

    lane        0  1  2  3 ... |  0  1  2  3 ...
    k           0  1  2  3 ... | 64 65 66 67 ...     t = near + (k + jitter) * step
    occupied?   .  x  x  .     |  x  .  .  .
    row            0  1        |  2                  rows of a ray follow one another

Positions in empty cells are looked up like any other: 64 of them cost as much as one, and a walk from cell to
cell, each of which tells where the next one is, would leave most of a GPU waiting for memory. Samples are
counted first and written by a second run of the same kernel.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.marching.packing import serve
from models.opacity import DensityName
from utils.types import RaySamples

_BLOCK = 64

_MAX_TICKS = tl.constexpr(2**24)
"""Lattice positions a ray may have: up to here float32 counts without gaps, and every loop ends."""


@no_type_check
@triton.jit
def _cell(position, scale, RESOLUTION: tl.constexpr):
    """Cell along one axis of a level; what lies on or beyond a face counts to the outermost."""
    scaled = (position * scale + 1.0) * (0.5 * RESOLUTION)
    scaled = tl.where(scaled > 0.0, scaled, 0.0)
    return tl.where(scaled < RESOLUTION, scaled, RESOLUTION - 1.0).to(tl.int32)


@no_type_check
@triton.jit
def _march_kernel(
    origins,
    directions,
    near,
    far,
    occupied,
    step,
    jitter,
    offsets,
    t_starts,
    t_ends,
    ray_indices,
    NUM_LEVELS: tl.constexpr,
    RESOLUTION: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the samples of a ray into ``offsets[ray + 1]``, or write them to the rows that it names."""
    ray = tl.program_id(0)
    ox, oy, oz = tl.load(origins + ray * 3), tl.load(origins + ray * 3 + 1), tl.load(origins + ray * 3 + 2)
    dx = tl.load(directions + ray * 3)
    dy = tl.load(directions + ray * 3 + 1)
    dz = tl.load(directions + ray * 3 + 2)
    first, last = tl.load(near + ray), tl.load(far + ray)
    shift, width = tl.load(jitter + ray), tl.load(step)

    # Two more than there can be, because of roundings; none where near > far or one of them is NaN.
    ticks = (last - first) / width
    num_ticks = tl.where(ticks > 0.0, tl.minimum(ticks, _MAX_TICKS) + 2.0, 0.0).to(tl.int32)
    if WRITES:
        row, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    else:
        row, end = tl.zeros((), tl.int64), tl.full((), _MAX_TICKS, tl.int64)
    tick = tl.zeros((), tl.int32)
    while (tick < num_ticks) & (row < end):
        k = tick + tl.arange(0, BLOCK)
        t = first + (k.to(tl.float32) + shift) * width
        x, y, z = ox + t * dx, oy + t * dy, oz + t * dz
        is_inside = (t < last) & (x == x) & (y == y) & (z == z)

        level = tl.zeros((BLOCK,), tl.int32)
        scale = tl.full((BLOCK,), 1.0, tl.float32)
        for finer in tl.static_range(NUM_LEVELS - 1):
            is_beyond = tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.abs(z)) >= 2.0**finer
            level += is_beyond.to(tl.int32)
            scale = tl.where(is_beyond, 0.5 * scale, scale)
        cx, cy, cz = _cell(x, scale, RESOLUTION), _cell(y, scale, RESOLUTION), _cell(z, scale, RESOLUTION)
        index = ((level * RESOLUTION + cz).to(tl.int64) * RESOLUTION + cy) * RESOLUTION + cx
        found = (tl.load(occupied + index, mask=is_inside, other=0) != 0).to(tl.int32)

        if WRITES:
            target = row + tl.cumsum(found, 0) - 1
            # Nobody else's rows are written, even if a compiler made the two runs round differently.
            is_written = (found != 0) & (target < end)
            tl.store(t_starts + target, t - 0.5 * width, mask=is_written)
            tl.store(t_ends + target, t + 0.5 * width, mask=is_written)
            tl.store(ray_indices + target, tl.zeros((BLOCK,), tl.int64) + ray, mask=is_written)
        row += tl.sum(found, 0)
        tick += BLOCK
    if not WRITES:
        tl.store(offsets + ray + 1, row)


def march(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupied: Tensor,
    step: float | Tensor,
    jitter: Tensor,
    capacity: int | None,
) -> RaySamples:
    """See the package's ``march``."""
    rays = [tensor.detach().contiguous() for tensor in (origins, directions, near, far)]
    cells = occupied.contiguous().view(torch.uint8)
    lattice = _on_device(step, near.device), jitter.contiguous()

    def run(offsets: Tensor, *columns: Tensor | None) -> None:
        # Without fused multiply-adds positions round as on the CPU, and land in the same cells.
        _march_kernel[(len(near),)](
            *(*rays, cells, *lattice, offsets, *columns),
            NUM_LEVELS=cells.shape[0],
            RESOLUTION=cells.shape[1],
            WRITES=columns[0] is not None,
            BLOCK=_BLOCK,
            num_warps=1,
            enable_fp_fusion=False,
        )

    ends = torch.zeros(len(near) + 1, dtype=torch.int64, device=near.device)
    run(ends, None, None, None)
    ends = ends.cumsum(0)
    if capacity is None:
        offsets, is_served, num_rows = ends, None, int(ends[-1])
    else:
        offsets, is_served = serve(ends, capacity)
        num_rows = capacity
    t_starts, t_ends = near.new_zeros(num_rows), near.new_zeros(num_rows)
    ray_indices = torch.zeros_like(t_starts, dtype=torch.int64)
    run(offsets, t_starts, t_ends, ray_indices)
    return RaySamples(t_starts, t_ends, ray_indices, offsets, is_served)


@no_type_check
@triton.jit
def _logistic_alpha(sdf_0, sdf_1, sdf_2, gap_behind, gap_before, has_front, has_second, inv_s, step):
    """NeuS's opacity of the middle one of three neighbours, with the slope from the other two."""
    is_behind = has_front & (gap_behind < 1.5 * step)
    is_before = has_second & (gap_before < 1.5 * step)
    slope = tl.where(is_behind, (sdf_0 - sdf_1) / tl.where(is_behind, gap_behind, 1.0), 0.0)
    slope += tl.where(is_before, (sdf_1 - sdf_2) / tl.where(is_before, gap_before, 1.0), 0.0)
    slope = tl.where(is_behind & is_before, 0.5 * slope, slope)
    slope = tl.where(is_behind | is_before, slope, -1.0)
    slope = tl.where(slope > 0.0, 0.0, tl.where(slope < -1.0, -1.0, slope))
    # 1 - F(next) / F(prev) = (1 - exp(next - prev)) F(-next), which stays exact deep inside.
    half = 0.5 * slope * step
    return (1.0 - tl.exp(2.0 * half * inv_s)) / (1.0 + tl.exp((sdf_1 + half) * inv_s))


@no_type_check
@triton.jit
def _laplace_alpha(sdf, sharpness, step):
    """VolSDF's opacity."""
    tail = 0.5 * tl.exp(-tl.abs(sdf) * sharpness)
    return 1.0 - tl.exp(-sharpness * step * tl.where(sdf >= 0.0, tail, 1.0 - tail))


@no_type_check
@triton.jit
def _visible_kernel(
    sdf,
    middles,
    offsets,
    sharpness,
    step,
    threshold,
    keep,
    IS_LAPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the samples of a ray in front of which more than ``threshold`` of its light is left.

    Each lane works out what the sample *before* its own lets through, so that the running product over the
    lanes is the transmittance in front of each.
    """
    ray = tl.program_id(0)
    first, end = tl.load(offsets + ray), tl.load(offsets + ray + 1)
    scale, width = tl.load(sharpness), tl.load(step)
    lane = tl.arange(0, BLOCK)
    start = first
    light = tl.full(
        (), 1.0, tl.float32
    )  # in front of the sample before `start`, that sample's own opacity not yet counted
    while (start < end) & (light > threshold):
        row = start + lane
        is_row = row < end
        has_front = is_row & (row - 1 >= first)
        sdf_1 = tl.load(sdf + row - 1, mask=has_front, other=0.0)
        if IS_LAPLACE:
            alpha = _laplace_alpha(sdf_1, scale, width)
        else:
            has_second = is_row & (row - 2 >= first)
            sdf_0 = tl.load(sdf + row, mask=is_row, other=0.0)
            sdf_2 = tl.load(sdf + row - 2, mask=has_second, other=0.0)
            middle_0 = tl.load(middles + row, mask=is_row, other=0.0)
            middle_1 = tl.load(middles + row - 1, mask=has_front, other=0.0)
            middle_2 = tl.load(middles + row - 2, mask=has_second, other=0.0)
            gap_behind, gap_before = middle_0 - middle_1, middle_1 - middle_2
            alpha = _logistic_alpha(
                sdf_0, sdf_1, sdf_2, gap_behind, gap_before, has_front, has_second, scale, width
            )
        transmittance = light * tl.cumprod(tl.where(has_front, 1.0 - alpha, 1.0), 0)
        tl.store(keep + row, (transmittance > threshold).to(tl.uint8), mask=is_row)
        light = tl.sum(tl.where(lane == BLOCK - 1, transmittance, 0.0), 0)
        start += BLOCK


def visible(
    sdf: Tensor,
    middles: Tensor,
    offsets: Tensor,
    sharpness: float | Tensor,
    step: float | Tensor,
    threshold: float,
    density: DensityName,
) -> Tensor:
    """See the package's ``drop_hidden``."""
    keep = torch.zeros_like(middles, dtype=torch.bool)
    scalars = _on_device(sharpness, sdf.device), _on_device(step, sdf.device)
    _visible_kernel[(len(offsets) - 1,)](
        *(sdf.detach().contiguous(), middles.contiguous(), offsets, *scalars, float(threshold)),
        keep.view(torch.uint8),
        IS_LAPLACE=density == "volsdf",
        BLOCK=_BLOCK,
        num_warps=1,
    )
    return keep


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """A number that kernels read from memory, whether the host knows it or not."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.full((), value, dtype=torch.float32, device=device)
