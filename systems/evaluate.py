"""Looking at a model: whole views, validation pictures, held-out metrics, the test video."""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from process_data.batches import full_image
from process_data.camera_paths import camera_path
from systems.export import export_mesh
from systems.ground_truth import SURFACE_ERRORS, known_surface, surface_errors
from systems.mesh_against_render import compare_with_render
from systems.record import Run
from systems.rendering import RAYS_PER_CHUNK, ViewRender, render_view
from utils.config import Config
from utils.errors import ExportError
from utils.images import depth_to_rgb, normal_to_rgb, panel, to_uint8, write_png
from utils.memory import Chunks
from utils.metrics import lpips_missing, lpips_or_none, psnr, ssim
from utils.types import Progress, Scene
from utils.video import write_video

log = logging.getLogger(__name__)

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TestConfig:
    """What ``--test`` makes besides the held-out metrics and the mesh."""

    video: bool = True
    """Render a camera path (dataset.test_steps frames) to save/<name>.mp4."""
    path: str = "orbit"
    """The path: orbit; interp, a ride past the training cameras; or a JSON file with poses in world
    coordinates (see ``process_data/camera_paths.py``)."""
    video_scale: float = 1.0
    """Size of the video's frames relative to the photographs."""
    fps: float = 20.0
    """Frames per second of the video."""
    rays_per_chunk: int = RAYS_PER_CHUNK
    """Rays rendered at once; halved when memory runs out."""

    def __post_init__(self) -> None:
        if not 0 < self.video_scale <= 4:
            raise ValueError(f"test.video_scale: must lie in (0, 4], got {self.video_scale}")
        if self.rays_per_chunk < 1 or not self.fps > 0:
            raise ValueError("test.rays_per_chunk, test.fps: must be above 0")

    def chunks(self) -> Chunks:
        """For one job: rays rendered at once."""
        return Chunks("rays", self.rays_per_chunk, "test.rays_per_chunk")


def view_panel(view: ViewRender, target: Float[Tensor, "H W 3"], c2w: Float[Tensor, "3 4"]) -> Picture:
    """Rendered colour, photograph, normal (camera frame), depth and opacity, side by side."""
    opacity = view.opacity.numpy()
    return panel(
        [
            to_uint8(view.rgb.numpy()),
            to_uint8(target.numpy()),
            normal_to_rgb(view.normal.numpy(), c2w.numpy()),
            depth_to_rgb(view.depth.numpy(), opacity),
            np.repeat(to_uint8(opacity)[..., None], 3, axis=2),
        ]
    )


def _target(scene: Scene, index: int) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W"] | None]:
    """What a render should show: the photograph, with the scene's plain colour outside the mask if any."""
    batch = full_image(scene, index)
    width, height = scene.cameras.size[index].tolist()
    rgb = batch.rgb.view(height, width, 3)
    if batch.mask is None:
        return rgb, None
    mask = batch.mask.view(height, width)
    outside = (1.0 - mask[..., None]) * torch.tensor(scene.background_color)
    return mask[..., None] * rgb + outside, mask


def save_validation_picture(
    scene: Scene, model: Any, progress: Progress, run: Run, step: int, turn: int, chunks: Chunks | None = None
) -> None:
    """Render one view to ``save/val`` and log its PSNR.

    ``turn`` counts through the held-out views, or through the training views where none is held out.
    """
    views = scene.test_indices or scene.train_indices
    index = views[turn % len(views)]
    view = render_view(
        *(model, scene.cameras, index, progress, chunks),
        background_color=scene.background_color,
        as_photographed=True,
    )
    target, _ = _target(scene, index)
    path = run.save / "val" / f"{step:06d}_{Path(scene.image_names[index]).stem}.png"
    write_png(path, view_panel(view, target, scene.cameras.c2w[index]))
    kind = "held-out" if scene.test_indices else "training"
    log.info(
        "validation: %s view %s, PSNR %.2f dB, %s",
        kind,
        scene.image_names[index],
        psnr(view.rgb, target),
        path,
    )


def test(config: Config, scene: Scene, model: Any, progress: Progress, run: Run, step: int) -> dict[str, Any]:
    """Measure held-out views, write comparison pictures, the video and the mesh, and ``save/metrics.json``.

    Without held-out views there is nothing to compare with, and the metrics say so instead of quoting
    training views.

    Raises:
        ExportError: there is no mesh; everything else is written before.
    """
    chunks = config.test.chunks()
    views = measure_views(scene, model, progress, run, chunks)
    names = ("psnr", "psnr_masked", "ssim", "ssim_masked", "lpips", "lpips_masked", *SURFACE_ERRORS)
    mean = {name: _mean([view[name] for view in views]) for name in names}
    if config.test.video:
        _write_video(config, scene, model, progress, run, chunks)
    failure: ExportError | None = None
    surface: dict[str, Any] = dict.fromkeys(("mesh", "geometry", "mesh_against_render"))
    try:
        surface = export_and_compare(config, scene, model, progress, run, step, chunks)
    except ExportError as error:
        failure = error
    metrics = {
        "step": step,
        "split": "held-out" if views else "none (set dataset.holdout to measure)",
        "mean": mean,
        "lpips_note": lpips_missing() or "measured",
        "views": views,
        **surface,
    }
    path = run.save / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2, allow_nan=False, default=str) + "\n")
    geometry = surface["geometry"]
    run.list_in_table({**mean, "chamfer": geometry["chamfer"] if geometry else None})
    shown = (
        ", ".join(f"{name} {value:.4g}" for name, value in mean.items() if value is not None)
        or "no held-out views"
    )
    log.info("held-out: %s", shown)
    log.info("wrote %s", path)
    if failure is not None:
        raise failure
    return metrics


def export_and_compare(
    config: Config,
    scene: Scene,
    model: Any,
    progress: Progress,
    run: Run,
    step: int,
    chunks: Chunks | None = None,
) -> dict[str, Any]:
    """Write the mesh, set it against what the model renders, and say in ``save/mesh.json`` how good it is.

    Returns:
        ``mesh``: counts, measures and holes; ``geometry``: distances to the reference mesh, if there is one;
        ``mesh_against_render``: see :func:`systems.mesh_against_render.compare_with_render`.
    """
    report = export_mesh(config, scene, model.frozen_at(progress, config.export.extent), run, step)
    gap = compare_with_render(
        *(scene, report.in_scene, model, progress, run.save / "mesh_vs_render.png"),
        chunks or config.test.chunks(),
    )
    surface = {"mesh": report.mesh, "geometry": report.geometry, "mesh_against_render": gap}
    content = json.dumps({"step": step, **surface}, indent=2, allow_nan=False)
    (run.save / "mesh.json").write_text(content + "\n")
    return surface


def measure_views(
    scene: Scene, model: Any, progress: Progress, run: Run, chunks: Chunks
) -> list[dict[str, Any]]:
    """Render every held-out view, write its comparison picture to ``save/test``, and return its metrics.

    ``psnr`` is over the whole picture (outside the mask the target is the plain background), ``psnr_masked``
    over the mask's pixels. Where the true surface is known, depths and normals are compared as well.
    """
    measured = []
    surface = known_surface(scene)
    for index in tqdm(scene.test_indices, desc="held-out views", unit="view", leave=False):
        view = render_view(
            model,
            scene.cameras,
            index,
            progress,
            chunks,
            background_color=scene.background_color,
        )
        target, mask = _target(scene, index)
        path = run.save / "test" / f"{Path(scene.image_names[index]).stem}.png"
        write_png(path, view_panel(view, target, scene.cameras.c2w[index]))
        is_measurable = mask is not None and bool((mask > 0.5).any())
        errors = {} if surface is None else surface_errors(view, surface, scene.cameras, index)
        measured.append(
            {
                "view": scene.image_names[index],
                "psnr": _finite_or_none(psnr(view.rgb, target)),
                "psnr_masked": _finite_or_none(psnr(view.rgb, target, mask)) if is_measurable else None,
                "ssim": ssim(view.rgb, target),
                "ssim_masked": _finite_or_none(ssim(view.rgb, target, mask)) if is_measurable else None,
                "lpips": lpips_or_none(view.rgb, target)[0],
                "lpips_masked": lpips_or_none(view.rgb, target, mask)[0] if is_measurable else None,
                **{name: _finite_or_none(errors.get(name, math.nan)) for name in SURFACE_ERRORS},
                "picture": str(path),
            }
        )
    return measured


def _finite_or_none(value: float) -> float | None:
    # White rendered where the photograph is white has an infinite PSNR, which JSON has no number for.
    return value if math.isfinite(value) else None


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _write_video(
    config: Config, scene: Scene, model: Any, progress: Progress, run: Run, chunks: Chunks
) -> None:
    path = camera_path(scene, config.test.path, config.dataset.test_steps)

    def frames() -> Iterator[Picture]:
        for index in tqdm(range(len(path)), desc="video", unit="frame", leave=False):
            view = render_view(
                model,
                path,
                index,
                progress,
                chunks,
                config.test.video_scale,
                scene.background_color,
            )
            normal = normal_to_rgb(view.normal.numpy(), path.c2w[index].numpy())
            yield panel([to_uint8(view.rgb.numpy()), normal])

    written = write_video(run.save / f"{run.name}.mp4", frames(), config.test.fps)
    log.info("wrote %s", written)
