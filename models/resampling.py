"""Resampling: new samples along a ray, where a histogram of weights says that its light ends.

A histogram's N intervals tile a stretch of each ray; its weights, divided by the intervals' lengths, are a
density that is constant in each. The inverse of the density's cumulative sum turns even shares of the light
into distances:

    share u                         x   drawn shares, even but for the jitter
     1 |            ______.---      o   their distances: sample centres
       x           /      .         |   edges: midpoints between centres
       x          /       .
       x        .'        .         A share that falls onto a flat part lies in no interval without weight.
       x___.---' .        .
     0 '---o--|--oo|o-|---o----- t

Everything has fixed shapes and nothing waits for a GPU. No gradient passes: proposals learn from their own
loss, not from where they put the samples (mip-NeRF 360, section 3.2), and so does NeRF's coarse network.
Weights that are not numbers, and rays whose weights are all zero, give evenly spread samples.

Source: NeRF (Mildenhall et al. 2020), section 5.2; mip-NeRF 360 (Barron et al. 2022), section 3.2 and the
supplement's sections on sampling, dilation and annealing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_NOTHING = 1e-12
"""A ray whose mass is less has none that could say where its light ends."""


@torch.no_grad()
def anneal(
    edges: Float[Tensor, "R N_plus_1"],
    weights: Float[Tensor, "R N"],
    exponent: float | Float[Tensor, ""],
) -> Float[Tensor, "R N"]:
    """Weights to the power of ``exponent``: with 0 all intervals are equally likely, 1 changes nothing.

    An interval of no length has no weight at any exponent. For the exponent over the course of training see
    :func:`systems.schedules.proposal_exponent`.

    Source: mip-NeRF 360, section "Annealing" of the supplement.
    """
    weights = weights.clamp(min=0.0)
    return torch.where(edges.diff(dim=1) > 0, weights**exponent, 0.0)


def _cumulative(
    edges: Float[Tensor, "R N_plus_1"], weights: Float[Tensor, "R N"], padding: float
) -> Float[Tensor, "R N_plus_1"]:
    """Share of a ray's mass in front of each edge, from 0 to exactly 1."""
    lengths = edges.diff(dim=1)
    mass = weights.nan_to_num(nan=0.0, posinf=0.0).clamp(min=0.0) + padding
    mass = torch.where(lengths > 0, mass, 0.0)
    mass = torch.where(mass.sum(dim=1, keepdim=True) > _NOTHING, mass, lengths)
    shares = mass.cumsum(dim=1)
    # A ray of no length has no mass of any kind.
    shares = shares / shares[:, -1:].clamp(min=1e-30)
    ends = torch.zeros_like(shares[:, :1])
    return torch.cat([ends, shares[:, :-1], ends + 1.0], dim=1)


@torch.no_grad()
def invert_cumulative(
    edges: Float[Tensor, "R N_plus_1"],
    weights: Float[Tensor, "R N"],
    shares: Float[Tensor, "R K"],
    padding: float = 0.0,
) -> Float[Tensor, "R K"]:
    """Where along each ray given shares of its weight have passed.

    Args:
        edges: not falling along a ray, in any unit.
        weights: not negative; their sum does not matter.
        shares: 0..1.
        padding: added to every weight, so that no interval is out of the question.

    Returns:
        Distances within the edges, as far along as the shares are. Weights 1, 3 between the edges 0, 1, 2: a
        share of 0.5 has passed at 1 + 1/3.

    Source: NeRF, section 5.2.
    """
    cumulative = _cumulative(edges, weights, padding)
    # The last edge with at most this share in front of it: an interval without weight is never found.
    found = torch.searchsorted(cumulative, shares.contiguous(), right=True) - 1
    found = found.clamp(0, weights.shape[1] - 1)
    start, end = cumulative.gather(1, found), cumulative.gather(1, found + 1)
    first, last = edges.gather(1, found), edges.gather(1, found + 1)
    part = ((shares - start) / (end - start).clamp(min=1e-12)).clamp(0.0, 1.0)
    return torch.lerp(first, last, part)


def _even_shares(
    weights: Float[Tensor, "R N"], count: int, generator: torch.Generator | None, jitters: int
) -> Float[Tensor, "R K"]:
    """(k + jitter) / count for k < count: one jitter a ray, or one for each; without a generator 1/2."""
    steps = torch.arange(count, device=weights.device, dtype=weights.dtype).expand(len(weights), count)
    if generator is None:
        return (steps + 0.5) / count
    jitter = torch.rand(
        len(weights), jitters, generator=generator, device=weights.device, dtype=weights.dtype
    )
    return (steps + jitter) / count


@torch.no_grad()
def resample_intervals(
    edges: Float[Tensor, "R N_plus_1"],
    weights: Float[Tensor, "R N"],
    count: int,
    generator: torch.Generator | None,
    *,
    padding: float = 0.0,
    domain: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "R count_plus_1"]:
    """Edges of ``count`` intervals that each hold about the same share of the light.

    The intervals' centres are drawn, all of a ray shifted by one jitter, and the edges put midway between
    them. The first edge is as far in front of the first centre as the next one is behind it, unless the
    domain ends there; likewise the last.

    Args:
        edges: in normalised distance s, not falling along a ray.
        weights: not negative; their sum does not matter.
        count: at least 2.
        generator: on the weights' device; ``None`` draws the middles of the shares.
        padding: added to every weight.
        domain: no edge leaves it.

    Raises:
        ValueError: ``count`` is below 2.

    Source: mip-NeRF 360, supplement ("sampling"), as its authors' multinerf does it.
    """
    if count < 2:
        raise ValueError(f"resample_intervals: count must be at least 2, got {count}")
    centers = invert_cumulative(edges, weights, _even_shares(weights, count, generator, 1), padding)
    middles = 0.5 * (centers[:, 1:] + centers[:, :-1])
    first = (2.0 * centers[:, :1] - middles[:, :1]).clamp(min=domain[0])
    last = (2.0 * centers[:, -1:] - middles[:, -1:]).clamp(max=domain[1])
    return torch.cat([first, middles, last], dim=1)


@torch.no_grad()
def sample_points(
    edges: Float[Tensor, "R N_plus_1"],
    weights: Float[Tensor, "R N"],
    count: int,
    generator: torch.Generator | None,
    *,
    padding: float = 1e-5,
) -> Float[Tensor, "R count"]:
    """Points distributed like the weights, as NeRF's fine network is given them, in order along each ray.

    Args:
        edges: in any unit, not falling along a ray.
        weights: not negative; their sum does not matter.
        count: of points per ray.
        generator: on the weights' device: one point in each of ``count`` equal shares, at random within it;
            ``None``: in its middle.
        padding: added to every weight (NeRF's 1e-5).

    Source: NeRF, section 5.2; its code draws the shares independently of each other, which leaves gaps.
    """
    return invert_cumulative(edges, weights, _even_shares(weights, count, generator, count), padding)


@torch.no_grad()
def dilate(
    edges: Float[Tensor, "R N_plus_1"],
    weights: Float[Tensor, "R N"],
    amount: float,
    domain: tuple[float, float] = (0.0, 1.0),
) -> tuple[Float[Tensor, "R M_plus_1"], Float[Tensor, "R M"]]:
    """Widen a histogram's peaks: at each s the largest density within ``amount`` of it.

    A proposal that is a little beside the surface at one ray's pixel would otherwise miss it at its
    neighbour's.

    Args:
        edges: in normalised distance s, not falling along a ray.
        weights: not negative.
        amount: in units of s, not negative.
        domain: no edge leaves it.

    Returns:
        Edges and weights of a histogram with M = 3 N intervals. The weights sum to 1, or to 0 where all
        were 0. Some intervals have no length.

    Source: mip-NeRF 360, supplement ("dilation"), with 0.5 / (product of the counts so far) + 0.0025.
    """
    lengths = edges.diff(dim=1)
    density = torch.where(lengths > 0, weights / lengths.clamp(min=1e-12), 0.0)
    starts, ends = (edges[:, :-1] - amount).contiguous(), (edges[:, 1:] + amount).contiguous()
    dilated = torch.cat([edges, starts, ends], dim=1).sort(dim=1).values.clamp(*domain)
    # Widened intervals begin and end in the order of the old ones: those that hold s come one after another.
    at = dilated[:, :-1].contiguous()
    first = torch.searchsorted(ends, at, right=True)
    last = torch.searchsorted(starts, at, right=True) - 1
    mass = _range_maximum(density, first, last) * dilated.diff(dim=1)
    return dilated, mass / mass.sum(dim=1, keepdim=True).clamp(min=_NOTHING)


def _range_maximum(values: Float[Tensor, "R N"], first: Tensor, last: Tensor) -> Float[Tensor, "R K"]:
    """Largest of values[:, first..last], both included; 0 where last < first. Values are not negative.

    Two overlapping powers of two cover any range: level k of the table holds the maxima over 2^k values.
    """
    num = values.shape[1]
    levels = [values]
    while 2 ** len(levels) <= num:
        before, reach = levels[-1], 2 ** (len(levels) - 1)
        shifted = torch.cat([before[:, reach:], torch.zeros_like(before[:, :reach])], dim=1)
        levels.append(torch.maximum(before, shifted))
    table = torch.stack(levels, dim=1).flatten(1)
    width = (last - first + 1).clamp(1, num)
    # frexp writes the width as m 2^e with m in [0.5, 1): exact where a logarithm may round up.
    level = torch.frexp(width.float()).exponent.long() - 1
    row = level * num
    left = table.gather(1, row + first.clamp(0, num - 1))
    right = table.gather(1, row + (last + 1 - 2**level).clamp(0, num - 1))
    return torch.where(last < first, 0.0, torch.maximum(left, right))
