"""How well the mesh is the surface that the model renders, seen from some of the photographs.

::

    photograph | render | mesh, its vertex colours | depth of the mesh less that of the render
                                                     blue: the mesh is in front, red: behind
                                                     black: only the mesh is there, grey: only the render

A gap says that the density is still wide (train longer), that cleaning dropped a part which the render shows
(``export.keep_components``), or that the voxels are too coarse (``export.resolution``). Both are seen through
the pinhole part of a lens, so that what is compared is exact; a distorted photograph does not lie on them.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from process_data.cameras import grid_size, scale_intrinsics
from systems.rendering import ViewRender, axis_depth, render_view
from utils.images import panel, to_uint8, write_png
from utils.memory import Chunks
from utils.raster import MeshRender, render_mesh
from utils.types import Progress, Scene, TriangleMesh

log = logging.getLogger(__name__)

NUM_VIEWS = 4
MAX_WIDTH = 320
"""Pixels; larger views are rendered smaller."""
_CAPTIONS = ("photograph", "render", "mesh", "depth difference")
_CAPTION_HEIGHT = 20


@dataclass(frozen=True)
class _Pair:
    """One view of both."""

    render: ViewRender
    mesh: MeshRender
    difference: Float32[np.ndarray, "H W"]
    """Depth along the optical axis, mesh less render, scene units; 0 where one is absent."""
    is_rendered: Bool[np.ndarray, "H W"]

    @property
    def in_both(self) -> Bool[np.ndarray, "H W"]:
        return self.is_rendered & self.mesh.mask

    @property
    def in_one(self) -> Bool[np.ndarray, "H W"]:
        return self.is_rendered ^ self.mesh.mask


def compare_with_render(
    scene: Scene, mesh: TriangleMesh, model: Any, progress: Progress, path: Path, chunks: Chunks
) -> dict[str, object] | None:
    """Draw four training views of both side by side, and measure how far they are apart.

    Args:
        scene: gives the views.
        mesh: in scene space.
        model: renders.
        progress: of the checkpoint.
        path: of the picture.
        chunks: rays rendered at once.

    Returns:
        Ready for JSON: ``views``; over the pixels that show both, the median and the 95th percentile of the
        absolute depth difference, ``*_world`` in world units and ``*_percent`` of the scene's radius
        (``None``: there are no such pixels); ``only_one``, the share (0..1) of pixels with mesh or render
        that show just one. ``None`` for a warped scene, in which straight rays do not meet the mesh.
    """
    if scene.cameras.ndc is not None:
        log.info("mesh against render: left out, because dataset.ndc warps what the rays pass through")
        return None
    views = spread_views(scene)
    pinholes = replace(scene, cameras=replace(scene.cameras, lenses=()))
    pairs = [_look(pinholes, view, mesh, model, progress, chunks) for view in views]
    gaps = np.concatenate([np.abs(pair.difference[pair.in_both]) for pair in pairs])
    num_one = sum(int(pair.in_one.sum()) for pair in pairs)
    median, high = np.percentile(gaps, [50.0, 95.0]).tolist() if len(gaps) else (None, None)
    world = scene.world_scale
    only_one = num_one / max(num_one + len(gaps), 1)
    report: dict[str, object] = {
        "views": [scene.image_names[view] for view in views],
        **{f"median_depth_difference_{k}": v for k, v in _in_units(median, world).items()},
        **{f"p95_depth_difference_{k}": v for k, v in _in_units(high, world).items()},
        "only_one": only_one,
    }
    # Below a thousandth of a percent of the radius there is nothing but rounding to be seen.
    limit = max(high or 0.0, 1e-5)
    write_png(path, _draw(scene, views, pairs, limit, limit * world))
    log.info(
        "mesh against render: depths differ by %s in the median; %.2g %% of the pixels show only one; %s",
        "nothing, for no pixel shows both" if median is None else f"{100 * median:.3g} % of the radius",
        100 * only_one,
        path.absolute(),
    )
    return report


def _in_units(length: float | None, world: float) -> dict[str, float | None]:
    """A length of the scene in the world's unit, and in percent of the scene's radius, which is 1."""
    return {
        "world": None if length is None else length * world,
        "percent": None if length is None else 100 * length,
    }


def spread_views(scene: Scene, count: int = NUM_VIEWS) -> list[int]:
    """Choose training views whose cameras stand far apart: the first, then always the farthest from all."""
    views = np.array(scene.train_indices)
    centres = scene.cameras.c2w[views, :, 3].double().numpy()
    chosen = [0]
    distance = np.linalg.norm(centres - centres[0], axis=1)
    while len(chosen) < min(count, len(views)):
        # No view is taken twice, not even where all cameras stand in one place.
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(centres - centres[chosen[-1]], axis=1))
    return sorted(int(views[index]) for index in chosen)


def _look(
    scene: Scene, view: int, mesh: TriangleMesh, model: Any, progress: Progress, chunks: Chunks
) -> _Pair:
    cameras = scene.cameras
    full = cameras.size[view].tolist()
    scale = min(1.0, MAX_WIDTH / full[0])
    render = render_view(model, cameras, view, progress, chunks, scale, scene.background_color)
    width, height = grid_size(cameras, view, scale)
    intrinsics = scale_intrinsics(cameras.intrinsics[view], (width / full[0], height / full[1]))
    pose = cameras.c2w[view]
    raster = render_mesh(mesh, pose.numpy(), intrinsics.numpy(), (width, height))
    is_rendered = (render.opacity > 0.5).numpy()
    difference = raster.depth - axis_depth(render, cameras, view, scale).numpy()
    return _Pair(render, raster, np.where(is_rendered & raster.mask, difference, np.float32(0)), is_rendered)


def _draw(
    scene: Scene, views: list[int], pairs: list[_Pair], limit: float, limit_world: float
) -> UInt8[np.ndarray, "H W 3"]:
    widest = max(pair.difference.shape[1] for pair in pairs)
    rows = [panel([_line(name, widest) for name in _CAPTIONS])]
    for view, pair in zip(views, pairs, strict=True):
        height, width = pair.difference.shape
        photo = Image.fromarray(scene.images.image(view).numpy())
        plain = np.array(scene.background_color, np.float32)
        color = pair.mesh.color if pair.mesh.color is not None else 0.5 + 0.5 * pair.mesh.normal
        pictures = [
            np.asarray(photo.resize((width, height), Image.Resampling.BOX)),
            to_uint8(pair.render.rgb.numpy()),
            to_uint8(np.where(pair.mesh.mask[..., None], color, plain)),
            _difference_to_rgb(pair, limit),
        ]
        rows.append(panel([_filled_up(picture, widest) for picture in pictures]))
    scale = (
        f"blue: mesh in front of the render, red: behind; full colour at {limit_world:.3g} world units "
        f"({100 * limit:.3g} % of the scene's radius); black: mesh alone, grey: render alone"
    )
    rows.append(_line(scale, rows[0].shape[1]))
    return np.concatenate([np.pad(row, ((0, 4), (0, 0), (0, 0)), constant_values=255) for row in rows])


def _difference_to_rgb(pair: _Pair, limit: float) -> UInt8[np.ndarray, "H W 3"]:
    """Blue - white - red from ``-limit`` to ``limit``; white where there is nothing."""
    share: Float64[np.ndarray, "H W 1"] = np.clip(pair.difference / limit, -1.0, 1.0).astype(float)[..., None]
    red, blue = np.array([0.80, 0.10, 0.10]), np.array([0.10, 0.20, 0.85])
    colors = 1.0 - np.maximum(share, 0) * (1.0 - red) - np.maximum(-share, 0) * (1.0 - blue)
    colors[pair.mesh.mask & ~pair.is_rendered] = 0.0
    colors[pair.is_rendered & ~pair.mesh.mask] = 0.55
    return to_uint8(colors)


def _line(text: str, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """A line of text on white, set smaller where it would not fit."""
    image = Image.new("RGB", (width, _CAPTION_HEIGHT), "white")
    font = ImageFont.load_default(12)
    length = font.getlength(text)
    if length > width:
        font = ImageFont.load_default(max(12 * width / length, 1.0))
    ImageDraw.Draw(image).text((0, _CAPTION_HEIGHT // 2), text, "black", font, anchor="lm")
    return np.asarray(image)


def _filled_up(picture: UInt8[np.ndarray, "H W 3"], width: int) -> UInt8[np.ndarray, "H W2 3"]:
    """With white at the right, for columns of views of different sizes."""
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
