"""The synthetic scenes as functions of space: distance and colour, compiled with Numba.

Every scene is a scalar field ``distance(scene, x, y, z)``, negative inside, whose zero level *is* the ground
truth. Frame: scene space, z up, the figurine looks along -y. Primitives (after Quilez, "Distance functions",
2008-2020) have exact distances; smooth unions, smooth cuts and relief turn the sum into a *bound*: it never
exceeds the true distance (Lipschitz constant at most 1, so that sphere tracing is safe). At the surface its
slope is LIPSCHITZ where the surface is plain, a little more or less on relief, and down to 0.15 in crevices,
where a smooth union averages opposed normals.

The compiled functions carry no annotations: Numba types them by their call. Its on-disk cache notices a
change in a function's own file only; after an edit here, save ``synthetic_render.py`` too (a test compares
the two).

The figurine, an owl jug, from its left side (numbers are scene units)::

        z
     0.75       /|          ear tufts, thin at their ends (0.05)
     0.58   .--' `-. )      the jug's mouth: a bowl cut 0.25 deep into the head
     0.33  (o)      |--.    eyes in sockets; handle: a torus, hole 0.27 wide (the mesh has genus 1)
     0.10   >  wing |   )
    -0.10  (  ///// |--'    wings with grooves; belly with an egg-crate relief
    -0.40   \\ ////  /==     tail feathers standing free over the plinth
    -0.57 __`------'____    toes; beside them a tulip on a stem 0.044 thick
    -0.74 ||||||||||||||    fluted plinth, radius 0.39
           -y  <-   -> +y
"""

import math
from typing import no_type_check

from numba import njit

FIGURINE, SPHERE, FIGURINE_TABLE = 0, 1, 2
SPHERE_RADIUS = 0.5
BOX_LOW, BOX_HIGH = (-0.56, -0.56, -0.82), (0.56, 0.56, 0.78)
"""All scenes lie inside this box."""

LIPSCHITZ = 0.84
"""Relief steepens the field; the sum is scaled by this so that its slope stays below 1 (tests sample it)."""

# ------------------------------------------------------------------------------------------------- primitives


@no_type_check
@njit(cache=True, fastmath=True)
def _smooth_min(a, b, k):
    """Quadratic smooth union; its gradient is a convex combination of both, so the bound survives."""
    h = max(k - abs(a - b), 0.0) / k
    return min(a, b) - 0.25 * k * h * h


@no_type_check
@njit(cache=True, fastmath=True)
def _smooth_max(a, b, k):
    """Quadratic smooth intersection."""
    return -_smooth_min(-a, -b, k)


@no_type_check
@njit(cache=True, fastmath=True)
def smoothstep(low, high, value):
    """0 at ``low``, 1 at ``high``, a cubic between them; ``low > high`` falls instead."""
    s = min(max((value - low) / (high - low), 0.0), 1.0)
    return s * s * (3.0 - 2.0 * s)


@no_type_check
@njit(cache=True, fastmath=True)
def _ball(x, y, z, cx, cy, cz, radius):
    return math.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) - radius


@no_type_check
@njit(cache=True, fastmath=True)
def _cone(x, y, z, ax, ay, az, ra, bx, by, bz, rb):
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
def _disc(radial, z, radius, half_height, rounding):
    """Exact distance to a cylinder about z with a rounded rim; ``radial`` is the distance to the axis."""
    u = radial - radius + rounding
    v = abs(z) - half_height + rounding
    return min(max(u, v), 0.0) + math.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2) - rounding


# --------------------------------------------------------------------------------------------- the figurine


@no_type_check
@njit(cache=True, fastmath=True)
def _body(x, y, z):
    """Body and head with eye sockets, belly relief and the bowl of the jug: (distance, body alone, bowl)."""
    side = abs(x)
    trunk = _cone(x, y, z, 0.0, 0.0, -0.30, 0.33, 0.0, 0.0, 0.15, 0.265)
    head = _ball(max(side - 0.08, 0.0), y, z, 0.0, 0.0, 0.33, 0.25)
    socket = _ball(side, y, z, 0.125, -0.30, 0.345, 0.125)
    bowl = _cone(x, y, z, 0.0, 0.03, 0.64, 0.155, 0.0, 0.03, 0.44, 0.11)
    relief = 0.0
    if y < -0.05:
        turn, radial = abs(math.atan2(x, -y)), math.sqrt(x * x + y * y)
        on_belly = smoothstep(1.15, 0.85, turn) * smoothstep(0.12, 0.02, z) * smoothstep(-0.5, -0.4, z)
        on_belly *= smoothstep(0.15, 0.26, radial)
        relief = 0.008 * on_belly * math.cos(14.0 * turn) * math.cos(46.0 * z)
    solid = _smooth_min(trunk, head, 0.10) - relief
    solid = _smooth_max(solid, -socket, 0.03)
    return _smooth_max(solid, -bowl, 0.05), trunk, bowl


@no_type_check
@njit(cache=True, fastmath=True)
def _wing(side, y, z, trunk):
    """A wing: the body's skin, 0.05 thick, inside a drop-shaped outline, with grooves along the feathers."""
    outline = _cone(side, y, z, 0.27, -0.01, 0.05, 0.17, 0.23, 0.17, -0.40, 0.055)
    across = 0.93 * y + 0.37 * z
    groove = 0.006 * math.cos(62.0 * across) * smoothstep(0.12, -0.05, z)
    return _smooth_max(trunk - 0.05 - groove, outline, 0.03)


@no_type_check
@njit(cache=True, fastmath=True)
def _tail(side, y, z):
    """Three feathers in a fan, 0.07 thick, free over the plinth."""
    middle = _cone(side, y, z, 0.0, 0.22, -0.26, 0.07, 0.0, 0.45, -0.41, 0.036)
    outer = _cone(side, y, z, 0.05, 0.22, -0.26, 0.06, 0.115, 0.43, -0.41, 0.034)
    return _smooth_min(middle, outer, 0.02)


@no_type_check
@njit(cache=True, fastmath=True)
def _toes(side, y, z):
    middle = _cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.12, -0.33, -0.565, 0.036)
    inner = _cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.045, -0.31, -0.565, 0.034)
    outer = _cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.20, -0.29, -0.565, 0.034)
    return _smooth_min(middle, min(inner, outer), 0.02)


@no_type_check
@njit(cache=True, fastmath=True)
def _plinth(x, y, z):
    """A fluted drum of radius 0.39, z from -0.74 to -0.57."""
    radial = math.sqrt(x * x + y * y)
    flutes = 0.0
    if radial > 0.25:
        flutes = 0.009 * math.cos(18.0 * math.atan2(y, x)) * smoothstep(0.25, 0.36, radial)
    return _disc(radial - flutes, z + 0.655, 0.385, 0.085, 0.03)


@no_type_check
@njit(cache=True, fastmath=True)
def _parts(x, y, z):
    """Distances to the figurine's coloured parts, before they are joined."""
    side = abs(x)
    body, trunk, bowl = _body(x, y, z)
    wing = _wing(side, y, z, trunk)
    tail = _tail(side, y, z)
    brow = _cone(side, y, z, 0.025, -0.245, 0.40, 0.028, 0.20, -0.12, 0.535, 0.05)
    ear = _cone(side, y, z, 0.205, -0.05, 0.50, 0.08, 0.275, -0.05, 0.73, 0.026)
    crest = _smooth_min(brow, ear, 0.08)
    eye = _ball(side, y, z, 0.125, -0.215, 0.345, 0.078)
    beak = _cone(x, y, z, 0.0, -0.23, 0.295, 0.05, 0.0, -0.31, 0.20, 0.022)
    toes = _toes(side, y, z)
    ring = math.sqrt((y - 0.31) ** 2 + (z - 0.10) ** 2) - 0.17
    handle = math.sqrt(ring * ring + x * x) - 0.036
    plinth = _plinth(x, y, z)
    stem = _cone(x, y, z, 0.28, -0.21, -0.57, 0.023, 0.40, -0.32, -0.20, 0.022)
    leaf = _cone(x, y, z, 0.335, -0.26, -0.40, 0.024, 0.46, -0.21, -0.29, 0.024)
    stem = _smooth_min(stem, leaf, 0.02)
    bud = _cone(x, y, z, 0.405, -0.325, -0.17, 0.07, 0.44, -0.355, -0.05, 0.028)
    return body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud, bowl


@no_type_check
@njit(cache=True, fastmath=True)
def _figurine(x, y, z):
    body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud, _ = _parts(x, y, z)
    owl = _smooth_min(body, crest, 0.035)
    owl = _smooth_min(owl, eye, 0.012)
    owl = _smooth_min(owl, beak, 0.02)
    owl = _smooth_min(owl, wing, 0.02)
    owl = _smooth_min(owl, tail, 0.04)
    owl = _smooth_min(owl, handle, 0.04)
    base = _smooth_min(plinth, toes, 0.02)
    base = _smooth_min(base, _smooth_min(stem, bud, 0.02), 0.03)
    return LIPSCHITZ * _smooth_min(owl, base, 0.05)


@no_type_check
@njit(cache=True, fastmath=True)
def _table(x, y, z):
    return LIPSCHITZ * _disc(math.sqrt(x * x + y * y), z + 0.77, 0.54, 0.03, 0.02)


@no_type_check
@njit(cache=True, fastmath=True)
def distance(scene, x, y, z):
    """The field of a scene at one point: 0 on the surface, elsewhere at most the distance to it."""
    if scene == SPHERE:
        return math.sqrt(x * x + y * y + z * z) - SPHERE_RADIUS
    value = _figurine(x, y, z)
    if scene == FIGURINE_TABLE:
        value = _smooth_min(value, _table(x, y, z), 0.02)
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


# ------------------------------------------------------------------------------------------- colour and light


@no_type_check
@njit(cache=True, fastmath=True)
def mix(a, b, t):
    """The colour between ``a`` (t = 0) and ``b`` (t = 1)."""
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


@no_type_check
@njit(cache=True, fastmath=True)
def _add(total, color, weight):
    return total[0] + weight * color[0], total[1] + weight * color[1], total[2] + weight * color[2]


@no_type_check
@njit(cache=True, fastmath=True)
def _part_weight(value, nearest):
    """Weight of a part's colour: parts fade into each other over about 0.02."""
    return math.exp((nearest - max(value, 0.0)) / 0.006)


@no_type_check
@njit(cache=True, fastmath=True)
def _body_color(x, y, z, bowl):
    glaze = mix((0.05, 0.20, 0.26), (0.08, 0.34, 0.34), 0.5 + 0.5 * math.sin(8.0 * x + 6.0 * z + 5.0 * y))
    turn = math.atan2(x, -y)
    spots = math.cos(10.0 * turn) * math.cos(28.0 * z)
    glaze = mix(glaze, (0.30, 0.55, 0.50), 0.7 * smoothstep(0.35, 0.85, spots) * smoothstep(0.55, 0.35, z))
    cream = (0.80, 0.66, 0.42)
    dots = 0.5 + 0.5 * math.cos(14.0 * turn) * math.cos(46.0 * z)
    belly = mix((0.55, 0.25, 0.08), cream, smoothstep(0.25, 0.85, dots))
    on_belly = smoothstep(1.10, 0.92, abs(turn)) * smoothstep(0.12, 0.06, z)
    color = mix(glaze, belly, on_belly)
    face = math.sqrt((abs(x) - 0.11) ** 2 + (z - 0.335) ** 2)
    color = mix(color, cream, smoothstep(0.155, 0.12, face) * smoothstep(-0.06, -0.14, y))
    return mix(color, (0.75, 0.42, 0.16), smoothstep(0.03, 0.005, bowl))


@no_type_check
@njit(cache=True, fastmath=True)
def _eye_color(side, y, z):
    """Pupil, iris and rim by the angle from the gaze, which points a little outwards and down."""
    facing = (0.10 * (side - 0.125) - 0.99 * (y + 0.215) - 0.05 * (z - 0.345)) / 0.078
    iris = mix((0.10, 0.05, 0.02), (0.90, 0.48, 0.04), smoothstep(0.50, 0.68, facing))
    return mix(iris, (0.015, 0.015, 0.02), smoothstep(0.80, 0.90, facing))


@no_type_check
@njit(cache=True, fastmath=True)
def _figurine_color(x, y, z):
    """Linear albedo of the figurine on and near its surface."""
    body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud, bowl = _parts(x, y, z)
    side = abs(x)
    orange = (0.85, 0.33, 0.05)
    feathers = 0.5 + 0.5 * math.cos(62.0 * (0.93 * y + 0.37 * z))
    wing_color = mix((0.035, 0.07, 0.20), (0.10, 0.24, 0.45), feathers)
    wing_color = mix(wing_color, (0.62, 0.50, 0.30), 0.8 * smoothstep(0.06, 0.13, z))
    band = 0.5 + 0.5 * math.cos(8.0 * math.atan2(z - 0.10, y - 0.31))
    handle_color = mix((0.75, 0.42, 0.16), (0.45, 0.13, 0.06), smoothstep(0.2, 0.8, band))
    flutes = 0.5 + 0.5 * math.cos(18.0 * math.atan2(y, x))
    rim = smoothstep(0.30, 0.34, math.sqrt(x * x + y * y))
    plinth_color = mix((0.38, 0.36, 0.33), (0.36, 0.10, 0.05), rim * (0.45 + 0.55 * flutes))
    grain = 0.5 + 0.5 * math.sin(31.0 * x + 3.0 * math.sin(17.0 * y)) * math.sin(
        27.0 * y + 3.0 * math.sin(15.0 * x)
    )
    plinth_color = mix(plinth_color, (0.62, 0.55, 0.44), 0.5 * grain * (1.0 - rim))

    nearest = max(min(body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud), 0.0)
    total, weights = (0.0, 0.0, 0.0), 0.0
    for value, color in (
        (body, _body_color(x, y, z, bowl)),
        (wing, wing_color),
        (tail, mix((0.10, 0.24, 0.45), (0.035, 0.07, 0.20), smoothstep(0.30, 0.40, y))),
        (crest, mix((0.30, 0.13, 0.06), (0.62, 0.50, 0.30), smoothstep(0.60, 0.70, z))),
        (eye, _eye_color(side, y, z)),
        (beak, orange),
        (toes, orange),
        (handle, handle_color),
        (plinth, plinth_color),
        (stem, (0.12, 0.35, 0.06)),
        (bud, mix((0.65, 0.03, 0.10), (0.90, 0.35, 0.30), smoothstep(-0.14, -0.04, z))),
    ):
        weight = _part_weight(value, nearest)
        total = _add(total, color, weight)
        weights += weight
    return total[0] / weights, total[1] / weights, total[2] / weights


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
    color = _figurine_color(x, y, z)
    if scene == FIGURINE_TABLE:
        weave = 0.5 + 0.5 * math.sin(22.0 * x) * math.sin(22.0 * y)
        cloth = mix((0.30, 0.34, 0.30), (0.62, 0.60, 0.48), weave)
        color = mix(color, cloth, smoothstep(-0.735, -0.745, z))
    return color
