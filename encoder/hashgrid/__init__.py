"""Multiresolution hash grid (Müller et al. 2022, "Instant Neural Graphics Primitives"), in several versions.

``reference.py`` is plain PyTorch; ``cpu.py`` (Numba) and ``cuda.py`` (Triton) offer raw operations that share
their derivatives in ``autograd.py``; ``tinycudann.py`` leads to tiny-cuda-nn. A row of the encoding is the
position divided by the grid's bound (3 numbers), then each level's F interpolated features.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from encoder.hashgrid import autograd
from encoder.hashgrid.geometry import GridGeometry, HashGridConfig
from utils.backend import available_anywhere, available_on_cpu, available_on_gpu, implementation
from utils.padding import zero_padding

__all__ = [
    "IMPLEMENTATIONS",
    "OPTIONAL",
    "GridGeometry",
    "HashGrid",
    "HashGridConfig",
    "encode",
    "num_table_entries",
]

IMPLEMENTATIONS = {"cpu": available_on_cpu, "cuda": available_on_gpu, "reference": available_anywhere}
"""In order of preference: name -> ``available(device)``, which returns ``None`` or the reason why not."""


def _tinycudann_available(device: torch.device) -> str | None:
    return implementation(__name__, "tinycudann").available(device)


OPTIONAL = {"tinycudann": _tinycudann_available}
"""The same for optional libraries, which serve only whoever names them."""


def num_table_entries(geometry: GridGeometry, backend: str) -> int:
    """Rows of the table: tiny-cuda-nn lays its levels out in its own way, all others as ``geometry`` says."""
    if backend == "tinycudann":
        return implementation(__name__, backend).num_table_entries(geometry)
    return geometry.num_entries


def encode(
    positions: Float[Tensor, "S 3"],
    table: Float[Tensor, "entries F"],
    geometry: GridGeometry,
    active_levels: float | Float[Tensor, ""],
    backend: str,
    count: Int64[Tensor, ""] | None = None,
) -> Float[Tensor, "S W"]:
    """Encode positions; differentiable twice with respect to positions and table.

    Args:
        positions: in ``[-geometry.bound, geometry.bound]``; outside, features are those of the
            nearest face and their derivative is zero.
        table: all levels' entries. The CPU version takes float32 only, tiny-cuda-nn its own layout.
        active_levels: how many levels are open (coarse to fine), 0..L; a fractional part fades
            the next one in; closed levels give zeros.
        backend: a key of :data:`IMPLEMENTATIONS` or :data:`OPTIONAL`.
        count: rows of ``positions`` from here on are padding: they are encoded as zeros and give no
            gradient. ``None``: there is none.

    Returns:
        ``(S, 3 + L * F)``: position / bound, then level 0's features, level 1's, ...

    Raises:
        ValueError: for an unknown backend, or a table that does not fit the geometry.
        BackendError: tiny-cuda-nn does not support the grid.

    Source: Müller et al. 2022, equations 1-4; coarse to fine: Neuralangelo (Li et al. 2023, section 3.3).
    """
    known = IMPLEMENTATIONS.keys() | OPTIONAL.keys()
    if backend not in known:
        raise ValueError(f"hash grid: backend must be one of {sorted(known)}, got {backend!r}")
    entries = num_table_entries(geometry, backend)
    if len(table) != entries:
        raise ValueError(f"hash grid: table must have {entries} rows, got {len(table)}")
    module = implementation(__name__, backend)
    if backend in ("cpu", "cuda"):
        return autograd.encode(positions, table, autograd.Grid(module, geometry, active_levels, count))
    if count is None:
        return module.encode(positions, table, geometry, active_levels)
    # What padding holds must reach neither the results nor, as NaN times zero, the table's gradient.
    encoded = module.encode(zero_padding(positions, count), table, geometry, active_levels)
    return zero_padding(encoded, count)


class HashGrid(nn.Module):
    """A hash grid's trainable table together with its geometry and backend."""

    def __init__(self, config: HashGridConfig, bound: float, backend: str) -> None:
        super().__init__()
        self.geometry = GridGeometry.from_config(config, bound)
        self.backend = backend
        entries = num_table_entries(self.geometry, backend)
        # U(-1e-4, 1e-4): small enough for the sphere initialisation to hold, not zero, so that levels can
        # come to differ.
        self.table = nn.Parameter(torch.empty(entries, config.features_per_level).uniform_(-1e-4, 1e-4))
        self.width = 3 + config.num_levels * config.features_per_level

    @property
    def num_levels(self) -> int:
        """L, coarse and fine together."""
        return self.geometry.num_levels

    def forward(
        self,
        positions: Float[Tensor, "S 3"],
        active_levels: float | Float[Tensor, ""],
        count: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, "S W"]:
        """See :func:`encode`."""
        return encode(positions, self.table, self.geometry, active_levels, self.backend, count)
