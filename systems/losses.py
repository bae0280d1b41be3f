"""Loss terms: pure functions from tensors to one unweighted scalar each.

An empty input gives a zero that belongs to the graph, so that a step without samples can be differentiated.
With ``keep`` the mean is over these rows alone, and what the others hold has no part in it.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Keep = Bool[Tensor, " rows"] | None
"""Rows that count; ``None``: all."""

MIN_RAYS = 8
"""Fewer rays of a view do not say how its depths are scaled and shifted."""


def _mean(values: Tensor, keep: Tensor | None) -> Tensor:
    # A mean over nothing is NaN; the sum of nothing is a zero that still belongs to the graph.
    if keep is None:
        return values.sum() / max(values.numel(), 1)
    per_row = values.flatten(1).mean(dim=1) if values.dim() > 1 else values
    return torch.where(keep, per_row, 0.0).sum() / keep.sum().clamp(min=1)


def _cross_entropy(opacity: Tensor, target: Tensor) -> Tensor:
    # PyTorch's own raises on NaN (on a GPU it ends the process), and the trainer could not skip the step. The
    # opacity is kept within [1e-3, 1 - 1e-3], where the logarithms and their slopes are bounded.
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return -(target * clamped.log() + (1.0 - target) * (1.0 - clamped).log())


def rgb_l1(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean absolute difference (NeuS)."""
    return _mean((rgb - target).abs(), keep)


def rgb_l2(rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean squared difference (NeRF)."""
    return _mean((rgb - target).square(), keep)


def rgb_charbonnier(
    rgb: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None, padding: float = 1e-3
) -> Float[Tensor, ""]:
    """Mean of sqrt(r^2 + padding^2): quadratic near zero, absolute beyond (mip-NeRF 360, section 4)."""
    return _mean(((rgb - target).square() + padding**2).sqrt(), keep)


def eikonal(gradient: Float[Tensor, "S 3"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean of (|d sdf / dx| - 1)^2 (IGR, Gropp et al. 2020, equation 2)."""
    # The square root's slope at zero is infinite; 1e-12 keeps a vanishing gradient's derivative finite.
    return _mean(((gradient.square().sum(dim=1) + 1e-12).sqrt() - 1.0).square(), keep)


def mask_bce(opacity: Float[Tensor, " R"], mask: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """Binary cross entropy between opacity, kept within [1e-3, 1 - 1e-3], and mask (NeuS)."""
    return _mean(_cross_entropy(opacity, mask), keep)


def opacity_entropy(opacity: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """Binary entropy of the opacity: zero when every ray is empty or opaque (instant-nsr-pl's ``opaque``)."""
    return _mean(_cross_entropy(opacity, opacity.clamp(1e-3, 1 - 1e-3)), keep)


def sparsity(sdf: Float[Tensor, " S"], scale: float, keep: Keep = None) -> Float[Tensor, ""]:
    """Mean of exp(-scale |sdf|): samples are pushed off the zero level unless the pictures hold them there.

    Args:
        sdf: at the samples.
        scale: 1 / width of the penalised shell, 1 / scene units.

    Source: SparseNeuS (Long et al. 2022), equation 11.
    """
    return _mean((-scale * sdf.abs()).exp(), keep)


def mask_iou(opacity: Float[Tensor, " R"], mask: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """1 - intersection / union of opacity o and mask m: 1 - sum(o m) / sum(o + m - o m), in 0..1.

    Unlike a mean over rays it does not fade where the object fills few pixels.

    Source: Rahman and Wang 2016, equation 3 (the soft Jaccard index).
    """
    overlap = opacity * mask
    union = opacity + mask - overlap
    if keep is not None:
        overlap, union = torch.where(keep, overlap, 0.0), torch.where(keep, union, 0.0)
    # As one fraction, a batch without foreground that shows none costs nothing.
    return (union - overlap).sum() / union.sum().clamp(min=1e-6)


def free_space(sdf: Float[Tensor, " P"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean of max(-sdf, 0), scene units, at points that are known to be empty.

    Where a grid is pruned, no ray says what the surface does in the cells that are closed. Without this the
    zero level can leave the cells that masks allow: seen from inside, a field that falls along a ray is as
    opaque as a surface, whatever its level.
    """
    return _mean(torch.nn.functional.relu(-sdf), keep)


def sparse_points(sdf: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """Mean absolute signed distance at points that structure from motion found on the surface.

    Source: Geo-NeuS (Fu et al. 2022), equation 7.
    """
    return _mean(sdf.abs(), None)


def depth_l1(depth: Float[Tensor, " R"], target: Float[Tensor, " R"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean absolute difference of depths in scene units."""
    return _mean((depth - target).abs(), keep)


def depth_prior(
    depth: Float[Tensor, " R"],
    target: Float[Tensor, " R"],
    views: Int64[Tensor, " R"],
    keep: Keep = None,
) -> Float[Tensor, ""]:
    """Squared error of depths whose scale w and shift q are unknown in each view, by least squares.

    sum_r (w_v D_r + q_v - T_r)^2 over the rays r of all views v, over sum_r (T_r - mean_v T)^2: the share of
    the given depths' variance that the rendered ones do not explain, 0..1 whatever their unit. Views with
    fewer than 8 rays, or whose rendered or given depths are all the same, do not count.

    Args:
        depth: rendered, D.
        target: given, T, in any unit.
        views: the view of each ray.
        keep: rays that count.

    Source: MonoSDF (Yu et al. 2022), equations 11 and 12, there per image and not divided by the variance.
    """
    if keep is None:
        keep = torch.ones_like(depth, dtype=torch.bool)
    # Numbers of the views that occur: as many as rays at most, so that no host has to learn how many.
    ordered, order = views.sort()
    is_next = torch.cat([torch.zeros_like(ordered[:1]), (ordered.diff() != 0).long()])
    views = torch.empty_like(views).index_copy(0, order, is_next.cumsum(0))

    def per_view(values: Tensor) -> Tensor:
        return torch.zeros_like(depth).index_add(0, views, torch.where(keep, values, 0.0))

    count = per_view(torch.ones_like(depth))

    def centered(values: Tensor) -> Tensor:
        mean = per_view(values) / count.clamp(min=1.0)
        return torch.where(keep, values - mean.index_select(0, views), 0.0)

    rendered, given = centered(depth), centered(target)
    with torch.no_grad():
        # The best w and q make the error's derivative in them vanish: they are constants to its gradient.
        variance, spread = per_view(rendered.square()), per_view(given.square())
        # That little is what rounding leaves of depths that are all the same. NaN is not flat, and comes out.
        is_flat = variance <= 1e-10 * per_view(depth.square())
        is_flat |= spread <= 1e-10 * per_view(target.square())
        is_good = (count >= MIN_RAYS) & ~is_flat
        scale = torch.where(is_good, per_view(rendered * given) / torch.where(is_good, variance, 1.0), 0.0)
        counts = is_good.index_select(0, views)
        total = torch.where(is_good, spread, 0.0).sum()
    residual = torch.where(counts, scale.index_select(0, views) * rendered - given, 0.0)
    return residual.square().sum() / torch.where(total > 0, total, 1.0)


def normal_prior(
    normal: Float[Tensor, "R 3"], target: Float[Tensor, "R 3"], keep: Keep = None
) -> Float[Tensor, ""]:
    """Mean of |n - t|_1 + |1 - n . t| for unit normals.

    Source: MonoSDF (Yu et al. 2022), equation 13.
    """
    return _mean((normal - target).abs().sum(dim=1) + (1.0 - (normal * target).sum(dim=1)).abs(), keep)


def tangents(gradient: Float[Tensor, "S 3"], noise: Float[Tensor, "S 3"]) -> Float[Tensor, "S 3"]:
    """Unit vectors along the surface: the share of the noise that is perpendicular to the gradient."""
    normal = torch.nn.functional.normalize(gradient, dim=1)
    along = (noise * normal).sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(noise - along * normal, dim=1)


def curvature(
    gradient: Float[Tensor, "S 3"],
    shifted: Float[Tensor, "S 3"],
    tangent: Float[Tensor, "S 3"],
    step: float,
    keep: Keep = None,
) -> Float[Tensor, ""]:
    """Mean absolute normal curvature |t . H t|, from gradients at x and at x + step t: |(g' - g) . t| / step.

    One more evaluation of the field instead of six. Tangents of random directions see half of Neuralangelo's
    Laplacian where the surface curves alike in all of them (1 / r and 2 / r on a sphere of radius r), and all
    of a saddle's, of which the Laplacian sees nothing.

    Args:
        gradient: d sdf / d x at x, g.
        shifted: the same at x + step t, g'.
        tangent: t, unit, see :func:`tangents`.
        step: scene units; about a cell of the finest open grid level, within which gradients hardly turn.
        keep: rows that count.

    Source: Neuralangelo (Li et al. 2023), equation 10, for the penalty; PermutoSDF (Rosu and Behnke 2023) for
        the step along a random tangent.
    """
    return _mean(((shifted - gradient) * tangent).sum(dim=1).abs() / step, keep)


def laplacian(values: Float[Tensor, " S"], keep: Keep = None) -> Float[Tensor, ""]:
    """Mean absolute Laplacian of the signed distance, which is the sum of the principal curvatures.

    Source: Neuralangelo (Li et al. 2023), equation 10.
    """
    return _mean(values.abs(), keep)


def axis_neighbours(positions: Float[Tensor, "S 3"], step: float) -> Float[Tensor, "S 6 3"]:
    """The points at a distance of ``step`` before and behind each position along the three axes."""
    offsets = step * torch.eye(3, dtype=positions.dtype, device=positions.device)
    return positions[:, None] + torch.cat([offsets, -offsets])


def second_differences(
    sdf: Float[Tensor, " S"], neighbours: Float[Tensor, "S 6"], step: float
) -> Float[Tensor, " S"]:
    """Laplacian by second differences, (sum of the six - 6 f) / step^2, in 1 / scene units.

    2 / r at the distance r from a sphere's middle; 0 in a plane and on minimal surfaces.

    Args:
        sdf: f at the samples.
        neighbours: at the six points of :func:`axis_neighbours`.
        step: their distance, scene units. Rounding leaves an error of about 1e-7 / step^2.
    """
    return (neighbours.sum(dim=1) - 6.0 * sdf) / step**2
