"""COLMAP's stages for one capture: features, matches, mapping; the largest model and what it is worth.

COLMAP works in a folder of its own, on links named 00000.jpg, 00001.jpg, ... in the photos' natural order:
file names with spaces or letters outside of ASCII never meet its text files, and its order is ours. The names
are put back into the finished model. Each stage is a process (``worker.py``).

Determinism: every random generator is seeded, and the pairs are listed by us. COLMAP adds up in several
threads, though, and its decisions amplify that: two runs on the same 53 photos gave 11652 and 11746 points.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from utils.doctor import install_hint
from utils.errors import DataError

LOG = logging.getLogger(__name__)

_SEED = 0
_SUSPICIOUS_ERROR = 0.9
"""Mean reprojection error in pixels from which a model is mapped once more."""
_OVERLAP = 10
_KEYFRAME_STEP = 5
_WORKER = Path(__file__).with_name("worker.py")
_POLL_SECONDS = 0.3
_OF_A_HOMOGRAPHY = ("PLANAR", "PANORAMIC", "PLANAR_OR_PANORAMIC")
_ROTATION_TOLERANCE = 1.02
"""Ratio of singular values; a step to the side of 2 % of the distance to a wall reaches it."""


@dataclass(frozen=True)
class Photo:
    """One picture as COLMAP will see it."""

    path: Path
    """The picture in the capture's images/ folder."""
    size: tuple[int, int]
    """(width, height) in pixels."""
    mask: Path | None = None
    """Where features may be looked for (255); ``None`` = everywhere."""


@dataclass(frozen=True)
class Pair:
    """Two photos that were matched."""

    photos: tuple[int, int]
    """Indices of the photos."""
    num_inliers: int
    """Matches that agree with one two-view geometry."""
    configuration: str
    """COLMAP's name for that geometry: CALIBRATED, UNCALIBRATED, WATERMARK, ...; of those that a homography
    explains, PANORAMIC if pure rotation is enough, else PLANAR."""


@dataclass(frozen=True)
class Model:
    """The largest model that mapping found."""

    folder: Path
    """Where COLMAP's binary files of the model lie, with the photos' own names."""
    placed: tuple[str, ...]
    """Names of the photos it places, sorted."""
    num_points: int
    mean_reprojection_error: float
    """Pixels."""
    mean_track_length: float
    """Photos that see a point, on average."""
    cameras: tuple[str, ...]
    """One line per camera: model, size, parameters."""
    other_models: tuple[int, ...]
    """Photos in each of the other, smaller models."""


def sequential_pairs(num_photos: int) -> list[tuple[int, int]]:
    """List the pairs to match of photos taken one after another.

    Each photo meets the 10 that follow it and those 16, 32, 64, ... further on, and every fifth photo meets
    every other fifth one. The latter closes loops (a walk around an object that comes back to where it
    began) without the vocabulary tree that COLMAP would have to download.

    Args:
        num_photos: photos in the order in which they were taken.

    Returns:
        Pairs ``(i, j)`` with ``i < j``, ascending, each once.
    """
    steps = list(range(1, _OVERLAP + 1))
    steps += [2**power for power in range(4, 20) if 2**power < num_photos]
    pairs = {(i, i + step) for i in range(num_photos) for step in steps if i + step < num_photos}
    pairs |= set(combinations(range(0, num_photos, _KEYFRAME_STEP), 2))
    return sorted(pairs)


def exhaustive_pairs(num_photos: int) -> list[tuple[int, int]]:
    """List all pairs ``(i, j)`` with ``i < j``."""
    return list(combinations(range(num_photos), 2))


class Colmap:
    """COLMAP at work on one capture; the folder is removed by whoever made it."""

    def __init__(self, folder: Path, log: Path, photos: list[Photo]) -> None:
        """Lay out the working folder.

        Args:
            folder: an empty folder for links, database and models.
            log: file that COLMAP's messages are added to.
            photos: in natural order.
        """
        self.folder, self.log, self.photos = folder, log, photos
        self.seconds: dict[str, float] = {}
        self._names = [f"{index:05d}{photo.path.suffix.lower()}" for index, photo in enumerate(photos)]
        (folder / "images").mkdir(parents=True)
        for photo, name in zip(photos, self._names, strict=True):
            link_or_copy(photo.path, folder / "images" / name)
            if photo.mask is not None:
                (folder / "masks").mkdir(exist_ok=True)
                link_or_copy(photo.mask, folder / "masks" / f"{name}.png")

    def extract(self, camera_model: str, single_camera: bool, max_features: int, feature_size: int) -> None:
        """Find SIFT features in all photos; photos of one size share a camera if ``single_camera``."""
        groups: dict[tuple[int, int], list[str]] = {}
        for photo, name in zip(self.photos, self._names, strict=True):
            groups.setdefault(photo.size, []).append(name)
        options = {
            "groups": list(groups.values()),
            "camera_model": camera_model,
            "single_camera": single_camera,
            "max_features": max_features,
            "feature_size": feature_size,
            "has_masks": (self.folder / "masks").is_dir(),
        }
        self._run("features", len(self.photos), "photo", options)

    def match(self, pairs: list[tuple[int, int]], turntable: bool) -> None:
        """Match pairs of photos; those matched before are skipped."""
        lines = [f"{self._names[i]} {self._names[j]}\n" for i, j in pairs]
        (self.folder / "pairs.txt").write_text("".join(lines), encoding="ascii")
        self._run("matches", len(pairs), "pair", {"turntable": turntable})

    def map(self) -> Model | None:
        """Place the photos; ``None`` when no model came about.

        Now and then mapping starts from a pair that leads it to a wrong focal length; the sign is an error of
        about a pixel, twice the usual. It is then done again from another seed, and the better model counts.
        """
        model = self._map_once(_SEED)
        if model is None or model.mean_reprojection_error < _SUSPICIOUS_ERROR:
            return model
        again = self._map_once(_SEED + 1)
        if again is None or len(again.placed) < len(model.placed):
            return model
        return min(model, again, key=lambda each: each.mean_reprojection_error)

    def _map_once(self, seed: int) -> Model | None:
        """Map from one seed and keep the largest model in a folder of that seed."""
        import pycolmap

        models = self.folder / "models"
        shutil.rmtree(models, ignore_errors=True)
        models.mkdir()
        self._run("mapping", len(self.photos), "photo", {"seed": seed})
        found = [pycolmap.Reconstruction(folder) for folder in sorted(models.iterdir()) if folder.is_dir()]
        if not found:
            return None
        sizes = [model.num_reg_images() for model in found]
        best = int(np.argmax(sizes))
        largest = found.pop(best)
        largest_size = sizes.pop(best)
        for image in largest.images.values():
            image.name = self.photos[self._names.index(image.name)].path.name
        shutil.rmtree(models)
        kept = self.folder / f"model_{seed}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        largest.write_binary(kept)
        placed = tuple(sorted(largest.image(image_id).name for image_id in largest.reg_image_ids()))
        assert len(placed) == largest_size
        return Model(
            folder=kept,
            placed=placed,
            num_points=largest.num_points3D(),
            mean_reprojection_error=float(largest.compute_mean_reprojection_error()),
            mean_track_length=float(largest.compute_mean_track_length()),
            cameras=tuple(_describe_camera(camera) for _, camera in sorted(largest.cameras.items())),
            other_models=tuple(sorted(sizes, reverse=True)),
        )

    def undistort(self, model: Model, images: Path, masks: Path | None) -> Path:
        """Write pinhole pictures (and masks) of the placed photos.

        Returns:
            The folder that holds images/, sparse/ and, if there are masks, masks/.
        """
        options = {"model": str(model.folder), "images": str(images), "masks": masks and str(masks)}
        self._run("undistort", 0, "photo", options)
        return self.folder / "undistorted"

    def num_features(self) -> list[int]:
        """Count the features of each photo."""
        import pycolmap

        with pycolmap.Database.open(self.folder / "database.db") as database:
            known = {image.name: image.image_id for image in database.read_all_images()}
            return [
                database.num_keypoints_for_image(known[name]) if name in known else 0 for name in self._names
            ]

    def pairs(self) -> list[Pair]:
        """List the pairs of photos whose matches were verified."""
        import pycolmap

        index = {name: position for position, name in enumerate(self._names)}
        result = []
        with pycolmap.Database.open(self.folder / "database.db") as database:
            by_id = {image.image_id: index[image.name] for image in database.read_all_images()}
            for pair_id, geometry in zip(*database.read_two_view_geometries(), strict=True):
                if len(geometry.inlier_matches) == 0:
                    continue
                first, second = (by_id[image_id] for image_id in pycolmap.pair_id_to_image_pair(pair_id))
                configuration = pycolmap.TwoViewGeometryConfiguration(geometry.config).name
                if configuration in _OF_A_HOMOGRAPHY and geometry.H is not None:
                    sizes = self.photos[first].size, self.photos[second].size
                    turned = is_pure_rotation(geometry.H, *sizes)
                    configuration = "PANORAMIC" if turned else "PLANAR"
                result.append(Pair((first, second), len(geometry.inlier_matches), configuration))
        return result

    def _run(self, stage: str, total: int, unit: str, options: dict[str, Any]) -> None:
        """Run one stage to its end, showing its progress.

        Raises:
            DataError: COLMAP gave up; the line quotes the last thing it said.
        """
        job = self.folder / "job.json"
        description = {"stage": stage, "folder": str(self.folder), "seed": _SEED, **options}
        job.write_text(json.dumps(description), encoding="utf-8")
        start = time.perf_counter()
        with (
            self.log.open("ab") as log,
            tqdm(total=total or None, desc=stage, unit=unit, disable=None, leave=False) as bar,
        ):
            beginning = log.tell()
            process = subprocess.Popen([sys.executable, str(_WORKER), str(job)], stdout=log, stderr=log)
            try:
                while True:
                    try:
                        process.wait(timeout=_POLL_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        bar.n = progress_in(self._said_since(beginning), stage, total)
                        bar.refresh()
            except BaseException:
                process.kill()
                process.wait()
                raise
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        # Mapping without a single model is no failure of the process: the caller explains it.
        if process.returncode != 0:
            errors = re.findall(r"^[EF]\d{8} .*?\] (.*)$", self._said_since(beginning), re.MULTILINE)
            said = errors[-1] if errors else f"exit code {process.returncode}"
            raise DataError(self.log, f"COLMAP failed at its {stage} ({said})", "see that file")

    def _said_since(self, beginning: int) -> str:
        """COLMAP's messages from a place in its log on."""
        with self.log.open("rb") as log:
            log.seek(beginning)
            return log.read().decode("utf-8", errors="replace")


def progress_in(messages: str, stage: str, total: int) -> int:
    """How far a stage is, in photos or pairs, from what COLMAP said so far.

    Its database is not asked: a second reader can make COLMAP's own access fail.
    """
    if stage == "features":
        return min(messages.count("Processed file ["), total)
    if stage == "matches":
        blocks = re.findall(r"Processing block \[(\d+)/(\d+)\]", messages)
        return total * (int(blocks[-1][0]) - 1) // int(blocks[-1][1]) if blocks else 0
    # Mapping may begin again with another pair, so the count can go down.
    placed = re.findall(r"num_reg_frames=(\d+)", messages)
    return min(int(placed[-1]), total) if placed else 0


def is_pure_rotation(
    homography: Float64[np.ndarray, "3 3"], size: tuple[int, int], other_size: tuple[int, int]
) -> bool:
    """Whether a camera that only turned on the spot explains a homography between two pictures.

    Then ``H = K' R K^-1``, so ``K'^-1 H K`` is a rotation up to scale: its singular values are equal. The
    focal length is not known; any common one from 0.4 to 4 times the longest side counts, so that a narrow
    pair of views, which says little, passes. COLMAP's own distinction needs a calibrated camera.

    Args:
        homography: takes pixels of the first picture to those of the second.
        size: (width, height) of the first.
        other_size: of the second.

    Source: Hartley and Zisserman, Multiple View Geometry, 2nd edition, section 13.2.
    """
    for focal in np.geomspace(0.4, 4.0, 30):
        intrinsics, other = (
            np.array([[focal * max(w, h), 0, w / 2], [0, focal * max(w, h), h / 2], [0, 0, 1]])
            for w, h in (size, other_size)
        )
        singular = np.linalg.svd(np.linalg.solve(other, homography @ intrinsics), compute_uv=False)
        if singular[0] < _ROTATION_TOLERANCE * singular[2]:
            return True
    return False


def colmap_missing() -> str | None:
    """``None`` where COLMAP can run, else why not and what to install."""
    try:
        import pycolmap
    except ImportError as error:
        return f"pycolmap not found ({error}), {install_hint('pycolmap')}"
    if not hasattr(pycolmap, "match_image_pairs"):
        return f"pycolmap {pycolmap.__version__} is too old, {install_hint('pycolmap')}"
    return None


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where the disk cannot link, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _describe_camera(camera: Any) -> str:
    parameters = ", ".join(f"{value:.6g}" for value in camera.params)
    return f"{camera.model.name} {camera.width}x{camera.height}: {parameters} ({camera.params_info})"
