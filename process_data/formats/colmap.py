"""Captures that COLMAP has placed: its sparse model, binary or text, beside the photographs.

::

    root_dir/
      images/ **/*.jpg                    photographs, subfolders as in the model
      images_2/ images_4/ images_8/       the same, smaller (mip-NeRF 360): read in place of a downscale
      masks/NAME.png or NAME.jpg.png      foreground masks, only read with ``apply_mask``
      sparse/0/                           the model (also sparse/, colmap/sparse/0/, colmap/sparse/, root_dir)
        cameras, images, points3D         .bin or .txt
        rigs, frames                      since COLMAP 3.12

``images`` holds poses world to camera (OpenCV axes); of photographs taken with a rig, pycolmap composes the
pose of the rig and of the sensor in it. Pixels follow our convention. Every camera model is kept as it is:
distortion goes into the rays, the photographs are never resampled for it.

Source: Schönberger and Frahm, Structure-from-Motion Revisited, CVPR 2016; https://colmap.github.io/format.html.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from process_data.capture import CaptureConfig, build_scene
from process_data.formats.colmap_model import REMEDY, ColmapModel, choose_model
from process_data.views import (
    Capture,
    View,
    checked_pose,
    find_masks,
    find_picture,
    find_root,
    natural_key,
    without_companions,
)
from utils.errors import ConfigError, DataError
from utils.images import IMAGE_SUFFIXES
from utils.lens import PINHOLES, lens_fault, pinhole_part
from utils.types import Lens, Scene, SparsePoints

LOG = logging.getLogger(__name__)

_LAYOUT = "expected are images/ and COLMAP's cameras, images and points3D (.bin or .txt) in sparse/0/"


@dataclass(frozen=True)
class ColmapConfig(CaptureConfig):
    """Where photographs and a COLMAP model lie and how to read them."""

    name: str = "colmap"
    """Format of the capture."""
    images_dir: str = "auto"
    """Folder of the photographs; auto: images/, or images_K/ if img_downscale is K and that exists: its
    pictures are not downscaled further."""
    model_dir: str | None = None
    """Folder of the sparse model; null: sparse/0, sparse, colmap/sparse/0, colmap/sparse or root_dir; of
    several models the one with most photographs."""


def load_colmap(config: ColmapConfig) -> Scene:
    """Load a capture with a COLMAP model.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent; the line names the file.
        ConfigError: a key does not fit the capture.
    """
    root = find_root(config.root_dir, _LAYOUT)
    model = choose_model(root, config.model_dir, _LAYOUT)
    images_dir, downscale = find_images_dir(root, config.images_dir, config.img_downscale, _LAYOUT)
    views, indices = _make_views(root, images_dir, model, config.apply_mask)
    points = _sparse_points(model, indices)
    return build_scene(Capture(root, views, points), replace(config, img_downscale=downscale))


def find_images_dir(
    root: Path, images_dir: str, img_downscale: int | float, layout: str
) -> tuple[Path, int | float]:
    """Find the folder of the photographs, and what is left to downscale.

    Args:
        root: folder of the capture.
        images_dir: a folder, absolute or below ``root``; ``"auto"``: ``images_K`` if ``img_downscale`` is K
            and it exists, else ``images``.
        img_downscale: the factor that is asked for.
        layout: what the capture's folder should hold, for the error line.

    Returns:
        The folder, and the factor by which its pictures are still to be divided.

    Raises:
        ConfigError: ``images_dir`` does not exist.
        DataError: neither does ``images``.
    """
    if images_dir != "auto":
        if not (root / images_dir).is_dir():
            what = f"{root / images_dir} is no folder"
            raise ConfigError("dataset.images_dir", what, "check the name, or set it to auto")
        return root / images_dir, img_downscale
    smaller = root / f"images_{img_downscale:g}"
    if img_downscale != 1 and smaller.is_dir():
        LOG.info("pictures are those of %s, which are not downscaled further", smaller.name)
        return smaller, 1
    if not (root / "images").is_dir():
        others = sorted((path for path in root.glob("images_*") if path.is_dir()), key=natural_key)
        factors = [path.name.removeprefix("images_") for path in others]
        remedy = f"set dataset.img_downscale={factors[0]}" if factors else "check dataset.root_dir"
        raise DataError(root / "images", "no such folder", f"{remedy}; {layout}")
    return root / "images", img_downscale


# ----------------------------------------------------------------------------------------------------------
# views


def _make_views(
    root: Path, images_dir: Path, model: ColmapModel, with_masks: bool
) -> tuple[tuple[View, ...], dict[int, int]]:
    """Make a view of every registered photograph whose file exists, once, in natural order of the names.

    Returns:
        The views, and the index of each by COLMAP's image id.
    """
    # Names count from the folder that COLMAP was given; some give it the capture's.
    named = [
        (image, find_picture(images_dir / image.name) or find_picture(root / image.name))
        for image in model.images()
    ]
    _report_photos(images_dir, named)
    found = _without_repeats(model, named)
    pose_file = model.file("frames") if model.file("frames").is_file() else model.file("images")
    # Masks are named after the photographs that COLMAP saw, not after smaller copies of another format.
    mask_root = images_dir if images_dir.is_relative_to(root) else root / "images"
    lenses: dict[int, Lens] = {}
    views: list[View] = []
    indices: dict[int, int] = {}
    masks: list[Path | None] = [None] * len(found)
    if with_masks:
        masks = find_masks(root, [mask_root / image.name for image, _ in found])
    for (image, path), mask in zip(found, masks, strict=True):
        if image.camera_id not in lenses:
            lenses[image.camera_id] = _checked_lens(model, image.camera_id)
        lens = lenses[image.camera_id]
        indices[image.image_id] = len(views)
        views.append(
            View(
                image_path=path,
                c2w=_pose(image, pose_file),
                intrinsics=pinhole_part(lens),
                size=lens.size,
                lens=None if lens.model in PINHOLES else lens,
                mask_path=mask,
            )
        )
    return tuple(views), indices


def _without_repeats(model: ColmapModel, found: list[tuple[Any, Path | None]]) -> list[tuple[Any, Path]]:
    """The photographs that have a file, each file once."""
    kept: dict[Path, Any] = {}
    repeated = []
    for image, path in found:
        if path in kept:
            repeated.append(image.name)
        elif path is not None:
            kept[path] = image
    if repeated:
        LOG.warning(
            "%s: %d photos are placed twice, the first counts: %s",
            model.file("images"),
            len(repeated),
            repeated[0],
        )
    return [(image, path) for path, image in kept.items()]


def _pose(image: Any, file: Path) -> Float64[np.ndarray, "3 4"]:
    """Camera to world, from COLMAP's world to camera."""
    cam_from_world = image.cam_from_world()
    w2c = checked_pose(cam_from_world.matrix(), file, f"photo {image.name}")
    # A quaternion of zeros turns into the identity, which would pass for a rotation.
    if not 0.9 < np.linalg.norm(cam_from_world.rotation.quat) < 1.1:
        raise DataError(file, f"photo {image.name}: the rotation is no unit quaternion", REMEDY)
    return np.concatenate([w2c[:, :3].T, -w2c[:, :3].T @ w2c[:, 3:]], axis=1)


def _checked_lens(model: ColmapModel, camera_id: int) -> Lens:
    camera = model.reconstruction.camera(camera_id)
    lens = Lens(camera.model.name, tuple(float(x) for x in camera.params), (camera.width, camera.height))
    fault = lens_fault(lens)
    if fault is not None:
        raise DataError(model.file("cameras"), f"camera {camera_id}: {fault}", "calibrate again with COLMAP")
    return lens


def _report_photos(images_dir: Path, found: list[tuple[Any, Path | None]]) -> None:
    """Tell about photographs without a file and about files without a pose.

    Raises:
        DataError: no photograph of the model has a file.
    """
    missing = [image.name for image, path in found if path is None]
    if len(missing) == len(found):
        raise DataError(
            images_dir / missing[0],
            f"no such picture, and none of the model's {len(found)} photos is in this folder",
            "check dataset.images_dir",
        )
    if missing:
        share = f"{len(missing)} of {len(found)} photos"
        LOG.warning("%s of the model are not in %s and are left out, first %s", share, images_dir, missing[0])
    used = {path for _, path in found}
    files = (path for path in images_dir.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    pictures = without_companions(files)
    unplaced = [path for path in pictures if path not in used and not path.name.startswith(".")]
    if unplaced:
        LOG.info("%d photos of %s have no pose and are left out", len(unplaced), images_dir)


# ----------------------------------------------------------------------------------------------------------
# points


def _sparse_points(model: ColmapModel, indices: dict[int, int]) -> SparsePoints | None:
    """Take the triangulated points in the order of their ids; ``None`` if there are none."""
    ids = sorted(model.reconstruction.point3D_ids())
    points = [model.reconstruction.point3D(point_id) for point_id in ids]
    if not points:
        LOG.warning("%s holds no points", model.file("points3D"))
        return None
    positions = np.array([point.xyz for point in points], np.float64)
    if not np.isfinite(positions).all():
        bad = int((~np.isfinite(positions).all(axis=1)).sum())
        raise DataError(model.file("points3D"), f"{bad} points are not finite", REMEDY)
    errors = np.array([point.error for point in points], np.float64)
    pairs = np.array(
        [
            (index, indices[element.image_id])
            for index, point in enumerate(points)
            for element in point.track.elements
            if element.image_id in indices
        ],
        np.int64,
    ).reshape(-1, 2)
    # A point may be matched twice in one photograph.
    numbers = np.unique(pairs[:, 0] * len(indices) + pairs[:, 1])
    return SparsePoints(
        positions=positions,
        colors=np.array([point.color for point in points], np.uint8),
        # COLMAP writes -1 where it has not measured the error.
        errors=np.where(errors >= 0, errors, np.nan),
        observations=np.stack([numbers // len(indices), numbers % len(indices)], axis=1),
    )
