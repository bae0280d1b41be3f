"""The figurine of the synthetic scenes, and its table: distance and colour.

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

from process_data.synthetic_shapes import (
    add,
    ball,
    cone,
    disc,
    mix,
    part_weight,
    smooth_max,
    smooth_min,
    smoothstep,
)

LIPSCHITZ = 0.84
"""Relief steepens the field; the sum is scaled by this so that its slope stays below 1 (tests sample it)."""

# --------------------------------------------------------------------------------------------- the figurine


@no_type_check
@njit(cache=True, fastmath=True)
def _body(x, y, z):
    """Body and head with eye sockets, belly relief and the bowl of the jug: (distance, body alone, bowl)."""
    side = abs(x)
    trunk = cone(x, y, z, 0.0, 0.0, -0.30, 0.33, 0.0, 0.0, 0.15, 0.265)
    head = ball(max(side - 0.08, 0.0), y, z, 0.0, 0.0, 0.33, 0.25)
    socket = ball(side, y, z, 0.125, -0.30, 0.345, 0.125)
    bowl = cone(x, y, z, 0.0, 0.03, 0.64, 0.155, 0.0, 0.03, 0.44, 0.11)
    relief = 0.0
    if y < -0.05:
        turn, radial = abs(math.atan2(x, -y)), math.sqrt(x * x + y * y)
        on_belly = smoothstep(1.15, 0.85, turn) * smoothstep(0.12, 0.02, z) * smoothstep(-0.5, -0.4, z)
        on_belly *= smoothstep(0.15, 0.26, radial)
        relief = 0.008 * on_belly * math.cos(14.0 * turn) * math.cos(46.0 * z)
    solid = smooth_min(trunk, head, 0.10) - relief
    solid = smooth_max(solid, -socket, 0.03)
    return smooth_max(solid, -bowl, 0.05), trunk, bowl


@no_type_check
@njit(cache=True, fastmath=True)
def _wing(side, y, z, trunk):
    """A wing: the body's skin, 0.05 thick, inside a drop-shaped outline, with grooves along the feathers."""
    outline = cone(side, y, z, 0.27, -0.01, 0.05, 0.17, 0.23, 0.17, -0.40, 0.055)
    across = 0.93 * y + 0.37 * z
    groove = 0.006 * math.cos(62.0 * across) * smoothstep(0.12, -0.05, z)
    return smooth_max(trunk - 0.05 - groove, outline, 0.03)


@no_type_check
@njit(cache=True, fastmath=True)
def _tail(side, y, z):
    """Three feathers in a fan, 0.07 thick, free over the plinth."""
    middle = cone(side, y, z, 0.0, 0.22, -0.26, 0.07, 0.0, 0.45, -0.41, 0.036)
    outer = cone(side, y, z, 0.05, 0.22, -0.26, 0.06, 0.115, 0.43, -0.41, 0.034)
    return smooth_min(middle, outer, 0.02)


@no_type_check
@njit(cache=True, fastmath=True)
def _toes(side, y, z):
    middle = cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.12, -0.33, -0.565, 0.036)
    inner = cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.045, -0.31, -0.565, 0.034)
    outer = cone(side, y, z, 0.12, -0.15, -0.545, 0.055, 0.20, -0.29, -0.565, 0.034)
    return smooth_min(middle, min(inner, outer), 0.02)


@no_type_check
@njit(cache=True, fastmath=True)
def _plinth(x, y, z):
    """A fluted drum of radius 0.39, z from -0.74 to -0.57."""
    radial = math.sqrt(x * x + y * y)
    flutes = 0.0
    if radial > 0.25:
        flutes = 0.009 * math.cos(18.0 * math.atan2(y, x)) * smoothstep(0.25, 0.36, radial)
    return disc(radial - flutes, z + 0.655, 0.385, 0.085, 0.03)


@no_type_check
@njit(cache=True, fastmath=True)
def _parts(x, y, z):
    """Distances to the figurine's coloured parts, before they are joined."""
    side = abs(x)
    body, trunk, bowl = _body(x, y, z)
    wing = _wing(side, y, z, trunk)
    tail = _tail(side, y, z)
    brow = cone(side, y, z, 0.025, -0.245, 0.40, 0.028, 0.20, -0.12, 0.535, 0.05)
    ear = cone(side, y, z, 0.205, -0.05, 0.50, 0.08, 0.275, -0.05, 0.73, 0.026)
    crest = smooth_min(brow, ear, 0.08)
    eye = ball(side, y, z, 0.125, -0.215, 0.345, 0.078)
    beak = cone(x, y, z, 0.0, -0.23, 0.295, 0.05, 0.0, -0.31, 0.20, 0.022)
    toes = _toes(side, y, z)
    ring = math.sqrt((y - 0.31) ** 2 + (z - 0.10) ** 2) - 0.17
    handle = math.sqrt(ring * ring + x * x) - 0.036
    plinth = _plinth(x, y, z)
    stem = cone(x, y, z, 0.28, -0.21, -0.57, 0.023, 0.40, -0.32, -0.20, 0.022)
    leaf = cone(x, y, z, 0.335, -0.26, -0.40, 0.024, 0.46, -0.21, -0.29, 0.024)
    stem = smooth_min(stem, leaf, 0.02)
    bud = cone(x, y, z, 0.405, -0.325, -0.17, 0.07, 0.44, -0.355, -0.05, 0.028)
    return body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud, bowl


@no_type_check
@njit(cache=True, fastmath=True)
def figurine(x, y, z):
    """The owl jug on its plinth, with the tulip."""
    body, wing, tail, crest, eye, beak, toes, handle, plinth, stem, bud, _ = _parts(x, y, z)
    owl = smooth_min(body, crest, 0.035)
    owl = smooth_min(owl, eye, 0.012)
    owl = smooth_min(owl, beak, 0.02)
    owl = smooth_min(owl, wing, 0.02)
    owl = smooth_min(owl, tail, 0.04)
    owl = smooth_min(owl, handle, 0.04)
    base = smooth_min(plinth, toes, 0.02)
    base = smooth_min(base, smooth_min(stem, bud, 0.02), 0.03)
    return LIPSCHITZ * smooth_min(owl, base, 0.05)


@no_type_check
@njit(cache=True, fastmath=True)
def table(x, y, z):
    """A round table top under the plinth."""
    return LIPSCHITZ * disc(math.sqrt(x * x + y * y), z + 0.77, 0.54, 0.03, 0.02)


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
def figurine_color(x, y, z):
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
        weight = part_weight(value, nearest)
        total = add(total, color, weight)
        weights += weight
    return total[0] / weights, total[1] / weights, total[2] / weights
