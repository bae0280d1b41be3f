"""Writes a scene in the layout of NeuS's DTU captures.

::

    folder/
      image/000000.png 000001.png ...     photographs in the scene's order
      mask/000000.png ...                 255 = foreground, where the scene has masks
      cameras_sphere.npz                  world_mat_i, scale_mat_i: i-th picture

``world_mat_i = [K | 0; 0 1] @ camera_from_world`` projects world points to pixels, whose centres NeuS puts at
whole numbers: 0.5 is taken from cx and cy. ``scale_mat_i`` takes the unit sphere to the region of interest,
so that ``(world_mat_i @ scale_mat_i)[:3, :4]`` projects unit-sphere points. It is a scale and a shift without
a rotation, because NeuS's mesh export reads the scale from its first entry alone.

Lens distortion has no place in it: pictures of such lenses are resampled to pinholes.

Source: Wang et al., NeuS, NeurIPS 2021, https://github.com/Totoro97/NeuS.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float64

from process_data.views import View
from process_data.writers.views import reported, square_matrix, to_pinholes, world_views, write_pictures
from utils.types import Scene


def write_neus(scene: Scene, folder: Path) -> list[Path]:
    """Write a scene in NeuS's layout; files of the same names are replaced.

    Returns:
        What was written.

    Raises:
        ExportError: a lens is too wide for a pinhole, or a file cannot be written.
    """
    sources = world_views(scene)
    targets = to_pinholes(sources, lambda view: view.lens is not None, "NeuS's layout")
    names = [f"{index:06d}.png" for index in range(len(sources))]
    written = write_pictures(
        scene,
        sources,
        targets,
        [folder / "image" / name for name in names],
        [folder / "mask" / name for name in names],
    )
    path = folder / "cameras_sphere.npz"
    matrices = {f"world_mat_{index}": _world_mat(view) for index, view in enumerate(targets)}
    world_from_scene = scene.world_from_scene.numpy()
    scale_mat = np.diag([*([np.cbrt(np.linalg.det(world_from_scene[:3, :3]))] * 3), 1.0])
    scale_mat[:3, 3] = world_from_scene[:3, 3]
    matrices |= {f"scale_mat_{index}": scale_mat for index in range(len(targets))}
    with reported(path):
        np.savez(path, allow_pickle=False, **matrices)
    return [*written, path]


def _world_mat(view: View) -> Float64[np.ndarray, "4 4"]:
    """From world points to pixels with centres at whole numbers."""
    pinhole = np.eye(4)
    pinhole[:3, :3] = view.intrinsics
    pinhole[:2, 2] -= 0.5
    return pinhole @ np.linalg.inv(square_matrix(view.c2w))
