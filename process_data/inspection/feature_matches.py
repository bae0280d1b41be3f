"""Features that several photographs share, as pairs of directions: what poses can be tested against.

SIFT features (Lowe 2004, compared as RootSIFT, Arandjelović and Zisserman 2012) are matched both ways with
the ratio test, then thinned by RANSAC on the fundamental matrix (Hartley and Zisserman, Multiple View
Geometry, 2nd edition, section 11.6). None of this looks at the poses, except that views are paired by the
angle between their axes, which is the same however poses are written: inverting them or flipping the camera's
axes leaves ``trace(R_i^T R_j)`` as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8

from process_data.cameras import RayGenerator
from utils.images import blend, read_rgba
from utils.lens import lens_rays
from utils.types import Lens, Scene

LARGEST_SIDE = 800
"""Pictures are scaled down to this before features are searched."""
_MOST_FEATURES = 2500
_RATIO = 0.8
"""A match counts if the second-best candidate is at least 1 / this times as far away (Lowe's ratio test)."""
_BAND = (3.0, 28.0)
"""Angles in degrees between views that share features and yet differ enough to triangulate."""
_BEST_ANGLE = 9.0
_FEWEST_INLIERS = 20
"""A pair with fewer consistent matches is taken for one that shares nothing."""


@dataclass(frozen=True)
class Photographs:
    """Pictures and the directions in which their pixels look: a capture without its poses."""

    size: Int64[np.ndarray, "N 2"]
    """(width, height) of the pixels that ``directions`` takes."""
    picture: Callable[[int], UInt8[np.ndarray, "_ _ 3"]]
    """Gives a view's picture, at any size."""
    directions: Callable[[int, Float64[np.ndarray, "P 2"]], Float64[np.ndarray, "P 3"]]
    """Gives unit directions in a view's camera axes (OpenCV) through continuous pixels."""

    @classmethod
    def of_scene(cls, scene: Scene) -> "Photographs":
        """The pictures of a loaded capture, seen through the rays that training casts."""
        generator = RayGenerator.from_cameras(scene.cameras)

        def directions(index: int, pixels: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 3"]:
            cameras = torch.full((len(pixels),), index, dtype=torch.int64)
            rays = generator.rays(cameras, torch.from_numpy(pixels).float())
            return (rays.directions @ scene.cameras.c2w[index, :, :3]).double().numpy()

        return cls(scene.cameras.size.numpy(), lambda index: scene.images.image(index).numpy(), directions)

    @classmethod
    def of_files(
        cls,
        paths: Sequence[Path],
        intrinsics: Float64[np.ndarray, "N 3 3"],
        lenses: Sequence[Lens | None],
        sizes: Sequence[tuple[int, int]],
    ) -> "Photographs":
        """Pictures on disk with what their cameras are known to be, for loaders.

        Args:
            paths: one file per view.
            intrinsics: K for pixels of a picture of ``sizes``.
            lenses: one per view, ``None`` for a pinhole.
            sizes: (width, height) that the intrinsics are for.

        Raises:
            DataError: on use, when a picture is missing or unreadable.
        """

        def picture(index: int) -> UInt8[np.ndarray, "_ _ 3"]:
            rgb, alpha = read_rgba(paths[index])
            return rgb if alpha is None else blend(rgb, alpha, 255)

        def directions(index: int, pixels: Float64[np.ndarray, "P 2"]) -> Float64[np.ndarray, "P 3"]:
            lens = lenses[index]
            if lens is not None:
                return lens_rays(lens, pixels * (np.array(lens.size) / np.array(sizes[index])))
            rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(intrinsics[index]).T
            return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True), np.float64)

        return cls(np.array(sizes, np.int64).reshape(-1, 2), picture, directions)


@dataclass(frozen=True)
class Features:
    """The SIFT features of one picture."""

    pixels: Float64[np.ndarray, "K 2"]
    """Continuous, in the view's own pixels."""
    directions: Float64[np.ndarray, "K 3"]
    """Unit, in the camera's axes."""
    descriptors: Float32[np.ndarray, "K 128"]
    pixels_per_radian: float
    """Of the view's own pixels, at the picture's centre."""
    shrink: float
    """Size of the picture that was searched over that of the view."""
    searched_side: int
    """Longer side of the picture that was searched, in its pixels."""


@dataclass(frozen=True)
class MatchedPair:
    """Features of two views that show the same point, as far as pictures can tell."""

    first: int
    second: int
    in_first: Int64[np.ndarray, " M"]
    """Rows of the first view's features."""
    in_second: Int64[np.ndarray, " M"]


@dataclass(frozen=True)
class Matches:
    """What the views of a capture share."""

    features: dict[int, Features]
    """By view, for those that were looked at."""
    pairs: tuple[MatchedPair, ...]

    @property
    def num_matches(self) -> int:
        """Matches in all pairs together."""
        return sum(len(pair.in_first) for pair in self.pairs)


def angles_between(rotations: Float64[np.ndarray, "N 3 3"]) -> Float64[np.ndarray, "N N"]:
    """Angles in degrees by which views are turned against each other."""
    flat = rotations.reshape(-1, 9)
    return np.degrees(np.arccos(np.clip((flat @ flat.T - 1.0) / 2.0, -1.0, 1.0)))


def match_photographs(
    photographs: Photographs, rotations: Float64[np.ndarray, "N 3 3"], anchors: Sequence[int]
) -> Matches:
    """Match each anchor with two views that look in a similar, not the same, direction.

    The two are chosen to lie on different sides of the anchor where possible. Where angles say nothing (views
    that are all parallel) or lead to views that share nothing, the next views in order are tried. At most
    four attempts are made per anchor.

    Args:
        photographs: N views.
        rotations: of their poses, in whatever convention.
        anchors: views to start from.
    """
    angles = angles_between(rotations)
    features: dict[int, Features] = {}
    pairs: dict[tuple[int, int], MatchedPair] = {}

    def features_of(index: int) -> Features:
        if index not in features:
            features[index] = find_features(photographs, index)
        return features[index]

    for anchor in anchors:
        found = 0
        for other in _partners(angles, anchor):
            if found == 2:
                break
            if (other, anchor) in pairs:
                continue
            pair = _match(anchor, other, features_of(anchor), features_of(other))
            if len(pair.in_first) >= _FEWEST_INLIERS:
                pairs[anchor, other] = pair
                found += 1
    return Matches(features, tuple(pairs.values()))


def _partners(angles: Float64[np.ndarray, "N N"], anchor: int) -> list[int]:
    """Views to match with ``anchor``, the most promising first."""
    in_band = np.flatnonzero((angles[anchor] >= _BAND[0]) & (angles[anchor] <= _BAND[1]))
    by_angle = sorted(in_band.tolist(), key=lambda view: abs(angles[anchor, view] - _BEST_ANGLE))
    partners = by_angle[:1]
    if len(by_angle) > 1:
        near = by_angle[1:8]
        # Two views on opposite sides of the anchor make a wide base for what the anchor is tested with.
        partners.append(max(near, key=lambda view: float(angles[partners[0], view])))
    number = len(angles)
    in_order = [(anchor + step) % number for step in (1, -1, 2, -2)]
    partners += [view for view in in_order if view != anchor and view not in partners]
    return list(dict.fromkeys(partners))[:4]


def find_features(photographs: Photographs, index: int) -> Features:
    """Find the SIFT features of one view."""
    picture = photographs.picture(index)
    width, height = photographs.size[index].tolist()
    scale = min(1.0, LARGEST_SIDE / max(picture.shape[:2]))
    if scale < 1.0:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    # The precise upscale removes the quarter of a pixel by which OpenCV's SIFT otherwise shifts features.
    sift = cv2.SIFT.create(nfeatures=_MOST_FEATURES, enable_precise_upscale=True)
    keypoints, found = sift.detectAndCompute(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), None)
    corners = np.array([keypoint.pt for keypoint in keypoints], np.float64).reshape(-1, 2)
    # OpenCV puts pixel centres at integers.
    pixels = (corners + 0.5) * np.array([width / picture.shape[1], height / picture.shape[0]])
    directions = photographs.directions(index, pixels)
    descriptors = np.zeros((0, 128), np.float32) if found is None else np.asarray(found, np.float32)
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
    seen = np.isfinite(directions).all(axis=1)
    middle = np.array([[width / 2 - 0.5, height / 2], [width / 2 + 0.5, height / 2]])
    step = np.linalg.norm(np.diff(photographs.directions(index, middle), axis=0))
    return Features(
        pixels[seen],
        directions[seen],
        descriptors[seen],
        float(1.0 / step),
        picture.shape[1] / width,
        max(picture.shape[:2]),
    )


def _match(first: int, second: int, of_first: Features, of_second: Features) -> MatchedPair:
    """Match by descriptor, then keep what one fundamental matrix explains."""
    nothing = np.zeros(0, np.int64)
    if min(len(of_first.pixels), len(of_second.pixels)) < _FEWEST_INLIERS:
        return MatchedPair(first, second, nothing, nothing)
    similarity = of_first.descriptors @ of_second.descriptors.T
    best = similarity.argmax(axis=1)
    rows = np.arange(len(best))
    two_best = np.partition(similarity, -2, axis=1)[:, -2:]
    # Descriptors have length 1, so that similarity s is a squared distance of 2 - 2 s.
    distinct = (1.0 - two_best[:, 1]) < _RATIO**2 * (1.0 - two_best[:, 0])
    mutual = similarity.argmax(axis=0)[best] == rows
    # Seen through a pinhole of the same focal length, distorted pictures have a fundamental matrix too.
    in_front = (of_first.directions[:, 2] > 0.2) & (of_second.directions[best, 2] > 0.2)
    kept = np.flatnonzero(distinct & mutual & in_front)
    if len(kept) < _FEWEST_INLIERS:
        return MatchedPair(first, second, nothing, nothing)
    _, inliers = cv2.findFundamentalMat(
        _flat(of_first, kept), _flat(of_second, best[kept]), cv2.FM_RANSAC, 1.5, 0.999
    )
    kept = nothing if inliers is None else kept[inliers[:, 0] > 0]
    return MatchedPair(first, second, kept.astype(np.int64), best[kept].astype(np.int64))


def _flat(features: Features, chosen: Int64[np.ndarray, " M"]) -> Float64[np.ndarray, "M 2"]:
    """Positions in the searched picture as a pinhole would show them, from its centre."""
    directions = features.directions[chosen]
    return directions[:, :2] / directions[:, 2:] * (features.pixels_per_radian * features.shrink)
