"""Captures in NeuS's layout (DTU, BlendedMVS and everything that was prepared with NeuS's or IDR's scripts).

::

    root_dir/
      image/000000.png 000001.png ...     photographs, in natural order
      mask/000.png 001.png ...            foreground masks, only read with ``apply_mask``
      cameras_sphere.npz                  world_mat_i, scale_mat_i for i = 0, 1, ...: i-th sorted image

``world_mat_i`` (4, 4) projects world points to pixels. ``scale_mat_0`` (4, 4) is a similarity that takes the
unit sphere to the region of interest in the world, so ``P_i = world_mat_i @ scale_mat_0`` projects *scene*
points to pixels, and ``scale_mat_0`` of the render cameras is our ``world_from_scene``. The object cameras
file says in the same way where the object sits. NeuS uses it to crop the mesh, not to move it: when its
sphere differs from the render sphere, training, mesh and video stay in the render frame (so that the exported
world coordinates are right) and a warning says so.

The matrices put pixel centres at integers (OpenCV); cx and cy gain 0.5 here for our convention.

Source: Wang et al., NeuS, NeurIPS 2021, https://github.com/Totoro97/NeuS; Yariv et al., IDR, NeurIPS 2020.
"""

import logging
import os
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from tqdm import tqdm

from process_data.cameras import decompose_projection, scale_intrinsics, split_views
from utils.errors import ConfigError, DataError
from utils.images import IMAGE_SUFFIXES, read_image, read_mask
from utils.types import Cameras, ImageStack, Scene

LOG = logging.getLogger(__name__)
T = TypeVar("T")

_SOURCE = "DTU scans in this layout are linked from https://github.com/Totoro97/NeuS"
_LAYOUT = "expected are image/*.png (or .jpg), cameras_sphere.npz and, for apply_mask, mask/*.png; " + _SOURCE


@dataclass(frozen=True)
class DTUConfig:
    """Where a NeuS-format capture lies and how to read it."""

    name: str = "dtu"
    """Format of the capture."""
    root_dir: str | None = None
    """Folder that holds image/ and the camera file."""
    render_cameras_name: str = "cameras_sphere.npz"
    """Camera file that defines poses and the scene's unit sphere."""
    object_cameras_name: str = "cameras_sphere.npz"
    """Camera file whose scale_mat_0 says where the object sits."""
    region_scale: float = 1.0
    """Radius of the region to reconstruct, in radii of the capture's sphere; above 1 adds surroundings."""
    img_downscale: int | float = 1
    """Divide width and height by this, >= 1."""
    apply_mask: bool = False
    """Load mask/ (the photographs themselves stay as they are)."""
    background: Literal["black", "white"] = "black"
    """Plain colour behind masked objects. DTU's room is black, and masks a little too wide show it."""
    holdout: Any = 0
    """Views kept out of training: 0 = none, k = every k-th, or a list of indices."""
    test_steps: int = 60
    """Frames of the test video, >= 1."""

    def __post_init__(self) -> None:
        if not self.img_downscale >= 1:
            raise ConfigError(
                "dataset.img_downscale",
                f"{self.img_downscale} is below 1",
                "give 1 for full size, 2 for half",
            )
        if not 0.01 <= self.region_scale <= 100:
            raise ConfigError(
                "dataset.region_scale",
                f"{self.region_scale} is not in 0.01..100",
                "1 keeps the capture's sphere",
            )
        if self.test_steps < 1:
            raise ConfigError(
                "dataset.test_steps", f"{self.test_steps} is below 1", "give a number of frames"
            )


def load_dtu(config: DTUConfig) -> Scene:
    """Load a capture in NeuS's layout.

    Raises:
        DataError: something of the capture is missing, unreadable or inconsistent; the line names the file.
        ConfigError: ``dataset.holdout`` does not fit the capture.
    """
    root = _find_root(config.root_dir)
    image_paths = _list_pictures(root / "image")
    mask_paths = _match_masks(root / "mask", image_paths) if config.apply_mask else []
    intrinsics, c2w, world_from_scene = _load_cameras(config, root, len(image_paths))

    full_sizes, images = _load_images(image_paths, config.img_downscale)
    for index, ((full_width, full_height), image) in enumerate(zip(full_sizes, images, strict=True)):
        # The true factor per axis: 1599 pixels halved are 800, not 799.5.
        factor = (image.shape[1] / full_width, image.shape[0] / full_height)
        intrinsics[index] = scale_intrinsics(torch.from_numpy(intrinsics[index]), factor).numpy()
    masks = _load_masks(mask_paths, image_paths, full_sizes, images) if config.apply_mask else None

    image_stack = ImageStack.from_images(images)
    train, test = split_views(len(image_paths), config.holdout)
    return Scene(
        name=root.name,
        cameras=Cameras(
            torch.from_numpy(c2w).float(), torch.from_numpy(intrinsics).float(), image_stack.size.clone()
        ),
        images=image_stack,
        image_names=tuple(path.name for path in image_paths),
        train_indices=train,
        test_indices=test,
        world_from_scene=torch.from_numpy(world_from_scene),
        masks=masks,
        background_color=(0.0, 0.0, 0.0) if config.background == "black" else (1.0, 1.0, 1.0),
    )


# ----------------------------------------------------------------------------------------------------------
# files


def _find_root(root_dir: str | None) -> Path:
    """Check that the capture's folder is given and exists."""
    if root_dir is None:
        raise DataError("dataset.root_dir", "not given", f"add dataset.root_dir=FOLDER; {_LAYOUT}")
    root = Path(root_dir).expanduser().resolve()
    if not root.is_dir():
        raise DataError(root_dir, "no such folder", f"check dataset.root_dir; {_LAYOUT}")
    return root


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", path.name.lower())
    # The first entry keeps numbers and words comparable, the name itself breaks ties such as 1.png and
    # 01.png.
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


def _list_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder in natural order."""
    if not folder.is_dir():
        raise DataError(folder, "no such folder", f"check dataset.root_dir; {_LAYOUT}")
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise DataError(folder, "holds no pictures", f"check dataset.root_dir; {_LAYOUT}")
    return sorted(paths, key=_natural_key)


def _last_number(path: Path) -> str:
    """Give the last number in a file's stem without leading zeros: 000012.png and mask_012.png agree."""
    numbers = re.findall(r"\d+", path.stem)
    return str(int(numbers[-1])) if numbers else path.stem


def _match_masks(folder: Path, image_paths: list[Path]) -> list[Path]:
    """Find the mask of each image: by stem, else by number, else (equal counts) by order."""
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "add the masks, or set dataset.apply_mask=false")
    mask_paths = _list_pictures(folder)
    keys: tuple[Callable[[Path], str], ...] = (lambda path: path.stem, _last_number)
    for key in keys:
        by_key = {key(path): path for path in mask_paths}
        are_unique = len(by_key) == len(mask_paths) and len({key(p) for p in image_paths}) == len(image_paths)
        if are_unique and all(key(path) in by_key for path in image_paths):
            return [by_key[key(path)] for path in image_paths]
    if len(mask_paths) == len(image_paths):
        return mask_paths
    known = {_last_number(path) for path in mask_paths}
    unmatched = [path.name for path in image_paths if _last_number(path) not in known]
    missing = unmatched[0] if unmatched else image_paths[-1].name
    raise DataError(
        folder,
        f"{len(mask_paths)} masks for {len(image_paths)} images, none for image/{missing}",
        "add the missing masks, or set dataset.apply_mask=false",
    )


# --------------------------------------------------------------------------------------------------------
# cameras


def _find_camera_file(root: Path, name: str) -> Path:
    """Find the named camera file; cameras_sphere.npz and cameras.npz stand in for each other."""
    if (root / name).is_file():
        return root / name
    for other in ("cameras_sphere.npz", "cameras.npz"):
        if (root / other).is_file():
            LOG.warning("%s is missing, %s is used in its place", root / name, other)
            return root / other
    raise DataError(root / name, "no such camera file", f"check dataset.render_cameras_name; {_LAYOUT}")


def _read_matrices(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Read the world_mat_i and scale_mat_i of a camera file in float64."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = [key for key in archive.files if re.fullmatch(r"(world|scale)_mat_\d+", key)]
            return {key: np.asarray(archive[key], dtype=np.float64) for key in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        remedy = "copy it again from the original"
        raise DataError(path, f"not a readable .npz file ({error})", remedy) from error


def _take(
    matrices: dict[str, np.ndarray[Any, np.dtype[np.float64]]], key: str, path: Path
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
    matrices: dict[str, np.ndarray[Any, np.dtype[np.float64]]], path: Path
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
    config: DTUConfig, root: Path, num_images: int
) -> tuple[Float64[np.ndarray, "N 3 3"], Float64[np.ndarray, "N 3 4"], Float64[np.ndarray, "4 4"]]:
    """Read intrinsics (full-size pixels, centres at +0.5), poses in scene space and world_from_scene."""
    path = _find_camera_file(root, config.render_cameras_name)
    matrices = _read_matrices(path)
    world_from_scene = _take_similarity(matrices, path)
    num_matrices = sum(key.startswith("world_mat_") for key in matrices)
    if num_matrices != num_images:
        raise DataError(
            path,
            f"{num_matrices} world_mat_i for {num_images} pictures in image/",
            "matrices belong to pictures by position, so there must be exactly one each",
        )
    intrinsics, c2w = np.empty((num_images, 3, 3)), np.empty((num_images, 3, 4))
    for index in range(num_images):
        key = f"world_mat_{index}"
        projection = (_take(matrices, key, path) @ world_from_scene)[:3]
        try:
            intrinsics[index], c2w[index] = decompose_projection(projection)
        except ValueError as error:
            raise DataError(path, f"{key}: {error}", "write the camera file again") from error
        # The scene origin's depth: below -1 the whole unit sphere lies behind the camera, which is what a
        # mirrored matrix looks like after decomposition.
        if -c2w[index, :, 3] @ c2w[index, :, 2] < -1.0:
            raise DataError(
                path,
                f"{key}: the camera looks away from the unit sphere",
                "the matrix is mirrored, or scale_mat_0 does not surround what the cameras look at",
            )
    intrinsics[:, :2, 2] += 0.5

    object_path = _find_camera_file(root, config.object_cameras_name)
    object_sphere = _take_similarity(_read_matrices(object_path), object_path)
    if np.abs(object_sphere - world_from_scene).max() > 1e-3 * np.cbrt(np.linalg.det(world_from_scene)):
        LOG.warning(
            "%s and %s name different spheres: training and mesh cover the first", path.name, object_path.name
        )
    # A larger region is a smaller scene: distances shrink, directions stay.
    c2w[:, :, 3] /= config.region_scale
    world_from_scene[:3, :3] *= config.region_scale
    return intrinsics, c2w, world_from_scene


# ---------------------------------------------------------------------------------------------------- pixels


def _map_files(function: Callable[[int], T], num_files: int, title: str) -> list[T]:
    """Run ``function`` on 0..num_files-1 in a few threads, with a progress bar from 21 files on."""
    # Threads are enough, because the decoders release the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(function, range(num_files))
        is_short = num_files <= 20
        return list(tqdm(results, total=num_files, desc=title, unit="file", leave=False, disable=is_short))


def _load_images(
    paths: list[Path], downscale: int | float
) -> tuple[list[tuple[int, int]], list[UInt8[np.ndarray, "_ _ 3"]]]:
    """Read the photographs; also give their (width, height) before downscaling."""

    def load(index: int) -> tuple[tuple[int, int], UInt8[np.ndarray, "_ _ 3"]]:
        image = read_image(paths[index])
        full = (image.shape[1], image.shape[0])
        small = (max(1, round(full[0] / downscale)), max(1, round(full[1] / downscale)))
        # Area filtering averages all pixels that a new one covers: no aliasing, and exactly our pixel
        # convention.
        return full, image if small == full else cv2.resize(image, small, interpolation=cv2.INTER_AREA)

    loaded = _map_files(load, len(paths), "images")
    return [full for full, _ in loaded], [image for _, image in loaded]


def _load_masks(
    mask_paths: list[Path],
    image_paths: list[Path],
    full_sizes: list[tuple[int, int]],
    images: list[UInt8[np.ndarray, "_ _ 3"]],
) -> ImageStack:
    """Read the masks at the images' sizes, 0 or 255."""

    def load(index: int) -> UInt8[np.ndarray, "_ _ 1"]:
        mask = read_mask(mask_paths[index])
        size, full = (mask.shape[1], mask.shape[0]), full_sizes[index]
        if size != full:
            raise DataError(
                mask_paths[index],
                f"{size[0]}x{size[1]} pixels, but image/{image_paths[index].name} has {full[0]}x{full[1]}",
                "give the mask the size of its image",
            )
        small = (images[index].shape[1], images[index].shape[0])
        if small != full:
            mask = cv2.resize(mask, small, interpolation=cv2.INTER_AREA)
        return np.where(mask >= 128, 255, 0).astype(np.uint8)[..., None]

    masks = _map_files(load, len(mask_paths), "masks")
    remedy = "255 marks the object, 0 the rest; or set dataset.apply_mask=false"
    if all(mask.min() == 255 for mask in masks):
        what = "every mask is white everywhere and carries no information"
        raise DataError(mask_paths[0].parent, what, remedy)
    black = [path for path, mask in zip(mask_paths, masks, strict=True) if mask.max() == 0]
    if len(black) == len(masks):
        raise DataError(mask_paths[0].parent, "every mask is black everywhere", remedy)
    if black:
        LOG.warning("%d of %d masks are black everywhere, first %s", len(black), len(masks), black[0])
    share = float(np.mean([mask.mean() / 255.0 for mask in masks]))
    LOG.info(
        "masks from %s: on average %.0f %% of a picture is foreground", mask_paths[0].parent, 100.0 * share
    )
    return ImageStack.from_images(masks)
