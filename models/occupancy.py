"""Occupancy grid: which cells of [-1, 1]^3 are worth sampling.

A cell keeps a running maximum of how much of a surface it has been seen to hold (instant-ngp's update rule:
decay, then maximum with a fresh value at a random point in the cell). Cells that no photograph can say
anything about, because fewer than two cameras see them or because they lie outside the masks' visual hull,
are closed for good: nothing would ever correct the noise in them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from utils.lens import project
from utils.types import Scene


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
    """A cell is sampled while its value (0..1, the density's presence in ``opacity.py``) is above this."""
    below_mean: bool = False
    """Never let the threshold be above the mean value of the observable cells (instant-ngp): a radiance field
    starts with less everywhere than makes a surface later."""
    open_until: float = 0.0
    """Fraction of training before which no observable cell is closed: what masks show but the surface does
    not reach yet must keep its samples, or nothing would ever pull the surface there."""
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
        for key in ("decay", "threshold", "open_until", "empty_share", "occupied_share", "hull_tolerance"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"model.occupancy.{key}: must lie in 0..1, got {getattr(self, key)}")


def cell_centers(resolution: int) -> Float[Tensor, "P 3"]:
    """Centres (x, y, z) of all cells, x fastest: row i belongs to cell ``[z, y, x]`` flattened."""
    axis = (torch.arange(resolution) + 0.5) * (2.0 / resolution) - 1.0
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], dim=-1).reshape(-1, 3)


def observable_cells(scene: Scene, config: OccupancyConfig) -> Bool[Tensor, "G G G"]:
    """Cells inside the unit sphere that enough training images see, and that their masks allow.

    A cell counts as inside a mask when its projected centre is within the cell's projected half diagonal of
    it. Blocks of cells that lie clearly outside are closed first, without asking for each of their cells.
    """
    size = config.resolution
    needed = min(config.min_views, len(scene.train_indices))
    if scene.masks is None:
        # The rim of what two cameras see needs no finer cells.
        seen, _ = _votes(scene, torch.ones((-(-size // 2),) * 3, dtype=torch.bool))
        return _enlarged(seen >= needed, size)
    blocks = -(-size // 4)
    seen, kept = _votes(scene, torch.ones((blocks,) * 3, dtype=torch.bool))
    # Some of a block's cells are seen by other views than its centre, hence the slack in both.
    slack = 2.0 * config.hull_tolerance + 0.05
    candidates = _enlarged((seen >= 1) & (kept >= (1.0 - slack) * seen), size)
    seen, kept = _votes(scene, candidates)
    return (seen >= needed) & (kept >= (1.0 - config.hull_tolerance) * seen)


def _enlarged(cells: Bool[Tensor, "g g g"], size: int) -> Bool[Tensor, "G G G"]:
    """The same cells on a grid of ``size`` per axis; each new cell takes the value at its centre."""
    enlarged = torch.nn.functional.interpolate(cells[None, None].float(), (size,) * 3, mode="nearest-exact")
    return enlarged[0, 0] > 0.5


def _votes(
    scene: Scene, cells: Bool[Tensor, "G G G"]
) -> tuple[Float[Tensor, "G G G"], Float[Tensor, "G G G"]]:
    """In how many training images each of some cells appears, and in how many of their masks."""
    size = cells.shape[0]
    half_diagonal = 3**0.5 / size
    centers = cell_centers(size)
    chosen = cells.reshape(-1) & (centers.norm(dim=1) < 1.0 + half_diagonal)
    centers = centers[chosen]
    seen, kept = torch.zeros(len(centers)), torch.zeros(len(centers))
    for view in scene.train_indices if len(centers) > 0 else ():
        pixels, depth, is_seen = project(scene.cameras, view, centers)
        seen += is_seen
        if scene.masks is None or not is_seen.any():
            continue
        distance = float(depth[is_seen].median())
        radius = int(float(scene.cameras.intrinsics[view, 0, 0]) * half_diagonal / distance) + 2
        kernel = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
        mask = torch.from_numpy(cv2.dilate(scene.masks.image(view)[..., 0].numpy(), kernel)) > 127
        # Where a picture does not show a cell, any pixel will do.
        column, row = torch.where(is_seen[:, None], pixels, 0.0).long().unbind(1)
        kept += is_seen & mask[row, column]
    votes = torch.zeros(2, size**3)
    votes[:, chosen] = torch.stack([seen, kept])
    return votes[0].view(size, size, size), votes[1].view(size, size, size)


def _indices(chosen: Bool[Tensor, " N"], capacity: int) -> Int64[Tensor, " P"]:
    """Indices of the true entries; on a GPU in a buffer of ``capacity`` rows, for no host to wait for."""
    if chosen.device.type == "cpu":
        return chosen.nonzero().squeeze(1)
    return _padded_indices(chosen, capacity)


def _padded_indices(chosen: Bool[Tensor, " N"], capacity: int) -> Int64[Tensor, " P"]:
    """Indices of the first ``capacity`` true entries, padded with N."""
    index = torch.arange(len(chosen), device=chosen.device)
    rank = chosen.cumsum(0) - 1
    # What is not wanted is written behind the end, to many places, lest millions of writes queue for one.
    slot = torch.where(chosen & (rank < capacity), rank, capacity + index % 1024)
    buffer = torch.full((capacity + 1024,), len(chosen), dtype=torch.int64, device=chosen.device)
    buffer[slot] = index
    return buffer[:capacity]


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
        self._known: tuple[int, int] | None = None
        self.register_load_state_dict_post_hook(OccupancyGrid._forget)

    def _forget(self, _: object) -> None:
        self._known = None

    @torch.no_grad()
    def update(
        self,
        presence: Callable[[Float[Tensor, "P 3"]], Float[Tensor, " P"]],
        generator: torch.Generator,
        fraction: float = 1.0,
    ) -> None:
        """Look at some cells again.

        Args:
            presence: how much of the surface there is at given positions, 0..1.
            generator: for the choice of cells and of the points in them.
            fraction: of training done.
        """
        values, occupied, observable = self.values.view(-1), self.occupied.view(-1), self.observable.view(-1)
        device = values.device
        done, num_observable = self._on_host()
        candidates, capacity = observable, num_observable
        if done >= self.config.warmup_updates:
            chance = torch.where(occupied, self.config.occupied_share, self.config.empty_share)
            candidates = observable & (torch.rand(len(values), generator=generator, device=device) < chance)
            # Their number is binomial with at most this mean, and thousands of cells leave no room for luck.
            share = max(self.config.occupied_share, self.config.empty_share)
            capacity = min(num_observable, math.ceil(1.1 * share * num_observable) + 1024)
        cells = _indices(candidates, capacity)
        size = self.config.resolution
        index = torch.stack([cells % size, cells // size % size, cells // size**2], dim=1)
        jitter = torch.rand(len(cells), 3, generator=generator, device=device)
        positions = (index + jitter) * (2.0 / size) - 1.0
        # One row more than there are cells takes what the padding writes.
        extended = torch.cat([values, values.new_zeros(1)])
        extended[cells] = torch.maximum(extended[cells] * self.config.decay, presence(positions))
        values.copy_(extended[:-1])
        if fraction >= self.config.open_until:
            threshold: float | Tensor = self.config.threshold
            if self.config.below_mean:
                threshold = (0.99 * values.sum() / max(num_observable, 1)).clamp(max=self.config.threshold)
            occupied.copy_(observable & (values > threshold))
        self.num_updates += 1
        self._known = (done + 1, num_observable)

    def _on_host(self) -> tuple[int, int]:
        """Updates done and observable cells; asked of the device only when a checkpoint has been loaded."""
        if self._known is None:
            self._known = (int(self.num_updates), int(self.observable.sum()))
        return self._known

    @property
    def share(self) -> float:
        """Occupied cells over all cells, for the log."""
        return float(self.occupied.float().mean())
