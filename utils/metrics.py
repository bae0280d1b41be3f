"""How good is it: image metrics against held-out photographs, geometry metrics against a known surface.

Images are ``(H, W, 3)`` in 0..1; a mask counts where it is above 0.5, and a mean over nothing is NaN.
Distances between surfaces are point-to-triangle, unsquared, in the units of the meshes. The protocol of the
DTU tables is in ``utils/dtu_evaluation.py``.
"""

import importlib.util
import os
from functools import lru_cache
from pathlib import Path
from typing import no_type_check

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64
from numba import njit
from scipy.spatial import cKDTree
from torch import Tensor

from utils.errors import DataError
from utils.mesh import face_areas_and_normals, read_mesh, sample_surface
from utils.types import TriangleMesh

Floats = npt.NDArray[np.float64]
NUM_CANDIDATES = 8
"""Triangles tried for each point: those of its nearest anchors."""
MAX_ANCHORS = 1_500_000
"""Centroids and samples in a search tree; more gain nothing at the densities that are compared."""


def psnr(
    rgb: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Float[Tensor, "H W"] | None = None
) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1, over the pixels where ``mask`` > 0.5 (or all).

    Equal images give infinity, an empty mask NaN. A constant error of 0.1 gives 20 dB.
    """
    error = ((rgb - target) ** 2).mean(dim=-1)
    if mask is not None:
        error = error[mask > 0.5]
    return float(-10.0 * torch.log10(error.double().mean()))


def ssim(
    rgb: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Float[Tensor, "H W"] | None = None
) -> float:
    """Structural similarity, at most 1 (equal images).

    Mean of :func:`ssim_map` over the pixels whose window of 11 x 11 lies in the image and, with a mask, which
    it holds. Windows at the mask's border see beyond it.

    Raises:
        ValueError: an image is smaller than the window.
    """
    if min(rgb.shape[:2]) < 11:
        raise ValueError(f"SSIM needs images of 11 x 11 pixels or more, not {tuple(rgb.shape[:2])}")
    per_pixel = ssim_map(rgb[None], target[None])[0]
    if mask is not None:
        per_pixel = per_pixel[mask[5:-5, 5:-5] > 0.5]
    return float(per_pixel.mean())


def ssim_map(
    rgb: Float[Tensor, "B H W 3"], target: Float[Tensor, "B H W 3"], window: int = 11
) -> Float64[Tensor, "B h w"]:
    """Structural similarity of each window that lies in the images, at most 1 (equal); differentiable.

    Gaussian window with sigma 1.5, K = (0.01, 0.03), data range 1, mean over channels. It is computed in
    double precision: variances are small differences of squares, and a GPU's convolutions of single precision
    round to ten bits.

    Args:
        rgb: images, 0..1.
        target: what they are compared with.
        window: pixels along its side, odd and at most H and W; h = H - window + 1, w likewise.

    Source: Wang et al., "Image quality assessment", TIP 2004, equation 13, with 11 x 11 pixels.
    """
    b, height, width, _ = rgb.shape
    x, y = (i.double().permute(0, 3, 1, 2).reshape(3 * b, 1, height, width) for i in (rgb, target))
    ticks = torch.arange(window, dtype=torch.float64, device=x.device) - window // 2
    weights = torch.exp(-(ticks**2) / (2 * 1.5**2))
    weights = weights / weights.sum()

    def blurred(image: Tensor) -> Tensor:
        rows = torch.nn.functional.conv2d(image, weights.view(1, 1, window, 1))
        return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, window))

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.view(b, 3, *similarity.shape[2:]).mean(dim=1)


def lpips_missing() -> str | None:
    """``None`` where LPIPS can be measured without a download, else what is missing."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed (pip install lpips)"
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(checkpoints.glob("alexnet-owt-*.pth")):
        return f"torchvision's AlexNet weights are not in {checkpoints}"
    return None


def lpips_or_none(
    rgb: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Float[Tensor, "H W"] | None = None
) -> tuple[float | None, str]:
    """LPIPS (Zhang et al. 2018, AlexNet) where it can be had without a download.

    With a mask ``rgb`` is composited over ``target`` outside of it, so that only differences inside count and
    no edge is made. The mean is over the whole image: a small mask gives a small distance.

    Returns:
        The distance (0 = equal) and an empty string; or ``None`` and the reason: see :func:`lpips_missing`,
        or the images are smaller than 64 pixels, of which AlexNet's strides leave nothing.
    """
    reason = lpips_missing()
    if reason is None and min(rgb.shape[:2]) < 64:
        reason = "images below 64 pixels are too small for LPIPS"
    if reason is not None:
        return None, reason
    if mask is not None:
        rgb = torch.where(mask[..., None] > 0.5, rgb, target)
    with torch.no_grad():
        return float(lpips_distances(rgb.cpu()[None], target.cpu()[None])), ""


def lpips_distances(rgb: Float[Tensor, "B H W 3"], target: Float[Tensor, "B H W 3"]) -> Float[Tensor, " B"]:
    """LPIPS of each image, 0 = equal; differentiable in the images, while the network is frozen.

    Args:
        rgb: images, 0..1, of 31 pixels or more along each side, of which AlexNet's strides leave one.
        target: what they are compared with.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018.
    """
    x, y = (2.0 * images.float().permute(0, 3, 1, 2) - 1.0 for images in (rgb, target))
    return _lpips_network(x.device)(x, y).flatten()


@lru_cache(maxsize=2)
def _lpips_network(device: torch.device) -> torch.nn.Module:
    import lpips

    # Its layers are filled at random before their weights are loaded, which must not move a run's draws.
    with torch.random.fork_rng(devices=[]):
        network: torch.nn.Module = lpips.LPIPS(net="alex", verbose=False)
    return network.to(device).eval().requires_grad_(False)


def depth_errors(
    depth: Float[Tensor, "H W"], target: Float[Tensor, "H W"], mask: Float[Tensor, "H W"] | None = None
) -> dict[str, float]:
    """Errors of a depth map against the true one, both along the optical axis and in the same units.

    Pixels count where the truth is positive and finite, and inside the mask. The scale is not fitted.

    Returns:
        ``abs_rel``, the mean of ``|depth - target| / target``; ``rmse``, in units of the depth; and
        ``delta_1.25``, the share (0..1) with ``max(depth / target, target / depth) < 1.25``, which a depth of
        zero is not in. Source: Eigen et al., "Depth map prediction from a single image", NIPS 2014.
    """
    counts = (target > 0) & torch.isfinite(target)
    if mask is not None:
        counts &= mask > 0.5
    d, t = depth[counts].double(), target[counts].double()
    is_close = (d < 1.25 * t) & (t < 1.25 * d)
    return {
        "abs_rel": float(((d - t).abs() / t).mean()),
        "rmse": float(((d - t) ** 2).mean().sqrt()),
        "delta_1.25": float(is_close.double().mean()),
    }


def normal_errors(
    normal: Float[Tensor, "H W 3"], target: Float[Tensor, "H W 3"], mask: Float[Tensor, "H W"] | None = None
) -> dict[str, float]:
    """Angles between rendered and true normals, of any length, in the same frame.

    Pixels count where the truth is not zero, and inside the mask. A rendered normal of zero, which has no
    direction, counts as 90 degrees off.

    Returns:
        ``mean_degrees`` and ``median_degrees``, 0..180, and ``share_below_11.25``, 0..1. Source: Fouhey et
        al., "Data-driven 3D primitives for single image understanding", ICCV 2013.
    """
    counts = torch.linalg.vector_norm(target, dim=-1) > 0
    if mask is not None:
        counts &= mask > 0.5
    n, t = normal[counts].double(), target[counts].double()
    # Unlike the arc cosine this needs no unit lengths, and small angles keep their digits.
    angle = torch.atan2(torch.linalg.vector_norm(torch.linalg.cross(n, t), dim=-1), (n * t).sum(dim=-1))
    degrees = torch.where((n == 0).all(dim=-1), 90.0, torch.rad2deg(angle)).cpu().numpy()
    has_pixels = len(degrees) > 0
    return {
        "mean_degrees": float(degrees.mean()) if has_pixels else float("nan"),
        "median_degrees": float(np.median(degrees)) if has_pixels else float("nan"),
        "share_below_11.25": float((degrees < 11.25).mean()) if has_pixels else float("nan"),
    }


def chamfer_distance(
    mesh_a: TriangleMesh,
    mesh_b: TriangleMesh,
    num_samples: int = 200_000,
    seed: int = 0,
    thresholds: tuple[float, ...] = (),
) -> dict[str, float]:
    """Distances between the surfaces ``a`` (reconstruction) and ``b`` (truth), both ways.

    Each surface is sampled uniformly by area and the distance of each sample to the other surface's triangles
    is taken; a point cloud (no faces) is sampled at its points and met at its points. The triangle is sought
    among those of the nearest 8 anchors (centroids and samples), so a distance can be overestimated, by far
    less than the anchors' spacing.

    Args:
        mesh_a: the reconstruction.
        mesh_b: the truth.
        num_samples: points on each surface.
        seed: of the samples.
        thresholds: distances at which to report precision, recall and F-score.

    Returns:
        ``accuracy`` (mean a to b), ``completeness`` (mean b to a), ``chamfer`` (mean of the two),
        ``hausdorff_95`` (the larger of the two 95th percentiles); per threshold T, all in 0..1,
        ``precision@T`` (the share of a within T of b), ``recall@T`` (of b within T of a) and ``fscore@T``,
        their harmonic mean (Knapitsch et al., "Tanks and Temples", TOG 2017); and, when both have faces,
        ``normal_consistency``: the mean absolute cosine between normals at matched points, in 0..1.

    Raises:
        ValueError: a mesh with faces has no area, or there are no vertices at all.
    """
    points_a, faces_a = _surface_points(mesh_a, num_samples, seed)
    points_b, faces_b = _surface_points(mesh_b, num_samples, seed + 1)
    to_b, hit_b = _distances(points_a, mesh_b, points_b, faces_b)
    to_a, hit_a = _distances(points_b, mesh_a, points_a, faces_a)
    scores = {
        "accuracy": float(to_b.mean()),
        "completeness": float(to_a.mean()),
        "chamfer": float(0.5 * (to_b.mean() + to_a.mean())),
        "hausdorff_95": float(max(np.percentile(to_b, 95), np.percentile(to_a, 95))),
    }
    for threshold in thresholds:
        precision, recall = float((to_b <= threshold).mean()), float((to_a <= threshold).mean())
        scores[f"precision@{threshold:g}"], scores[f"recall@{threshold:g}"] = precision, recall
        scores[f"fscore@{threshold:g}"] = 2 * precision * recall / max(precision + recall, 1e-12)
    if len(mesh_a.faces) and len(mesh_b.faces):
        normals_a, normals_b = face_areas_and_normals(mesh_a)[1], face_areas_and_normals(mesh_b)[1]
        forth = np.abs((normals_a[faces_a] * normals_b[hit_b]).sum(axis=1))
        back = np.abs((normals_b[faces_b] * normals_a[hit_a]).sum(axis=1))
        scores["normal_consistency"] = float(0.5 * (forth.mean() + back.mean()))
    return scores


def evaluate_meshes(
    mesh_path: str | Path, gt_path: str | Path, num_samples: int = 200_000, seed: int = 0
) -> dict[str, object]:
    """Compare a mesh file with the truth (a mesh or a point cloud, in the same units), ready for JSON.

    Returns:
        Everything :func:`chamfer_distance` measures, with precision, recall and F-score at 0.5 %, 1 % and 2 %
        of the radius of the truth's bounding sphere (about the centre of its box), that ``gt_radius``, and
        each distance again as ``*_relative`` to it.

    Raises:
        DataError: a file is missing, unreadable or holds nothing to compare.
    """
    mesh, truth = read_mesh(mesh_path), read_mesh(gt_path)
    if len(mesh.faces) == 0:
        raise DataError(mesh_path, "has no faces", "give the mesh first and the points as --gt")
    centre = 0.5 * (truth.vertices.min(axis=0) + truth.vertices.max(axis=0))
    radius = float(np.linalg.norm(truth.vertices - centre, axis=1).max())
    try:
        scores = compare_surfaces(mesh, truth, radius, num_samples, seed)
    except ValueError as error:
        raise DataError(f"{mesh_path}, {gt_path}", str(error), "give surfaces with an extent") from error
    return {"mesh": str(mesh_path), "gt": str(gt_path), "gt_radius": radius, **scores}


def compare_surfaces(
    mesh: TriangleMesh, truth: TriangleMesh, radius: float, num_samples: int = 200_000, seed: int = 0
) -> dict[str, float | None]:
    """Everything :func:`chamfer_distance` measures, and how it relates to the size of the whole.

    Args:
        mesh: the reconstruction.
        truth: in the same units.
        radius: the length that 100 % stands for, in these units.
        num_samples: points on each surface.
        seed: of the samples.

    Returns:
        The distances; precision, recall and F-score at 0.5 %, 1 % and 2 % of the radius (``fscore@0.5%``);
        and each distance again as ``*_relative``, a share of the radius (``None`` if that is 0).

    Raises:
        ValueError: as :func:`chamfer_distance`.
    """
    shares = {"0.5%": 0.005, "1%": 0.01, "2%": 0.02}
    thresholds = tuple(share * radius for share in shares.values())
    scores = chamfer_distance(mesh, truth, num_samples, seed, thresholds)
    report: dict[str, float | None] = {name: value for name, value in scores.items() if "@" not in name}
    for share, threshold in zip(shares, thresholds, strict=True):
        for name in ("precision", "recall", "fscore"):
            report[f"{name}@{share}"] = scores[f"{name}@{threshold:g}"]
    for name in ("accuracy", "completeness", "chamfer", "hausdorff_95"):
        report[f"{name}_relative"] = scores[name] / radius if radius > 0 else None
    return report


def _surface_points(mesh: TriangleMesh, num_samples: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Samples and their faces; of a point cloud (at most ``num_samples`` of) its points and no faces."""
    if len(mesh.faces):
        return sample_surface(mesh, num_samples, seed)
    if len(mesh.vertices) == 0:
        raise ValueError("nothing can be compared with an empty mesh")
    chosen = np.random.default_rng(seed).permutation(len(mesh.vertices))[:num_samples]
    return mesh.vertices[chosen], np.empty(0, np.int64)


def _distances(
    points: Floats, mesh: TriangleMesh, anchors: Floats, anchor_faces: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Distance of each point to the mesh, and the face it was measured to.

    ``anchors`` are samples on the mesh, which find large triangles; centroids are added, which find small
    ones.
    """
    workers = min(os.cpu_count() or 1, 8)
    if len(mesh.faces) == 0:
        tree = cKDTree(mesh.vertices, balanced_tree=False, compact_nodes=False)
        return tree.query(points, workers=workers)[0], np.empty(0, np.int64)
    step = -(-len(mesh.faces) // max(MAX_ANCHORS - len(anchors), 1))
    chosen = np.arange(0, len(mesh.faces), step)
    centroids = mesh.vertices[mesh.faces[chosen]].mean(axis=1)
    tree = cKDTree(np.concatenate([anchors, centroids]), balanced_tree=False, compact_nodes=False)
    of_anchor = np.concatenate([anchor_faces, chosen])
    nearest = tree.query(points, k=min(NUM_CANDIDATES, tree.n), workers=workers)[1].reshape(len(points), -1)
    return _closest_triangles(points, mesh.vertices, mesh.faces, of_anchor[nearest])


@no_type_check
@njit(cache=True)
def _closest_triangles(points, vertices, faces, candidates):
    """For each point the distance to the closest of its candidate faces (P, K), and that face.

    The closest point lies in the face, where the barycentric weights of the projection are all positive, or
    on one of the three sides; trying all is shorter than telling the seven regions apart.
    """
    distances, hits = np.empty(len(points)), np.empty(len(points), np.int64)
    for p in range(len(points)):
        best, hit = np.inf, np.int64(-1)
        for f in candidates[p]:
            a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
            u0, u1, u2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
            v0, v1, v2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
            w0, w1, w2 = points[p, 0] - a[0], points[p, 1] - a[1], points[p, 2] - a[2]
            uu, uv, vv = u0 * u0 + u1 * u1 + u2 * u2, u0 * v0 + u1 * v1 + u2 * v2, v0 * v0 + v1 * v1 + v2 * v2
            uw, vw, ww = u0 * w0 + u1 * w1 + u2 * w2, v0 * w0 + v1 * w1 + v2 * w2, w0 * w0 + w1 * w1 + w2 * w2
            # |w - s u - t v|^2 in terms of these products, least over the allowed (s, t).
            det = uu * vv - uv * uv
            s, t = vv * uw - uv * vw, uu * vw - uv * uw
            if det > 0 and s >= 0 and t >= 0 and s + t <= det:
                s, t = s / det, t / det
                squared = ww - s * uw - t * vw
            else:
                s = min(max(uw / uu, 0.0), 1.0) if uu > 0 else 0.0
                squared = ww - 2 * s * uw + s * s * uu
                t = min(max(vw / vv, 0.0), 1.0) if vv > 0 else 0.0
                squared = min(squared, ww - 2 * t * vw + t * t * vv)
                # The side from b to c: w - u against v - u.
                dd, dw = uu - 2 * uv + vv, vw - uw - uv + uu
                r = min(max(dw / dd, 0.0), 1.0) if dd > 0 else 0.0
                squared = min(squared, ww - 2 * uw + uu - 2 * r * dw + r * r * dd)
            if squared < best:
                best, hit = squared, f
        distances[p], hits[p] = np.sqrt(max(best, 0.0)), hit
    return distances, hits
