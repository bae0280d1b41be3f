"""Refinement of camera poses: six numbers per training image, learned with the scene.

A ray of image i leaves from o + t_i along exp([w_i]x) d: its camera turns about its own centre by the
rotation vector w_i (radians, scene axes) and moves by t_i (scene units). Both together are any rigid motion;
that they are kept apart, instead of as one twist of SE(3), lets a camera turn without swinging around the
scene.

Photographs fix poses up to a similarity of all cameras together with the scene (the gauge). So that the scene
stays where the capture puts it, the mean of all w_i and of all t_i is taken off, and of the t_i what grows or
shrinks the cloud of camera centres: the seven freedoms of a similarity, for small motions.

Where poses are right already, refining them only adds noise; and where they are wrong by more than a few
pixels, the coarse levels of the scene must be learned first (BARF), which ``start`` and coarse-to-fine levels
(``system.levels_end``) are for. Held-out views keep the poses of the capture.

Source: Wang et al., "NeRF--", 2021; Lin et al., "BARF: Bundle-Adjusting Neural Radiance Fields", ICCV 2021.
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.per_image import row_of_view, rows_of
from process_data.cameras import intersect_unit_sphere
from process_data.writers.transforms import write_cameras
from utils.errors import ConfigError
from utils.types import Progress, Rays, Scene

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoseConfig:
    """Refinement of the training images' camera poses."""

    refine: bool = False
    """Learn a small motion of each camera. Poses that are right already can only get worse."""
    start: float = 0.1
    """Fraction of training before which the poses stay as they are."""
    rate: float = 1e-3
    """Learning rate: a step moves a camera by about this, radians and scene units."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"trainer.poses.start: must lie in [0, 1), got {self.start}")
        if not 0 < self.rate <= 0.1:
            raise ValueError(f"trainer.poses.rate: must lie in (0, 0.1], got {self.rate}")


def rotate(vectors: Float[Tensor, "R 3"], rotation: Float[Tensor, "R 3"]) -> Float[Tensor, "R 3"]:
    """Turn each vector by its rotation vector: exp([w]x) v (Rodrigues).

    v + (sin a / a) w x v + ((1 - cos a) / a^2) w x (w x v) with a = |w|; from their series below a = 0.1, so
    that neither the values nor any derivative suffers at 0. (1, 0, 0) by (0, 0, pi / 2) is (0, 1, 0).
    """
    square = rotation.square().sum(dim=1, keepdim=True)
    is_small = square < 1e-2
    # The branch that is not taken must not divide by zero either: its NaN would reach the gradient.
    angle = torch.where(is_small, 1.0, square).sqrt()
    first = torch.where(
        is_small, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), torch.sin(angle) / angle
    )
    second = torch.where(
        is_small,
        0.5 - square / 24 * (1 - square / 30 * (1 - square / 56)),
        (1 - torch.cos(angle)) / angle.square(),
    )
    once = torch.linalg.cross(rotation, vectors)
    return vectors + first * once + second * torch.linalg.cross(rotation, once)


class PoseRefinement(nn.Module):
    """Small motions of the training images' cameras; see :func:`check_refinement` for where there can be."""

    def __init__(self, config: PoseConfig, scene: Scene) -> None:
        super().__init__()
        self.start = config.start
        self.per_image = nn.Parameter(torch.zeros(len(scene.train_indices), 6))
        """Rotation vectors and translations, before the gauge is taken off."""
        centers = scene.cameras.c2w[list(scene.train_indices), :, 3]
        self.row_of_view: Tensor
        self.offsets: Tensor
        self.register_buffer("row_of_view", row_of_view(scene))
        self.register_buffer("offsets", centers - centers.mean(dim=0), persistent=False)

    def learns(self, progress: Progress) -> bool:
        """Whether poses are being refined by now."""
        return progress.fraction >= self.start

    def motions(self) -> tuple[Float[Tensor, "T 3"], Float[Tensor, "T 3"]]:
        """Rotation vectors (radians) and translations (scene units), scene axes, without the gauge."""
        rotation, translation = (self.per_image - self.per_image.mean(dim=0)).split(3, dim=1)
        growth = (translation * self.offsets).sum() / self.offsets.square().sum().clamp(min=1e-12)
        return rotation, translation - growth * self.offsets

    def forward(self, rays: Rays, progress: Progress) -> Rays:
        """The rays of the cameras as they stand now; those of other views than the training's stay.

        Origins and directions carry gradients once the poses are being refined; where the rays meet the unit
        sphere follows them as a constant.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns(progress)):
            motions = torch.cat(self.motions(), dim=1)
            still = torch.zeros_like(motions[0])
            rows = rows_of(motions, still, self.row_of_view, rays.camera_indices)
            rotation, translation = rows.split(3, dim=1)
            origins, directions = rays.origins + translation, rotate(rays.directions, rotation)
        near, far = intersect_unit_sphere(origins.detach(), directions.detach())
        return replace(rays, origins=origins, directions=directions, near=near, far=far)

    @torch.no_grad()
    def refined(self, scene: Scene) -> Scene:
        """The scene with its training views' cameras as they stand now."""
        rotation, translation = (motion.cpu() for motion in self.motions())
        views = list(scene.train_indices)
        c2w = scene.cameras.c2w.clone()
        for column in range(3):
            c2w[views, :, column] = rotate(c2w[views, :, column], rotation)
        c2w[views, :, 3] += translation
        return replace(scene, cameras=replace(scene.cameras, c2w=c2w))

    @torch.no_grad()
    def report(self, scene: Scene) -> dict[str, float]:
        """How far the cameras have moved: means and maxima, degrees and world units."""
        rotation, translation = (motion.norm(dim=1) for motion in self.motions())
        return {
            "mean_rotation": math.degrees(rotation.mean()),
            "max_rotation": math.degrees(rotation.max()),
            "mean_translation": float(translation.mean()) * scene.world_scale,
            "max_translation": float(translation.max()) * scene.world_scale,
        }

    def write(self, scene: Scene, folder: Path) -> Path:
        """Log how far the cameras moved, and write them as a capture, ``folder/cameras_refined.json``.

        ``dataset.name=transforms dataset.root_dir=PATH`` loads it again, pictures included.

        Raises:
            ExportError: a file cannot be written.
        """
        moved = self.report(scene)
        path = folder / "cameras_refined.json"
        write_cameras(self.refined(scene), path)
        log.info(
            "poses: cameras turned by %.3g degrees on average (at most %.3g) "
            "and moved by %.3g world units (at most %.3g); wrote %s",
            *moved.values(),
            path,
        )
        return path


def check_refinement(config: PoseConfig, scene: Scene, system: Any) -> None:
    """Make sure that poses can be refined, if they are to be.

    Raises:
        ConfigError: the scene is warped (``dataset.ndc``), where a camera's motion is not one of its rays; or
            a loss term compares photographs by poses that no longer hold.
    """
    if not config.refine:
        return
    if scene.cameras.ndc is not None:
        what = "cannot move rays in the space of dataset.ndc"
        raise ConfigError("trainer.poses.refine", what, "set one of the two to false")
    key = system.priors.windows
    if key is not None:
        what = f"{key} compares photographs by the poses of the capture"
        raise ConfigError("trainer.poses.refine", what, f"set it to false, or {key}=0")
