"""Inputs of the operations at a given size, the same on every machine: for checks and comparisons."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from encoder.hashgrid import GridGeometry, HashGridConfig
from models.backends import Backends
from models.fields import SDFConfig, SDFField
from utils.types import Rays, RaySamples


@dataclass(frozen=True)
class GridCase:
    """Positions in a hash grid, and cotangents."""

    positions: Tensor
    table: Tensor
    geometry: GridGeometry
    active_levels: float
    count: int
    """Rows from here on are padding and hold NaN."""
    cotangent: Tensor
    """Of the features."""
    direction: Tensor
    """Of the features' derivative in the position."""

    @property
    def count_on_device(self) -> Tensor | None:
        """As kernels take it; ``None`` where nothing is padding."""
        if self.count == len(self.positions):
            return None
        return torch.tensor(self.count, device=self.positions.device)


def _randn(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    # Drawn on the CPU, so that every device gets the same numbers.
    return torch.randn(*shape, generator=generator).to(device)


def _away_from_faces(positions: Tensor, geometry: GridGeometry) -> Tensor:
    """Those positions that rounding does not move into another cell of any level.

    There the derivative jumps, and a float32 position may rightly be on the other side than a float64 one.
    """
    scaled = (positions.double()[:, :, None] / geometry.bound + 1) / 2 * torch.from_numpy(geometry.cells)
    return positions[((scaled - scaled.round()).abs() > 2e-3).all(dim=2).all(dim=1)]


def grid_case(
    samples: int,
    config: dict[str, int],
    device: torch.device,
    *,
    active_levels: float | None = None,
    reads_half: bool = False,
    padding: int = 0,
    features_per_level: int = 2,
) -> GridCase:
    """Samples in a grid whose levels contribute alike to the slope, as trained ones do."""
    generator = torch.Generator().manual_seed(1)
    dtype = "float16" if reads_half else "float32"
    grid = HashGridConfig(**config, features_per_level=features_per_level, table_dtype=dtype)
    geometry = GridGeometry.from_config(grid, 1.0)
    candidates = 2 * torch.rand(2 * samples + 64, 3, generator=generator) - 1
    positions = _away_from_faces(candidates, geometry)[:samples]
    assert len(positions) == samples, "too many positions lie on the faces of cells"
    positions[samples - padding :] = torch.nan
    sizes = np.diff(np.append(geometry.offsets, geometry.num_entries))
    scale = torch.from_numpy(np.repeat(0.01 * geometry.cells[0] / geometry.cells, sizes)).float()
    table = _randn(generator, device, geometry.num_entries, features_per_level) * scale[:, None].to(device)
    width = 3 + geometry.num_levels * features_per_level
    return GridCase(
        positions.to(device),
        table,
        geometry,
        float(geometry.num_levels if active_levels is None else active_levels),
        samples - padding,
        _randn(generator, device, samples, width),
        _randn(generator, device, samples, 3),
    )


@dataclass(frozen=True)
class SDFCase:
    """A signed distance network on a grid, and cotangents of its two results."""

    grid: GridCase
    weights: list[Tensor]
    biases: list[Tensor]
    d_outputs: Tensor
    d_gradient: Tensor


def sdf_case(grid: GridCase, hidden_layers: int = 1, hidden_width: int = 64) -> SDFCase:
    """The project's initial sphere, disturbed so that every input and unit matters."""
    device, generator = grid.positions.device, torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    config = SDFConfig(hash_grid=grid.geometry.config, hidden_layers=hidden_layers, hidden_width=hidden_width)
    field = SDFField(config, Backends.all("reference"))
    weights = [weight.detach().to(device) for weight in field.weights]
    weights = [weight + 0.1 * _randn(generator, device, *weight.shape) for weight in weights]
    biases = [bias.detach().to(device) for bias in field.biases]
    biases = [bias + 0.1 * _randn(generator, device, *bias.shape) for bias in biases]
    samples = len(grid.positions)
    width = len(biases[-1]) + grid.cotangent.shape[1]
    return SDFCase(grid, weights, biases, _randn(generator, device, samples, width), grid.direction)


@dataclass(frozen=True)
class NetworkCase:
    """A ReLU network."""

    inputs: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    d_outputs: Tensor
    count: int


def network_case(samples: int, widths: list[int], device: torch.device, padding: int = 0) -> NetworkCase:
    """He-normal weights, small biases."""
    generator = torch.Generator().manual_seed(3)
    inputs = _randn(generator, device, samples, widths[0])
    inputs[samples - padding :] = torch.nan
    pairs = list(pairwise(widths))
    weights = [_randn(generator, device, fan_out, fan_in) * (2 / fan_in) ** 0.5 for fan_in, fan_out in pairs]
    biases = [0.1 * _randn(generator, device, fan_out) for _, fan_out in pairs]
    d_outputs = _randn(generator, device, samples, widths[-1])
    return NetworkCase(inputs, weights, biases, d_outputs, samples - padding)


@dataclass(frozen=True)
class MarchCase:
    """Rays through a sphere, and which cells to sample."""

    rays: Rays
    occupied: Tensor
    step: float
    jitter: Tensor


def march_case(num_rays: int, device: torch.device, num_levels: int = 1, resolution: int = 128) -> MarchCase:
    """Rays from all sides through a hollow shell of cells; every 16th misses everything."""
    generator = torch.Generator().manual_seed(4)
    origins = torch.nn.functional.normalize(torch.randn(num_rays, 3, generator=generator), dim=1) * 3
    aims = 0.5 * (2 * torch.rand(num_rays, 3, generator=generator) - 1)
    directions = torch.nn.functional.normalize(aims - origins, dim=1)
    near, far = torch.full((num_rays,), 1.8), torch.full((num_rays,), 4.2)
    far[3::16] = 1.0
    axis = (torch.arange(resolution) + 0.5) * (2 / resolution) - 1
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = (x * x + y * y + z * z).sqrt()
    # A shell of radius 0.5 in the cube [-1, 1]^3, the next one in what the level around it adds.
    shells = [(2**k * radius - (0.5 + 0.7 * k)).abs() < 0.1 for k in range(num_levels)]
    rays = Rays(origins, directions, near, far, torch.zeros(num_rays, dtype=torch.int64)).to(device)
    step = 0.0034 * 128 / resolution
    return MarchCase(
        rays, torch.stack(shells).to(device), step, torch.rand(num_rays, generator=generator).to(device)
    )


@dataclass(frozen=True)
class PackedCase:
    """Samples on rays with opacities and values, and cotangents."""

    samples: RaySamples
    sdf: Tensor
    alpha: Tensor
    values: Tensor
    d_weights: Tensor
    d_sums: Tensor
    inv_s: float
    step: float


def packed_case(num_samples: int, num_rays: int, device: torch.device, padding: int = 0) -> PackedCase:
    """Rays of very different numbers of samples, some without any, some opaque; padding behind them."""
    generator = torch.Generator().manual_seed(5)
    total = num_samples - padding
    shares = torch.rand(num_rays, generator=generator) ** 4
    shares[::7] = 0
    ends = (shares.cumsum(0) / shares.sum() * total).round().long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    offsets[-1] = total
    indices = torch.repeat_interleave(torch.arange(num_rays), offsets.diff())
    step = 0.0034
    place = torch.arange(total) - offsets[indices]
    middles = torch.zeros(num_samples)
    # Every 50th place is a gap, behind which the next occupied cell begins.
    middles[:total] = 1.0 + (place + 3 * (place // 50)) * step
    ray_indices = torch.zeros(num_samples, dtype=torch.int64)
    ray_indices[:total] = indices
    alpha = torch.rand(num_samples, generator=generator) ** 8
    alpha[::101], alpha[::53] = 1.0, 0.0
    slopes = torch.rand(num_rays, generator=generator)[ray_indices]
    sdf = 0.1 - slopes * (middles - 1.0) + 0.002 * torch.randn(num_samples, generator=generator)
    half = torch.where(torch.arange(num_samples) < total, 0.5 * step, 0.0)
    served = torch.ones(num_rays, dtype=torch.bool).to(device) if padding else None
    samples = RaySamples(
        *((middles - half).to(device), (middles + half).to(device)),
        *(ray_indices.to(device), offsets.to(device), served),
    )
    return PackedCase(
        samples,
        sdf.to(device),
        alpha.to(device),
        _randn(generator, device, num_samples, 4),
        _randn(generator, device, num_samples),
        _randn(generator, device, num_rays, 4),
        inv_s=200.0,
        step=step,
    )
