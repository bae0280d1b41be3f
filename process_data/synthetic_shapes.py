"""Building blocks of the synthetic scenes: solids with exact distances, blends that keep a bound, and noise.

Source: Quilez, "Distance functions" and "Smooth minimum", 2008-2020.
"""

import math
from typing import no_type_check

from numba import njit


@no_type_check
@njit(cache=True, fastmath=True)
def smooth_min(a, b, k):
    """Quadratic smooth union; its gradient is a convex combination of both, so the bound survives."""
    h = max(k - abs(a - b), 0.0) / k
    return min(a, b) - 0.25 * k * h * h


@no_type_check
@njit(cache=True, fastmath=True)
def smooth_max(a, b, k):
    """Quadratic smooth intersection."""
    return -smooth_min(-a, -b, k)


@no_type_check
@njit(cache=True, fastmath=True)
def smoothstep(low, high, value):
    """0 at ``low``, 1 at ``high``, a cubic between them; ``low > high`` falls instead."""
    s = min(max((value - low) / (high - low), 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


@no_type_check
@njit(cache=True, fastmath=True)
def ball(x, y, z, cx, cy, cz, radius):
    """Exact distance to a ball about (cx, cy, cz)."""
    return math.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) - radius


@no_type_check
@njit(cache=True, fastmath=True)
def cone(x, y, z, ax, ay, az, ra, bx, by, bz, rb):
    """Exact distance to the convex hull of two balls (a, ra) and (b, rb)."""
    dx, dy, dz = bx - ax, by - ay, bz - az
    length2 = dx * dx + dy * dy + dz * dz
    dr = ra - rb
    slant2 = length2 - dr * dr
    px, py, pz = x - ax, y - ay, z - az
    along = px * dx + py * dy + pz * dz
    beyond = along - length2
    ex, ey, ez = px * length2 - dx * along, py * length2 - dy * along, pz * length2 - dz * along
    across2 = ex * ex + ey * ey + ez * ez
    border = math.copysign(dr * dr, dr) * across2
    if math.copysign(slant2, beyond) * beyond * beyond * length2 > border:
        return math.sqrt(across2 + beyond * beyond * length2) / length2 - rb
    if math.copysign(slant2, along) * along * along * length2 < border:
        return math.sqrt(across2 + along * along * length2) / length2 - ra
    return (math.sqrt(across2 * slant2 / length2) + along * dr) / length2 - ra


@no_type_check
@njit(cache=True, fastmath=True)
def disc(radial, z, radius, half_height, rounding):
    """Exact distance to a cylinder about z with a rounded rim; ``radial`` is the distance to the axis."""
    u = radial - radius + rounding
    v = abs(z) - half_height + rounding
    return min(max(u, v), 0.0) + math.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2) - rounding


@no_type_check
@njit(cache=True, fastmath=True)
def block(x, y, z, hx, hy, hz, rounding):
    """Exact distance to a box about the origin of half sizes (hx, hy, hz) with rounded edges."""
    u, v, w = abs(x) - hx + rounding, abs(y) - hy + rounding, abs(z) - hz + rounding
    outside = math.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2 + max(w, 0.0) ** 2)
    return min(max(u, v, w), 0.0) + outside - rounding


@no_type_check
@njit(cache=True, fastmath=True)
def ring(radial, z, radius, thickness):
    """Exact distance to a torus; ``radial`` is the distance to its axis, ``z`` the height along it."""
    return math.sqrt((radial - radius) ** 2 + z * z) - thickness


@no_type_check
@njit(cache=True, fastmath=True)
def segment(x, y, ax, ay, bx, by):
    """Distance to a segment in the plane."""
    dx, dy = bx - ax, by - ay
    t = min(max(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0.0), 1.0)
    return math.sqrt((x - ax - t * dx) ** 2 + (y - ay - t * dy) ** 2)


@no_type_check
@njit(cache=True)
def _lattice(i, j, k):
    """A number in 0..1 for each lattice point: a hash of its coordinates in 32 bits."""
    h = (i * 374761393 + j * 668265263 + k * 1440662683) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 461845907) & 0xFFFFFFFF
    return (h ^ (h >> 16)) / 4294967295.0


@no_type_check
@njit(cache=True, fastmath=True)
def noise(x, y, z):
    """Value noise, 0..1, with cells of size 1: smooth, without direction or period.

    Source: Perlin, "An image synthesizer", SIGGRAPH 1985, on values instead of gradients.
    """
    fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
    i, j, k = int(fx), int(fy), int(fz)
    u, v, w = smoothstep(0.0, 1.0, x - fx), smoothstep(0.0, 1.0, y - fy), smoothstep(0.0, 1.0, z - fz)
    total = 0.0
    for di in range(2):
        for dj in range(2):
            for dk in range(2):
                weight = (u if di else 1.0 - u) * (v if dj else 1.0 - v) * (w if dk else 1.0 - w)
                total += weight * _lattice(i + di, j + dj, k + dk)
    return total


@no_type_check
@njit(cache=True, fastmath=True)
def grain(x, y, z):
    """Noise of three sizes (0.1, 0.05 and 0.025), 0..1 and well spread: a texture that stereo can match."""
    value = 0.45 * noise(10.0 * x, 10.0 * y, 10.0 * z) + 0.33 * noise(20.0 * x + 7.0, 20.0 * y, 20.0 * z)
    value += 0.22 * noise(41.0 * x, 41.0 * y + 5.0, 41.0 * z)
    return smoothstep(0.22, 0.78, value)


@no_type_check
@njit(cache=True, fastmath=True)
def mix(a, b, t):
    """The colour between ``a`` (t = 0) and ``b`` (t = 1)."""
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


@no_type_check
@njit(cache=True, fastmath=True)
def add(total, color, weight):
    """The colour ``total`` plus ``weight`` times ``color``."""
    return total[0] + weight * color[0], total[1] + weight * color[1], total[2] + weight * color[2]


@no_type_check
@njit(cache=True, fastmath=True)
def part_weight(value, nearest):
    """Weight of a part's colour: parts fade into each other over about 0.02."""
    return math.exp((nearest - max(value, 0.0)) / 0.006)
