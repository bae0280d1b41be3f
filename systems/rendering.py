"""Whole views of a model, rendered chunk by chunk without gradients."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from process_data.cameras import grid_size, image_rays
from utils.memory import Chunks
from utils.types import Cameras, Progress

RAYS_PER_CHUNK = 4096
"""Rays rendered at once unless ``test.rays_per_chunk`` says otherwise."""


@dataclass(frozen=True)
class ViewRender:
    """A rendered view."""

    rgb: Float[Tensor, "H W 3"]
    opacity: Float[Tensor, "H W"]
    depth: Float[Tensor, "H W"]
    normal: Float[Tensor, "H W 3"]


@torch.no_grad()
def render_view(
    model: Any,
    cameras: Cameras,
    index: int,
    progress: Progress,
    chunks: Chunks | None = None,
    scale: float = 1.0,
    background_color: tuple[float, float, float] = (1.0, 1.0, 1.0),
    as_photographed: bool = False,
) -> ViewRender:
    """Render all pixels of one camera, over a plain colour where no background is learned, chunk by chunk.

    Args:
        model: any method's.
        cameras: the capture's, or a path's.
        index: the camera.
        progress: annealing and open levels.
        chunks: sizes of the pieces; those of the defaults if ``None``.
        scale: size of the picture relative to the camera's.
        background_color: 0..1.
        as_photographed: with what the model has learned about view ``index`` of the capture, if that was
            trained on: in the light and exposure of its photograph. By default nothing of the kind is used,
            so that all pictures of a scene match.

    Raises:
        ExportError: the device has no memory for a single ray.
    """
    width, height = grid_size(cameras, index, scale)
    device = model.device
    rays = image_rays(cameras, index, scale).to(device)
    if not as_photographed:
        rays = replace(rays, camera_indices=torch.full_like(rays.camera_indices, -1))
    background = torch.tensor(background_color, device=device)

    def pixels_of(rows: slice) -> Float[Tensor, "R 8"]:
        part = model.render(rays[rows], progress, background)
        return torch.cat([part.rgb, part.opacity[:, None], part.depth[:, None], part.normal], dim=1).cpu()

    chunks = chunks or Chunks("rays", RAYS_PER_CHUNK, "test.rays_per_chunk")
    pixels = torch.cat([part for _, part in chunks.results(pixels_of, len(rays))]).view(height, width, 8)
    return ViewRender(pixels[..., :3], pixels[..., 3], pixels[..., 4], pixels[..., 5:])


def axis_depth(view: ViewRender, cameras: Cameras, index: int, scale: float = 1.0) -> Float[Tensor, "H W"]:
    """Mean depth of the surface along the optical axis, scene units; 0 where less than half opaque."""
    cosine = image_rays(cameras, index, scale).directions @ cameras.c2w[index, :, 2]
    depth = view.depth / view.opacity.clamp(min=0.5) * cosine.view_as(view.depth)
    return torch.where(view.opacity > 0.5, depth, 0.0)
