"""Packed samples, in buffers that fit or in buffers of a fixed capacity.

    ray 0     ray 1    ray 2 has four, which no longer fit: it is not served
    | s s s | s s    | . . .                      capacity 8, s sample, . padding (zeros)
    0       3        5                            offsets 0, 3, 5, 5

With a capacity every size is known beforehand, so that a GPU's host never waits for a count.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from utils.types import RaySamples


def serve(
    ends: Int64[Tensor, " R_plus_1"], capacity: int
) -> tuple[Int64[Tensor, " R_plus_1"], Bool[Tensor, " R"]]:
    """Give rows to rays in their order, until one does not fit; it and all later ones get none.

    Args:
        ends: offsets as they would be without a limit.
        capacity: rows that there are.

    Returns:
        The offsets, and which rays are served. For the ends 0, 3, 5, 9 and a capacity of 8 the offsets are
        0, 3, 5, 5, and the last ray is not served.
    """
    fits = ends <= capacity
    return torch.minimum(ends, torch.where(fits, ends, 0).amax()), fits[1:]


def pack(
    middles: Float[Tensor, " S"],
    ray_indices: Int64[Tensor, " S"],
    offsets: Int64[Tensor, " R_plus_1"],
    step: float,
    capacity: int | None,
) -> RaySamples:
    """Turn positions along rays into intervals of one step each, in buffers of a fixed capacity if asked."""
    samples = RaySamples(middles - 0.5 * step, middles + 0.5 * step, ray_indices, offsets)
    return samples if capacity is None else select(samples, torch.ones_like(middles).bool(), capacity)


def select(samples: RaySamples, keep: Bool[Tensor, " S"], capacity: int | None) -> RaySamples:
    """Move the samples that are kept behind one another.

    Args:
        samples: packed; may be padded. A ray that is not served among them stays so.
        keep: False for padding.
        capacity: rows of the result, or ``None`` for as many as are kept.
    """
    # Entry i: how many are kept before row i, which is where row i moves to.
    kept = torch.cat([samples.offsets[:1], keep.cumsum(0)])
    ends = kept[samples.offsets]
    if capacity is None:
        intervals = samples.t_starts[keep], samples.t_ends[keep]
        return RaySamples(*intervals, samples.ray_indices[keep], ends, samples.is_served)
    offsets, is_served = serve(ends, capacity)
    if samples.is_served is not None:
        is_served &= samples.is_served
    # What is not kept or does not fit goes to rows behind, which are cut off again: to many, lest on a GPU a
    # million writes queue for one.
    behind = capacity + torch.arange(len(keep), device=keep.device) % 1024
    targets = torch.where(keep & (kept[:-1] < offsets[-1]), kept[:-1], behind)

    def moved(column: Tensor) -> Tensor:
        return column.new_zeros(capacity + 1024).scatter_(0, targets, column)[:capacity]

    return RaySamples(
        moved(samples.t_starts), moved(samples.t_ends), moved(samples.ray_indices), offsets, is_served
    )
