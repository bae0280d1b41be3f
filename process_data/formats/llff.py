"""Forward-facing captures in LLFF's layout, with ``poses_bounds.npy``.

::

    root_dir/
      images/                             photographs, in natural order
      images_4/ images_8/                 the same, smaller: read in place of a downscale
      masks/NAME.png                      foreground masks, only read with ``apply_mask``; or
                                          images/NAME_mask.png beside its picture
      poses_bounds.npy                    (N, 17): row i belongs to the i-th picture

A row holds a (3, 5) matrix ``[R | t | h, w, f]``, row by row, and two depths. The columns of R are the
camera's axes down, right and back in the world; t is its centre. h, w and f are height, width and focal
length in pixels of the full-size pictures, and the principal point is the picture's middle: LLFF knows no
distortion. Nearly all content (0.1 % to 99.9 % of COLMAP's sparse points) lies between the two depths, taken
along the optical axis.

Source: Mildenhall et al., Local Light Field Fusion, SIGGRAPH 2019, https://github.com/Fyusion/LLFF.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64

from process_data.capture import CaptureConfig, build_scene
from process_data.formats.colmap import find_images_dir
from process_data.geometry import up_axis
from process_data.views import Capture, View, checked_pose, find_root, list_pictures
from utils.errors import ConfigError, DataError
from utils.ndc import NDC, average_pose, frame_of
from utils.types import Scene

_LAYOUT = "expected are images/ (or images_4/, images_8/) and poses_bounds.npy"
_REMEDY = "write it again with LLFF's imgs2poses.py, or copy it again from the original"
_OPENCV_FROM_LLFF = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Turns camera axes down-right-back into right-down-forward; R of the file times this is our R."""
_NEAR_SHARE = 0.75
"""The warp's near plane, in the depth of the nearest content (NeRF's ``bd_factor``)."""


@dataclass(frozen=True)
class LLFFConfig(CaptureConfig):
    """Where an LLFF capture lies and how to read it."""

    name: str = "llff"
    """Format of the capture."""
    images_dir: str = "auto"
    """Folder of the photographs; auto: images/, or images_K/ if img_downscale is K and that exists: its
    pictures are not downscaled further."""
    ndc: bool = False
    """Warp the half space before the cameras into the unit sphere (NeRF's normalised device coordinates)."""


def load_llff(config: LLFFConfig) -> Scene:
    """Load a capture in LLFF's layout.

    The region that it names is a sphere about what the cameras look at together, see
    :func:`region_of`.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent; the line names the file.
        ConfigError: a key does not fit the capture.
    """
    root = find_root(config.root_dir, _LAYOUT)
    path = root / "poses_bounds.npy"
    c2w, hwf, bounds = _read_poses(path)
    images_dir, downscale = find_images_dir(root, config.images_dir, config.img_downscale, _LAYOUT)
    # LLFF's scripts sort names as text, 10.png before 2.png, and poses belong to pictures by position.
    pictures = sorted(list_pictures(images_dir, _LAYOUT), key=lambda picture: picture.name)
    if len(pictures) != len(c2w):
        raise DataError(
            path,
            f"{len(c2w)} poses for {len(pictures)} pictures in {images_dir.name}/",
            "poses belong to pictures by position, so there must be exactly one each",
        )
    views = tuple(
        View(picture, pose, _intrinsics(h, w, f), size=(round(w), round(h)))
        for picture, pose, (h, w, f) in zip(pictures, c2w, hwf, strict=True)
    )
    region = region_of(views, bounds)
    capture = Capture(root, views, world_from_scene=region, up=up_axis(c2w))
    scene = build_scene(capture, replace(config, img_downscale=downscale))
    if not config.ndc:
        return scene
    return replace(scene, cameras=replace(scene.cameras, ndc=ndc_of(config, scene)))


def _intrinsics(height: float, width: float, focal: float) -> Float64[np.ndarray, "3 3"]:
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def _read_poses(
    path: Path,
) -> tuple[Float64[np.ndarray, "N 3 4"], Float64[np.ndarray, "N 3"], Float64[np.ndarray, "N 2"]]:
    """Read poses (OpenCV axes), (height, width, focal) and (near, far) of each picture."""
    if not path.is_file():
        raise DataError(path, "no such file", f"check dataset.root_dir; {_LAYOUT}")
    try:
        rows = np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise DataError(path, f"not a readable .npy file ({error})", _REMEDY) from error
    if rows.ndim != 2 or rows.shape[1] != 17 or len(rows) == 0:
        raise DataError(path, f"has shape {rows.shape}, not (N, 17)", _REMEDY)
    matrices, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    poses = []
    for index, matrix in enumerate(matrices):
        pose = np.concatenate([matrix[:, :3] @ _OPENCV_FROM_LLFF, matrix[:, 3:4]], axis=1)
        poses.append(checked_pose(pose, path, f"row {index}"))
        height, width, focal = matrix[:, 4]
        # Focal lengths of real cameras lie between a fisheye's and a telescope's.
        is_camera = min(height, width) >= 1 and 0.05 < focal / max(height, width) < 50
        if not (is_camera and max(height, width) < 1e6):
            what = (
                f"row {index}: height, width, focal length {height:g}, {width:g}, {focal:g} are no camera's"
            )
            raise DataError(path, what, _REMEDY)
        near, far = bounds[index]
        if not 0 < near < far < np.inf:
            what = f"row {index}: near and far bounds {near:g} and {far:g} are not 0 < near < far"
            raise DataError(path, what, _REMEDY)
    return np.stack(poses), matrices[:, :, 4], bounds


def region_of(views: tuple[View, ...], bounds: Float64[np.ndarray, "N 2"]) -> Float64[np.ndarray, "4 4"]:
    """Place a sphere about the content that forward-facing cameras see together.

    Each camera looks at the harmonic mean of its near and far depth, ``2 / (1/near + 1/far)``: half of the
    parallax lies before it and half behind, and a far bound that is nearly infinite moves it to 2 near, not
    away. The sphere's centre is the mean of these points. Its radius takes in all frusta's corners at that
    depth, and what the cameras see on their axes from the near bound on. What lies further behind belongs to
    the background, or to ``ndc``.

    Returns:
        The similarity from the unit sphere to the world; its axes are the world's.
    """
    depths = 2.0 / (1.0 / bounds[:, 0] + 1.0 / bounds[:, 1])
    centers = np.stack([view.c2w[:, 3] for view in views])
    forward = np.stack([view.c2w[:, 2] for view in views])
    center = (centers + depths[:, None] * forward).mean(axis=0)
    seen = [centers + bounds[:, :1] * forward]
    for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        slopes = np.stack([_slope(view, x, y) for view in views])
        seen.append(centers + depths[:, None] * slopes)
    world_from_scene = np.eye(4)
    world_from_scene[:3, :3] *= np.linalg.norm(np.stack(seen) - center, axis=2).max()
    world_from_scene[:3, 3] = center
    return world_from_scene


def _slope(view: View, x: float, y: float) -> Float64[np.ndarray, " 3"]:
    """World direction with depth 1 through a place of the picture, 0..1 rightwards and downwards."""
    assert view.size is not None
    pixel = np.array([x * view.size[0], y * view.size[1], 1.0])
    return view.c2w[:, :3] @ np.linalg.solve(view.intrinsics, pixel)


def ndc_of(config: LLFFConfig, scene: Scene) -> NDC:
    """Find the warp of a capture that :func:`load_llff` has loaded; its metric frame is the scene.

    The reference camera is the average of all, and the near plane lies at 0.75 of the distance to the nearest
    content, as in NeRF.

    Raises:
        DataError: ``poses_bounds.npy`` cannot be read.
        ConfigError: the capture does not face forward.
    """
    path = find_root(config.root_dir, _LAYOUT) / "poses_bounds.npy"
    _, _, bounds = _read_poses(path)
    assert len(bounds) == len(scene.cameras)
    scene_from_world = 1.0 / np.cbrt(np.linalg.det(scene.world_from_scene[:3, :3].numpy()))
    c2w = scene.cameras.c2w.double()
    reference = average_pose(c2w)
    nearest = c2w[:, :, 3] + torch.from_numpy(bounds[:, :1] * scene_from_world) * c2w[:, :, 2]
    near = _NEAR_SHARE * float(((nearest - reference[:, 3]) @ reference[:, 2]).min())
    if near <= 0:
        what = "the content of one picture lies behind the average camera"
        raise ConfigError("dataset.ndc", what, "set dataset.ndc=false: it is for forward-facing captures")
    return frame_of(scene.cameras.c2w, scene.cameras.intrinsics, scene.cameras.size, near)
