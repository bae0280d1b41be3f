r"""Multi-view photometric consistency of the surface (Geo-NeuS, Fu et al. 2022, section 3.3).

Around the point where a ray meets the surface, the surface is taken for its tangent plane. A window of the
ray's photograph is carried by that plane into other views, and should look there as it does here::

      reference window          source view
      [ . . x . . ]           [ . / / / . ]         x_k = o + d_k * n.(x - o) / n.d_k     on the plane
            \                    /
             \   n              /                   u_k = project(x_k)
              \  |             /
        ---------x-------------- tangent plane      loss = 1 - NCC(I_r(k), I_s(u_k))

For pinholes u_k = H k with their homography H = K_s (R - t n^T / d) K_r^-1 (equation 13). The surface's point
and normal are differentiable in the field's parameters, so that the term moves and turns the surface.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from utils.photographs import Windows
from utils.types import Batch, Field, RenderOutput

NUM_BEST = 4
"""So many sources count, those in which a window looks most alike: in the others it is hidden (Geo-NeuS)."""
MIN_VARIANCE = 1e-5
"""Of the grey values (0..1) of a window: below, it is noise and rounding (COLMAP's kMinVar)."""
_STEEPEST = 0.2
"""Cosine between the normal and what looks at the surface: below, it is seen at too flat an angle."""
_NEWTON_STEPS = 2
_LONGEST_STEP = 0.05
"""Of Newton's steps, scene units."""
_TOLERANCE = 2e-3
"""Largest |sdf| after these, scene units; another step, the differentiable one, follows."""


def photo_consistency(render: RenderOutput, batch: Batch, windows: Windows, field: Field) -> Tensor:
    """Mean of 1 - NCC over the windows that have texture and are seen by others; 0..2.

    Args:
        render: of the batch's rays.
        batch: whose first rays the windows belong to.
        windows: around these rays' pixels.
        field: signed distance and gradient, differentiable in the parameters.
    """
    rays, some = batch.rays, slice(len(windows))
    origins, directions = rays.origins[some], rays.directions[some]
    points, normal, is_surface = surface_points(
        *(origins, directions, render.mean_depth[some].detach()),
        *(render.shows_surface(batch.mask)[some], field),
    )
    return window_loss(windows, origins, points, normal, is_surface)


def surface_points(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    depth: Float[Tensor, " R"],
    is_hit: Bool[Tensor, " R"],
    field: Field,
) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"], Bool[Tensor, " R"]]:
    """Where rays meet the surface, differentiable in the field.

    Newton's method along the ray finds x_0 without gradients. Then x = x_0 - d f(x_0) / (grad f . d), the
    quotient's denominator constant: to first order this is how the intersection moves when f changes (IDR,
    Yariv et al. 2020, equation 3).

    Args:
        origins: of the rays.
        directions: unit, d.
        depth: near the surface, distance along the ray.
        is_hit: rays that have a surface at all.
        field: signed distance f and gradient, differentiable in the parameters.

    Returns:
        Points x, unit normals, and where these can be relied on: Newton's method landed, and the surface is
        seen from outside and not at a grazing angle. Elsewhere they are finite, if the field is.
    """
    with torch.no_grad():
        for _ in range(_NEWTON_STEPS):
            sdf, gradient = field(torch.addcmul(origins, directions, depth[:, None]))
            slope = (gradient * directions).sum(dim=1).clamp(max=-0.1)
            depth = depth - (sdf / slope).clamp(-_LONGEST_STEP, _LONGEST_STEP)
        start = torch.addcmul(origins, directions, depth[:, None])
    sdf, gradient = field(start)
    normal = torch.nn.functional.normalize(gradient, dim=1, eps=1e-6)
    slope = (gradient.detach() * directions).sum(dim=1).clamp(max=-0.1)
    points = start - directions * (sdf / slope)[:, None]
    is_steep = (normal.detach() * directions).sum(dim=1) < -_STEEPEST
    return points, normal, is_hit & (sdf.detach().abs() < _TOLERANCE) & is_steep


def window_loss(
    windows: Windows,
    origins: Float[Tensor, "R 3"],
    points: Float[Tensor, "R 3"],
    normal: Float[Tensor, "R 3"],
    keep: Bool[Tensor, " R"],
) -> Float[Tensor, ""]:
    """Mean of 1 - NCC over the best four sources of each window, and over the windows.

    Args:
        windows: around the pixels of R rays.
        origins: of these rays.
        points: where they meet the surface.
        normal: of the surface there, unit, outwards.
        keep: rays that count.
    """
    photographs, views = windows.photographs, windows.sources.clamp(min=0)
    on_plane, is_facing = intersect_planes(origins, windows.directions, points, normal)
    pixels, is_shown = photographs.project(views, on_plane)
    towards = photographs.centers.index_select(0, views.flatten()).view(*views.shape, 3) - points[:, None]
    cosine = (torch.nn.functional.normalize(towards, dim=2) * normal[:, None]).sum(dim=2)
    is_seen = (windows.sources >= 0) & is_shown.all(dim=2) & (cosine.detach() > _STEEPEST)
    is_seen = is_seen & (keep & windows.is_whole & is_facing)[:, None]
    # Pixels outside have large slopes, and even times zero infinity is NaN.
    pixels = torch.where(is_seen[..., None, None], pixels, 0.5)
    correlation, is_textured = ncc(windows.grey, photographs.look_up(views, pixels))
    return mean_of_best(1.0 - correlation, is_seen & is_textured)


def intersect_planes(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R K 3"],
    points: Float[Tensor, "R 3"],
    normal: Float[Tensor, "R 3"],
) -> tuple[Float[Tensor, "R K 3"], Bool[Tensor, " R"]]:
    """Where K rays from each origin meet the plane through that row's point.

    Returns:
        Positions on the planes, and whether all K rays meet theirs from in front and not at a grazing angle;
        elsewhere positions are finite but arbitrary.
    """
    cosine = (directions * normal[:, None]).sum(dim=2)
    is_facing = cosine < -0.5 * _STEEPEST
    height = ((points - origins) * normal).sum(dim=1, keepdim=True)
    distance = height / torch.where(is_facing, cosine, -1.0)
    return origins[:, None] + distance[..., None] * directions, is_facing.all(dim=1)


def ncc(
    first: Float[Tensor, "R K"], second: Float[Tensor, "R M K"]
) -> tuple[Float[Tensor, "R M"], Bool[Tensor, "R M"]]:
    """Normalised cross-correlation of a window with each of M others, -1..1: cov(a, b) / sqrt(var(a) var(b)).

    Returns:
        The correlation, and whether both windows have texture; where not, it means nothing.

    Source: Geo-NeuS, equation 14.
    """
    first = (first - first.mean(dim=1, keepdim=True))[:, None]
    second = second - second.mean(dim=2, keepdim=True)
    variances = first.square().mean(dim=2), second.square().mean(dim=2)
    is_textured = (variances[0] > MIN_VARIANCE) & (variances[1] > MIN_VARIANCE)
    product = torch.where(is_textured, variances[0] * variances[1], 1.0)
    return (first * second).mean(dim=2) / product.sqrt(), is_textured


def mean_of_best(
    values: Float[Tensor, "R M"], is_valid: Bool[Tensor, "R M"], num_best: int = NUM_BEST
) -> Float[Tensor, ""]:
    """Mean over rows of the mean of each row's lowest valid values; rows without any do not count."""
    count = min(num_best, values.shape[1])
    lowest, chosen = torch.where(is_valid, values, torch.inf).topk(count, dim=1, largest=False)
    is_valid = is_valid.gather(1, chosen)
    number = is_valid.sum(dim=1)
    per_row = torch.where(is_valid, lowest, 0.0).sum(dim=1) / number.clamp(min=1)
    return per_row.sum() / (number > 0).sum().clamp(min=1)
