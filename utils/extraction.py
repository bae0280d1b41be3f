"""Extract the zero level of a signed distance function as a triangle mesh, evaluating only near the surface.

The lattice has ``resolution`` voxels a side. A voxel-sized answer is wanted only where the surface is, so the
field is evaluated from coarse to fine: a cell of size s is split only if its corners change sign or come so
close to zero that a field of slope ``lipschitz`` could have a zero inside. Values live in bricks of 8 x 8 x 8
nodes that exist only where needed.

    coarse lattice (every 8th node) -> cells of 8 -> cells of 4 -> cells of 2 -> every node -> marching cubes

A learned field is no exact distance, so the result is closed afterwards: wherever the surface leaves the
evaluated cells through an edge, the cells beyond are evaluated as well, until none is left (no holes,
whatever the slope). Every node is evaluated once and every vertex belongs to one lattice edge, hence there
are no seams to weld.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import no_type_check

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from utils.errors import ExportError
from utils.marching_cubes import BRICK, Ints, find_node, march_bricks, read_corners
from utils.memory import Chunks
from utils.types import TriangleMesh

logger = logging.getLogger("utils.extraction")

COARSE_CELLS = 64
"""The first pass looks at no more than this many cells along each axis."""
CELLS_AT_ONCE = 200_000
"""Cells whose nodes are collected together: bounds the temporary arrays."""
MAX_BRICKS = 3_000_000
"""2 KiB each: above 6 GiB the resolution is refused instead of the machine being brought down."""


def extract_surface(
    sdf: Callable[[Tensor], Tensor],
    resolution: int,
    bound: float = 1.0,
    *,
    clip_to_sphere: bool = True,
    lipschitz: float = 1.5,
    chunks: Chunks | None = None,
    device: torch.device | str = "cpu",
) -> TriangleMesh:
    """Triangulate ``sdf = 0`` inside the box ``[-bound, bound]^3``.

    Args:
        sdf: maps float32 positions ``(P, 3)`` to values ``(P,)``, positive outside the object.
        resolution: voxels along each side of the box, any number >= 1.
        bound: half the side of the box, scene units.
        clip_to_sphere: keep only faces whose vertices all lie inside the unit sphere (a clean cut).
        lipschitz: slope up to which no part of the surface is missed; larger is safer and slower.
        chunks: points per call of ``sdf``; 2^18 unless given.
        device: where ``sdf`` wants its positions.

    Returns:
        Vertices and faces in scene space, faces counter-clockwise seen from where the field is positive.

    Raises:
        ExportError: the field has no zero inside, is not finite, or the lattice would not fit into memory.
        ValueError: ``resolution``, ``bound`` or ``lipschitz`` is not positive.
    """
    if min(resolution, bound, lipschitz) <= 0:
        raise ValueError("resolution, bound and lipschitz must be positive")
    chunks = chunks or Chunks("points", 2**18, "export.chunk")
    lattice = _Lattice(sdf, resolution, bound, 1.0 if clip_to_sphere else float("inf"), chunks, device)
    cells, coarse = _coarse_cells(lattice, lipschitz)
    logger.info(
        "extracting the surface at %d^3: %s bricks near it, up to %.2f GiB",
        resolution,
        f"{len(cells):,}",
        len(cells) / 2**19,
    )
    bricks = _Bricks(len(coarse))
    for size in (8, 4, 2):
        _evaluate_cells(lattice, bricks, cells, size, size // 2)
        if size > 2:
            reach = lipschitz * lattice.half_diagonal(size // 2)
            cells = lattice.inside(_split(cells, size // 2, bricks.table, bricks.values, reach), size // 2)
    _close(lattice, bricks)
    mesh = _triangulate(lattice, bricks)
    if len(mesh.faces) == 0:
        raise _no_surface(lattice, coarse)
    logger.info(
        "surface at %d^3: %s vertices, %s faces, %.1f M field evaluations (%.1f %% of the lattice)",
        *(resolution, f"{len(mesh.vertices):,}", f"{len(mesh.faces):,}", lattice.num_evaluated / 1e6),
        100.0 * lattice.num_evaluated / (resolution + 1) ** 3,
    )
    return mesh


@dataclass
class _Lattice:
    """The field on the nodes ``0..resolution`` of a regular lattice over the box."""

    sdf: Callable[[Tensor], Tensor]
    resolution: int
    bound: float
    clip_radius: float
    chunks: Chunks
    device: torch.device | str
    num_evaluated: int = 0

    @property
    def voxel(self) -> float:
        return 2.0 * self.bound / self.resolution

    def half_diagonal(self, size: int) -> float:
        """Largest distance from a point of a cell of ``size`` voxels to its nearest corner, scene units."""
        return 0.5 * 3.0**0.5 * size * self.voxel

    def positions(self, nodes: npt.NDArray[np.floating] | Ints) -> npt.NDArray[np.float64]:
        """Scene positions of lattice coordinates; those beyond the last node are held at the wall."""
        return np.minimum(nodes, self.resolution) * self.voxel - self.bound

    def evaluate(self, nodes: Ints) -> npt.NDArray[np.float32]:
        """Field values ``(P,)`` at nodes ``(P, 3)``."""

        def values_of(part: slice) -> npt.NDArray[np.float32]:
            positions = torch.from_numpy(self.positions(nodes[part]).astype(np.float32)).to(self.device)
            with torch.no_grad():
                return self.sdf(positions).reshape(-1).float().cpu().numpy()

        values = np.empty(len(nodes), np.float32)
        for part, found in self.chunks.results(values_of, len(nodes)):
            values[part] = found
        self.num_evaluated += len(nodes)
        if not np.isfinite(values).all():
            raise ExportError(
                "mesh",
                "the signed distance field has values that are not finite",
                "use an earlier checkpoint",
            )
        return values

    def inside(self, cells: Ints, size: int) -> Ints:
        """Those cells (low corners ``(M, 3)``) that reach into the box and the clipping sphere."""
        low, high = self.positions(cells), self.positions(cells + size)
        nearest = np.maximum(np.maximum(low, -high), 0.0)
        in_box = (cells < self.resolution).all(axis=1)
        return cells[in_box & ((nearest**2).sum(axis=1) < self.clip_radius**2)]


@dataclass
class _Bricks:
    """Sparse values: ``values[slot]`` holds the 8^3 nodes of the brick at ``coords[slot]``, NaN = unknown."""

    num_along: int
    coords: Ints = field(default_factory=lambda: np.empty((0, 3), np.int64))
    values: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty((0, BRICK**3), np.float32))

    def __post_init__(self) -> None:
        self.table = np.full((self.num_along,) * 3, -1, np.int32)

    def touching(self, low: Ints, high: Ints) -> Ints:
        """Linear ids of all bricks with a node in the boxes from ``low`` to ``high`` (< 8 apart)."""
        first, last = np.maximum(low >> 3, 0), np.minimum(high >> 3, self.num_along - 1)
        ids = np.concatenate([self._linear(first, last, corner) for corner in range(8)])
        return np.unique(ids)

    def _linear(self, first: Ints, last: Ints, corner: int) -> Ints:
        x, y, z = ((last if corner >> axis & 1 else first)[:, axis] for axis in range(3))
        return np.unique((x * self.num_along + y) * self.num_along + z)

    def reserve(self, cells: Ints, size: int) -> None:
        """Make room for all nodes of the cells."""
        ids = self.touching(cells, cells + size)
        ids = ids[self.table.reshape(-1)[ids] < 0]
        count = len(self.coords) + len(ids)
        if count > MAX_BRICKS:
            need = f"{count * 4 * BRICK**3 / 2**30:.0f} GiB or more"
            raise ExportError("export.resolution", f"the field near its zero level needs {need}", "lower it")
        self.table.reshape(-1)[ids] = np.arange(len(self.coords), count)
        self.coords = np.concatenate([self.coords, np.stack(np.unravel_index(ids, self.table.shape), axis=1)])
        grown = np.full((count, BRICK**3), np.nan, np.float32)
        grown[: len(self.values)] = self.values
        self.values = grown

    def nodes(self, flat: Ints) -> Ints:
        """Lattice coordinates ``(P, 3)`` of indices into the flattened ``values``."""
        local = np.stack([flat >> 6 & 7, flat >> 3 & 7, flat & 7], axis=1)
        return self.coords[flat >> 9] * BRICK + local


def _coarse_cells(lattice: _Lattice, lipschitz: float) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Cells of 8 voxels that may hold the surface, and the values of every 8th node (NaN = unknown)."""
    stride = 1
    while lattice.resolution > COARSE_CELLS * BRICK * stride:
        stride *= 2
    num_cells = -(-lattice.resolution // (BRICK * stride)) * stride
    coarse = np.full((num_cells + 1,) * 3, np.nan, np.float32)
    keep = np.ones((num_cells // stride,) * 3, bool)
    while True:
        wanted = np.zeros_like(coarse, bool)
        for corner in np.ndindex(2, 2, 2):
            view = wanted[tuple(slice(stride * c, num_cells + stride * c, stride) for c in corner)]
            view |= keep
        nodes = np.argwhere(wanted & np.isnan(coarse))
        coarse[tuple(nodes.T)] = lattice.evaluate(nodes * BRICK)
        corners = [
            coarse[tuple(slice(stride * c, num_cells + stride * c, stride) for c in corner)]
            for corner in np.ndindex(2, 2, 2)
        ]
        # NaN compares false: cells that were dropped at a coarser level stay dropped.
        nearest = np.abs(corners[0])
        for values in corners[1:]:
            nearest = np.minimum(nearest, np.abs(values))
        mixed = (np.minimum.reduce(corners) < 0) & (np.maximum.reduce(corners) >= 0)
        keep = mixed | (nearest <= lipschitz * lattice.half_diagonal(BRICK * stride))
        if stride == 1:
            return lattice.inside(np.argwhere(keep) * BRICK, BRICK), coarse
        stride //= 2
        keep = keep.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)


def _evaluate_cells(lattice: _Lattice, bricks: _Bricks, cells: Ints, size: int, step: int) -> None:
    """Evaluate every ``step``-th node of the cells where it is not yet known."""
    bricks.reserve(cells, size)
    for start in range(0, len(cells), CELLS_AT_ONCE):
        flat = _request(cells[start : start + CELLS_AT_ONCE], size, step, bricks.table, bricks.values)
        bricks.values.reshape(-1)[flat] = lattice.evaluate(bricks.nodes(flat))


def _close(lattice: _Lattice, bricks: _Bricks) -> None:
    """Follow the surface out of the evaluated cells until it no longer leaves them."""
    slots = np.arange(len(bricks.coords))
    nothing = np.empty((0, 3), np.int64)
    while True:
        args = (slots, bricks.coords, bricks.table, bricks.values, lattice.resolution)
        cells = np.empty((_open_cells(*args, nothing), 3), np.int64)
        _open_cells(*args, cells)
        cells = lattice.inside(np.unique(cells, axis=0), 2)
        if len(cells) == 0:
            return
        _evaluate_cells(lattice, bricks, cells, 2, 1)
        # A new crossing has a new node at one end, so its owner lies at most one node before the new cells.
        slots = bricks.table.reshape(-1)[bricks.touching(cells - 1, cells + 2)].astype(np.int64)
        slots = slots[slots >= 0]


def _triangulate(lattice: _Lattice, bricks: _Bricks) -> TriangleMesh:
    """Marching cubes over all voxels whose eight corners are known, cut at the clipping sphere."""
    nodes, faces = march_bricks(bricks.coords, bricks.table, bricks.values, lattice.resolution)
    vertices = lattice.positions(nodes)
    inside = (vertices**2).sum(axis=1) < lattice.clip_radius**2
    kept = faces[inside[faces].all(axis=1)]
    if len(kept) < len(faces):
        logger.info(
            "the unit sphere cut the surface: %s faces at its wall dropped", f"{len(faces) - len(kept):,}"
        )
    used = np.zeros(len(vertices), bool)
    used[kept] = True
    return TriangleMesh(vertices[used], (np.cumsum(used) - 1)[kept])


def _no_surface(lattice: _Lattice, coarse: npt.NDArray[np.float32]) -> ExportError:
    """The error for a field without a zero inside the region, with what the field looks like there."""
    nodes = np.argwhere(~np.isnan(coarse))
    values = coarse[tuple(nodes.T)]
    in_region = (lattice.positions(nodes * BRICK) ** 2).sum(axis=1) < lattice.clip_radius**2
    values = values[in_region] if in_region.any() else values
    low, p5, p50, p95, high = np.percentile(values, (0, 5, 50, 95, 100))
    if low > 0:
        cause = "all outside: nothing was reconstructed, or the object lies outside the unit sphere"
    elif high < 0:
        cause = "all inside: the field is inside-out, or the region lies wholly within the object"
    else:
        cause = "it changes sign only at the edge of the region, or in parts thinner than a voxel"
    return ExportError(
        "mesh",
        f"the signed distance has no zero level inside the region: min {low:.4g}, 5 % {p5:.4g}, "
        f"median {p50:.4g}, 95 % {p95:.4g}, max {high:.4g} ({cause})",
        "check the scene's scale, centre and masks, or train longer (or lower a radiance field's "
        "model.surface_density)",
    )


@no_type_check
@njit(cache=True)
def _request(cells, size, step, table, values):
    """Flat indices of the cells' nodes that are unknown, each once (infinity until they are set)."""
    count, found = 0, np.empty(len(cells) * (size // step + 1) ** 3, np.int64)
    for m in range(len(cells)):
        for dx in range(0, size + 1, step):
            for dy in range(0, size + 1, step):
                for dz in range(0, size + 1, step):
                    at = find_node(cells[m, 0] + dx, cells[m, 1] + dy, cells[m, 2] + dz, table)
                    if np.isnan(values[at >> 9, at & 511]):
                        values[at >> 9, at & 511] = np.inf
                        found[count] = at
                        count += 1
    return found[:count].copy()


@no_type_check
@njit(cache=True)
def _split(cells, half, table, values, reach):
    """Those octants (of ``half`` voxels) of the cells that change sign or come within ``reach`` of zero."""
    count, found, corners = 0, np.empty((8 * len(cells), 3), np.int64), np.empty(8, np.float32)
    for m in range(len(cells)):
        for octant in range(8):
            x = cells[m, 0] + (octant & 1) * half
            y = cells[m, 1] + (octant >> 1 & 1) * half
            z = cells[m, 2] + (octant >> 2 & 1) * half
            read_corners(x, y, z, half, table, values, corners)
            mixed = corners.min() < 0 <= corners.max()
            if mixed or np.abs(corners).min() <= reach:
                found[count, 0], found[count, 1], found[count, 2] = x, y, z
                count += 1
    return found[:count].copy()


@no_type_check
@njit(cache=True)
def _open_cells(slots, coords, table, values, resolution, found):
    """Cells of 2 voxels with an unknown node beside a lattice edge that the surface crosses.

    Only edges owned by the bricks ``slots`` are looked at. Cells are written to ``found`` as far as there is
    room (with repetitions); the number of them all is returned.
    """
    count, corners, voxel = 0, np.empty(8, np.float32), np.empty(3, np.int64)
    for slot in slots:
        for local in range(512):
            value = values[slot, local]
            if np.isnan(value):
                continue
            x = coords[slot, 0] * 8 + (local >> 6)
            y = coords[slot, 1] * 8 + (local >> 3 & 7)
            z = coords[slot, 2] * 8 + (local & 7)
            for axis in range(3):
                ex, ey, ez = np.int64(axis == 0), np.int64(axis == 1), np.int64(axis == 2)
                if max(x + ex, y + ey, z + ez) > resolution:
                    continue
                at = find_node(x + ex, y + ey, z + ez, table)
                if at < 0 or np.isnan(values[at >> 9, at & 511]):
                    continue
                if (value < 0) == (values[at >> 9, at & 511] < 0):
                    continue
                for side in range(4):  # The four voxels around the edge.
                    voxel[0], voxel[1], voxel[2] = x, y, z
                    voxel[(axis + 1) % 3] -= side & 1
                    voxel[(axis + 2) % 3] -= side >> 1
                    if voxel.min() < 0 or voxel.max() >= resolution:
                        continue
                    if not read_corners(voxel[0], voxel[1], voxel[2], 1, table, values, corners):
                        if count < len(found):
                            found[count] = voxel & ~1
                        count += 1
    return count
