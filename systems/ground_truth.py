"""How far what a model renders is from a surface that is known: depths and normals of held-out views."""

import numpy as np
import torch

from systems.rendering import ViewRender, axis_depth
from utils.mesh import transform_mesh
from utils.metrics import depth_errors, normal_errors
from utils.raster import render_mesh
from utils.types import Cameras, Scene, TriangleMesh

SURFACE_ERRORS = ("depth_abs_rel", "depth_rmse", "normal_degrees")
"""Keys of :func:`surface_errors`."""


def known_surface(scene: Scene) -> TriangleMesh | None:
    """The true surface in scene space; ``None`` where it is not known, or cannot be rasterised.

    It cannot through lenses, which bend straight edges, nor in a warped space.
    """
    if scene.reference_mesh is None or scene.cameras.lenses or scene.cameras.ndc is not None:
        return None
    return transform_mesh(scene.reference_mesh, np.linalg.inv(scene.world_from_scene.numpy()))


def surface_errors(view: ViewRender, surface: TriangleMesh, cameras: Cameras, index: int) -> dict[str, float]:
    """Errors of one view over the pixels that show the true surface and in which the model shows one.

    A silhouette that is wrong is not among them: PSNR and the mesh's distances say that.

    Returns:
        ``depth_abs_rel`` (share of the depth) and ``depth_rmse`` (scene units), along the optical axis, see
        :func:`utils.metrics.depth_errors`; ``normal_degrees``, the mean angle between normals, 0..180. NaN if
        there are no such pixels.
    """
    pose, intrinsics = cameras.c2w[index].numpy(), cameras.intrinsics[index].numpy()
    width, height = cameras.size[index].tolist()
    truth = render_mesh(surface, pose, intrinsics, (width, height))
    depth = axis_depth(view, cameras, index)
    shown = ((depth > 0) & torch.from_numpy(truth.mask)).float()
    depths = depth_errors(depth, torch.from_numpy(truth.depth), shown)
    normals = normal_errors(view.normal, torch.from_numpy(truth.normal), shown)
    return {
        "depth_abs_rel": depths["abs_rel"],
        "depth_rmse": depths["rmse"],
        "normal_degrees": normals["mean_degrees"],
    }
