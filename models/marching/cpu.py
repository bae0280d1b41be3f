"""Occupancy-grid ray marching on the CPU: Numba, whole rays per thread, one row a ray, packed afterwards."""

import math
from typing import no_type_check

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from models.marching.packing import pack
from models.opacity import DensityName
from utils.types import RaySamples


@no_type_check
@njit(inline="always")
def _cell(position, resolution):
    """Cell along one axis of a grid over [-1, 1]; what lies on or beyond a face counts to the outermost."""
    cell = np.int64(math.floor((position + np.float32(1.0)) * (np.float32(0.5) * resolution)))
    return min(max(cell, 0), resolution - 1)


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _march_kernel(origins, directions, near, far, occupied, step, jitter, found, counts):
    """Write the middles of each ray's samples to its row of ``found`` and their number to ``counts``."""
    num_levels, resolution = occupied.shape[0], occupied.shape[1]
    cell_size = np.float32(2.0 / resolution)
    for ray in prange(origins.shape[0]):
        k = 0  # lattice position: t = near + (k + jitter) * step
        count = 0
        while True:
            t = near[ray] + (np.float32(k) + jitter[ray]) * step
            if not t < far[ray]:
                break
            x = origins[ray, 0] + t * directions[ray, 0]
            y = origins[ray, 1] + t * directions[ray, 1]
            z = origins[ray, 2] + t * directions[ray, 2]
            if math.isnan(x + y + z):
                break
            level = 0
            reach, scale = np.float32(1.0), np.float32(1.0)  # the level covers [-reach, reach]^3
            while level + 1 < num_levels and max(abs(x), abs(y), abs(z)) >= reach:
                level += 1
                reach *= np.float32(2.0)
                scale *= np.float32(0.5)
            cx = _cell(scale * x, resolution)
            cy = _cell(scale * y, resolution)
            cz = _cell(scale * z, resolution)
            if occupied[level, cz, cy, cx]:
                found[ray, count] = t
                count += 1
                k += 1
                continue
            if level > 0 and resolution % 4 != 0:
                # The finer level's faces cut through this level's cells: none may be crossed in one go.
                k += 1
                continue
            # Distance to where the ray leaves this empty cell, then on to the next lattice position
            # behind it. A tenth of a step is held back, so that rounding can only lead to one
            # look-up too many, never to a skipped cell.
            leave = np.float32(1e10)
            for axis in range(3):
                direction = directions[ray, axis]
                cell = cx if axis == 0 else (cy if axis == 1 else cz)
                if abs(direction) > np.float32(1e-9):
                    face = np.float32(-1.0) + np.float32(cell + (1 if direction > 0 else 0)) * cell_size
                    leave = min(leave, (reach * face - origins[ray, axis]) / direction)
            k += max(1, np.int64(math.ceil((leave - t) / step - np.float32(0.1))))
        counts[ray] = count


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _pack_kernel(found, offsets, middles, ray_indices):
    """Move the rows' filled parts behind one another."""
    for ray in prange(found.shape[0]):
        for i in range(offsets[ray], offsets[ray + 1]):
            middles[i] = found[ray, i - offsets[ray]]
            ray_indices[i] = ray


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
    step = float(step)
    longest = float((far - near).nan_to_num(0.0).max()) if len(near) else 0.0
    # Pages of this buffer that no ray reaches are never touched, so it costs address space, not memory.
    found = torch.empty(len(near), max(int(longest / step) + 2, 1))
    offsets = torch.zeros(len(near) + 1, dtype=torch.int64)
    rays = [tensor.contiguous().numpy() for tensor in (origins, directions, near, far)]
    lattice = (np.float32(step), jitter.contiguous().numpy())
    _march_kernel(*rays, occupied.numpy(), *lattice, found.numpy(), offsets[1:].numpy())
    offsets = offsets.cumsum(0)
    middles, ray_indices = torch.empty(int(offsets[-1])), torch.empty(int(offsets[-1]), dtype=torch.int64)
    _pack_kernel(found.numpy(), offsets.numpy(), middles.numpy(), ray_indices.numpy())
    return pack(middles, ray_indices, offsets, step, capacity)


@no_type_check
@njit(inline="always")
def _logistic_alpha(sdf, middles, i, first, last, inv_s, step):
    """NeuS's opacity of sample ``i`` among those of its ray, with the slope from its neighbours."""
    slope = np.float32(0.0)
    neighbours = 0
    for k in range(max(i, first + 1), min(i + 2, last)):
        gap = middles[k] - middles[k - 1]
        if gap < np.float32(1.5) * step:
            slope += (sdf[k] - sdf[k - 1]) / gap
            neighbours += 1
    slope = slope / np.float32(neighbours) if neighbours > 0 else np.float32(-1.0)
    slope = max(min(slope, np.float32(0.0)), np.float32(-1.0))
    # 1 - F(next) / F(prev) = (1 - exp(next - prev)) F(-next), which stays exact deep inside.
    half = np.float32(0.5) * slope * step
    after = (sdf[i] + half) * inv_s
    return -math.expm1(np.float32(2.0) * half * inv_s) / (np.float32(1.0) + math.exp(after))


@no_type_check
@njit(inline="always")
def _laplace_alpha(sdf, sharpness, step):
    """VolSDF's opacity."""
    tail = np.float32(0.5) * math.exp(-abs(sdf) * sharpness)
    profile = tail if sdf >= np.float32(0.0) else np.float32(1.0) - tail
    return -math.expm1(-sharpness * step * profile)


@no_type_check
@njit(parallel=True, error_model="numpy", cache=True)
def _visible_kernel(sdf, middles, offsets, sharpness, step, threshold, is_laplace, keep):
    for ray in prange(offsets.shape[0] - 1):
        first = offsets[ray]
        last = offsets[ray + 1]
        transmittance = np.float32(1.0)
        for i in range(first, last):
            if not transmittance > threshold:
                break
            keep[i] = True
            if is_laplace:
                alpha = _laplace_alpha(sdf[i], sharpness, step)
            else:
                alpha = _logistic_alpha(sdf, middles, i, first, last, sharpness, step)
            transmittance *= np.float32(1.0) - alpha


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
    keep = torch.zeros(len(sdf), dtype=torch.bool)
    _visible_kernel(
        sdf.numpy(),
        middles.numpy(),
        offsets.numpy(),
        np.float32(float(sharpness)),
        np.float32(float(step)),
        np.float32(threshold),
        density == "volsdf",
        keep.numpy(),
    )
    return keep
