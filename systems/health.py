"""Early checks of a run.

Most bad surfaces come from the poses, the region of interest or the masks, and show within a minute.
"""

import logging
from typing import Any

import torch

from models.density_surface import DensitySurface
from process_data.batches import RayBatches
from systems.record import Run
from utils.errors import ExportError
from utils.extraction import extract_surface
from utils.mesh import keep_largest_components, transform_mesh, unwarp_mesh, write_mesh
from utils.types import Progress, Scene

log = logging.getLogger(__name__)

_PREVIEW_RESOLUTION = 128
_MARGIN_DB = 2.0
_REGION_KEYS = "dataset.region, dataset.region_scale and dataset.apply_mask, and at the pictures of --inspect"


def constant_color_psnr(scene: Scene) -> float:
    """PSNR in dB that the best single colour reaches on the training pixels.

    With masks the background is taken as random colours, uniform in 0..1 (variance 1/12), as in training.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    squares = torch.zeros(3, dtype=torch.float64)
    count = 0
    for index in scene.train_indices:
        rgb = scene.images.image(index).reshape(-1, 3).double() / 255.0
        if scene.masks is not None:
            mask = scene.masks.image(index).reshape(-1, 1) > 127
            sums += torch.where(mask, rgb, 0.5).sum(0)
            squares += torch.where(mask, rgb.square(), 0.25 + 1.0 / 12.0).sum(0)
        else:
            sums += rgb.sum(0)
            squares += rgb.square().sum(0)
        count += len(rgb)
    variance = (squares / count - (sums / count).square()).mean()
    return float(-10.0 * torch.log10(variance.clamp(min=1e-10)))


def check_learning(scene: Scene, psnr: float) -> list[str]:
    """Compare the training PSNR (dB) with that of a constant colour; warn when it is not 2 dB above."""
    constant = constant_color_psnr(scene)
    log.info("training PSNR %.1f dB; a constant colour reaches %.1f dB", psnr, constant)
    if psnr >= constant + _MARGIN_DB:
        return []
    return [
        (
            f"PSNR {psnr:.1f} dB is hardly above a constant colour's {constant:.1f} dB: suspect wrong poses, "
            "an object outside the unit sphere, or wrong masks; "
            f"look at {_REGION_KEYS}, and at trainer.optimizer if those are right"
        )
    ]


def check_health(scene: Scene, model: Any, progress: Progress, run: Run) -> list[str]:
    """Write a coarse preview mesh and one line on the surface; return what looks wrong and the key to change.

    Checked are the sign of the distance at the centre and at the edge of the unit sphere and at cameras that
    stand in it, the share of training rays that meet the surface, and how much of the sphere the surface
    fills.
    """
    warnings: list[str] = []
    surface = model.frozen_at(progress)
    edge = 0.97 * torch.nn.functional.normalize(
        torch.randn(2048, 3, generator=torch.Generator().manual_seed(0)), dim=1
    )
    center_sdf = float(surface.query_sdf(torch.zeros(1, 3, device=surface.device)))
    edge_inside = float((surface.query_sdf(edge.to(surface.device)) < 0).float().mean())
    cameras = scene.cameras.c2w[list(scene.train_indices), :, 3]
    cameras = cameras[cameras.norm(dim=1) < 1.0].to(surface.device)
    is_room = len(cameras) > 0.5 * len(scene.train_indices)
    cameras_inside = float((surface.query_sdf(cameras) < 0).float().mean()) if is_room else 0.0
    # Drawn on the CPU: a GPU has the photographs once and may not have room for them twice.
    rays = RayBatches(scene, seed=0).draw(1024).rays.to(surface.device)
    with torch.no_grad():
        white = torch.ones(3, device=surface.device)
        hit_share = float((model.render(rays, progress, white).opacity > 0.5).float().mean())
    extent = 0.0
    path = run.save / "preview.ply"
    try:
        mesh = extract_surface(surface.query_sdf, _PREVIEW_RESOLUTION, device=surface.device)
        mesh = keep_largest_components(mesh, 1)
        extent = float((mesh.vertices**2).sum(axis=1).max() ** 0.5)
        if scene.cameras.ndc is not None:
            mesh = unwarp_mesh(mesh, scene.cameras.ndc)
        write_mesh(path, transform_mesh(mesh, scene.world_from_scene.numpy()))
    except ExportError as error:
        warnings.append(
            f"no surface yet ({error}): the object may lie outside the unit sphere; look at {_REGION_KEYS}"
        )
    log.info(
        "health: sdf at centre %+.3f, %.0f %% of the sphere's edge inside, %.0f %% of rays hit, "
        "surface reaches %.2f of the unit sphere; preview mesh %s",
        *(center_sdf, 100 * edge_inside, 100 * hit_share, extent, path if extent else "none"),
    )
    if cameras_inside > 0.3:
        if isinstance(surface, DensitySurface):
            remedy = "fog before the lens; look at model.gradient_scaling and model.near"
        else:
            room = "a room seen from within needs model.sdf.inside_out=true"
            remedy = f"{room}; if this is none, look at {_REGION_KEYS}"
        warnings.append(f"{100 * cameras_inside:.0f} % of the cameras stand inside the surface: {remedy}")
    elif edge_inside > 0.6 and not is_room:
        warnings.append(
            f"{100 * edge_inside:.0f} % of the unit sphere's edge lies inside the surface: inside-out, "
            "or the sphere is smaller than the object; set model.sdf.inside_out=false unless the cameras "
            f"stand in a room, and look at {_REGION_KEYS}"
        )
    if hit_share < 0.01:
        warnings.append(
            f"only {100 * hit_share:.1f} % of the training rays meet a surface: the cameras do not look at "
            f"the unit sphere, or the masks are empty; look at {_REGION_KEYS}"
        )
    if 0 < extent < 0.1:
        warnings.append(
            f"the surface fills only {extent:.2f} of the unit sphere: the sphere is far too large; "
            f"look at {_REGION_KEYS}"
        )
    return warnings
