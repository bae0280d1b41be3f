"""What every capture format is read into before a picture is decoded: views with poses in the world's frame.

A loader turns its files into a :class:`Capture`; ``process_data/capture.py`` makes a ``Scene`` of it.
Everything here is float64, in world units and in pixels of the full-size pictures.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from utils.errors import DataError
from utils.images import IMAGE_SUFFIXES
from utils.lens import project_to_lens
from utils.types import Lens, SparsePoints


@dataclass(frozen=True)
class View:
    """One photograph: where it lies and how it was taken."""

    image_path: Path
    c2w: Float64[np.ndarray, "3 4"]
    """Camera to world, OpenCV axes, det R = +1."""
    intrinsics: Float64[np.ndarray, "3 3"]
    """K in pixels (centres at +0.5) of a picture of ``size``; the pinhole part if there is a lens."""
    size: tuple[int, int] | None = None
    """(width, height) that the intrinsics are for; ``None``: that of the file."""
    lens: Lens | None = None
    """What bends the rays; ``None`` for a pinhole."""
    mask_path: Path | None = None
    depth_path: Path | None = None
    """See ``process_data/priors.py``, as for normals."""
    normal_path: Path | None = None

    def project(self, points: Float64[np.ndarray, "P 3"]) -> Float64[np.ndarray, "P 2"]:
        """Pixels at which world points appear; NaN behind the camera or where the lens sees nothing."""
        in_camera = (points - self.c2w[:, 3]) @ self.c2w[:, :3]
        if self.lens is not None:
            return project_to_lens(self.lens, in_camera)
        depth = np.where(in_camera[:, 2:] > 0, in_camera[:, 2:], np.nan)
        return (in_camera / depth @ self.intrinsics.T)[:, :2]


@dataclass(frozen=True)
class Capture:
    """A capture as its files describe it."""

    root: Path
    views: tuple[View, ...]
    points: SparsePoints | None = None
    """In world coordinates; ``observations`` count views as in ``views``."""
    world_from_scene: Float64[np.ndarray, "4 4"] | None = None
    """The region that the format itself names, as a similarity from the unit sphere; ``None``: none."""
    test_views: tuple[int, ...] | None = None
    """The views that the format itself keeps for measuring; ``None`` if it does not say."""
    up: Float64[np.ndarray, " 3"] | None = None
    """Up in the world, where the format defines it; ``None``: estimated from the cameras where needed."""


OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0])
"""Turns camera axes right-up-back (OpenGL, Blender, NeRF) into right-down-forward (OpenCV)."""
_COMPANIONS = ("_mask", "_foreground_mask", "_depth", "_normal")
"""Endings of what belongs to the picture whose name they follow."""


def checked_pose(matrix: Any, where: object, what: str) -> Float64[np.ndarray, "3 4"]:
    """Check a camera-to-world matrix and give its upper three rows with an exact rotation.

    Args:
        matrix: (3, 4) or (4, 4) numbers, nested lists or an array. One common scale of the axes is taken out.
        where: the file, for the error line.
        what: which matrix, for the error line: ``"frame images/0001.jpg"``.

    Raises:
        DataError: not a matrix of numbers, not finite, singular, mirrored (det R < 0) or sheared.
    """
    remedy = "write the poses again: rotation (det +1) and camera centre, camera to world"
    try:
        pose = np.asarray(matrix, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(where, f"{what}: the pose is not a matrix of numbers", remedy) from error
    if pose.shape not in ((3, 4), (4, 4)):
        raise DataError(where, f"{what}: the pose has shape {pose.shape}, not (4, 4)", remedy)
    if not np.isfinite(pose).all():
        raise DataError(where, f"{what}: the pose holds values that are not finite", remedy)
    if len(pose) == 4 and np.abs(pose[3] - [0.0, 0.0, 0.0, 1.0]).max() > 1e-6:
        raise DataError(where, f"{what}: the last row of the pose is not 0 0 0 1", remedy)
    axes = pose[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not lengths.min() > 1e-9 or abs(np.linalg.det(axes / lengths)) < 1e-3:
        raise DataError(where, f"{what}: the pose is singular", remedy)
    scale = np.cbrt(np.linalg.det(axes))
    if scale < 0:
        raise DataError(where, f"{what}: the pose is mirrored (its rotation has determinant -1)", remedy)
    if np.abs(axes.T @ axes / scale**2 - np.eye(3)).max() > 0.02:
        raise DataError(where, f"{what}: the pose is sheared, its axes are not at right angles", remedy)
    left, _, right = np.linalg.svd(axes)
    return np.concatenate([left @ right, pose[:3, 3:]], axis=1)


def find_root(root_dir: str | None, layout: str) -> Path:
    """Check that ``dataset.root_dir`` is given and is a folder; ``layout`` says what it should hold.

    Raises:
        DataError: it is not given or does not exist.
    """
    if root_dir is None:
        raise DataError("dataset.root_dir", "not given", f"add dataset.root_dir=FOLDER; {layout}")
    root = Path(root_dir).expanduser().resolve()
    if not root.is_dir():
        raise DataError(root_dir, "no such folder", f"check dataset.root_dir; {layout}")
    return root


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", path.name.lower())
    # The first entry keeps numbers and words comparable, the name itself breaks ties such as 1.png and
    # 01.png.
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def list_pictures(folder: Path, layout: str) -> list[Path]:
    """List the pictures of a capture's folder, as :func:`pictures_in` does.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(folder, "no such folder", f"check dataset.root_dir; {layout}")
    paths = pictures_in(folder)
    if not paths:
        raise DataError(folder, "holds no pictures", f"check dataset.root_dir; {layout}")
    return paths


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, in natural order; hidden files, masks and maps do not count."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    return sorted(without_companions(found), key=natural_key)


def without_companions(paths: Iterable[Path]) -> list[Path]:
    """Leave out what lies beside a ``NAME.jpg`` and belongs to it: ``NAME_mask.png``, sdfstudio's
    ``NAME_foreground_mask.png``, ``NAME_depth.png`` and ``NAME_normal.png``.

    See :func:`find_masks` and :func:`find_maps`.
    """
    names = {path: str(path.with_suffix("")).lower() for path in paths}
    known = set(names.values())
    return [
        path
        for path, name in names.items()
        if not any(name.endswith(end) and name.removesuffix(end) in known for end in _COMPANIONS)
    ]


def find_picture(path: Path) -> Path | None:
    """Find a picture as a capture's file names it: as it stands, with another suffix, or another case.

    ``images/a.jpg`` finds ``images/a.JPG``, ``images/a.jpg.png`` and ``images/a.png``, in this order; a name
    without a suffix (NeRF-Synthetic's ``./train/r_0``) any picture of that stem. Folders and links that lead
    nowhere do not count. ``None`` if there is none.
    """
    if path.is_file():
        return path
    if not path.parent.is_dir():
        return None
    name = path.name.lower()
    stem = path.stem.lower() if path.suffix.lower() in IMAGE_SUFFIXES else name
    found = [
        other
        for other in path.parent.iterdir()
        if other.suffix.lower() in IMAGE_SUFFIXES and other.stem.lower() in (name, stem) and other.is_file()
    ]
    same_name = [other for other in found if other.name.lower() == name]
    longer_name = [other for other in found if other.stem.lower() == name]
    return min(same_name or longer_name or found, key=natural_key, default=None)


def find_masks(root: Path, image_paths: list[Path]) -> list[Path | None]:
    """Find the mask of each picture among the places where captures keep them.

    For ``images/cat.jpg``: ``masks/`` or ``mask/`` in ``root`` or beside the pictures' folder, as
    ``cat.png``, ``cat.jpg.png`` or ``cat_mask.png``; or ``cat_mask.png`` beside the picture. Subfolders of
    the pictures' folder are mirrored below the masks' folder, or left out. Names in another case count where
    there is none in the same.

    Returns:
        One path per picture, ``None`` where there is none.
    """
    suffixes = (".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
    return _find_beside(root, image_paths, "mask", suffixes)


def find_maps(root: Path, image_paths: list[Path], kind: Literal["depth", "normal"]) -> list[Path | None]:
    """Find the depth or normal map of each picture, in the places and by the names of :func:`find_masks`.

    That is ``depth/cat.npy``, ``depths/cat.png``, ``cat_depth.tif`` and so on.
    """
    return _find_beside(root, image_paths, kind, (".npy", ".png", ".PNG", ".tif", ".tiff"))


def _find_beside(
    root: Path, image_paths: list[Path], kind: str, suffixes: tuple[str, ...]
) -> list[Path | None]:
    # What the folders hold is listed once for all pictures.
    listings: dict[Path, dict[str, list[str]]] = {}
    return [_find_one(root, path, kind, suffixes, listings) for path in image_paths]


def _find_one(
    root: Path,
    picture: Path,
    kind: str,
    suffixes: tuple[str, ...],
    listings: dict[Path, dict[str, list[str]]],
) -> Path | None:
    """Find one companion of a picture; ``listings`` keeps what the folders hold."""
    parents = [parent for parent in (picture.parent, *picture.parent.parents) if parent.is_relative_to(root)]
    places = [picture.parent]
    for folder in (f"{kind}s", kind):
        for parent in parents:
            inside = picture.parent.relative_to(parent)
            # images/left/cat.jpg: masks/left/cat.png, then masks/cat.png.
            places += [parent / folder / Path(*inside.parts[1:]), parent / folder / inside, parent / folder]
    other_case = []
    for place in dict.fromkeys(places):
        if place not in listings:
            listings[place] = _names_by_lower_case(place)
        stems = [f"{picture.stem}_{kind}"]
        if place != picture.parent:
            stems = [picture.stem, picture.name, *stems]
        for stem in stems:
            for suffix in suffixes:
                names = listings[place].get((stem + suffix).lower(), [])
                if stem + suffix in names and (place / (stem + suffix)).is_file():
                    return place / (stem + suffix)
                other_case += [place / name for name in names]
    return next((path for path in other_case if path.is_file()), None)


def _names_by_lower_case(folder: Path) -> dict[str, list[str]]:
    """What a folder holds, if it exists: the names in order, by their lower-case form."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        found.setdefault(name.lower(), []).append(name)
    return found
