"""The synthetic scenes as functions of space: distance and colour, compiled with Numba.

Every scene is a scalar field ``distance(scene, x, y, z)``, negative inside, whose zero level *is* the ground
truth. Frame: scene space, z up, what has a face looks along -y. Primitives (``synthetic_shapes``) have exact
distances; smooth unions, smooth cuts and relief turn the sum into a *bound*: it never exceeds the true
distance (Lipschitz constant at most 1, so that sphere tracing is safe). At the surface the figurine's slope
is ``synthetic_figurine.LIPSCHITZ`` where the surface is plain, a little more or less on relief, and down to
0.15 in crevices, where a smooth union averages opposed normals; the other scenes' is 1 outside of crevices.

The compiled functions carry no annotations: Numba types them by their call. Its on-disk cache notices a
change in a function's own file only, by its content; after an edit in one of the synthetic files, delete
``process_data/__pycache__/synthetic_*.nb*`` (a test compares the compiled with what is written).
"""

import math
from typing import no_type_check

from numba import njit

from process_data.synthetic_figurine import figurine, figurine_color, table
from process_data.synthetic_scenes import (
    glossy,
    glossy_color,
    niche,
    niche_color,
    room,
    room_color,
    thin,
    thin_color,
    wall,
    wall_color,
)
from process_data.synthetic_shapes import mix, smooth_min, smoothstep

FIGURINE, SPHERE, FIGURINE_TABLE, THIN, GLOSSY, WALL, NICHE, ROOM = range(8)
SPHERE_RADIUS = 0.5
_FIGURINE_BOX = ((-0.56, -0.56, -0.82), (0.56, 0.56, 0.78))
BOXES = (
    _FIGURINE_BOX,
    _FIGURINE_BOX,
    _FIGURINE_BOX,
    ((-0.51, -0.51, -0.76), (0.51, 0.51, 0.87)),
    ((-0.68, -0.68, -0.55), (0.68, 0.68, 0.31)),
    ((-0.68, -0.48, -0.60), (0.68, 0.38, 0.58)),
    ((-0.54, -0.50, -0.70), (0.54, 0.50, 0.72)),
    ((-0.60, -0.50, -0.43), (0.60, 0.50, 0.43)),
)
"""By scene: the lowest and the highest corner of a box that it lies in."""


@no_type_check
@njit(cache=True, fastmath=True)
def distance(scene, x, y, z):
    """The field of a scene at one point: 0 on the surface, elsewhere at most the distance to it."""
    if scene == SPHERE:
        return math.sqrt(x * x + y * y + z * z) - SPHERE_RADIUS
    if scene == THIN:
        return thin(x, y, z)
    if scene == GLOSSY:
        return glossy(x, y, z)
    if scene == WALL:
        return wall(x, y, z)
    if scene == NICHE:
        return niche(x, y, z)
    if scene == ROOM:
        return room(x, y, z)
    value = figurine(x, y, z)
    if scene == FIGURINE_TABLE:
        value = smooth_min(value, table(x, y, z), 0.02)
    return value


@no_type_check
@njit(cache=True, fastmath=True)
def gradient(scene, x, y, z):
    """Gradient by four taps at the corners of a tetrahedron; its error is the step times the curvature."""
    e = 1e-5
    a = distance(scene, x + e, y - e, z - e)
    b = distance(scene, x - e, y - e, z + e)
    c = distance(scene, x - e, y + e, z - e)
    d = distance(scene, x + e, y + e, z + e)
    s = 0.25 / e
    return s * (a - b - c + d), s * (c + d - a - b), s * (b + d - a - c)


@no_type_check
@njit(cache=True, fastmath=True)
def albedo(scene, x, y, z):
    """Linear RGB reflectance at a point of the surface, 0..1."""
    if scene == SPHERE:
        return (
            0.5 + 0.3 * math.sin(6.0 * x + 1.0),
            0.5 + 0.3 * math.sin(7.0 * y + 2.0 * z),
            0.5 + 0.3 * math.cos(8.0 * z - 3.0 * x),
        )
    if scene == THIN:
        return thin_color(x, y, z)
    if scene == GLOSSY:
        return glossy_color(x, y, z)
    if scene == WALL:
        return wall_color(x, y, z)
    if scene == NICHE:
        return niche_color(x, y, z)
    if scene == ROOM:
        return room_color(x, y, z)
    color = figurine_color(x, y, z)
    if scene == FIGURINE_TABLE:
        weave = 0.5 + 0.5 * math.sin(22.0 * x) * math.sin(22.0 * y)
        cloth = mix((0.30, 0.34, 0.30), (0.62, 0.60, 0.48), weave)
        color = mix(color, cloth, smoothstep(-0.735, -0.745, z))
    return color
