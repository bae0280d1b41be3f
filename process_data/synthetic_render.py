"""Light, sphere tracing and sampling of the synthetic scenes: the compiled loops over pixels and points.

Everything here is in scene space and takes arrays that the caller has made; nothing is allocated. Colours are
sRGB, 0..1. The light stands still in the scene, and all but a weak wide highlight is diffuse, so that a
surface point looks nearly alike from everywhere, as multi-view reconstruction assumes. The scene ``glossy``
breaks this on purpose: it mirrors a studio with bright windows.

Source: Hart, "Sphere tracing", The Visual Computer 1996 (``_trace``); Quilez, "Soft shadows in raymarched
SDFs", 2010 (``_openness``); Schlick, "An inexpensive BRDF model for physically-based rendering", Computer
Graphics Forum 1994 (Fresnel's factor in ``shade``).
"""

import math
from typing import no_type_check

from numba import njit, prange

from process_data.synthetic_field import BOXES, GLOSSY, albedo, distance, gradient
from process_data.synthetic_figurine import LIPSCHITZ
from process_data.synthetic_scenes import glossy_material
from process_data.synthetic_shapes import add, mix, smoothstep

_HIT = 1e-4
"""A ray has arrived when the bound is below this (scene units): a hundredth of a pixel."""
_MAX_STEPS = 160

SURROUNDINGS = 6.0
"""Radius of the painted ball around ``figurine-table`` and the cameras, which are within 3 of the centre."""

_LIGHT = (-0.459, -0.612, 0.644)
"""Towards the one directional light: over the figurine's right shoulder, fixed in the scene."""

_WINDOWS = (
    (-110.0, 35.0, 0.45, 0.32, (2.6, 2.5, 2.3)),
    (20.0, 25.0, 0.22, 0.50, (1.9, 2.1, 2.5)),
    (130.0, 40.0, 0.35, 0.35, (2.4, 2.0, 1.5)),
    (0.0, 88.0, 0.40, 0.25, (1.8, 1.8, 1.8)),
)
"""The studio's windows: azimuth and elevation (degrees), half width and half height (tangents), RGB."""
_DIM = (0.12, 0.09, 0.07)
"""Linear light from nearby things in a rough mirror."""

# --------------------------------------------------------------------------------------------------- tracing


@no_type_check
@njit(cache=True, fastmath=True)
def _trace(scene, ox, oy, oz, dx, dy, dz):
    """Distance along a unit ray to the surface, or -1: sphere tracing inside the scene's box."""
    t, far = 0.0, 1e9
    lowest, highest = BOXES[scene]
    for o, d, low, high in (
        (ox, dx, lowest[0], highest[0]),
        (oy, dy, lowest[1], highest[1]),
        (oz, dz, lowest[2], highest[2]),
    ):
        # A direction along a face is nudged off it; the quotient then is huge, with the right sign.
        inverse = 1.0 / (d if abs(d) > 1e-12 else 1e-12)
        enter, leave = (low - o) * inverse, (high - o) * inverse
        t, far = max(t, min(enter, leave)), min(far, max(enter, leave))
    if t >= far:
        return -1.0
    step = 0.0
    for _ in range(_MAX_STEPS):
        step = distance(scene, ox + t * dx, oy + t * dy, oz + t * dz)
        if step < _HIT:
            return t
        t += step
        if t > far:
            return -1.0
    return t if step < 20.0 * _HIT else -1.0


# ------------------------------------------------------------------------------------------------------ light


@no_type_check
@njit(cache=True, fastmath=True)
def _encode(value):
    """Linear light to sRGB, 0..1 (IEC 61966-2-1)."""
    value = min(max(value, 0.0), 1.0)
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1.0 / 2.4) - 0.055


@no_type_check
@njit(cache=True, fastmath=True)
def _openness(scene, x, y, z, dx, dy, dz, reach, softness):
    """How free the way along (dx, dy, dz) is, 0..1: the narrowest cone of clear space in four steps."""
    free = 1.0
    for i in range(1, 5):
        t = reach * i * i / 16.0
        free = min(free, softness * distance(scene, x + t * dx, y + t * dy, z + t * dz) / (t * LIPSCHITZ))
    return max(free, 0.0)


@no_type_check
@njit(cache=True, fastmath=True)
def _lit(scene, x, y, z, nx, ny, nz, vx, vy, vz):
    """Linear light that leaves a surface point with normal n towards v, without what it mirrors.

    Diffuse light from one wide lamp with a soft shadow, a brighter sky above a dimmer floor, mild occlusion,
    and a weak wide highlight: the only term that depends on v, at most 0.05.
    """
    lx, ly, lz = _LIGHT
    cosine = nx * lx + ny * ly + nz * lz
    lamp = max(0.25 + 0.75 * cosine, 0.0)
    lamp *= 0.45 + 0.55 * _openness(scene, x + 0.02 * nx, y + 0.02 * ny, z + 0.02 * nz, lx, ly, lz, 0.5, 3.0)
    open_sky = 0.45 + 0.55 * _openness(scene, x, y, z, nx, ny, nz, 0.16, 1.0)
    r, g, b = albedo(scene, x, y, z)
    up = 0.5 + 0.5 * nz
    hx, hy, hz = lx + vx, ly + vy, lz + vz
    half = max((nx * hx + ny * hy + nz * hz) / math.sqrt(hx * hx + hy * hy + hz * hz + 1e-12), 0.0)
    gloss = 0.05 * half**24 * lamp
    r = r * (0.95 * lamp + open_sky * (0.30 + 0.22 * up)) + gloss
    g = g * (0.90 * lamp + open_sky * (0.28 + 0.26 * up)) + gloss
    b = b * (0.82 * lamp + open_sky * (0.27 + 0.32 * up)) + gloss
    return r, g, b


@no_type_check
@njit(cache=True, fastmath=True)
def _unit_gradient(scene, x, y, z):
    nx, ny, nz = gradient(scene, x, y, z)
    length = math.sqrt(nx * nx + ny * ny + nz * nz)
    return nx / length, ny / length, nz / length


@no_type_check
@njit(cache=True, fastmath=True)
def _studio(dx, dy, dz, roughness):
    """Linear light from the studio around ``glossy`` by direction: dim, with four bright soft windows.

    Roughness (0..1) widens a window's borders and dims it by as much.
    """
    total = mix((0.05, 0.045, 0.04), (0.22, 0.27, 0.34), smoothstep(-0.5, 0.7, dz))
    soft = 0.05 + 0.9 * roughness
    # Azimuth and elevation in degrees, half width and half height as tangents, colour.
    for azimuth, elevation, width, height, color in _WINDOWS:
        a, e = math.radians(azimuth), math.radians(elevation)
        right = math.cos(a) * dy - math.sin(a) * dx
        ahead = math.cos(a) * dx + math.sin(a) * dy
        front = math.cos(e) * ahead + math.sin(e) * dz
        if front > 0.0:
            u, v = abs(right / front), abs((math.cos(e) * dz - math.sin(e) * ahead) / front)
            weight = smoothstep(width + soft, width - soft, u) * smoothstep(height + soft, height - soft, v)
            total = add(total, color, weight * min(width / soft, 1.0) * min(height / soft, 1.0))
    return total


@no_type_check
@njit(cache=True, fastmath=True)
def _mirrored(scene, x, y, z, nx, ny, nz, rx, ry, rz, roughness):
    """Linear light from direction r at a point: the studio, or what stands in the way, without shine."""
    light = _studio(rx, ry, rz, roughness)
    if roughness > 0.0:
        way = _openness(scene, x + 0.01 * nx, y + 0.01 * ny, z + 0.01 * nz, rx, ry, rz, 0.5, 1.0 / roughness)
        return mix(_DIM, light, way)
    ox, oy, oz = x + 0.01 * nx, y + 0.01 * ny, z + 0.01 * nz
    t = _trace(scene, ox, oy, oz, rx, ry, rz)
    if t < 0.0:
        return light
    x, y, z = ox + t * rx, oy + t * ry, oz + t * rz
    nx, ny, nz = _unit_gradient(scene, x, y, z)
    return _lit(scene, x, y, z, nx, ny, nz, -rx, -ry, -rz)


@no_type_check
@njit(cache=True, fastmath=True)
def shade(scene, x, y, z, vx, vy, vz):
    """sRGB colour (0..1) of a surface point seen from direction v (unit, towards the eye).

    What shines mirrors, once, along the exactly reflected direction, with Fresnel's factor after Schlick.
    """
    nx, ny, nz = _unit_gradient(scene, x, y, z)
    r, g, b = _lit(scene, x, y, z, nx, ny, nz, vx, vy, vz)
    if scene == GLOSSY:
        incidence, roughness = glossy_material(x, y, z)
        if incidence > 0.0:
            cosine = min(max(nx * vx + ny * vy + nz * vz, 0.0), 1.0)
            factor = incidence + (max(1.0 - roughness, incidence) - incidence) * (1.0 - cosine) ** 5
            rx, ry, rz = 2.0 * cosine * nx - vx, 2.0 * cosine * ny - vy, 2.0 * cosine * nz - vz
            light = _mirrored(scene, x, y, z, nx, ny, nz, rx, ry, rz, roughness)
            r, g, b = mix((r, g, b), light, factor)
    return _encode(r), _encode(g), _encode(b)


@no_type_check
@njit(cache=True, fastmath=True)
def _surroundings(ox, oy, oz, dx, dy, dz):
    """sRGB of the painted ball around the scene, seen along a unit ray from within it.

    Nowhere plain, as training without masks needs: a broad sky, and spots of 9 down to 2 degrees whose
    borders say how far away they are.
    """
    along = ox * dx + oy * dy + oz * dz
    t = math.sqrt(along * along - (ox * ox + oy * oy + oz * oz) + SURROUNDINGS**2) - along
    x, y, z = (ox + t * dx) / SURROUNDINGS, (oy + t * dy) / SURROUNDINGS, (oz + t * dz) / SURROUNDINGS
    sky = mix((0.42, 0.36, 0.30), (0.62, 0.74, 0.86), smoothstep(-0.35, 0.45, z))
    wave = math.sin(5.0 * x + 3.0 * z) * math.sin(6.0 * y - 2.0 * x) + 0.5 * math.sin(11.0 * z + 7.0 * x)
    for scale in (19.0, 43.0, 89.0):
        spots = math.sin(scale * x + z) * math.sin(scale * y + x) + math.sin(scale * z + y)
        wave += smoothstep(-0.3, 0.3, spots) - 0.5
    return sky[0] + 0.09 * wave, sky[1] + 0.06 * wave, sky[2] - 0.07 * wave


# ---------------------------------------------------------------------------------------------------- kernels


@no_type_check
@njit(cache=True, fastmath=True)
def _look(scene, pose, lens, u, v, background):
    """One ray through pixel coordinates (u, v): (r, g, b, depth), depth -1 for the background."""
    cx, cy = (u - lens[0, 2]) / lens[0, 0], (v - lens[1, 2]) / lens[1, 1]
    dx = pose[0, 0] * cx + pose[0, 1] * cy + pose[0, 2]
    dy = pose[1, 0] * cx + pose[1, 1] * cy + pose[1, 2]
    dz = pose[2, 0] * cx + pose[2, 1] * cy + pose[2, 2]
    length = math.sqrt(dx * dx + dy * dy + dz * dz)
    dx, dy, dz = dx / length, dy / length, dz / length
    t = _trace(scene, pose[0, 3], pose[1, 3], pose[2, 3], dx, dy, dz)
    if t >= 0.0:
        r, g, b = shade(scene, pose[0, 3] + t * dx, pose[1, 3] + t * dy, pose[2, 3] + t * dz, -dx, -dy, -dz)
        return r, g, b, t
    if background < 0.0:
        r, g, b = _surroundings(pose[0, 3], pose[1, 3], pose[2, 3], dx, dy, dz)
        return r, g, b, t
    return background, background, background, t


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def render_centres(scene, poses, lenses, background, pixels):
    """One ray per pixel's centre, into ``pixels (N, H, W, 4)``: sRGB and depth (-1 where nothing is hit)."""
    n, height, width = pixels.shape[:3]
    for row in prange(n * height):
        i, y = row // height, row % height
        for x in range(width):
            r, g, b, t = _look(scene, poses[i], lenses[i], x + 0.5, y + 0.5, background)
            pixels[i, y, x, 0], pixels[i, y, x, 1], pixels[i, y, x, 2], pixels[i, y, x, 3] = r, g, b, t


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def smooth_edges(scene, poses, lenses, background, contrast, pixels, rgba):
    """Copy ``pixels`` to ``rgba (N, H, W, 4)``, replacing pixels unlike a neighbour by the mean of five rays.

    Four rays on a rotated square join the one through the centre; alpha is the fraction of the five that hit.
    Looking again only where neighbours differ by more than ``contrast`` spares most of the work.
    """
    n, height, width = pixels.shape[:3]
    for row in prange(n * height):
        i, y = row // height, row % height
        for x in range(width):
            here = pixels[i, y, x]
            unlike = 0.0
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                there = pixels[i, min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                unlike = max(
                    unlike, abs(here[0] - there[0]), abs(here[1] - there[1]), abs(here[2] - there[2])
                )
                if (here[3] < 0.0) != (there[3] < 0.0):
                    unlike = 1.0
            r, g, b, a = here[0], here[1], here[2], 1.0 if here[3] >= 0.0 else 0.0
            if unlike > contrast:
                for du, dv in ((0.375, 0.125), (-0.125, 0.375), (-0.375, -0.125), (0.125, -0.375)):
                    sr, sg, sb, t = _look(scene, poses[i], lenses[i], x + 0.5 + du, y + 0.5 + dv, background)
                    r, g, b, a = r + sr, g + sg, b + sb, a + (1.0 if t >= 0.0 else 0.0)
                r, g, b, a = 0.2 * r, 0.2 * g, 0.2 * b, 0.2 * a
            rgba[i, y, x, 0], rgba[i, y, x, 1], rgba[i, y, x, 2], rgba[i, y, x, 3] = r, g, b, a


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def view_normals(scene, poses, lenses, depth, normals):
    """Unit normals in the camera's axes where ``depth (N, H, W)`` along the ray is above 0, else zero."""
    n, height, width = depth.shape
    for row in prange(n * height):
        i, y = row // height, row % height
        pose, lens = poses[i], lenses[i]
        for x in range(width):
            t = depth[i, y, x]
            if t > 0.0:
                cx, cy = (x + 0.5 - lens[0, 2]) / lens[0, 0], (y + 0.5 - lens[1, 2]) / lens[1, 1]
                t /= math.sqrt(cx * cx + cy * cy + 1.0)
                nx, ny, nz = _unit_gradient(
                    scene,
                    pose[0, 3] + t * (pose[0, 0] * cx + pose[0, 1] * cy + pose[0, 2]),
                    pose[1, 3] + t * (pose[1, 0] * cx + pose[1, 1] * cy + pose[1, 2]),
                    pose[2, 3] + t * (pose[2, 0] * cx + pose[2, 1] * cy + pose[2, 2]),
                )
                for axis in range(3):
                    normals[i, y, x, axis] = pose[0, axis] * nx + pose[1, axis] * ny + pose[2, axis] * nz


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def sights(scene, centres, points, is_seen):
    """Whether nothing stands between ``centres (N, 3)`` and surface points (P, 3), ``is_seen (P, N)``."""
    for i in prange(len(points)):
        for k in range(len(centres)):
            ox, oy, oz = centres[k]
            dx, dy, dz = points[i, 0] - ox, points[i, 1] - oy, points[i, 2] - oz
            length = math.sqrt(dx * dx + dy * dy + dz * dz)
            t = _trace(scene, ox, oy, oz, dx / length, dy / length, dz / length)
            # A ray may pass an oblique surface by a hair, or stop a little before it.
            is_seen[i, k] = t < 0.0 or t > length - 5e-3


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def distances(scene, points, values):
    """The field at ``points (P, 3)``, into ``values (P,)``."""
    for i in prange(len(points)):
        values[i] = distance(scene, points[i, 0], points[i, 1], points[i, 2])


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def settle(scene, points, normals, colors):
    """Move ``points (P, 3)`` near the surface onto it by Newton steps; fill unit normals and colours."""
    for i in prange(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for _ in range(6):
            gx, gy, gz = gradient(scene, x, y, z)
            step = distance(scene, x, y, z) / max(gx * gx + gy * gy + gz * gz, 0.01)
            x, y, z = x - step * gx, y - step * gy, z - step * gz
        gx, gy, gz = gradient(scene, x, y, z)
        length = math.sqrt(gx * gx + gy * gy + gz * gz)
        gx, gy, gz = gx / length, gy / length, gz / length
        points[i, 0], points[i, 1], points[i, 2] = x, y, z
        normals[i, 0], normals[i, 1], normals[i, 2] = gx, gy, gz
        colors[i, 0], colors[i, 1], colors[i, 2] = shade(scene, x, y, z, gx, gy, gz)


@no_type_check
@njit(cache=True, fastmath=True, parallel=True)
def slide_to_nearest(scene, points, feet):
    """Slide ``feet (P, 3)``, already on the surface, towards the surface points nearest to ``points (P, 3)``.

    Each step follows the tangent plane and returns to the surface; one that does not come nearer is taken
    back and shortened, so that feet on tight curves, where the full step overshoots, settle too.
    """
    for i in prange(len(points)):
        px, py, pz = points[i, 0], points[i, 1], points[i, 2]
        x, y, z = feet[i, 0], feet[i, 1], feet[i, 2]
        best = (px - x) ** 2 + (py - y) ** 2 + (pz - z) ** 2
        rate = 1.0
        for _ in range(16):
            gx, gy, gz = gradient(scene, x, y, z)
            norm2 = max(gx * gx + gy * gy + gz * gz, 0.01)
            off = ((px - x) * gx + (py - y) * gy + (pz - z) * gz) / norm2
            qx, qy, qz = (
                x + rate * (px - x - off * gx),
                y + rate * (py - y - off * gy),
                z + rate * (pz - z - off * gz),
            )
            for _ in range(4):
                gx, gy, gz = gradient(scene, qx, qy, qz)
                step = distance(scene, qx, qy, qz) / max(gx * gx + gy * gy + gz * gz, 0.01)
                qx, qy, qz = qx - step * gx, qy - step * gy, qz - step * gz
            found = (px - qx) ** 2 + (py - qy) ** 2 + (pz - qz) ** 2
            # A foot that a long step has left hanging in the air would be too near.
            if found < best and abs(distance(scene, qx, qy, qz)) < 1e-7:
                x, y, z, best = qx, qy, qz, found
            else:
                rate *= 0.5
        feet[i, 0], feet[i, 1], feet[i, 2] = x, y, z
