"""Loss terms on how the weights of rays are spread: what trains proposals, and what draws weights together.

Both are means over rays. With ``keep`` the mean is over these rays alone; what the others hold, NaN included,
reaches neither the value nor a gradient. No gradient goes to the edges of any histogram.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from systems.losses import Keep
from utils.types import RayHistogram

_EPS = torch.finfo(torch.float32).eps
"""Of weights that divide (multinerf's)."""


def _kept(histogram: RayHistogram, keep: Keep) -> tuple[Float[Tensor, "R N_plus_1"], Float[Tensor, "R N"]]:
    """Edges and weights, zeros on rays that do not count: a NaN times zero would still be one."""
    edges, weights = histogram.edges.detach(), histogram.weights
    if keep is None:
        return edges, weights
    return torch.where(keep[:, None], edges, 0.0), torch.where(keep[:, None], weights, 0.0)


def _mean(per_ray: Float[Tensor, " R"], keep: Keep) -> Float[Tensor, ""]:
    count: int | Tensor = max(len(per_ray), 1) if keep is None else keep.sum().clamp(min=1)
    return per_ray.sum() / count


def interlevel(outer: RayHistogram, inner: RayHistogram, keep: Keep = None) -> Float[Tensor, ""]:
    """Mean over rays of sum_i max(0, w_i - bound_i)^2 / w_i: a proposal must not miss any of the light.

    bound_i is the sum of the proposal's weights over its intervals that overlap the i-th of the level below.
    A proposal may claim more than there is: what it must not do is claim less. Only the proposal learns.

        inner     |__|###|#|_____|    w            bound of the first # is a + b, of the second b:
        outer     |____a_|__b____|    ŵ            they share interval b

    multinerf and nerfacto also divide by the number of inner intervals; this is the paper's sum.

    Args:
        outer: of the proposal; its weights get the gradient.
        inner: of the level that was sampled from it; taken as it is.
        keep: rays that count; ``None``: all.

    Source: mip-NeRF 360 (Barron et al. 2022), equations 12 and 13.
    """
    outer_edges, outer_weights = _kept(outer, keep)
    edges, weights = _kept(inner, keep)
    weights = weights.detach()
    gathered = torch.cat([torch.zeros_like(outer_weights[:, :1]), outer_weights.cumsum(dim=1)], dim=1)
    # Intervals that merely touch do not overlap: one that ends where another begins has no share in it.
    outer_edges = outer_edges.contiguous()
    first = torch.searchsorted(outer_edges, edges[:, :-1].contiguous(), right=True) - 1
    end = torch.searchsorted(outer_edges, edges[:, 1:].contiguous())
    last_edge = outer_edges.shape[1] - 1
    first = first.clamp(0, last_edge)
    bound = gathered.gather(1, torch.maximum(end.clamp(0, last_edge), first)) - gathered.gather(1, first)
    missed = (weights - bound).clamp(min=0.0)
    return _mean((missed.square() / (weights + _EPS)).sum(dim=1), keep)


def distortion(histogram: RayHistogram, keep: Keep = None) -> Float[Tensor, ""]:
    """Mean over rays of sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 (s_{i+1} - s_i) / 3, with middles m.

    The mean distance between two points of the ray's light, both drawn by the weights: it draws the light
    together, and with it floaters to the surface, or away. One interval of length d and weight 1: d / 3.

    The double sum in O(N): between the middles m_k and m_{k+1} lies the way of every pair of which one is in
    front and the other behind, 2 sum_k (m_{k+1} - m_k) (sum of w up to k) (sum of w beyond k). All terms are
    positive, and nothing cancels.

    Args:
        histogram: of the rendered level, in normalised distance; its weights get the gradient.
        keep: rays that count; ``None``: all.

    Source: mip-NeRF 360 (Barron et al. 2022), equation 15.
    """
    edges, weights = _kept(histogram, keep)
    middles = 0.5 * (edges[:, 1:] + edges[:, :-1])
    before = weights.cumsum(dim=1)[:, :-1]
    behind = weights.flip(1).cumsum(dim=1).flip(1)[:, 1:]
    between = 2.0 * (middles.diff(dim=1) * before * behind).sum(dim=1)
    within = (weights.square() * edges.diff(dim=1)).sum(dim=1) / 3.0
    return _mean(between + within, keep)
