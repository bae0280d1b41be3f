"""The multiresolution hash grid in plain PyTorch: any dtype, any device, any number of derivatives.

This is what the fast versions are tested against; it is kept short and is never optimised.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from encoder.hashgrid.geometry import PRIME_Y, PRIME_Z, GridGeometry


def encode(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
) -> Float[Tensor, "S W"]:
    """Position / bound, then each level's trilinearly interpolated features; see the package's ``encode``."""
    unit = ((positions / geometry.bound + 1) / 2).clamp(0, 1)
    encoded = [positions / geometry.bound]
    level_weights = geometry.level_weights_on(positions.device, active_levels)
    for level, level_weight in enumerate(level_weights):
        cells, offset, mask = (int(a[level]) for a in (geometry.cells, geometry.offsets, geometry.masks))
        scaled = unit * cells
        cell = scaled.detach().floor().clamp(max=cells - 1)
        fraction = scaled - cell
        features = torch.zeros(len(positions), table.shape[1], dtype=table.dtype, device=table.device)
        for corner in range(8):
            step = torch.tensor([corner & 1, (corner >> 1) & 1, corner >> 2], device=positions.device)
            x, y, z = (cell.long() + step).unbind(1)
            if mask == 0:
                entry = (z * (cells + 1) + y) * (cells + 1) + x
            else:
                # The mask keeps low bits only, so 64-bit products serve as well as wrapped 32-bit ones.
                entry = (x ^ (y * PRIME_Y) ^ (z * PRIME_Z)) & mask
            weight = torch.where(step == 1, fraction, 1 - fraction).prod(dim=1)
            features = features + weight[:, None] * table[offset + entry]
        encoded.append(level_weight * features)
    return torch.cat(encoded, dim=1)
