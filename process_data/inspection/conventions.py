"""Which convention do poses follow? Tested on the photographs, because files do not say and readers guess.

A 4x4 matrix may lead from camera to world (c2w) or back (w2c), and the camera's axes may be
right-down-forward (OpenCV, COLMAP) or right-up-back (OpenGL, Blender, NeRF). Read wrongly, a capture still
loads and trains, into fog. Under the true reading, though, and under no other, the rays through matched
features meet in front of both cameras::

      o       a point that both views show: both rays should pass through it
     / \\
    c1--c2    baseline; the epipolar error is how many pixels a feature lies off the plane of the other's ray
              and the baseline

Two readings can be equally good: cameras that only shift sideways fit both kinds of axes, cameras that only
turn in place fit everything. Then nothing wins, and the report says so.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from process_data.inspection.feature_matches import Matches, Photographs, match_photographs
from process_data.views import OPENCV_FROM_OPENGL, checked_pose
from utils.errors import DataError
from utils.images import open_picture
from utils.types import Lens, Scene

LOG = logging.getLogger(__name__)

Axes = Literal["opencv", "opengl"]
Direction = Literal["c2w", "w2c"]
HYPOTHESES: tuple[tuple[Axes, Direction], ...] = (
    ("opencv", "c2w"),
    ("opengl", "c2w"),
    ("opencv", "w2c"),
    ("opengl", "w2c"),
)
NUM_ANCHORS = 6
"""Views, spread over the capture, whose matches with two others each are tested."""

_MEET_SHARE = 3.0 / 800.0
"""Epipolar error up to which two rays count as meeting, as a share of the picture's longer side: features and
good poses are far better, and chance seldom comes as near."""
_FEWEST_MATCHES = 60
_CLEAR_SHARE, _CLEAR_LEAD = 0.4, 0.2
"""A winner has this share of rays that meet, and this lead over the next."""


@dataclass(frozen=True)
class Score:
    """How well one reading of the poses explains the matches."""

    axes: Axes
    direction: Direction
    name: str
    """The reading in words."""
    share: float
    """Of matches whose rays meet in front of both cameras, 0..1; the mean over pairs of views."""
    median_error: float
    """Epipolar error in pixels of the view's own picture; NaN without matches or baseline."""


@dataclass(frozen=True)
class ConventionReport:
    """What the photographs say about the poses."""

    scores: tuple[Score, ...]
    """Best first."""
    num_pairs: int
    num_matches: int
    winner: tuple[Axes, Direction] | None
    """``None`` if no reading wins clearly."""
    reason: str
    """Why, in one line."""

    @property
    def fits(self) -> bool | None:
        """Whether the poses are right as they were given, OpenCV c2w; ``None`` if that cannot be told."""
        return None if self.winner is None else self.winner == HYPOTHESES[0]

    def table(self) -> str:
        """The scores in text, one line per reading."""
        width = max(len(score.name) for score in self.scores)
        lines = [f"{'poses read as':<{width}}  rays that meet  median error"]
        for score in self.scores:
            lines.append(f"{score.name:<{width}}  {100 * score.share:12.0f} %  {score.median_error:9.2f} px")
        return "\n".join(lines)


def read_as(
    matrix: Float64[np.ndarray, "3 4"], axes: Axes, direction: Direction
) -> Float64[np.ndarray, "3 4"]:
    """Turn a rigid matrix of a known convention into an OpenCV camera-to-world pose."""
    rotation, center = matrix[:, :3], matrix[:, 3]
    if direction == "w2c":
        rotation, center = rotation.T, -rotation.T @ center
    if axes == "opengl":
        rotation = rotation @ OPENCV_FROM_OPENGL
    return np.concatenate([rotation, center[:, None]], axis=1)


def spread(num_views: int, number: int) -> list[int]:
    """Choose up to ``number`` views evenly over a capture, the first and the last among them."""
    return np.unique(np.linspace(0, num_views - 1, min(number, num_views)).round().astype(int)).tolist()


def epipolar_errors(
    first: tuple[Float64[np.ndarray, "3 4"], Float64[np.ndarray, "M 3"]],
    second: tuple[Float64[np.ndarray, "3 4"], Float64[np.ndarray, "M 3"]],
) -> tuple[Float64[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Measure how far matched rays are from meeting.

    Args:
        first: pose (OpenCV c2w) and unit directions in the camera's axes.
        second: likewise for the other view.

    Returns:
        The angle in radians between each ray of one view and the plane of the other's ray and the baseline,
        the mean of both ways; NaN where there is no baseline. And whether the point at which the rays come
        closest lies in front of both cameras.
    """
    rays = [directions @ pose[:, :3].T for pose, directions in (first, second)]
    baseline = second[0][:, 3] - first[0][:, 3]
    length = np.linalg.norm(baseline)
    scale = max(np.linalg.norm(first[0][:, 3]), np.linalg.norm(second[0][:, 3]))
    if length <= 1e-9 * scale:
        return np.full(len(rays[0]), np.nan), np.zeros(len(rays[0]), bool)
    baseline = baseline / length
    errors = np.zeros(len(rays[0]))
    for ray, other in (rays, rays[::-1]):
        normal = np.cross(baseline, ray)
        sine = np.linalg.norm(normal, axis=1)
        # A ray along the baseline has no plane; the angle is then that between the rays.
        off_plane = np.abs((normal * other).sum(axis=1)) / np.maximum(sine, 1e-12)
        errors += 0.5 * np.arcsin(np.clip(off_plane, 0.0, 1.0))
    first_depth, second_depth = closest_depths(rays[0], rays[1], baseline)
    return errors, (first_depth > 0) & (second_depth > 0)


def closest_depths(
    first: Float64[np.ndarray, "M 3"],
    second: Float64[np.ndarray, "M 3"],
    baseline: Float64[np.ndarray, "*M 3"],
) -> tuple[Float64[np.ndarray, " M"], Float64[np.ndarray, " M"]]:
    """Distances along two rays at which they come closest; huge where they are parallel.

    Args:
        first: unit directions.
        second: unit directions.
        baseline: from the first rays' origins to the second rays'.
    """
    cosine = (first * second).sum(axis=1)
    along_first, along_second = (baseline * first).sum(axis=-1), (baseline * second).sum(axis=-1)
    sine_squared = np.maximum(1.0 - cosine**2, 1e-12)
    return (
        (along_first - cosine * along_second) / sine_squared,
        (cosine * along_first - along_second) / sine_squared,
    )


def try_hypotheses(
    matches: Matches, matrices: Float64[np.ndarray, "N 3 4"], names: Sequence[str]
) -> ConventionReport:
    """Try all four readings of rigid matrices on matched features.

    Args:
        matches: of the N views.
        matrices: their poses, read in each way in turn.
        names: of the readings, in the order of :data:`HYPOTHESES`.
    """
    scores = []
    for (axes, direction), name in zip(HYPOTHESES, names, strict=True):
        poses = [read_as(matrix, axes, direction) for matrix in matrices]
        shares, errors = [], []
        for pair in matches.pairs:
            one, two = matches.features[pair.first], matches.features[pair.second]
            angles, in_front = epipolar_errors(
                (poses[pair.first], one.directions[pair.in_first]),
                (poses[pair.second], two.directions[pair.in_second]),
            )
            pixels = angles * one.pixels_per_radian
            limit = max(1.0, _MEET_SHARE * one.searched_side)
            shares.append(float(((pixels * one.shrink < limit) & in_front).mean()))
            errors.append(pixels)
        known = np.concatenate(errors) if errors else np.zeros(0)
        known = known[np.isfinite(known)]
        median = float(np.median(known)) if len(known) else float("nan")
        scores.append(Score(axes, direction, name, float(np.mean(shares)) if shares else 0.0, median))
    scores.sort(key=lambda score: -score.share)
    winner, reason = _judge(scores, matches)
    return ConventionReport(tuple(scores), len(matches.pairs), matches.num_matches, winner, reason)


def _judge(scores: list[Score], matches: Matches) -> tuple[tuple[Axes, Direction] | None, str]:
    """Name the winner, if there is a clear one, and say why."""
    best, second = scores[:2]
    if matches.num_matches < _FEWEST_MATCHES:
        return None, (
            f"not enough matches to tell: {matches.num_matches} between neighbouring photos "
            f"(few views, little texture or little overlap)"
        )
    if best.share == 0.0 and all(np.isnan(score.median_error) for score in scores):
        return None, "all cameras stand in one place, so any convention fits"
    if best.share < _CLEAR_SHARE:
        return None, (
            f"no convention fits: at best {100 * best.share:.0f} % of matched rays meet "
            f"(poses of other photos, wrong intrinsics, or coarse poses)"
        )
    if best.share - second.share < _CLEAR_LEAD:
        return None, (
            f"{best.name} ({100 * best.share:.0f} %) and {second.name} ({100 * second.share:.0f} %) fit "
            "alike: the cameras turn too little to tell"
        )
    return (best.axes, best.direction), (
        f"{100 * best.share:.0f} % of {matches.num_matches} matched rays meet, "
        f"next {100 * second.share:.0f} %"
    )


def check_conventions(scene: Scene, matches: Matches | None = None) -> ConventionReport:
    """Test whether a loaded capture's poses fit its photographs, or would if they were read otherwise.

    Args:
        scene: the capture.
        matches: of its photographs, where they are known already.

    Returns:
        A report whose winner is ``("opencv", "c2w")`` if the poses are right as they are. Another winner says
        what the loader should have assumed differently: ``"opengl"`` means the other kind of axes than it
        did, ``"w2c"`` the inverse.
    """
    poses = world_poses(scene)
    if matches is None:
        photographs = Photographs.of_scene(scene)
        matches = match_photographs(photographs, poses[:, :, :3], spread(len(poses), NUM_ANCHORS))
    names = (
        "as loaded",
        "with camera axes flipped (OpenGL/OpenCV)",
        "inverted (w2c/c2w)",
        "inverted and flipped",
    )
    return try_hypotheses(matches, poses, names)


def world_poses(scene: Scene) -> Float64[np.ndarray, "N 3 4"]:
    """The poses in the world's frame, in which the capture's files wrote them.

    Inverting is meaningful there alone: the turn from world to scene would end up among the camera's axes.
    """
    matrix = scene.world_from_scene.numpy()
    scale = np.cbrt(np.linalg.det(matrix[:3, :3]))
    c2w = scene.cameras.c2w.double().numpy()
    rotations = (matrix[:3, :3] / scale) @ c2w[:, :, :3]
    centers = c2w[:, :, 3] @ matrix[:3, :3].T + matrix[:3, 3]
    return np.concatenate([rotations, centers[:, :, None]], axis=2)


def check_matrices(
    matrices: Float64[np.ndarray, "N 4 4"],
    intrinsics: Float64[np.ndarray, "N 3 3"],
    lenses: Sequence[Lens | None],
    image_paths: Sequence[Path],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> ConventionReport:
    """Test all four readings of pose matrices before a loader knows which is right.

    Args:
        matrices: poses as the file has them; one common scale of the axes is taken out.
        intrinsics: K for pixels of a picture of ``sizes`` (centres at +0.5).
        lenses: one per view, ``None`` for a pinhole; empty if there are none.
        image_paths: one file per view.
        sizes: (width, height) that the intrinsics are for; ``None``: those of the files.

    Raises:
        DataError: a matrix is no pose, or a picture is missing or unreadable.
    """
    if not len(matrices) == len(intrinsics) == len(image_paths) or len(lenses) not in (0, len(matrices)):
        raise ValueError("there must be one matrix, K, lens and picture per view")
    poses = np.stack(
        [
            checked_pose(matrix, path.parent, f"pose of {path.name}")
            for matrix, path in zip(matrices, image_paths, strict=True)
        ]
    )
    if sizes is None:
        sizes = [_file_size(path) for path in image_paths]
    photographs = Photographs.of_files(image_paths, intrinsics, list(lenses) or [None] * len(matrices), sizes)
    matches = match_photographs(photographs, poses[:, :, :3], spread(len(poses), NUM_ANCHORS))
    names = [
        f"{ {'opencv': 'OpenCV', 'opengl': 'OpenGL'}[axes] } {direction}" for axes, direction in HYPOTHESES
    ]
    return try_hypotheses(matches, poses, names)


def _file_size(path: Path) -> tuple[int, int]:
    with open_picture(path) as picture:
        return picture.size


def require_convention(report: ConventionReport, where: object) -> tuple[Axes, Direction]:
    """Give the convention that won, for ``dataset.convention=auto``.

    Raises:
        DataError: none wins clearly; the line holds the scores.
    """
    if report.winner is not None:
        LOG.info("poses are %s: %s", report.scores[0].name, report.reason)
        return report.winner
    LOG.warning("%s", report.table())
    scores = ", ".join(
        f"{score.name} {100 * score.share:.0f} % ({score.median_error:.1f} px)" for score in report.scores
    )
    raise DataError(
        where,
        f"the convention of the poses cannot be found; {report.reason}; rays that meet: {scores}",
        "set dataset.convention by hand",
    )
