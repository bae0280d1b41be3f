"""What captures may have beside photographs, from a synthetic scene's exact surface: depths, normals, points.

Points are made as structure from motion would find them: at corners of the pictures, seen from within 45
degrees of the view that found them, at the place where observations with an error of 0.3 pixels (standard
deviation in x and in y) meet best. Plain surfaces get none. Unlike structure from motion, every point lies on
the surface, also where the picture shows a reflection.
"""

import math
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64

from process_data import synthetic_render
from process_data.synthetic_mesh import SCENES, SceneName
from utils.types import Cameras, ImageStack, SparsePoints

_PIXEL_ERROR = 0.3
"""Standard deviation of an observation in x and in y."""
_CORNER = 1e-4
"""Smallest eigenvalue of the structure tensor (mean squared slope of the grey per pixel) at a corner."""
_MARGIN = 3
"""Corners keep so many pixels from silhouettes, jumps in depth and the frame."""
_JUMP = 0.12
"""Scene units of distance over a few pixels that make a jump."""


def depth_stack(
    cameras: Cameras,
    distance: Float32[np.ndarray, "N H W"],
    kind: Literal["sensor", "monocular"],
    world_scale: float,
    seed: int,
) -> ImageStack:
    """Depth along the optical axis in half precision, 0 where a ray hits nothing.

    Args:
        cameras: all of one size, without skew.
        distance: along the rays through the pixels' centres, scene units, 0 = nothing.
        kind: ``sensor``: exact, in world units; ``monocular``: in each view shifted by up to 1 world unit,
            bent by a smooth error of about 0.03 units, and scaled by 1/2 to 2.
        world_scale: world units per scene unit.
        seed: of the errors.
    """
    slant = np.sqrt(1.0 + (_plane(cameras) ** 2).sum(axis=-1))
    depth = distance / slant * world_scale
    if kind == "monocular":
        random = np.random.default_rng([seed, 1])
        height, width = distance.shape[1:]
        down, right = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        for view in depth:
            bend = np.zeros((height, width))
            for _ in range(3):
                across, along, phase = random.uniform(-1.5, 1.5, 3)
                bend += 0.025 * np.cos(2.0 * math.pi * (across * right + along * down + phase))
            wrong = 2.0 ** random.uniform(-1.0, 1.0) * (view + random.uniform(-1.0, 1.0) + bend)
            view[:] = np.where(view > 0.0, wrong, 0.0)
    return _stack(depth[..., None])


def normal_stack(scene: SceneName, cameras: Cameras, distance: Float32[np.ndarray, "N H W"]) -> ImageStack:
    """Exact unit normals in the camera's axes, in half precision, 0 where a ray hits nothing.

    Args:
        scene: which scene.
        cameras: all of one size, without skew.
        distance: along the rays through the pixels' centres, scene units, 0 = nothing.
    """
    poses, lenses = cameras.c2w.double().numpy(), cameras.intrinsics.double().numpy()
    normals = np.zeros((*distance.shape, 3), np.float32)
    synthetic_render.view_normals(SCENES[scene], poses, lenses, distance, normals)
    return _stack(normals)


def sparse_points(
    scene: SceneName,
    cameras: Cameras,
    rgb: Float32[np.ndarray, "N H W 3"],
    distance: Float32[np.ndarray, "N H W"],
    num_points: int,
    seed: int,
) -> SparsePoints:
    """Points as structure from motion finds them, in scene space, each seen by 3 views or more.

    Args:
        scene: which scene.
        cameras: all of one size, without skew.
        rgb: pictures without noise, 0..1.
        distance: along the rays through the pixels' centres, scene units, 0 = nothing.
        num_points: so many, or fewer where there is not enough texture.
        seed: of the choice and of the errors.
    """
    random = np.random.default_rng([seed, 2])
    found = np.argwhere([_corners(*picture) for picture in zip(rgb, distance, strict=True)])
    found = random.permutation(found)[: 2 * num_points]
    view, row, column = found.T
    plane = _plane(cameras)[view, row, column]
    poses = cameras.c2w.double().numpy()
    directions = np.einsum("pij,pj->pi", poses[view, :, :3], np.c_[plane, np.ones(len(plane))])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    positions = poses[view, :, 3] + distance[view, row, column, None] * directions
    normals, colors = np.empty_like(positions), np.empty_like(positions)
    synthetic_render.settle(SCENES[scene], positions, normals, colors)

    is_seen = _visible(scene, cameras, positions, normals, -directions)
    keep = np.flatnonzero(is_seen.sum(axis=1) >= 3)[:num_points]
    is_seen, positions = is_seen[keep], positions[keep]
    shift, errors = _triangulation_error(cameras, positions, is_seen, random)
    rgb8 = np.round(255.0 * rgb[view[keep], row[keep], column[keep]]).astype(np.uint8)
    return SparsePoints(positions + shift, rgb8, errors, np.argwhere(is_seen))


def _stack(maps: Float32[np.ndarray, "N H W C"] | Float64[np.ndarray, "N H W C"]) -> ImageStack:
    n, height, width, channels = maps.shape
    return ImageStack(
        torch.from_numpy(maps.reshape(-1, channels)).half(),
        torch.tensor([[width, height]] * n),
        torch.arange(n) * (width * height),
    )


def _plane(cameras: Cameras) -> Float64[np.ndarray, "N H W 2"]:
    """Coordinates of the pixels' centres in the plane one unit before each camera."""
    width, height = cameras.size[0].tolist()
    lens = cameras.intrinsics.double().numpy()[:, None, None]
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    focal = np.stack([lens[..., 0, 0], lens[..., 1, 1]], axis=-1)
    return np.asarray((pixels - lens[..., :2, 2]) / focal, np.float64)


def _corners(
    rgb: Float32[np.ndarray, "H W 3"], distance: Float32[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"]:
    """Pixels that a matcher finds again: corners of the texture, clear of the frame and of jumps in depth."""
    strength = cv2.cornerMinEigenVal(np.ascontiguousarray(rgb.mean(axis=2)), 3)
    window = np.ones((2 * _MARGIN + 1, 2 * _MARGIN + 1), np.uint8)
    jump = cv2.dilate(distance, window) - cv2.erode(distance, window)
    is_peak = (strength > _CORNER) & (strength >= cv2.dilate(strength, np.ones((3, 3), np.uint8)))
    is_peak &= (jump < _JUMP) & (distance > 0.0)
    is_peak[:_MARGIN] = is_peak[-_MARGIN:] = is_peak[:, :_MARGIN] = is_peak[:, -_MARGIN:] = False
    return np.asarray(is_peak)


def _visible(
    scene: SceneName,
    cameras: Cameras,
    positions: Float64[np.ndarray, "P 3"],
    normals: Float64[np.ndarray, "P 3"],
    towards: Float64[np.ndarray, "P 3"],
) -> Bool[np.ndarray, "P N"]:
    """Which views see which points freely, not too obliquely, and within 45 degrees of ``towards``."""
    centres = np.ascontiguousarray(cameras.c2w[:, :, 3].double().numpy())
    is_seen = np.zeros((len(positions), len(centres)), np.bool_)
    synthetic_render.sights(SCENES[scene], centres, positions, is_seen)
    away = centres - positions[:, None]
    away /= np.linalg.norm(away, axis=2, keepdims=True)
    is_seen &= np.einsum("pnc,pc->pn", away, normals) > 0.25
    is_seen &= np.einsum("pnc,pc->pn", away, towards) > math.cos(math.radians(45.0))
    local = _in_camera(cameras, positions)
    pixels = np.einsum("nij,pnj->pni", cameras.intrinsics.double().numpy(), local)
    pixels = pixels[..., :2] / pixels[..., 2:]
    return np.asarray(is_seen & ((pixels > 0.0) & (pixels < cameras.size.numpy())).all(axis=2))


def _in_camera(cameras: Cameras, positions: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P N 3"]:
    c2w = cameras.c2w.double().numpy()
    return np.asarray(np.einsum("nji,pnj->pni", c2w[:, :, :3], positions[:, None] - c2w[:, :, 3]))


def _triangulation_error(
    cameras: Cameras,
    positions: Float64[np.ndarray, "P 3"],
    is_seen: Bool[np.ndarray, "P N"],
    random: np.random.Generator,
) -> tuple[Float64[np.ndarray, "P 3"], Float64[np.ndarray, " P"]]:
    """Where errors of the observations move the points, to first order, and the mean that remains, pixels.

    With J the slope of a point's pixels, the shift d minimises the sum of |J d - n|^2 over its views.
    """
    x, y, z = np.moveaxis(_in_camera(cameras, positions), 2, 0)
    lens = cameras.intrinsics.double().numpy()
    slope = np.zeros((*is_seen.shape, 2, 3))
    slope[..., 0, 0], slope[..., 0, 2] = lens[:, 0, 0] / z, -lens[:, 0, 0] * x / z**2
    slope[..., 1, 1], slope[..., 1, 2] = lens[:, 1, 1] / z, -lens[:, 1, 1] * y / z**2
    slope = np.einsum("pnij,nkj->pnik", slope, cameras.c2w[:, :, :3].double().numpy())
    slope *= is_seen[..., None, None]
    noise = random.normal(0.0, _PIXEL_ERROR, (*is_seen.shape, 2)) * is_seen[..., None]
    normal_matrix = np.einsum("pnij,pnik->pjk", slope, slope)
    shift = np.linalg.solve(normal_matrix, np.einsum("pnij,pni->pj", slope, noise)[..., None])[..., 0]
    rest = np.linalg.norm(np.einsum("pnij,pj->pni", slope, shift) - noise, axis=2)
    return shift, rest.sum(axis=1) / is_seen.sum(axis=1)
