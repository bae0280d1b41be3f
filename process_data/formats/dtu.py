"""Captures in NeuS's layout (DTU, BlendedMVS and all that NeuS's, IDR's or MonoSDF's scripts prepared).

::

    root_dir/
      image/000000.png 000001.png ...     photographs, in natural order; or images/ or rgb/
      mask/000.png 001.png ...            foreground masks, only read with ``apply_mask``; or masks/, or
                                          image/000000_mask.png beside its picture
      cameras_sphere.npz                  world_mat_i, scale_mat_i for i = 0, 1, ...: i-th sorted image;
                                          or cameras.npz or cameras_large.npz

MonoSDF (and sdfstudio after it) puts everything into one folder::

    root_dir/
      000000_rgb.png 000003_rgb.png ...   photographs; names may have gaps, world_mat_i counts pictures
      000000_depth.npy                    (H, W) relative depth of a network, optional
      000000_normal.npy                   (3, H, W) normals of a network, 0..1, optional
      000000_foreground_mask.png          sdfstudio's masks, optional
      cameras.npz

MonoSDF's ``000000_mask.npy`` says where the depth can be trusted, not where the object is, and is not read.

``world_mat_i`` (4, 4) projects world points to pixels. ``scale_mat_0`` (4, 4) is a similarity that takes the
unit sphere to the region of interest in the world, so ``P_i = world_mat_i @ scale_mat_0`` projects *scene*
points to pixels, and ``scale_mat_0`` of the render cameras is the region that the format names. The object
cameras file says in the same way where the object sits. NeuS uses it to crop the mesh, not to move it: when
its sphere differs from the render sphere, training, mesh and video stay in the render frame (so that the
exported world coordinates are right) and a warning says so.

The matrices put pixel centres at integers (OpenCV); cx and cy gain 0.5 here for our convention.

Source: Wang et al., NeuS, NeurIPS 2021, https://github.com/Totoro97/NeuS; Yariv et al., IDR, NeurIPS 2020;
Yu et al., MonoSDF, NeurIPS 2022, https://github.com/autonomousvision/monosdf.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

from process_data.cameras import decompose_projection
from process_data.capture import CaptureConfig, build_scene
from process_data.views import Capture, View, find_root, list_pictures
from utils.errors import DataError
from utils.images import open_picture
from utils.types import Scene

LOG = logging.getLogger(__name__)

_SOURCE = "DTU scans in this layout are linked from https://github.com/Totoro97/NeuS"
_LAYOUT = "expected are image/*.png (or .jpg), cameras_sphere.npz and, for apply_mask, mask/*.png; " + _SOURCE
_IMAGE_FOLDERS = ("image", "images", "rgb")
_MASK_FOLDERS = ("mask", "masks")
_CAMERA_FILES = ("cameras_sphere.npz", "cameras.npz", "cameras_large.npz")


@dataclass(frozen=True)
class DTUConfig(CaptureConfig):
    """Where a NeuS-format capture lies and how to read it."""

    name: str = "dtu"
    """Format of the capture."""
    render_cameras_name: str = "cameras_sphere.npz"
    """Camera file that defines poses and the scene's unit sphere."""
    object_cameras_name: str = "cameras_sphere.npz"
    """Camera file whose scale_mat_0 says where the object sits."""
    background: Literal["black", "white"] = "black"
    """Plain colour behind masked objects, and under transparent pixels if apply_mask is off. DTU's room is
    black, and masks a little too wide show it."""


def load_dtu(config: DTUConfig) -> Scene:
    """Load a capture in NeuS's layout.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent; the line names the file.
        ConfigError: ``dataset.holdout`` or a key of the region does not fit the capture.
    """
    root = find_root(config.root_dir, _LAYOUT)
    image_paths = _find_pictures(root)
    intrinsics, c2w, world_from_scene = _load_cameras(config, root, image_paths)
    masks = _match_masks(root, image_paths) if config.apply_mask else [None] * len(image_paths)
    views = tuple(
        View(
            image_path=path,
            c2w=c2w[index],
            intrinsics=intrinsics[index],
            mask_path=masks[index],
            depth_path=_beside(path, "_depth.npy"),
            normal_path=_beside(path, "_normal.npy"),
        )
        for index, path in enumerate(image_paths)
    )
    return build_scene(Capture(root, views, world_from_scene=world_from_scene), config)


# ----------------------------------------------------------------------------------------------------------
# files


def _find_pictures(root: Path) -> list[Path]:
    """List the photographs: of the first folder there is, or MonoSDF's ``*_rgb`` files."""
    for name in _IMAGE_FOLDERS:
        if (root / name).is_dir():
            return list_pictures(root / name, _LAYOUT)
    if any(root.glob("*_rgb.*")):
        return [path for path in list_pictures(root, _LAYOUT) if path.stem.endswith("_rgb")]
    return list_pictures(root / _IMAGE_FOLDERS[0], _LAYOUT)


def _beside(image_path: Path, ending: str) -> Path | None:
    """Give ``NAME`` and an ending beside ``NAME_rgb.png`` or ``NAME.png``, if there is such a file."""
    path = image_path.with_name(image_path.stem.removesuffix("_rgb") + ending)
    return path if path.is_file() else None


def _last_number(path: Path) -> str:
    """Give the last number in a file's stem without leading zeros: 000012.png and mask_012.png agree."""
    numbers = re.findall(r"\d+", path.stem)
    return str(int(numbers[-1])) if numbers else path.stem


def _match_masks(root: Path, image_paths: list[Path]) -> list[Path | None]:
    """Find the mask of each image: by stem, else by number, else (equal counts) by order.

    Without a folder of masks, sdfstudio's files beside the pictures count; what is still ``None`` is looked
    for where all formats may keep masks.
    """
    folder = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        return [_beside(path, "_foreground_mask.png") for path in image_paths]
    mask_paths = list_pictures(folder, "add the masks, or set dataset.apply_mask=false")
    keys: tuple[Callable[[Path], str], ...] = (lambda path: path.stem, _last_number)
    for key in keys:
        by_key = {key(path): path for path in mask_paths}
        are_unique = len(by_key) == len(mask_paths) and len({key(p) for p in image_paths}) == len(image_paths)
        if are_unique and all(key(path) in by_key for path in image_paths):
            return [by_key[key(path)] for path in image_paths]
    if len(mask_paths) == len(image_paths):
        return list(mask_paths)
    known = {_last_number(path) for path in mask_paths}
    unmatched = [path for path in image_paths if _last_number(path) not in known]
    missing = unmatched[0] if unmatched else image_paths[-1]
    raise DataError(
        folder,
        f"{len(mask_paths)} masks for {len(image_paths)} images, none for {missing.relative_to(root)}",
        "add the missing masks, or set dataset.apply_mask=false",
    )


# ----------------------------------------------------------------------------------------------------------
# cameras


def _find_camera_file(root: Path, name: str, key: str) -> Path:
    """Find the named camera file; the usual names stand in for each other."""
    if (root / name).is_file():
        return root / name
    for other in _CAMERA_FILES:
        if (root / other).is_file():
            LOG.warning("%s is missing, %s is used in its place", root / name, other)
            return root / other
    raise DataError(root / name, "no such camera file", f"check {key}; {_LAYOUT}")


def _read_matrices(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Read the world_mat_i and scale_mat_i of a camera file in float64."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = [key for key in archive.files if re.fullmatch(r"(world|scale)_mat_\d+", key)]
            return {key: np.asarray(archive[key], dtype=np.float64) for key in wanted}
    # NumPy and zipfile raise whatever a damaged archive makes them stumble over.
    except Exception as error:
        remedy = "copy it again from the original"
        raise DataError(path, f"not a readable .npz file ({error})", remedy) from error


def _take(
    matrices: Mapping[str, npt.NDArray[np.float64]], key: str, path: Path
) -> Float64[np.ndarray, "4 4"]:
    """Take one 4x4 matrix, checked."""
    if key not in matrices:
        raise DataError(path, f"{key} is missing", "there must be one world_mat_i per image, and scale_mat_0")
    matrix = matrices[key]
    if matrix.shape not in ((3, 4), (4, 4)):
        raise DataError(path, f"{key} has shape {matrix.shape}, not (4, 4)", "write the camera file again")
    if not np.isfinite(matrix).all():
        raise DataError(path, f"{key} holds values that are not finite", "write the camera file again")
    return np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])


def _take_similarity(
    matrices: Mapping[str, npt.NDArray[np.float64]], path: Path
) -> Float64[np.ndarray, "4 4"]:
    """Take scale_mat_0, check that it keeps angles and that every other scale_mat_i says the same."""
    matrix = _take(matrices, "scale_mat_0", path)
    scale = np.cbrt(np.linalg.det(matrix[:3, :3]))
    deviation = np.abs(matrix[:3, :3] @ matrix[:3, :3].T - scale**2 * np.eye(3)).max()
    if not (scale > 0.0 and deviation < 1e-4 * scale**2):
        remedy = "it must be a rotation times one scale, and a shift"
        raise DataError(path, "scale_mat_0 is singular, mirrored or sheared", remedy)
    for key in matrices:
        if key.startswith("scale_mat_"):
            difference = np.abs(_take(matrices, key, path) - matrix)
            if difference[:, :3].max() > 1e-4 * scale or difference[:, 3].max() > 1e-3 * scale:
                remedy = "all images must share one scene frame"
                raise DataError(path, f"{key} differs from scale_mat_0", remedy)
    return matrix


def _load_cameras(
    config: DTUConfig, root: Path, image_paths: list[Path]
) -> tuple[Float64[np.ndarray, "N 3 3"], Float64[np.ndarray, "N 3 4"], Float64[np.ndarray, "4 4"]]:
    """Read intrinsics (full-size pixels, centres at +0.5), poses in the world and the region's sphere."""
    path = _find_camera_file(root, config.render_cameras_name, "dataset.render_cameras_name")
    matrices = _read_matrices(path)
    world_from_scene = _take_similarity(matrices, path)
    num_images = len(image_paths)
    num_matrices = sum(key.startswith("world_mat_") for key in matrices)
    if num_matrices != num_images:
        raise DataError(
            path,
            f"{num_matrices} world_mat_i for {num_images} pictures in {image_paths[0].parent}",
            "matrices belong to pictures by position, so there must be exactly one each",
        )
    intrinsics, c2w = np.empty((num_images, 3, 3)), np.empty((num_images, 3, 4))
    for index, image_path in enumerate(image_paths):
        key = f"world_mat_{index}"
        try:
            intrinsics[index], c2w[index] = decompose_projection(_take(matrices, key, path)[:3])
        except ValueError as error:
            raise DataError(path, f"{key}: {error}", "write the camera file again") from error
        intrinsics[index, :2, 2] += 0.5
        _check_view(path, key, intrinsics[index], c2w[index], world_from_scene, image_path)

    object_path = _find_camera_file(root, config.object_cameras_name, "dataset.object_cameras_name")
    object_sphere = _take_similarity(_read_matrices(object_path), object_path)
    if np.abs(object_sphere - world_from_scene).max() > 1e-3 * np.cbrt(np.linalg.det(world_from_scene)):
        LOG.warning(
            "%s and %s name different spheres: training and mesh cover the first", path.name, object_path.name
        )
    return intrinsics, c2w, world_from_scene


def _check_view(
    path: Path,
    key: str,
    intrinsics: Float64[np.ndarray, "3 3"],
    c2w: Float64[np.ndarray, "3 4"],
    world_from_scene: Float64[np.ndarray, "4 4"],
    image_path: Path,
) -> None:
    """Refuse a camera that cannot have taken its picture of the sphere.

    Raises:
        DataError: the sphere lies behind the camera, or the camera is for a picture of another size.
    """
    # The depth of the sphere's centre: below -1 radius all of it lies behind the camera, which is what a
    # mirrored matrix looks like after decomposition.
    radius = np.cbrt(np.linalg.det(world_from_scene[:3, :3]))
    if (world_from_scene[:3, 3] - c2w[:, 3]) @ c2w[:, 2] < -radius:
        raise DataError(
            path,
            f"{key}: the camera looks away from the unit sphere",
            "the matrix is mirrored, or scale_mat_0 does not surround what the cameras look at",
        )
    # Nothing in the format says which size the matrices are for. A principal point far from the middle is
    # what remains of pictures that were resized or cropped without them (MonoSDF's 384x384 DTU crops).
    with open_picture(image_path) as picture:
        width, height = picture.size
    x, y = intrinsics[:2, 2]
    if not (0.2 <= x / width <= 0.8 and 0.2 <= y / height <= 0.8):
        raise DataError(
            path,
            f"{key}: the principal point ({x:.0f}, {y:.0f}) is far from the middle of "
            f"{image_path.name}, which has {width}x{height} pixels",
            "the pictures were resized or cropped after the cameras were written: do the same to the first "
            "two rows of world_mat_i, or use the original pictures",
        )
