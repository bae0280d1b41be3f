"""The tiny capture of a sphere of radius 0.5, with what sensors and networks would say of it, exactly."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from tiny import tiny_scene
from torch import Tensor

from process_data.cameras import image_rays
from utils.types import Batch, ImageStack, Rays, Scene, SparsePoints, Windows

RADIUS = 0.5


def hits(rays: Rays) -> Tensor:
    """Distances to the sphere along the rays; 0 where they miss it."""
    origins, directions = rays.origins.double(), rays.directions.double()
    along = -(origins * directions).sum(dim=1)
    half_squared = RADIUS**2 - (origins + along[:, None] * directions).square().sum(dim=1)
    return torch.where(half_squared > 0, along - half_squared.clamp(min=0).sqrt(), 0.0)


@cache
def scene_with_priors(*overrides: str, monocular: bool = False) -> Scene:
    """The scene with depths, normals and points.

    Args:
        overrides: of ``tiny.yaml``.
        monocular: depths have a scale and a shift of each view's own instead of the world's unit.
    """
    scene = tiny_scene(*overrides)
    world_scale = float(torch.linalg.det(scene.world_from_scene[:3, :3])) ** (1 / 3)
    depths, normals, seen = [], [], []
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(400, 3, dtype=torch.float64, generator=draw)
    surface = RADIUS * torch.nn.functional.normalize(directions, dim=1)
    for view in range(len(scene.cameras)):
        rays, pose = image_rays(scene.cameras, view), scene.cameras.c2w[view].double()
        distance = hits(rays)
        depth = distance * (rays.directions.double() @ pose[:, 2]) * world_scale
        if monocular:
            depth = torch.where(depth > 0, (0.2 + 0.1 * view) * depth + 0.3 * view, 0.0)
        normal = (rays.origins + distance[:, None] * rays.directions) / RADIUS @ pose[:, :3]
        depths.append(depth[:, None])
        normals.append(torch.where(distance[:, None] > 0, normal, 0.0))
        is_facing = ((pose[:, 3] - surface) * surface).sum(dim=1) > 0
        seen += [[point, view] for point in torch.where(is_facing)[0].tolist()]
    size, offsets = scene.images.size, scene.images.offsets
    points = SparsePoints(
        surface.numpy(),
        np.zeros((len(surface), 3), np.uint8),
        np.full(len(surface), 0.5),
        np.array(sorted(seen)),
    )
    return replace(
        scene,
        depths=ImageStack(torch.cat(depths).half(), size, offsets),
        normals=ImageStack(torch.cat(normals).half(), size, offsets),
        points=points,
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch of some of the rays."""
    chosen = {
        name: values[rows] if isinstance(values, Tensor) and name != "points" else values
        for name, values in vars(batch).items()
    }
    rays = Rays(**{name: None if v is None else v[rows] for name, v in vars(batch.rays).items()})
    if batch.windows is None:
        return Batch(**{**chosen, "rays": rays})
    # All rays have one here, and those that are chosen keep theirs.
    every = vars(batch.windows())
    own = Windows(**{name: v[rows] if isinstance(v, Tensor) else v for name, v in every.items()})
    return Batch(**{**chosen, "rays": rays, "windows": lambda: own})
