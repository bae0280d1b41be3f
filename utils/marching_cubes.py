"""Marching cubes on sparse bricks of a regular lattice: no seams, every vertex once.

Lorensen & Cline, "Marching cubes", SIGGRAPH 1987, with a table made here instead of the published ones: on an
ambiguous face the negative corners are always separated, which both voxels sharing the face agree on (no
holes), and polygons are cut so that no diagonal lies in a voxel face where that can be avoided (no edge with
four triangles).

A brick holds the values of 8 x 8 x 8 lattice nodes. ``coords`` (M, 3) says which brick a slot is, ``table``
(B, B, B) leads back from a brick to its slot (-1 = no such brick), ``values`` (M, 512) are the field's
values, x slowest, NaN where unknown. A vertex lies on a lattice edge, and an edge belongs to its lower node.
"""

from functools import lru_cache
from typing import no_type_check

import numpy as np
import numpy.typing as npt
from numba import njit

BRICK = 8
"""Nodes along a brick; the kernels' shifts and masks (3 bits an axis, 9 a brick) depend on it."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def march_bricks(
    coords: Ints, table: npt.NDArray[np.int32], values: npt.NDArray[np.float32], resolution: int
) -> tuple[Floats, Ints]:
    """Triangulate the zero level in all voxels of the lattice ``0..resolution`` whose corners are known.

    Returns:
        Vertices ``(V, 3)`` in lattice units and faces ``(F, 3)``, counter-clockwise seen from the positive
        side. Their order depends on the lattice alone, not on the order of the bricks. Vertices may be
        unused.
    """
    order = np.lexsort(coords.T[::-1])
    starts = np.zeros(len(coords) + 1, np.int64)
    ends = np.zeros(len(coords) + 1, np.int64)
    grid = (order, coords, table, values, resolution)
    count = _crossings(*grid, starts, ends, np.empty(0, np.int16), np.empty((0, 3)))
    keys, vertices = np.empty(count, np.int16), np.empty((count, 3))
    _crossings(*grid, starts, ends, keys, vertices)
    triangles, owners = marching_table()
    lookup = (triangles, owners, starts, ends, keys)
    faces = np.empty((_polygons(*grid, *lookup, np.empty((0, 3), np.int64)), 3), np.int64)
    _polygons(*grid, *lookup, faces)
    return vertices, faces


@lru_cache(maxsize=1)
def marching_table() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """The 256 cases of marching cubes; corner c of a voxel sits at ``(c & 1, c >> 1 & 1, c >> 2 & 1)``.

    Returns:
        ``(256, 18)`` edges of the triangles, three each, ended by -1, where bit c of the case says that
        corner c is negative; and ``(12, 4)`` the node that owns each edge as an offset (x, y, z), and the
        edge's axis.
    """
    edges = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> axis & 1]
    edge_of = {frozenset((c, c | 1 << axis)): number for number, (c, axis) in enumerate(edges)}
    rings = []
    for axis in range(3):
        b, c = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        rings.append(
            [1 << axis, 1 << axis | b, 1 << axis | b | c, 1 << axis | c]
        )  # Counter-clockwise from outside.
        rings.append([0, c, b | c, b])
    faces_of = [{f for f, ring in enumerate(rings) if {c, c | 1 << axis} <= set(ring)} for c, axis in edges]
    triangles = np.full((256, 18), -1, np.int8)
    for case in range(256):
        following: dict[int, int] = {}
        for ring in rings:
            # Each run of negative corners around the face is cut off by one segment, from where it starts to
            # where it ends, so that loops run counter-clockwise seen from the positive side.
            signs = [case >> corner & 1 for corner in ring]
            sides = [edge_of[frozenset((ring[i], ring[(i + 1) % 4]))] for i in range(4)]
            for i in range(4):
                if signs[i] and not signs[(i + 1) % 4]:
                    j = next(j for j in range(i - 1, i - 4, -1) if not signs[j])
                    following[sides[j]] = sides[i]
        found: list[int] = []
        while following:
            edge, loop = next(iter(following)), []
            while edge in following:
                loop.append(edge)
                edge = following.pop(edge)
            found += _cut_polygon(tuple(loop), faces_of)[1]
        triangles[case, : len(found)] = found
    owners = [[c & 1, c >> 1 & 1, c >> 2 & 1, axis] for c, axis in edges]
    return triangles, np.array(owners, np.int8)


def _cut_polygon(loop: tuple[int, ...], faces_of: list[set[int]]) -> tuple[int, list[int]]:
    """Cut a loop of voxel edges so that the fewest diagonals lie in a voxel face; (their number, edges)."""
    if len(loop) < 3:
        return 0, []
    best: tuple[int, list[int]] | None = None
    for k in range(1, len(loop) - 1):
        flat = sum(
            bool(faces_of[loop[i]] & faces_of[loop[j]]) for i, j in ((0, k), (k, len(loop) - 1)) if j - i > 1
        )
        left, right = _cut_polygon(loop[: k + 1], faces_of), _cut_polygon(loop[k:], faces_of)
        cost = flat + left[0] + right[0]
        if best is None or cost < best[0]:
            best = cost, [loop[0], loop[k], loop[-1], *left[1], *right[1]]
    assert best is not None
    return best


@no_type_check
@njit(cache=True)
def find_node(x, y, z, table):
    """Index of a node in the flattened values, -1 where its brick does not exist."""
    slot = table[x >> 3, y >> 3, z >> 3]
    if slot < 0:
        return np.int64(-1)
    return np.int64(slot) << 9 | (x & 7) << 6 | (y & 7) << 3 | (z & 7)


@no_type_check
@njit(cache=True)
def read_corners(x, y, z, size, table, values, corners):
    """Fill the eight corner values of a cell; false if one is unknown."""
    for c in range(8):
        at = find_node(x + (c & 1) * size, y + (c >> 1 & 1) * size, z + (c >> 2 & 1) * size, table)
        if at < 0:
            return False
        corners[c] = values[at >> 9, at & 511]
        if np.isnan(corners[c]):
            return False
    return True


@no_type_check
@njit(cache=True)
def _crossings(order, coords, table, values, resolution, starts, ends, keys, vertices):
    """Vertices on the edges that change sign, brick by brick; returns their number.

    The vertices of the brick at ``slot`` are ``starts[slot]:ends[slot]``, ``keys`` (3 * local node + axis)
    ascending among them. With empty ``keys`` they are only counted.
    """
    count = 0
    for slot in order:
        starts[slot] = count
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
                other = values[at >> 9, at & 511]
                if (value < 0) == (other < 0):
                    continue
                if len(keys) > 0:
                    # A vertex exactly on a node would give triangles without area.
                    t = min(max(np.float64(value) / (np.float64(value) - np.float64(other)), 1e-4), 1 - 1e-4)
                    keys[count] = 3 * local + axis
                    vertices[count, 0], vertices[count, 1], vertices[count, 2] = (
                        x + t * ex,
                        y + t * ey,
                        z + t * ez,
                    )
                count += 1
        ends[slot] = count
    return count


@no_type_check
@njit(cache=True)
def _polygons(order, coords, table, values, resolution, triangles, owners, starts, ends, keys, faces):
    """Triangles of all known voxels; returns their number. With empty ``faces`` they are only counted."""
    count, corners = 0, np.empty(8, np.float32)
    for slot in order:
        for local in range(512):
            x = coords[slot, 0] * 8 + (local >> 6)
            y = coords[slot, 1] * 8 + (local >> 3 & 7)
            z = coords[slot, 2] * 8 + (local & 7)
            if np.isnan(values[slot, local]) or max(x, y, z) >= resolution:
                continue
            if not read_corners(x, y, z, 1, table, values, corners):
                continue
            case = 0
            for c in range(8):
                case |= np.int64(corners[c] < 0) << c
            for i in range(0, 18, 3):
                if triangles[case, i] < 0:
                    break
                if len(faces) > 0:
                    for j in range(3):
                        owner = owners[triangles[case, i + j]]
                        at = find_node(x + owner[0], y + owner[1], z + owner[2], table)
                        low, high = starts[at >> 9], ends[at >> 9]
                        key = 3 * (at & 511) + owner[3]
                        faces[count, j] = low + np.searchsorted(keys[low:high], key)
                count += 1
    return count
