"""Occupancy grid: which cells of [-1, 1]^3 are worth sampling.

A cell keeps a running maximum of how much of a surface it has been seen to hold (instant-ngp's update rule:
decay, then maximum with a fresh value at a random point in the cell). Cells that no photograph can say
anything about, because fewer than two cameras see them or because they lie outside the masks' visual hull,
are closed for good: nothing would ever correct the noise in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from utils.types import ImageStack, Scene


@dataclass(frozen=True)
class OccupancyConfig:
    """Occupancy grid over [-1, 1]^3."""

    resolution: int = 128
    """Cells per axis."""
    decay: float = 0.3
    """What an old value is multiplied by when its cell is looked at again. A distance says
    reliably that a cell is empty, so this is far below instant-ngp's 0.95 for densities: 4
    looks instead of 90 from full to closed."""
    threshold: float = 0.01
    """A cell is sampled while its value (0..1: the logistic density relative to its peak) is above this."""
    warmup_updates: int = 8
    """So many updates look at every cell; later ones at random shares."""
    empty_share: float = 0.0625
    """Share of the empty cells looked at per update."""
    occupied_share: float = 0.25
    """Share of the occupied cells looked at per update."""
    min_views: int = 2
    """Cells inside fewer training images than this are closed (capped by the number of images)."""
    hull_tolerance: float = 0.05
    """With masks: a cell may lie outside this share of the masks that could see it before it is closed."""

    def __post_init__(self) -> None:
        if not 2 <= self.resolution <= 1024:
            raise ValueError(f"model.occupancy.resolution: must lie in 2..1024, got {self.resolution}")
        for key in ("decay", "threshold", "empty_share", "occupied_share", "hull_tolerance"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"model.occupancy.{key}: must lie in 0..1, got {getattr(self, key)}")


def cell_centers(resolution: int) -> Float[Tensor, "P 3"]:
    """Centres (x, y, z) of all cells, x fastest: row i belongs to cell ``[z, y, x]`` flattened."""
    axis = (torch.arange(resolution) + 0.5) * (2.0 / resolution) - 1.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], dim=-1).reshape(-1, 3)


def _dilated_mask(masks: ImageStack, index: int, radius: int) -> Bool[Tensor, "H W"]:
    mask = (masks.image(index)[None, :, :, 0] > 127).float()
    return torch.nn.functional.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius)[0] > 0


def observable_cells(scene: Scene, config: OccupancyConfig) -> Bool[Tensor, "G G G"]:
    """Cells inside the unit sphere that enough training images see, and that their masks allow.

    A cell counts as inside a mask when its projected centre is within
    the cell's projected half diagonal of it.
    """
    size = config.resolution
    centers = cell_centers(size)
    half_diagonal = 3**0.5 / size
    inside = centers.norm(dim=1) < 1.0 + half_diagonal
    centers = centers[inside]
    seen = torch.zeros(len(centers))
    kept = torch.zeros(len(centers))
    for view in scene.train_indices:
        c2w, intrinsics = scene.cameras.c2w[view], scene.cameras.intrinsics[view]
        width, height = scene.cameras.size[view].tolist()
        in_camera = (centers - c2w[:, 3]) @ c2w[:, :3]
        depth = in_camera[:, 2].clamp(min=1e-6)
        pixels = (in_camera @ intrinsics.t())[:, :2] / depth[:, None]
        column, row = pixels.floor().long().unbind(1)
        is_seen = (in_camera[:, 2] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        seen += is_seen
        if scene.masks is None:
            kept += is_seen
            continue
        distance = float(depth[is_seen].median()) if is_seen.any() else 1.0
        radius = int(float(intrinsics[0, 0]) * half_diagonal / distance) + 2
        mask = _dilated_mask(scene.masks, view, radius)
        kept += is_seen & mask[row.clamp(0, height - 1), column.clamp(0, width - 1)]
    observable = torch.zeros(size**3, dtype=torch.bool)
    needed = min(config.min_views, len(scene.train_indices))
    observable[inside] = (seen >= needed) & (kept >= (1.0 - config.hull_tolerance) * seen)
    return observable.view(size, size, size)


class OccupancyGrid(nn.Module):
    """Cells indexed ``[z, y, x]``; all state is in buffers, so that a checkpoint holds it."""

    values: Tensor
    occupied: Tensor
    observable: Tensor
    num_updates: Tensor

    def __init__(self, config: OccupancyConfig, observable: Bool[Tensor, "G G G"]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("values", torch.zeros_like(observable, dtype=torch.float32))
        self.register_buffer("occupied", observable.clone())
        self.register_buffer("observable", observable)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(
        self, presence: Callable[[Float[Tensor, "P 3"]], Float[Tensor, " P"]], generator: torch.Generator
    ) -> None:
        """Look at some cells again.

        Args:
            presence: how much of the surface there is at given positions, 0..1.
            generator: for the choice of cells and of the points in them.
        """
        values, occupied, observable = self.values.view(-1), self.occupied.view(-1), self.observable.view(-1)
        device = values.device
        candidates = observable
        if int(self.num_updates) >= self.config.warmup_updates:
            chance = torch.where(occupied, self.config.occupied_share, self.config.empty_share)
            candidates = observable & (torch.rand(len(values), generator=generator, device=device) < chance)
        cells = candidates.nonzero().squeeze(1)
        size = self.config.resolution
        index = torch.stack([cells % size, cells // size % size, cells // size**2], dim=1)
        jitter = torch.rand(len(cells), 3, generator=generator, device=device)
        positions = (index + jitter) * (2.0 / size) - 1.0
        values[cells] = torch.maximum(values[cells] * self.config.decay, presence(positions))
        occupied.copy_(observable & (values > self.config.threshold))
        self.num_updates += 1

    @property
    def share(self) -> float:
        """Occupied cells over all cells, for the log."""
        return float(self.occupied.float().mean())
