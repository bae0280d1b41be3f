"""Why photos could not be placed, in terms of the capture, and what to photograph next.

Pure functions of what COLMAP's database says: features per photo, verified matches per pair, and the kind of
two-view geometry that explains them.

Source: the two-view configurations are those of Schoenberger and Frahm, Structure-from-Motion Revisited,
CVPR 2016, section 4.1.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from process_data.prepare.colmap import Pair

FEW_FEATURES = 400
"""A photo of a textured scene has thousands of SIFT features; with fewer than this, little can be matched."""
FEW_INLIERS = 30
"""COLMAP places a photo by at least 30 of its points."""
BLURRY = 30.0
"""Variance of the Laplacian (see ``frames.sharpness``) below which a photo is blurry or plain."""


@dataclass(frozen=True)
class Diagnosis:
    """One reason, and what helps."""

    what: str
    remedy: str


def diagnose(num_features: list[int], pairs: list[Pair], sharpness: list[float]) -> Diagnosis:
    """Say why a capture could not be placed: the first cause that would have stopped it alone.

    Args:
        num_features: features of each photo, N.
        pairs: verified pairs.
        sharpness: of each photo, N.

    Returns:
        The reason with its numbers, and what to photograph next.
    """
    median_features = float(np.median(num_features))
    num_photos = len(num_features)
    if median_features < FEW_FEATURES:
        counted = f"only {median_features:.0f} features in the median photo"
        if float(np.median(sharpness)) < BLURRY:
            return Diagnosis(
                f"the photos are blurry or plain ({counted})",
                "photograph again in more light with the focus on the object, and hold still",
            )
        return Diagnosis(
            f"too few features ({counted})",
            "bring texture into the picture: put newspaper under the object, use a patterned background, "
            "avoid shiny, transparent and plain surfaces; with masks or turntable=true come closer",
        )
    strong = [pair for pair in pairs if pair.num_inliers >= FEW_INLIERS]
    groups = connected_groups(num_photos, [pair.photos for pair in strong])
    if len(groups[0]) == 1:
        return Diagnosis(
            f"no two photos share enough matches ({len(pairs)} pairs with a few, none with {FEW_INLIERS})",
            "take photos closer together, so that neighbours show at least two thirds of the same",
        )
    kinds = Counter(pair.configuration for pair in strong)
    rotating = kinds["PANORAMIC"]
    if rotating > 0.5 * len(strong):
        return Diagnosis(
            f"no baseline: {rotating} of {len(strong)} pairs of photos fit a camera that turned on the spot",
            "walk around the object, with a step to the side between photos",
        )
    if kinds["PLANAR"] > 0.8 * len(strong):
        return Diagnosis(
            f"the scene is flat ({kinds['PLANAR']} of {len(strong)} pairs of photos see one plane)",
            "photograph something with depth, or add objects in front and behind",
        )
    if kinds["WATERMARK"] > 0.3 * len(strong):
        return Diagnosis(
            f"{kinds['WATERMARK']} of {len(strong)} pairs match at the border only (a logo or a date stamp?)",
            "crop the stamp away; for a turning object in front of a static room add turntable=true",
        )
    if len(groups[0]) < 0.7 * num_photos:
        sizes = [len(group) for group in groups if len(group) > 1]
        alone = sum(len(group) == 1 for group in groups)
        return Diagnosis(
            f"the photos fall apart into groups without overlap ({', '.join(map(str, sizes))} photos, and "
            f"{alone} that match nothing)",
            "take photos between these groups, so that each view overlaps the next",
        )
    median_inliers = float(np.median([pair.num_inliers for pair in strong]))
    return Diagnosis(
        f"too few matches between photos (median of {median_inliers:.0f} in {len(strong)} matched pairs)",
        "take more photos closer together with a fixed focus and exposure, and see that nothing moves "
        "between them",
    )


def connected_groups(num_photos: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of photos that pairs hold together, largest first: ``3, [(0, 2)] -> [[0, 2], [1]]``."""
    neighbours: dict[int, set[int]] = defaultdict(set)
    for first, second in pairs:
        neighbours[first].add(second)
        neighbours[second].add(first)
    groups, unseen = [], set(range(num_photos))
    while unseen:
        group, waiting = [], [min(unseen)]
        unseen.remove(waiting[0])
        while waiting:
            photo = waiting.pop()
            group.append(photo)
            new = neighbours[photo] & unseen
            unseen -= new
            waiting.extend(new)
        groups.append(sorted(group))
    return sorted(groups, key=lambda group: (-len(group), group))
