"""COLMAP's sparse models on disk: which one to take, and reading it without running into broken files.

A model is a folder with cameras, images and points3D, and since COLMAP 3.12 rigs and frames, all .bin or all
.txt. pycolmap reads them. In a binary file that was cut off it runs on without end, or takes what memory held
before, so the counts in every binary file are followed to its end first.

Source: https://colmap.github.io/format.html.
"""

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from process_data.views import natural_key
from utils.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

REMEDY = "write the model again with COLMAP, or copy it again from the original"
_PLACES = ("sparse", "colmap/sparse", ".")
_PARTS = ("cameras", "images", "points3D")
_TEXT_NUMBERS: dict[str, tuple[int, ...]] = {
    "cameras": (0, 2, 3),
    "images": tuple(range(9)),
    "points3D": tuple(range(8)),
    "rigs": (0, 1, 3),
    "frames": tuple(range(9)),
}
"""Which entries of a line in a text file must be numbers."""


@dataclass(frozen=True)
class ColmapModel:
    """A sparse model that was read from ``folder``."""

    folder: Path
    suffix: str
    """Of its files: .bin or .txt."""
    reconstruction: Any
    """A ``pycolmap.Reconstruction``."""

    def file(self, part: str) -> Path:
        """Its file of cameras, images, points3D, rigs or frames."""
        return self.folder / (part + self.suffix)

    def images(self) -> list[Any]:
        """The registered photographs, in natural order of their names, then of their ids."""
        ids = sorted(self.reconstruction.reg_image_ids())
        return sorted((self.reconstruction.image(i) for i in ids), key=lambda image: _name_key(image.name))


def _name_key(name: str) -> list[Any]:
    """Natural order, folder by folder."""
    return [natural_key(Path(part)) for part in PurePosixPath(name).parts]


def choose_model(root: Path, model_dir: str | None, layout: str) -> ColmapModel:
    """Find and read a capture's model; of several the one with most registered photographs.

    Args:
        root: folder of the capture.
        model_dir: folder of a model or of models, absolute or below ``root``; ``None``: ``sparse``,
            ``colmap/sparse`` or ``root`` itself.
        layout: what the capture's folder should hold, for the error line.

    Raises:
        ConfigError: there is no model in ``model_dir``.
        DataError: there is none in ``root``, a file of it is missing or broken, or it places no photograph.
    """
    places = _PLACES if model_dir is None else (model_dir,)
    folders = next((found for place in places if (found := _model_folders(root / place, root))), [])
    if not folders and model_dir is not None:
        raise ConfigError("dataset.model_dir", f"{root / model_dir} holds no COLMAP model", layout)
    if not folders:
        raise DataError(root, "holds no COLMAP model", f"run COLMAP, or set dataset.model_dir; {layout}")
    models = [_read_model(folder) for folder in folders]
    # max() takes the first of equals: sparse/0 before sparse/1.
    best = max(models, key=lambda model: model.reconstruction.num_reg_images())
    if len(models) > 1:
        placed = {image.name for image in best.images()}
        others = {image.name for model in models for image in model.images()} - placed
        used = f"{best.folder.name} with {len(placed)} photos is used"
        left_out = f"{len(others)} photos that only the others place are left out"
        LOG.warning("%s holds %d models: %s, %s", best.folder.parent, len(models), used, left_out)
    return best


def _model_folders(place: Path, root: Path) -> list[Path]:
    """The folders of models directly in ``place``, or ``place`` itself if it is one."""

    def has_model(folder: Path) -> bool:
        return any((folder / f"{part}.{kind}").is_file() for part in _PARTS[:2] for kind in ("bin", "txt"))

    # Subfolders of the root are places of their own.
    inside = sorted(path for path in place.glob("*") if path.is_dir()) if place.resolve() != root else []
    found = sorted(filter(has_model, inside), key=natural_key)
    return found or ([place] if has_model(place) else [])


def _read_model(folder: Path) -> ColmapModel:
    """Read a model whose files have been checked for completeness."""
    import pycolmap  # Takes a while to load, and other formats do without it.

    missing = {
        suffix: [folder / (part + suffix) for part in _PARTS if not (folder / (part + suffix)).is_file()]
        for suffix in (".bin", ".txt")
    }
    suffix = min(missing, key=lambda suffix: len(missing[suffix]))
    if missing[suffix]:
        raise DataError(missing[suffix][0], "no such file", f"a model needs all of {', '.join(_PARTS)}")
    model = ColmapModel(folder, suffix, pycolmap.Reconstruction())
    if suffix == ".bin":
        _check_binary(folder)
    read = model.reconstruction.read_binary if suffix == ".bin" else model.reconstruction.read_text
    try:
        read(folder)
    except (RuntimeError, ValueError, LookupError, TypeError, MemoryError, OverflowError) as error:
        if suffix == ".txt":
            _check_text(model)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"COLMAP cannot read the {suffix} files of this model ({first})"
        raise DataError(folder, what, REMEDY) from error
    if suffix == ".txt":
        _check_text_images(model)
    if model.reconstruction.num_reg_images() == 0:
        raise DataError(model.file("images"), "places no photographs", REMEDY)
    try:
        model.images()
    except UnicodeDecodeError as error:
        raise DataError(model.file("images"), f"a photo's name is not UTF-8 ({error})", REMEDY) from error
    return model


def _check_text(model: ColmapModel) -> None:
    """Find the line that makes text files unreadable, for pycolmap does not say.

    Raises:
        DataError: a line does not begin with the numbers that it should.
    """
    for part, places in _TEXT_NUMBERS.items():
        if not model.file(part).is_file():
            continue
        lines = model.file(part).read_text(encoding="utf-8", errors="replace").splitlines()
        numbered = [(i, line.split()) for i, line in enumerate(lines, start=1) if not line.startswith("#")]
        # Every second line about images lists what they see, and may be empty.
        for number, entries in numbered[:: 2 if part == "images" else 1]:
            if entries and not all(place < len(entries) and _is_number(entries[place]) for place in places):
                raise DataError(model.file(part), f"line {number} is not as COLMAP writes it", REMEDY)


def _check_text_images(model: ColmapModel) -> None:
    """Find photographs that pycolmap took for the second line, about what it sees, of the one before.

    Raises:
        DataError: there are more or fewer lines that place photographs than photographs that were read.
    """
    with model.file("images").open(encoding="utf-8", errors="replace") as lines:
        num_lines = sum(_places_image(line) for line in lines)
    num_images = model.reconstruction.num_images()
    if num_lines != num_images:
        what = f"{num_lines} lines place photographs, but {num_images} can be read"
        remedy = f"write two lines for each photograph, the second may be empty; or {REMEDY}"
        raise DataError(model.file("images"), what, remedy)


def _places_image(line: str) -> bool:
    """Whether a line is IMAGE_ID, QW..QZ, TX..TZ, CAMERA_ID, NAME, and not a list of X, Y, POINT3D_ID."""
    entries = line.split(maxsplit=9)
    if len(entries) < 10 or not (entries[0].isdecimal() and entries[8].isdecimal()):
        return False
    if not all(map(_is_number, entries[1:8])):
        return False
    name = entries[9].split()
    return len(name) % 3 != 0 or not all(map(_is_number, name))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Cursor:
    """Walks through a binary file without reading past its end."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.offset = path, content, 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        self.skip(layout.size)
        return layout.unpack_from(self.content, self.offset - layout.size)

    def skip(self, num_bytes: int) -> None:
        self.offset += num_bytes
        if self.offset > len(self.content):
            what = f"ends too early, after {len(self.content)} bytes: it was cut off or is damaged"
            raise DataError(self.path, what, REMEDY)

    def skip_name(self) -> None:
        end = self.content.find(b"\0", self.offset)
        self.skip((end if end >= 0 else len(self.content)) + 1 - self.offset)


_COUNT = struct.Struct("<Q")
_CAMERA = struct.Struct("<IiQQ")
_IMAGE = struct.Struct("<I7dI")
_POINT = struct.Struct("<Q3d3BdQ")
_RIG = struct.Struct("<II")
_SENSOR = struct.Struct("<iI")
_HAS_POSE = struct.Struct("<?")
_FRAME = struct.Struct("<II7dI")
_POSE_BYTES, _POINT2D_BYTES, _TRACK_BYTES, _DATA_BYTES = 56, 24, 8, 16


def _check_binary(folder: Path) -> None:
    """Follow the counts in a model's files, and refuse those that end before."""
    walks: dict[str, Callable[[_Cursor], None]] = {
        "cameras": _camera_walk(),
        "images": _walk_image,
        "points3D": _walk_point,
        "rigs": _walk_rig,
        "frames": _walk_frame,
    }
    for part, walk in walks.items():
        path = folder / f"{part}.bin"
        if not path.is_file() and part not in _PARTS:
            continue
        cursor = _Cursor(path, path.read_bytes())
        (count,) = cursor.take(_COUNT)
        for _ in range(count):
            walk(cursor)


def _camera_walk() -> Callable[[_Cursor], None]:
    import pycolmap

    num_params = {
        int(model): len(pycolmap.Camera.create_from_model_name(1, name, 1.0, 1, 1).params)
        for name, model in pycolmap.CameraModelId.__members__.items()
        if name != "INVALID"
    }

    def walk(cursor: _Cursor) -> None:
        camera, model, _, _ = cursor.take(_CAMERA)
        if model not in num_params:
            raise DataError(cursor.path, f"camera {camera} has unknown model number {model}", REMEDY)
        cursor.skip(8 * num_params[model])

    return walk


def _walk_image(cursor: _Cursor) -> None:
    cursor.take(_IMAGE)
    cursor.skip_name()
    cursor.skip(_POINT2D_BYTES * cursor.take(_COUNT)[0])


def _walk_point(cursor: _Cursor) -> None:
    cursor.skip(_TRACK_BYTES * cursor.take(_POINT)[-1])


def _walk_rig(cursor: _Cursor) -> None:
    _, num_sensors = cursor.take(_RIG)
    if num_sensors > 0:
        cursor.take(_SENSOR)
    for _ in range(num_sensors - 1):
        cursor.take(_SENSOR)
        cursor.skip(_POSE_BYTES * cursor.take(_HAS_POSE)[0])


def _walk_frame(cursor: _Cursor) -> None:
    cursor.skip(_DATA_BYTES * cursor.take(_FRAME)[-1])
