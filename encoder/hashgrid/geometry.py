"""Shape of a multiresolution hash grid (Müller et al. 2022, section 3): which entry is which vertex's."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

# Spatial hash of Teschner et al. 2003, x ^ (y * p_y) ^ (z * p_z), with the primes of Müller et al. 2022,
# equation 4.
PRIME_Y = 2654435761
PRIME_Z = 805459861


@dataclass(frozen=True)
class HashGridConfig:
    """A multiresolution hash grid over the cube ``[-bound, bound]^3``."""

    num_levels: int = 12
    """Number of resolutions (1..32)."""
    features_per_level: int = 2
    """Features stored per grid vertex (1..8)."""
    log2_table_size: int = 16
    """A level keeps at most 2^this entries; finer levels share them by hashing. On a CPU 15..17: dense
    Adam walks over all of them every step."""
    base_resolution: int = 16
    """Cells per axis of the coarsest level."""
    max_resolution: int = 1024
    """Cells per axis of the finest level; levels between grow geometrically."""
    table_dtype: Literal["float32", "float16"] = "float32"
    """What the CUDA kernels read: the table itself, or a half-precision copy of it made every step, which
    halves the traffic. The table, its gradient and all sums are float32 either way; a CPU reads float32."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("num_levels", 1, 32),
            ("features_per_level", 1, 8),
            ("log2_table_size", 4, 24),
            ("base_resolution", 1, 4096),
            ("max_resolution", 1, 65536),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ValueError(f"hash_grid.{key}: must be between {low} and {high}, got {value}")
        if self.table_dtype not in ("float32", "float16"):
            raise ValueError(f"hash_grid.table_dtype: must be float32 or float16, got {self.table_dtype!r}")
        if self.max_resolution < self.base_resolution:
            raise ValueError(
                f"hash_grid.max_resolution: must not be below base_resolution {self.base_resolution}, "
                f"got {self.max_resolution}"
            )

    @property
    def growth(self) -> float:
        """Factor b from one level's resolution to the next, (N_max / N_min)^(1 / (L - 1)) (equation 3)."""
        return (self.max_resolution / self.base_resolution) ** (1.0 / max(self.num_levels - 1, 1))


@dataclass(frozen=True)
class GridTensors:
    """A :class:`GridGeometry` on a device, for kernels."""

    cells: Int32[Tensor, " L"]
    offsets: Int64[Tensor, " L"]
    masks: Int32[Tensor, " L"]
    levels: Float[Tensor, " L"]
    """0, 1, ..., L - 1."""


@dataclass(frozen=True)
class GridGeometry:
    """The levels of a grid, laid out one after another in one table of ``num_entries`` rows."""

    cells: npt.NDArray[np.int64]
    """``(L,)`` cells per axis N; a level has (N + 1)^3 vertices."""
    offsets: npt.NDArray[np.int64]
    """``(L,)`` the level's first row in the table."""
    masks: npt.NDArray[np.int64]
    """``(L,)`` 0 where every vertex has a row of its own (x fastest), else the hashed table's size - 1."""
    num_entries: int
    bound: float
    """Half the edge of the cube covered; positions outside are clamped to its faces."""
    config: HashGridConfig
    """What the levels were laid out from."""
    reads_half: bool = False
    """CUDA kernels read the table in half precision."""
    _on_device: dict[torch.device, GridTensors] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_levels(self) -> int:
        """L, coarse and fine together."""
        return len(self.cells)

    @classmethod
    def from_config(cls, config: HashGridConfig, bound: float) -> "GridGeometry":
        """Lay out the levels: N_l = floor(N_min b^l) (equation 2)."""
        table_size = 2**config.log2_table_size
        resolutions = config.base_resolution * config.growth ** np.arange(config.num_levels)
        # The small number keeps N_max itself from being rounded down to N_max - 1.
        cells = np.floor(resolutions + 1e-6).astype(np.int64)
        vertices = (cells + 1) ** 3
        is_dense = vertices <= table_size
        sizes = np.where(is_dense, vertices, table_size)
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        masks = np.where(is_dense, 0, table_size - 1).astype(np.int64)
        return cls(cells, offsets, masks, int(sizes.sum()), bound, config, config.table_dtype == "float16")

    def level_weights(self, active_levels: float) -> npt.NDArray[np.float32]:
        """Weight of each level when ``active_levels`` are open: 1, then the fraction, then 0."""
        return np.clip(active_levels - np.arange(self.num_levels), 0.0, 1.0).astype(np.float32)

    def on(self, device: torch.device) -> GridTensors:
        """The same numbers as tensors on ``device``; copied there once."""
        if device not in self._on_device:
            self._on_device[device] = GridTensors(
                torch.from_numpy(self.cells.astype(np.int32)).to(device),
                torch.from_numpy(self.offsets).to(device),
                torch.from_numpy(self.masks.astype(np.int32)).to(device),
                torch.arange(self.num_levels, dtype=torch.float32, device=device),
            )
        return self._on_device[device]

    def level_weights_on(
        self, device: torch.device, active_levels: float | Float[Tensor, ""]
    ) -> Float[Tensor, " L"]:
        """:meth:`level_weights` on ``device``; a tensor there is read there, without a copy to the host."""
        return (active_levels - self.on(device).levels).clamp(0.0, 1.0)
