"""Importance sampling: a fixed number of samples per ray, where a coarse march says that its light ends.

NeuS (Wang et al. 2021, section 3.3 and supplementary) after NeRF's hierarchical sampling (Mildenhall et al.
2020, section 5.2). The opacity that a ray has gathered up to distance t, and a little for every sample that
was marched, is its cumulative mass C(t); intervals that hold equal parts of it tile the ray:

    C
    N/N |                      _.-----|   flat: hidden           c   coarse samples
        |                    /                                   |   edges of N = 4 intervals, C = k / N
        |                  /                                     [ ] what is left of an interval at the ends
        |_______________./
         c   c   c   c   c   c   c   c
        |.............[  ]|[]|[]|[    ].|
                         surface

* Within a coarse sample C follows the density itself, with the signed distance as a line along the ray: a
  density far thinner than a coarse step is found by its zero, not only to the step that holds it.
* An interval never crosses a gap of skipped empty cells, nor from coarse samples with weight to such
  without: it is cut to the stretch that holds the middle of its mass. What it loses by a gap had less than
  half of its mass, at most 1 / (2 N) of the ray's; in the dark nothing is lost. One that went on to where the
  ray leaves the object would have its middle, and all it is judged by, among slopes that give no opacity.
* The first and the last interval hold the tails and would reach far, where one sample in the middle says
  nothing about the whole. None is longer than two coarse steps, or six of the density's widths
  1 / sharpness where those are longer: a tail keeps 1/400 of its light beyond six.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from models.compositing import render_weights
from models.marching.packing import serve
from models.opacity import DENSITIES, DensityName
from utils.types import RaySamples

_FLOOR = 1e-5
"""Mass of a coarse sample without any weight (NeuS's): what spreads the samples of rays without a surface."""

_HALVINGS = 10
"""An interval's edge is found to within a coarse step / 2^11."""

_LONGEST_STEPS, _LONGEST_WIDTHS = 2.0, 6.0


@torch.no_grad()
def place_by_importance(
    samples: RaySamples,
    sdf: Float[Tensor, " S"],
    sharpness: Float[Tensor, ""],
    jitter: Float[Tensor, " R"],
    count: int,
    density: DensityName,
    backend: str,
    capacity: int | None = None,
) -> RaySamples:
    """Replace the samples of a coarse march by ``count`` intervals per ray of equal shares of its light.

    Weights come from the signed distances alone, as in :func:`models.marching.drop_hidden`: the slope along
    the ray is the mean over the neighbours without a gap, clamped to [-1, 0].

    Args:
        samples: as marched. Rays without any stay without.
        sdf: at the samples' middles.
        sharpness: inv_s of NeuS's logistic density, 1 / beta of VolSDF's.
        jitter: per ray in [0, 1): shifts the edges by that part of an interval's mass; 0.5 leaves them at
            the shares k / count. The first and the last interval make up for it, so that all is tiled.
        count: intervals per ray, >= 1.
        density: whose opacities, see ``models/opacity.py``.
        backend: of the compositing.
        capacity: as for :func:`models.marching.march`; a ray that ``samples`` do not serve stays without.
            ``None`` packs without a limit, and waits for the device once.

    Returns:
        Disjoint intervals, sorted along each ray. With weights 0, 0.5, 0.5, 0 of four samples and a count of
        two, they meet where the second sample ends.

    Source: NeuS, supplementary B; NeRF, equation 5.
    """
    if len(samples) == 0:
        return samples
    coarse = _CoarseDensity(samples, sdf, sharpness, density, backend)
    has_samples = samples.offsets.diff() > 0
    ends = torch.cat([samples.offsets[:1], (count * has_samples).cumsum(0)])
    if capacity is None:
        offsets, is_served, num_rows = ends, samples.is_served, int(ends[-1])
    else:
        offsets, is_served = serve(ends, capacity)
        num_rows = capacity
        if samples.is_served is not None:
            is_served &= samples.is_served

    rows = torch.arange(num_rows, device=sdf.device)
    is_row = rows < offsets[-1]
    ray_indices = torch.where(is_row, torch.searchsorted(offsets[1:], rows, right=True), 0)
    k = rows - offsets[ray_indices]
    shift = jitter.double()[ray_indices] - 0.5
    is_first, is_last = k == 0, k == count - 1
    share_before = torch.where(is_first, 0.0, k + shift) / count
    share_after = torch.where(is_last, count, k + 1 + shift) / count

    first, last = samples.offsets[ray_indices], samples.offsets[ray_indices + 1] - 1
    # In padding there is nothing in front of the first sample, or behind the last.
    first, last = first.clamp(max=len(samples) - 1), last.clamp(min=0)
    lower = torch.where(is_first, samples.t_starts[first], coarse.distance(ray_indices, share_before))
    upper = torch.where(is_last, samples.t_ends[last], lower.roll(-1))

    middle = coarse.find(ray_indices, 0.5 * (share_before + share_after))[0]
    lower = torch.maximum(lower, samples.t_starts[coarse.stretch_first[middle]])
    upper = torch.minimum(upper, samples.t_ends[coarse.stretch_last[middle]])
    # A sharpness that is not a number leaves the steps to decide: distances stay numbers.
    longest = torch.fmax(_LONGEST_STEPS * coarse.lengths[middle], _LONGEST_WIDTHS / sharpness)
    start = (samples.t_middle[middle] - 0.5 * longest).minimum(upper - longest).maximum(lower)
    end = torch.minimum(start + longest, upper).maximum(start)
    return RaySamples(
        torch.where(is_row, start, 0.0), torch.where(is_row, end, 0.0), ray_indices, offsets, is_served
    )


class _CoarseDensity:
    """Where along the rays of a coarse march their mass lies.

    Masses are summed over all rays at once, in double precision: in single precision the rays before would
    take the digits of those behind.
    """

    def __init__(
        self,
        samples: RaySamples,
        sdf: Float[Tensor, " S"],
        sharpness: Float[Tensor, ""],
        density: DensityName,
        backend: str,
    ) -> None:
        self._samples, self._sdf, self._sharpness = samples, sdf, sharpness
        self._alpha = DENSITIES[density].alpha
        self.lengths = samples.t_ends - samples.t_starts
        follows = self._follows()
        self._slope = _slopes(sdf, samples.t_middle, follows)
        indices = torch.arange(len(samples), device=sdf.device)
        alpha = self._alpha(sdf, self._slope, self.lengths, sharpness, 1.0)
        # A bad number stays on its ray.
        weights = render_weights(alpha, samples.offsets, backend).double().nan_to_num(0.0)
        is_lit = weights > _FLOOR
        follows &= is_lit == is_lit.roll(1)
        self.stretch_first: Int64[Tensor, " S"] = torch.where(follows, 0, indices).cummax(0).values
        """First sample of the stretch that a sample lies in: no gap, and all with or all without weight."""
        ends = torch.where(follows.roll(-1), len(samples) - 1, indices)
        self.stretch_last: Int64[Tensor, " S"] = ends.flip(0).cummin(0).values.flip(0)
        """Last sample of it."""
        mass = torch.where(indices < samples.count, weights + _FLOOR, 0.0)
        self._mass_before: Float64[Tensor, " S_plus_1"] = torch.cat([mass.new_zeros(1), mass.cumsum(0)])

    def _follows(self) -> Bool[Tensor, " S"]:
        """Whether a sample begins where the one in the row before it ends."""
        samples = self._samples
        same_ray = samples.ray_indices == samples.ray_indices.roll(1)
        is_close = samples.t_middle - samples.t_middle.roll(1) < 1.5 * self.lengths
        indices = torch.arange(len(samples), device=same_ray.device)
        return same_ray & is_close & (indices > 0) & (indices < samples.count)

    def find(
        self, ray_indices: Int64[Tensor, " B"], share: Float64[Tensor, " B"]
    ) -> tuple[Int64[Tensor, " B"], Float64[Tensor, " B"], Float64[Tensor, " B"]]:
        """The coarse sample in which a ray has gathered a share (0..1) of its mass.

        Returns:
            The sample, the mass that its part in front must have, and the light that it begins with.
        """
        first, end = self._samples.offsets[ray_indices], self._samples.offsets[ray_indices + 1]
        before, after = self._mass_before[first], self._mass_before[end]
        target = before + share * (after - before)
        found = torch.searchsorted(self._mass_before[1:], target, right=True)
        found = found.minimum(end - 1).maximum(first).clamp(0, len(self._sdf) - 1)
        reached = self._mass_before[found]
        light = 1.0 - (reached - before - _FLOOR * (found - first))
        return found, target - reached, light.clamp(min=0.0)

    def distance(self, ray_indices: Int64[Tensor, " B"], share: Float64[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Where along a ray it has gathered a share (0..1) of its mass."""
        found, wanted, light = self.find(ray_indices, share)
        sdf, slope, length = self._sdf[found], self._slope[found], self.lengths[found]
        # Halve [0, 1] in step with all others: `part` is the largest known fraction with too little mass.
        part, width = torch.zeros_like(sdf), 1.0
        for _ in range(_HALVINGS):
            width *= 0.5
            tried = part + width
            at_middle = sdf + slope * length * (0.5 * tried - 0.5)
            opacity = self._alpha(at_middle, slope, tried * length, self._sharpness, 1.0)
            part = torch.where(light * opacity + _FLOOR * tried < wanted, tried, part)
        return self._samples.t_starts[found] + (part + 0.5 * width) * length


def _slopes(
    sdf: Float[Tensor, " S"], middles: Float[Tensor, " S"], follows: Bool[Tensor, " S"]
) -> Float[Tensor, " S"]:
    """Of the signed distance along the ray: mean over the neighbours without a gap, clamped to [-1, 0]."""
    gaps = torch.where(follows, middles - middles.roll(1), 1.0)
    behind = torch.where(follows, (sdf - sdf.roll(1)) / gaps, 0.0)
    is_followed = follows.roll(-1)
    neighbours = follows.long() + is_followed.long()
    mean = (behind + torch.where(is_followed, behind.roll(-1), 0.0)) / neighbours.clamp(min=1)
    return torch.where(neighbours > 0, mean, -1.0).clamp(-1.0, 0.0)
