"""What a look at a loaded capture finds: points that its photographs agree on, errors in pixels, warnings.

Poses are judged by views that took no part: a point is triangulated from two views and reprojected into a
third, in which the same feature was found. Wrong poses, lenses or intrinsics show as distances between the
two.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, UInt8

from process_data.geometry import up_axis
from process_data.inspection.conventions import (
    NUM_ANCHORS,
    ConventionReport,
    check_conventions,
    closest_depths,
    epipolar_errors,
    spread,
    world_poses,
)
from process_data.inspection.feature_matches import MatchedPair, Matches, Photographs, match_photographs
from utils.lens import project
from utils.types import Scene

_SMALLEST_PARALLAX = np.radians(1.0)
_LARGEST_GAP = 3.0
"""Pixels of epipolar error up to which a matched pair makes a point."""


@dataclass(frozen=True)
class Residuals:
    """Features of one view and where other views say that they should be."""

    observed: Float64[np.ndarray, "M 2"]
    """Continuous pixels of the view."""
    reprojected: Float64[np.ndarray, "M 2"]
    """Likewise; NaN where the point lies behind the camera."""

    @property
    def errors(self) -> Float64[np.ndarray, " M"]:
        """Distances in pixels; infinite behind the camera."""
        return np.nan_to_num(np.linalg.norm(self.observed - self.reprojected, axis=1), nan=np.inf)


@dataclass(frozen=True)
class Inspection:
    """A capture and what was found."""

    scene: Scene
    points: Float64[np.ndarray, "P 3"]
    """In scene space: the capture's own, or triangulated from matched features."""
    point_colors: UInt8[np.ndarray, "P 3"]
    shown: tuple[int, ...]
    """Views to draw, spread over the capture."""
    residuals: dict[int, Residuals]
    """By view, where two partners were found."""
    report: ConventionReport
    up: Float64[np.ndarray, " 3"]
    """The cameras' mean upward direction in scene space, or +z where they have none."""
    facts: tuple[str, ...]
    """One line each."""
    warnings: tuple[str, ...]
    """One line each."""


def inspect(scene: Scene) -> Inspection:
    """Match photographs, triangulate, reproject, and put the findings into words."""
    shown = spread(len(scene.cameras), NUM_ANCHORS)
    matches = match_photographs(Photographs.of_scene(scene), world_poses(scene)[:, :, :3], shown)
    report = check_conventions(scene, matches)
    residuals = {}
    for view in shown:
        partners = [pair for pair in matches.pairs if pair.first == view]
        if len(partners) == 2:
            residuals[view] = _reproject(scene, matches, partners[0], partners[1])
    if scene.points is not None:
        points, colors = scene.points.positions, scene.points.colors
    else:
        points, colors = _triangulate(scene, matches)
    facts, warnings = _cameras_in_words(scene)
    facts += _points_in_words(scene, points)
    measured, doubts = _errors_in_words(report, residuals)
    return Inspection(
        scene,
        points,
        colors,
        tuple(shown),
        residuals,
        report,
        _upward(scene),
        (*facts, *measured),
        (*doubts, *warnings),
    )


# ----------------------------------------------------------------------------------------------------------
# geometry


def _pose(scene: Scene, view: int) -> Float64[np.ndarray, "3 4"]:
    return scene.cameras.c2w[view].double().numpy()


def _meet(
    scene: Scene,
    first: tuple[int, Float64[np.ndarray, "M 3"]],
    second: tuple[int, Float64[np.ndarray, "M 3"]],
) -> tuple[Float64[np.ndarray, "M 3"], Bool[np.ndarray, " M"]]:
    """Middle of the shortest line between the rays of two views, and whether it is well determined."""
    poses = [_pose(scene, view) for view, _ in (first, second)]
    rays = [directions @ pose[:, :3].T for pose, (_, directions) in zip(poses, (first, second), strict=True)]
    depths = closest_depths(rays[0], rays[1], poses[1][:, 3] - poses[0][:, 3])
    ends = [pose[:, 3] + depth[:, None] * ray for pose, depth, ray in zip(poses, depths, rays, strict=True)]
    parallax = np.arccos(np.clip((rays[0] * rays[1]).sum(axis=1), -1.0, 1.0))
    return (ends[0] + ends[1]) / 2, parallax > _SMALLEST_PARALLAX


def _reproject(scene: Scene, matches: Matches, one: MatchedPair, two: MatchedPair) -> Residuals:
    """Triangulate from the two partners of a view what it shows as well, and project it into the view."""
    in_view, first, second = np.intersect1d(one.in_first, two.in_first, return_indices=True)
    positions, is_sound = _meet(
        scene,
        (one.second, matches.features[one.second].directions[one.in_second[first]]),
        (two.second, matches.features[two.second].directions[two.in_second[second]]),
    )
    pixels, depth, _ = project(scene.cameras, one.first, torch.from_numpy(positions).float())
    reprojected = np.where(depth[:, None].numpy() > 0, pixels.double().numpy(), np.nan)
    observed = matches.features[one.first].pixels[in_view]
    return Residuals(observed[is_sound], reprojected[is_sound])


def _triangulate(
    scene: Scene, matches: Matches
) -> tuple[Float64[np.ndarray, "P 3"], UInt8[np.ndarray, "P 3"]]:
    """Points and colours from all matched pairs whose rays meet."""
    points, colors = [np.zeros((0, 3))], [np.zeros((0, 3), np.uint8)]
    for pair in matches.pairs:
        of_first, of_second = matches.features[pair.first], matches.features[pair.second]
        first, second = of_first.directions[pair.in_first], of_second.directions[pair.in_second]
        angles, in_front = epipolar_errors(
            (_pose(scene, pair.first), first), (_pose(scene, pair.second), second)
        )
        positions, is_sound = _meet(scene, (pair.first, first), (pair.second, second))
        gap = angles * of_first.pixels_per_radian * of_first.shrink
        good = is_sound & in_front & (gap < _LARGEST_GAP)
        at = of_first.pixels[pair.in_first[good]].astype(np.int64)
        points.append(positions[good])
        colors.append(scene.images.image(pair.first).numpy()[at[:, 1], at[:, 0]])
    return np.concatenate(points), np.concatenate(colors)


def _upward(scene: Scene) -> Float64[np.ndarray, " 3"]:
    """The cameras' up axis; the scene's +z where the two roughly agree."""
    up, axis = up_axis(scene.cameras.c2w.double().numpy()), np.array([0.0, 0.0, 1.0])
    # An estimate from views along an arc leans; within 40 degrees it says the same as the axis that loaders
    # turn upwards.
    return axis if up @ axis > np.cos(np.radians(40.0)) else up


def frustum_size(scene: Scene) -> float:
    """Length of the drawn frusta in scene units: small enough that neighbours stay apart."""
    centers = scene.cameras.c2w[:, :, 3].double().numpy()
    reach = float(np.median(np.linalg.norm(centers, axis=1)))
    if len(centers) < 2:
        return 0.15 * reach + 1e-3
    gaps = np.linalg.norm(centers[:, None] - centers[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    return float(np.clip(0.6 * np.median(gaps.min(axis=1)), 0.05 * reach, 0.2 * reach)) + 1e-3


def frustum(scene: Scene, view: int, length: float) -> Float64[np.ndarray, "5 3"]:
    """Camera centre and the corners (top left, top right, bottom right, bottom left) of its picture plane.

    The shape is that of the pinhole part; the diagonal is limited, lest a wide lens hide the rest.
    """
    c2w, k = scene.cameras.c2w[view].double().numpy(), scene.cameras.intrinsics[view].double().numpy()
    width, height = scene.cameras.size[view].tolist()
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
    local = corners @ np.linalg.inv(k).T
    local[:, :2] *= min(1.0, 1.2 / np.linalg.norm(local[:, :2], axis=1).max())
    return np.concatenate([c2w[:, 3:].T, c2w[:, 3] + length * local @ c2w[:, :3].T])


# ----------------------------------------------------------------------------------------------------------
# words


def _range(values: Float64[np.ndarray, " N"], form: str) -> str:
    """The one value, or the smallest and the largest."""
    low, high = format(float(values.min()), form), format(float(values.max()), form)
    return low if low == high else f"{low} to {high}"


def _cameras_in_words(scene: Scene) -> tuple[list[str], list[str]]:
    """Facts and warnings about cameras and the unit sphere."""
    cameras = scene.cameras
    number, held_out = len(cameras), len(scene.test_indices)
    size, k = cameras.size.numpy(), cameras.intrinsics.double().numpy()
    lenses = " ".join(sorted({lens.model for lens in cameras.lenses})) or "PINHOLE"
    matrix = scene.world_from_scene.numpy()
    radius, center = np.cbrt(np.linalg.det(matrix[:3, :3])), matrix[:3, 3]
    distances = np.linalg.norm(cameras.c2w[:, :, 3].double().numpy(), axis=1)
    blind = [view for view in range(number) if not _sees_sphere(scene, view)]
    facts = [
        f"{number} views: {len(scene.train_indices)} for training, {held_out} held out",
        f"pictures {_range(size[:, 0].astype(float), '.0f')} x {_range(size[:, 1].astype(float), '.0f')} px",
        f"focal length {_range(k[:, 0, 0], '.1f')} px, lens {lenses}",
        f"unit sphere: radius {radius:.4g} world units",
        f"its centre: ({', '.join(f'{x:.4g}' for x in center)}) in the world",
        f"cameras {_range(distances, '.2f')} radii from the centre",
        "masks: " + ("yes" if scene.masks is not None else "none loaded"),
    ]
    warnings = []
    inside = int((distances < 1).sum())
    if inside:
        warnings.append(
            f"{inside} of {number} cameras stand inside the sphere: right for rooms, not for objects"
        )
    if blind:
        warnings.append(
            f"{len(blind)} of {number} views do not show the middle of the sphere, "
            f"first {scene.image_names[blind[0]]}"
        )
    return facts, warnings


def _sees_sphere(scene: Scene, view: int) -> bool:
    """Whether a picture shows the sphere's centre or part of the half-sized sphere's outline."""
    corners = 0.5 * np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    return bool(project(scene.cameras, view, torch.from_numpy(corners).float())[2].any())


def _points_in_words(scene: Scene, points: Float64[np.ndarray, "P 3"]) -> list[str]:
    if len(points) == 0:
        return ["points: none in the capture, none triangulated"]
    inside = 100.0 * (np.linalg.norm(points, axis=1) < 1).mean()
    source = "of the capture" if scene.points is not None else "triangulated here"
    facts = [f"{len(points)} points {source}, {inside:.0f} % inside the sphere"]
    if scene.points is not None and np.isfinite(scene.points.errors).any():
        facts.append(
            f"their reprojection error by the file: median {np.nanmedian(scene.points.errors):.2f} px"
        )
    return facts


def _errors_in_words(
    report: ConventionReport, residuals: dict[int, Residuals]
) -> tuple[list[str], list[str]]:
    """Facts and warnings about how well poses fit photographs."""
    facts, warnings = [], []
    errors = np.concatenate([found.errors for found in residuals.values()] or [np.zeros(0)])
    if len(errors):
        median, known = float(np.median(errors)), f"{len(errors)} features in 3 views"
        where = f"median {median:.2f} px" if np.isfinite(median) else "points lie behind the cameras"
        facts.append(f"reprojection error: {where} ({known})")
    as_loaded = next(score for score in report.scores if (score.axes, score.direction) == ("opencv", "c2w"))
    if np.isfinite(as_loaded.median_error):
        facts.append(
            f"epipolar error: median {as_loaded.median_error:.2f} px "
            f"({report.num_matches} matches, {report.num_pairs} pairs)"
        )
    if report.fits:
        facts.append(f"poses fit the photos: {report.reason}")
    elif report.fits is None:
        warnings.append(f"cannot tell if the poses fit the photos: {report.reason}")
    else:
        warnings.append(
            f"POSES DO NOT FIT THE PHOTOS, but would {report.scores[0].name}: {report.reason}, "
            f"as loaded {100 * as_loaded.share:.0f} %"
        )
    return facts, warnings
