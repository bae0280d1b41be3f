"""The entries of a transforms.json: photographs, cameras and poses, as instant-ngp and nerfstudio write them.

Both formats that use such files (``transforms.py``, ``blender.py``) read them here. What a camera needs may
stand at the top of the file, for all frames, or in a frame, which then goes first.
"""

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from process_data.views import OPENCV_FROM_OPENGL, View, checked_pose, find_picture, find_root, natural_key
from utils.errors import DataError
from utils.images import open_picture
from utils.lens import PINHOLES, lens_fault, pinhole_part
from utils.types import Lens

LOG = logging.getLogger(__name__)

_PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
"""Camera models that differ only in which of k1, k2, k3, p1, p2 they use: those that are written count."""
_MODELS = (*_PERSPECTIVE, "OPENCV_FISHEYE", "EQUIRECTANGULAR")
_FOREIGN_LENSES = ("ftheta_p0", "latlong", "equirectangular", "orthographic")
"""Keys by which instant-ngp names lenses that COLMAP's models do not cover."""
_FOREIGN_TERMS = ("k5", "k6", "p3", "p4", "s1", "s2", "s3", "s4", "b1", "b2")
"""Terms of other programs' lenses that are not read."""

# ----------------------------------------------------------------------------------------------------------
# the file


def find_json(root_dir: str | None, name: str, layout: str) -> Path:
    """Find the file that describes a capture, given its folder or the file itself.

    Args:
        root_dir: ``dataset.root_dir``.
        name: the file to look for in a folder.
        layout: what is expected there, for the error line.

    Raises:
        DataError: ``root_dir`` is not given, or there is no such folder or file.
    """
    if root_dir is not None:
        given = Path(root_dir).expanduser().resolve()
        if given.suffix.lower() == ".json" and given.is_file():
            return given
    path = find_root(root_dir, layout) / name
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.json"))
        found = f" (the folder has {', '.join(others[:5])})" if others else ""
        raise DataError(path, f"no such file{found}", layout)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; a byte order mark is skipped.

    Raises:
        DataError: the file is missing, unreadable or not such JSON; the line gives the position of the error.
    """
    remedy = "export the capture again, or copy the file from the original"
    try:
        # Given bytes, the parser finds out whether they are UTF-8 or 16, with or without a mark.
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        position = f"line {error.lineno} column {error.colno}"
        raise DataError(path, f"not valid JSON at {position} ({error.msg})", remedy) from error
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "check path and permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(path, f"not valid JSON ({error})", remedy) from error
    if not isinstance(content, dict):
        raise DataError(path, "holds no JSON object with frames", remedy)
    return content


def checked_number(value: Any, path: Path, what: str) -> float:
    """Check an entry to be a finite number.

    Raises:
        DataError: it is not; the line names the file and, by ``what``, the entry.
    """
    remedy = "write a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(path, f"{what} is {str(value)[:40]!r}, not a number", remedy)
    # Python reads whole numbers of any length, and NaN and Infinity although JSON has none.
    if not abs(value) < 1e30:
        raise DataError(path, f"{what} is {str(value)[:40]}", remedy)
    return float(value)


def checked_array(value: Any, shape: tuple[int, ...], path: Path, key: str) -> Float64[np.ndarray, "..."]:
    """Check an entry to be nested lists of finite numbers, of the given shape.

    Raises:
        DataError: it is not; the line names the file and the key.
    """
    remedy = f"write numbers of shape {shape}, or remove {key}"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(path, f"{key} does not consist of numbers", remedy) from error
    if array.shape != shape or not np.isfinite(array).all():
        raise DataError(path, f"{key} has shape {array.shape} or values that are not finite", remedy)
    return array


@dataclass(frozen=True)
class Frame:
    """One entry of ``frames`` and the photograph that it names."""

    entry: dict[str, Any]
    shared: dict[str, Any]
    """The file's top level, which holds what the frames have in common."""
    path: Path
    """The file, for error lines."""
    photo: Path

    @property
    def title(self) -> str:
        """How error lines name the frame."""
        return f"frame {self.entry['file_path']}"

    def get(self, key: str) -> Any:
        """A key of the frame, else of the file, else ``None``."""
        value = self.entry.get(key)
        return self.shared.get(key) if value is None else value

    def number(self, key: str) -> float | None:
        """A number of the frame, else of the file, else ``None``.

        Raises:
            DataError: it is not a finite number.
        """
        value = self.get(key)
        return None if value is None else checked_number(value, self.path, f"{self.title}: {key}")


def read_frames(content: dict[str, Any], path: Path) -> list[Frame]:
    """List the frames whose photographs exist, in natural order of their paths, each photograph once.

    Args:
        content: the file, from :func:`read_json`.
        path: where it lies; ``file_path`` counts from its folder.

    Raises:
        DataError: there are no frames, an entry is malformed, or none of the photographs exists.
    """
    entries = content.get("frames")
    if not isinstance(entries, list) or not entries:
        fault = "has no frames" if entries is None or entries == [] else "frames is not a list"
        raise DataError(path, fault, "export the capture again: frames lists file_path and transform_matrix")
    found: dict[Path, Frame] = {}
    missing, repeated = [], []
    for index, entry in enumerate(entries):
        name = entry.get("file_path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            remedy = "each frame needs file_path, a text, and transform_matrix"
            raise DataError(path, f"frames[{index}] names no photograph (file_path)", remedy)
        photo = find_file(path.parent, name)
        if photo is None:
            missing.append(name)
        elif photo in found:
            repeated.append(name)
        else:
            found[photo] = Frame(entry, content, path, photo)
    if not found:
        raise DataError(
            path,
            f"none of the {len(entries)} photographs that it lists exists, first {missing[0]}",
            "copy the photographs to where file_path says, relative to the file",
        )
    if missing:
        LOG.warning(
            "%s: %d of %d photographs do not exist and are skipped, first %s",
            path,
            len(missing),
            len(entries),
            missing[0],
        )
    if repeated:
        LOG.warning(
            "%s: %d photographs are listed twice, the first entry counts: %s",
            path,
            len(repeated),
            repeated[0],
        )
    order = sorted(found, key=lambda photo: [natural_key(Path(part)) for part in photo.parts])
    return [found[photo] for photo in order]


def find_file(folder: Path, name: str) -> Path | None:
    """Find a picture that a capture names in its own or another system's way.

    A path that is absolute on the machine that wrote it is also tried by its last parts:
    ``C:\\scans\\cat\\images\\1.jpg`` as ``cat/images/1.jpg``, ``images/1.jpg`` and ``1.jpg``.
    """
    path = Path(name.strip().replace("\\", "/"))
    candidates = [folder / path]
    if path.is_absolute() or PureWindowsPath(name.strip()).drive:
        candidates += [folder.joinpath(*path.parts[start:]) for start in range(1, len(path.parts))]
    try:
        found = next(filter(None, map(find_picture, candidates)), None)
    except OSError as error:
        raise DataError(
            name[:80],
            f"cannot be looked up ({error.strerror})",
            f"check file_path and permissions in {folder}",
        ) from error
    return None if found is None else Path(os.path.normpath(found))


# ----------------------------------------------------------------------------------------------------------
# cameras


def frame_view(
    frame: Frame,
    convention: Literal["opengl", "opencv"],
    poses: Literal["c2w", "w2c"],
    world_from_file: Float64[np.ndarray, "4 4"],
    use_mask: bool,
) -> View:
    """Make a view of a frame.

    Args:
        frame: from :func:`read_frames`.
        convention: camera axes of the poses.
        poses: what the matrices map.
        world_from_file: similarity from the frame that the poses are written in to the capture's world.
        use_mask: whether to take the mask that the frame names.

    Raises:
        DataError: pose or camera are missing, malformed or absurd.
    """
    lens = _frame_lens(frame)
    depth, mask = frame.entry.get("depth_file_path"), frame.entry.get("mask_path")
    folder = frame.path.parent
    mask_path = None
    if use_mask and isinstance(mask, str):
        mask_path = find_file(folder, mask) or folder / mask
    return View(
        frame.photo,
        _frame_pose(frame, convention, poses, world_from_file),
        pinhole_part(lens),
        lens.size,
        None if lens.model in PINHOLES else lens,
        mask_path=mask_path,
        depth_path=folder / depth.replace("\\", "/") if isinstance(depth, str) else None,
    )


def _frame_pose(
    frame: Frame, convention: str, poses: str, world_from_file: Float64[np.ndarray, "4 4"]
) -> Float64[np.ndarray, "3 4"]:
    if "transform_matrix" not in frame.entry:
        raise DataError(
            frame.path, f"{frame.title} has no pose (transform_matrix)", "export the capture again"
        )
    matrix = frame.entry["transform_matrix"]
    c2w = homogeneous(checked_pose(matrix, frame.path, frame.title))
    if poses == "w2c":
        # From the matrix as written: a scale of its axes also scales its translation.
        c2w = np.linalg.inv(homogeneous(np.asarray(matrix, np.float64)))
    if convention == "opengl":
        c2w[:3, :3] = c2w[:3, :3] @ OPENCV_FROM_OPENGL
    return checked_pose(world_from_file @ c2w, frame.path, frame.title)


def homogeneous(matrix: Float64[np.ndarray, "rows 4"]) -> Float64[np.ndarray, "4 4"]:
    """Make (3, 4) or (4, 4) a matrix of (4, 4) whose last row is 0 0 0 1."""
    return np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])


def _frame_lens(frame: Frame) -> Lens:
    """The camera of a frame as one of COLMAP's models; without distortion it is a PINHOLE."""
    foreign = next((key for key in _FOREIGN_LENSES if frame.get(key)), None)
    model = "OPENCV_FISHEYE" if frame.get("is_fisheye") else frame.get("camera_model") or "OPENCV"
    if foreign is not None or model not in _MODELS:
        raise DataError(
            frame.path,
            f"{frame.title}: camera model {foreign or str(model)[:40]} is not supported",
            f"undistort the photographs, or use one of {', '.join(_MODELS)}",
        )
    size = _frame_size(frame)
    if model == "EQUIRECTANGULAR":
        lens = Lens(model, (float(size[0]), float(size[1])), size)
    else:
        lens = _central_lens(frame, model, size)
    fault = lens_fault(lens)
    if fault is not None:
        remedy = "check fl_x, fl_y, cx, cy, w, h (pixels) and k1, k2, ... against the photographs"
        raise DataError(frame.path, f"{frame.title}: {fault}", remedy)
    return lens


def _central_lens(frame: Frame, model: str, size: tuple[int, int]) -> Lens:
    focal_x, focal_y = _focal_lengths(frame, size)
    center_x, center_y = frame.number("cx"), frame.number("cy")
    pinhole = (
        focal_x,
        focal_y,
        size[0] / 2 if center_x is None else center_x,
        size[1] / 2 if center_y is None else center_y,
    )
    _refuse_other_resolution(frame, size)
    _refuse_unused(frame, model, {key: frame.number(key) or 0.0 for key in _FOREIGN_TERMS})
    k1, k2, k3, k4, p1, p2 = (frame.number(key) or 0.0 for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if model == "OPENCV_FISHEYE":
        _refuse_unused(frame, model, {"p1": p1, "p2": p2})
        return Lens(model, (*pinhole, k1, k2, k3, k4), size)
    # Where k4 stands differs between programs (OpenCV's is in the denominator), so there is no right reading.
    _refuse_unused(frame, model, {"k4": k4})
    if k3 != 0:
        return Lens("FULL_OPENCV", (*pinhole, k1, k2, p1, p2, k3, 0.0, 0.0, 0.0), size)
    if any((k1, k2, p1, p2)):
        return Lens("OPENCV", (*pinhole, k1, k2, p1, p2), size)
    return Lens("PINHOLE", pinhole, size)


def _refuse_unused(frame: Frame, model: str, terms: dict[str, float]) -> None:
    for key, value in terms.items():
        if value != 0:
            raise DataError(
                frame.path,
                f"{frame.title}: camera model {model} has no {key}, but {key} is {value}",
                f"set {key} to 0 if it is negligible, correct camera_model, or undistort the photographs",
            )


def _refuse_other_resolution(frame: Frame, size: tuple[int, int]) -> None:
    """Where the file gives no size, find cameras for another resolution by their principal point."""
    for key, length_key, length in (("cx", "w", size[0]), ("cy", "h", size[1])):
        center = frame.number(key)
        if center is not None and frame.get(length_key) is None and not 0.2 <= center / length <= 0.8:
            raise DataError(
                frame.path,
                f"{frame.title}: {key} is {center:g}, but the picture is {size[0]}x{size[1]}: "
                "the camera seems to be for another resolution",
                "add w and h, the size that the camera is for, to the file",
            )


def _frame_size(frame: Frame) -> tuple[int, int]:
    """(width, height) that the camera is for; what the file leaves out is the photograph's."""
    width, height = frame.number("w"), frame.number("h")
    if width is None or height is None:
        with open_picture(frame.photo) as picture:
            width, height = width or picture.width, height or picture.height
    if not (1 <= width < 1e6 and 1 <= height < 1e6):
        raise DataError(
            frame.path, f"{frame.title}: w x h is {width:g} x {height:g}", "write pixels, or remove w and h"
        )
    return round(width), round(height)


def _focal_lengths(frame: Frame, size: tuple[int, int]) -> tuple[float, float]:
    """(fx, fy) in pixels. One of the two, or one angle, is enough: then pixels are square."""
    found = []
    for axis, length in zip("xy", size, strict=True):
        # A frame's angle goes before the file's focal length.
        for entry in (frame.entry, frame.shared):
            focal, angle = entry.get(f"fl_{axis}"), entry.get(f"camera_angle_{axis}")
            if focal is not None:
                found.append(checked_number(focal, frame.path, f"{frame.title}: fl_{axis}"))
                break
            if angle is not None:
                what = f"{frame.title}: camera_angle_{axis}"
                radians = checked_number(angle, frame.path, what)
                if not 0 < radians < math.pi:
                    raise DataError(frame.path, f"{what} is {radians:g}", "write radians between 0 and pi")
                found.append(length / 2 / math.tan(radians / 2))
                break
    if not found:
        raise DataError(
            frame.path,
            f"{frame.title}: no focal length",
            "add fl_x in pixels or camera_angle_x in radians, for the frame or at the top",
        )
    return found[0], found[-1]
