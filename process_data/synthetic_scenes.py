"""The other synthetic scenes: ``thin``, ``glossy``, ``wall``, ``niche`` and ``room``: distances and colours.

All lie in the unit sphere; numbers are scene units. Distances of the parts are exact (a few unions and cuts
are smooth), so that the sums are bounds as they stand.
"""

import math
from typing import no_type_check

from numba import njit

from process_data.synthetic_shapes import (
    ball,
    block,
    cone,
    disc,
    grain,
    mix,
    noise,
    ring,
    segment,
    smooth_max,
    smooth_min,
    smoothstep,
)

# ------------------------------------------------------------------------------------------- thin: a lantern


@no_type_check
@njit(cache=True, fastmath=True)
def _sector(x, y):
    """Fold the plane into a wedge of 30 degrees, by mirrors: the distance to the axis, and coordinates in it.

    A rod stands in one side of the wedge and a slat in the other, so that no other copy is nearer.
    """
    turn = math.atan2(y, x)
    sixth = math.pi / 3.0
    turn = abs(turn - sixth * math.floor(turn / sixth + 0.5))
    radial = math.sqrt(x * x + y * y)
    return radial, radial * math.cos(turn), radial * math.sin(turn)


@no_type_check
@njit(cache=True, fastmath=True)
def _chain(x, y, z):
    """Two links of wire 0.024 thick, each through the other, and a ring 0.028 thick to hang it all from."""
    low = ring(math.sqrt(x * x + max(abs(z - 0.565) - 0.02, 0.0) ** 2), y, 0.035, 0.012)
    high = ring(math.sqrt(y * y + max(abs(z - 0.657) - 0.02, 0.0) ** 2), x, 0.035, 0.012)
    hook = ring(math.sqrt(x * x + (z - 0.767) ** 2), y, 0.075, 0.014)
    return smooth_min(low, smooth_min(high, hook, 0.004), 0.004)


@no_type_check
@njit(cache=True, fastmath=True)
def _lantern_parts(x, y, z):
    """Distances to rods, slats, wire, hoops, plates (0.02 thick), roof (0.022 thick), chain and candle."""
    radial, u, v = _sector(x, y)
    rods = cone(u, v, z, 0.40, 0.0, -0.665, 0.015, 0.372, 0.0, 0.247, 0.015)
    # Slats stand at 30 degrees: coordinates along and across the radius there.
    out, across = 0.8660254 * u + 0.5 * v, 0.8660254 * v - 0.5 * u
    slats = block(out - 0.385, across, z + 0.21, 0.011, 0.034, 0.465, 0.004)
    wire = cone(u, v, z, 0.397, 0.0, -0.58, 0.012, 0.3334, 0.1925, 0.16, 0.012)
    hoops = min(ring(radial, z - 0.247, 0.375, 0.022), ring(radial, z + 0.21, 0.403, 0.012))
    plates = min(disc(radial, z + 0.67, 0.46, 0.010, 0.006), disc(radial, z - 0.50, 0.125, 0.014, 0.006))
    plates = smooth_min(plates, ball(u, v, z, 0.38, 0.0, -0.705, 0.04), 0.01)
    roof = segment(radial, z, 0.47, 0.205, 0.10, 0.50) - 0.011
    roof = smooth_max(roof, -ball(u, v, z, 0.285, 0.0, 0.3525, 0.062), 0.006)
    candle = smooth_min(
        disc(radial, z + 0.46, 0.13, 0.21, 0.03),
        cone(x, y, z, 0.0, 0.0, -0.23, 0.05, 0.0, 0.0, -0.09, 0.013),
        0.02,
    )
    return rods, slats, wire, hoops, plates, roof, _chain(x, y, z), candle


@no_type_check
@njit(cache=True, fastmath=True)
def thin(x, y, z):
    """A lantern: six rods, six slats, a zigzag wire and hoops on a thin plate, a pierced roof and a chain."""
    rods, slats, wire, hoops, plates, roof, chain, candle = _lantern_parts(x, y, z)
    frame = smooth_min(smooth_min(rods, slats, 0.01), smooth_min(wire, hoops, 0.006), 0.006)
    frame = smooth_min(frame, smooth_min(plates, roof, 0.01), 0.01)
    return smooth_min(frame, smooth_min(chain, candle, 0.01), 0.01)


@no_type_check
@njit(cache=True, fastmath=True)
def thin_color(x, y, z):
    """Linear albedo of the lantern: stripes along whatever is thin, grain on all of it."""
    rods, slats, wire, hoops, plates, roof, chain, candle = _lantern_parts(x, y, z)
    speckle, turn = grain(x, y, z), math.atan2(y, x)
    nearest = min(rods, slats, wire, hoops, plates, roof, chain, candle)
    if nearest == rods:
        twist = 0.5 + 0.5 * math.sin(60.0 * z + 5.0 * turn)
        return mix(
            mix((0.03, 0.16, 0.12), (0.70, 0.62, 0.25), smoothstep(0.3, 0.7, twist)),
            (0.4, 0.1, 0.05),
            0.5 * speckle,
        )
    if nearest == slats:
        board = mix((0.45, 0.07, 0.04), (0.80, 0.50, 0.22), grain(x, y, 0.35 * z))
        return mix(board, (0.05, 0.10, 0.25), smoothstep(0.55, 0.75, noise(13.0 * x, 13.0 * y, 13.0 * z)))
    if nearest in (wire, chain):
        band = smoothstep(-0.3, 0.3, math.sin(75.0 * z + 40.0 * x))
        return mix((0.75, 0.33, 0.14), mix((0.08, 0.03, 0.05), (0.2, 0.3, 0.3), speckle), band)
    if nearest == hoops:
        band = smoothstep(-0.3, 0.3, math.sin(36.0 * turn + 9.0 * speckle))
        return mix((0.05, 0.12, 0.35), (0.75, 0.68, 0.50), band)
    if nearest == roof:
        rays = smoothstep(-0.5, 0.5, math.sin(12.0 * turn + 40.0 * z))
        return mix(
            mix((0.06, 0.22, 0.20), (0.30, 0.48, 0.35), speckle),
            mix((0.5, 0.2, 0.06), (0.7, 0.5, 0.25), speckle),
            rays,
        )
    if nearest == candle:
        wax = mix(
            (0.75, 0.60, 0.35), (0.55, 0.08, 0.06), smoothstep(0.45, 0.6, noise(9.0 * x, 9.0 * y, 9.0 * z))
        )
        flame = mix((0.90, 0.30, 0.02), (0.95, 0.85, 0.30), speckle)
        return mix(mix(wax, (0.1, 0.2, 0.3), 0.6 * speckle), flame, smoothstep(-0.26, -0.24, z))
    tiles = smoothstep(-0.25, 0.25, math.sin(24.0 * x) * math.sin(24.0 * y))
    return mix(
        mix((0.60, 0.55, 0.45), (0.30, 0.25, 0.20), speckle),
        mix((0.10, 0.12, 0.16), (0.3, 0.3, 0.3), speckle),
        tiles,
    )


# --------------------------------------------------------------------- glossy: a sphere and a box


@no_type_check
@njit(cache=True, fastmath=True)
def _glossy_parts(x, y, z):
    """Distances to the mirror-like sphere (radius 0.33), the lacquered box and the wooden board."""
    sphere = ball(x, y, z, -0.27, -0.06, -0.095, 0.33)
    c, s = 0.9063078, 0.4226183
    u, v = c * (x - 0.33) + s * (y - 0.10), c * (y - 0.10) - s * (x - 0.33)
    box = block(u, v, z + 0.175, 0.22, 0.22, 0.25, 0.05)
    board = disc(math.sqrt(x * x + y * y), z + 0.47, 0.66, 0.05, 0.03)
    return sphere, box, board


@no_type_check
@njit(cache=True, fastmath=True)
def glossy(x, y, z):
    """A shiny sphere and a shiny rounded box on a wooden board."""
    sphere, box, board = _glossy_parts(x, y, z)
    return smooth_min(min(sphere, box), board, 0.015)


@no_type_check
@njit(cache=True, fastmath=True)
def glossy_color(x, y, z):
    """Linear albedo: weak patterns under the shine, rings of wood."""
    sphere, box, board = _glossy_parts(x, y, z)
    speckle = grain(x, y, z)
    if sphere < min(box, board):
        return mix((0.015, 0.05, 0.09), (0.04, 0.10, 0.14), speckle)
    if box < board:
        return mix((0.30, 0.025, 0.02), (0.42, 0.06, 0.035), speckle)
    rings = math.sqrt((x - 0.9) ** 2 + y * y) + 0.05 * noise(6.0 * x, 6.0 * y, 6.0 * z)
    wood = mix((0.22, 0.10, 0.04), (0.60, 0.38, 0.18), 0.5 + 0.5 * math.sin(55.0 * rings))
    return mix(wood, (0.10, 0.05, 0.03), 0.6 * speckle)


@no_type_check
@njit(cache=True, fastmath=True)
def glossy_material(x, y, z):
    """Reflectance at normal incidence and roughness, both 0..1: (0, 1) does not shine."""
    sphere, box, board = _glossy_parts(x, y, z)
    if board < min(sphere, box):
        return 0.0, 1.0
    return (0.40, 0.0) if sphere < box else (0.20, 0.12)


# ------------------------------------------------------------------- wall: a cactus before a plain screen


@no_type_check
@njit(cache=True, fastmath=True)
def _wall_parts(x, y, z):
    """Distances to the screen, the floor, the pot and the cactus.

    The screen in plan is a straight line of 0.72 that goes over into 80 degrees of a circle of radius 0.52.
    """
    around = math.atan2(y + 0.20, x - 0.10)
    plan = segment(x, y, -0.62, 0.32, 0.10, 0.32)
    if 0.1745329 < around < 1.5707963:
        plan = min(plan, abs(math.sqrt((x - 0.10) ** 2 + (y + 0.20) ** 2) - 0.52))
    plan = min(plan, math.sqrt((x - 0.6121) ** 2 + (y + 0.1097) ** 2))
    screen = disc(plan, z + 0.01, 0.03, 0.56, 0.015)
    floor = block(x, y + 0.03, z + 0.545, 0.60, 0.37, 0.025, 0.01)
    px, py = x + 0.06, y + 0.13
    radial = math.sqrt(px * px + py * py)
    pot = smooth_min(
        disc(radial, z + 0.42, 0.125, 0.11, 0.02), disc(radial, z + 0.31, 0.15, 0.035, 0.015), 0.01
    )
    trunk = cone(px, py, z, 0.0, 0.0, -0.30, 0.085, 0.0, 0.0, 0.22, 0.10)
    left = min(
        cone(px, py, z, 0.0, 0.0, -0.08, 0.05, -0.19, -0.03, -0.04, 0.05),
        cone(px, py, z, -0.19, -0.03, -0.04, 0.05, -0.20, -0.03, 0.15, 0.055),
    )
    right = min(
        cone(px, py, z, 0.0, 0.0, 0.02, 0.045, 0.17, -0.05, 0.05, 0.045),
        cone(px, py, z, 0.17, -0.05, 0.05, 0.045, 0.18, -0.05, 0.22, 0.05),
    )
    cactus = smooth_min(trunk, smooth_min(left, right, 0.02), 0.03)
    return screen, floor, pot, cactus, ball(px, py, z, 0.0, 0.0, 0.335, 0.05)


@no_type_check
@njit(cache=True, fastmath=True)
def wall(x, y, z):
    """A potted cactus on a tiled floor before a large plain screen, half flat and half curved."""
    screen, floor, pot, cactus, flower = _wall_parts(x, y, z)
    plant = smooth_min(pot, smooth_min(cactus, flower, 0.01), 0.01)
    return smooth_min(smooth_min(screen, floor, 0.01), plant, 0.01)


@no_type_check
@njit(cache=True, fastmath=True)
def wall_color(x, y, z):
    """Linear albedo: the screen has one colour everywhere."""
    screen, floor, pot, cactus, flower = _wall_parts(x, y, z)
    speckle = grain(x, y, z)
    nearest = min(screen, floor, pot, cactus, flower)
    if nearest == screen:
        return 0.42, 0.47, 0.52
    if nearest == floor:
        tiles = smoothstep(-0.15, 0.15, math.sin(20.0 * x) * math.sin(20.0 * y))
        return mix(
            mix((0.50, 0.28, 0.16), (0.30, 0.14, 0.08), speckle),
            mix((0.62, 0.55, 0.42), (0.4, 0.33, 0.25), speckle),
            tiles,
        )
    turn = math.atan2(y + 0.13, x + 0.06)
    if nearest == pot:
        zigzag = smoothstep(-0.2, 0.2, math.sin(60.0 * z + 2.5 * math.asin(math.sin(8.0 * turn))))
        return mix(mix((0.65, 0.25, 0.10), (0.42, 0.12, 0.05), speckle), (0.80, 0.72, 0.55), 0.8 * zigzag)
    if nearest == flower:
        return mix((0.85, 0.08, 0.30), (0.95, 0.60, 0.10), speckle)
    skin = mix((0.05, 0.22, 0.06), (0.30, 0.50, 0.12), speckle)
    return mix(skin, (0.85, 0.80, 0.50), smoothstep(0.70, 0.80, noise(24.0 * x, 24.0 * y, 24.0 * z)))


# ------------------------------------------------------------------ niche: a shrine with a deep hollow


@no_type_check
@njit(cache=True, fastmath=True)
def _niche_parts(x, y, z):
    """Distances to the body (an arch 0.76 deep), the hollow (0.67 deep, 0.52 wide), frame, base, knob."""
    # The arch in the plane of its front: a half circle of radius 0.42 upon a rectangle.
    arch = math.sqrt(x * x + (z - 0.12) ** 2) - 0.42 if z > 0.12 else abs(x) - 0.42
    u, v, w = arch + 0.03, abs(y) - 0.35, -0.53 - z
    outside = math.sqrt(max(u, 0.0) ** 2 + max(v, 0.0) ** 2 + max(w, 0.0) ** 2)
    body = min(max(u, v, w), 0.0) + outside - 0.03
    tall = max(abs(z + 0.06) - 0.16, 0.0)
    opening = math.sqrt(x * x + tall * tall) - 0.26
    hollow = math.sqrt(x * x + tall * tall + max(y - 0.03, 0.0) ** 2) - 0.26
    frame = math.sqrt((opening - 0.03) ** 2 + (y + 0.38) ** 2) - 0.032
    base = block(x, y, z + 0.60, 0.50, 0.46, 0.06, 0.02)
    knob = smooth_min(
        ball(x, y, z, 0.0, 0.0, 0.61, 0.07), disc(math.sqrt(x * x + y * y), z - 0.54, 0.10, 0.02, 0.01), 0.02
    )
    return body, hollow, frame, base, knob


@no_type_check
@njit(cache=True, fastmath=True)
def niche(x, y, z):
    """A stone shrine: an arch on a base, with a hollow that goes nearly through."""
    body, hollow, frame, base, knob = _niche_parts(x, y, z)
    stone = smooth_max(smooth_min(body, knob, 0.02), -hollow, 0.03)
    return smooth_min(smooth_min(stone, frame, 0.015), base, 0.015)


@no_type_check
@njit(cache=True, fastmath=True)
def niche_color(x, y, z):
    """Linear albedo: bricks outside; inside plaster that is nearly plain, with a few specks."""
    body, hollow, frame, base, knob = _niche_parts(x, y, z)
    speckle = grain(x, y, z)
    nearest = min(frame, base, knob)
    if nearest == knob and knob < abs(body):
        return mix((0.75, 0.50, 0.12), (0.30, 0.15, 0.04), speckle)
    if nearest == frame and frame < 0.01:
        band = smoothstep(-0.3, 0.3, math.sin(22.0 * math.atan2(x, z + 0.06) + 6.0 * speckle))
        return mix((0.08, 0.18, 0.32), (0.70, 0.62, 0.45), band)
    if nearest == base and base < 0.01:
        return mix((0.18, 0.17, 0.16), (0.62, 0.58, 0.50), speckle)
    # The highest row is cut at half its height, or a joint would cover the top.
    row = math.floor((z + 0.585) / 0.09)
    along = (x + y) / 0.19 + 0.5 * (row - 2.0 * math.floor(0.5 * row))
    gap = max(
        abs(2.0 * ((z + 0.585) / 0.09 - row) - 1.0),
        1.0 - 2.1 * abs(abs(2.0 * (along - math.floor(along)) - 1.0) - 1.0),
    )
    tint = noise(1.7 * math.floor(along) + 0.3, 1.3 * row + 0.6, 0.5)
    brick = mix(mix((0.45, 0.14, 0.08), (0.62, 0.34, 0.18), tint), (0.22, 0.08, 0.06), 0.6 * speckle)
    brick = mix(brick, (0.62, 0.58, 0.50), smoothstep(0.80, 0.90, gap))
    plaster = mix((0.60, 0.55, 0.47), (0.64, 0.59, 0.51), noise(7.0 * x, 7.0 * y, 7.0 * z))
    plaster = mix(plaster, (0.28, 0.22, 0.18), smoothstep(0.84, 0.90, noise(25.0 * x, 25.0 * y, 25.0 * z)))
    return mix(brick, plaster, smoothstep(0.012, 0.004, hollow) * smoothstep(-0.40, -0.36, y))


# ------------------------------------------------------------------ room: a box seen from inside

ROOM_HALF_SIZE = (0.55, 0.45, 0.38)
"""From the room's middle to its walls; the corners lie 0.81 from it."""


@no_type_check
@njit(cache=True, fastmath=True)
def _room_parts(x, y, z):
    """Distances to the walls (from within), the chest and the ball on the floor."""
    walls = -block(x, y, z, ROOM_HALF_SIZE[0], ROOM_HALF_SIZE[1], ROOM_HALF_SIZE[2], 0.0)
    # It goes into the walls a little: a slit behind it could not be seen.
    chest = block(x - 0.45, y - 0.36, z + 0.29, 0.12, 0.10, 0.10, 0.01)
    return walls, chest, ball(x, y, z, -0.40, -0.30, -0.28, 0.11)


@no_type_check
@njit(cache=True, fastmath=True)
def room(x, y, z):
    """A furnished box: its inside is empty, and all beyond its walls solid."""
    walls, chest, sphere = _room_parts(x, y, z)
    return min(walls, chest, sphere)


@no_type_check
@njit(cache=True, fastmath=True)
def room_color(x, y, z):
    """Linear albedo: papered walls, a tiled floor, a wooden chest."""
    walls, chest, sphere = _room_parts(x, y, z)
    speckle = grain(x, y, z)
    if sphere < walls and sphere < chest:
        return mix(
            (0.70, 0.16, 0.10), (0.85, 0.70, 0.30), smoothstep(0.4, 0.6, noise(18.0 * x, 18.0 * y, 18.0 * z))
        )
    if chest < walls:
        rings = 0.5 + 0.5 * math.sin(60.0 * z + 8.0 * speckle)
        return mix((0.30, 0.16, 0.07), (0.62, 0.42, 0.22), rings)
    blot = noise(11.0 * x + 3.0, 11.0 * y, 11.0 * z)
    if z < -ROOM_HALF_SIZE[2] + 0.01:
        tiles = smoothstep(-0.15, 0.15, math.sin(18.0 * x) * math.sin(18.0 * y))
        return mix(
            mix((0.24, 0.20, 0.18), (0.42, 0.33, 0.27), speckle),
            (0.66, 0.60, 0.50),
            tiles * (0.6 + 0.4 * blot),
        )
    if z > ROOM_HALF_SIZE[2] - 0.01:
        return mix((0.72, 0.70, 0.64), (0.45, 0.44, 0.42), smoothstep(0.45, 0.6, blot))
    stripe = smoothstep(-0.2, 0.2, math.sin(26.0 * (x + y) + 4.0 * blot))
    paper = mix((0.22, 0.34, 0.40), (0.60, 0.62, 0.48), stripe)
    return mix(paper, (0.75, 0.42, 0.22), smoothstep(0.60, 0.72, noise(16.0 * x, 16.0 * y, 16.0 * z + 7.0)))
