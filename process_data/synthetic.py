"""A capture without a camera: procedural objects with exact ground truth, rendered into a ``Scene``.

The figurine is what ``make demo`` trains on; the sphere serves tests; the others are hard in one way each.
The world frame is deliberately not the scene frame (rotated, 2.5 times as large, moved), so that an export
which forgets ``world_from_scene`` is caught at once.

The cameras stand on a sphere of radius 2.85 +- 0.1 around the object, from 27 degrees below to 64 degrees
above the horizon, ordered by height. Azimuths advance by sqrt(2) - 1 of a turn, so that both all views and
every k-th view surround the object evenly. Those of ``wall`` all stand before it: 55 degrees to either side,
9 degrees below to 44 above the horizon. Those of ``room`` are inside, 0.25 to 0.33 from the middle, and look
across it; give them a wide ``fov``.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from process_data import synthetic_extras, synthetic_render
from process_data.cameras import split_views
from process_data.synthetic_mesh import SCENES, SceneName, ground_truth_mesh
from process_data.writers.neus import write_neus
from utils.types import Cameras, ImageStack, Scene, TriangleMesh

_EDGE_CONTRAST = 0.12
"""Pixels that differ more than this from a neighbour are smoothed."""
_OUTSIDE = (2.75, 2.95)
_ALL_AROUND = (-0.45, 0.90, 360.0, _OUTSIDE)
_LAYOUTS: dict[str, tuple[float, float, float, tuple[float, float]]] = {
    "wall": (-0.15, 0.70, 110.0, _OUTSIDE),
    "room": (-0.60, 0.60, 360.0, (0.25, 0.33)),
}
"""Where cameras stand, if not all around: sines of the elevations of the lowest and the highest view, the
degrees of azimuth, with -y in the middle, over which they spread, and their distances from the origin."""
_REFERENCE_RESOLUTION = 256


@dataclass(frozen=True)
class SyntheticConfig:
    """A procedural scene (``dataset.name: synthetic``)."""

    name: str = "synthetic"
    """Name of the format."""
    root_dir: str | None = None
    """Not used: nothing is read from disk."""
    scene: SceneName = "figurine"
    """``figurine`` (an owl jug); ``thin`` (a lantern of rods, slats, wire and plates, 0.02 to 0.03 thick);
    ``glossy`` (a mirror-like sphere and a lacquered box on a board); ``wall`` (a cactus before a large screen
    without texture, seen from the front only); ``niche`` (a deep, nearly plain hollow in a textured shrine);
    ``room`` (a furnished box seen from inside); ``sphere`` (radius 0.5); ``figurine-table`` (the figurine on
    a table in a painted ball of radius 6, the cameras well within, for training without masks)."""
    num_images: int = 64
    """Views to render, training and held-out together; 2 or more."""
    image_size: int = 200
    """Width and height of each view in pixels, 16 to 4096."""
    holdout: Any = 8
    """Views kept for metrics: 0 = none, k = every k-th, or a list of indices."""
    apply_mask: bool = True
    """Provide foreground masks."""
    noise: float = 0.0
    """Standard deviation of the pixels' noise, sRGB 0..1: 0 to 0.5."""
    depths: Literal["none", "sensor", "monocular"] = "none"
    """Provide depth maps: ``sensor``: exact but for half precision (up to 0.002 scene units), world units;
    ``monocular``: with a scale, a shift and a slight smooth error of their own in each view."""
    normals: bool = False
    """Provide exact normal maps."""
    num_points: int = 0
    """Provide so many sparse points (fewer where there is little texture), as structure from motion finds
    them: at corners of the texture, observed with an error of 0.3 pixels. 0 = none."""
    background: Literal["white", "black"] = "white"
    """Colour behind the object; ``figurine-table`` has its surroundings instead."""
    fov: float = 37.0
    """Horizontal and vertical field of view in degrees, 5 to 120."""
    seed: int = 0
    """Varies the cameras' azimuth, distance and aim, and all noise; 0 or more."""
    write_to: str | None = None
    """Also write the scene to this folder in NeuS's format (pictures, masks and cameras)."""
    test_steps: int = 60
    """Frames of the test video; 1 or more."""

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("scene", self.scene in get_args(SceneName), f"one of {', '.join(get_args(SceneName))}"),
            ("background", self.background in ("white", "black"), "white or black"),
            ("noise", 0.0 <= self.noise <= 0.5, "0 to 0.5"),
            ("depths", self.depths in ("none", "sensor", "monocular"), "none, sensor or monocular"),
            ("num_points", self.num_points >= 0, "0 or more"),
            ("num_images", self.num_images >= 2, "2 or more"),
            ("image_size", 16 <= self.image_size <= 4096, "16 to 4096"),
            ("fov", 5.0 <= self.fov <= 120.0, "5 to 120 degrees"),
            ("seed", self.seed >= 0, "0 or more"),
            ("test_steps", self.test_steps >= 1, "1 or more"),
        )
        for key, is_good, wanted in checks:
            if not is_good:
                raise ValueError(f"dataset.{key}: must be {wanted}, got {getattr(self, key)}")


def load_synthetic(config: SyntheticConfig) -> Scene:
    """Render the scene that ``config`` describes; the same config gives the same bytes.

    Returns:
        A scene with square images, masks (where alpha exceeds one half) unless switched off, the ground-truth
        surface in world coordinates as ``reference_mesh``, and depths, normals and points if asked for.

    Raises:
        ConfigError: ``dataset.holdout`` does not fit the number of views.
        ExportError: ``dataset.write_to`` cannot be written.
    """
    train, test = split_views(config.num_images, config.holdout)
    cameras = make_cameras(config)
    rgb, alpha, distance = render_views(config.scene, cameras, config.background)
    random = np.random.default_rng([config.seed, 0])
    noisy = rgb if config.noise == 0.0 else rgb + random.normal(0.0, config.noise, rgb.shape)
    images = [np.round(view * 255.0).astype(np.uint8) for view in np.clip(noisy, 0.0, 1.0)]
    masks = [np.where(view > 0.5, 255, 0).astype(np.uint8)[..., None] for view in alpha]
    world_from_scene = synthetic_world_from_scene()
    depths = normals = points = None
    if config.depths != "none":
        world_scale = float(torch.linalg.det(world_from_scene[:3, :3])) ** (1 / 3)
        depths = synthetic_extras.depth_stack(cameras, distance, config.depths, world_scale, config.seed)
    if config.normals:
        normals = synthetic_extras.normal_stack(config.scene, cameras, distance)
    if config.num_points > 0:
        points = synthetic_extras.sparse_points(
            config.scene, cameras, rgb, distance, config.num_points, config.seed
        )
    scene = Scene(
        name=config.scene,
        cameras=cameras,
        images=ImageStack.from_images(images),
        image_names=tuple(f"{index:06d}.png" for index in range(config.num_images)),
        train_indices=train,
        test_indices=test,
        world_from_scene=world_from_scene,
        masks=ImageStack.from_images(masks) if config.apply_mask else None,
        background_color=(0.0, 0.0, 0.0) if config.background == "black" else (1.0, 1.0, 1.0),
        reference_mesh=_to_world(ground_truth_mesh(config.scene, _REFERENCE_RESOLUTION), world_from_scene),
        points=points,
        depths=depths,
        normals=normals,
    )
    if config.write_to is not None:
        write_neus(scene, Path(config.write_to))
    return scene


def synthetic_world_from_scene() -> Float64[Tensor, "4 4"]:
    """The similarity from scene to world of all synthetic scenes: 2.5 times a rotation, and a translation."""
    yaw, tilt = math.radians(35.0), math.radians(20.0)
    turn = torch.tensor(
        [[math.cos(yaw), -math.sin(yaw), 0.0], [math.sin(yaw), math.cos(yaw), 0.0], [0.0, 0.0, 1.0]],
        dtype=torch.float64,
    )
    lean = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, math.cos(tilt), -math.sin(tilt)], [0.0, math.sin(tilt), math.cos(tilt)]],
        dtype=torch.float64,
    )
    world_from_scene = torch.eye(4, dtype=torch.float64)
    world_from_scene[:3, :3] = 2.5 * lean @ turn
    world_from_scene[:3, 3] = torch.tensor([1.0, -2.0, 0.5])
    return world_from_scene


def make_cameras(config: SyntheticConfig) -> Cameras:
    """Place ``config.num_images`` cameras around the origin, as the module's docstring says."""
    n = config.num_images
    random = np.random.default_rng(config.seed)
    # View 0 starts a few heights up, because every k-th view from 0 is held out: those then lie among the
    # others.
    height = ((np.arange(n) + 4.5) / n) % 1.0
    lowest, highest, spread, distances = _LAYOUTS.get(config.scene, _ALL_AROUND)
    sine = lowest + (highest - lowest) * height
    turn = np.arange(n) * (math.sqrt(2.0) - 1.0) + random.uniform()
    azimuth = 2.0 * math.pi * turn if spread >= 360.0 else np.radians(-90.0 + spread * (turn % 1.0 - 0.5))
    cosine = np.sqrt(1.0 - sine**2)
    outward = np.stack([cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine], axis=1)
    centres = outward * random.uniform(*distances, (n, 1))
    targets = random.uniform(-0.015, 0.015, (n, 3))

    forward = targets - centres
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    c2w = np.stack([right, down, forward, centres], axis=2)

    middle = 0.5 * config.image_size
    focal = middle / math.tan(math.radians(0.5 * config.fov))
    intrinsics = torch.tensor([[focal, 0.0, middle], [0.0, focal, middle], [0.0, 0.0, 1.0]])
    return Cameras(
        torch.from_numpy(c2w).float(),
        intrinsics.repeat(n, 1, 1),
        torch.full((n, 2), config.image_size, dtype=torch.int64),
    )


def render_views(
    scene: SceneName, cameras: Cameras, background: Literal["white", "black"] = "white"
) -> tuple[Float32[np.ndarray, "N H W 3"], Float32[np.ndarray, "N H W"], Float32[np.ndarray, "N H W"]]:
    """Render a synthetic scene by sphere tracing, with smoothed edges.

    Args:
        scene: which scene.
        cameras: views in scene space, all of one size and without skew, outside the object.
        background: colour behind the object; ``figurine-table`` has its surroundings instead.

    Returns:
        ``(rgb, alpha, depth)``: sRGB 0..1 composited over the background; the covered fraction of each pixel;
        the distance along the ray through the pixel's centre, 0 where it hits nothing.

    Raises:
        ValueError: the cameras' image sizes differ.
    """
    if not bool((cameras.size == cameras.size[0]).all()):
        raise ValueError("all cameras must have images of one size")
    width, height = cameras.size[0].tolist()
    poses, lenses = cameras.c2w.double().numpy(), cameras.intrinsics.double().numpy()
    # A negative grey tells the kernels to show the surroundings.
    grey = -1.0 if scene == "figurine-table" else float(background == "white")
    centres = np.empty((len(cameras), height, width, 4), np.float32)
    smooth = np.empty_like(centres)
    synthetic_render.render_centres(SCENES[scene], poses, lenses, grey, centres)
    synthetic_render.smooth_edges(SCENES[scene], poses, lenses, grey, _EDGE_CONTRAST, centres, smooth)
    return smooth[..., :3], smooth[..., 3], np.maximum(centres[..., 3], 0.0)


def _to_world(mesh: TriangleMesh, world_from_scene: Float64[Tensor, "4 4"]) -> TriangleMesh:
    """Carry a mesh from scene to world."""
    matrix = world_from_scene.numpy()
    rotation = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    assert mesh.normals is not None
    normals = (mesh.normals @ rotation.T).astype(np.float32)
    return TriangleMesh(mesh.vertices @ matrix[:3, :3].T + matrix[:3, 3], mesh.faces, normals, mesh.colors)
